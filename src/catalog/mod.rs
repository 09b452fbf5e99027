//! The catalog: topics, where their queues live, and the nodes. One Raft group, in memory.
//!
//! Every node of the cluster applies it and reads its own copy without asking anyone, so produce
//! and consume go on from what is known while the catalog has no leader.

mod command;
mod damage;
mod machine;
mod placement;
mod state;

pub use command::{CatalogCommand, CatalogReply, GivenUp, TopicChange};
pub use machine::{CatalogMachine, MAX_MESSAGE_BYTES};
pub use state::{
    CatalogState, GroupOwner, GroupPlacement, NodeEntry, ReplicaPlace, ReplicaState, Topic,
    TopicId, Unsound,
};

use quorate_storage::RaftGroupId;

/// The catalog's own Raft group; its replica ids are the node ids.
pub const CATALOG_GROUP: RaftGroupId = RaftGroupId(1);
/// Coordinators are the groups from here on.
pub const FIRST_COORDINATOR_GROUP: u64 = 16;
/// Queues are the groups from here on, given in order and never again.
pub const FIRST_QUEUE_GROUP: u64 = 1024;
/// Replica ids below belong to the catalog's own replicas.
pub(crate) const FIRST_REPLICA: u64 = 1024;
/// Keeps coordinator groups below the first queue's.
pub const MAX_COORDINATORS: u32 = 512;
