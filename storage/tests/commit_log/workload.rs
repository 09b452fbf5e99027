//! One fixed life of a log that does everything a log does, for tests that break it at every place.

use std::time::Duration;

use quorate_storage::commit_log::{CommitLogConfig, Flush};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, StorageError};

use crate::model::*;
use crate::support::{config, vote};

/// How a life differs from the others: what is read from memory, and what is one write.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    pub tail_cache_bytes: usize,
    pub write_batch_bytes: usize,
}

pub const VARIANTS: [Variant; 2] = [
    Variant {
        tail_cache_bytes: 1 << 20,
        write_batch_bytes: 1 << 20,
    },
    Variant {
        tail_cache_bytes: 0,
        write_batch_bytes: 600,
    },
];

impl Variant {
    pub fn config(self) -> CommitLogConfig {
        CommitLogConfig {
            tail_cache_bytes: self.tail_cache_bytes,
            write_batch_bytes: self.write_batch_bytes,
            ..config(4096)
        }
    }
}

/// A life as far as it got, and why it ended early. None: the log could not be opened.
pub type Lived = (Option<Session>, Result<(), StorageError>);

/// Lives the whole life on an empty disk, or until something fails. A failed restart ends it as it was
/// before: all that was called has been written by then.
pub fn live(vfs: FaultVfs, variant: Variant) -> Lived {
    let mut life = match Session::open(vfs, variant.config(), Session::nothing()) {
        Ok(session) => Life { session },
        Err(error) => return (None, Err(error)),
    };
    let lived = life.first();
    if lived.is_err() {
        return (Some(life.session), lived);
    }
    let (again, lived) = life.session.restart(variant.config());
    let mut life = Life { session: again };
    let lived = lived.and_then(|()| life.second());
    if lived.is_err() {
        return (Some(life.session), lived);
    }
    let (again, lived) = life.session.restart(variant.config());
    let mut life = Life { session: again };
    let lived = lived.and_then(|()| life.third());
    (Some(life.session), lived)
}

struct Life {
    session: Session,
}

type Done = Result<(), StorageError>;

impl Life {
    fn append(&mut self, id: u64, count: u64, size: usize, flush: Flush) -> Done {
        let last = self.session.model(id).last();
        let (term, next) = last.map_or((1, 0), |last| (last.term, last.index + 1));
        let entries = self.session.entries(term, next, count, size);
        self.session.perform(Call::Append(id, entries, flush))
    }

    fn overwrite(&mut self, id: u64, term: u64, from: u64, count: u64) -> Done {
        let entries = self.session.entries(term, from, count, 40);
        self.session.perform(Call::Append(id, entries, Flush::Sync))
    }

    fn all(&mut self, calls: impl IntoIterator<Item = Call>) -> Done {
        let mut calls = calls.into_iter();
        calls.try_for_each(|call| self.session.perform(call))
    }

    fn first(&mut self) -> Done {
        // Frames of several groups in one write, and a vote that vouches for unsynced appends.
        self.append(0, 2, 30, Flush::Sync)?;
        self.append(1, 3, 20, Flush::Sync)?;
        self.all([Call::Vote(2, vote(3)), Call::Step])?;
        self.append(1, 2, 50, Flush::Async)?;
        self.all([Call::Step])?;
        self.append(2, 1, 10, Flush::Async)?;
        self.all([Call::Step, Call::Vote(1, vote(4)), Call::Step])?;
        // Another leader's entries replace some, and others are cut.
        self.overwrite(0, 2, 1, 2)?;
        self.all([Call::Truncate(1, Some(1)), Call::Settle])?;
        self.append(1, 1, 33, Flush::Async)?;
        self.all([Call::Truncate(2, None), Call::Settle])?;
        // A quiet time: the closing mark.
        self.all([Call::Wait(Duration::from_secs(2)), Call::Settle])?;
        // Into the next segment, made ahead; then into one that was not.
        self.append(0, 2, 700, Flush::Sync)?;
        self.all([Call::Settle, Call::Background])?;
        self.append(1, 4, 600, Flush::Sync)?;
        self.all([Call::Settle])?;
        self.append(0, 5, 650, Flush::Async)?;
        self.all([Call::Settle, Call::Background])?;
        // Old segments go; the vote in them is written again first.
        let upto = self.session.model(0).entries[&4].0;
        self.all([Call::Purge(0, upto), Call::Purge(1, LogId::new(1, 4))])?;
        self.all([Call::Settle, Call::Clean])?;
        self.append(2, 2, 300, Flush::Sync)?;
        self.all([Call::Settle])
    }

    fn second(&mut self) -> Done {
        // Written before the restart and after it, unsynced until the interval is over.
        self.append(1, 2, 60, Flush::Async)?;
        self.all([Call::Step])?;
        self.append(0, 1, 60, Flush::Async)?;
        self.all([Call::Step, Call::Wait(Duration::from_millis(600))])?;
        self.all([Call::Step])?;
        // Many writes that no fsync keeps in order.
        for id in [0, 2, 1, 0, 2, 1] {
            self.append(id, 1, 200, Flush::Async)?;
            self.all([Call::Step])?;
        }
        // A group ends, and one of the same number begins.
        self.all([Call::Remove(2), Call::Step])?;
        self.append(2, 2, 25, Flush::Sync)?;
        self.all([Call::Vote(2, vote(7)), Call::Settle])?;
        // Beyond the end, as after an installed snapshot.
        self.all([Call::Purge(1, LogId::new(3, 20)), Call::Settle])?;
        self.append(1, 6, 640, Flush::Sync)?;
        self.all([Call::Settle])?;
        let upto = self.session.model(0).last().expect("an entry");
        self.all([Call::Purge(0, upto), Call::Settle, Call::Background])?;
        self.all([Call::Clean])?;
        self.overwrite(1, 5, 24, 2)?;
        self.all([Call::Vote(0, vote(8)), Call::Step, Call::Settle])
    }

    /// Quiet groups keep old segments, and are moved out of them.
    fn third(&mut self) -> Done {
        self.append(0, 2, 20, Flush::Sync)?;
        self.append(2, 3, 20, Flush::Async)?;
        self.all([Call::Settle])?;
        self.fill_and_purge(5)?;
        // One of those to be moved is cut, and another purged, while that is not written yet.
        let last = self.session.model(2).last().expect("an entry").index;
        self.all([Call::Truncate(2, Some(last - 1))])?;
        let first = self.session.model(0).entries.values().next().map(|e| e.0);
        self.all([Call::Purge(0, first.expect("an entry")), Call::Clean])?;
        self.overwrite(2, 7, last, 1)?;
        self.all([Call::Settle, Call::Background])?;
        // What was moved is moved again, beside what came later.
        self.fill_and_purge(10)?;
        self.all([Call::Background, Call::Clean])?;
        self.overwrite(2, 8, last - 1, 1)?;
        self.all([Call::Settle])?;
        self.session.close()?;
        Ok(())
    }

    /// Fills segments with what is not kept.
    fn fill_and_purge(&mut self, count: u64) -> Done {
        self.append(1, count, 640, Flush::Sync)?;
        let last = self.session.model(1).last().expect("an entry");
        self.all([Call::Settle, Call::Purge(1, last), Call::Settle])
    }
}
