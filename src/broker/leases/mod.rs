//! Consume by lease: receive, ack, nack, extend; retries, dead letters and their way back.
//!
//! The coordinator's leader serves a receive: it reads the queues, proposes what to lease, and apply
//! decides. Acks and the like are commands that any node proposes. What must happen though nobody
//! asks, expiry and the dead letters' way to their topic, is the `duty`'s.

mod dead_letters;
pub(super) mod duty;
mod plan;
mod receipt;
mod receive;
#[cfg(test)]
mod receive_tests;
mod redrive;
mod settle;

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quorate_storage::StorageError;
use serde::{Deserialize, Serialize};

use super::local::LocalCoordinator;
use super::{Broker, BrokerError, BrokerResult, Message, Selection, StartAt};
use crate::coordinator::leases::{LeaseCommand, LeaseCounts, LeaseReply, Receipt, RetryPolicy};
use crate::coordinator::{CoordinatorCommand, CoordinatorReply, GroupMode, owner_of_name};
use crate::peer::{PeerError, PeerResult};

pub use receipt::{decode as decode_receipt, encode as encode_receipt};

/// Messages for one consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveRequest {
    pub group: String,
    pub topics: Vec<String>,
    pub max_messages: usize,
    pub max_bytes: usize,
    pub wait_ms: u64,
    pub lease_ms: u64,
    /// Messages of one key one at a time.
    pub ordered: bool,
    pub selection: Selection,
    /// Where the group begins in a queue it never leased from.
    pub start: StartAt,
    /// Who receives, for acks that go `through`. None: each receive is another one.
    pub consumer: Option<String>,
    /// What the consumer has of earlier receives. Those of it that are still leased count against
    /// `max_messages`.
    pub held: Vec<Receipt>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReceiveAnswer {
    pub messages: Vec<LeasedMessage>,
    /// Of `held`: those still leased.
    pub held: Vec<Receipt>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeasedMessage {
    pub topic: String,
    pub message: Message,
    pub receipt: Receipt,
    /// This one counted.
    pub delivery_count: u32,
}

/// A group's leases as users see them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseView {
    pub policy: RetryPolicy,
    pub queues: Vec<LeaseCounts>,
}

/// Something about a receipt; `Some` says how many messages an ack through it was for.
pub type ReceiptResult = BrokerResult<Option<u32>>;

/// One turn at a time per group, so that consumers don't reach for the same messages. The number
/// says at which queue the next turn begins.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<String, Arc<tokio::sync::Mutex<usize>>>>);

/// More than this are looked through for those that nobody waits for.
const TURNS_KEPT: usize = 1024;

impl Turns {
    fn of(&self, group: &str) -> Arc<tokio::sync::Mutex<usize>> {
        let mut turns = self.0.lock();
        if turns.len() > TURNS_KEPT {
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        turns.entry(group.to_owned()).or_default().clone()
    }
}

impl Broker {
    /// The coordinator of a consumer group, and its Raft group.
    fn lease_coordinator(&self, group: &str) -> BrokerResult<(u32, u64)> {
        let catalog = self.catalog();
        let number = owner_of_name(group, catalog.coordinators.len());
        let placement = catalog.coordinators.get(number as usize);
        let placement = placement.ok_or(super::route::NO_LEADER)?;
        Ok((number, placement.group))
    }

    /// This node's replica of a coordinator that it leads.
    pub(super) fn led_coordinator(&self, number: u32) -> PeerResult<Arc<LocalCoordinator>> {
        let local = self.local.coordinator(number).ok_or(PeerError::NotHere)?;
        if local.soundness.broken().is_some() {
            return Err(PeerError::NotHere);
        }
        if !local.group.is_leader() {
            let leader = local.group.leader().filter(|n| *n != self.node_id());
            return Err(PeerError::NotLeader { leader });
        }
        Ok(local)
    }

    /// Puts a command to the group's coordinator, wherever it is led.
    async fn lease_command(&self, group: &str, command: LeaseCommand) -> BrokerResult<LeaseReply> {
        let (number, _) = self.lease_coordinator(group)?;
        let command = CoordinatorCommand::Leases {
            group: group.to_owned(),
            command,
        };
        explain(group, self.coordinate(number, &command).await?)
    }

    /// Proposes a command where this node leads the coordinator.
    async fn lease_command_here(
        &self,
        local: &LocalCoordinator,
        group: &str,
        command: LeaseCommand,
    ) -> PeerResult<LeaseReply> {
        let command = CoordinatorCommand::Leases {
            group: group.to_owned(),
            command,
        };
        // Plain data into memory: there is no way to fail.
        let body = postcard::to_stdvec(&command).unwrap_or_default();
        let timeout = self.config.write_timeout;
        let id = local.group.id().0;
        let reply = self.propose_here(id, body.into(), timeout).await?;
        if reply.is_empty() {
            return Err(PeerError::Broker(super::route::UNKNOWN));
        }
        let reply = postcard::from_bytes(&reply)
            .map_err(|e| PeerError::Broker(BrokerError::Internal(e.to_string())))?;
        explain(group, reply).map_err(PeerError::Broker)
    }
}

fn explain(group: &str, reply: CoordinatorReply) -> BrokerResult<LeaseReply> {
    match reply {
        CoordinatorReply::Leases(LeaseReply::NoGroup) => Err(BrokerError::ConsumerGroupNotFound {
            group: group.to_owned(),
        }),
        CoordinatorReply::Leases(reply) => Ok(reply),
        CoordinatorReply::OtherMode(_) => Err(BrokerError::GroupModeConflict {
            group: group.to_owned(),
            leased: false,
        }),
        CoordinatorReply::Invalid(text) => Err(BrokerError::InvalidRequest(text)),
        other => Err(super::producers::unexpected(&other)),
    }
}

/// Why a group has nothing leased: it commits offsets, or it was never used.
fn not_leased(local: &LocalCoordinator, group: &str) -> PeerError {
    let mode = match local.view.group_mode(group) {
        Ok(mode) => mode,
        Err(cause) => return broken(local, cause),
    };
    let group = group.to_owned();
    PeerError::Broker(match mode {
        Some(GroupMode::Offsets) => BrokerError::GroupModeConflict {
            group,
            leased: false,
        },
        _ => BrokerError::ConsumerGroupNotFound { group },
    })
}

/// The replica's store failed: others must answer.
fn broken(local: &LocalCoordinator, cause: StorageError) -> PeerError {
    local.soundness.set_broken(cause);
    PeerError::NotHere
}
