//! What waits for the writer: one queue over all groups.
//!
//! Invariant: the order of the queue is the order of the frames, and per group it is the order of the
//! calls, because a caller pushes while it holds its group's lock.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::group::Group;
use super::segment::Segment;
use super::types::{Done, Entry, Flush};
use crate::mutation::{self, Mutation};
use crate::{LogId, StorageError, Vote};

/// One call that waits to be written.
pub(super) struct Op {
    pub action: Action,
    pub done: Option<Done>,
}

pub(super) enum Action {
    Append {
        group: Arc<Group>,
        /// The group's counter of appends; tells cached entries of this call from later ones.
        seq: u64,
        entries: Vec<Entry>,
        /// How many of them are encoded already.
        next: usize,
        flush: Flush,
    },
    Vote(Arc<Group>, Vote),
    Truncate {
        group: Arc<Group>,
        from: u64,
        kept: Option<LogId>,
    },
    Purge(Arc<Group>, LogId),
    Remove(Arc<Group>),
    /// Write the group's vote and purge again, if their newest frames are below this position.
    Carry(Arc<Group>, u64),
    /// Write entries again whose only place is in a segment that is to go. Which of them still count
    /// is decided when they are written.
    Relocate {
        group: Arc<Group>,
        segment: Arc<Segment>,
        entries: Vec<Entry>,
        next: usize,
    },
    /// Nothing to write; done when everything before it is durable.
    Barrier,
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.action {
            Action::Append { .. } => "append",
            Action::Vote(..) => "vote",
            Action::Truncate { .. } => "truncate",
            Action::Purge(..) => "purge",
            Action::Remove(_) => "remove",
            Action::Carry(..) => "carry",
            Action::Relocate { .. } => "relocate",
            Action::Barrier => "barrier",
        })
    }
}

/// A call that was not queued, and why.
#[derive(Debug)]
pub(super) struct Refused {
    pub error: StorageError,
    pub op: Op,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    wake: Condvar,
    /// Bytes of bodies queued and not yet written.
    bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Inner {
    ops: VecDeque<Op>,
    closing: bool,
    /// Once set, nothing is taken any more.
    refuse: Option<StorageError>,
}

impl Queue {
    /// Queues a call, or gives it back uncalled.
    pub fn push(&self, op: Op, bytes: usize) -> Result<(), Box<Refused>> {
        let mut inner = self.inner.lock();
        if let Some(error) = &inner.refuse {
            return Err(Box::new(Refused {
                error: error.clone(),
                op,
            }));
        }
        if inner.closing {
            let error = StorageError::Closed;
            return Err(Box::new(Refused { error, op }));
        }
        if mutation::on(Mutation::VoteOvertakesAppends) && matches!(op.action, Action::Vote(..)) {
            inner.ops.push_front(op);
        } else {
            inner.ops.push_back(op);
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        drop(inner);
        self.wake.notify_one();
        Ok(())
    }

    /// Moves everything queued behind `into`. True when no more will come.
    pub fn take(&self, into: &mut VecDeque<Op>) -> bool {
        let mut inner = self.inner.lock();
        if into.is_empty() {
            std::mem::swap(into, &mut inner.ops);
        } else {
            into.append(&mut inner.ops);
        }
        inner.closing
    }

    pub fn written(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until something is queued, closing is asked for, or `until`.
    pub fn wait(&self, until: Option<Instant>) {
        let mut inner = self.inner.lock();
        if !inner.ops.is_empty() || inner.closing {
            return;
        }
        match until {
            Some(until) => {
                self.wake.wait_until(&mut inner, until);
            }
            None => self.wake.wait(&mut inner),
        }
    }

    /// Takes no more; what is queued is still written.
    pub fn close(&self) {
        self.inner.lock().closing = true;
        self.wake.notify_one();
    }

    /// Takes no more and hands back what is queued.
    pub fn refuse(&self, error: &StorageError) -> VecDeque<Op> {
        let mut inner = self.inner.lock();
        inner.refuse.get_or_insert_with(|| error.clone());
        std::mem::take(&mut inner.ops)
    }
}
