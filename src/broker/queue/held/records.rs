//! The records of held batches. Keys are made of the store's ordered fields, values are postcard's.
//!
//! | key | value |
//! |---|---|
//! | `b`, index u64, batch u32 | [`HeldBatch`]: all that were held, until they are garbage |
//! | `d`, due ms u64, index u64, batch u32 | term, count, bytes: the order of delivery, without what was cancelled |
//! | `p`, transaction (16 bytes), part u32 | [`PartSpot`] |
//! | `s`, transaction (16 bytes), index u64 of its settlement | [`SettledRecord`] |
//! | `c`, index u64 of a cancellation | index, batch of what it took back |
//! | `q`, index u64 of a settlement | its transaction |
//! | `e`, index u64 of a settlement | its transaction, while its parts are still here |
//! | `f` | [`Floor`](super::garbage::Floor) |

use quorate_storage::derived::{KeyBuilder, KeyReader};
use serde::{Deserialize, Serialize};

use super::super::Place;
use super::super::entry::TransactionId;
use super::super::reply::Settled;

/// A batch that was stored without becoming visible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) struct HeldBatch {
    pub term: u64,
    pub count: u32,
    /// Its size in the log.
    pub bytes: u32,
    pub until: Until,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) enum Until {
    Due {
        due_ms: u64,
        cancelled: Option<Cancelled>,
    },
    End {
        id: TransactionId,
        part: u32,
    },
}

impl HeldBatch {
    pub(super) fn cancelled(&self) -> Option<Cancelled> {
        match self.until {
            Until::Due { cancelled, .. } => cancelled,
            Until::End { .. } => None,
        }
    }
}

/// By which entry, at which of the log's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) struct Cancelled {
    pub at: u64,
    pub stamp_ms: u64,
}

/// Where a part of a transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) struct PartSpot {
    pub index: u64,
    pub batch: u16,
    pub term: u64,
    pub count: u32,
    pub bytes: u32,
}

impl PartSpot {
    pub(in crate::broker::queue) fn place(&self, base_offset: u64) -> Place {
        Place {
            base_offset,
            count: self.count,
            term: self.term,
            index: self.index,
            batch: self.batch,
        }
    }

    pub(super) fn held(&self, id: TransactionId, part: u32) -> HeldBatch {
        HeldBatch {
            term: self.term,
            count: self.count,
            bytes: self.bytes,
            until: Until::End { id, part },
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) struct SettledRecord {
    /// Index of the settlement.
    pub at: u64,
    pub stamp_ms: u64,
    pub settled: Settled,
}

/// The place of a delayed batch in the order of delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(in crate::broker::queue) struct DueKey {
    pub due_ms: u64,
    pub index: u64,
    pub batch: u16,
}

impl DueKey {
    pub(super) fn encode(&self) -> Vec<u8> {
        let key = KeyBuilder::new().u8(keys::DUE).u64(self.due_ms);
        key.u64(self.index).u32(self.batch.into()).build()
    }

    pub(super) fn decode(key: &[u8]) -> Option<Self> {
        let mut fields = KeyReader::new(key);
        fields.u8()?;
        Some(Self {
            due_ms: fields.u64()?,
            index: fields.u64()?,
            batch: fields.u32()?.try_into().ok()?,
        })
    }
}

pub(super) mod keys {
    use super::{KeyBuilder, KeyReader, TransactionId};

    pub const BATCH: u8 = b'b';
    pub const DUE: u8 = b'd';
    pub const CANCELLED: u8 = b'c';
    pub const SETTLED_AT: u8 = b'q';
    pub const ENDED_AT: u8 = b'e';
    pub const FLOOR: &[u8] = b"f";

    pub fn batch(index: u64, batch: u16) -> Vec<u8> {
        let key = KeyBuilder::new().u8(BATCH).u64(index);
        key.u32(batch.into()).build()
    }

    /// Index and batch of a [`batch`] key.
    pub fn spot(key: &[u8]) -> Option<(u64, u16)> {
        let mut fields = KeyReader::new(key);
        fields.u8()?;
        Some((fields.u64()?, fields.u32()?.try_into().ok()?))
    }

    /// All parts of a transaction. Ids have one length, so none begins with another.
    pub fn parts(id: &TransactionId) -> Vec<u8> {
        [&b"p"[..], id].concat()
    }

    pub fn part(id: &TransactionId, part: u32) -> Vec<u8> {
        [&parts(id)[..], &part.to_be_bytes()].concat()
    }

    /// All that is remembered of a transaction's end: settled again after it was forgotten, it may
    /// have two.
    pub fn settlements(id: &TransactionId) -> Vec<u8> {
        [&b"s"[..], id].concat()
    }

    pub fn settled(id: &TransactionId, at: u64) -> Vec<u8> {
        [&settlements(id)[..], &at.to_be_bytes()].concat()
    }

    pub fn cancelled(at: u64) -> Vec<u8> {
        event(CANCELLED, at)
    }

    pub fn settled_at(at: u64) -> Vec<u8> {
        event(SETTLED_AT, at)
    }

    pub fn ended_at(at: u64) -> Vec<u8> {
        event(ENDED_AT, at)
    }

    fn event(kind: u8, at: u64) -> Vec<u8> {
        KeyBuilder::new().u8(kind).u64(at).build()
    }

    /// The entry that an event key names.
    pub fn at(key: &[u8]) -> Option<u64> {
        let mut fields = KeyReader::new(key);
        fields.u8()?;
        fields.u64()
    }

    /// The last key of `kind` whose first field is not above `index`.
    pub fn up_to(kind: u8, index: u64) -> Vec<u8> {
        // Longer than any key with that index.
        let key = KeyBuilder::new().u8(kind).u64(index).u32(u32::MAX);
        key.u8(u8::MAX).build()
    }
}
