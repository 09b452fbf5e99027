//! What can be asked of a coordinator, and what it answers.
//!
//! In the log each command follows its stamp, eight bytes, big-endian: the leader's clock in ms.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::leases::{LeaseCommand, LeaseReply};
use super::membership::{Delivery, Newcomer, NotAMember, QueueId, TopicShape};
use crate::broker::MemberMark;
use crate::catalog::TopicId;
use crate::coordinator::transactions::{TransactionCommand, TransactionReply};

/// A consumer group's next offset in one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueOffset {
    pub topic: TopicId,
    pub queue: u32,
    pub offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorCommand {
    Commit {
        group: String,
        offsets: Vec<QueueOffset>,
        allow_rewind: bool,
        member: Option<MemberMark>,
    },
    /// Without a name: a new producer. With one: the same producer, its epoch raised.
    RegisterProducer {
        name: Option<String>,
    },
    /// Says that a named producer is about to write to a queue, so that its next registration
    /// knows where to fence it.
    AttachProducer {
        id: i64,
        epoch: i16,
        queue_group: u64,
    },
    /// Of a group that leases its messages.
    Leases {
        group: String,
        command: LeaseCommand,
    },
    Transaction(TransactionCommand),
    /// Somebody becomes a member of a consumer group, or does so again.
    Join {
        group: String,
        newcomer: Newcomer,
        topics: BTreeMap<String, TopicShape>,
    },
    /// A heartbeat that changes something; all others are answered without a trace.
    Heartbeat {
        group: String,
        member: String,
        epoch: u64,
        owned: Option<Vec<QueueId>>,
    },
    /// The members leave, or were not heard of for too long. Each is named with an epoch: a life
    /// that began after it goes on.
    RemoveMembers {
        group: String,
        members: Vec<(String, u64)>,
    },
    /// What the catalog says now of topics that a group subscribes to.
    SeeTopics {
        group: String,
        topics: BTreeMap<String, TopicShape>,
    },
    /// Sets offsets, wherever they were. While the group has members only with `force`.
    Reset {
        group: String,
        offsets: Vec<QueueOffset>,
        force: bool,
    },
    /// Where the group begins, if nothing is committed there yet. `instance`: of a broadcast group.
    Begin {
        group: String,
        instance: Option<String>,
        offsets: Vec<QueueOffset>,
    },
    /// Removes some of a group's records; to be repeated until there are no more.
    DeleteGroup {
        group: String,
    },
    /// Removes what the group, or an instance of it, has committed in topics that are no more.
    ForgetTopics {
        group: String,
        topics: BTreeSet<TopicId>,
    },
}

/// How a consumer group goes through its messages. Its first use decides, for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupMode {
    /// Its consumers commit offsets.
    Offsets,
    /// The coordinator leases single messages to them.
    Leases,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommitVerdict {
    Done,
    Conflict {
        committed: u64,
    },
    Fenced,
    /// A transaction holds the offset until it ends.
    Held,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorReply {
    /// In the order of the command's offsets.
    Committed(Vec<CommitVerdict>),
    /// The queues listed may know the older epochs, which are over once they are fenced there.
    Producer {
        id: i64,
        epoch: i16,
        /// Its id before its epochs ran out: all of that id's epochs are over.
        retired: Option<i64>,
        fence: Vec<u64>,
    },
    Attached,
    Fenced {
        current: i16,
    },
    UnknownProducer,
    /// The consumer group goes through its messages in the other way.
    OtherMode(GroupMode),
    Leases(LeaseReply),
    /// A member of this id; its epoch and queues are in the records.
    Joined(String),
    GroupFull,
    OtherDelivery(Delivery),
    /// Done, if there was anything to do.
    MembersChanged,
    NotAMember(NotAMember),
    GroupHasMembers(u64),
    GroupDeleted {
        more: bool,
    },
    UnknownGroup,
    /// What is committed now, in the order of the command's offsets.
    Begun(Vec<u64>),
    Invalid(String),
    Transaction(TransactionReply),
    TopicsForgotten,
}

/// The log entry of a command that its leader proposes at `now_ms`.
pub fn stamp(now_ms: u64, command: &[u8]) -> Bytes {
    let mut body = BytesMut::with_capacity(8 + command.len());
    body.put_u64(now_ms);
    body.put_slice(command);
    body.freeze()
}

/// The way back. None: no version of this program wrote it.
pub(super) fn unstamp(body: &[u8]) -> Option<(u64, CoordinatorCommand)> {
    let (stamp, command) = body.split_first_chunk::<8>()?;
    let command = postcard::from_bytes(command).ok()?;
    Some((u64::from_be_bytes(*stamp), command))
}
