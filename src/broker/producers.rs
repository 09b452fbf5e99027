//! Idempotent producers: identities, and the end of an old epoch.
//!
//! Registering a name again must fence the old epoch at once, in every queue it ever wrote to, also
//! where the new one has written nothing yet. So a named producer is attached to a queue at its
//! coordinator before it first writes there, and a registration puts a fence entry into all these
//! queues before it answers.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;

use futures_util::future::join_all;
use parking_lot::Mutex;
use quorate_storage::batch::ProducerStamp;

use super::queue::entry;
use super::{Broker, BrokerError, BrokerResult, ProducerIdentity};
use crate::coordinator::{
    CoordinatorCommand, CoordinatorReply, is_named, owner_of_name, owner_of_producer,
};
use quorate_storage::RaftGroupId;

/// Attachments remembered, oldest forgotten first; a forgotten one is simply asked for again.
const REMEMBERED: usize = 100_000;

type Attachment = (i64, i16, u64);

/// Which producers this node knows to be attached to which queues.
#[derive(Debug, Default)]
pub(super) struct AttachCache {
    known: Mutex<(HashSet<Attachment>, VecDeque<Attachment>)>,
}

impl AttachCache {
    fn has(&self, attachment: &Attachment) -> bool {
        self.known.lock().0.contains(attachment)
    }

    fn insert(&self, attachment: Attachment) {
        let mut known = self.known.lock();
        if !known.0.insert(attachment) {
            return;
        }
        known.1.push_back(attachment);
        if known.1.len() > REMEMBERED
            && let Some(oldest) = known.1.pop_front()
        {
            known.0.remove(&oldest);
        }
    }
}

impl Broker {
    /// A new producer, or the next epoch of the one with this name. The older epochs are fenced
    /// everywhere when this returns.
    pub async fn register_producer(&self, name: Option<&str>) -> BrokerResult<ProducerIdentity> {
        let coordinators = self.catalog().coordinators.len();
        let coordinator = match name {
            Some(name) if !crate::names::is_valid_name(name) => {
                let rule = crate::names::NAME_RULE;
                let text = format!("producer name {name:?} is not valid: a name has {rule}");
                return Err(BrokerError::InvalidName(text));
            }
            Some(name) => owner_of_name(name, coordinators),
            None => {
                let turn = self.round_robin.fetch_add(1, Ordering::Relaxed);
                turn % coordinators.max(1) as u32
            }
        };
        let command = CoordinatorCommand::RegisterProducer {
            name: name.map(str::to_owned),
        };
        match self.coordinate(coordinator, &command).await? {
            CoordinatorReply::Producer {
                id,
                epoch,
                retired,
                fence,
            } => {
                if let Some(retired) = retired {
                    self.fence_everywhere(retired, i16::MAX, fence.clone())
                        .await?;
                }
                self.fence_everywhere(id, epoch, fence).await?;
                Ok(ProducerIdentity {
                    id: id.to_string(),
                    // Epochs count up from 0.
                    epoch: epoch.unsigned_abs().into(),
                })
            }
            CoordinatorReply::Invalid(text) => Err(BrokerError::InvalidRequest(text)),
            other => Err(unexpected(&other)),
        }
    }

    async fn fence_everywhere(&self, id: i64, epoch: i16, queues: Vec<u64>) -> BrokerResult<()> {
        let catalog = self.catalog();
        let alive = |group: &u64| catalog.owner(RaftGroupId(*group)).is_some();
        let fences = queues.into_iter().filter(alive).map(|group| async move {
            // Its leader stamps it.
            let fenced = self.propose(group, entry::fence(0, id, epoch)).await;
            match fenced {
                // A topic deleted meanwhile needs no fence.
                Err(_) if self.catalog().owner(RaftGroupId(group)).is_none() => Ok(()),
                other => other.map(drop),
            }
        });
        join_all(fences).await.into_iter().collect()
    }

    /// Makes sure that a named producer's coordinator knows that it writes to this queue.
    pub(super) async fn attach_producer(
        &self,
        producer: ProducerStamp,
        group: u64,
    ) -> BrokerResult<()> {
        let attachment = (producer.id, producer.epoch, group);
        if !is_named(producer.id) || self.attached.has(&attachment) {
            return Ok(());
        }
        let command = CoordinatorCommand::AttachProducer {
            id: producer.id,
            epoch: producer.epoch,
            queue_group: group,
        };
        match self
            .coordinate(owner_of_producer(producer.id), &command)
            .await
        {
            Ok(CoordinatorReply::Attached) => {
                self.attached.insert(attachment);
                Ok(())
            }
            Ok(CoordinatorReply::Fenced { current }) => Err(BrokerError::FencedProducer {
                id: producer.id.to_string(),
                epoch: producer.epoch.unsigned_abs().into(),
                current: current.unsigned_abs().into(),
            }),
            Ok(CoordinatorReply::UnknownProducer) => Err(BrokerError::InvalidRequest(
                "producer.id and epoch are not ones that POST /v1/producers gave".to_owned(),
            )),
            Ok(other) => Err(unexpected(&other)),
            // The messages themselves were not proposed.
            Err(BrokerError::Timeout { .. } | BrokerError::AnswerLost) => {
                Err(super::route::NO_LEADER)
            }
            Err(error) => Err(error),
        }
    }

    /// Puts a command to a coordinator, wherever it is led.
    pub(super) async fn coordinate(
        &self,
        coordinator: u32,
        command: &CoordinatorCommand,
    ) -> BrokerResult<CoordinatorReply> {
        let catalog = self.catalog();
        let Some(placement) = catalog.coordinators.get(coordinator as usize) else {
            return Err(super::route::NO_LEADER);
        };
        // Plain data into memory: there is no way to fail.
        let body = postcard::to_stdvec(command).unwrap_or_default();
        let reply = self.propose(placement.group, body.into()).await?;
        if reply.is_empty() {
            // Committed, but this leader's own copy of the state broke while it was applied.
            return Err(super::route::UNKNOWN);
        }
        postcard::from_bytes(&reply).map_err(|e| BrokerError::Internal(e.to_string()))
    }
}

pub(super) fn unexpected(reply: &CoordinatorReply) -> BrokerError {
    BrokerError::Internal(format!("unexpected answer of a coordinator: {reply:?}"))
}
