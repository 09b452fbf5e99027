//! Transactions: what a coordinator is told about them, what it keeps and what it answers.
//!
//! A transaction belongs to the coordinator that owns its producer group's name. Its participants,
//! queues and consumer groups' offsets, are recorded before anything is prepared in them; recording
//! the decision is the commit point; then the participants are told, until the last one has
//! applied it. See docs/adr/0011-transactions.md.

mod machine;
mod offsets;
mod records;
mod view;

#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod tests;

pub use records::Duty;
pub use view::TransactionFilter;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::GroupMode;
use super::command::QueueOffset;
use crate::broker::MemberMark;
use crate::broker::queue::Place;
use crate::broker::queue::entry::TransactionId;

/// Messages and their bytes that one transaction may carry.
pub const MAX_MESSAGES: u32 = 1_000;
pub const MAX_BYTES: u64 = 64 << 20;
/// Consumer groups whose offsets one transaction may move.
pub const MAX_OFFSET_GROUPS: usize = 16;
/// Transactions of one producer group that are not over: not decided, or not yet applied by all that
/// take part.
pub const MAX_OPEN_PER_GROUP: u32 = 10_000;
/// The same over all producer groups of a coordinator.
pub const MAX_OPEN: u64 = 50_000;
/// An ended transaction is remembered this long, unless more than [`MAX_ENDED`] ended since.
pub const KEPT_MS: u64 = 24 * 3_600_000;
pub const MAX_ENDED: u64 = 20_000;
/// Whoever decided settles the participants. If they are not settled after this time, the
/// coordinator's leader does it.
pub const RESUME_AFTER_MS: u64 = 2_000;

/// The coordinator is in the first two bytes, what follows is random.
const OWNER_BYTES: usize = 2;

/// A new transaction's id. None: no such coordinator can be.
pub fn new_transaction_id(coordinator: u32, random: [u8; 16]) -> Option<TransactionId> {
    let mut id = random;
    let owner = u16::try_from(coordinator).ok()?.to_be_bytes();
    id[..OWNER_BYTES].copy_from_slice(&owner);
    Some(id)
}

/// The coordinator that decides a transaction.
pub fn owner_of_transaction(id: &TransactionId) -> u32 {
    u16::from_be_bytes([id[0], id[1]]).into()
}

/// When a transaction that nobody ends is asked for, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    pub timeout_ms: u64,
    pub check_interval_ms: u64,
    pub max_checks: u32,
}

/// One batch of messages for one queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub topic: String,
    pub queue: u32,
    /// The queue's Raft group.
    pub queue_group: u64,
    /// The batch's messages by their numbers: in a command those of the request, in a record those
    /// of the transaction.
    pub messages: Vec<u32>,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewTransaction {
    pub producer_group: String,
    pub timing: Timing,
    pub check_url: Option<String>,
    pub parts: Vec<Part>,
    /// Consumer groups, each once.
    pub offset_groups: Vec<String>,
    /// All must be prepared in this time: who began it may have died.
    pub prepare_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    Commit,
    Rollback,
    /// A rollback because nobody decided in time.
    Expire,
}

impl Decision {
    pub fn is_commit(self) -> bool {
        self == Self::Commit
    }
}

/// What of a transaction was prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedParts {
    pub first: u32,
    pub count: u32,
    /// The offsets of all consumer groups too.
    pub offsets: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransactionCommand {
    /// Records the participants, before anything is prepared in them.
    Begin {
        id: TransactionId,
        new: NewTransaction,
    },
    /// Records more of them.
    Extend {
        id: TransactionId,
        parts: Vec<Part>,
        prepare_ms: u64,
    },
    Prepared {
        id: TransactionId,
        parts: PreparedParts,
    },
    /// Parts of an extension that nobody was told are there never will be.
    GiveUp {
        id: TransactionId,
        first: u32,
        count: u32,
    },
    Decide {
        id: TransactionId,
        decision: Decision,
    },
    /// A time has come: of a check, of expiry, or of giving up on what was never prepared.
    Due { id: TransactionId },
    /// Participants have applied the decision.
    Settled {
        id: TransactionId,
        /// By Raft group of the queue: where each of its parts is now.
        queues: Vec<(u64, Vec<(u32, Place)>)>,
        offset_groups: Vec<String>,
    },
    /// Forgets transactions that ended long ago, a bounded number.
    Forget,
    /// In the consumer group's coordinator: checks offsets and keeps others from moving them.
    HoldOffsets {
        id: TransactionId,
        group: String,
        offsets: Vec<OffsetMove>,
        member: Option<MemberMark>,
        /// Refused later than this, in log time.
        until_ms: u64,
    },
    /// In the consumer group's coordinator: what is held is committed or let go.
    SettleOffsets {
        id: TransactionId,
        group: String,
        commit: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransactionReply {
    /// The participants are recorded and may be prepared.
    Recorded {
        first_part: u32,
        prepare_by_ms: u64,
    },
    /// The transaction after the command.
    Is(Box<Transaction>),
    /// Refused: it has ended, or has ended the other way.
    Ended(Box<Transaction>),
    /// Refused for now: something recorded is not prepared.
    NotPrepared,
    /// Refused: the parts were not prepared in time, and given up.
    GivenUp,
    NotFound,
    TooMany(String),
    Invalid(String),
    Forgot {
        more: bool,
    },
    /// In the order of the command's offsets. Unless all are fine nothing is held.
    Held(Vec<HoldVerdict>),
    /// The transaction is over for this consumer group: nothing is held.
    HoldTooLate,
    OffsetsSettled,
    OtherMode(GroupMode),
}

/// Where a transaction moves a consumer group in one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetMove {
    pub to: QueueOffset,
    /// What is committed must be this, if anything is.
    pub from: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HoldVerdict {
    Fine,
    /// The group has committed something else than it was to be moved from.
    Moved {
        committed: u64,
    },
    /// Behind what the group has committed.
    Behind {
        committed: u64,
    },
    Fenced,
    /// Another transaction holds it.
    HeldByOther,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartState {
    /// It may be stored or not.
    Recorded,
    Prepared,
    /// It may be stored or not, and is never seen. Only an extension's, before it was answered.
    GivenUp,
}

/// A part and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    pub part: Part,
    pub state: PartState,
    /// Given up if it is not prepared then.
    pub prepare_by_ms: u64,
    /// Once committed in its queue.
    pub place: Option<Place>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetsRecord {
    pub group: String,
    pub prepared: bool,
    pub settled: bool,
}

/// All that a coordinator knows of one transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    pub id: TransactionId,
    pub producer_group: String,
    pub timing: Timing,
    pub check_url: Option<String>,
    pub created_ms: u64,
    pub parts: Vec<PartRecord>,
    /// Messages and bytes that were ever recorded; those of parts given up count, since numbers are
    /// given once.
    pub recorded: u32,
    pub bytes: u64,
    pub offsets: Vec<OffsetsRecord>,
    /// Raft groups of the queues that have applied the decision.
    pub settled_queues: BTreeSet<u64>,
    /// All that was recorded at the beginning was prepared once.
    pub opened: bool,
    /// When the first of what is recorded and not prepared is given up.
    pub prepare_by_ms: Option<u64>,
    /// How often it was due for a check so far.
    pub checks: u32,
    pub next_check_ms: u64,
    pub decision: Option<Decision>,
    pub decided_ms: u64,
    /// When the last participant was known to have applied the decision.
    pub done_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransactionState {
    Preparing,
    Open,
    NeedsCheck,
    Committing,
    Committed,
    RollingBack,
    RolledBack,
    Expired,
}

impl TransactionState {
    pub const ALL: [Self; 8] = [
        Self::Preparing,
        Self::Open,
        Self::NeedsCheck,
        Self::Committing,
        Self::Committed,
        Self::RollingBack,
        Self::RolledBack,
        Self::Expired,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Open => "open",
            Self::NeedsCheck => "needs_check",
            Self::Committing => "committing",
            Self::Committed => "committed",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::Expired => "expired",
        }
    }
}

impl Transaction {
    pub fn state(&self) -> TransactionState {
        use TransactionState as S;
        match (self.decision, self.done_ms) {
            (None, _) if !self.opened => S::Preparing,
            (None, _) if self.checks > 0 => S::NeedsCheck,
            (None, _) => S::Open,
            (Some(Decision::Commit), None) => S::Committing,
            (Some(Decision::Commit), Some(_)) => S::Committed,
            (Some(Decision::Rollback), None) => S::RollingBack,
            (Some(Decision::Rollback), Some(_)) => S::RolledBack,
            (Some(Decision::Expire), _) => S::Expired,
        }
    }

    /// Nothing that was recorded is still to be prepared.
    pub fn is_prepared(&self) -> bool {
        let pending = |p: &PartRecord| p.state == PartState::Recorded;
        !self.parts.iter().any(pending) && self.offsets.iter().all(|o| o.prepared)
    }

    /// The messages that a commit makes visible.
    pub fn messages(&self) -> u32 {
        let counted = self.parts.iter().filter(|p| p.state != PartState::GivenUp);
        counted.map(|p| p.part.messages.len() as u32).sum()
    }

    /// The parts in a queue that are never seen, whatever the end is.
    pub fn given_up(&self, queue_group: u64) -> Vec<u32> {
        let numbered = (0u32..).zip(&self.parts);
        let given_up = numbered
            .filter(|(_, p)| p.part.queue_group == queue_group && p.state == PartState::GivenUp);
        given_up.map(|(number, _)| number).collect()
    }

    /// The Raft groups of the queues that have not applied the decision yet.
    pub fn unsettled_queues(&self) -> BTreeSet<u64> {
        let all = self.parts.iter().map(|p| p.part.queue_group);
        all.filter(|group| !self.settled_queues.contains(group))
            .collect()
    }

    pub fn unsettled_offsets(&self) -> impl Iterator<Item = &str> {
        let unsettled = self.offsets.iter().filter(|o| !o.settled);
        unsettled.map(|o| o.group.as_str())
    }

    /// When something has to be done about it.
    pub fn due_ms(&self) -> Option<u64> {
        match (self.decision, self.done_ms) {
            (None, _) if !self.opened => self.prepare_by_ms,
            (None, _) => Some(
                self.prepare_by_ms
                    .unwrap_or(u64::MAX)
                    .min(self.next_check_ms),
            ),
            (Some(_), None) => Some(self.decided_ms.saturating_add(RESUME_AFTER_MS)),
            (Some(_), Some(_)) => None,
        }
    }
}

/// What a coordinator has done with transactions since its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionCounts {
    /// Not decided yet.
    pub open: u64,
    /// Decided, and not yet applied by all that take part.
    pub settling: u64,
    pub committed: u64,
    pub rolled_back: u64,
    pub expired: u64,
    /// Done and still remembered.
    pub ended: u64,
}
