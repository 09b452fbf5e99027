//! Removing the oldest segments once nothing in them counts any more.
//!
//! Only whole segments go, and only from the front, so the chain of segments never has a hole. A
//! segment that is kept by votes and purges alone has those written again at the head first. Entries
//! that keep an old segment are to be relocated in the same place; until then they keep it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};

use parking_lot::MutexGuard;

use super::group::Group;
use super::queue::{Action, Op};
use super::segment::Segment;
use super::shared::Shared;
use super::start;
use super::types::Done;
use crate::StorageError;
use crate::mutation::{self, Mutation};

/// What a round of cleaning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CleanReport {
    pub removed_segments: usize,
    pub freed_bytes: u64,
    /// Groups whose vote and purge were written again.
    pub carried_groups: usize,
}

/// What is to be removed, and what must be written again first.
struct Plan {
    victims: Vec<Arc<Segment>>,
    /// Groups whose vote or purge is in a victim.
    carried: Vec<Arc<Group>>,
    /// Position behind the last victim.
    below: u64,
}

/// A round of cleaning that waits for the writer.
pub(super) struct Cleaning<'a> {
    shared: &'a Shared,
    plan: Plan,
    carried: Receiver<Result<(), StorageError>>,
    _one_at_a_time: MutexGuard<'a, ()>,
}

/// Chooses what can go and queues what must be at the head first. None: nothing can go.
pub(super) fn begin(shared: &Shared) -> Result<Option<Cleaning<'_>>, StorageError> {
    let one_at_a_time = shared.cleaning.lock();
    let Some(plan) = plan(shared) else {
        return Ok(None);
    };
    let (sender, carried) = mpsc::channel();
    // Nobody listens if cleaning was given up meanwhile.
    let done: Done = Box::new(move |result| drop(sender.send(result)));
    carry(shared, &plan, done)?;
    Ok(Some(Cleaning {
        shared,
        plan,
        carried,
        _one_at_a_time: one_at_a_time,
    }))
}

impl Cleaning<'_> {
    /// Waits until the head has what it must have, then removes. Never call it from a `done`.
    pub fn finish(self) -> Result<CleanReport, StorageError> {
        self.carried.recv().unwrap_or(Err(StorageError::Closed))?;
        remove(self.shared, &self.plan)
    }
}

/// Chooses the longest run of oldest segments without a live entry.
fn plan(shared: &Shared) -> Option<Plan> {
    let sealed: Vec<_> = shared.sealed.lock().values().cloned().collect();
    let groups: Vec<_> = shared.groups.read().values().cloned().collect();
    let mut plan = Plan {
        victims: Vec::new(),
        carried: Vec::new(),
        below: 0,
    };
    for segment in sealed {
        let mut small = Vec::new();
        for group in &groups {
            let live = group.inner.lock().written.lives_in(&segment);
            if live.entries {
                return plan.usable();
            }
            if live.small && !mutation::on(Mutation::CleanWithoutCarrying) {
                small.push(group.clone());
            }
        }
        plan.carried.extend(small);
        plan.below = segment.end();
        plan.victims.push(segment);
    }
    plan.usable()
}

impl Plan {
    fn usable(mut self) -> Option<Self> {
        self.carried.sort_by_key(|group| group.id);
        self.carried.dedup_by_key(|group| group.id);
        (!self.victims.is_empty()).then_some(self)
    }
}

/// Queues what must be at the head before the victims go. `done` then also says that whatever killed
/// their entries is durable, since it was queued earlier.
fn carry(shared: &Shared, plan: &Plan, done: Done) -> Result<(), StorageError> {
    let push = |action, done| {
        let pushed = shared.queue.push(Op { action, done }, 0);
        pushed.map_err(|refused| refused.error)
    };
    for group in &plan.carried {
        push(Action::Carry(group.clone(), plan.below), None)?;
    }
    push(Action::Barrier, Some(done))
}

fn remove(shared: &Shared, plan: &Plan) -> Result<CleanReport, StorageError> {
    let vfs = &*shared.vfs;
    let mut report = CleanReport {
        carried_groups: plan.carried.len(),
        ..CleanReport::default()
    };
    start::write(vfs, &shared.dir, plan.below)?;
    for segment in &plan.victims {
        for file in [&segment.sidecar, &segment.log] {
            let io = |action, e| StorageError::io(action, file.path(), e);
            if vfs.exists(file.path()).map_err(|e| io("look for", e))? {
                vfs.remove(file.path()).map_err(|e| io("remove", e))?;
            }
        }
        // One by one: of two removals only the later one may survive a crash, and leave a hole.
        vfs.sync_dir(&shared.dir)
            .map_err(|e| StorageError::io("fsync", &shared.dir, e))?;
        shared.sealed.lock().remove(&segment.base);
        shared
            .disk_bytes
            .fetch_sub(segment.capacity as usize, Ordering::Relaxed);
        shared
            .stats
            .cleaned_segments
            .fetch_add(1, Ordering::Relaxed);
        report.removed_segments += 1;
        report.freed_bytes += segment.capacity;
    }
    Ok(report)
}
