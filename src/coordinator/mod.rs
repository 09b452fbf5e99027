//! The coordinators: a few Raft groups that own, by hash of the name, consumer groups and named
//! producers. They keep no messages, so only their state matters and their logs are short.

mod command;
mod group_mode;
pub mod leases;
mod machine;
mod offsets;
mod positions;
mod producers;
mod records;

pub use command::{
    CommitVerdict, CoordinatorCommand, CoordinatorReply, GroupMode, QueueOffset, stamp,
};
pub use machine::CoordinatorMachine;
pub use producers::{is_named, owner_of_producer};
pub use records::CoordinatorView;

use xxhash_rust::xxh3::xxh3_64;

/// The coordinator that owns a consumer group or a named producer.
pub fn owner_of_name(name: &str, coordinators: usize) -> u32 {
    // At most a few hundred coordinators; an empty list gives 0, which is then not found.
    (xxh3_64(name.as_bytes()) % coordinators.max(1) as u64) as u32
}
