//! Quorate's disk: one shared commit log per node, and everything derived from it.
//!
//! Knows no async runtime, no consensus library and no HTTP.
#![forbid(unsafe_code)]

pub mod batch;
pub mod commit_log;
pub mod derived;
mod error;
pub mod files;
mod ids;
pub mod key_index;
pub mod mutation;
pub mod queue_index;
pub mod snapshot;
#[cfg(test)]
mod testing;
pub mod vfs;

pub use error::StorageError;
pub use ids::{LogId, RaftGroupId, Vote};
