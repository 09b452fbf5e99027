//! Crashes at random points, against a model: what was promised is there, and what is there is what
//! some prefix of the calls leaves behind.

use std::sync::Arc;
use std::time::Duration;

use quorate_storage::commit_log::{CommitLog, CommitLogConfig, Flush};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, StorageError};

use crate::model::*;
use crate::support::*;

/// Runs of four crashes each; `CRASH_SEEDS` asks for more, `CRASH_SEED` for one of them.
const SEEDS: u64 = 500;

struct Run {
    rng: Rng,
    vfs: FaultVfs,
    base: World,
    body: u64,
    moved: u64,
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
            base: Session::nothing(),
            body: 0,
            moved: 0,
        }
    }

    fn config(&mut self) -> CommitLogConfig {
        CommitLogConfig {
            tail_cache_bytes: self.rng.below(5000) as usize,
            write_batch_bytes: 1 + self.rng.below(3000) as usize,
            ..config(4096)
        }
    }

    /// One cycle: open, call this and that, lose the power or the process, open again and compare.
    fn cycle(&mut self) {
        let config = self.config();
        let opened = Session::open(self.vfs.clone(), config, self.base.clone());
        let mut session = opened.expect("open").count_bodies_from(self.body);
        if self.rng.below(2) == 0 {
            self.vfs.halt_after(self.rng.below(120));
        }
        for _ in 0..self.rng.below(60) {
            let call = self.choose(&mut session);
            if session.perform(call).is_err() {
                break;
            }
        }
        let kill = self.rng.below(5) == 0;
        self.vfs = if kill {
            self.vfs.kill()
        } else {
            self.vfs.crash(self.rng.below(u64::MAX >> 34))
        };
        let promises = session.promises();
        self.body = session.bodies();
        self.moved += session.moved;
        let crashed = self.crash_in_recovery();
        let least = if kill && !crashed {
            promises.written
        } else {
            promises.durable
        };
        let config = self.config();
        let (log, _driver) = open_driven(&self.vfs, config);
        self.base = world_of(&log);
        session.check(&self.base, least);
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

    fn choose(&mut self, session: &mut Session) -> Call {
        let id = self.rng.below(GROUPS);
        let model = session.model(id);
        let next = model.last().map_or(0, |last| last.index + 1);
        let first = model.purged.map_or(0, |upto| upto.index + 1);
        match self.rng.below(20) {
            0..=7 => {
                let from = if self.rng.below(4) == 0 && next > first {
                    first + self.rng.below(next - first)
                } else {
                    next
                };
                let term = model.last().map_or(1, |last| last.term) + self.rng.below(2);
                let count = 1 + self.rng.below(4);
                let size = 8 + self.rng.below(700) as usize;
                let entries = session.entries(term, from, count, size);
                let flush = match self.rng.below(3) {
                    0 => Flush::Async,
                    _ => Flush::Sync,
                };
                Call::Append(id, entries, flush)
            }
            8 => Call::Vote(id, vote(self.rng.below(1000))),
            9 if next > first => {
                let index = (first + self.rng.below(next - first)).checked_sub(1);
                Call::Truncate(id, index)
            }
            10 | 11 => {
                let ahead = if self.rng.below(8) == 0 { 5 } else { 0 };
                let index = first + self.rng.below(next - first + 1 + ahead);
                let known = model.entries.get(&index).map(|e| e.0);
                Call::Purge(id, known.unwrap_or(LogId::new(1, index)))
            }
            12 if self.rng.below(4) == 0 => Call::Remove(id),
            13 => Call::Background,
            14 => Call::Clean,
            15 => Call::Wait(Duration::from_millis(self.rng.below(1500))),
            _ => Call::Step,
        }
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
    let (mut moved, many) = (0, seeds.end - seeds.start >= SEEDS);
    for seed in seeds {
        let result = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            for _ in 0..4 {
                run.cycle();
            }
            run.moved
        });
        moved += result.as_ref().copied().unwrap_or(0);
        assert!(result.is_ok(), "run again with CRASH_SEED={seed}");
    }
    println!("cleaning moved {moved} entries");
    assert!(moved > 100 || !many, "cleaning moved {moved} entries only");
}
