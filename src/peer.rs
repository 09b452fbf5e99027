//! What brokers ask each other over the link between nodes.
//!
//! The first byte is the version of these messages. Asking is safe to repeat where nothing is
//! written; a write's answer says whether anybody took it.

use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quorate_raft::{NodeId, PeerService};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::broker::groups::GroupQuestion;
use crate::broker::leases::ReceiveRequest;
use crate::broker::queue::BatchOutcome;
use crate::broker::queue::entry::{Hold, Mark, TransactionId};
use crate::broker::{
    Broker, BrokerError, Delay, MessagePlace, SearchRequest, StartAt, TransactionQuery,
};
use crate::coordinator::QueueOffset;

const VERSION: u8 = 3;

/// One batch on its way to the leader of its queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewBatch {
    pub mark: Mark,
    /// None: visible at once.
    pub hold: Option<NewHold>,
    pub batch: Bytes,
}

/// Why a batch is not to be visible at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewHold {
    /// Counted from when the queue's leader takes it, by its clock: that one delivers it too.
    Delay(Delay),
    Transaction {
        id: TransactionId,
        part: u32,
    },
}

impl NewHold {
    /// The same for whoever takes it at `now_ms`. None: visible at once.
    pub fn taken(self, now_ms: u64) -> Option<Hold> {
        match self {
            Self::Delay(delay) => {
                let deliver_at_ms = delay.due_ms(now_ms)?;
                Some(Hold::Until { deliver_at_ms })
            }
            Self::Transaction { id, part } => Some(Hold::Transaction { id, part }),
        }
    }
}

/// What a replica has to prove before it answers a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proof {
    /// Nothing: it answers with what it has applied.
    None,
    /// That there is nothing more, before it says so. What is committed never changes, so what is
    /// found is answered at once.
    End,
    /// That it has all that was committed when it was asked.
    All,
}

/// A read of one queue's stored batches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadRequest {
    pub group: u64,
    pub start: StartAt,
    pub max_messages: u64,
    pub max_bytes: u64,
    pub wait_ms: u64,
    pub proof: Proof,
}

/// A stored batch as it lies in the commit log, with what apply gave it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBatch {
    pub place: crate::broker::queue::Place,
    pub timestamp_ms: u64,
    /// Base offset 0.
    pub batch: Bytes,
}

/// Consecutive batches of one queue. The first may begin before `start`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// The offset asked for, once "latest" and the like are resolved.
    pub start: u64,
    pub batches: Vec<StoredBatch>,
    pub earliest: u64,
    pub end: u64,
}

/// What a node with a replica knows of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    pub leader: Option<NodeId>,
    pub term: u64,
    /// Of the leader: the nodes whose replica is close behind. Empty elsewhere.
    pub in_sync: Vec<NodeId>,
    pub earliest: u64,
    pub end: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum PeerRequest {
    Produce {
        group: u64,
        batches: Vec<NewBatch>,
        timeout_ms: u64,
    },
    /// A command for the state machine of a group that the other node leads.
    Propose {
        group: u64,
        body: Bytes,
        timeout_ms: u64,
    },
    Read(ReadRequest),
    Search(SearchRequest),
    FindMessage {
        queue: u32,
        place: MessagePlace,
        ttl_ms: Option<u64>,
    },
    /// The first offset at or after a time, proved; the end if there is none.
    OffsetAt {
        group: u64,
        timestamp_ms: u64,
    },
    Describe {
        groups: Vec<u64>,
    },
    GroupOffsets {
        coordinator: u32,
        consumer_group: String,
    },
    TransferLeader {
        group: u64,
        to: NodeId,
    },
    /// How far the slowest of a coordinator's consumer groups is in each queue of these topics;
    /// with proof that no commit is missing, if asked for.
    LowestOffsets {
        coordinator: u32,
        topics: Vec<u64>,
        prove: bool,
    },
    /// Take a delayed message back, in a queue that the other node leads.
    Cancel {
        place: MessagePlace,
        timeout_ms: u64,
    },
    /// For the leader of a coordinator: messages for a consumer.
    Receive {
        coordinator: u32,
        request: ReceiveRequest,
        /// How long whoever asks waits for the answer.
        timeout_ms: u64,
    },
    /// For the same: dead letters back to where they came from.
    Redrive {
        coordinator: u32,
        consumer_group: String,
        max_messages: u64,
    },
    /// How a consumer group leases, and what it has in flight.
    LeaseView {
        coordinator: u32,
        consumer_group: String,
    },
    /// Answered when that node knows this version of the catalog, or the time is over.
    AwaitCatalog {
        version: u64,
        timeout_ms: u64,
    },
    /// Something about a consumer group that only the leader of its coordinator knows.
    Group {
        coordinator: u32,
        question: GroupQuestion,
        timeout_ms: u64,
    },
    Transactions {
        coordinator: u32,
        query: TransactionQuery,
    },
}

/// Why the other node did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum PeerError {
    /// Nobody took it: ask the leader.
    #[error("that node does not lead the group")]
    NotLeader { leader: Option<NodeId> },
    /// That node has no open replica of the group.
    #[error("that node has no open replica of the group")]
    NotHere,
    #[error(transparent)]
    Broker(BrokerError),
}

pub type PeerResult<T> = Result<T, PeerError>;

/// Writes a request or an answer.
pub fn encode<T: Serialize>(message: &T) -> Bytes {
    // Plain data into memory: there is no way to fail.
    let bytes = postcard::to_extend(message, vec![VERSION]).unwrap_or_default();
    Bytes::from(bytes)
}

/// Reads a request or an answer. The text says what is wrong with it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => postcard::from_bytes(rest).map_err(|e| e.to_string()),
        Some((version, _)) => Err(format!("peer message version {version} is not known")),
        None => Err("the peer message is empty".to_owned()),
    }
}

/// The broker's side of the link. Requests that come before the broker is there are refused.
#[derive(Debug, Default)]
pub struct BrokerService {
    broker: OnceLock<Weak<Broker>>,
}

impl BrokerService {
    /// From now on requests go to `broker`. Only the first call counts.
    pub fn connect(&self, broker: &Arc<Broker>) {
        self.broker.set(Arc::downgrade(broker)).ok();
    }
}

impl PeerService for BrokerService {
    fn call(&self, _from: NodeId, body: Bytes) -> BoxFuture<'static, Bytes> {
        let broker = self.broker.get().and_then(Weak::upgrade);
        Box::pin(async move {
            let Some(broker) = broker else {
                return encode(&PeerResult::<()>::Err(PeerError::NotHere));
            };
            match decode::<PeerRequest>(&body) {
                Ok(request) => serve(&broker, request).await,
                Err(reason) => {
                    let error = BrokerError::Internal(reason);
                    encode(&PeerResult::<()>::Err(PeerError::Broker(error)))
                }
            }
        })
    }
}

async fn serve(broker: &Broker, request: PeerRequest) -> Bytes {
    use std::time::Duration;
    match request {
        PeerRequest::Produce {
            group,
            batches,
            timeout_ms,
        } => {
            let timeout = Duration::from_millis(timeout_ms);
            let answer: PeerResult<Vec<BatchOutcome>> =
                broker.produce_here(group, batches, timeout).await;
            encode(&answer)
        }
        PeerRequest::Propose {
            group,
            body,
            timeout_ms,
        } => {
            let timeout = Duration::from_millis(timeout_ms);
            encode(&broker.propose_here(group, body, timeout).await)
        }
        PeerRequest::Read(request) => encode(&broker.read_here(&request).await),
        PeerRequest::Search(request) => encode(&broker.search_here(&request).await),
        PeerRequest::FindMessage {
            queue,
            place,
            ttl_ms,
        } => encode(&broker.message_here(queue, place, ttl_ms).await),
        PeerRequest::OffsetAt {
            group,
            timestamp_ms,
        } => encode(&broker.offset_at_here(group, timestamp_ms).await),
        PeerRequest::Describe { groups } => encode(&PeerResult::Ok(broker.describe_here(&groups))),
        PeerRequest::GroupOffsets {
            coordinator,
            consumer_group,
        } => {
            let answer: PeerResult<Vec<QueueOffset>> = broker
                .group_offsets_here(coordinator, &consumer_group)
                .await;
            encode(&answer)
        }
        PeerRequest::LowestOffsets {
            coordinator,
            topics,
            prove,
        } => encode(&broker.positions_here(coordinator, &topics, prove).await),
        PeerRequest::TransferLeader { group, to } => {
            encode(&broker.transfer_leader_here(group, to).await)
        }
        PeerRequest::Cancel { place, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms);
            encode(&broker.cancel_here(place, timeout).await)
        }
        PeerRequest::Receive {
            coordinator,
            request,
            timeout_ms,
        } => {
            let patience = Duration::from_millis(timeout_ms);
            encode(&broker.receive_here(coordinator, &request, patience).await)
        }
        PeerRequest::Redrive {
            coordinator,
            consumer_group,
            max_messages,
        } => {
            let max_messages = max_messages as usize;
            let done = broker.redrive_here(coordinator, &consumer_group, max_messages);
            encode(&done.await)
        }
        PeerRequest::LeaseView {
            coordinator,
            consumer_group,
        } => encode(&broker.lease_view_here(coordinator, &consumer_group).await),
        PeerRequest::AwaitCatalog {
            version,
            timeout_ms,
        } => {
            let patience = Duration::from_millis(timeout_ms);
            broker.await_catalog_here(version, patience).await;
            encode(&PeerResult::Ok(()))
        }
        PeerRequest::Transactions { coordinator, query } => {
            encode(&broker.transactions_here(coordinator, &query).await)
        }
        PeerRequest::Group {
            coordinator,
            question,
            timeout_ms,
        } => {
            let timeout = Duration::from_millis(timeout_ms);
            let answer = broker.group_here(coordinator, question, timeout).await;
            encode(&answer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_counts_by_the_clock_of_whoever_takes_it() {
        let until = |deliver_at_ms| Some(Hold::Until { deliver_at_ms });
        let hold = |delay| NewHold::Delay(delay);
        for now_ms in [1_000, 2_000] {
            assert_eq!(hold(Delay::For(500)).taken(now_ms), until(now_ms + 500));
        }
        let at = hold(Delay::Until(1_500));
        assert_eq!((at.taken(1_000), at.taken(2_000)), (until(1_500), None));
        let (id, part) = ([7; 16], 3);
        let half = NewHold::Transaction { id, part };
        assert_eq!(half.taken(5), Some(Hold::Transaction { id, part }));
    }
}
