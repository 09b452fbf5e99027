//! What a node stands on: this machine, or a simulated one.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use quorate_raft::link::Network;
use quorate_raft::this_boot;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::derived::DerivedStore;
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{StorageError, files};
use rustix::fs::{FlockOperation, flock};

const CLEAN_EVERY: Duration = Duration::from_secs(30);

type OpenLog = Box<
    dyn Fn(Arc<dyn Vfs>, &Path, CommitLogConfig) -> Result<CommitLog, StorageError> + Send + Sync,
>;

type OpenDerived = Box<dyn Fn() -> Result<DerivedStore, StorageError> + Send + Sync>;

/// See the module.
pub struct Environment {
    pub vfs: Arc<dyn Vfs>,
    pub network: Network,
    /// Tells whether the machine has crashed since the last run.
    pub boot_id: String,
    /// With or without threads of its own.
    pub open_log: OpenLog,
    /// Between two looks for segments that nothing needs any more. None where whoever drives the log
    /// sees to that; nobody reads it in search of damage then.
    pub clean_every: Option<Duration>,
    /// What can be rebuilt. sled knows no other file system than the machine's, and has threads of
    /// its own.
    pub open_derived: OpenDerived,
    /// Held as long as the node runs.
    pub lock: Option<File>,
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("vfs", &self.vfs)
            .field("boot_id", &self.boot_id)
            .finish_non_exhaustive()
    }
}

impl Environment {
    /// This machine, with its disk below `dir`.
    ///
    /// # Errors
    /// When the directory cannot be made, or another process uses it.
    pub fn of_this_machine(dir: &Path, network: impl Into<Network>) -> Result<Self> {
        // One that is there may lie in a directory that this user must not open to sync it.
        if !dir.is_dir() {
            files::create_dirs(&OsVfs, dir)
                .with_context(|| format!("cannot create the data directory {}", dir.display()))?;
        }
        let lock = lock_directory(dir)?;
        let derived_dir = dir.join("derived");
        Ok(Self {
            vfs: Arc::new(OsVfs),
            network: network.into(),
            boot_id: this_boot()?,
            open_log: Box::new(CommitLog::open),
            clean_every: Some(CLEAN_EVERY),
            open_derived: Box::new(move || DerivedStore::open(&derived_dir)),
            lock: Some(lock),
        })
    }
}

/// Two processes on one directory would destroy it.
fn lock_directory(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "the data directory {} is in use by another process; stop it, or give this node a directory of its own",
            dir.display()
        );
    }
    Ok(file)
}
