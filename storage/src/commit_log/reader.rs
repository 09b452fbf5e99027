//! Reading entries: from the tail cache without a copy, from disk with every check.
//!
//! A frame is served only if its checksum is right and it is the frame that was asked for: group, term,
//! index and place. Disk reads happen without any lock held.

use bytes::Bytes;

use super::format::{FRAME_HEADER, FrameHeader, frame_bytes};
use super::frame::{self, Content};
use super::group::{Group, Inner, Place};
use super::index::Run;
use super::part::EntryRef;
use super::scan;
use super::segment::Segment;
use super::shared::Shared;
use super::sidecar;
use super::types::Entry;
use crate::mutation::{self, Mutation};
use crate::{LogId, RaftGroupId, StorageError};

/// Most entries looked up in one go.
const RUN_ENTRIES: usize = 512;
/// Most bytes of one read, unless a single frame is longer.
const READ_BYTES: u64 = 1 << 20;
/// Frames of others between two wanted ones are read along up to this many bytes.
const GAP_BYTES: u64 = 4096;

/// See [`super::GroupLog::read`].
pub(super) fn read(
    shared: &Shared,
    group: &Group,
    start: u64,
    end: u64,
    max_bytes: usize,
) -> Result<Vec<Entry>, StorageError> {
    shared.check_readable()?;
    let mut out = Vec::new();
    let mut bytes = 0;
    let mut version = None;
    loop {
        let next = start + out.len() as u64;
        if next >= end || (bytes >= max_bytes && !out.is_empty()) {
            return Ok(out);
        }
        let inner = group.inner.lock();
        // What was read before a truncation and what came after it must not be mixed.
        if *version.get_or_insert(inner.version) != inner.version {
            if !out.is_empty() {
                return Ok(out);
            }
            version = Some(inner.version);
        }
        if !inner.has(next) {
            return Ok(out);
        }
        let limit = RUN_ENTRIES.min((end - next) as usize);
        let run = match inner.place(next, limit) {
            Place::Cached
                if mutation::on(Mutation::AppendNotReadable)
                    && inner.written.find(next, 1).is_none() =>
            {
                return Ok(out);
            }
            Place::Cached => {
                for entry in inner.cached_from(next).take((end - next) as usize) {
                    if bytes + entry.body.len() > max_bytes && !out.is_empty() {
                        break;
                    }
                    bytes += entry.body.len();
                    out.push(entry.clone());
                }
                return Ok(out);
            }
            Place::Disk(run) => run,
            Place::Lost => return Err(lost(shared, group.id, next)),
        };
        drop(inner);
        let budget = max_bytes.saturating_sub(bytes);
        let before = out.len();
        let result = read_run(shared, group.id, next, run, budget, &mut out);
        match result {
            Ok(()) => {}
            // The place may have been cleaned away since it was looked up.
            Err(_) if version.is_some_and(|v| v != group.inner.lock().version) => {
                out.truncate(before);
                continue;
            }
            Err(error) => return Err(error),
        }
        bytes += out[before..].iter().map(|e| e.body.len()).sum::<usize>();
        if out.len() == before {
            // The next one does not fit any more.
            return Ok(out);
        }
    }
}

/// Entries from `start` on that lie next to each other in this sealed segment; about `max_bytes` of
/// them. None if `start` does not lie there any more.
pub(super) fn read_in(
    shared: &Shared,
    group: &Group,
    segment: &Segment,
    start: u64,
    max_bytes: usize,
) -> Result<Vec<Entry>, StorageError> {
    shared.check_readable()?;
    let mut out = Vec::new();
    loop {
        let found = (group.inner.lock().written).find(start + out.len() as u64, RUN_ENTRIES);
        let Some(run) = found.filter(|run| run.segment().base == segment.base) else {
            return Ok(out);
        };
        let before = out.len();
        let bytes: usize = out.iter().map(|e: &Entry| e.body.len()).sum();
        let budget = max_bytes.saturating_sub(bytes);
        read_run(
            shared,
            group.id,
            start + before as u64,
            run,
            budget,
            &mut out,
        )?;
        if out.len() == before || bytes >= max_bytes {
            return Ok(out);
        }
    }
}

/// Bytes that the frames of one run from `start` on take in this sealed segment; counts no further
/// than `enough`.
pub(super) fn frames_in(
    shared: &Shared,
    group: &Group,
    segment: &Segment,
    start: u64,
    enough: u64,
) -> Result<u64, StorageError> {
    let (mut next, mut bytes) = (start, 0);
    while bytes < enough {
        let found = group.inner.lock().written.find(next, RUN_ENTRIES);
        let refs = match found.filter(|run| run.segment().base == segment.base) {
            None => break,
            Some(Run::Refs(_, refs)) => refs,
            Some(Run::Records { segment, at, count }) => {
                read_records(shared, &segment, at, next, count)?
            }
        };
        let frames = refs.iter().map(|entry| frame_bytes(entry.length as usize));
        bytes += frames.sum::<u64>();
        next += refs.len() as u64;
    }
    Ok(bytes)
}

/// See [`super::GroupLog::log_id_at`].
pub(super) fn log_id_at(
    shared: &Shared,
    group: &Group,
    index: u64,
) -> Result<Option<LogId>, StorageError> {
    shared.check_readable()?;
    let inner = group.inner.lock();
    log_id(shared, group, &inner, index)
}

/// The log id at `index` on the leading side; reads one record of a sidecar at most.
pub(super) fn log_id(
    shared: &Shared,
    group: &Group,
    inner: &Inner,
    index: u64,
) -> Result<Option<LogId>, StorageError> {
    for known in [inner.state.purged, inner.state.last] {
        if known.is_some_and(|id| id.index == index) {
            return Ok(known);
        }
    }
    if !inner.has(index) {
        return Ok(None);
    }
    let refs = match inner.place(index, 1) {
        Place::Cached => {
            let entry = inner.cached_from(index).next();
            return Ok(entry.map(|entry| entry.log_id));
        }
        Place::Disk(Run::Refs(_, refs)) => refs,
        Place::Disk(Run::Records { segment, at, .. }) => {
            read_records(shared, &segment, at, index, 1)?
        }
        Place::Lost => return Err(lost(shared, group.id, index)),
    };
    Ok(refs.first().map(|found| LogId::new(found.term, index)))
}

fn lost(shared: &Shared, group: RaftGroupId, index: u64) -> StorageError {
    StorageError::Damaged {
        path: shared.dir.clone(),
        position: 0,
        reason: format!("no segment holds entry {index} of {group}"),
    }
}

/// Records of a sidecar. One that turns out bad is rebuilt from its segment: it is derived, and its
/// records come to the same places again.
fn read_records(
    shared: &Shared,
    segment: &Segment,
    at: u64,
    first: u64,
    count: usize,
) -> Result<Vec<EntryRef>, StorageError> {
    let read = || sidecar::read_records(&*shared.vfs, segment, at, first, count);
    if let Ok(records) = read()? {
        return Ok(records);
    }
    let _one_at_a_time = shared.rebuilding.lock();
    if let Ok(records) = read()? {
        return Ok(records);
    }
    rebuild_sidecar(shared, segment)?;
    read()?.map_err(|position| StorageError::Damaged {
        path: segment.sidecar.path().to_path_buf(),
        position,
        reason: "an index record is wrong, and rebuilding the index did not help".to_owned(),
    })
}

fn rebuild_sidecar(shared: &Shared, segment: &Segment) -> Result<(), StorageError> {
    tracing::warn!(segment = segment.base, "a sidecar is damaged and rebuilt");
    let file = segment.log.get(&*shared.vfs)?;
    let mut scan = scan::scan(&*file, segment, 0)
        .map_err(|e| StorageError::io("read", segment.log.path(), e))?;
    if !scan.sealed {
        return Err(segment.damaged(scan.end, "the segment ends without its seal"));
    }
    let parts = scan.take_parts();
    let data_end = segment.base + scan.end;
    sidecar::write(
        &*shared.vfs,
        &shared.dir,
        segment,
        data_end,
        scan.epoch,
        &parts,
    )
    .map(drop)
}

fn read_run(
    shared: &Shared,
    group: RaftGroupId,
    first: u64,
    run: Run,
    budget: usize,
    out: &mut Vec<Entry>,
) -> Result<(), StorageError> {
    let (segment, refs) = match run {
        Run::Refs(segment, refs) => (segment, refs),
        Run::Records { segment, at, count } => {
            let refs = read_records(shared, &segment, at, first, count)?;
            (segment, refs)
        }
    };
    let mut wanted = Vec::with_capacity(refs.len());
    let mut bytes = 0;
    for (index, entry) in (first..).zip(refs) {
        bytes += entry.length as usize;
        if bytes > budget && !(wanted.is_empty() && out.is_empty()) {
            break;
        }
        wanted.push((index, entry));
    }
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(joined(rest));
        read_piece(shared, group, &segment, piece, out)?;
        rest = after;
    }
    Ok(())
}

/// How many of the first frames are close enough for one read.
fn joined(refs: &[(u64, EntryRef)]) -> usize {
    let from = u64::from(refs[0].1.offset);
    let ends =
        |entry: &EntryRef| u64::from(entry.offset) + FRAME_HEADER as u64 + u64::from(entry.length);
    let mut end = ends(&refs[0].1);
    for (count, (_, entry)) in refs.iter().enumerate().skip(1) {
        let offset = u64::from(entry.offset);
        if offset < end || offset - end > GAP_BYTES || ends(entry) - from > READ_BYTES {
            return count;
        }
        end = ends(entry);
    }
    refs.len()
}

fn read_piece(
    shared: &Shared,
    group: RaftGroupId,
    segment: &Segment,
    piece: &[(u64, EntryRef)],
    out: &mut Vec<Entry>,
) -> Result<(), StorageError> {
    let (Some((_, head)), Some((_, tail))) = (piece.first(), piece.last()) else {
        return Ok(());
    };
    let from = head.offset as usize;
    let end = tail.offset as usize + FRAME_HEADER + tail.length as usize;
    let mut buf = vec![0; end - from];
    let file = segment.log.get(&*shared.vfs)?;
    let got = file
        .read_at(&mut buf, from as u64)
        .map_err(|e| StorageError::io("read", segment.log.path(), e))?;
    buf.truncate(got);
    let buf = Bytes::from(buf);
    shared.stats.disk_read(got);
    for (index, entry) in piece {
        let start = entry.offset as usize - from;
        let stop = start + FRAME_HEADER + entry.length as usize;
        let damaged = |reason| segment.damaged(u64::from(entry.offset), reason);
        if stop > buf.len() {
            return Err(damaged("the file ends before the frame does"));
        }
        let frame = buf.slice(start..stop);
        let log_id = LogId::new(entry.term, *index);
        out.push(verify(frame, segment, entry, group, log_id).map_err(damaged)?);
    }
    Ok(())
}

/// Turns the bytes of a frame into the entry they should be, or says what is wrong with them.
fn verify(
    bytes: Bytes,
    segment: &Segment,
    entry: &EntryRef,
    group: RaftGroupId,
    log_id: LogId,
) -> Result<Entry, &'static str> {
    let mut raw = [0; FRAME_HEADER];
    raw.copy_from_slice(&bytes[..FRAME_HEADER]);
    let header = FrameHeader::decode(&raw);
    let body = bytes.slice(FRAME_HEADER..);
    let bad = header.length != entry.length || frame::checksum(&raw, &body) != header.crc;
    if bad && !mutation::on(Mutation::ServeBadFrame) {
        return Err("a frame's checksum is wrong");
    }
    let found = frame::interpret(&header).map_err(|_| "a frame of an unknown kind")?;
    let (Content::Entry { log_id: id, kind } | Content::Relocated { log_id: id, kind }) =
        found.content
    else {
        return Err("the frame is not an entry");
    };
    let position = segment.base + u64::from(entry.offset);
    if id != log_id || found.group != group || found.position != position {
        return Err("the frame is another one than was written here");
    }
    Ok(Entry {
        log_id: id,
        kind,
        body,
    })
}
