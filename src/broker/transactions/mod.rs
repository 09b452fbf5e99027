//! Transactions: half messages in queues and offsets of consumer groups that become visible
//! together, or never do.
//!
//! Any node carries a request out: it records the participants in the transaction's coordinator,
//! prepares them, and reports. Where it dies on the way, the coordinator's leader goes on from the
//! record ([`duty`]). See docs/adr/0011-transactions.md.

mod asking;
mod begin;
mod duty;
mod end;
mod read;
mod unreachable;
mod webhook;

#[cfg(test)]
mod duty_tests;
#[cfg(test)]
mod tests;

pub(super) use duty::run as run_duty;
pub use read::TransactionQuery;
pub(super) use unreachable::Unreachable;
pub use webhook::{WebhookPolicy, check_allowed as check_webhook_allowed};

use std::fmt::Write;

use quorate_storage::RaftGroupId;

use super::queue::Place;
use super::queue::entry::TransactionId;
use super::route::NO_LEADER;
use super::{Broker, BrokerError, BrokerResult, MemberMark, NewMessage, message_id};
use crate::coordinator::transactions::{
    PartState, Timing, Transaction, TransactionCommand, TransactionReply, TransactionState,
    owner_of_transaction,
};
use crate::coordinator::{CoordinatorCommand, CoordinatorReply};

/// A message of a transaction.
#[derive(Debug, Clone)]
pub struct TransactionMessage {
    pub topic: String,
    pub message: NewMessage,
}

/// A consumer group's next offset in one queue, committed with the transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionOffset {
    pub group: String,
    pub topic: String,
    pub queue: u32,
    pub offset: u64,
    /// What is committed must be this, if anything is.
    pub from: Option<u64>,
    pub member: Option<MemberMark>,
}

#[derive(Debug, Clone)]
pub struct BeginTransaction {
    pub producer_group: String,
    pub timing: Timing,
    pub check_url: Option<String>,
    pub messages: Vec<TransactionMessage>,
    pub offsets: Vec<TransactionOffset>,
}

/// Where a message of a committed transaction is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionResult {
    pub topic: String,
    pub queue: u32,
    /// None where the topic was deleted before the commit came to it.
    pub stored: Option<(u64, String)>,
}

/// The form in which clients know an id.
pub fn transaction_text(id: &TransactionId) -> String {
    let mut text = String::with_capacity(2 * id.len());
    for byte in id {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The way back. None: no transaction was ever called so.
pub fn parse_transaction_id(text: &str) -> Option<TransactionId> {
    let digits = text.as_bytes();
    let lower = |b: &u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 32 || !digits.iter().all(lower) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

/// Where the messages of a committed transaction are, in the order in which they were given.
pub fn transaction_results(transaction: &Transaction) -> Vec<TransactionResult> {
    let mut results: Vec<_> = transaction
        .parts
        .iter()
        .filter(|record| record.state != PartState::GivenUp)
        .flat_map(|record| {
            let part = &record.part;
            let stored = move |place: &Place, nth: u32| {
                let offset = place.offset()?.checked_add(nth.into())?;
                Some((offset, message_id(part.queue_group, place, nth)))
            };
            (0u32..).zip(&part.messages).map(move |(nth, number)| {
                let result = TransactionResult {
                    topic: part.topic.clone(),
                    queue: part.queue,
                    stored: record.place.as_ref().and_then(|place| stored(place, nth)),
                };
                (*number, result)
            })
        })
        .collect();
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, result)| result).collect()
}

fn not_found(id: &TransactionId) -> BrokerError {
    BrokerError::TransactionNotFound {
        id: transaction_text(id),
    }
}

fn ended(transaction: &Transaction) -> BrokerError {
    let state = match transaction.state() {
        // To the caller they are the same: the decision stands.
        TransactionState::Committing => TransactionState::Committed,
        TransactionState::RollingBack => TransactionState::RolledBack,
        state => state,
    };
    BrokerError::TransactionEnded {
        id: transaction_text(&transaction.id),
        state: state.as_str().to_owned(),
    }
}

impl Broker {
    /// Puts a command to the coordinator of the transaction.
    /// The coordinator that decides it, if there is such a one.
    fn owner_of_transaction(&self, id: &TransactionId) -> BrokerResult<u32> {
        let owner = owner_of_transaction(id);
        match self.catalog().coordinators.len() {
            // Not even the catalog is known here yet.
            0 => Err(NO_LEADER),
            known if owner as usize >= known => Err(not_found(id)),
            _ => Ok(owner),
        }
    }

    async fn transact(
        &self,
        id: &TransactionId,
        command: TransactionCommand,
    ) -> BrokerResult<TransactionReply> {
        let coordinator = self.owner_of_transaction(id)?;
        self.transact_at(coordinator, command).await
    }

    async fn transact_at(
        &self,
        coordinator: u32,
        command: TransactionCommand,
    ) -> BrokerResult<TransactionReply> {
        let command = CoordinatorCommand::Transaction(command);
        match self.coordinate(coordinator, &command).await? {
            CoordinatorReply::Transaction(TransactionReply::Invalid(text))
            | CoordinatorReply::Invalid(text) => Err(BrokerError::InvalidRequest(text)),
            CoordinatorReply::Transaction(TransactionReply::TooMany(text)) => {
                Err(BrokerError::QuotaExceeded(text))
            }
            CoordinatorReply::Transaction(reply) => Ok(reply),
            other => Err(super::producers::unexpected(&other)),
        }
    }

    /// Whether a queue is gone for ever, with its topic.
    async fn is_deleted(&self, queue_group: u64) -> bool {
        // A copy of the catalog that lags behind may not know the queue yet.
        self.catalog().owner(RaftGroupId(queue_group)).is_none()
            && self.catalog_barrier().await.is_ok()
            && self.catalog().owner(RaftGroupId(queue_group)).is_none()
    }
}

fn unexpected(reply: &TransactionReply) -> BrokerError {
    BrokerError::Internal(format!(
        "unexpected answer of a transaction's coordinator: {reply:?}"
    ))
}
