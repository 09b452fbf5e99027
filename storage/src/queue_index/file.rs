//! Whole-file operations: create, read, scan. Nothing here keeps state.

use std::path::Path;
use std::sync::Arc;

use super::IndexRecord;
use super::format::{
    HEADER_BYTES, Header, RECORD_BYTES, decode_record, encode_record, record_position,
};
use crate::StorageError;
use crate::files::{self, TEMP_SUFFIX};
use crate::vfs::{Vfs, VfsFile};

/// Records read at a time when many are wanted: 40 KiB.
pub(super) const READ_CHUNK: u64 = 1024;

/// Reads and checks records `ordinal..ordinal + count`, all of which must be in the file.
pub(super) fn read_records(
    file: &dyn VfsFile,
    path: &Path,
    ordinal: u64,
    count: usize,
) -> Result<Vec<IndexRecord>, StorageError> {
    let mut bytes = vec![0; count * RECORD_BYTES];
    let position = record_position(ordinal);
    let read = file
        .read_at(&mut bytes, position)
        .map_err(|e| StorageError::io("read", path, e))?;
    bytes.truncate(read);
    let mut records: Vec<IndexRecord> = Vec::with_capacity(count);
    for n in 0..count {
        let at = (n * RECORD_BYTES).min(bytes.len());
        let record = decode_record(&bytes[at..], ordinal + n as u64)
            .and_then(|record| match records.last() {
                Some(previous) if !follows(previous, &record) => Err(GAP),
                _ => Ok(record),
            })
            .map_err(|reason| damaged(path, ordinal + n as u64, reason))?;
        records.push(record);
    }
    Ok(records)
}

const GAP: &str = "the record does not follow the one before it";

fn follows(previous: &IndexRecord, next: &IndexRecord) -> bool {
    next.base_offset == previous.end_offset() && next.timestamp_ms >= previous.timestamp_ms
}

pub(super) fn damaged(path: &Path, ordinal: u64, reason: &str) -> StorageError {
    StorageError::Damaged {
        path: path.to_path_buf(),
        position: record_position(ordinal),
        reason: reason.to_owned(),
    }
}

/// What a scan found: how far the records are sound, the last sound one, why it stopped early.
#[derive(Debug)]
pub(super) struct Scan {
    pub sound: u64,
    pub last: Option<IndexRecord>,
    pub fault: Option<StorageError>,
}

/// Checks records `from..to` one after the other, and that record 0 begins at `start_offset`.
/// Other callers than a full scan begin one record earlier than they doubt.
pub(super) fn scan(
    file: &dyn VfsFile,
    path: &Path,
    start_offset: u64,
    from: u64,
    to: u64,
) -> Result<Scan, StorageError> {
    let mut last: Option<IndexRecord> = None;
    let mut bytes = vec![0; (READ_CHUNK.min(to - from) as usize) * RECORD_BYTES];
    let mut ordinal = from;
    while ordinal < to {
        let wanted = (READ_CHUNK.min(to - ordinal) as usize) * RECORD_BYTES;
        let read = file
            .read_at(&mut bytes[..wanted], record_position(ordinal))
            .map_err(|e| StorageError::io("read", path, e))?;
        for chunk in bytes[..wanted].chunks_exact(RECORD_BYTES).enumerate() {
            let here = (chunk.0 + 1) * RECORD_BYTES <= read;
            let record = decode_record(if here { chunk.1 } else { &[] }, ordinal);
            let connected = record.and_then(|record| {
                let connected = match &last {
                    Some(previous) => follows(previous, &record),
                    None => ordinal > 0 || record.base_offset == start_offset,
                };
                if connected { Ok(record) } else { Err(GAP) }
            });
            match connected {
                Ok(record) => last = Some(record),
                Err(reason) => {
                    return Ok(Scan {
                        sound: ordinal,
                        last,
                        fault: Some(damaged(path, ordinal, reason)),
                    });
                }
            }
            ordinal += 1;
        }
    }
    Ok(Scan {
        sound: to,
        last,
        fault: None,
    })
}

/// Reads the newest sound header and the number of whole records, and the torn bytes after them.
pub(super) fn read_header(
    file: &dyn VfsFile,
    path: &Path,
) -> Result<(Header, u64, u64), StorageError> {
    let io = |action, e| StorageError::io(action, path, e);
    let mut area = [0; HEADER_BYTES as usize];
    let read = file.read_at(&mut area, 0).map_err(|e| io("read", e))?;
    let header = Header::newest(&area[..read]).ok_or_else(|| StorageError::Damaged {
        path: path.to_path_buf(),
        position: 0,
        reason: "neither header is sound".to_owned(),
    })?;
    let len = file.len().map_err(|e| io("measure", e))?;
    let body = len.saturating_sub(HEADER_BYTES);
    let record = RECORD_BYTES as u64;
    Ok((header, body / record, body % record))
}

/// Writes a complete file beside `path` and fsyncs it; [`publish`] puts it in its place.
/// `records` is asked for the records in chunks, until it gives none.
pub(super) fn build(
    vfs: &dyn Vfs,
    path: &Path,
    header: Header,
    mut records: impl FnMut() -> Result<Vec<IndexRecord>, StorageError>,
) -> Result<Arc<dyn VfsFile>, StorageError> {
    files::create_dirs(vfs, &files::parent(path))?;
    let temp = files::with_suffix(path, TEMP_SUFFIX);
    files::remove_if_present(vfs, &temp)?;
    let io = |action, e| StorageError::io(action, &temp, e);
    let file = vfs.create(&temp).map_err(|e| io("create", e))?;
    let mut area = vec![0; HEADER_BYTES as usize];
    let slot = header.encode();
    area[..slot.len()].copy_from_slice(&slot);
    file.write_all_at(&area, 0).map_err(|e| io("write", e))?;
    let mut ordinal = 0;
    loop {
        let chunk = records()?;
        if chunk.is_empty() {
            break;
        }
        write_records(&*file, &chunk, ordinal).map_err(|e| io("write", e))?;
        ordinal += chunk.len() as u64;
    }
    debug_assert_eq!(ordinal, header.durable, "the header counts the records");
    file.sync_all().map_err(|e| io("fsync", e))?;
    Ok(file)
}

/// Puts what [`build`] made in the place of `path`. After an error either file may be there.
pub(super) fn publish(vfs: &dyn Vfs, path: &Path) -> Result<(), StorageError> {
    files::publish(vfs, &files::with_suffix(path, TEMP_SUFFIX), path)
}

pub(super) fn write_records(
    file: &dyn VfsFile,
    records: &[IndexRecord],
    first_ordinal: u64,
) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES);
    for (ordinal, record) in (first_ordinal..).zip(records) {
        encode_record(&mut bytes, record, ordinal);
    }
    file.write_all_at(&bytes, record_position(first_ordinal))
}
