//! openraft's log storage on the shared commit log.
//!
//! Every write of a group (entries, votes, truncations, purges) goes through the one queue of the
//! commit log, so their order on disk is the order of these calls. openraft depends on it: a saved
//! vote counts as proof that the appends before it are on disk.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use quorate_storage::StorageError;
use quorate_storage::commit_log::{Done, Entry, EntryKind, Flush, GroupLog};
use tokio::sync::oneshot;

use crate::types::{
    RaftEntry, RaftLogId, RaftVote, TypeConfig, from_raft_log_id, from_raft_vote, to_log_entry,
    to_raft_entry, to_raft_log_id, to_raft_vote,
};

/// The most bytes one replication request reads from the log.
const READ_BYTES_MAX: usize = 1 << 20;

/// One group's log, as openraft sees it.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    log: GroupLog,
    flush: Flush,
    must_be_synced: fn(&Bytes) -> bool,
}

impl LogStore {
    pub(crate) fn new(log: GroupLog, flush: Flush, must_be_synced: fn(&Bytes) -> bool) -> Self {
        Self {
            log,
            flush,
            must_be_synced,
        }
    }

    /// Membership is never left to a later flush, nor is what the state machine names.
    fn flush_of(&self, entries: &[Entry]) -> Flush {
        let must_be_synced = |entry: &Entry| match entry.kind {
            EntryKind::Blank => false,
            EntryKind::Membership => true,
            EntryKind::Command => (self.must_be_synced)(&entry.body),
        };
        match self.flush {
            Flush::Async if entries.iter().any(must_be_synced) => Flush::Sync,
            flush => flush,
        }
    }

    /// The part of a range that the log holds, as `[start, end)`.
    fn clamp(&self, range: &impl RangeBounds<u64>) -> (u64, u64) {
        let state = self.log.state();
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index + 1,
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        (
            start.max(state.purged.map_or(0, |purged| purged.index + 1)),
            end.min(state.last.map_or(0, |last| last.index + 1)),
        )
    }
}

/// A completion that a task can wait for.
pub(crate) fn completion() -> (Done, oneshot::Receiver<Result<(), StorageError>>) {
    let (tx, rx) = oneshot::channel();
    let done: Done = Box::new(move |result| {
        // Nobody waits any more when the group was closed meanwhile.
        tx.send(result).ok();
    });
    (done, rx)
}

async fn wait(rx: oneshot::Receiver<Result<(), StorageError>>) -> io::Result<()> {
    match rx.await {
        Ok(result) => result.map_err(io::Error::from),
        Err(_) => Err(StorageError::Closed.into()),
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<RaftEntry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (mut next, end) = self.clamp(&range);
        let mut entries = Vec::with_capacity(end.saturating_sub(next).min(1024) as usize);
        while next < end {
            let read = self.log.read(next, end, usize::MAX)?;
            // A log has no holes, so nothing here can only be before its first entry.
            next += (read.len() as u64).max(1);
            for entry in read {
                entries.push(to_raft_entry(entry)?);
            }
        }
        Ok(entries)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> io::Result<Vec<RaftEntry>> {
        self.log
            .read(start, end, READ_BYTES_MAX)?
            .into_iter()
            .map(|entry| to_raft_entry(entry).map_err(io::Error::from))
            .collect()
    }

    /// Reads for apply, a bounded piece at a time: a long catch-up must not become a long `Vec`.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = self.clamp(&range);
        let log = self.log.clone();
        let pieces = stream::unfold((log, start), move |(log, next)| async move {
            if next >= end {
                return None;
            }
            let piece = match log.read(next, end, READ_BYTES_MAX) {
                Ok(piece) if piece.is_empty() => return None,
                Ok(piece) => piece,
                Err(error) => return Some((vec![Err(io::Error::from(error))], (log, end))),
            };
            let next = next + piece.len() as u64;
            let entries = piece
                .into_iter()
                .map(|entry| to_raft_entry(entry).map_err(io::Error::from))
                .collect::<Vec<_>>();
            Some((entries, (log, next)))
        });
        Box::pin(pieces.flat_map(stream::iter))
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        Ok(self.log.state().vote.map(to_raft_vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let state = self.log.state();
        Ok(LogState {
            last_purged_log_id: state.purged.map(to_raft_log_id),
            last_log_id: state.last.map(to_raft_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        let (done, rx) = completion();
        self.log.save_vote(from_raft_vote(vote), done)?;
        wait(rx).await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().map(to_log_entry).collect();
        let done: Done =
            Box::new(move |result| callback.io_completed(result.map_err(io::Error::from)));
        let flush = self.flush_of(&entries);
        self.log.append(entries, flush, done)?;
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<RaftLogId>) -> io::Result<()> {
        let (done, rx) = completion();
        let index = last_log_id.map(|id| from_raft_log_id(&id).index);
        self.log.truncate_after(index, done)?;
        wait(rx).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> io::Result<()> {
        let (done, rx) = completion();
        self.log.purge(from_raft_log_id(&log_id), done)?;
        wait(rx).await
    }
}
