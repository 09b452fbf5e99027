//! Snapshots of Raft groups: files of our own, complete or absent.
//!
//! A snapshot is written to a temporary file, fsynced, renamed, and its directory fsynced: only
//! then may anyone record that it exists. Reading verifies a checksum over every byte. A damaged
//! snapshot is reported and moved out of the way as `*.damaged`; it is never served.
//!
//! ```text
//! {dir}/{group:020}/{index:020}-{term:020}.snap
//! ```
//!
//! | bytes | field (little-endian) |
//! |---|---|
//! | 0..8 | magic `QRTSNAP1`, the last digit is the version |
//! | 8 | kind: 1 checkpoint, 2 boundary |
//! | 9..16 | zero |
//! | 16..24 | Raft group |
//! | 24..32 | term of the last entry |
//! | 32..40 | index of the last entry |
//! | 40..48 | length M of the membership |
//! | 48..56 | length B of the body |
//! | 56..56+M | membership |
//! | ..+B | body |
//! | last 4 | CRC-32C of everything before |

mod format;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::files::{self, TEMP_SUFFIX};
use crate::mutation::{self, Mutation};
use crate::vfs::Vfs;
use crate::{LogId, RaftGroupId, StorageError};

const SUFFIX: &str = ".snap";
const DAMAGED_SUFFIX: &str = ".damaged";

/// Why a snapshot exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// The state at a fixed index, for restarting from.
    Checkpoint,
    /// The state at the purge point: what a new replica starts from. The oldest one kept.
    Boundary,
}

/// What a snapshot says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotHeader {
    /// The last entry whose effect the state contains.
    pub last: LogId,
    /// The membership in force there, in the encoding of the layer above.
    pub membership: Bytes,
    pub kind: SnapshotKind,
}

/// All snapshots of a node. Cheap to clone; safe to use from many threads.
#[derive(Clone)]
pub struct SnapshotStore {
    vfs: Arc<dyn Vfs>,
    dir: Arc<Path>,
    temp_counter: Arc<AtomicU64>,
}

impl fmt::Debug for SnapshotStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotStore")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl SnapshotStore {
    /// Opens the store in `dir` (the snapshots' own directory), creating it if needed, and
    /// removes what unfinished writes have left. Whatever is found from then on survives a power cut.
    pub fn open(vfs: Arc<dyn Vfs>, dir: &Path) -> Result<Self, StorageError> {
        files::create_dirs(&*vfs, dir)?;
        let store = Self {
            vfs,
            dir: dir.into(),
            temp_counter: Arc::default(),
        };
        for group in store.groups()? {
            for path in store.paths(group)? {
                if path.to_string_lossy().ends_with(TEMP_SUFFIX) {
                    files::remove_if_present(&*store.vfs, &path)?;
                }
            }
            // A process that was killed may have named a snapshot without getting that far; what is
            // found here is built upon.
            files::sync_dir(&*store.vfs, &store.dir_of(group))?;
        }
        Ok(store)
    }

    /// Stores a snapshot, replacing one of the same log id. When this returns it survives a
    /// power cut; after an error the old one is still there, or the new one is.
    pub fn write(
        &self,
        group: RaftGroupId,
        header: &SnapshotHeader,
        body: &[u8],
    ) -> Result<(), StorageError> {
        let dir = self.dir_of(group);
        files::create_dirs(&*self.vfs, &dir)?;
        let path = self.path(group, header.last);
        // A name of its own, so that two writers of one snapshot don't write into one file.
        let number = self.temp_counter.fetch_add(1, Ordering::Relaxed);
        let temp = files::with_suffix(&path, &format!(".{number}{TEMP_SUFFIX}"));
        files::remove_if_present(&*self.vfs, &temp)?;
        let written = self
            .write_temp(&temp, group, header, body)
            .and_then(|()| files::publish(&*self.vfs, &temp, &path));
        if written.is_err() {
            // Best effort: the next open removes it too.
            let _ = files::remove_if_present(&*self.vfs, &temp);
        }
        written
    }

    /// Where a group's snapshots are.
    pub fn dir_of(&self, group: RaftGroupId) -> PathBuf {
        self.dir.join(format!("{:020}", group.0))
    }

    /// The log ids of the group's snapshots, ascending by index.
    pub fn list(&self, group: RaftGroupId) -> Result<Vec<LogId>, StorageError> {
        let mut found: Vec<LogId> = self
            .paths(group)?
            .iter()
            .filter_map(|path| parse_name(path))
            .collect();
        found.sort_by_key(|id| (id.index, id.term));
        Ok(found)
    }

    /// The newest snapshot that is sound. Damaged ones are moved aside and skipped.
    pub fn read_newest(
        &self,
        group: RaftGroupId,
    ) -> Result<Option<(SnapshotHeader, Bytes)>, StorageError> {
        for last in self.list(group)?.into_iter().rev() {
            match self.read(group, last) {
                // `read` has reported it and moved it aside.
                Err(StorageError::Damaged { .. }) => {}
                result => return result.map(Some),
            }
        }
        Ok(None)
    }

    /// Reads and verifies a snapshot. A damaged one is renamed `*.damaged` and gives
    /// [`StorageError::Damaged`]; one that doesn't exist gives [`StorageError::Io`].
    pub fn read(
        &self,
        group: RaftGroupId,
        last: LogId,
    ) -> Result<(SnapshotHeader, Bytes), StorageError> {
        let path = self.path(group, last);
        let io = |action, e| StorageError::io(action, &path, e);
        let file = self.vfs.open(&path).map_err(|e| io("open", e))?;
        let len = file.len().map_err(|e| io("measure", e))?;
        let len = usize::try_from(len).map_err(|e| io("measure", std::io::Error::other(e)))?;
        let mut bytes = vec![0; len];
        let read = file.read_at(&mut bytes, 0).map_err(|e| io("read", e))?;
        bytes.truncate(read);
        format::decode(Bytes::from(bytes), group, last)
            .map_err(|(position, reason)| self.set_aside(&path, position, reason))
    }

    /// Removes a snapshot, durably. One that isn't there is fine.
    pub fn remove(&self, group: RaftGroupId, last: LogId) -> Result<(), StorageError> {
        self.remove_all(group, &[self.path(group, last)])
    }

    /// Removes all that a group has here, durably, damaged files included. Its empty directory
    /// stays.
    pub fn remove_group(&self, group: RaftGroupId) -> Result<(), StorageError> {
        let paths = self.paths(group)?;
        self.remove_all(group, &paths)
    }

    /// Removes all but the newest `keep` snapshots and the one at `boundary`, whatever its age:
    /// nothing else could produce the state at the purge point. Gives the log ids removed.
    pub fn keep_newest(
        &self,
        group: RaftGroupId,
        keep: usize,
        boundary: Option<LogId>,
    ) -> Result<Vec<LogId>, StorageError> {
        let mut old = self.list(group)?;
        old.truncate(old.len().saturating_sub(keep));
        old.retain(|last| Some(*last) != boundary);
        let paths: Vec<PathBuf> = old.iter().map(|last| self.path(group, *last)).collect();
        self.remove_all(group, &paths)?;
        Ok(old)
    }

    /// Groups that have, or once had, a snapshot.
    pub fn groups(&self) -> Result<Vec<RaftGroupId>, StorageError> {
        let entries = self
            .vfs
            .list(&self.dir)
            .map_err(|e| StorageError::io("list", &self.dir, e))?;
        Ok(entries
            .iter()
            .filter_map(|path| parse_number(path.file_name()?.to_str()?))
            .map(RaftGroupId)
            .collect())
    }

    fn write_temp(
        &self,
        temp: &Path,
        group: RaftGroupId,
        header: &SnapshotHeader,
        body: &[u8],
    ) -> Result<(), StorageError> {
        let io = |action, e| StorageError::io(action, temp, e);
        let head = format::encode_head(group, header, body.len());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head), body);
        let file = self.vfs.create(temp).map_err(|e| io("create", e))?;
        let mut position = 0;
        for part in [&head[..], body, &crc.to_le_bytes()] {
            file.write_all_at(part, position)
                .map_err(|e| io("write", e))?;
            position += part.len() as u64;
        }
        if mutation::on(Mutation::SnapshotNotSynced) {
            return Ok(());
        }
        file.sync_all().map_err(|e| io("fsync", e))
    }

    fn set_aside(&self, path: &Path, position: u64, reason: &str) -> StorageError {
        let aside = files::with_suffix(path, DAMAGED_SUFFIX);
        let moved = files::publish(&*self.vfs, path, &aside);
        tracing::error!(
            path = %path.display(),
            moved_to = %aside.display(),
            moved = moved.is_ok(),
            reason,
            "a snapshot is damaged and will not be used"
        );
        StorageError::Damaged {
            path: path.to_path_buf(),
            position,
            reason: reason.to_owned(),
        }
    }

    fn remove_all(&self, group: RaftGroupId, paths: &[PathBuf]) -> Result<(), StorageError> {
        if paths.is_empty() {
            return Ok(());
        }
        for path in paths {
            files::remove_if_present(&*self.vfs, path)?;
        }
        let dir = self.dir_of(group);
        if self.exists(&dir)? {
            files::sync_dir(&*self.vfs, &dir)?;
        }
        Ok(())
    }

    fn paths(&self, group: RaftGroupId) -> Result<Vec<PathBuf>, StorageError> {
        let dir = self.dir_of(group);
        if !self.exists(&dir)? {
            return Ok(Vec::new());
        }
        self.vfs
            .list(&dir)
            .map_err(|e| StorageError::io("list", &dir, e))
    }

    fn exists(&self, path: &Path) -> Result<bool, StorageError> {
        self.vfs
            .exists(path)
            .map_err(|e| StorageError::io("look up", path, e))
    }

    fn path(&self, group: RaftGroupId, last: LogId) -> PathBuf {
        let name = format!("{:020}-{:020}{SUFFIX}", last.index, last.term);
        self.dir_of(group).join(name)
    }
}

fn parse_name(path: &Path) -> Option<LogId> {
    let name = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
    let (index, term) = name.split_once('-')?;
    Some(LogId::new(parse_number(term)?, parse_number(index)?))
}

/// Twenty digits, exactly as they are written: other names are not ours.
fn parse_number(text: &str) -> Option<u64> {
    let ours = text.len() == 20 && text.bytes().all(|byte| byte.is_ascii_digit());
    ours.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests;
