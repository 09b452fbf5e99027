//! What the catalog knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use quorate_raft::{NodeId, ReplicaId};
use quorate_storage::RaftGroupId;
use serde::{Deserialize, Serialize};

use super::{FIRST_COORDINATOR_GROUP, FIRST_QUEUE_GROUP, FIRST_REPLICA};
use crate::broker::TopicConfig;
use crate::broker::queue::QueueLimits;

/// Of one topic's life: a topic of the same name made later has another.
pub type TopicId = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPlace {
    pub replica: ReplicaId,
    pub node: NodeId,
}

/// Where one Raft group lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPlacement {
    pub group: u64,
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
    /// By coordinator number.
    pub coordinators: Vec<GroupPlacement>,
    pub topics: BTreeMap<TopicId, Arc<Topic>>,
    pub names: BTreeMap<String, TopicId>,
    /// Queue groups by id: the way back from Raft's events.
    pub queue_groups: BTreeMap<u64, (TopicId, u32)>,
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
            coordinators: Vec::new(),
            topics: BTreeMap::new(),
            names: BTreeMap::new(),
            queue_groups: BTreeMap::new(),
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

    /// The id that the next queue's group gets; every lower one was given.
    pub fn next_queue_group(&self) -> u64 {
        self.next_group
    }

    /// Where a group lives; not the catalog's own, which is configured.
    pub fn placement(&self, group: RaftGroupId) -> Option<&GroupPlacement> {
        match self.owner(group)? {
            GroupOwner::Catalog => None,
            GroupOwner::Coordinator(number) => self.coordinators.get(number as usize),
            GroupOwner::Queue { topic, queue } => {
                self.topics.get(&topic)?.queues.get(queue as usize)
            }
        }
    }

    /// Every group that the catalog places, coordinators first.
    pub fn placements(&self) -> impl Iterator<Item = &GroupPlacement> {
        let queues = self.topics.values().flat_map(|t| t.queues.iter());
        self.coordinators.iter().chain(queues)
    }
}
