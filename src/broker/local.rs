//! The replicas this node has open: queues with their batchers, coordinators with their views.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use quorate_raft::{Group, ReadError};
use quorate_storage::key_index::KeyIndex;
use tokio::sync::{Notify, Semaphore, mpsc};

use super::NodeId;
use super::backlog::BacklogGate;
use super::batcher::Submission;
use super::queue::QueueShared;
use crate::coordinator::CoordinatorView;
use crate::soundness::Soundness;

/// Replicas that ask their leaders for what is committed at the same time.
const CATCH_UP_AT_ONCE: usize = 64;
/// Before a replica that could not catch up tries again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// This node's replica of one queue.
#[derive(Debug)]
pub struct LocalQueue {
    pub group: Group,
    pub shared: Arc<QueueShared>,
    pub keys: KeyIndex,
    /// Of the log as it was found at the start: ready once this has been applied.
    pub recovered_index: Option<u64>,
    pub(super) queued_bytes: AtomicUsize,
    /// What is due is being delivered.
    pub(super) delivering: AtomicBool,
    pub(super) backlog: BacklogGate,
    /// The running batcher, if there is one.
    pub(super) batcher: Mutex<Option<mpsc::UnboundedSender<Submission>>>,
}

impl LocalQueue {
    pub fn new(
        group: Group,
        shared: Arc<QueueShared>,
        keys: KeyIndex,
        recovered_index: Option<u64>,
    ) -> Arc<Self> {
        Arc::new(Self {
            group,
            shared,
            keys,
            recovered_index,
            queued_bytes: AtomicUsize::new(0),
            delivering: AtomicBool::new(false),
            backlog: BacklogGate::default(),
            batcher: Mutex::new(None),
        })
    }
}

/// This node's replica of one coordinator.
#[derive(Debug)]
pub struct LocalCoordinator {
    pub group: Group,
    pub view: CoordinatorView,
    pub soundness: Arc<Soundness>,
    pub recovered_index: Option<u64>,
}

/// All open replicas, found by Raft group id or coordinator number.
#[derive(Debug, Default)]
pub struct LocalGroups {
    queues: RwLock<HashMap<u64, Arc<LocalQueue>>>,
    coordinators: RwLock<HashMap<u32, Arc<LocalCoordinator>>>,
    /// Bytes waiting in all batchers of this node.
    pub(super) queued_bytes: Arc<AtomicUsize>,
    /// Told when a queue has something due earlier than was known.
    pub(super) due_earlier: Arc<Notify>,
    catching_up: Turns,
}

/// Bounds how many replicas catch up at once after a start.
#[derive(Debug)]
struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CATCH_UP_AT_ONCE)))
    }
}

impl LocalGroups {
    pub fn queue(&self, group: u64) -> Option<Arc<LocalQueue>> {
        self.queues.read().get(&group).cloned()
    }

    pub fn queues(&self) -> Vec<Arc<LocalQueue>> {
        self.queues.read().values().cloned().collect()
    }

    pub fn coordinator(&self, number: u32) -> Option<Arc<LocalCoordinator>> {
        self.coordinators.read().get(&number).cloned()
    }

    /// Adds a replica that was just opened, and has it catch up in the background.
    pub fn insert_queue(&self, queue: Arc<LocalQueue>) {
        self.bring_up(queue.group.clone(), queue.recovered_index);
        queue.shared.tell_due(self.due_earlier.clone());
        self.queues.write().insert(queue.group.id().0, queue);
        // It may have something due already.
        self.due_earlier.notify_one();
    }

    pub fn remove_queue(&self, group: u64) {
        if let Some(queue) = self.queues.write().remove(&group) {
            queue.shared.close();
        }
    }

    /// The same for a coordinator.
    pub fn insert_coordinator(&self, number: u32, coordinator: Arc<LocalCoordinator>) {
        let turns = self.catching_up.0.clone();
        tokio::spawn(catch_up(
            coordinator.group.clone(),
            coordinator.recovered_index,
            turns,
        ));
        self.coordinators.write().insert(number, coordinator);
    }

    pub fn coordinators(&self) -> Vec<(u32, Arc<LocalCoordinator>)> {
        let all = self.coordinators.read();
        all.iter().map(|(n, c)| (*n, c.clone())).collect()
    }

    pub fn remove_coordinator(&self, number: u32) {
        self.coordinators.write().remove(&number);
    }

    /// Takes a group out of service, whatever it is for.
    pub fn remove(&self, group: u64) {
        self.remove_queue(group);
        let mut coordinators = self.coordinators.write();
        coordinators.retain(|_, coordinator| coordinator.group.id().0 != group);
    }

    /// Whether the group is open here, as a queue or as a coordinator.
    pub fn has(&self, group: u64) -> bool {
        let coordinator = |c: &Arc<LocalCoordinator>| c.group.id().0 == group;
        self.queues.read().contains_key(&group)
            || self.coordinators.read().values().any(coordinator)
    }

    /// Ids of the open queues.
    pub fn queue_ids(&self) -> Vec<u64> {
        self.queues.read().keys().copied().collect()
    }

    /// Bytes that wait to be proposed.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes.load(Ordering::Relaxed)
    }
}

/// Whether a replica has applied what its log held when it was opened. A tail that was never
/// committed may be cut meanwhile, so no more is asked for than the log still has.
fn caught_up(group: &Group, recovered_index: Option<u64>) -> bool {
    let Some(recovered) = recovered_index else {
        return true;
    };
    let last = group.log().state().last.map_or(0, |id| id.index);
    let applied = group.applied().map_or(0, |id| id.index);
    applied >= recovered.min(last)
}

/// Has a replica that was opened again apply its own log.
///
/// What of a log is committed is known by its leader alone. A quiet group's leader has nothing to
/// send to a follower whose log is complete, so the follower would stay at its last checkpoint: it
/// asks. A read barrier makes the leader tell everyone what is committed.
async fn catch_up(group: Group, recovered_index: Option<u64>, turns: Arc<Semaphore>) {
    while !caught_up(&group, recovered_index) {
        if group.is_closed() {
            return;
        }
        if group.wait_leader(LOOK_AGAIN).await.is_none() {
            continue;
        }
        // Never closed: it lives as long as the groups.
        let Ok(_turn) = turns.acquire().await else {
            return;
        };
        match group.read_barrier(LOOK_AGAIN).await {
            Ok(()) | Err(ReadError::Closed) => return,
            Err(error) => tracing::debug!(group = %group.id(), %error, "not caught up yet"),
        }
    }
}

impl LocalGroups {
    /// Has a replica catch up with its own log, in the background.
    pub(super) fn bring_up(&self, group: Group, recovered_index: Option<u64>) {
        tokio::spawn(catch_up(group, recovered_index, self.catching_up.0.clone()));
    }

    /// The replicas that have not applied their recovered log yet. Without a leader nothing can be
    /// applied, and that is no reason to turn readers away.
    pub fn behind(&self) -> Vec<Behind> {
        let behind = |group: &Group, recovered| {
            let leader = group.leader()?;
            (!caught_up(group, recovered)).then(|| Behind {
                group: group.id().0,
                applied: group.applied().map_or(0, |id| id.index),
                recovered: recovered.unwrap_or(0),
                leader,
            })
        };
        let queues = self.queues.read();
        let queues = queues
            .values()
            .filter_map(|q| behind(&q.group, q.recovered_index));
        let coordinators = self.coordinators.read();
        let coordinators = coordinators
            .values()
            .filter_map(|c| behind(&c.group, c.recovered_index));
        queues.chain(coordinators).collect()
    }
}

/// A replica that has not applied all of its own log yet.
#[derive(Debug, Clone, Copy)]
pub struct Behind {
    pub group: u64,
    pub applied: u64,
    /// The last index in the log when it was opened.
    pub recovered: u64,
    pub leader: NodeId,
}

impl std::fmt::Display for Behind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "group {} applied {} of {}, led by node {}",
            self.group, self.applied, self.recovered, self.leader
        )
    }
}
