//! Keys of the records of transactions.
//!
//! | key | value |
//! |---|---|
//! | `T`, id | the transaction |
//! | `U` 0, due ms u64, id | nothing: when one that is not decided has to be looked at |
//! | `U` 1, done ms u64, id | nothing: ended ones in the order of their end |
//! | `U` 2 | counts |
//! | `U` 3, producer group | u64: how many of it are not over |
//! | `U` 4, forget at ms u64, consumer group, id | nothing: when a mark may go |
//! | `U` 5, due ms u64, id | nothing: when the participants of one that is decided are told |
//! | `w`, state u8, producer group, created ms u64, id | nothing: by what transactions are listed |
//! | `h`, consumer group, 0, topic u64, queue u32 | the offset a transaction holds there |
//! | `h`, consumer group, 1, id | nothing: a mark that the transaction is over here |

use quorate_storage::derived::{KeyBuilder, KeyReader};
use serde::{Deserialize, Serialize};

use super::{Transaction, TransactionState};
use crate::broker::queue::entry::TransactionId;

pub(super) const COUNTS_KEY: &[u8] = &[b'U', 2];
const LOOK_PREFIX: &[u8] = &[b'U', 0];
const TELL_PREFIX: &[u8] = &[b'U', 5];
pub(super) const ENDED_PREFIX: &[u8] = &[b'U', 1];
pub(super) const MARK_TIME_PREFIX: &[u8] = &[b'U', 4];

/// An offset that a transaction will commit or let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::coordinator) struct HeldOffset {
    pub transaction: TransactionId,
    pub offset: u64,
}

pub(super) fn transaction_key(id: &TransactionId) -> Vec<u8> {
    [b"T", &id[..]].concat()
}

/// What is to be done about transactions whose time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// Check it, expire it, give up on what was not prepared: a command of the coordinator's own.
    Look,
    /// Tell the participants what was decided, which takes as long as they do.
    Tell,
}

impl Duty {
    pub(super) fn prefix(self) -> &'static [u8] {
        match self {
            Self::Look => LOOK_PREFIX,
            Self::Tell => TELL_PREFIX,
        }
    }

    pub(super) fn key(self, due_ms: u64, id: &TransactionId) -> Vec<u8> {
        timed(self.prefix(), due_ms, id)
    }
}

/// Where a transaction stands in the order of its duty.
pub(super) fn due_key(transaction: &Transaction) -> Option<Vec<u8>> {
    let duty = match transaction.decision {
        None => Duty::Look,
        Some(_) => Duty::Tell,
    };
    Some(duty.key(transaction.due_ms()?, &transaction.id))
}

pub(super) fn ended_key(done_ms: u64, id: &TransactionId) -> Vec<u8> {
    timed(ENDED_PREFIX, done_ms, id)
}

fn timed(prefix: &[u8], time_ms: u64, id: &TransactionId) -> Vec<u8> {
    [prefix, &time_ms.to_be_bytes(), id].concat()
}

/// Time and id of a key of one of the orders by time.
pub(super) fn read_timed(key: &[u8]) -> Option<(u64, TransactionId)> {
    let (time, id) = key.get(ENDED_PREFIX.len()..)?.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*time), id.try_into().ok()?))
}

pub(super) fn count_key(producer_group: &str) -> Vec<u8> {
    let key = KeyBuilder::new().u8(b'U').u8(3);
    key.text(producer_group).build()
}

/// Of the transactions in one state; of one producer group among them.
pub(super) fn listed_prefix(state: TransactionState, producer_group: Option<&str>) -> Vec<u8> {
    let key = KeyBuilder::new().u8(b'w').u8(state as u8);
    match producer_group {
        Some(group) => key.text(group).build(),
        None => key.build(),
    }
}

pub(super) fn listed_key(transaction: &Transaction) -> Vec<u8> {
    let mut key = listed_prefix(transaction.state(), Some(&transaction.producer_group));
    key.extend_from_slice(&transaction.created_ms.to_be_bytes());
    key.extend_from_slice(&transaction.id);
    key
}

/// When it was created and its id, at the end of a key made by [`listed_key`].
pub(super) fn read_listed(key: &[u8]) -> Option<(u64, TransactionId)> {
    let (before, id) = key.split_last_chunk::<16>()?;
    Some((u64::from_be_bytes(*before.last_chunk()?), *id))
}

fn of_group(group: &str) -> KeyBuilder {
    KeyBuilder::new().u8(b'h').text(group)
}

pub(super) fn hold_prefix(group: &str) -> Vec<u8> {
    of_group(group).u8(0).build()
}

pub(super) fn hold_key(group: &str, topic: u64, queue: u32) -> Vec<u8> {
    of_group(group).u8(0).u64(topic).u32(queue).build()
}

/// Topic and queue of a hold.
pub(super) fn read_hold(group: &str, key: &[u8]) -> Option<(u64, u32)> {
    let mut fields = KeyReader::new(key.get(hold_prefix(group).len()..)?);
    Some((fields.u64()?, fields.u32()?))
}

pub(super) fn mark_key(group: &str, id: &TransactionId) -> Vec<u8> {
    let mut key = of_group(group).u8(1).build();
    key.extend_from_slice(id);
    key
}

pub(super) fn mark_time_key(forget_ms: u64, group: &str, id: &TransactionId) -> Vec<u8> {
    let key = KeyBuilder::new().u8(b'U').u8(4).u64(forget_ms);
    let mut key = key.text(group).build();
    key.extend_from_slice(id);
    key
}

/// When a mark may go, and its key.
pub(super) fn read_mark_time(key: &[u8]) -> Option<(u64, Vec<u8>)> {
    let id = *key.last_chunk::<16>()?;
    let fields = key.get(MARK_TIME_PREFIX.len()..key.len() - id.len())?;
    let mut fields = KeyReader::new(fields);
    let forget_ms = fields.u64()?;
    Some((forget_ms, mark_key(&fields.text()?, &id)))
}
