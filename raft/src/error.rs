//! What can go wrong above the disk, and whether a write may have happened all the same.

use quorate_storage::StorageError;

use crate::types::NodeId;

/// Why a proposal was not acknowledged.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// Nobody has taken it. With a leader named, ask there; without, try here again in a moment.
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    /// It may be committed or not, now or later.
    #[error("the fate of the proposal is unknown: {0}")]
    Unknown(String),
    /// The group is closed on this node.
    #[error("the group is not open on this node")]
    Closed,
}

impl ProposeError {
    /// True where trying again cannot store the proposal twice.
    pub fn nobody_took_it(&self) -> bool {
        matches!(self, Self::NotLeader { .. } | Self::Closed)
    }
}

/// Why leadership was not handed over.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransferError {
    /// Nothing was done: this replica has nothing to hand over.
    #[error("this replica does not lead")]
    NotLeader { leader: Option<NodeId> },
    /// Nothing was done: the other node could not take over.
    #[error("{0}")]
    Refused(String),
    /// It was announced, and the other node did not take over in time. Another one leads then, or
    /// will.
    #[error("{0}")]
    NotTaken(String),
}

/// Why the end of a group's log could not be proved.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    #[error("no leader is known")]
    NoLeader,
    #[error("the leader could not reach a majority")]
    NoQuorum,
    #[error("the leader did not answer: {0}")]
    Unreachable(String),
    #[error("the group is not open on this node")]
    Closed,
    #[error("this replica did not catch up in time")]
    Timeout,
}

/// Why a request to another node has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// No byte of it left this node, or the other side refused to take it up.
    #[error("not sent: {0}")]
    NotSent(String),
    /// No answer in time. It may have been carried out.
    #[error("no answer: {0}")]
    Unknown(String),
    /// The connection was lost, or the node failed, before the answer. It may have been carried out.
    #[error("the answer was lost: {0}")]
    Lost(String),
}

/// Why a group could not be opened on this node.
#[derive(Debug, thiserror::Error)]
pub enum OpenGroupError {
    #[error("node {node} has no replica of group {group}")]
    NoReplicaHere { node: NodeId, group: u64 },
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the group did not start: {0}")]
    Raft(String),
    #[error("the host is shutting down")]
    ShuttingDown,
}
