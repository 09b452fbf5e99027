//! What can be asked of a group's leases, and what is answered.

use serde::{Deserialize, Serialize};

use crate::catalog::TopicId;
use crate::coordinator::QueueOffset;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseCommand {
    Lease(Lease),
    /// `through`: everything its consumer holds of that queue, up to it.
    Ack {
        receipts: Vec<Receipt>,
        through: Option<Receipt>,
    },
    /// Without a delay the retry policy says when.
    Nack {
        receipts: Vec<Receipt>,
        delay_ms: Option<u64>,
    },
    Extend {
        receipts: Vec<Receipt>,
        lease_ms: u64,
    },
    /// Looks at what is overdue: ended leases are free or dead, waiting messages are due.
    Expire,
    /// Dead letters up to this sequence are in their topic. For this life of the group only.
    DeadLettered {
        life: u64,
        through: u64,
    },
    SetPolicy(RetryPolicy),
    /// Dead letters below this offset of their topic are back where they came from.
    Redriven {
        life: u64,
        topic: TopicId,
        next: u64,
    },
    /// Goes on at these offsets; what was in flight in those queues is forgotten.
    Seek {
        offsets: Vec<QueueOffset>,
    },
    /// The topic was deleted.
    ForgetTopic {
        topic: TopicId,
    },
}

/// Leases to one consumer, all under one token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Chosen by chance: no other lease of the group has it.
    pub token: u64,
    /// Hash of the consumer's name, or the token.
    pub consumer: u64,
    pub lease_ms: u64,
    /// A message waits while an earlier one of its key is in flight.
    pub ordered: bool,
    pub max: u32,
    pub picks: Vec<Pick>,
}

/// What the coordinator's leader has read of one queue. Its messages are known to it alone, so it
/// says what is there, and apply decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pick {
    pub topic: TopicId,
    pub queue: u32,
    /// Where the cursor is, or where it begins.
    pub from: u64,
    /// Where it goes. What is below and not in `fresh` is of no interest to the group.
    pub through: u64,
    /// Offsets from `from` on with the hash of their key, 0 without one.
    pub fresh: Vec<(u64, u64)>,
    /// Offsets that are due again.
    pub again: Vec<u64>,
    /// Due, but their messages are gone.
    pub gone: Vec<u64>,
}

/// One delivery of one message, as its consumer names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    pub topic: TopicId,
    pub queue: u32,
    pub offset: u64,
    pub token: u64,
    pub consumer: u64,
}

/// How often a message is delivered, and how long it waits after a nack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    pub max_deliveries: u32,
    /// After the first delivery, the second…; the last value repeats.
    pub backoff_ms: Vec<u64>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_deliveries: 16,
            backoff_ms: vec![10_000, 30_000, 60_000],
        }
    }
}

impl RetryPolicy {
    /// The wait after so many deliveries.
    pub(super) fn backoff_ms(&self, deliveries: u32) -> u64 {
        let place = (deliveries as usize).saturating_sub(1);
        let of_place = self.backoff_ms.get(place).or(self.backoff_ms.last());
        of_place.copied().unwrap_or(0)
    }
}

/// Why a message is delivered no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeathReason {
    Nacked,
    LeaseExpired,
}

impl DeathReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nacked => "nacked",
            Self::LeaseExpired => "lease_expired",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseReply {
    Granted(Granted),
    /// In the order of the receipts, `through` last.
    Receipts(Vec<ReceiptVerdict>),
    Done,
    /// Done as far as one command goes: ask again.
    More,
    /// So many queues of a seek, the first ones, are where they should be: ask for the others again.
    Sought {
        queues: u32,
    },
    /// Nothing was ever leased to this group.
    NoGroup,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    pub leases: Vec<Grant>,
    /// Some queue's cursor was elsewhere, and nothing new was taken there.
    pub moved: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub topic: TopicId,
    pub queue: u32,
    pub offset: u64,
    /// This one counted.
    pub deliveries: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReceiptVerdict {
    Done,
    /// Its lease ended, and the message was leased again, is dead, or is done.
    Ended,
    /// Of `through`: so many messages are done.
    Acked(u32),
}
