//! What apply answers to whoever proposed an entry.

use serde::{Deserialize, Serialize};

use super::Place;

/// The reply to one entry. An empty one means that this replica could not execute it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueueReply {
    /// To an append: one outcome for each batch.
    Batches(Vec<BatchOutcome>),
    /// To a fence or a trim.
    Done,
    /// How many batches a delivery has made visible.
    Delivered(u32),
    Settled(Settled),
    Cancelled(CancelVerdict),
}

/// What became of one proposed batch, decided in apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BatchOutcome {
    Stored(Place),
    /// Stored without becoming visible; its place has no offset yet. `due_ms` is when a delayed one
    /// will.
    Held {
        place: Place,
        due_ms: Option<u64>,
    },
    /// A retry; the place is the first one's, without an offset if that was held.
    Duplicate(Place),
    OutOfOrder {
        expected: i32,
    },
    Fenced {
        current: i16,
    },
    /// A forwarder's repetition; the message is here.
    AlreadyForwarded,
    /// The idempotency key was used for another request.
    KeyReused,
    /// Too many idempotency keys are remembered; none is forgotten early.
    KeysFull,
    ProducersFull,
    /// The transaction was settled here before; nothing more of it is taken.
    TransactionEnded,
    /// Too many batches are held already.
    HeldFull,
    /// The entry can't be read. Every replica says the same of it.
    Malformed,
}

/// How a transaction ended in this queue. The first settlement counts: a repetition, or the
/// opposite, is answered with what that one did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    pub commit: bool,
    /// Of a commit: the number of each batch in the transaction, in order, and where it is now.
    pub parts: Vec<(u32, Place)>,
}

/// What a cancellation came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CancelVerdict {
    /// It stays unseen, by this cancellation or by an earlier one.
    Cancelled,
    /// Nothing of that place is held: it was delivered, or never was.
    NotHeld,
}

pub(super) fn encode(reply: &QueueReply) -> Vec<u8> {
    // Plain data into memory: there is no way to fail.
    postcard::to_stdvec(reply).unwrap_or_default()
}

/// Reads the reply to an append.
pub(crate) fn decode_outcomes(reply: &[u8]) -> Option<Vec<BatchOutcome>> {
    match postcard::from_bytes(reply).ok()? {
        QueueReply::Batches(outcomes) => Some(outcomes),
        _ => None,
    }
}

/// Reads the reply to a delivery.
pub(crate) fn decode_delivered(reply: &[u8]) -> Option<u32> {
    match postcard::from_bytes(reply).ok()? {
        QueueReply::Delivered(batches) => Some(batches),
        _ => None,
    }
}

/// Reads the reply to a settlement.
pub(crate) fn decode_settled(reply: &[u8]) -> Option<Settled> {
    match postcard::from_bytes(reply).ok()? {
        QueueReply::Settled(settled) => Some(settled),
        _ => None,
    }
}

/// Reads the reply to a cancellation.
pub(crate) fn decode_cancelled(reply: &[u8]) -> Option<CancelVerdict> {
    match postcard::from_bytes(reply).ok()? {
        QueueReply::Cancelled(verdict) => Some(verdict),
        _ => None,
    }
}
