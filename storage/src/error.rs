//! What can go wrong on a disk, and whether trying again can help.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Every failure of the storage crate. Cheap to clone: one failed fsync answers many waiters.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    /// The operating system refused an operation on a file.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "write", "fsync", "open".
        action: &'static str,
        path: PathBuf,
        source: Arc<io::Error>,
    },
    /// An earlier write or fsync failed, so nothing more may be promised by this process.
    #[error(
        "the commit log stopped after an earlier failure: {reason}; check the disk, then restart the node"
    )]
    Poisoned { reason: Arc<str> },
    /// Bytes that were durable once are no longer what was written.
    #[error("{} is damaged at byte {position}: {reason}", path.display())]
    Damaged {
        path: PathBuf,
        position: u64,
        reason: String,
    },
    /// The entry was purged on every replica. This one still has to apply what took its place.
    #[error(
        "entry {index} was purged; this replica is catching up, so read another one or try again"
    )]
    Purged { index: u64 },
    /// The disk's free space is below the configured reserve.
    #[error("less than {reserve_bytes} bytes are free below {}; delete data or add space", path.display())]
    DiskFull { path: PathBuf, reserve_bytes: u64 },
    /// The caller broke a rule of the interface; nothing was written.
    #[error("invalid request to storage: {0}")]
    InvalidArgument(String),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StorageError {
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_path_buf(),
            source: Arc::new(source),
        }
    }

    /// Whether the same call may succeed later without anybody's help.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::DiskFull { .. } | Self::Purged { .. })
    }
}

impl From<StorageError> for io::Error {
    fn from(error: StorageError) -> Self {
        match &error {
            StorageError::Io { source, .. } => io::Error::new(source.kind(), error.to_string()),
            _ => io::Error::other(error.to_string()),
        }
    }
}
