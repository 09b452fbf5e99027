//! Work on files that must not hold up the writer: the next segment, and sidecars of sealed ones.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::group::Group;
use super::part::GroupPart;
use super::segment::{self, Segment};
use super::shared::Shared;
use super::sidecar;
use crate::{RaftGroupId, StorageError};

/// The first segment of a new log; each next one is twice as large until the configured size is
/// reached. So a new log starts quickly although segments are filled with zeroes before they are used.
const FIRST_SEGMENT_BYTES: u64 = 16 << 20;

/// A sealed segment whose sidecar is to be written.
#[derive(Debug)]
pub(super) struct SealTask {
    pub segment: Arc<Segment>,
    pub data_end: u64,
    pub epoch: u32,
    /// Sorted by group.
    pub parts: Vec<(RaftGroupId, Arc<GroupPart>)>,
}

#[derive(Debug, Default)]
pub(super) struct Background {
    inner: Mutex<Inner>,
    wake: Condvar,
    prepared: Condvar,
    /// Somebody waits for the segment in the making: it is to be finished without filling it.
    hurry: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    seals: VecDeque<SealTask>,
    next: Next,
    closing: bool,
}

/// The segment after the active one.
#[derive(Debug, Default)]
enum Next {
    #[default]
    Unknown,
    Wanted(Wish),
    Working,
    Ready(Arc<Segment>),
}

/// A segment that is to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish {
    pub base: u64,
    /// Capacity of the segment before it; 0 for the first.
    pub after: u64,
}

impl Wish {
    pub fn behind(segment: &Segment) -> Self {
        Self {
            base: segment.end(),
            after: segment.capacity,
        }
    }
}

enum Task {
    Prepare(Wish),
    Seal(SealTask),
}

impl Background {
    pub fn seal(&self, task: SealTask) {
        self.inner.lock().seals.push_back(task);
        self.wake.notify_one();
    }

    /// Asks for a segment, once.
    pub fn want(&self, wish: Wish) {
        let mut inner = self.inner.lock();
        if matches!(inner.next, Next::Unknown) {
            inner.next = Next::Wanted(wish);
            self.wake.notify_one();
        }
    }

    /// A segment that recovery found ready.
    pub fn adopt(&self, segment: Arc<Segment>) {
        self.inner.lock().next = Next::Ready(segment);
    }

    /// The segment wished for: the prepared one, or one made now.
    pub fn take(&self, shared: &Shared, wish: Wish) -> Result<Arc<Segment>, StorageError> {
        let mut inner = self.inner.lock();
        loop {
            match std::mem::take(&mut inner.next) {
                Next::Ready(segment) if segment.base == wish.base => return Ok(segment),
                Next::Working => {
                    inner.next = Next::Working;
                    self.hurry.store(true, Ordering::Relaxed);
                    self.prepared.wait(&mut inner);
                }
                Next::Unknown | Next::Wanted(_) | Next::Ready(_) => break,
            }
        }
        drop(inner);
        create(shared, wish, &|| true)
    }

    /// The first segment of a log, made here and now.
    pub fn first(&self, shared: &Shared, wish: Wish) -> Result<Arc<Segment>, StorageError> {
        create(shared, wish, &|| false)
    }

    /// Does one task; false if there was none.
    pub fn step(&self, shared: &Shared) -> bool {
        let task = self.next_task(&mut self.inner.lock());
        let Some(task) = task else { return false };
        self.perform(shared, task);
        true
    }

    /// Does tasks until closed; those queued by then are still done.
    pub fn run(&self, shared: &Shared) {
        loop {
            let mut inner = self.inner.lock();
            let task = loop {
                match self.next_task(&mut inner) {
                    Some(task) => break task,
                    None if inner.closing => return,
                    None => self.wake.wait(&mut inner),
                }
            };
            drop(inner);
            self.perform(shared, task);
        }
    }

    pub fn close(&self) {
        self.inner.lock().closing = true;
        self.hurry.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    fn next_task(&self, inner: &mut Inner) -> Option<Task> {
        if let Next::Wanted(wish) = inner.next
            && !inner.closing
        {
            inner.next = Next::Working;
            return Some(Task::Prepare(wish));
        }
        inner.seals.pop_front().map(Task::Seal)
    }

    fn perform(&self, shared: &Shared, task: Task) {
        match task {
            Task::Prepare(wish) => {
                let made = create(shared, wish, &|| self.hurry.load(Ordering::Relaxed));
                let mut inner = self.inner.lock();
                self.hurry.store(inner.closing, Ordering::Relaxed);
                inner.next = match made {
                    Ok(segment) => Next::Ready(segment),
                    Err(error) => {
                        // The writer tries again when it needs the segment, and then it counts.
                        tracing::warn!(base = wish.base, %error, "cannot prepare the next segment");
                        Next::Unknown
                    }
                };
                drop(inner);
                self.prepared.notify_all();
            }
            Task::Seal(task) => write_sidecar(shared, &task),
        }
    }
}

fn create(
    shared: &Shared,
    wish: Wish,
    enough: &dyn Fn() -> bool,
) -> Result<Arc<Segment>, StorageError> {
    let Wish { base, after } = wish;
    let capacity = (after * 2).max(FIRST_SEGMENT_BYTES);
    let capacity = capacity.min(shared.config.segment_bytes);
    let segment = segment::create(&*shared.vfs, &shared.dir, base, capacity, enough)?;
    shared
        .disk_bytes
        .fetch_add(capacity as usize, Ordering::Relaxed);
    Ok(segment)
}

fn write_sidecar(shared: &Shared, task: &SealTask) {
    let segment = &task.segment;
    let written = sidecar::write(
        &*shared.vfs,
        &shared.dir,
        segment,
        task.data_end,
        task.epoch,
        &task.parts,
    );
    match written {
        Ok(places) => {
            for ((id, _), places) in task.parts.iter().zip(places) {
                let group: Arc<Group> = shared.group(*id);
                let mut inner = group.inner.lock();
                inner.written.sidecar_is_durable(segment, &places);
            }
        }
        // Nothing is lost: the index stays in memory, and the next start scans the segment.
        Err(error) => {
            tracing::warn!(segment = segment.base, %error, "cannot write a segment's sidecar");
        }
    }
}
