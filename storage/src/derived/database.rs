//! The sled database: opening, checking, and turning its failures into ours.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::{LogId, RaftGroupId, StorageError};

/// sled's page cache for the whole node. The state is small; what is cold is read again.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// sled gives its file lock back some time after the last handle is dropped.
const LOCK_ATTEMPTS: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
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
    path: PathBuf,
    db: Handle,
    clearing: sled::Tree,
    /// Bad data was met; nothing is believed any more.
    damaged: AtomicBool,
}

/// sled's own `Debug` prints the whole content.
struct Handle(sled::Db);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sled::Db")
    }
}

impl Database {
    /// Opens, finishes clearings that a crash has interrupted, and compares every group with its
    /// fingerprint. All that is wrong with the content comes as [`StorageError::Damaged`].
    pub(super) fn open_and_check(path: &Path) -> Result<Self, StorageError> {
        let database = Self::open(path)?;
        for group in database.interrupted_clearings()? {
            database.clear(group)?;
        }
        for group in database.groups()? {
            database.check(group)?;
        }
        Ok(database)
    }

    fn open(path: &Path) -> Result<Self, StorageError> {
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
                        db: Handle(db),
                        clearing,
                        damaged: AtomicBool::new(false),
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

    /// Runs a sled operation. From the first sign of bad data on, all of them are refused.
    pub(super) fn run<T>(
        &self,
        call: impl FnOnce(&sled::Db) -> sled::Result<T>,
    ) -> Result<T, StorageError> {
        if self.damaged.load(Ordering::Acquire) {
            return Err(damaged(&self.path, "bad data was met before".into()));
        }
        guarded(&self.path, || call(&self.db.0)).inspect_err(|error| {
            if matches!(error, StorageError::Damaged { .. }) {
                self.damaged.store(true, Ordering::Release);
            }
        })
    }

    pub(super) fn meta(&self, group: RaftGroupId) -> Result<Option<Meta>, StorageError> {
        let Some(value) = self.run(|db| db.get(meta_key(group)))? else {
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
            let next = self.run(|db| db.range(from.to_be_bytes()..).keys().next().transpose())?;
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
        self.run(|_| self.clearing.insert(mark, &[]))?;
        let prefix = group.0.to_be_bytes();
        loop {
            // The applied record has the lowest key, so it goes with the first batch.
            let keys: Vec<sled::IVec> = self.run(|db| {
                let keys = db.scan_prefix(prefix).keys();
                keys.take(CLEAR_BATCH).collect()
            })?;
            if keys.is_empty() {
                break;
            }
            let mut batch = sled::Batch::default();
            for key in keys {
                batch.remove(key);
            }
            self.run(|db| db.apply_batch(batch))?;
        }
        self.run(|_| self.clearing.remove(mark))?;
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), StorageError> {
        self.run(|db| db.flush()).map(|_| ())
    }

    fn interrupted_clearings(&self) -> Result<Vec<RaftGroupId>, StorageError> {
        let keys: Vec<sled::IVec> = self.run(|_| self.clearing.iter().keys().collect())?;
        keys.iter()
            .map(|key| match key.first_chunk() {
                Some(id) if key.len() == id.len() => Ok(RaftGroupId(u64::from_be_bytes(*id))),
                _ => Err(self.condemn("a clearing mark is unreadable".into())),
            })
            .collect()
    }

    fn check(&self, group: RaftGroupId) -> Result<(), StorageError> {
        let stored = self.meta(group)?.map(|meta| meta.fingerprint);
        let found = self.run(|db| {
            let mut sum = 0u64;
            for pair in db.scan_prefix(data_prefix(group)) {
                let (key, value) = pair?;
                sum = sum.wrapping_add(fingerprint(&key[PREFIX_BYTES..], &value));
            }
            Ok(sum)
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

fn damaged(path: &Path, reason: String) -> StorageError {
    StorageError::Damaged {
        path: path.to_path_buf(),
        position: 0,
        reason,
    }
}

/// sled gives a held lock no error kind of its own.
fn is_lock(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if source.to_string().contains("acquire lock"))
}
