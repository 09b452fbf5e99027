//! Pairs in sled: opening it, and turning its failures into ours.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use super::DerivedWrite;
use super::database::damaged;
use super::engine::{Engine, Tree};
use crate::StorageError;

/// sled's page cache for the whole node. The state is small; what is cold is read again.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// sled gives its file lock back some time after the last handle is dropped.
const LOCK_ATTEMPTS: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// sled writes each full buffer of 512 KiB by one of seven threads, and by the same threads it
/// shortens its file. When all of them wait for a lock whose holder waits for the file to be
/// shortened, nothing goes on any more. So sled is never left with more than a few buffers: after
/// this many bytes somebody waits until all are written.
const UNWRITTEN_BYTES: usize = 512 << 10;
/// Of each change, at most: its page is written anew after a few of them.
const PAGE_BYTES: usize = 1536;

pub(super) struct Disk {
    path: PathBuf,
    db: sled::Db,
    clearing: sled::Tree,
    /// Since all was written.
    unwritten_bytes: AtomicUsize,
}

/// sled's own `Debug` prints the whole content.
impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<Self, StorageError> {
        let mut attempts = 0;
        loop {
            let opened = guarded(path, || {
                let db = sled::Config::new()
                    .path(path)
                    .cache_capacity(CACHE_BYTES)
                    // A periodic flush would fsync beside the commit log, for no promise.
                    .flush_every_ms(None)
                    .open()?;
                let clearing = db.open_tree("clearing")?;
                Ok((db, clearing))
            });
            match opened {
                Ok((db, clearing)) => {
                    return Ok(Self {
                        path: path.to_path_buf(),
                        db,
                        clearing,
                        unwritten_bytes: AtomicUsize::new(0),
                    });
                }
                Err(error) if attempts < LOCK_ATTEMPTS && is_lock(&error) => {
                    attempts += 1;
                    thread::sleep(LOCK_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn tree(&self, tree: Tree) -> &sled::Tree {
        match tree {
            Tree::Pairs => &self.db,
            Tree::Clearing => &self.clearing,
        }
    }
}

impl Engine for Disk {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        let value = guarded(&self.path, || self.tree(tree).get(key))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn visit(
        &self,
        tree: Tree,
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StorageError> {
        guarded(&self.path, || {
            for pair in self.tree(tree).range(from..) {
                let (key, value) = pair?;
                if !visit(&key, &value) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn apply(&self, tree: Tree, batch: Vec<DerivedWrite>) -> Result<(), StorageError> {
        let mut out = sled::Batch::default();
        let mut bytes = 0;
        for (key, value) in batch {
            bytes += PAGE_BYTES + key.len() + value.as_ref().map_or(0, |value| value.len());
            match value {
                Some(value) => out.insert(key, value),
                None => out.remove(key),
            }
        }
        guarded(&self.path, || self.tree(tree).apply_batch(out))?;
        let unwritten = self.unwritten_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if unwritten < UNWRITTEN_BYTES {
            return Ok(());
        }
        self.unwritten_bytes.store(0, Ordering::Relaxed);
        self.flush()
    }

    fn flush(&self) -> Result<(), StorageError> {
        guarded(&self.path, || self.db.flush()).map(|_| ())
    }
}

/// Runs a sled call. sled panics on some bad data, which is no reason for us to die.
fn guarded<T>(path: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StorageError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| translate(path, error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            let reason = format!("sled panicked: {}", text.unwrap_or("no message"));
            Err(damaged(path, reason))
        }
    }
}

/// Failures of the disk or of permissions stay such; everything that bad bytes can cause is
/// damage, for which there is a remedy: rebuilding.
fn translate(path: &Path, error: sled::Error) -> StorageError {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match error {
        sled::Error::Io(e) if ![InvalidData, InvalidInput, UnexpectedEof].contains(&e.kind()) => {
            StorageError::io("use sled in", path, e)
        }
        other => damaged(path, other.to_string()),
    }
}

/// sled gives a held lock no error kind of its own.
fn is_lock(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if source.to_string().contains("acquire lock"))
}
