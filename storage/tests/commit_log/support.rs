//! What the tests of the commit log share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_storage::commit_log::{
    CommitLog, CommitLogConfig, Done, Driver, Entry, EntryKind, Flush, GroupLog, Step,
};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError, Vote};

pub const DIR: &str = "/log";

pub fn config(segment_bytes: u64) -> CommitLogConfig {
    CommitLogConfig {
        segment_bytes,
        reserve_bytes: 0,
        ..CommitLogConfig::default()
    }
}

pub fn open(vfs: &FaultVfs, segment_bytes: u64) -> Result<CommitLog, StorageError> {
    open_with(vfs, config(segment_bytes))
}

pub fn open_with(vfs: &FaultVfs, config: CommitLogConfig) -> Result<CommitLog, StorageError> {
    CommitLog::open(Arc::new(vfs.clone()), Path::new(DIR), config)
}

pub fn open_driven(vfs: &FaultVfs, config: CommitLogConfig) -> (CommitLog, Driver) {
    let vfs: Arc<dyn Vfs> = Arc::new(vfs.clone());
    CommitLog::open_driven(vfs, Path::new(DIR), config).expect("open")
}

/// Steps until there is nothing to do at `now`, background included.
pub fn run(driver: &mut Driver, now: Instant) {
    while driver.step(now) == Step::Worked {}
    while driver.step_background() {}
}

pub fn file(base: u64, extension: &str) -> PathBuf {
    Path::new(DIR).join(format!("{base:020}.{extension}"))
}

pub fn entry(term: u64, index: u64, body: impl Into<Bytes>) -> Entry {
    Entry {
        log_id: LogId::new(term, index),
        kind: EntryKind::Command,
        body: body.into(),
    }
}

/// Entries `from..to` of a term with bodies that name them.
pub fn entries(term: u64, from: u64, to: u64) -> Vec<Entry> {
    (from..to)
        .map(|index| entry(term, index, format!("entry {index} of term {term}")))
        .collect()
}

pub fn vote(term: u64) -> Vote {
    Vote {
        term,
        voted_for: Some(term % 3),
        committed: term.is_multiple_of(2),
    }
}

/// A callback and where its result arrives.
pub fn done() -> (Done, Receiver<Result<(), StorageError>>) {
    let (sender, receiver) = mpsc::channel();
    (Box::new(move |result| drop(sender.send(result))), receiver)
}

/// A callback nobody waits for.
pub fn ignore() -> Done {
    Box::new(|_| {})
}

pub fn wait(receiver: &Receiver<Result<(), StorageError>>) -> Result<(), StorageError> {
    receiver
        .recv_timeout(Duration::from_secs(20))
        .expect("done was not called")
}

pub trait Sync {
    fn append_sync(&self, entries: Vec<Entry>);
    fn vote_sync(&self, vote: Vote);
    fn truncate_sync(&self, index: Option<u64>);
    fn purge_sync(&self, upto: LogId);
    fn try_all(&self) -> Result<Vec<Entry>, StorageError>;
    fn all(&self) -> Vec<Entry>;
}

impl Sync for GroupLog {
    fn append_sync(&self, entries: Vec<Entry>) {
        let (done, result) = done();
        self.append(entries, Flush::Sync, done).expect("append");
        wait(&result).expect("append is durable");
    }

    fn vote_sync(&self, vote: Vote) {
        let (done, result) = done();
        self.save_vote(vote, done).expect("vote");
        wait(&result).expect("vote is durable");
    }

    fn truncate_sync(&self, index: Option<u64>) {
        let (done, result) = done();
        self.truncate_after(index, done).expect("truncate");
        wait(&result).expect("truncate is durable");
    }

    fn purge_sync(&self, upto: LogId) {
        let (done, result) = done();
        self.purge(upto, done).expect("purge");
        wait(&result).expect("purge is durable");
    }

    /// Every entry there is, read piece by piece.
    fn try_all(&self) -> Result<Vec<Entry>, StorageError> {
        let state = self.state();
        let Some(last) = state.last else {
            return Ok(Vec::new());
        };
        let mut next = state.purged.map_or(0, |upto| upto.index + 1);
        let mut out: Vec<Entry> = Vec::new();
        while next <= last.index {
            let more = self.read(next, last.index + 1, 300)?;
            let Some(end) = more.last() else {
                next += 1;
                continue;
            };
            next = end.log_id.index + 1;
            out.extend(more);
        }
        Ok(out)
    }

    fn all(&self) -> Vec<Entry> {
        self.try_all().expect("read")
    }
}

pub fn group(log: &CommitLog, id: u64) -> GroupLog {
    log.group(RaftGroupId(id))
}
