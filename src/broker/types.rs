//! What the broker takes and gives: the message model in Rust, without HTTP and without Raft.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use quorate_raft::NodeId;

use super::Delay;
use super::selection::Selection;

/// A topic's configuration. Sizes in bytes, times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicConfig {
    pub queues: u32,
    /// 0 when creating a topic: three, or as many as the cluster has nodes.
    pub replicas: u32,
    pub flush: FlushMode,
    pub retention: Retention,
    pub max_message_bytes: u64,
    pub backlog: Backlog,
    pub quota: Quota,
    pub ttl_ms: Option<u64>,
    /// Whether it is written down what becomes of each message.
    pub trace: bool,
    /// Keys hash over this many queues; growing `queues` leaves it alone. 0 when creating: all.
    pub hash_queues: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlushMode {
    Sync,
    Async,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    pub max_age_ms: Option<u64>,
    pub max_bytes: Option<u64>,
}

/// What a queue takes that its slowest consumer group has not consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backlog {
    pub max_messages: Option<u64>,
    /// Of stored batches.
    pub max_bytes: Option<u64>,
    /// Of the oldest message that was not consumed.
    pub max_age_ms: Option<u64>,
    pub on_full: OnFull,
}

/// Messages that a topic makes of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generator {
    /// Thousandths of a message a second: without fractions, equal on every replica.
    pub per_1000_s: u64,
    pub value: Bytes,
}

/// How fast a topic takes messages, over all its queues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    pub messages_per_s: Option<u64>,
    pub bytes_per_s: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFull {
    Reject,
    DropNewest,
}

impl Default for TopicConfig {
    fn default() -> Self {
        Self {
            queues: 4,
            replicas: 0,
            flush: FlushMode::Sync,
            retention: Retention {
                max_age_ms: Some(259_200_000),
                max_bytes: None,
            },
            max_message_bytes: 4 << 20,
            backlog: Backlog {
                max_messages: None,
                max_bytes: None,
                max_age_ms: None,
                on_full: OnFull::Reject,
            },
            quota: Quota::default(),
            ttl_ms: None,
            trace: false,
            hash_queues: 4,
        }
    }
}

/// A topic as the cluster knows it now.
#[derive(Debug, Clone)]
pub struct TopicDescription {
    pub name: String,
    pub config: TopicConfig,
    pub queues: Vec<QueueDescription>,
}

#[derive(Debug, Clone)]
pub struct QueueDescription {
    pub queue: u32,
    pub leader: Option<NodeId>,
    pub term: u64,
    pub replicas: Vec<NodeId>,
    pub in_sync: Vec<NodeId>,
    pub earliest_offset: u64,
    pub end_offset: u64,
    /// Goes up when an async-flush queue lost a tail that had been acknowledged.
    pub epoch: u64,
}

/// A change of a topic: absent fields stay as they are.
#[derive(Debug, Clone, Default)]
pub struct TopicPatch {
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

/// One message to store.
#[derive(Debug, Clone, Default)]
pub struct NewMessage {
    pub value: Option<Bytes>,
    pub key: Option<String>,
    pub tag: Option<String>,
    pub headers: BTreeMap<String, String>,
    /// How long it is delivered once it is visible; the topic's counts too if it is shorter.
    pub ttl_ms: Option<u64>,
    /// None: visible at once.
    pub delay: Option<Delay>,
    /// Beats the key's hash, which beats round robin.
    pub queue: Option<u32>,
}

impl NewMessage {
    /// What a topic's limit counts: key, value, tag and headers.
    pub fn size_bytes(&self) -> u64 {
        let text = |t: &Option<String>| t.as_ref().map_or(0, String::len);
        let headers = self.headers.iter().map(|(n, v)| n.len() + v.len());
        let value = self.value.as_ref().map_or(0, Bytes::len);
        (value + text(&self.key) + text(&self.tag) + headers.sum::<usize>()) as u64
    }
}

/// The idempotent producer's mark on a request; `sequence` is that of its first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerMark {
    pub id: String,
    pub epoch: u32,
    pub sequence: u64,
}

/// A produce request: one topic, any number of messages.
#[derive(Debug, Clone)]
pub struct ProduceRequest {
    pub topic: String,
    pub messages: Vec<NewMessage>,
    pub producer: Option<ProducerMark>,
    pub idempotency_key: Option<String>,
}

/// Where one message was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub queue: u32,
    /// None while the message is not visible yet.
    pub offset: Option<u64>,
    /// Of a delayed message that was stored just now: when it is due.
    pub deliver_at_ms: Option<u64>,
    pub message_id: String,
}

/// How safe an acknowledged message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A majority has it on disk.
    MajorityFsync,
    /// A majority has written it; the fsync follows.
    MajorityWritten,
}

impl Durability {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MajorityFsync => "majority_fsync",
            Self::MajorityWritten => "majority_written",
        }
    }
}

/// A produce answer: one result per message, in request order.
#[derive(Debug)]
pub struct ProduceAnswer {
    pub results: Vec<Result<Stored, super::BrokerError>>,
    pub durability: Durability,
}

/// A stored message as a reader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub queue: u32,
    pub offset: u64,
    pub message_id: String,
    pub timestamp_ms: u64,
    pub key: Option<String>,
    pub tag: Option<String>,
    pub headers: BTreeMap<String, String>,
    pub value: Option<Bytes>,
    pub producer: Option<ProducerMark>,
}

/// Where a fetch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartAt {
    Offset(u64),
    Earliest,
    Latest,
    Timestamp(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    Linearizable,
    /// The local replica's committed prefix, without asking anyone.
    Stale,
}

/// A fetch from one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchRequest {
    pub topic: String,
    pub queue: u32,
    pub start: StartAt,
    pub max_messages: usize,
    pub max_bytes: usize,
    pub wait_ms: u64,
    pub selection: Selection,
    pub consistency: Consistency,
}

/// What a fetch found. `next_offset` has moved past what the filter left out.
#[derive(Debug, Clone)]
pub struct FetchAnswer {
    /// The queue's Raft group: another one for a topic that was made again under the same name.
    pub group: u64,
    pub topic: String,
    pub queue: u32,
    pub messages: Vec<Message>,
    pub next_offset: u64,
    pub earliest_offset: u64,
    pub end_offset: u64,
}

/// The stored batches themselves: RecordBatch v2, base offsets patched, one after the other.
#[derive(Debug, Clone)]
pub struct RawFetchAnswer {
    pub batches: Vec<Bytes>,
    pub next_offset: u64,
    pub earliest_offset: u64,
    pub end_offset: u64,
}

/// One queue's part of a fetch over many.
#[derive(Debug, Clone)]
pub struct QueueFetch {
    pub topic: String,
    pub queue: u32,
    pub start: StartAt,
    pub selection: Selection,
}

/// A fetch over many queues with common bounds.
#[derive(Debug, Clone)]
pub struct MultiFetchRequest {
    pub queues: Vec<QueueFetch>,
    pub max_messages: usize,
    pub max_bytes: usize,
    pub wait_ms: u64,
    pub consistency: Consistency,
}

/// A member's claim to commit offsets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberMark {
    pub id: String,
    pub epoch: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetCommit {
    pub topic: String,
    pub queue: u32,
    pub offset: u64,
}

#[derive(Debug, Clone)]
pub struct CommitRequest {
    pub group: String,
    pub offsets: Vec<OffsetCommit>,
    pub member: Option<MemberMark>,
    pub allow_rewind: bool,
}

/// A consumer group's place in one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOffset {
    pub topic: String,
    pub queue: u32,
    /// None when the group never committed here.
    pub offset: Option<u64>,
    /// None while the queue can't tell where it ends.
    pub behind: Option<Behind>,
}

/// How far a consumer group is behind a queue's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind {
    pub end_offset: u64,
    pub lag: u64,
    /// Age of the oldest message not yet consumed, 0 when there is none.
    pub lag_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetTo {
    Earliest,
    Latest,
    Offset(u64),
    Timestamp(u64),
    ShiftBy(i64),
}

#[derive(Debug, Clone)]
pub struct ResetRequest {
    pub group: String,
    pub topic: String,
    /// All queues of the topic when absent.
    pub queue: Option<u32>,
    pub to: ResetTo,
    pub dry_run: bool,
    /// Also while the group has members.
    pub force: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResetResult {
    pub topic: String,
    pub queue: u32,
    pub previous: Option<u64>,
    pub offset: u64,
}

/// A registered idempotent producer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProducerIdentity {
    pub id: String,
    pub epoch: u32,
}

#[derive(Debug, Clone)]
pub struct ClusterDescription {
    pub cluster_id: String,
    pub nodes: Vec<NodeDescription>,
    pub catalog_leader: Option<NodeId>,
    pub catalog_term: u64,
    pub queues_total: usize,
    pub queues_leaderless: usize,
    pub queues_under_replicated: usize,
}

#[derive(Debug, Clone)]
pub struct NodeDescription {
    pub id: NodeId,
    pub url: String,
    pub state: NodeState,
    pub leaders: usize,
    pub replicas: usize,
    /// Replicas that this node gave up after damage and that are not filled again yet, those of
    /// coordinators and of the catalog included.
    pub quarantined: usize,
    pub version: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    Up,
    Suspect,
    Down,
    Draining,
}

/// Something worth telling an operator, as it happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterEvent {
    pub event: ClusterEventKind,
    pub time_ms: u64,
    pub topic: Option<String>,
    pub queue: Option<u32>,
    pub term: Option<u64>,
    pub node: Option<NodeId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterEventKind {
    LeaderElected,
    LeaderLost,
    NodeUp,
    NodeDown,
    MembershipChanged,
    Quarantined,
}

/// One node's own replica of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaDescription {
    pub node: NodeId,
    pub replica: u64,
    /// Raft index of the last entry applied; 0 before the first.
    pub applied_index: u64,
    /// Raft index up to which the log was purged; 0 while it has everything.
    pub purged_index: u64,
    /// Of the state after that entry: equal on replicas at the same index.
    pub state_hash: u64,
    pub leads: bool,
    /// How many replicas its group should have.
    pub wanted: usize,
}
