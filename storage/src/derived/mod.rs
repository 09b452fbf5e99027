//! Derived state in sled: what can always be rebuilt from the newest snapshot and the log. A node's
//! environment may choose memory instead, which is empty after every restart.
//!
//! One database per node. Each Raft group has its own keys behind a prefix: a sled tree per group
//! would cost memory for every one of thousands. Each batch of changes is written together with
//! the [`LogId`](crate::LogId) it brings the group to, in one sled batch: after a crash a group's state and its
//! applied log id belong together, though both may be older than what was last written.
//!
//! **Nothing here is durable**, [`DerivedStore::flush`] included: sled 0.34 does not fsync its
//! log the way it says, and some of its databases can't be opened after an abrupt stop. So a
//! database that won't open, or whose state does not match its own fingerprint, is moved aside
//! and an empty one takes its place; [`DerivedStore::reset_report`] says so, and every group
//! starts from its snapshot. Bad data met later makes every call fail with
//! [`StorageError::Damaged`] until [`DerivedStore::reset`], or until the node starts again.
//!
//! | key (big-endian) | value |
//! |---|---|
//! | group u64, 0x00 | applied term u64, applied index u64, fingerprint u64 |
//! | group u64, 0x01, the caller's key | the caller's value |
//! | tree `clearing`: group u64 | empty: the group is being cleared |
//!
//! The fingerprint is the wrapping sum of the hashes of all the group's keys and values. sled
//! checks each page, but may silently lose some; the fingerprint notices.

mod database;
mod disk;
mod engine;
mod group;
mod keys;
mod memory;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::{RaftGroupId, StorageError};
use database::Database;

pub use group::{DerivedGroup, DerivedWrite};
pub use keys::{KeyBuilder, KeyReader};

/// A node's derived state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DerivedStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// None: in memory.
    path: Option<PathBuf>,
    /// None only after a reset that could not open a new database.
    database: RwLock<Option<Database>>,
    /// Moves with each reset. Handles of an older generation are refused: their owners believe
    /// in state that is gone.
    generation: AtomicU64,
    report: Mutex<Option<ResetReport>>,
}

/// A database was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResetReport {
    /// Where it was moved, for a person to look at.
    pub moved_to: PathBuf,
    pub reason: String,
}

impl DerivedStore {
    /// Opens the database in the directory `path`, or starts an empty one. One that is unsound is
    /// moved aside, see [`DerivedStore::reset_report`]. Fails when the directory can't be used at
    /// all, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let mut report = None;
        let database = match Database::open_and_check(path) {
            Ok(database) => database,
            Err(StorageError::Damaged { reason, .. }) => {
                report = Some(set_aside(path, reason)?);
                Database::open_and_check(path)?
            }
            Err(error) => return Err(error),
        };
        Ok(Self::new(Some(path.to_path_buf()), database, report))
    }

    /// An empty store that forgets all when its last handle is dropped, and that has no threads,
    /// files or chances of its own: every process begins from snapshots and the log, always in the
    /// same way.
    pub fn in_memory() -> Self {
        Self::new(None, Database::in_memory(), None)
    }

    fn new(path: Option<PathBuf>, database: Database, report: Option<ResetReport>) -> Self {
        Self {
            inner: Arc::new(Inner {
                path,
                database: RwLock::new(Some(database)),
                generation: AtomicU64::new(0),
                report: Mutex::new(report),
            }),
        }
    }

    /// The last time the database was given up, since this store was opened.
    pub fn reset_report(&self) -> Option<ResetReport> {
        self.inner.report.lock().clone()
    }

    /// A handle to the group's keys. Creating it reads and writes nothing.
    pub fn group(&self, id: RaftGroupId) -> DerivedGroup {
        let generation = self.inner.generation.load(Ordering::Acquire);
        DerivedGroup::new(Arc::clone(&self.inner), id, generation)
    }

    /// Groups that have anything here.
    pub fn groups(&self) -> Result<Vec<RaftGroupId>, StorageError> {
        self.inner.with(None, Database::groups)
    }

    /// Gives the database up and starts an empty one: after a call has failed with
    /// [`StorageError::Damaged`]. All handles made before are refused from now on; every group has
    /// to be rebuilt from its snapshot.
    pub fn reset(&self, reason: &str) -> Result<(), StorageError> {
        let mut database = self.inner.database.write();
        self.inner.generation.fetch_add(1, Ordering::AcqRel);
        // Before the move: sled writes its last snapshot by path.
        drop(database.take());
        let Some(path) = &self.inner.path else {
            *database = Some(Database::in_memory());
            return Ok(());
        };
        let report = set_aside(path, reason.to_owned())?;
        *self.inner.report.lock() = Some(report);
        *database = Some(Database::open_and_check(path)?);
        Ok(())
    }

    /// Whether bad data was met: every call fails until [`DerivedStore::reset`].
    pub fn is_damaged(&self) -> bool {
        let database = self.inner.database.read();
        database.as_ref().is_none_or(Database::is_damaged)
    }

    /// Hands what is buffered to the operating system, so that a killed process finds more recent
    /// state when it starts. No promise of durability.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.inner.with(None, Database::flush)
    }
}

impl Inner {
    /// Runs `call` on the database, provided the caller's handle is of this generation.
    fn with<T>(
        &self,
        generation: Option<u64>,
        call: impl FnOnce(&Database) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let database = self.database.read();
        let current = self.generation.load(Ordering::Acquire);
        if generation.is_some_and(|generation| generation != current) {
            let reason = "the derived state was reset; rebuild the group from its snapshot";
            return Err(database::damaged(
                self.path.as_deref().unwrap_or(Path::new("memory")),
                reason.into(),
            ));
        }
        call(database.as_ref().ok_or(StorageError::Closed)?)
    }
}

/// Moves the directory to a free name beside it.
fn set_aside(path: &Path, reason: String) -> Result<ResetReport, StorageError> {
    let mut number = 0;
    let moved_to = loop {
        let name = crate::files::with_suffix(path, &format!(".damaged-{number}"));
        let taken = name
            .try_exists()
            .map_err(|e| StorageError::io("look up", &name, e))?;
        if !taken {
            break name;
        }
        number += 1;
    };
    std::fs::rename(path, &moved_to).map_err(|e| StorageError::io("rename", path, e))?;
    tracing::error!(
        path = %path.display(),
        moved_to = %moved_to.display(),
        reason,
        "the derived state is unusable and will be rebuilt from snapshots and the log"
    );
    Ok(ResetReport { moved_to, reason })
}

#[cfg(test)]
mod tests;
