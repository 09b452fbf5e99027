//! One queue: what its Raft group's entries say, and the state they make.
//!
//! The messages themselves stay in the commit log. This state is small: where the queue begins and
//! ends, which batches of which producers are in it, and which idempotency keys were seen. Of what is
//! stored and not visible yet there may be much: that is in the node's derived store.

mod dedupe;
pub mod entry;
mod forwarded;
mod held;
mod idempotency;
mod late;
mod release;
mod reply;
mod shared;
mod sizes;
mod state;

pub(in crate::broker) use dedupe::{REMEMBERED_BATCHES, advance};
pub use reply::{BatchOutcome, CancelVerdict, QueueReply, Settled};
pub(crate) use reply::{decode_cancelled, decode_delivered, decode_outcomes, decode_settled};
pub use shared::{HeldSize, QueueBounds, QueueShared};
pub use sizes::SizeTable;
pub use state::{QueueLimits, QueueMachine};

use quorate_storage::LogId;
use serde::{Deserialize, Serialize};

/// Where one stored batch is: its first offset, and the entry and ordinal that hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// [`Place::UNSEEN`] of a batch that was stored without becoming visible.
    pub base_offset: u64,
    pub count: u32,
    pub term: u64,
    pub index: u64,
    /// Ordinal of the batch in its entry.
    pub batch: u16,
}

impl Place {
    /// No offset is this high.
    pub const UNSEEN: u64 = u64::MAX;

    pub fn log_id(&self) -> LogId {
        LogId::new(self.term, self.index)
    }

    /// The first offset, unless the batch was held when it was stored.
    pub fn offset(&self) -> Option<u64> {
        (self.base_offset != Self::UNSEEN).then_some(self.base_offset)
    }
}

#[cfg(test)]
mod held_tests;
