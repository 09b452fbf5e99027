//! Opening, creating and checking an index file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::file::{self, Scan, read_header, scan};
use super::format::{Header, RECORD_BYTES, record_position};
use super::sample::Sample;
use super::{IndexRecord, QueueIndex, State};
use crate::StorageError;
use crate::files::{self, TEMP_SUFFIX};
use crate::vfs::{Vfs, VfsFile};

/// What opening found and did. The owner compares the index's end with its checkpoint's: what
/// lies between has to be appended again from the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// There was no file; an empty one beginning at offset 0 was made.
    pub created: bool,
    /// Sound records, and how many of them were looked at (those since the last sync but one).
    pub records: u64,
    pub checked_records: u64,
    /// Bytes after the sound records that were cut off: torn, unordered or unfinished writes.
    pub discarded_bytes: u64,
    /// Why the sound part ended before the file did.
    pub fault: Option<String>,
    /// Records that an fsync had covered are gone. That is no crash but damage to the disk.
    pub durable_loss: bool,
}

impl QueueIndex {
    /// Opens the index at `path`, or makes an empty one that begins at offset 0.
    ///
    /// Looks only at records that were not yet durable at the last sync but one; cuts off what
    /// follows the sound ones. Fails with `Damaged` when the headers are: then
    /// [`QueueIndex::create_at`] and rebuild.
    pub fn open(vfs: Arc<dyn Vfs>, path: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let path = path.into();
        let exists = vfs
            .exists(&path)
            .map_err(|e| StorageError::io("look up", &path, e))?;
        if !exists {
            let mut index = Self::create_at(vfs, path, 0)?;
            index.report.created = true;
            return Ok(index);
        }
        files::remove_if_present(&*vfs, &files::with_suffix(&path, TEMP_SUFFIX))?;
        let file = vfs
            .open(&path)
            .map_err(|e| StorageError::io("open", &path, e))?;
        let (header, physical, torn) = read_header(&*file, &path)?;
        let (scan, checked) = scan_doubtful(&*file, &path, &header, physical)?;
        let report = OpenReport {
            created: false,
            records: scan.sound,
            checked_records: checked,
            discarded_bytes: (physical - scan.sound) * RECORD_BYTES as u64 + torn,
            fault: scan.fault.as_ref().map(StorageError::to_string),
            durable_loss: scan.sound < header.durable,
        };
        let state = State {
            dirty: true,
            found: true,
            ..recovered_state(file, &header, &scan)
        };
        let index = Self::assemble(vfs, path, state, report);
        if index.report.discarded_bytes > 0 || index.report.durable_loss {
            tracing::warn!(
                path = %index.path.display(),
                records = index.report.records,
                discarded_bytes = index.report.discarded_bytes,
                durable_loss = index.report.durable_loss,
                fault = index.report.fault.as_deref().unwrap_or("the end is torn"),
                "the queue index was cut back to its sound part"
            );
            index.cut_file()?;
        }
        Ok(index)
    }

    /// Makes an empty index whose first message will have `first_offset`, in the place of any
    /// file that is there: after a snapshot was installed, or to rebuild.
    pub fn create_at(
        vfs: Arc<dyn Vfs>,
        path: impl Into<PathBuf>,
        first_offset: u64,
    ) -> Result<Self, StorageError> {
        let path = path.into();
        let header = Header::new(first_offset, first_offset, 0);
        let file = file::build(&*vfs, &path, header, || Ok(Vec::new()))?;
        file::publish(&*vfs, &path)?;
        let nothing = Scan {
            sound: 0,
            last: None,
            fault: None,
        };
        let state = recovered_state(file, &header, &nothing);
        Ok(Self::assemble(vfs, path, state, OpenReport::default()))
    }

    /// What [`QueueIndex::open`] found.
    pub fn report(&self) -> &OpenReport {
        &self.report
    }

    /// Reads every record. Gives the end of the sound prefix, and the damage that ends it, if
    /// any. For scrubbing; records are also checked whenever they are read.
    pub fn check(&self) -> Result<(u64, Option<StorageError>), StorageError> {
        self.undisturbed(|index| {
            let (file, start_offset, written, end) = {
                let state = index.state.read();
                (
                    Arc::clone(&state.file),
                    state.start_offset,
                    state.written,
                    state.end_offset,
                )
            };
            let scan = scan(&*file, &index.path, start_offset, 0, written)?;
            let sound_end = match (&scan.fault, &scan.last) {
                (None, _) => end,
                (Some(_), Some(last)) => last.end_offset(),
                (Some(_), None) => start_offset,
            };
            Ok((sound_end, scan.fault))
        })
    }

    fn assemble(vfs: Arc<dyn Vfs>, path: PathBuf, state: State, report: OpenReport) -> Self {
        Self {
            vfs,
            path,
            report,
            writer: Mutex::new(()),
            state: RwLock::new(state),
            sample: Mutex::new(Sample::default()),
        }
    }
}

/// Checks the records that may not have been durable, and the last durable one. If that one is
/// bad, all are checked, to say how far the file can be believed. Gives also how many were read.
fn scan_doubtful(
    file: &dyn VfsFile,
    path: &Path,
    header: &Header,
    physical: u64,
) -> Result<(Scan, u64), StorageError> {
    let from = header.durable.min(physical).saturating_sub(1);
    let doubtful = scan(file, path, header.start_offset, from, physical)?;
    if doubtful.fault.is_none() || doubtful.last.is_some() || from == 0 {
        return Ok((doubtful, physical - from));
    }
    let whole = scan(file, path, header.start_offset, 0, physical)?;
    Ok((whole, physical))
}

fn recovered_state(file: Arc<dyn VfsFile>, header: &Header, scan: &Scan) -> State {
    let end_offset = scan
        .last
        .as_ref()
        .map_or(header.start_offset, IndexRecord::end_offset);
    State {
        file,
        epoch: 0,
        header_sequence: header.sequence,
        start_offset: header.start_offset,
        first_offset: header.first_offset.min(end_offset),
        live_from: header.live_from.min(scan.sound),
        written: scan.sound,
        durable: header.durable.min(scan.sound),
        end_offset,
        last_timestamp_ms: scan.last.map_or(0, |record| record.timestamp_ms),
        tail: Vec::new(),
        dirty: false,
        found: false,
        failed: None,
    }
}

impl State {
    /// The state of a new, fully durable file that takes the place of this one's.
    pub(super) fn replaced(
        &self,
        file: Arc<dyn VfsFile>,
        header: &Header,
        end_offset: u64,
        last_timestamp_ms: u64,
    ) -> Self {
        Self {
            file,
            epoch: self.epoch + 1,
            header_sequence: header.sequence,
            start_offset: header.start_offset,
            first_offset: header.first_offset,
            live_from: header.live_from,
            written: header.durable,
            durable: header.durable,
            end_offset,
            last_timestamp_ms,
            tail: Vec::new(),
            dirty: false,
            found: false,
            failed: None,
        }
    }

    pub(super) fn len_bytes(&self) -> u64 {
        record_position(self.written)
    }
}
