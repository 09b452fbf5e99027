//! What a host and a Raft group are told at their start.

use std::time::Duration;

use quorate_storage::RaftGroupId;
use quorate_storage::commit_log::Flush;
use uuid::Uuid;

use crate::types::{NodeId, ReplicaId};

/// One node's settings for all of its Raft groups.
#[derive(Debug, Clone)]
pub struct HostConfig {
    pub cluster_name: String,
    pub node_id: NodeId,
    pub node_uuid: Uuid,
    /// Every node of the cluster with the address of its peer listener, this node included.
    pub nodes: Vec<(NodeId, String)>,
    /// Half of the time for which a follower's promise not to elect another leader lasts, and the
    /// bound of one heartbeat. Ten times the worst fsync seen is a sound lower bound.
    pub lease: Duration,
    /// The bound of one replication round trip.
    pub replication_timeout: Duration,
    pub ping_interval: Duration,
    pub silence_timeout: Duration,
    /// How long a group may be without a leader before the next candidate is tried.
    pub election_retry: Duration,
    /// The machine crashed since the last run, so unsynced tails may be gone: see [`crate::Run`].
    pub tails_suspect: bool,
    /// How long a returned node must have been up before leaderships move back to it.
    pub rebalance_after: Duration,
}

impl HostConfig {
    /// Defaults for a node of the given cluster.
    pub fn new(cluster_name: &str, node_id: NodeId, nodes: Vec<(NodeId, String)>) -> Self {
        Self {
            cluster_name: cluster_name.to_owned(),
            node_id,
            node_uuid: Uuid::new_v4(),
            nodes,
            lease: Duration::from_millis(1500),
            replication_timeout: Duration::from_millis(1000),
            ping_interval: Duration::from_millis(100),
            silence_timeout: Duration::from_millis(600),
            election_retry: Duration::from_millis(250),
            tails_suspect: false,
            rebalance_after: Duration::from_secs(5),
        }
    }
}

/// One replica of a group and the node it lives on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replica {
    pub replica: ReplicaId,
    pub node: NodeId,
}

/// What becomes of a group's applied entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogRetention {
    /// The log is the message store: entries stay until retention purges them.
    Messages,
    /// Only the state matters: entries go once a snapshot covers them.
    StateOnly,
}

/// A Raft group as every one of its replicas is told of it.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    pub group: RaftGroupId,
    /// The replicas of the group's first membership, for ever: each of them writes it if it finds
    /// its log empty, all the same one. Replicas that came later wait to be filled.
    pub founders: Vec<Replica>,
    /// The replicas the group should have now.
    pub replicas: Vec<Replica>,
    /// The node that should lead while it can.
    pub preferred: NodeId,
    pub flush: Flush,
    pub retention: LogRetention,
    /// State checkpoints are written at the indexes that are multiples of this.
    pub checkpoint_every: u64,
}
