//! One queue: what its Raft group's entries say, and the state they make.
//!
//! The messages themselves stay in the commit log. This state is small: where the queue begins and
//! ends, which batches of which producers are in it, and which idempotency keys were seen.

mod dedupe;
pub mod entry;
mod forwarded;
mod idempotency;
mod shared;
mod sizes;
mod state;

pub use shared::{QueueBounds, QueueShared};
pub use sizes::SizeTable;
pub(crate) use state::decode_outcomes;
pub use state::{QueueLimits, QueueMachine};

use quorate_storage::LogId;
use serde::{Deserialize, Serialize};

/// Where one stored batch is: its first offset, and the entry and ordinal that hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub base_offset: u64,
    pub count: u32,
    pub term: u64,
    pub index: u64,
    /// Ordinal of the batch in its entry.
    pub batch: u16,
}

impl Place {
    pub fn log_id(&self) -> LogId {
        LogId::new(self.term, self.index)
    }
}

/// What became of one proposed batch, decided in apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BatchOutcome {
    Stored(Place),
    /// A retry; the place is the first one's.
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
    /// The entry can't be read. Every replica says the same of it.
    Malformed,
}
