//! What can be asked of a coordinator, and what it answers.
//!
//! In the log each command follows its stamp, eight bytes, big-endian: the leader's clock in ms.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::leases::{LeaseCommand, LeaseReply};
use crate::broker::MemberMark;
use crate::catalog::TopicId;

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
    RegisterProducer { name: Option<String> },
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
    Conflict { committed: u64 },
    Fenced,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorReply {
    /// In the order of the command's offsets.
    Committed(Vec<CommitVerdict>),
    /// The queues listed may know the older epochs, which are over once they are fenced there.
    Producer {
        id: i64,
        epoch: i16,
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
    Invalid(String),
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
