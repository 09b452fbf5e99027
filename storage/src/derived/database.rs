//! The groups' pairs in one engine: checking them, and believing nothing once they are bad.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::Disk;
use super::engine::{Engine, Tree};
use super::memory::Memory;
use crate::{LogId, RaftGroupId, StorageError};

/// Keys removed by one batch when a group is cleared.
const CLEAR_BATCH: usize = 1000;

const META: u8 = 0;
const DATA: u8 = 1;
/// Group and kind before the caller's key.
pub(super) const PREFIX_BYTES: usize = 9;

/// The record written with every batch of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Meta {
    pub applied: LogId,
    pub fingerprint: u64,
}

#[derive(Debug)]
pub(super) struct Database {
    /// Where it is, or what it is called in errors.
    path: PathBuf,
    engine: Box<dyn Engine>,
    /// Bad data was met; nothing is believed any more.
    damaged: AtomicBool,
}

impl Database {
    /// Opens, finishes clearings that a crash has interrupted, and compares every group with its
    /// fingerprint. All that is wrong with the content comes as [`StorageError::Damaged`].
    pub(super) fn open_and_check(path: &Path) -> Result<Self, StorageError> {
        let database = Self::new(path, Box::new(Disk::open(path)?));
        for group in database.interrupted_clearings()? {
            database.clear(group)?;
        }
        for group in database.groups()? {
            database.check(group)?;
        }
        Ok(database)
    }

    /// An empty one that leaves nothing behind.
    pub(super) fn in_memory() -> Self {
        Self::new(Path::new("memory"), Box::new(Memory::default()))
    }

    fn new(path: &Path, engine: Box<dyn Engine>) -> Self {
        Self {
            path: path.to_path_buf(),
            engine,
            damaged: AtomicBool::new(false),
        }
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Acquire)
    }

    /// Runs an operation. From the first sign of bad data on, all of them are refused.
    pub(super) fn run<T>(
        &self,
        call: impl FnOnce(&dyn Engine) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        if self.damaged.load(Ordering::Acquire) {
            return Err(damaged(&self.path, "bad data was met before".into()));
        }
        call(&*self.engine).inspect_err(|error| {
            if matches!(error, StorageError::Damaged { .. }) {
                self.damaged.store(true, Ordering::Release);
            }
        })
    }

    /// The pairs whose key begins with `prefix`, from `from` on, until `visit` has enough.
    pub(super) fn visit_prefix(
        &self,
        prefix: &[u8],
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StorageError> {
        self.run(|engine| {
            engine.visit(Tree::Pairs, from, &mut |key, value| {
                key.starts_with(prefix) && visit(key, value)
            })
        })
    }

    pub(super) fn meta(&self, group: RaftGroupId) -> Result<Option<Meta>, StorageError> {
        let Some(value) = self.run(|engine| engine.get(Tree::Pairs, &meta_key(group)))? else {
            return Ok(None);
        };
        match decode_meta(&value) {
            Some(meta) => Ok(Some(meta)),
            None => Err(self.condemn(format!("group {group} has an unreadable applied record"))),
        }
    }

    /// Marks the database as unusable.
    fn condemn(&self, reason: String) -> StorageError {
        self.damaged.store(true, Ordering::Release);
        damaged(&self.path, reason)
    }

    pub(super) fn groups(&self) -> Result<Vec<RaftGroupId>, StorageError> {
        let mut groups = Vec::new();
        let mut from = 0u64;
        loop {
            let mut next = None;
            self.visit_prefix(&[], &from.to_be_bytes(), &mut |key, _| {
                next = Some(key.to_vec());
                false
            })?;
            let Some(key) = next else { break };
            let Some(id) = key.first_chunk().copied().map(u64::from_be_bytes) else {
                return Err(self.condemn("a key is too short".into()));
            };
            groups.push(RaftGroupId(id));
            match id.checked_add(1) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(groups)
    }

    /// Removes all of a group. Recorded first, so that [`Database::open_and_check`] finishes what
    /// a crash interrupts: a group without an applied log id never has leftovers.
    pub(super) fn clear(&self, group: RaftGroupId) -> Result<(), StorageError> {
        let mark = group.0.to_be_bytes();
        let set_mark = |value: Option<Vec<u8>>| {
            let batch = vec![(mark.to_vec(), value)];
            self.run(|engine| engine.apply(Tree::Clearing, batch))
        };
        set_mark(Some(Vec::new()))?;
        loop {
            // The applied record has the lowest key, so it goes with the first batch.
            let mut batch = Vec::new();
            self.visit_prefix(&mark, &mark, &mut |key, _| {
                batch.push((key.to_vec(), None));
                batch.len() < CLEAR_BATCH
            })?;
            if batch.is_empty() {
                break;
            }
            self.run(|engine| engine.apply(Tree::Pairs, batch))?;
        }
        set_mark(None)
    }

    pub(super) fn flush(&self) -> Result<(), StorageError> {
        self.run(|engine| engine.flush())
    }

    fn interrupted_clearings(&self) -> Result<Vec<RaftGroupId>, StorageError> {
        let mut keys = Vec::new();
        self.run(|engine| {
            engine.visit(Tree::Clearing, &[], &mut |key, _| {
                keys.push(key.to_vec());
                true
            })
        })?;
        keys.iter()
            .map(|key| match key.first_chunk() {
                Some(id) if key.len() == id.len() => Ok(RaftGroupId(u64::from_be_bytes(*id))),
                _ => Err(self.condemn("a clearing mark is unreadable".into())),
            })
            .collect()
    }

    fn check(&self, group: RaftGroupId) -> Result<(), StorageError> {
        let stored = self.meta(group)?.map(|meta| meta.fingerprint);
        let mut found = 0u64;
        let prefix = data_prefix(group);
        self.visit_prefix(&prefix, &prefix, &mut |key, value| {
            found = found.wrapping_add(fingerprint(&key[PREFIX_BYTES..], value));
            true
        })?;
        if stored != Some(found) {
            let reason = format!("the state of group {group} does not match its fingerprint");
            return Err(self.condemn(reason));
        }
        Ok(())
    }
}

/// What one pair adds to its group's fingerprint. The length separates key from value.
pub(super) fn fingerprint(key: &[u8], value: &[u8]) -> u64 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), value);
    let second = crc32c::crc32c_append(crc32c::crc32c(value) ^ key.len() as u32, key);
    // Sums of plain CRCs would cancel out too easily: they are linear. (splitmix64's finish)
    let mut mixed = u64::from(crc) << 32 | u64::from(second);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

pub(super) fn meta_key(group: RaftGroupId) -> [u8; PREFIX_BYTES] {
    prefix(group, META)
}

pub(super) fn data_prefix(group: RaftGroupId) -> [u8; PREFIX_BYTES] {
    prefix(group, DATA)
}

fn prefix(group: RaftGroupId, kind: u8) -> [u8; PREFIX_BYTES] {
    let mut key = [kind; PREFIX_BYTES];
    key[..8].copy_from_slice(&group.0.to_be_bytes());
    key
}

pub(super) fn encode_meta(meta: Meta) -> [u8; 24] {
    let mut value = [0; 24];
    value[..8].copy_from_slice(&meta.applied.term.to_be_bytes());
    value[8..16].copy_from_slice(&meta.applied.index.to_be_bytes());
    value[16..].copy_from_slice(&meta.fingerprint.to_be_bytes());
    value
}

fn decode_meta(value: &[u8]) -> Option<Meta> {
    let value: [u8; 24] = value.try_into().ok()?;
    let field = |at: usize| {
        let mut field = [0; 8];
        field.copy_from_slice(&value[at..at + 8]);
        u64::from_be_bytes(field)
    };
    Some(Meta {
        applied: LogId::new(field(0), field(8)),
        fingerprint: field(16),
    })
}

pub(super) fn damaged(path: &Path, reason: String) -> StorageError {
    StorageError::Damaged {
        path: path.to_path_buf(),
        position: 0,
        reason,
    }
}
