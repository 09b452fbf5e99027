//! What can be asked of the catalog, and what it answers.

use quorate_raft::{NodeId, ReplicaId};
use serde::{Deserialize, Serialize};

use super::{GroupPlacement, TopicId};
use crate::broker::queue::QueueLimits;
use crate::broker::{Backlog, FlushMode, Generator, Quota, Retention, TopicConfig};
use crate::exchange::{Binding, ExchangeKind};

/// A change of the catalog. All are idempotent: asked twice, the second changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CatalogCommand {
    /// The first command of a cluster's life.
    Bootstrap {
        cluster_id: String,
        /// Node ids with the address of their peer listener.
        nodes: Vec<(NodeId, String)>,
        coordinators: u32,
        limits: QueueLimits,
    },
    /// What a node says of itself at each start.
    RegisterNode {
        node: NodeId,
        url: String,
        peer_addr: String,
        uuid: String,
        version: String,
    },
    CreateTopic {
        name: String,
        /// `replicas` 0 means three, or as many as there are nodes.
        config: TopicConfig,
        /// Nodes that get replicas only when there are not enough others.
        avoid: Vec<NodeId>,
    },
    UpdateTopic {
        name: String,
        change: TopicChange,
        avoid: Vec<NodeId>,
    },
    /// Has a topic generate messages, or stop.
    SetGenerator {
        name: String,
        generator: Option<Generator>,
    },
    DeleteTopic {
        name: String,
    },
    /// A majority of this async-flush queue's replicas lost their tail. Raised once from each
    /// value, however often it is asked for.
    RaiseEpoch {
        group: u64,
        from: u64,
    },
    /// A node found damage and gives up replicas it has. Those that the others can fill again are
    /// replaced under new ids.
    GiveUp {
        node: NodeId,
        what: GivenUp,
    },
    /// A replacement holds what its group has committed, and votes.
    Filled {
        group: u64,
        replica: ReplicaId,
    },
    /// An exchange with the internal topic that keeps what is published to it.
    PutExchange {
        name: String,
        kind: ExchangeKind,
        avoid: Vec<NodeId>,
    },
    DeleteExchange {
        name: String,
    },
    /// Takes the place of the binding of this topic that was there.
    PutBinding {
        exchange: String,
        topic: String,
        binding: Binding,
    },
    DeleteBinding {
        exchange: String,
        topic: String,
    },
}

/// The replicas that a node gives up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GivenUp {
    /// All it has at this time. The id makes a repetition harmless.
    All { id: String },
    /// These, as (group, replica).
    Some(Vec<(u64, ReplicaId)>),
}

/// [`crate::broker::TopicPatch`] in a form that can be stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicChange {
    pub queues: Option<u32>,
    pub retention: Option<Retention>,
    pub max_message_bytes: Option<u64>,
    pub backlog: Option<Backlog>,
    pub quota: Option<Quota>,
    pub ttl_ms: Option<Option<u64>>,
    pub trace: Option<bool>,
    pub flush: Option<FlushMode>,
    pub hash_queues: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CatalogReply {
    Done,
    Created(TopicId),
    /// A topic of that name and configuration was there.
    Exists(TopicId),
    /// A topic of that name was there, with another configuration.
    Conflict,
    NotFound,
    ExchangeNotFound,
    BindingNotFound,
    NotEnoughNodes {
        available: u32,
        required: u32,
    },
    Invalid(String),
    /// The catalog was not bootstrapped yet.
    NotReady,
    /// The node id belongs to another data directory.
    OtherDisk {
        known: String,
    },
    /// Given up; the catalog's own group is placed so now.
    GivenUp {
        catalog: GroupPlacement,
    },
}
