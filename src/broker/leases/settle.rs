//! What consumers say of what they hold, and how the group retries.

use std::time::Duration;

use tokio::time::Instant;

use super::{LeaseView, ReceiptResult, broken, decode_receipt, not_leased};
use crate::broker::offsets::check_group_name;
use crate::broker::producers::unexpected;
use crate::broker::route::once_begun;
use crate::broker::{Broker, BrokerError, BrokerResult, TraceKind};
use crate::coordinator::leases::{
    LeaseCommand, LeaseCounts, LeaseReply, Receipt, ReceiptVerdict, RetryPolicy,
};
use crate::coordinator::{CoordinatorReply, QueueOffset};
use crate::peer::{PeerError, PeerRequest, PeerResult};

impl Broker {
    /// Says that messages are done: the receipts', then all that the consumer of `through` holds up
    /// to it in its queue. A result for each, in order.
    pub async fn ack(
        &self,
        group: &str,
        receipts: &[String],
        through: Option<&String>,
    ) -> BrokerResult<Vec<ReceiptResult>> {
        let mut all = decoded(group, receipts);
        let through = through.map(|text| decode_receipt(group, text));
        let command = LeaseCommand::Ack {
            receipts: all.iter().flatten().copied().collect(),
            through: through.as_ref().and_then(|r| r.as_ref().ok()).copied(),
        };
        all.extend(through);
        self.settle_receipts(group, all, command, Some(TraceKind::Acked))
            .await
    }

    /// Gives messages back, to be delivered again after the delay or as the retry policy says.
    pub async fn nack(
        &self,
        group: &str,
        receipts: &[String],
        delay_ms: Option<u64>,
    ) -> BrokerResult<Vec<ReceiptResult>> {
        let all = decoded(group, receipts);
        let command = LeaseCommand::Nack {
            receipts: all.iter().flatten().copied().collect(),
            delay_ms,
        };
        self.settle_receipts(group, all, command, Some(TraceKind::Nacked))
            .await
    }

    /// Lets leases end so long after now.
    pub async fn extend(
        &self,
        group: &str,
        receipts: &[String],
        lease_ms: u64,
    ) -> BrokerResult<Vec<ReceiptResult>> {
        let all = decoded(group, receipts);
        let command = LeaseCommand::Extend {
            receipts: all.iter().flatten().copied().collect(),
            lease_ms,
        };
        self.settle_receipts(group, all, command, None).await
    }

    async fn settle_receipts(
        &self,
        group: &str,
        receipts: Vec<BrokerResult<Receipt>>,
        command: LeaseCommand,
        trace: Option<TraceKind>,
    ) -> BrokerResult<Vec<ReceiptResult>> {
        check_group_name(group)?;
        if receipts.iter().all(Result::is_err) {
            // None of them is the group's, and it may be one that can have none.
            if let Err(conflict @ BrokerError::GroupModeConflict { .. }) =
                self.lease_view(group).await
            {
                return Err(conflict);
            }
            let errors = receipts.into_iter().map(|receipt| receipt.map(|_| None));
            return Ok(errors.collect());
        }
        let verdicts = match self.lease_command(group, command).await? {
            LeaseReply::Receipts(verdicts) => verdicts,
            other => return Err(unexpected(&CoordinatorReply::Leases(other))),
        };
        let mut verdicts = verdicts.into_iter();
        let results = receipts.into_iter().map(|receipt| {
            let receipt = receipt?;
            match verdicts.next() {
                Some(ReceiptVerdict::Done) => {
                    if let Some(kind) = trace {
                        self.trace_settled(kind, group, &receipt);
                    }
                    Ok(None)
                }
                Some(ReceiptVerdict::Acked(count)) => {
                    self.trace_settled(TraceKind::AckedThrough, group, &receipt);
                    Ok(Some(count))
                }
                Some(ReceiptVerdict::Ended) => Err(BrokerError::LeaseExpired {
                    queue: receipt.queue,
                    offset: receipt.offset,
                }),
                None => Err(BrokerError::Internal(
                    "a receipt without a verdict".to_owned(),
                )),
            }
        });
        Ok(results.collect())
    }

    /// Settles how often the group's messages are delivered, and when again after a nack.
    pub async fn set_retry_policy(&self, group: &str, policy: RetryPolicy) -> BrokerResult<()> {
        check_group_name(group)?;
        let command = LeaseCommand::SetPolicy(policy);
        self.lease_command(group, command).await.map(drop)
    }

    /// Lets a group that leases go on at these offsets.
    pub(in crate::broker) async fn seek_leases(
        &self,
        group: &str,
        offsets: Vec<QueueOffset>,
    ) -> BrokerResult<()> {
        let mut rest = offsets;
        let mut begun = false;
        while !rest.is_empty() {
            let offsets = rest.clone();
            let step = self.lease_command(group, LeaseCommand::Seek { offsets });
            let step = step.await;
            let queues = match step.map_err(|e| if begun { once_begun(e) } else { e })? {
                LeaseReply::Sought { queues } if queues > 0 => queues as usize,
                other => return Err(unexpected(&CoordinatorReply::Leases(other))),
            };
            rest.drain(..queues.min(rest.len()));
            begun = true;
        }
        Ok(())
    }

    /// The group's retry policy and what it has in flight, proved to be the newest.
    pub async fn lease_view(&self, group: &str) -> BrokerResult<LeaseView> {
        check_group_name(group)?;
        let (coordinator, raft_group) = self.lease_coordinator(group)?;
        match self.lease_view_here(coordinator, group).await {
            Ok(view) => return Ok(view),
            Err(PeerError::Broker(error)) => return Err(error),
            Err(_) => {}
        }
        let request = PeerRequest::LeaseView {
            coordinator,
            consumer_group: group.to_owned(),
        };
        self.ask_replicas(raft_group, &request, Duration::ZERO)
            .await
    }

    /// What a group that leases has in flight, with the topics' names; deleted topics have none.
    pub async fn in_flight(&self, group: &str) -> BrokerResult<Vec<(String, LeaseCounts)>> {
        let view = self.lease_view(group).await?;
        let catalog = self.catalog();
        let named = view.queues.into_iter().filter_map(|counts| {
            let topic = catalog.topics.get(&counts.topic)?;
            Some((topic.name.clone(), counts))
        });
        let mut named: Vec<_> = named.collect();
        named.sort_by(|(a, x), (b, y)| (a, x.queue).cmp(&(b, y.queue)));
        Ok(named)
    }

    /// [`Self::lease_view`] from this node's replica of the coordinator.
    pub(crate) async fn lease_view_here(
        &self,
        coordinator: u32,
        group: &str,
    ) -> PeerResult<LeaseView> {
        let local = self.local.coordinator(coordinator);
        let local = local.ok_or(PeerError::NotHere)?;
        if local.soundness.broken().is_some() {
            return Err(PeerError::NotHere);
        }
        let deadline = Instant::now() + self.config.read_timeout;
        let proof = self.barrier(&local.group, deadline).await;
        proof.map_err(PeerError::Broker)?;
        let state = local.view.lease_group(group);
        let Some(state) = state.map_err(|cause| broken(&local, cause))? else {
            return Err(not_leased(&local, group));
        };
        let queues = local.view.lease_counts(group);
        Ok(LeaseView {
            policy: state.policy,
            queues: queues.map_err(|cause| broken(&local, cause))?,
        })
    }
}

fn decoded(group: &str, receipts: &[String]) -> Vec<BrokerResult<Receipt>> {
    let each = receipts.iter();
    each.map(|text| decode_receipt(group, text)).collect()
}
