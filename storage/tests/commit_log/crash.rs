//! Crashes at random points, against a model: what was promised is there, and what is there is what
//! some prefix of the calls leaves behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_storage::commit_log::{
    CommitLog, CommitLogConfig, Done, Driver, Entry, Flush, GroupState,
};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError, Vote};

use crate::support::*;

const GROUPS: u64 = 3;
/// Runs of four crashes each; `CRASH_SEEDS` asks for more, `CRASH_SEED` for one of them.
const SEEDS: u64 = 500;

/// One frame's worth of change.
#[derive(Debug, Clone)]
enum Change {
    Entry(Brief),
    Vote(Vote),
    Truncate(Option<u64>),
    Purge(LogId),
    Remove,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    vote: Option<Vote>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, Brief>,
}

/// An entry by its place, the number in its body, and its body's length.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Brief(LogId, u64, usize);

impl Brief {
    fn of(entry: &Entry) -> Self {
        let mut number = [0; 8];
        number.copy_from_slice(&entry.body[..8]);
        assert!(entry.body[8..].iter().all(|byte| *byte == number[0]));
        Self(entry.log_id, u64::from_le_bytes(number), entry.body.len())
    }
}

impl Model {
    fn last(&self) -> Option<LogId> {
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

type World = BTreeMap<u64, Model>;

/// What the callbacks said, as lengths of the stream of changes.
#[derive(Debug, Default)]
struct Promises {
    /// Fsynced.
    durable: usize,
    /// Written at least.
    written: usize,
    refused: bool,
}

struct Run {
    rng: Rng,
    vfs: FaultVfs,
    /// The world at the last opening, and what was called since.
    base: World,
    changes: Vec<(u64, Change)>,
    promises: Arc<Mutex<Promises>>,
    now: Instant,
    body: u64,
}

/// xorshift64*, so that a seed means the same everywhere.
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        Self {
            rng: Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            vfs: FaultVfs::new(),
            base: (0..GROUPS).map(|id| (id, Model::default())).collect(),
            changes: Vec::new(),
            promises: Arc::default(),
            now: Instant::now(),
            body: 0,
        }
    }

    fn config(&mut self) -> CommitLogConfig {
        CommitLogConfig {
            tail_cache_bytes: self.rng.below(5000) as usize,
            write_batch_bytes: 1 + self.rng.below(3000) as usize,
            ..config(4096)
        }
    }

    fn world(&self) -> World {
        let mut world = self.base.clone();
        for (id, change) in &self.changes {
            world.entry(*id).or_default().apply(change);
        }
        world
    }

    /// A callback that notes what it promises, and that callbacks come in order.
    fn promise(&self, sync: bool) -> Done {
        let promises = self.promises.clone();
        let upto = self.changes.len();
        Box::new(move |result| {
            let mut promises = promises.lock().expect("lock");
            match result {
                Ok(()) => {
                    assert!(!promises.refused, "a promise after a refusal");
                    assert!(promises.written <= upto, "callbacks out of order");
                    promises.written = upto;
                    if sync {
                        promises.durable = upto;
                    }
                }
                Err(_) => promises.refused = true,
            }
        })
    }

    /// One cycle: open, call this and that, lose the power or the process, open again and compare.
    fn cycle(&mut self) {
        let config = self.config();
        let (log, mut driver) = open_driven(&self.vfs, config);
        if self.rng.below(2) == 0 {
            self.vfs.halt_after(self.rng.below(120));
        }
        for _ in 0..self.rng.below(60) {
            if log.stats().poisoned.is_some() || self.act(&log, &mut driver).is_err() {
                break;
            }
        }
        let kill = self.rng.below(5) == 0;
        self.vfs = if kill {
            self.vfs.kill()
        } else {
            self.vfs.crash(self.rng.below(u64::MAX >> 34))
        };
        // The old process says nothing any more.
        let promises = std::mem::take(&mut *self.promises.lock().expect("lock"));
        drop((log, driver));
        self.promises = Arc::default();
        let crashed = self.crash_in_recovery();
        let least = if kill && !crashed {
            promises.written
        } else {
            promises.durable
        };
        self.compare(least);
    }

    /// Recovery itself is interrupted now and then; it must be repeatable.
    fn crash_in_recovery(&mut self) -> bool {
        let crashes = self.rng.below(3);
        for _ in 0..crashes {
            self.vfs.halt_after(self.rng.below(12));
            let opened = CommitLog::open_driven(
                Arc::new(self.vfs.clone()),
                std::path::Path::new(DIR),
                config(4096),
            );
            if let Err(error) = opened {
                assert!(matches!(error, StorageError::Io { .. }), "{error}");
            }
            self.vfs = self.vfs.crash(self.rng.below(u64::MAX >> 34));
        }
        crashes > 0
    }

    fn compare(&mut self, least: usize) {
        let config = self.config();
        let (log, _driver) = open_driven(&self.vfs, config);
        let mut found = World::new();
        for id in 0..GROUPS {
            let one = group(&log, id);
            let GroupState { vote, purged, last } = one.state();
            let entries = one
                .all()
                .into_iter()
                .map(|e| (e.log_id.index, Brief::of(&e)));
            let model = Model {
                vote,
                purged,
                entries: entries.collect(),
            };
            assert_eq!(model.last(), last, "group {id}");
            for (index, entry) in &model.entries {
                let found = one.log_id_at(*index).expect("log id");
                assert_eq!(found, Some(entry.0));
            }
            found.insert(id, model);
        }
        let mut world = self.base.clone();
        let mut matches = (least == 0) && world == found;
        for (done, (id, change)) in self.changes.iter().enumerate() {
            world.entry(*id).or_default().apply(change);
            matches |= done + 1 >= least && world == found;
        }
        assert!(
            matches,
            "no prefix of at least {least} of {} changes gives what was found: {found:?}\n\
             all would give {world:?}\n{:?}",
            self.changes.len(),
            self.changes
        );
        self.base = found;
        self.changes.clear();
    }

    fn act(&mut self, log: &CommitLog, driver: &mut Driver) -> Result<(), StorageError> {
        let id = self.rng.below(GROUPS);
        let one = group(log, id);
        let model = self.world().remove(&id).unwrap_or_default();
        let next = model.last().map_or(0, |last| last.index + 1);
        let first = model.purged.map_or(0, |upto| upto.index + 1);
        match self.rng.below(20) {
            0..=7 => {
                let from = if self.rng.below(4) == 0 && next > first {
                    first + self.rng.below(next - first)
                } else {
                    next
                };
                let entries = self.entries(&model, from);
                let sync = self.rng.below(3) > 0;
                for entry in &entries {
                    self.changes.push((id, Change::Entry(Brief::of(entry))));
                }
                let flush = if sync { Flush::Sync } else { Flush::Async };
                one.append(entries, flush, self.promise(sync))?;
            }
            8 => {
                let vote = vote(self.rng.below(1000));
                self.changes.push((id, Change::Vote(vote)));
                one.save_vote(vote, self.promise(true))?;
            }
            9 if next > first => {
                let index = (first + self.rng.below(next - first)).checked_sub(1);
                self.changes.push((id, Change::Truncate(index)));
                one.truncate_after(index, self.promise(true))?;
            }
            10 | 11 => {
                let ahead = if self.rng.below(8) == 0 { 5 } else { 0 };
                let index = first + self.rng.below(next - first + 1 + ahead);
                let known = model.entries.get(&index).map(|e| e.0);
                let upto = known.unwrap_or(LogId::new(1, index));
                self.changes.push((id, Change::Purge(upto)));
                one.purge(upto, self.promise(true))?;
            }
            12 if self.rng.below(4) == 0 => {
                self.changes.push((id, Change::Remove));
                log.remove_group(RaftGroupId(id), self.promise(true));
            }
            13 => drop(driver.step_background()),
            14 => {
                driver.clean(self.now)?;
            }
            15 => self.now += Duration::from_millis(self.rng.below(1500)),
            _ => drop(driver.step(self.now)),
        }
        // What was called is what is seen, written or not.
        if log.stats().poisoned.is_none() {
            let expected = self.world().remove(&id).unwrap_or_default();
            let state = one.state();
            assert_eq!(state.last, expected.last());
            assert_eq!((state.vote, state.purged), (expected.vote, expected.purged));
            let all: Vec<_> = expected.entries.into_values().collect();
            if self.vfs_is_alive() {
                let found: Vec<_> = one.all().iter().map(Brief::of).collect();
                assert_eq!(
                    found,
                    all,
                    "{state:?} {one:?} {:?}",
                    one.read(2, 3, 300).map(|e| e.len())
                );
            }
        }
        Ok(())
    }

    fn vfs_is_alive(&self) -> bool {
        use quorate_storage::vfs::Vfs;
        self.vfs
            .open(std::path::Path::new("/none"))
            .is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    }

    fn entries(&mut self, model: &Model, from: u64) -> Vec<Entry> {
        let term = model.last().map_or(1, |last| last.term) + self.rng.below(2);
        (from..from + 1 + self.rng.below(4))
            .map(|index| {
                self.body += 1;
                let mut body = self.body.to_le_bytes().to_vec();
                body.resize(8 + self.rng.below(700) as usize, self.body as u8);
                entry(term, index, Bytes::from(body))
            })
            .collect()
    }
}

#[test]
fn every_promise_survives_every_crash() {
    let asked = |name| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse().ok())
    };
    let seeds = match asked("CRASH_SEED") {
        Some(only) => only..only + 1,
        None => 0..asked("CRASH_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let result = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            for _ in 0..4 {
                run.cycle();
            }
        });
        assert!(result.is_ok(), "run again with CRASH_SEED={seed}");
    }
}
