//! What a commit log must be after any crash: a model of its groups, and a session that makes calls and
//! remembers what was promised.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig, Done, Driver, Entry, Flush, Step};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError, Vote};

use crate::support::*;

pub const GROUPS: u64 = 3;

/// One frame's worth of change.
#[derive(Debug, Clone)]
pub enum Change {
    Entry(Brief),
    Vote(Vote),
    Truncate(Option<u64>),
    Purge(LogId),
    Remove,
}

/// One group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Model {
    pub vote: Option<Vote>,
    pub purged: Option<LogId>,
    pub entries: BTreeMap<u64, Brief>,
}

/// An entry by its place, the number in its body, and its body's length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Brief(pub LogId, u64, usize);

impl Brief {
    pub fn of(entry: &Entry) -> Self {
        let mut number = [0; 8];
        number.copy_from_slice(&entry.body[..8]);
        assert!(entry.body[8..].iter().all(|byte| *byte == number[0]));
        Self(entry.log_id, u64::from_le_bytes(number), entry.body.len())
    }
}

impl Model {
    pub fn last(&self) -> Option<LogId> {
        let last = self.entries.values().next_back().map(|e| e.0);
        last.or(self.purged)
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Entry(entry) => {
                self.entries.split_off(&entry.0.index);
                self.entries.insert(entry.0.index, *entry);
            }
            Change::Vote(vote) => self.vote = Some(*vote),
            Change::Truncate(None) => self.entries.clear(),
            Change::Truncate(Some(index)) => drop(self.entries.split_off(&(index + 1))),
            Change::Purge(upto) => {
                if self.purged.is_none_or(|old| old.index < upto.index) {
                    self.entries = self.entries.split_off(&(upto.index + 1));
                    self.purged = Some(*upto);
                }
            }
            Change::Remove => *self = Self::default(),
        }
    }
}

/// All groups.
pub type World = BTreeMap<u64, Model>;

fn apply(world: &mut World, (id, change): &(u64, Change)) {
    world.entry(*id).or_default().apply(change);
}

/// What a log says of itself, every entry read.
pub fn world_of(log: &CommitLog) -> World {
    try_world_of(log).expect("read")
}

/// The same, unless something cannot be read.
pub fn try_world_of(log: &CommitLog) -> Result<World, StorageError> {
    let each = (0..GROUPS).map(|id| {
        let one = group(log, id);
        let state = one.state();
        let entries = one.try_all()?;
        let model = Model {
            vote: state.vote,
            purged: state.purged,
            entries: entries
                .iter()
                .map(|e| (e.log_id.index, Brief::of(e)))
                .collect(),
        };
        assert_eq!(model.last(), state.last, "group {id}");
        for (index, entry) in &model.entries {
            let found = one.log_id_at(*index)?;
            assert_eq!(found, Some(entry.0));
        }
        Ok((id, model))
    });
    each.collect()
}

/// What the callbacks said, as lengths of the stream of changes.
#[derive(Debug, Clone, Default)]
pub struct Promises {
    /// Fsynced.
    pub durable: usize,
    /// Written at least.
    pub written: usize,
    refused: bool,
    /// A callback that must not have come. A panic in a callback would end in the writer.
    violation: Option<&'static str>,
}

/// Something done to a log.
#[derive(Debug, Clone)]
pub enum Call {
    Append(u64, Vec<Entry>, Flush),
    Vote(u64, Vote),
    Truncate(u64, Option<u64>),
    Purge(u64, LogId),
    Remove(u64),
    /// One round of the writer.
    Step,
    /// Rounds of the writer until it has nothing to do.
    Settle,
    Background,
    Clean,
    Wait(Duration),
}

/// One log on one disk, what was called since its world was last known, and what was promised.
pub struct Session {
    pub vfs: FaultVfs,
    pub log: CommitLog,
    driver: Driver,
    base: World,
    changes: Vec<(u64, Change)>,
    promises: Arc<Mutex<Promises>>,
    now: Instant,
    body: u64,
    /// Entries that cleaning has moved.
    pub moved: u64,
}

impl Session {
    /// Opens the log of a disk on which `base` is what there must be.
    pub fn open(vfs: FaultVfs, config: CommitLogConfig, base: World) -> Result<Self, StorageError> {
        let shared: Arc<dyn Vfs> = Arc::new(vfs.clone());
        let (log, driver) = CommitLog::open_driven(shared, std::path::Path::new(DIR), config)?;
        Ok(Self {
            vfs,
            log,
            driver,
            base,
            changes: Vec::new(),
            promises: Arc::default(),
            now: Instant::now(),
            body: 0,
            moved: 0,
        })
    }

    /// A world without anything in it.
    pub fn nothing() -> World {
        (0..GROUPS).map(|id| (id, Model::default())).collect()
    }

    /// Numbers of bodies go on from here.
    pub fn count_bodies_from(mut self, body: u64) -> Self {
        self.body = body;
        self
    }

    pub fn bodies(&self) -> u64 {
        self.body
    }

    /// The world with everything called in it.
    pub fn world(&self) -> World {
        let mut world = self.base.clone();
        self.changes.iter().for_each(|one| apply(&mut world, one));
        world
    }

    pub fn model(&self, id: u64) -> Model {
        self.world().remove(&id).unwrap_or_default()
    }

    pub fn changes(&self) -> usize {
        self.changes.len()
    }

    pub fn promises(&self) -> Promises {
        let promises = self.promises.lock().expect("lock").clone();
        assert_eq!(promises.violation, None);
        promises
    }

    /// The worlds that the first `least` changes, and each longer prefix, leave behind.
    pub fn worlds(&self, least: usize) -> Vec<World> {
        let mut world = self.base.clone();
        let mut worlds = Vec::new();
        for done in 0..=self.changes.len() {
            if done >= least {
                worlds.push(world.clone());
            }
            if let Some(change) = self.changes.get(done) {
                apply(&mut world, change);
            }
        }
        worlds
    }

    /// Asserts that some prefix of the calls, of at least `least` changes, gives what was found.
    pub fn check(&self, found: &World, least: usize) {
        assert!(
            self.worlds(least).contains(found),
            "no prefix of at least {least} of {} changes gives what was found: {found:?}\n\
             all would give {:?}\n{:?}",
            self.changes.len(),
            self.world(),
            self.changes
        );
    }

    /// The process dies and comes back: what was written is found again, and counts from then on. If it
    /// does not come back, the session is as it was.
    pub fn restart(self, config: CommitLogConfig) -> (Self, Result<(), StorageError>) {
        assert_eq!(self.promises().written, self.changes.len(), "settle first");
        let mut next = match Self::open(self.vfs.clone(), config, self.base.clone()) {
            Ok(next) => next,
            Err(error) => return (self, Err(error)),
        };
        (next.body, next.now, next.moved) = (self.body, self.now, self.moved);
        next.changes = self.changes;
        next.promises = Arc::new(Mutex::new(Promises {
            durable: next.changes.len(),
            written: next.changes.len(),
            ..Promises::default()
        }));
        let found = match next.power_is_on() {
            true => try_world_of(&next.log),
            false => Ok(next.world()),
        };
        if let Ok(found) = &found {
            assert_eq!(found, &next.world(), "after a restart");
        }
        (next, found.map(drop))
    }

    /// Closes the log in order.
    pub fn close(&mut self) -> Result<(), StorageError> {
        self.log.close()?;
        while self.driver.step(self.now) != Step::Stopped {}
        while self.driver.step_background() {}
        self.log.stats().poisoned.map_or(Ok(()), |_| poisoned())
    }

    /// `count` entries of `size` bytes each with numbers of their own.
    pub fn entries(&mut self, term: u64, from: u64, count: u64, size: usize) -> Vec<Entry> {
        (from..from + count)
            .map(|index| {
                self.body += 1;
                let mut body = self.body.to_le_bytes().to_vec();
                body.resize(size.max(8), self.body as u8);
                entry(term, index, Bytes::from(body))
            })
            .collect()
    }

    /// A callback that notes what it promises, and that callbacks come in order.
    fn promise(&self, sync: bool) -> Done {
        let promises = self.promises.clone();
        let upto = self.changes.len();
        Box::new(move |result| {
            let mut promises = promises.lock().expect("lock");
            match result {
                Ok(()) if promises.refused => {
                    promises.violation = Some("a promise after a refusal");
                }
                Ok(()) if promises.written > upto => {
                    promises.violation = Some("callbacks out of order");
                }
                Ok(()) => {
                    promises.written = upto;
                    if sync {
                        promises.durable = upto;
                    }
                }
                Err(_) => promises.refused = true,
            }
        })
    }

    /// Makes one call. What was called is what is seen at once, written or not.
    pub fn perform(&mut self, call: Call) -> Result<(), StorageError> {
        let before = self.changes.len();
        let touched = match self.make(call) {
            Ok(touched) => touched,
            Err(error) => {
                self.changes.truncate(before);
                return Err(error);
            }
        };
        self.promises();
        if self.log.stats().poisoned.is_some() {
            return poisoned();
        }
        let Some(id) = touched else { return Ok(()) };
        let expected = self.model(id);
        let one = group(&self.log, id);
        let state = one.state();
        assert_eq!(state.last, expected.last());
        assert_eq!((state.vote, state.purged), (expected.vote, expected.purged));
        if self.power_is_on() {
            let found: Vec<_> = one.try_all()?.iter().map(Brief::of).collect();
            let all: Vec<_> = expected.entries.into_values().collect();
            assert_eq!(found, all, "{state:?}");
        }
        Ok(())
    }

    fn make(&mut self, call: Call) -> Result<Option<u64>, StorageError> {
        let one = |id| group(&self.log, id);
        match call {
            Call::Append(id, entries, flush) => {
                let changes = entries.iter().map(|e| (id, Change::Entry(Brief::of(e))));
                self.changes.extend(changes);
                one(id).append(entries, flush, self.promise(flush == Flush::Sync))?;
                Ok(Some(id))
            }
            Call::Vote(id, vote) => {
                self.changes.push((id, Change::Vote(vote)));
                one(id).save_vote(vote, self.promise(true))?;
                Ok(Some(id))
            }
            Call::Truncate(id, index) => {
                self.changes.push((id, Change::Truncate(index)));
                one(id).truncate_after(index, self.promise(true))?;
                Ok(Some(id))
            }
            Call::Purge(id, upto) => {
                self.changes.push((id, Change::Purge(upto)));
                one(id).purge(upto, self.promise(true))?;
                Ok(Some(id))
            }
            Call::Remove(id) => {
                self.changes.push((id, Change::Remove));
                self.log.remove_group(RaftGroupId(id), self.promise(true));
                Ok(Some(id))
            }
            Call::Step => {
                self.driver.step(self.now);
                Ok(None)
            }
            Call::Settle => {
                while self.driver.step(self.now) == Step::Worked {}
                Ok(None)
            }
            Call::Background => {
                while self.driver.step_background() {}
                Ok(None)
            }
            Call::Clean => {
                self.moved += self.driver.clean(self.now)?.moved_entries;
                Ok(None)
            }
            Call::Wait(time) => {
                self.now += time;
                Ok(None)
            }
        }
    }

    fn power_is_on(&self) -> bool {
        let none = self.vfs.open(std::path::Path::new("/none"));
        none.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    }
}

fn poisoned<T>() -> Result<T, StorageError> {
    let reason = "the test's disk".into();
    Err(StorageError::Poisoned { reason })
}
