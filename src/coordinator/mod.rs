//! The coordinators: a few Raft groups that own, by hash of the name, consumer groups and named
//! producers. They keep no messages, so only their state matters and their logs are short.

mod assign;
mod command;
mod forget;
mod group_mode;
pub mod leases;
mod machine;
mod members;
mod membership;
mod offsets;
mod positions;
mod producers;
mod records;
pub mod transactions;

pub use assign::AssignStrategy;
pub use command::{
    CommitVerdict, CoordinatorCommand, CoordinatorReply, GroupMode, QueueOffset, stamp,
};
pub use machine::CoordinatorMachine;
pub use members::{MAX_TAG_BYTES, SESSION_MS};
pub use membership::{
    Delivery, GroupStart, JoinRefused, MAX_MEMBERS, Member, Membership, Newcomer, NotAMember,
    QueueId, TopicShape,
};
pub use producers::{is_named, owner_of_producer};
pub use records::{CoordinatorView, GroupSummary};

use xxhash_rust::xxh3::xxh3_64;

/// The coordinator that owns a consumer group or a named producer. Of no coordinators, because the
/// catalog is not known here yet, it is one that is never found: a moment later there may be some,
/// and the first of them must not be taken for the owner.
pub fn owner_of_name(name: &str, coordinators: usize) -> u32 {
    let owner = xxh3_64(name.as_bytes()).checked_rem(coordinators as u64);
    // At most a few hundred coordinators.
    owner.map_or(u32::MAX, |owner| owner as u32)
}
