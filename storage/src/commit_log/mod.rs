//! The commit log: one append-only stream of frames per node, shared by all its Raft groups.
//!
//! It is the Raft log and the message store. Every group appends through its [`GroupLog`]; one writer
//! thread turns what all groups have queued into one write and one fdatasync. `docs/format.md` has
//! every byte.
//!
//! ```text
//!  callers ── queue ── writer ── active segment ── sealed segments + sidecars
//!     └───── tail cache (what was appended last, readable at once) ─────┘
//! ```
//!
//! What holds: an entry is readable when `append` returned; `done(Ok)` of a synced call means that it
//! and everything called before it, in any group, is on disk; the first failed write or fsync ends all
//! promises ([`StorageError::Poisoned`]); what recovery returns is a prefix of the stream.

mod background;
mod cleaner;
mod evictor;
mod format;
mod frame;
#[cfg(test)]
mod frame_tests;
mod group;
mod index;
mod owner;
mod part;
mod queue;
mod reader;
mod recovery;
mod scan;
mod segment;
mod shared;
mod sidecar;
mod start;
mod stats;
mod types;
mod writer;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

pub use cleaner::CleanReport;
pub use group::GroupLog;
pub use shared::DamageHook;
pub use stats::{CommitLogStats, FSYNC_BUCKETS_NS};
pub use types::{
    CommitLogConfig, DamagedRange, Done, Entry, EntryKind, Flush, GroupState, RecoveryReport,
    TruncatedTail,
};
pub use writer::Step;

use crate::vfs::Vfs;
use crate::{RaftGroupId, StorageError, files};
use background::Wish;
use owner::Owner;
use recovery::Recovered;
use shared::Shared;
use writer::{Start, WriterCore};

/// A node's commit log. Cheap to clone; it closes when the last clone and the last [`GroupLog`] go.
#[derive(Clone)]
pub struct CommitLog {
    owner: Arc<Owner>,
    report: Arc<RecoveryReport>,
}

impl fmt::Debug for CommitLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CommitLog")
            .field(&self.owner.shared.dir)
            .finish()
    }
}

/// Drives a log without threads, for tests and simulations.
#[derive(Debug)]
pub struct Driver {
    core: WriterCore,
    shared: Arc<Shared>,
}

impl Driver {
    /// One round of the writer. `now` must not go back.
    pub fn step(&mut self, now: Instant) -> Step {
        self.core.step(now)
    }

    /// One task of the background: the next segment or a sidecar. False if there was none.
    pub fn step_background(&mut self) -> bool {
        self.shared.background.step(&self.shared)
    }

    /// [`CommitLog::clean`], stepping the writer as far as that needs.
    pub fn clean(&mut self, now: Instant) -> Result<CleanReport, StorageError> {
        let shared = self.shared.clone();
        let Some(mut cleaning) = cleaner::begin(&shared)? else {
            return Ok(CleanReport::default());
        };
        while cleaning.queue_next()? {
            while self.core.step(now) == Step::Worked {}
            cleaning.wait()?;
        }
        cleaning.finish()
    }
}

impl CommitLog {
    /// Recovers the log in `dir`, creating it if there is none, and starts its threads.
    pub fn open(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        config: CommitLogConfig,
    ) -> Result<CommitLog, StorageError> {
        let (shared, core, report) = open(vfs, dir, config)?;
        Ok(Self {
            owner: Arc::new(Owner::spawn(shared, core)?),
            report: Arc::new(report),
        })
    }

    /// Like [`CommitLog::open`] without threads: nothing is written until the driver is stepped.
    pub fn open_driven(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        config: CommitLogConfig,
    ) -> Result<(CommitLog, Driver), StorageError> {
        let (shared, core, report) = open(vfs, dir, config)?;
        let log = Self {
            owner: Arc::new(Owner::driven(shared.clone())),
            report: Arc::new(report),
        };
        Ok((log, Driver { core, shared }))
    }

    /// Looks at a stopped log without changing it; says also what is damaged.
    pub fn inspect(vfs: &dyn Vfs, dir: &Path) -> Result<RecoveryReport, StorageError> {
        Ok(recovery::survey(vfs, dir)?.report)
    }

    pub fn recovery(&self) -> &RecoveryReport {
        &self.report
    }

    /// The groups that have a vote, an entry or a purge, queued ones included.
    pub fn groups(&self) -> Vec<RaftGroupId> {
        let groups = self.owner.shared.groups.read();
        let known = groups.values().filter(|group| {
            let state = group.inner.lock().state;
            state != GroupState::default()
        });
        let mut ids: Vec<_> = known.map(|group| group.id).collect();
        ids.sort();
        ids
    }

    /// A handle on one group's log. Creating it writes nothing.
    pub fn group(&self, id: RaftGroupId) -> GroupLog {
        GroupLog {
            group: self.owner.shared.group(id),
            owner: self.owner.clone(),
        }
    }

    /// Forgets everything of a group. If the log is closed or poisoned, `done` is called at once.
    pub fn remove_group(&self, id: RaftGroupId, done: Done) {
        self.group(id).remove(done);
    }

    pub fn stats(&self) -> CommitLogStats {
        self.owner.shared.stats()
    }

    /// Calls `hook` once, on the writer's thread, when the log is poisoned; at once if it is already.
    pub fn on_poison(&self, hook: Box<dyn Fn(&StorageError) + Send + Sync>) {
        self.owner.shared.poison.hook(hook);
    }

    /// Calls `hook` whenever a read of a group finds damage: on the reader's thread, before the reader
    /// gets the error. Only the first hook counts.
    pub fn on_damage(&self, hook: DamageHook) {
        self.owner.shared.damage.hook(hook);
    }

    /// Whether the queue is below its bound. Ask before an append is begun; the log itself never
    /// refuses for this.
    pub fn has_room(&self) -> bool {
        self.owner.shared.queue.bytes() < self.owner.shared.config.queue_bytes
    }

    /// Whether the disk has more free space than the reserve; measured once a second at most.
    pub fn disk_has_room(&self) -> bool {
        self.owner.shared.disk_has_room()
    }

    /// Removes the oldest segments that hold nothing live, or so little that it is moved to the head.
    /// Waits for the writer.
    pub fn clean(&self) -> Result<CleanReport, StorageError> {
        let Some(mut cleaning) = cleaner::begin(&self.owner.shared)? else {
            return Ok(CleanReport::default());
        };
        while cleaning.queue_next()? {
            cleaning.wait()?;
        }
        cleaning.finish()
    }

    /// Writes and syncs what is queued, then the closing mark, and ends the threads. Calls after it get
    /// [`StorageError::Closed`]; reads still work. A driven log ends when its driver is stepped.
    pub fn close(&self) -> Result<(), StorageError> {
        self.owner.close()
    }
}

fn open(
    vfs: Arc<dyn Vfs>,
    dir: &Path,
    config: CommitLogConfig,
) -> Result<(Arc<Shared>, WriterCore, RecoveryReport), StorageError> {
    config.validate()?;
    let now = Instant::now();
    files::create_dirs(&*vfs, dir)?;
    let found = recovery::survey(&*vfs, dir)?;
    if let Some(damage) = found.report.damaged.first() {
        return Err(StorageError::Damaged {
            path: damage.path.clone(),
            position: damage.position,
            reason: format!(
                "{}; entries or votes may be lost, so the log is not opened: restore this file, or \
                 start this node with an empty directory and a new id and let its peers fill it",
                damage.reason
            ),
        });
    }
    recovery::repair(&*vfs, dir, &found)?;
    let Recovered {
        groups,
        sealed,
        seals,
        tail,
        next_base,
        prepared,
        epoch,
        mut report,
        ..
    } = found;
    let after = sealed.last().map_or(0, |segment| segment.capacity);
    let files = sealed.iter().chain(&prepared);
    let mut disk_bytes: u64 = files.map(|segment| segment.capacity).sum();
    let sealed = sealed.into_iter().map(|s| (s.base, s)).collect();
    let shared = Arc::new(Shared::new(vfs, dir.to_path_buf(), config, groups, sealed));
    for task in seals {
        shared.background.seal(task);
    }
    if let Some(segment) = prepared {
        shared.background.adopt(segment);
    }
    let start = match tail {
        Some(tail) => {
            disk_bytes += tail.segment.capacity;
            Start {
                segment: tail.segment,
                offset: tail.offset,
                epoch: epoch + 1,
                touched: tail.groups.iter().map(|id| shared.group(*id)).collect(),
                closed: tail.closed,
            }
        }
        None => {
            report.segments += 1;
            let wish = Wish {
                base: next_base,
                after,
            };
            Start {
                segment: shared.background.first(&shared, wish)?,
                offset: format::SEGMENT_HEADER,
                epoch: epoch + 1,
                touched: Vec::new(),
                closed: true,
            }
        }
    };
    shared
        .disk_bytes
        .fetch_add(disk_bytes as usize, Ordering::Relaxed);
    let core = WriterCore::new(shared.clone(), start, now)?;
    report.duration = now.elapsed();
    Ok((shared, core, report))
}
