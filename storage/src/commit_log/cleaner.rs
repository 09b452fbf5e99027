//! Removing the oldest segments once nothing in them counts any more.
//!
//! Only whole segments go, and only from the front, so the chain of segments never has a hole. What
//! little keeps the oldest one alive is written again at the head first: votes and purges, and live
//! entries as relocated frames, a bounded piece at a time. Readers and appends go on meanwhile; the
//! writer decides for each entry whether its old place still counts.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver};

use parking_lot::MutexGuard;

use super::group::{Group, entry_cost};
use super::queue::{Action, Op};
use super::reader;
use super::segment::Segment;
use super::shared::Shared;
use super::start;
use super::types::Done;
use crate::StorageError;
use crate::mutation::{self, Mutation};

/// The oldest segment is rewritten when at most this part of it is live: 1 of 4.
const LIVE_ONE_OF: u64 = 4;
/// Bytes that are read, queued and written before the next piece is.
const PIECE_BYTES: usize = 1 << 20;

/// What a round of cleaning did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CleanReport {
    pub removed_segments: usize,
    pub freed_bytes: u64,
    /// Groups whose vote and purge were written again.
    pub carried_groups: usize,
    /// Entries that were written again.
    pub moved_entries: u64,
}

/// What is to be removed, and what must be written again first.
struct Plan {
    victims: Vec<Arc<Segment>>,
    /// Runs of live entries in a victim.
    moves: VecDeque<Move>,
    /// Groups whose vote or purge is in a victim.
    carried: Vec<Arc<Group>>,
    /// Position behind the last victim.
    below: u64,
}

/// Live entries of one group that lie next to each other in a victim.
struct Move {
    group: Arc<Group>,
    segment: Arc<Segment>,
    next: u64,
    last: u64,
}

impl Move {
    /// The next entry that is still there: what was left may have been cut or purged meanwhile.
    fn next_live(&self) -> Option<u64> {
        let inner = self.group.inner.lock();
        let runs = inner.written.runs_in(&self.segment).into_iter();
        let rest = runs.filter(|(first, last)| *first <= self.last && *last >= self.next);
        rest.map(|(first, _)| first.max(self.next)).min()
    }
}

/// A round of cleaning.
pub(super) struct Cleaning<'a> {
    shared: &'a Shared,
    plan: Plan,
    carried: bool,
    moved: u64,
    written: Option<Receiver<Result<(), StorageError>>>,
    _one_at_a_time: MutexGuard<'a, ()>,
}

/// Chooses what can go. None: nothing can.
pub(super) fn begin(shared: &Shared) -> Result<Option<Cleaning<'_>>, StorageError> {
    let one_at_a_time = shared.cleaning.lock();
    let Some(plan) = plan(shared)? else {
        return Ok(None);
    };
    Ok(Some(Cleaning {
        shared,
        plan,
        carried: false,
        moved: 0,
        written: None,
        _one_at_a_time: one_at_a_time,
    }))
}

impl Cleaning<'_> {
    /// Queues the next piece of what must be at the head. False: all of it was.
    pub fn queue_next(&mut self) -> Result<bool, StorageError> {
        while let Some(run) = self.plan.moves.front_mut() {
            let Some(start) = run.next_live() else {
                self.plan.moves.pop_front();
                continue;
            };
            let (group, segment) = (run.group.clone(), run.segment.clone());
            let read = reader::read_in(self.shared, &group, &segment, start, PIECE_BYTES);
            let entries = self.shared.damage.watch(group.id, read)?;
            // Without any, it was cut or purged in between.
            run.next = entries.last().map_or(start, |last| last.log_id.index) + 1;
            if entries.is_empty() {
                continue;
            }
            self.moved += entries.len() as u64;
            let bytes = entries.iter().map(entry_cost).sum();
            let action = Action::Relocate {
                group,
                segment,
                entries,
                next: 0,
            };
            let done = self.promise();
            push(self.shared, action, Some(done), bytes)?;
            return Ok(true);
        }
        if self.carried {
            return Ok(false);
        }
        self.carried = true;
        for group in &self.plan.carried {
            let action = Action::Carry(group.clone(), self.plan.below);
            push(self.shared, action, None, 0)?;
        }
        if mutation::on(Mutation::MovedNotSynced) {
            return Ok(true);
        }
        // Done, this also says that whatever killed the victims' entries is durable, since it was
        // queued earlier.
        let done = self.promise();
        push(self.shared, Action::Barrier, Some(done), 0)?;
        Ok(true)
    }

    fn promise(&mut self) -> Done {
        let (sender, receiver) = mpsc::channel();
        self.written = Some(receiver);
        // Nobody listens if cleaning was given up meanwhile.
        Box::new(move |result| drop(sender.send(result)))
    }

    /// Waits until the piece is written. Never call it from a `done`.
    pub fn wait(&mut self) -> Result<(), StorageError> {
        match self.written.take() {
            Some(written) => written.recv().unwrap_or(Err(StorageError::Closed)),
            None => Ok(()),
        }
    }

    /// Removes, once the head has all that it must have.
    pub fn finish(mut self) -> Result<CleanReport, StorageError> {
        self.wait()?;
        let groups: Vec<_> = self.shared.groups.read().values().cloned().collect();
        let is_dead = |segment: &Arc<Segment>| {
            groups.iter().all(|group| {
                let live = group.inner.lock().written.lives_in(segment);
                !live.entries && (!live.small || mutation::on(Mutation::CleanWithoutCarrying))
            })
        };
        // What could not be moved stays where it is, and what lies behind it.
        let alive = self.plan.victims.iter().position(|victim| !is_dead(victim));
        if let Some(alive) = alive {
            self.plan.victims.truncate(alive);
        }
        let mut report = remove(self.shared, &self.plan.victims)?;
        report.carried_groups = self.plan.carried.len();
        report.moved_entries = self.moved;
        Ok(report)
    }
}

fn push(
    shared: &Shared,
    action: Action,
    done: Option<Done>,
    bytes: usize,
) -> Result<(), StorageError> {
    let pushed = shared.queue.push(Op { action, done }, bytes);
    pushed.map_err(|refused| refused.error)
}

/// Chooses the longest run of oldest segments without a live entry, the first live one taken along
/// where that is worth it.
fn plan(shared: &Shared) -> Result<Option<Plan>, StorageError> {
    let sealed: Vec<_> = shared.sealed.lock().values().cloned().collect();
    let groups: Vec<_> = shared.groups.read().values().cloned().collect();
    let mut plan = Plan {
        victims: Vec::new(),
        moves: VecDeque::new(),
        carried: Vec::new(),
        below: 0,
    };
    for (place, segment) in sealed.iter().enumerate() {
        let mut small = Vec::new();
        let mut moves = Vec::new();
        for group in &groups {
            let inner = group.inner.lock();
            let live = inner.written.lives_in(segment);
            if live.entries {
                let runs = inner.written.runs_in(segment);
                moves.extend(runs.into_iter().map(|(first, last)| Move {
                    group: group.clone(),
                    segment: segment.clone(),
                    next: first,
                    last,
                }));
            }
            if live.small && !mutation::on(Mutation::CleanWithoutCarrying) {
                small.push(group.clone());
            }
        }
        if !moves.is_empty() {
            let worth = is_worth_moving(shared, segment, &sealed[place..], &moves, &groups)?;
            if !plan.moves.is_empty() || !worth || !has_room_to_move(shared) {
                break;
            }
            plan.moves = moves.into();
        }
        plan.carried.extend(small);
        plan.below = segment.end();
        plan.victims.push(segment.clone());
    }
    Ok(plan.usable())
}

/// Whether the oldest segment holds little, or holds up many others that hold nothing.
fn is_worth_moving(
    shared: &Shared,
    segment: &Segment,
    from_here: &[Arc<Segment>],
    moves: &[Move],
    groups: &[Arc<Group>],
) -> Result<bool, StorageError> {
    let mut live_segments = HashSet::new();
    for group in groups {
        live_segments.extend(group.inner.lock().written.live_segments());
    }
    let is_dead = |segment: &&Arc<Segment>| !live_segments.contains(&segment.base);
    let dead = from_here.iter().filter(is_dead).count();
    if dead > 0 && dead * 2 >= from_here.len() {
        return Ok(true);
    }
    let most = segment.capacity / LIVE_ONE_OF;
    let mut live = 0;
    for run in moves {
        let bytes = reader::frames_in(shared, &run.group, segment, run.next, most - live);
        live += shared.damage.watch(run.group.id, bytes)?;
        if live >= most {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A full disk must not be made fuller on the way to getting it emptier: a failed write ends the log.
fn has_room_to_move(shared: &Shared) -> bool {
    let free = shared.vfs.free_space(&shared.dir);
    free.is_ok_and(|free| free > 2 * shared.config.segment_bytes)
}

impl Plan {
    fn usable(mut self) -> Option<Self> {
        self.carried.sort_by_key(|group| group.id);
        self.carried.dedup_by_key(|group| group.id);
        (!self.victims.is_empty()).then_some(self)
    }
}

fn remove(shared: &Shared, victims: &[Arc<Segment>]) -> Result<CleanReport, StorageError> {
    let vfs = &*shared.vfs;
    let mut report = CleanReport::default();
    let Some(last) = victims.last() else {
        return Ok(report);
    };
    start::write(vfs, &shared.dir, last.end())?;
    for segment in victims {
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
