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

#[cfg(test)]
mod tests {
    use super::owner_of_name;

    #[test]
    fn of_no_coordinators_none_is_the_owner() {
        assert_eq!(owner_of_name("billing", 1), 0);
        assert_eq!(owner_of_name("billing", 0), u32::MAX);
        let owners: Vec<u32> = (0..64)
            .map(|n| owner_of_name(&format!("g{n}"), 16))
            .collect();
        assert!(owners.iter().all(|owner| *owner < 16));
        assert!((0..16).all(|number| owners.contains(&number)), "{owners:?}");
    }
}
