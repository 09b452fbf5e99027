//! What the catalog knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use quorate_raft::{NodeId, ReplicaId};
use quorate_storage::RaftGroupId;
use serde::{Deserialize, Serialize};

use super::{FIRST_COORDINATOR_GROUP, FIRST_QUEUE_GROUP, FIRST_REPLICA};
use crate::broker::queue::QueueLimits;
use crate::broker::{Generator, TopicConfig};
use crate::exchange::Exchange;

/// Of one topic's life: a topic of the same name made later has another.
pub type TopicId = u64;

/// Whether a replica can be counted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    Sound,
    /// Its node found damage and gave it up: it neither votes nor acknowledges, and never will.
    Lost,
    /// Takes a lost one's place and receives what that should have held.
    Filling,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPlace {
    pub replica: ReplicaId,
    pub node: NodeId,
    pub state: ReplicaState,
}

/// Where one Raft group lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPlacement {
    pub group: u64,
    /// The first replicas, as (replica, node): they found the group, whatever becomes of them.
    pub founders: Vec<(ReplicaId, NodeId)>,
    pub replicas: Vec<ReplicaPlace>,
    /// The node that leads it when all is well.
    pub preferred: NodeId,
    /// Goes up when an async-flush queue lost a tail that had been acknowledged.
    pub epoch: u64,
}

impl GroupPlacement {
    pub fn id(&self) -> RaftGroupId {
        RaftGroupId(self.group)
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.replicas.iter().map(|r| r.node)
    }

    pub fn on(&self, node: NodeId) -> bool {
        self.nodes().any(|n| n == node)
    }

    /// A new group, its first replicas on these nodes; the first of them leads when all is well.
    pub(super) fn found(group: u64, founders: Vec<(ReplicaId, NodeId)>) -> Self {
        let sound = |(replica, node): &(ReplicaId, NodeId)| ReplicaPlace {
            replica: *replica,
            node: *node,
            state: ReplicaState::Sound,
        };
        Self {
            group,
            preferred: founders.first().map_or(0, |(_, node)| *node),
            replicas: founders.iter().map(sound).collect(),
            founders,
            epoch: 0,
        }
    }

    pub fn replica_on(&self, node: NodeId) -> Option<ReplicaPlace> {
        self.replicas.iter().copied().find(|r| r.node == node)
    }

    /// As many replicas as can commit something.
    pub fn majority(&self) -> usize {
        self.replicas.len() / 2 + 1
    }

    pub fn count(&self, state: ReplicaState) -> usize {
        self.replicas.iter().filter(|r| r.state == state).count()
    }

    pub fn is_sound(&self) -> bool {
        self.count(ReplicaState::Sound) == self.replicas.len()
    }

    /// So many replicas are lost that nothing can be committed, nor anything lost be replaced
    /// without a guess about what the lost ones had acknowledged.
    pub fn is_beyond_repair(&self) -> bool {
        let left = self.replicas.len() - self.count(ReplicaState::Lost);
        !self.replicas.is_empty() && left < self.majority()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topic {
    pub id: TopicId,
    pub name: String,
    pub config: TopicConfig,
    /// By queue number.
    pub queues: Vec<GroupPlacement>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    pub url: String,
    pub peer_addr: String,
    /// Of the node's data directory; empty before it registered.
    pub uuid: String,
    pub version: String,
    /// The last time this node gave up all of its replicas, by an id it chose.
    pub quarantine: Option<String>,
}

/// A replica that is lost, or not filled yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unsound {
    pub group: u64,
    pub node: NodeId,
}

/// What a Raft group is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupOwner {
    Catalog,
    Coordinator(u32),
    Queue { topic: TopicId, queue: u32 },
}

/// All of it. Topics are shared, so a copy for readers costs a few pointers each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogState {
    /// Goes up with every change.
    pub version: u64,
    /// None before the bootstrap.
    pub cluster_id: Option<String>,
    /// Of every queue, for ever: apply depends on them.
    pub limits: QueueLimits,
    pub nodes: BTreeMap<NodeId, NodeEntry>,
    /// The catalog's own group; without replicas before the bootstrap.
    pub catalog: GroupPlacement,
    /// By coordinator number.
    pub coordinators: Vec<GroupPlacement>,
    pub topics: BTreeMap<TopicId, Arc<Topic>>,
    pub names: BTreeMap<String, TopicId>,
    pub generators: BTreeMap<TopicId, Generator>,
    /// Queue groups by id: the way back from Raft's events.
    pub queue_groups: BTreeMap<u64, (TopicId, u32)>,
    /// By name.
    pub exchanges: BTreeMap<String, Arc<Exchange>>,
    pub(super) next_topic: TopicId,
    pub(super) next_group: u64,
    pub(super) next_replica: ReplicaId,
}

impl Default for CatalogState {
    fn default() -> Self {
        Self {
            version: 0,
            cluster_id: None,
            limits: QueueLimits::default(),
            nodes: BTreeMap::new(),
            catalog: GroupPlacement::found(super::CATALOG_GROUP.0, Vec::new()),
            coordinators: Vec::new(),
            topics: BTreeMap::new(),
            names: BTreeMap::new(),
            generators: BTreeMap::new(),
            queue_groups: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            next_topic: 1,
            next_group: FIRST_QUEUE_GROUP,
            next_replica: FIRST_REPLICA,
        }
    }
}

impl CatalogState {
    pub fn topic(&self, name: &str) -> Option<&Arc<Topic>> {
        self.topics.get(self.names.get(name)?)
    }

    pub fn owner(&self, group: RaftGroupId) -> Option<GroupOwner> {
        if group == super::CATALOG_GROUP {
            return Some(GroupOwner::Catalog);
        }
        if let Some((topic, queue)) = self.queue_groups.get(&group.0) {
            return Some(GroupOwner::Queue {
                topic: *topic,
                queue: *queue,
            });
        }
        let number = group.0.checked_sub(FIRST_COORDINATOR_GROUP)?;
        let known = (number as usize) < self.coordinators.len();
        known.then_some(GroupOwner::Coordinator(number as u32))
    }

    /// Whether the topic is no more. One that is not known here yet is not deleted.
    pub fn was_deleted(&self, topic: TopicId) -> bool {
        topic < self.next_topic && !self.topics.contains_key(&topic)
    }

    /// How many topics were deleted so far.
    pub fn deleted_topics(&self) -> u64 {
        let given = self.next_topic.saturating_sub(1);
        given.saturating_sub(self.topics.len() as u64)
    }

    /// The id that the next queue's group gets; every lower one was given.
    pub fn next_queue_group(&self) -> u64 {
        self.next_group
    }

    /// Whether a topic ever had this id, as far as this copy of the catalog knows.
    pub fn knew_topic(&self, id: TopicId) -> bool {
        id < self.next_topic
    }

    /// Where a group lives.
    pub fn placement(&self, group: RaftGroupId) -> Option<&GroupPlacement> {
        match self.owner(group)? {
            GroupOwner::Catalog => Some(&self.catalog),
            GroupOwner::Coordinator(number) => self.coordinators.get(number as usize),
            GroupOwner::Queue { topic, queue } => {
                self.topics.get(&topic)?.queues.get(queue as usize)
            }
        }
    }

    /// Every group that the catalog places, coordinators first; not its own.
    pub fn placements(&self) -> impl Iterator<Item = &GroupPlacement> {
        let queues = self.topics.values().flat_map(|t| t.queues.iter());
        self.coordinators.iter().chain(queues)
    }

    /// The same with the catalog's own.
    pub fn all_placements(&self) -> impl Iterator<Item = &GroupPlacement> {
        std::iter::once(&self.catalog).chain(self.placements())
    }

    /// Every replica that can't be counted on.
    pub fn unsound(&self) -> impl Iterator<Item = Unsound> + '_ {
        self.all_placements().flat_map(|placement| {
            let unsound = placement.replicas.iter();
            let unsound = unsound.filter(|place| place.state != ReplicaState::Sound);
            unsound.map(|place| Unsound {
                group: placement.group,
                node: place.node,
            })
        })
    }

    /// Changes every placement for which `change` says that it did something.
    pub(super) fn change_placements(
        &mut self,
        mut change: impl FnMut(&mut GroupPlacement, &mut ReplicaId) -> bool,
    ) -> bool {
        let next = &mut self.next_replica;
        let mut changed = change(&mut self.catalog, next);
        for placement in &mut self.coordinators {
            changed |= change(placement, next);
        }
        for topic in self.topics.values_mut() {
            // Topics that stay as they are stay shared.
            let mut queues = topic.queues.clone();
            let mut touched = false;
            for placement in &mut queues {
                touched |= change(placement, next);
            }
            if touched {
                Arc::make_mut(topic).queues = queues;
                changed = true;
            }
        }
        changed
    }
}
