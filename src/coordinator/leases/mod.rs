//! Leased messages: which consumer group's message is with a consumer, waits to be delivered again,
//! or is dead. All of it is judged here, in apply, by the log's time.
//!
//! Of each queue a group has a cursor, the first offset never looked at, and a `Delivery` for each
//! message below it that is not done. A message below the cursor without one is done: acked, left
//! out by a filter, or gone. So the state is as large as what is in flight, and the group's committed
//! offset is the lowest one that is not done.

mod apply;
mod command;
mod deliveries;
mod records;
mod settle;
mod signals;
mod view;

pub use command::{
    DeathReason, Grant, Granted, Lease, LeaseCommand, LeaseReply, Pick, Receipt, ReceiptVerdict,
    RetryPolicy,
};
pub use records::{DeadLetter, LeaseGroup, QueueLeases};
pub(super) use signals::News;
pub use signals::{Interest, LeaseSignals};
pub use view::{DueDelivery, LeaseCounts};

/// Messages of one queue that a group may have in flight: with consumers, waiting, or dead and not
/// yet forwarded. Part of what apply decides, so it must be the same on every replica.
pub const MAX_IN_FLIGHT: u32 = 20_000;
/// Overdue deliveries that one command looks at.
const EXPIRE_AT_ONCE: usize = 1_000;
/// Records that one command removes at least before it leaves the rest to the next.
const REMOVE_AT_ONCE: usize = 4_000;

#[cfg(test)]
mod machine_tests;
