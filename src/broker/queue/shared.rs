//! What readers of a queue see of its state machine: no lock is shared with apply for longer than a
//! copy takes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorate_storage::queue_index::QueueIndex;
use tokio::sync::{Notify, watch};

use super::SizeTable;
use crate::soundness::Soundness;

/// The offsets a queue holds on this node: `earliest..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueBounds {
    pub earliest: u64,
    pub end: u64,
}

/// What a queue has stored and does not show yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeldSize {
    pub batches: u64,
    pub messages: u64,
    /// As they are stored.
    pub bytes: u64,
}

const NEVER: u64 = u64::MAX;

/// The applied prefix of one queue on this node. Written by the state machine alone.
///
/// A record is in the index before `end` passes it, so whoever has seen an end finds the messages.
#[derive(Debug)]
pub struct QueueShared {
    index: Arc<QueueIndex>,
    earliest: AtomicU64,
    end: AtomicU64,
    last_stamp_ms: AtomicU64,
    sizes: Mutex<SizeTable>,
    /// Changes together with the bounds.
    held: Mutex<HeldSize>,
    /// When the next of them is due; [`NEVER`] if none is.
    next_due_ms: AtomicU64,
    /// Told when something is due earlier than what was known.
    due_earlier: OnceLock<Arc<Notify>>,
    wake: watch::Sender<u64>,
    closed: AtomicBool,
    soundness: Soundness,
}

impl QueueShared {
    /// `repair` is told when the index breaks.
    pub fn new(index: Arc<QueueIndex>, repair: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self {
            index,
            earliest: AtomicU64::new(0),
            end: AtomicU64::new(0),
            last_stamp_ms: AtomicU64::new(0),
            sizes: Mutex::default(),
            held: Mutex::default(),
            next_due_ms: AtomicU64::new(NEVER),
            due_earlier: OnceLock::new(),
            wake: watch::Sender::new(0),
            closed: AtomicBool::new(false),
            soundness: Soundness::new(repair),
        })
    }

    pub fn index(&self) -> &QueueIndex {
        &self.index
    }

    pub fn bounds(&self) -> QueueBounds {
        // In this order: `earliest` never passes an `end` that was read after it.
        let earliest = self.earliest.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Acquire);
        QueueBounds { earliest, end }
    }

    /// The log's time after the last applied entry.
    pub fn last_stamp_ms(&self) -> u64 {
        self.last_stamp_ms.load(Ordering::Acquire)
    }

    /// The bytes its messages take. As new as the last point in it, so a step too low at most.
    pub fn sizes(&self) -> SizeTable {
        self.sizes.lock().clone()
    }

    pub(super) fn set_sizes(&self, sizes: &SizeTable) {
        self.sizes.lock().clone_from(sizes);
    }

    pub fn held(&self) -> HeldSize {
        *self.held.lock()
    }

    /// Both at one moment: what becomes visible is in the one or in the other, and never in both.
    pub fn bounds_and_held(&self) -> (QueueBounds, HeldSize) {
        let held = self.held.lock();
        (self.bounds(), *held)
    }

    /// When the next delayed batch is due. It may have been cancelled meanwhile.
    pub fn next_due_ms(&self) -> Option<u64> {
        let next = self.next_due_ms.load(Ordering::Acquire);
        (next != NEVER).then_some(next)
    }

    /// From now on `told` is when something is due earlier than what was known. Only the first call
    /// counts.
    pub(in crate::broker) fn tell_due(&self, told: Arc<Notify>) {
        self.due_earlier.set(told).ok();
    }

    pub(super) fn publish_due(&self, next_due_ms: Option<u64>) {
        let next = next_due_ms.unwrap_or(NEVER);
        let known = self.next_due_ms.swap(next, Ordering::AcqRel);
        if next < known
            && let Some(told) = self.due_earlier.get()
        {
            told.notify_one();
        }
    }

    /// Changes after every run of applies that moved the end.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    /// The replica goes away: whoever waits here looks elsewhere.
    pub(in crate::broker) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake.send_modify(|_| {});
    }

    pub(in crate::broker) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether the index can be used.
    pub fn soundness(&self) -> &Soundness {
        &self.soundness
    }

    pub(super) fn publish(&self, bounds: QueueBounds, held: HeldSize, last_stamp_ms: u64) {
        let mut shown = self.held.lock();
        *shown = held;
        self.last_stamp_ms.store(last_stamp_ms, Ordering::Release);
        self.end.store(bounds.end, Ordering::Release);
        self.earliest.store(bounds.earliest, Ordering::Release);
    }

    pub(super) fn wake(&self) {
        let end = self.end.load(Ordering::Acquire);
        self.wake.send_if_modified(|last| {
            let moved = *last != end;
            *last = end;
            moved
        });
    }
}
