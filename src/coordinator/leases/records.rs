//! A group's leases as records.
//!
//! | key | value |
//! |---|---|
//! | `r`, group | [`LeaseGroup`] |
//! | `l`, group, topic u64, queue u32 | [`QueueLeases`] |
//! | `d`, group, topic u64, queue u32, offset u64 | [`Delivery`] |
//! | `a`, group, topic u64, queue u32, `d`, due ms u64, offset u64 | nothing: what is due when |
//! | `a`, group, topic u64, queue u32, `k`, hash of a key u64, offset u64 | nothing: which messages of a key are in flight |
//! | `x`, group, sequence u64 | [`DeadLetter`] |

use quorate_storage::derived::{KeyBuilder, KeyReader};
use serde::{Deserialize, Serialize};

use super::command::{DeathReason, RetryPolicy};
use crate::catalog::TopicId;

/// What a group that leases has, beside its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGroup {
    /// Of one life of the group: one of the same name made later has another.
    pub life: u64,
    pub policy: RetryPolicy,
    /// The next dead letter's number.
    pub next_dead: u64,
    /// The dead letters' topic, and where in it the next redrive begins.
    pub redriven: Option<(TopicId, u64)>,
}

/// A group's place in one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLeases {
    /// The cursor: every offset below was looked at.
    pub next: u64,
    /// Deliveries there are.
    pub in_flight: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DeliveryState {
    Leased {
        until_ms: u64,
    },
    /// Its lease ended without a word, or it was never leased.
    Free,
    /// Nacked. Due 0: it was looked at since.
    Waiting {
        due_ms: u64,
    },
    /// Waits for an earlier message of its key.
    Parked,
    Dead {
        sequence: u64,
    },
}

/// A message that is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Delivery {
    pub state: DeliveryState,
    pub deliveries: u32,
    /// Hash of the message's key, if it was picked for an ordered consumer; else 0.
    pub key: u64,
    /// Of the last lease; 0 before the first.
    pub token: u64,
    pub consumer: u64,
}

impl Delivery {
    /// When it can be leased, or leased again. 0: at any time.
    pub(super) fn due_ms(&self) -> Option<u64> {
        match self.state {
            DeliveryState::Leased { until_ms } => Some(until_ms),
            DeliveryState::Free => Some(0),
            DeliveryState::Waiting { due_ms } => Some(due_ms),
            DeliveryState::Parked | DeliveryState::Dead { .. } => None,
        }
    }
}

/// A message that is delivered no more, and not yet in the topic of dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    pub topic: TopicId,
    pub queue: u32,
    pub offset: u64,
    pub deliveries: u32,
    pub reason: DeathReason,
    pub dead_at_ms: u64,
}

/// One queue, as a group's keys name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place<'a> {
    pub group: &'a str,
    pub topic: TopicId,
    pub queue: u32,
}

impl Place<'_> {
    fn key(&self, kind: u8) -> KeyBuilder {
        let of_group = KeyBuilder::new().u8(kind).text(self.group);
        of_group.u64(self.topic).u32(self.queue)
    }

    pub(super) fn leases(&self) -> Vec<u8> {
        self.key(b'l').build()
    }

    pub(super) fn deliveries(&self) -> Vec<u8> {
        self.key(b'd').build()
    }

    pub(super) fn delivery(&self, offset: u64) -> Vec<u8> {
        self.key(b'd').u64(offset).build()
    }

    /// Everything in order of time and key.
    pub(super) fn order(&self) -> Vec<u8> {
        self.key(b'a').build()
    }

    pub(super) fn alarms(&self) -> Vec<u8> {
        self.key(b'a').u8(b'd').build()
    }

    pub(super) fn alarm(&self, due_ms: u64, offset: u64) -> Vec<u8> {
        self.key(b'a').u8(b'd').u64(due_ms).u64(offset).build()
    }

    pub(super) fn of_message_key(&self, key: u64) -> Vec<u8> {
        self.key(b'a').u8(b'k').u64(key).build()
    }

    pub(super) fn message_key(&self, key: u64, offset: u64) -> Vec<u8> {
        self.key(b'a').u8(b'k').u64(key).u64(offset).build()
    }
}

pub(super) fn lease_group_key(group: &str) -> Vec<u8> {
    KeyBuilder::new().u8(b'r').text(group).build()
}

/// Everything of one kind that a group has.
pub(super) fn of_group(kind: u8, group: &str) -> Vec<u8> {
    KeyBuilder::new().u8(kind).text(group).build()
}

pub(super) fn of_topic(kind: u8, group: &str, topic: TopicId) -> Vec<u8> {
    KeyBuilder::new().u8(kind).text(group).u64(topic).build()
}

pub(super) fn dead_letter_key(group: &str, sequence: u64) -> Vec<u8> {
    KeyBuilder::new().u8(b'x').text(group).u64(sequence).build()
}

/// The number at the end of a key, and the one before it.
pub(super) fn last_two(key: &[u8]) -> Option<(u64, u64)> {
    let (rest, last) = key.split_last_chunk::<8>()?;
    let (_, before) = rest.split_last_chunk::<8>()?;
    Some((u64::from_be_bytes(*before), u64::from_be_bytes(*last)))
}

pub(super) fn last(key: &[u8]) -> Option<u64> {
    let (_, last) = key.split_last_chunk::<8>()?;
    Some(u64::from_be_bytes(*last))
}

/// Topic and queue of a key of kind `l`, and its group.
pub(super) fn leases_of_key(key: &[u8]) -> Option<(String, TopicId, u32)> {
    let mut fields = KeyReader::new(key);
    fields.u8()?;
    Some((fields.text()?, fields.u64()?, fields.u32()?))
}
