//! The second half: the decision is recorded, then every participant applies it.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::Instant;

use super::{ended, not_found, transaction_text, unexpected};
use crate::broker::queue::entry::{self, TransactionId};
use crate::broker::queue::{Place, decode_settled};
use crate::broker::route::{Backoff, UNKNOWN};
use crate::broker::{Broker, BrokerError, BrokerResult};
use crate::coordinator::transactions::{
    Decision, Transaction, TransactionCommand, TransactionReply,
};
use crate::coordinator::{CoordinatorCommand, CoordinatorReply, owner_of_name};

/// Participants of one transaction that are told the decision at the same time.
const TOLD_AT_ONCE: usize = 32;

/// Which participants are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Telling {
    /// Everyone: somebody waits for it.
    All,
    /// Those that are not known to be out of reach.
    Reachable,
}

impl Broker {
    /// Commits or rolls back. From the moment the decision is recorded it stands; the answer waits
    /// for the participants, and says by its state if some have not applied it in time.
    pub async fn end_transaction(
        self: &Arc<Self>,
        id: &TransactionId,
        decision: Decision,
    ) -> BrokerResult<Transaction> {
        let mut backoff = Backoff::until(Instant::now() + self.config.write_timeout);
        loop {
            let command = TransactionCommand::Decide { id: *id, decision };
            match self.transact(id, command).await? {
                TransactionReply::Is(decided) if decided.done_ms.is_some() => return Ok(*decided),
                TransactionReply::Is(decided) => {
                    return Ok(self.settle_transaction(&decided, Telling::All).await);
                }
                TransactionReply::Ended(transaction) => return Err(ended(&transaction)),
                TransactionReply::NotFound => return Err(not_found(id)),
                TransactionReply::NotPrepared if backoff.wait().await => {}
                TransactionReply::NotPrepared => return Err(busy(id)),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Has every participant apply the decision, once. Gives the transaction as it is then: done,
    /// or with participants that have to be told again.
    pub(super) async fn settle_transaction(
        &self,
        decided: &Transaction,
        telling: Telling,
    ) -> Transaction {
        let id = &decided.id;
        let commit = decided.decision.is_some_and(Decision::is_commit);
        let may_try = |group| telling == Telling::All || self.unreachable.may_try(group);
        let mut queues = decided.unsettled_queues();
        queues.retain(|group| may_try(*group));
        let queues: Vec<_> = stream::iter(queues)
            .map(|group| async move {
                let given_up = decided.given_up(group);
                let settled = self.settle_queue(id, group, commit, &given_up).await;
                self.unreachable.tried(group, settled.is_ok());
                (group, settled)
            })
            .buffer_unordered(TOLD_AT_ONCE)
            .collect()
            .await;
        let groups = decided.unsettled_offsets();
        let groups = groups.filter(|g| self.group_of_offsets(g).is_none_or(may_try));
        let groups: Vec<_> = stream::iter(groups.map(str::to_owned).collect::<Vec<_>>())
            .map(|group| async move {
                let settled = self.settle_offsets(id, &group, commit).await;
                if let Some(raft_group) = self.group_of_offsets(&group) {
                    self.unreachable.tried(raft_group, settled.is_ok());
                }
                (group, settled)
            })
            .buffer_unordered(TOLD_AT_ONCE)
            .collect()
            .await;
        for error in queues.iter().filter_map(|(_, s)| s.as_ref().err()) {
            tracing::debug!(%error, "a queue has not applied a transaction's end yet");
        }
        for error in groups.iter().filter_map(|(_, s)| s.as_ref().err()) {
            tracing::debug!(%error, "a consumer group has not applied a transaction's end yet");
        }
        let queues = queues.into_iter();
        let queues: Vec<_> = queues
            .filter_map(|(group, settled)| Some((group, settled.ok()?)))
            .collect();
        let groups = groups.into_iter();
        let offset_groups: Vec<_> = groups
            .filter_map(|(group, settled)| settled.ok().map(|()| group))
            .collect();
        if queues.is_empty() && offset_groups.is_empty() {
            return decided.clone();
        }
        let command = TransactionCommand::Settled {
            id: *id,
            queues,
            offset_groups,
        };
        match self.transact(id, command).await {
            Ok(TransactionReply::Is(transaction)) => *transaction,
            // The record says less than is true: the duty tells the participants again.
            Ok(other) => {
                tracing::debug!(?other, "the end of a transaction was not recorded");
                decided.clone()
            }
            Err(error) => {
                tracing::debug!(%error, "the end of a transaction was not recorded");
                decided.clone()
            }
        }
    }

    /// The Raft group of the coordinator that has a consumer group's offsets.
    pub(super) fn group_of_offsets(&self, group: &str) -> Option<u64> {
        let catalog = self.catalog();
        let owner = owner_of_name(group, catalog.coordinators.len());
        let placement = catalog.coordinators.get(owner as usize)?;
        Some(placement.group)
    }

    /// Where the parts in this queue are after a commit.
    pub(super) async fn settle_queue(
        &self,
        id: &TransactionId,
        group: u64,
        commit: bool,
        given_up: &[u32],
    ) -> BrokerResult<Vec<(u32, Place)>> {
        if self.is_deleted(group).await {
            return Ok(Vec::new());
        }
        // Its leader stamps it.
        let body = entry::settle(0, id, commit, given_up);
        let proposed = self.propose(group, body).await;
        let reply = match proposed {
            Err(_) if self.is_deleted(group).await => return Ok(Vec::new()),
            other => other?,
        };
        let settled = decode_settled(&reply).ok_or(UNKNOWN)?;
        if settled.commit != commit {
            // Nobody but the coordinator's decision settles, and that never changes.
            let id = transaction_text(id);
            tracing::error!(%id, group, commit, "a queue ended a transaction the other way");
        }
        Ok(settled.parts)
    }

    pub(super) async fn settle_offsets(
        &self,
        id: &TransactionId,
        group: &str,
        commit: bool,
    ) -> BrokerResult<()> {
        let coordinator = owner_of_name(group, self.catalog().coordinators.len());
        let command = CoordinatorCommand::Transaction(TransactionCommand::SettleOffsets {
            id: *id,
            group: group.to_owned(),
            commit,
        });
        match self.coordinate(coordinator, &command).await? {
            CoordinatorReply::Transaction(TransactionReply::OffsetsSettled) => Ok(()),
            other => Err(crate::broker::producers::unexpected(&other)),
        }
    }
}

pub(super) fn busy(id: &TransactionId) -> BrokerError {
    BrokerError::TransactionBusy {
        id: transaction_text(id),
    }
}
