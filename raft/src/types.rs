//! The openraft vocabulary of this crate, and the translation to what storage writes.

use std::fmt;

use bytes::Bytes;
use openraft::impls::leader_id_std;
use openraft::vote::leader_id_std::CommittedLeaderId;
use openraft::{EntryPayload, StoredMembership};
use quorate_storage::commit_log::{Entry as LogEntry, EntryKind};
use quorate_storage::{LogId, StorageError, Vote};
use serde::{Deserialize, Serialize};

/// A machine of the cluster, as configured.
pub type NodeId = u64;
/// One replica's life in one Raft group; never reused. openraft's `NodeId` is this.
pub type ReplicaId = u64;

/// A command of some state machine; only that state machine can read it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command(pub Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a state machine answered to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply(pub Bytes);

/// Where a replica lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplicaNode {
    pub node: NodeId,
}

/// openraft's types, as this crate uses them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Command;
    type R = Reply;
    type NodeId = ReplicaId;
    type Node = ReplicaNode;
    type Term = u64;
    type LeaderId = leader_id_std::LeaderId<u64, ReplicaId>;
    type Vote = openraft::Vote<Self::LeaderId>;
    type Payload = EntryPayload<Command, ReplicaId, ReplicaNode>;
    type Entry = openraft::Entry<CommittedLeaderId<u64>, Self::Payload>;
    type AsyncRuntime = openraft_rt_tokio::TokioRuntime;
    type Responder<T>
        = openraft::impls::OneshotResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub(crate) type RaftLogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type RaftVote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type RaftEntry = openraft::alias::EntryOf<TypeConfig>;

pub(crate) type RaftStoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

pub(crate) fn to_raft_log_id(id: LogId) -> RaftLogId {
    RaftLogId::new_term_index(id.term, id.index)
}

pub(crate) fn from_raft_log_id(id: &RaftLogId) -> LogId {
    LogId::new(id.committed_leader_id().term, id.index)
}

pub(crate) fn to_raft_vote(vote: Vote) -> RaftVote {
    let node = vote.voted_for.unwrap_or_default();
    if vote.committed {
        RaftVote::new_committed(vote.term, node)
    } else {
        RaftVote::new(vote.term, node)
    }
}

pub(crate) fn from_raft_vote(vote: &RaftVote) -> Vote {
    Vote {
        term: vote.leader_id().term,
        voted_for: Some(vote.leader_id().voted_for),
        committed: vote.is_committed(),
    }
}

pub(crate) fn encode_membership(membership: &RaftStoredMembership) -> Bytes {
    // Encoding plain maps and integers into memory has no way to fail.
    Bytes::from(postcard::to_stdvec(membership).unwrap_or_default())
}

pub(crate) fn decode_membership(bytes: &[u8]) -> Result<RaftStoredMembership, StorageError> {
    if bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    postcard::from_bytes(bytes)
        .map_err(|e| StorageError::InvalidArgument(format!("membership cannot be read: {e}")))
}

pub(crate) fn to_log_entry(entry: RaftEntry) -> LogEntry {
    let log_id = from_raft_log_id(&entry.log_id);
    let (kind, body) = match entry.payload {
        EntryPayload::Blank => (EntryKind::Blank, Bytes::new()),
        EntryPayload::Normal(command) => (EntryKind::Command, command.0),
        EntryPayload::Membership(m) => (
            EntryKind::Membership,
            Bytes::from(postcard::to_stdvec(&m).unwrap_or_default()),
        ),
    };
    LogEntry { log_id, kind, body }
}

pub(crate) fn to_raft_entry(entry: LogEntry) -> Result<RaftEntry, StorageError> {
    let payload = match entry.kind {
        EntryKind::Blank => EntryPayload::Blank,
        EntryKind::Command => EntryPayload::Normal(Command(entry.body)),
        EntryKind::Membership => {
            EntryPayload::Membership(postcard::from_bytes(&entry.body).map_err(|e| {
                StorageError::InvalidArgument(format!("membership entry cannot be read: {e}"))
            })?)
        }
    };
    Ok(RaftEntry {
        log_id: to_raft_log_id(entry.log_id),
        payload,
    })
}
