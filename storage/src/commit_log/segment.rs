//! One segment file and its sidecar: names, lazily opened handles, creation.
//!
//! Invariant: a segment gets its final name only when its header and its space are durable, and no
//! frame is written into it before the directory entry is durable too.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::format::{BASE_MAX, SegmentHeader};
use crate::StorageError;
use crate::mutation::{self, Mutation};
use crate::vfs::{Vfs, VfsFile};

/// Zeroes are written in pieces of this size while a segment is prepared.
const FILL_BYTES: usize = 1 << 20;

/// A segment of the log. Kept open by whoever reads it, even after it was removed.
#[derive(Debug)]
pub(super) struct Segment {
    pub base: u64,
    pub capacity: u64,
    pub log: LazyFile,
    pub sidecar: LazyFile,
}

impl Segment {
    pub fn new(dir: &Path, header: SegmentHeader) -> Self {
        Self {
            base: header.base,
            capacity: header.capacity,
            log: LazyFile::new(log_path(dir, header.base)),
            sidecar: LazyFile::new(sidecar_path(dir, header.base)),
        }
    }

    /// Position behind the segment: the next one's base.
    pub fn end(&self) -> u64 {
        self.base + self.capacity
    }

    pub fn damaged(&self, offset: u64, reason: impl Into<String>) -> StorageError {
        StorageError::Damaged {
            path: self.log.path().to_path_buf(),
            position: offset,
            reason: reason.into(),
        }
    }
}

/// A file that is opened when first needed.
#[derive(Debug)]
pub(super) struct LazyFile {
    path: PathBuf,
    file: Mutex<Option<Arc<dyn VfsFile>>>,
}

impl LazyFile {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: Mutex::new(None),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn get(&self, vfs: &dyn Vfs) -> Result<Arc<dyn VfsFile>, StorageError> {
        let mut slot = self.file.lock();
        if let Some(file) = &*slot {
            return Ok(file.clone());
        }
        let file = vfs
            .open(&self.path)
            .map_err(|e| StorageError::io("open", &self.path, e))?;
        *slot = Some(file.clone());
        Ok(file)
    }

    /// Forgets the handle, so that the next use sees a replaced file.
    pub fn reopen_later(&self) {
        *self.file.lock() = None;
    }
}

/// Creates a segment, durable with its directory entry, all bytes after the header zero.
///
/// Its space is reserved in any case. It is also written full of zeroes, which makes later syncs
/// cheaper (docs/adr/0002-segment-preallocation.md), for as long as `enough` does not say stop.
pub(super) fn create(
    vfs: &dyn Vfs,
    dir: &Path,
    base: u64,
    capacity: u64,
    enough: &dyn Fn() -> bool,
) -> Result<Arc<Segment>, StorageError> {
    let segment = Segment::new(dir, SegmentHeader { base, capacity });
    let path = segment.log.path();
    let temporary = temporary_path(path);
    let io = |action, e| StorageError::io(action, path, e);
    if vfs.exists(&temporary).map_err(|e| io("look for", e))? {
        vfs.remove(&temporary).map_err(|e| io("remove", e))?;
    }
    let file = vfs.create(&temporary).map_err(|e| io("create", e))?;
    file.allocate(capacity)
        .map_err(|e| io("reserve space for", e))?;
    let step = FILL_BYTES as u64;
    let mut filled = 0;
    while filled < capacity && !enough() {
        let to = capacity.min(filled + step);
        fill_with_zeroes(&*file, filled, to).map_err(|e| io("fill", e))?;
        filled = to;
    }
    let header = SegmentHeader { base, capacity }.encode();
    file.write_all_at(&header, 0).map_err(|e| io("write", e))?;
    file.sync_all().map_err(|e| io("fsync", e))?;
    vfs.rename(&temporary, path).map_err(|e| io("rename", e))?;
    if !mutation::on(Mutation::NoDirectoryFsync) {
        vfs.sync_dir(dir)
            .map_err(|e| StorageError::io("fsync", dir, e))?;
    }
    *segment.log.file.lock() = Some(file);
    Ok(Arc::new(segment))
}

/// Overwrites `from..to` with zeroes. Syncs as it goes, so that one large flush never stands in the
/// way of the log's own.
pub(super) fn fill_with_zeroes(file: &dyn VfsFile, from: u64, to: u64) -> std::io::Result<()> {
    let zeroes = vec![0; FILL_BYTES.min((to - from.min(to)) as usize)];
    let mut at = from;
    while at < to {
        let step = zeroes.len().min((to - at) as usize);
        file.write_all_at(&zeroes[..step], at)?;
        file.sync_data()?;
        at += step as u64;
    }
    Ok(())
}

pub(super) fn log_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.log"))
}

pub(super) fn sidecar_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.idx"))
}

/// Where a file is written before it gets its name. Left-overs are removed at the next opening.
pub(super) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// What a file in the log's directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Log(u64),
    Sidecar(u64),
    Temporary,
    Other,
}

pub(super) fn classify(path: &Path) -> FileKind {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return FileKind::Other;
    };
    if name.ends_with(".tmp") {
        return FileKind::Temporary;
    }
    let Some((digits, extension)) = name.split_once('.') else {
        return FileKind::Other;
    };
    if digits.len() != 20 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return FileKind::Other;
    }
    match (digits.parse(), extension) {
        (Ok(base), "log") if base <= BASE_MAX => FileKind::Log(base),
        (Ok(base), "idx") if base <= BASE_MAX => FileKind::Sidecar(base),
        _ => FileKind::Other,
    }
}
