//! What callers of the commit log hand in and get back.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;

use super::format::SEGMENT_BYTES;
use crate::{LogId, StorageError, Vote};

/// What an entry is to Raft; the body means nothing to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    Blank = 0,
    Command = 1,
    Membership = 2,
}

/// One entry of one Raft group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub log_id: LogId,
    pub kind: EntryKind,
    pub body: Bytes,
}

/// When an append counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// After fdatasync.
    Sync,
    /// After the operating system has the bytes; fdatasync follows within
    /// [`CommitLogConfig::async_flush_interval`].
    Async,
}

/// Called once, on the writer's thread, in the order of the calls. It must be short and must not
/// wait for the log.
pub type Done = Box<dyn FnOnce(Result<(), StorageError>) + Send>;

/// What a Raft group knows about its own log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupState {
    pub vote: Option<Vote>,
    /// The last entry that was forgotten from the front.
    pub purged: Option<LogId>,
    /// The last entry; equals `purged` when there is none.
    pub last: Option<LogId>,
}

/// Settings of one commit log.
#[derive(Debug, Clone)]
pub struct CommitLogConfig {
    /// Bytes of one segment file, 4 KiB to 4 GiB, a multiple of 8. Also bounds an entry.
    pub segment_bytes: u64,
    /// Bytes of written entries kept in memory, over all groups.
    pub tail_cache_bytes: usize,
    /// Bytes after which one write stops taking more from the queue.
    pub write_batch_bytes: usize,
    /// Bytes not yet written above which [`super::CommitLog::has_room`] says no.
    pub queue_bytes: usize,
    /// Quiet time after which a closing mark is written.
    pub idle_mark_after: Duration,
    /// The longest time that bytes of [`Flush::Async`] stay without fdatasync.
    pub async_flush_interval: Duration,
    /// Free space of the disk below which [`super::CommitLog::disk_has_room`] says no.
    pub reserve_bytes: u64,
}

impl Default for CommitLogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            tail_cache_bytes: 64 << 20,
            write_batch_bytes: 8 << 20,
            queue_bytes: 64 << 20,
            idle_mark_after: Duration::from_secs(1),
            async_flush_interval: Duration::from_millis(500),
            reserve_bytes: 1 << 30,
        }
    }
}

impl CommitLogConfig {
    /// Refuses settings the log can't work with.
    pub fn validate(&self) -> Result<(), StorageError> {
        let problem = if !SEGMENT_BYTES.contains(&self.segment_bytes) {
            "segment_bytes must be between 4 KiB and 4 GiB"
        } else if !self.segment_bytes.is_multiple_of(8) {
            "segment_bytes must be a multiple of 8"
        } else if self.write_batch_bytes == 0 {
            "write_batch_bytes must not be 0"
        } else if self.queue_bytes == 0 {
            "queue_bytes must not be 0"
        } else {
            return Ok(());
        };
        Err(StorageError::InvalidArgument(problem.to_owned()))
    }
}

/// What opening the log found and did.
#[derive(Debug, Clone, Default)]
pub struct RecoveryReport {
    /// Segment files, the active one included.
    pub segments: usize,
    /// Sealed segments that were known from their sidecar alone.
    pub sidecars_used: usize,
    /// Sealed segments without a usable sidecar, read as a whole; the sidecar is written again.
    pub sidecars_rebuilt: usize,
    /// Segments read frame by frame, the active one included.
    pub segments_scanned: usize,
    pub bytes_scanned: u64,
    /// The cut at the end of the log, when there was something to cut.
    pub truncated_tail: Option<TruncatedTail>,
    pub duration: Duration,
    /// Damage that stops the log from being opened.
    pub damaged: Vec<DamagedRange>,
}

/// Bytes after the end of the log that were never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TruncatedTail {
    pub path: PathBuf,
    /// Position in the whole log at which it now ends.
    pub position: u64,
    /// Bytes from there to the last one that was not zero.
    pub bytes: u64,
}

/// A place that once held durable bytes and does not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedRange {
    pub path: PathBuf,
    /// Byte in the file.
    pub position: u64,
    /// First byte in the file behind the damage that is known to be good again, if any.
    pub good_again: Option<u64>,
    pub reason: String,
}
