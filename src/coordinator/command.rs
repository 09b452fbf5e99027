//! What can be asked of a coordinator, and what it answers.

use serde::{Deserialize, Serialize};

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
    Invalid(String),
}
