//! Many Raft groups over one commit log and one link per pair of nodes.
//!
//! The only crate that names openraft. Above it stand state machines ([`StateMachine`]) that see
//! committed commands, and a broker that proposes them ([`Group::propose`]) and asks for proof of
//! leadership ([`Group::read_barrier`]).
//!
//! **Architecture invariant:** openraft's own timers are off. Who is alive is decided once per
//! pair of nodes, not once per group, and the host starts every election (`elections`).
#![forbid(unsafe_code)]

pub mod blocking;
mod boot;
mod config;
#[cfg(test)]
mod conformance_tests;
mod elections;
mod error;
#[cfg(test)]
mod fuzz_tests;
mod group;
mod host;
pub mod identity;
pub mod link;
pub mod liveness;
mod log_store;
mod machine;
#[cfg(test)]
#[path = "../../storage/tests/fuzz/mutate.rs"]
mod mutate;
mod network;
mod pieces;
mod serve;
mod state_machine;
mod tail_guard;
mod turns;
mod types;
mod uptime;
mod wire;

pub use boot::{Run, this_boot};
pub use config::{GroupSpec, HostConfig, LogRetention, Replica};
pub use error::{CallError, OpenGroupError, ProposeError, ReadError, TransferError};
pub use group::{Group, GroupMetrics, Settled};
pub use host::{HostStorage, NodeLiveness, NodeStatus, PeerService, RaftEvent, RaftHost};
pub use identity::Identity;
pub use quorate_storage::commit_log::Flush;
pub use state_machine::StateMachine;
pub use types::{NodeId, ReplicaId};
