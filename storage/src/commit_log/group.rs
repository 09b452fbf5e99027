//! One Raft group's view of the log, and the handle that its owner writes and reads through.
//!
//! A group has two sides under one short lock. The leading side is what callers see: it moves when a
//! call is queued. The written side ([`Written`]) follows when frames are encoded. Between the two lies
//! the cached suffix of entries: every entry that is not written yet is in it, so an index below the
//! suffix means the same on both sides.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::index::{Run, Written};
use super::owner::Owner;
use super::queue::{Action, Op};
use super::reader;
use super::types::{Done, Entry, Flush, GroupState};
use crate::{LogId, RaftGroupId, StorageError, Vote};

/// Memory a cached entry takes beside its body.
const CACHED_OVERHEAD: usize = 96;

#[derive(Debug)]
pub(super) struct Group {
    pub id: RaftGroupId,
    pub inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub state: GroupState,
    /// The newest entries, consecutive, up to `state.last`.
    cached: VecDeque<Cached>,
    /// Raft index of the first of `cached`, or of the next entry.
    cached_first: u64,
    /// Raft index of the first entry that is not purged, when there is one.
    first: u64,
    next_seq: u64,
    /// Moves when an entry that was readable stops being so.
    pub version: u64,
    pub written: Written,
}

#[derive(Debug)]
struct Cached {
    seq: u64,
    entry: Entry,
}

/// Where to read an index.
pub(super) enum Place {
    Cached,
    Disk(Run),
    /// The indexes say it should be there, and it is not.
    Lost,
}

impl Group {
    pub fn new(id: RaftGroupId, written: Written) -> Self {
        let state = GroupState {
            vote: written.vote.map(|(vote, _)| vote),
            purged: written.purged.map(|(upto, _)| upto),
            last: written.last,
        };
        Self {
            id,
            inner: Mutex::new(Inner {
                state,
                cached_first: state.last.map_or(0, |last| last.index + 1),
                first: match state.purged {
                    Some(upto) => upto.index + 1,
                    None => written.first().unwrap_or(0),
                },
                written,
                ..Inner::default()
            }),
        }
    }

    /// Drops cached entries that the call `seq` or an earlier one brought; they must be written.
    pub fn evict(&self, seq: u64) -> usize {
        let mut inner = self.inner.lock();
        let mut freed = 0;
        while let Some(front) = inner.cached.front()
            && front.seq <= seq
        {
            freed += cost(&front.entry);
            inner.cached.pop_front();
            inner.cached_first += 1;
        }
        freed
    }

    /// Whether the cache still holds an entry of the call `seq` or an earlier one.
    pub fn caches(&self, seq: u64) -> bool {
        let inner = self.inner.lock();
        inner.cached.front().is_some_and(|front| front.seq <= seq)
    }
}

fn cost(entry: &Entry) -> usize {
    entry.body.len() + CACHED_OVERHEAD
}

impl Inner {
    /// Whether there is an entry with this index.
    pub fn has(&self, index: u64) -> bool {
        self.state.last.is_some_and(|last| index <= last.index) && index >= self.first
    }

    pub fn place(&self, index: u64, limit: usize) -> Place {
        if index >= self.cached_first {
            return Place::Cached;
        }
        // From the cached suffix on, the written side may still hold what was replaced since.
        let limit = limit.min((self.cached_first - index) as usize);
        match self.written.find(index, limit) {
            Some(run) => Place::Disk(run),
            None => Place::Lost,
        }
    }

    /// Cached entries from `index`, which must not be below the cached suffix.
    pub fn cached_from(&self, index: u64) -> impl Iterator<Item = &Entry> {
        let skip = (index - self.cached_first) as usize;
        self.cached
            .range(skip.min(self.cached.len())..)
            .map(|cached| &cached.entry)
    }

    /// Makes entries at `from` and above unreadable. Returns the bytes freed.
    fn cut(&mut self, from: u64, kept: Option<LogId>) -> usize {
        let keep = from.saturating_sub(self.cached_first) as usize;
        let freed = self
            .cached
            .drain(keep.min(self.cached.len())..)
            .map(|cached| cost(&cached.entry))
            .sum();
        self.cached_first = self.cached_first.min(from);
        self.state.last = kept;
        self.version += 1;
        freed
    }

    /// Makes entries up to `upto` unreadable. Returns the bytes freed.
    fn purge(&mut self, upto: LogId) -> usize {
        let gone = (upto.index + 1).saturating_sub(self.cached_first) as usize;
        let freed = self
            .cached
            .drain(..gone.min(self.cached.len()))
            .map(|cached| cost(&cached.entry))
            .sum();
        self.cached_first = self.cached_first.max(upto.index + 1);
        self.first = upto.index + 1;
        self.state.purged = Some(upto);
        if self.state.last.is_none_or(|last| last.index < upto.index) {
            self.state.last = Some(upto);
        }
        self.version += 1;
        freed
    }

    fn forget(&mut self) -> usize {
        let freed = self.cut(0, None);
        self.cached_first = 0;
        self.state = GroupState::default();
        freed
    }
}

/// The log of one Raft group. Cheap to clone; all clones are the same group.
///
/// Calls that write return at once. When they return an error nothing was queued and `done` is dropped
/// uncalled; otherwise `done` is called exactly once, in the order of the calls.
#[derive(Clone)]
pub struct GroupLog {
    pub(super) owner: Arc<Owner>,
    pub(super) group: Arc<Group>,
}

impl fmt::Debug for GroupLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GroupLog").field(&self.group.id).finish()
    }
}

impl GroupLog {
    pub fn id(&self) -> RaftGroupId {
        self.group.id
    }

    /// The group's state with everything that is queued.
    pub fn state(&self) -> GroupState {
        self.group.inner.lock().state
    }

    /// Appends consecutive entries; they are readable when this returns. The first one follows the last
    /// entry, or replaces it and everything behind it from its index on. An empty group may start
    /// anywhere.
    pub fn append(
        &self,
        entries: Vec<Entry>,
        flush: Flush,
        done: Done,
    ) -> Result<(), StorageError> {
        let Some(first) = entries.first() else {
            return self.push(Action::Barrier, 0, done);
        };
        let first = first.log_id.index;
        let mut bytes = 0;
        for (index, entry) in (first..).zip(&entries) {
            if entry.log_id.index != index {
                return invalid(format!("entry {} does not follow", entry.log_id));
            }
            if entry.body.len() > self.owner.shared.max_body {
                return invalid(format!("entry {} is larger than a segment", entry.log_id));
            }
            bytes += cost(entry);
        }
        let mut inner = self.group.inner.lock();
        let GroupState { purged, last, .. } = inner.state;
        if last.is_some_and(|last| first > last.index + 1) {
            return invalid(format!("entry {first} leaves a hole in {}", self.group.id));
        }
        if purged.is_some_and(|upto| first <= upto.index) {
            return invalid(format!("entry {first} of {} is purged", self.group.id));
        }
        let seq = inner.next_seq;
        let last_id = entries.last().map(|entry| entry.log_id);
        let cached = entries.clone();
        self.push(
            Action::Append {
                group: self.group.clone(),
                seq,
                entries,
                next: 0,
                flush,
            },
            bytes,
            done,
        )?;
        inner.next_seq += 1;
        let mut freed = 0;
        match last {
            Some(last) if first <= last.index => {
                freed = inner.cut(first, None);
                inner.first = inner.first.min(first);
            }
            Some(_) => {}
            None => {
                inner.cached_first = first;
                inner.first = first;
            }
        }
        let cached = cached.into_iter().map(|entry| Cached { seq, entry });
        inner.cached.extend(cached);
        inner.state.last = last_id;
        self.owner.shared.cache.grew(bytes, freed);
        Ok(())
    }

    /// Saves a vote; always fsynced, and never before the appends that were called earlier.
    pub fn save_vote(&self, vote: Vote, done: Done) -> Result<(), StorageError> {
        let mut inner = self.group.inner.lock();
        self.push(Action::Vote(self.group.clone(), vote), 0, done)?;
        inner.state.vote = Some(vote);
        Ok(())
    }

    /// Cuts the log's end: `index` becomes the last entry; none cuts everything that is not purged.
    pub fn truncate_after(&self, index: Option<u64>, done: Done) -> Result<(), StorageError> {
        let mut inner = self.group.inner.lock();
        let GroupState { purged, last, .. } = inner.state;
        let from = match index {
            Some(u64::MAX) => return self.push(Action::Barrier, 0, done),
            Some(index) => index + 1,
            None => purged.map_or(0, |upto| upto.index + 1),
        };
        if purged.is_some_and(|upto| from <= upto.index) {
            return invalid(format!("entries of {} are purged above", self.group.id));
        }
        if last.is_none_or(|last| last.index < from) {
            return self.push(Action::Barrier, 0, done);
        }
        let kept = match from.checked_sub(1) {
            None => None,
            Some(kept) if purged.is_some_and(|upto| upto.index == kept) => purged,
            Some(kept) => reader::log_id(&self.owner.shared, &self.group, &inner, kept)?,
        };
        let action = Action::Truncate {
            group: self.group.clone(),
            from,
            kept,
        };
        self.push(action, 0, done)?;
        let freed = inner.cut(from, kept);
        self.owner.shared.cache.grew(0, freed);
        Ok(())
    }

    /// Forgets the log's front up to `upto`, which may lie beyond the last entry.
    pub fn purge(&self, upto: LogId, done: Done) -> Result<(), StorageError> {
        if upto.index == u64::MAX {
            return invalid("there is no entry behind the largest index".to_owned());
        }
        let mut inner = self.group.inner.lock();
        if inner
            .state
            .purged
            .is_some_and(|old| upto.index <= old.index)
        {
            return self.push(Action::Barrier, 0, done);
        }
        if inner.state.last.is_some() && upto.index + 1 < inner.first {
            return invalid(format!("{} begins behind {upto}", self.group.id));
        }
        self.push(Action::Purge(self.group.clone(), upto), 0, done)?;
        let freed = inner.purge(upto);
        self.owner.shared.cache.grew(0, freed);
        Ok(())
    }

    /// Entries of `[start, end)` in order, about `max_bytes` of bodies but at least one entry if
    /// `start` exists; nothing if it is purged or not there yet.
    pub fn read(&self, start: u64, end: u64, max_bytes: usize) -> Result<Vec<Entry>, StorageError> {
        let shared = &self.owner.shared;
        let read = reader::read(shared, &self.group, start, end, max_bytes);
        shared.damage.watch(self.group.id, read)
    }

    /// The log id at an index; also of the last purged one.
    pub fn log_id_at(&self, index: u64) -> Result<Option<LogId>, StorageError> {
        let shared = &self.owner.shared;
        let found = reader::log_id_at(shared, &self.group, index);
        shared.damage.watch(self.group.id, found)
    }

    /// Damage that no read can find: something of this group is gone without a trace.
    pub fn report_damage(&self, reason: String) {
        let shared = &self.owner.shared;
        let damage = StorageError::Damaged {
            path: shared.dir.clone(),
            position: 0,
            reason,
        };
        shared
            .damage
            .watch(self.group.id, Err::<(), _>(damage))
            .ok();
    }

    pub(super) fn remove(&self, done: Done) {
        let mut inner = self.group.inner.lock();
        let op = Op {
            action: Action::Remove(self.group.clone()),
            done: Some(done),
        };
        match self.owner.shared.queue.push(op, 0) {
            Ok(()) => {
                let freed = inner.forget();
                self.owner.shared.cache.grew(0, freed);
            }
            Err(refused) => {
                drop(inner);
                if let Some(done) = refused.op.done {
                    done(Err(refused.error));
                }
            }
        }
    }

    fn push(&self, action: Action, bytes: usize, done: Done) -> Result<(), StorageError> {
        let op = Op {
            action,
            done: Some(done),
        };
        let pushed = self.owner.shared.queue.push(op, bytes);
        pushed.map_err(|refused| refused.error)
    }
}

fn invalid<T>(message: String) -> Result<T, StorageError> {
    Err(StorageError::InvalidArgument(message))
}

/// How much the tail caches of all groups hold together.
#[derive(Debug, Default)]
pub(super) struct CacheSize {
    bytes: AtomicUsize,
    evicted: AtomicU64,
}

impl CacheSize {
    pub fn grew(&self, added: usize, freed: usize) {
        self.bytes.fetch_add(added, Ordering::Relaxed);
        self.bytes.fetch_sub(freed, Ordering::Relaxed);
    }

    pub fn evicted(&self, freed: usize) {
        self.bytes.fetch_sub(freed, Ordering::Relaxed);
        self.evicted.fetch_add(freed as u64, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn evicted_bytes(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

/// Bytes that an entry counts against the queue and the tail cache.
pub(super) fn entry_cost(entry: &Entry) -> usize {
    cost(entry)
}
