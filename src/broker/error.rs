//! Every way the broker says no, and for writes whether the write may have happened all the same.
//!
//! HTTP statuses are none of this module's business: `http::error` maps them, in one place.

use serde::{Deserialize, Serialize};

/// What is known of a write that was not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nobody has taken it and nobody will.
    NotCommitted,
    /// It may or may not be stored; only a retry with a producer sequence or an idempotency key is safe.
    Unknown,
}

/// Crosses the link between nodes as it is, so the client sees the leader's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum BrokerError {
    #[error("{0}")]
    InvalidRequest(String),
    #[error("{0}")]
    InvalidName(String),
    #[error("topic {topic:?} does not exist; create it with POST /v1/topics")]
    TopicNotFound { topic: String },
    #[error("topic {topic:?} has no queue {queue}; its queues are 0 to {}", queues.saturating_sub(1))]
    QueueNotFound {
        topic: String,
        queue: u32,
        queues: u32,
    },
    #[error(
        "topic {topic:?} exists with another configuration; change it with PATCH or choose another name"
    )]
    TopicExists { topic: String },
    #[error("exchange {exchange:?} does not exist; create it with PUT /v1/exchanges/{exchange}")]
    ExchangeNotFound { exchange: String },
    #[error("exchange {exchange:?} exists with another kind; delete it or choose another name")]
    ExchangeExists { exchange: String },
    #[error("topic {topic:?} is not bound to exchange {exchange:?}")]
    BindingNotFound { exchange: String, topic: String },
    #[error(
        "no topic bound to exchange {exchange:?} takes a message with routing key {routing_key:?} and these headers; bind one with PUT /v1/exchanges/{exchange}/bindings/TOPIC"
    )]
    Unroutable {
        exchange: String,
        routing_key: String,
        outcome: Outcome,
    },
    #[error("consumer group {group:?} is not known")]
    ConsumerGroupNotFound { group: String },
    #[error(
        "member {member:?} of consumer group {group:?} is not one, its epoch is over, or the queue is another member's; send a heartbeat, and join again if that is refused"
    )]
    FencedMember { group: String, member: String },
    #[error(
        "consumer group {group:?} has live members, so offsets are committed by the member that has the queue; pass \"member\", or use offsets/reset with \"force\": true"
    )]
    NotAMember { group: String },
    #[error(
        "consumer group {group:?} has no member {member:?}: it never joined, has left, or was not heard of within its session timeout; join again"
    )]
    MemberNotFound { group: String, member: String },
    #[error(
        "consumer group {group:?} has {members} live members; stop them first, or pass \"force\": true where that is possible"
    )]
    GroupHasMembers { group: String, members: u64 },
    #[error(
        "the members of consumer group {group:?} use mode {:?}, and all must use the same; stop them first or use another group",
        if *broadcast { "broadcast" } else { "cluster" }
    )]
    GroupDeliveryConflict {
        group: String,
        /// How its members go through their messages.
        broadcast: bool,
    },
    #[error(
        "consumer group {group:?} {}; use another group for the other way",
        if *leased { "leases its messages (receive, ack), it commits no offsets" } else { "commits offsets, it leases no messages" }
    )]
    GroupModeConflict {
        group: String,
        /// How the group works.
        leased: bool,
    },
    #[error(
        "producer {id:?} was registered again: epoch {epoch} is over, the current one is {current}; register to get a new epoch"
    )]
    FencedProducer {
        id: String,
        epoch: u32,
        current: u32,
    },
    #[error(
        "producer {id:?} sent sequence {sequence}, expected {expected}; {}",
        wrong_sequence(*sequence, *expected)
    )]
    OutOfOrderSequence {
        id: String,
        sequence: u64,
        expected: u64,
    },
    #[error(
        "offset {offset} is behind the committed offset {committed}; pass \"allow_rewind\": true or use offsets/reset to go back"
    )]
    OffsetConflict { offset: u64, committed: u64 },
    #[error(
        "the committed offset is {committed}, not {from}: what begins there was processed meanwhile; begin anew from what is committed"
    )]
    OffsetMoved { from: u64, committed: u64 },
    #[error(
        "the lease of offset {offset} of queue {queue} is over and the message was delivered again, is dead, or is done; its latest receipt counts"
    )]
    LeaseExpired { queue: u32, offset: u64 },
    #[error(
        "a transaction holds the offset of consumer group {group:?} in queue {queue} of topic {topic:?}; commit or roll the transaction back first"
    )]
    OffsetHeld {
        group: String,
        topic: String,
        queue: u32,
    },
    #[error("transaction {id} is not known: it never was, or it ended too long ago")]
    TransactionNotFound { id: String },
    #[error("transaction {id} has ended: it is {state}")]
    TransactionEnded { id: String, state: String },
    #[error("messages of transaction {id} are still being stored; try again when that is answered")]
    TransactionBusy { id: String },
    #[error("offset {offset} is outside {earliest_offset} to {end_offset}")]
    OffsetOutOfRange {
        offset: u64,
        earliest_offset: u64,
        end_offset: u64,
    },
    #[error("the message has {bytes} bytes, the topic takes at most {max_bytes}")]
    MessageTooLarge { bytes: u64, max_bytes: u64 },
    #[error("the request has more than {max_bytes} bytes; send fewer messages at a time")]
    RequestTooLarge { max_bytes: u64 },
    #[error("{0}")]
    QuotaExceeded(String),
    #[error("{whose} is at its quota; try again in {retry_after_ms} ms")]
    RateExceeded { whose: String, retry_after_ms: u64 },
    #[error("{0}")]
    BacklogFull(String),
    #[error("topic {topic:?} generates nothing; set a generator with PUT")]
    GeneratorNotFound { topic: String },
    /// Not an error to the producer, but nothing was stored.
    #[error("queue {queue} of topic {topic:?} is full, and the topic drops what comes then")]
    Dropped { topic: String, queue: u32 },
    #[error("topic {topic:?} has no message {message_id:?}")]
    MessageNotFound { topic: String, message_id: String },
    #[error("message {message_id:?} was delivered before; what is visible stays so")]
    AlreadyDelivered { message_id: String },
    #[error(
        "the queue has no leader at the moment; an election is under way or a majority of its replicas is down"
    )]
    NoLeader { outcome: Outcome },
    #[error("{available} of {required} nodes needed are available")]
    NotEnoughReplicas { available: usize, required: usize },
    #[error("the node is overloaded: {0}")]
    Overloaded(String),
    #[error(
        "the disk of node {node} is full; delete data or add space, then writes go on without a restart"
    )]
    DiskFull { node: u64 },
    #[error(
        "the replica here was damaged and is being filled again by the others; where a majority is damaged, restore their files as their logs say, or delete the topic"
    )]
    Quarantined,
    #[error("no answer in time; the write may or may not have been stored")]
    Timeout { outcome: Outcome },
    #[error("the node is shutting down")]
    ShuttingDown,
    #[error("internal error: {0}")]
    Internal(String),
    #[error("node {node} has no replica of queue {queue} of topic {topic:?} open")]
    ReplicaNotFound {
        topic: String,
        queue: u32,
        node: u64,
    },
    #[error(
        "the answer was lost with the connection to the leader, or with its leadership; the write may or may not have been stored"
    )]
    AnswerLost,
    #[error("node {node} cannot take over: {reason}; the leader stays")]
    CannotLead { node: u64, reason: String },
}

/// What to do about a sequence that is not the expected one. They go from 0 to 2^31 - 1, and begin
/// again.
fn wrong_sequence(sequence: u64, expected: u64) -> &'static str {
    let behind = expected.wrapping_sub(sequence) & 0x7fff_ffff;
    if expected > 0 && behind < 1 << 30 {
        "messages with these numbers are stored, but too long ago for the first answer, or in other requests than this one; go on with the expected one, or register again"
    } else {
        "send the missing messages first, or register again"
    }
}

impl BrokerError {
    /// What is known of the write this error answers.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::NoLeader { outcome }
            | Self::Timeout { outcome }
            | Self::Unroutable { outcome, .. } => *outcome,
            // One that ended too long ago may have been committed.
            Self::Internal(_) | Self::AnswerLost | Self::TransactionNotFound { .. } => {
                Outcome::Unknown
            }
            _ => Outcome::NotCommitted,
        }
    }

    /// Whether the same request may succeed later without a change to it.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::NoLeader { .. }
                | Self::NotEnoughReplicas { .. }
                | Self::Overloaded(_)
                | Self::DiskFull { .. }
                | Self::Quarantined
                | Self::Timeout { .. }
                | Self::AnswerLost
                | Self::CannotLead { .. }
                | Self::QuotaExceeded(_)
                | Self::RateExceeded { .. }
                | Self::BacklogFull(_)
                | Self::ShuttingDown
                | Self::OffsetHeld { .. }
                | Self::TransactionBusy { .. }
        )
    }
}
