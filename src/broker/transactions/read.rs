//! Looking at transactions: one of them, or those that are to be checked.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use super::not_found;
use crate::broker::queue::entry::TransactionId;
use crate::broker::route::NO_LEADER;
use crate::broker::{Broker, BrokerError, BrokerResult};
use crate::coordinator::owner_of_name;
use crate::coordinator::transactions::{Transaction, TransactionFilter};
use crate::peer::{PeerError, PeerRequest, PeerResult};

/// What a coordinator is asked about its transactions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum TransactionQuery {
    One(TransactionId),
    /// Answered when there is one, or when the time is over.
    List {
        filter: TransactionFilter,
        wait_ms: u64,
    },
}

impl TransactionQuery {
    fn wait(&self) -> Duration {
        match self {
            Self::One(_) => Duration::ZERO,
            Self::List { wait_ms, .. } => Duration::from_millis(*wait_ms),
        }
    }
}

impl Broker {
    pub async fn transaction(&self, id: &TransactionId) -> BrokerResult<Transaction> {
        let coordinator = self.owner_of_transaction(id)?;
        let found = self.query_transactions(coordinator, TransactionQuery::One(*id));
        found.await?.pop().ok_or_else(|| not_found(id))
    }

    /// The oldest first. Waits until there is one, at most `wait_ms`.
    pub async fn transactions(
        &self,
        filter: TransactionFilter,
        wait_ms: u64,
    ) -> BrokerResult<Vec<Transaction>> {
        let coordinators = self.catalog().coordinators.len();
        let asked: Vec<u32> = match &filter.producer_group {
            Some(group) => vec![owner_of_name(group, coordinators)],
            None => (0..coordinators as u32).collect(),
        };
        let query = |coordinator, wait_ms| {
            let filter = filter.clone();
            self.query_transactions(coordinator, TransactionQuery::List { filter, wait_ms })
        };
        // All are looked at first: an answer leaves out none that is there already.
        let there = join_all(asked.iter().map(|c| query(*c, 0))).await;
        let mut found: Vec<Transaction> = Vec::new();
        for transactions in there {
            found.extend(transactions?);
        }
        if found.is_empty() && wait_ms > 0 {
            let waiting = asked.iter().map(|c| query(*c, wait_ms));
            let mut waiting: FuturesUnordered<_> = waiting.collect();
            while let Some(transactions) = waiting.next().await {
                found = transactions?;
                if !found.is_empty() {
                    break;
                }
            }
        }
        found.sort_by_key(|t| (t.created_ms, t.id));
        // Seen in two states while it changed.
        found.dedup_by_key(|t| t.id);
        found.truncate(filter.limit as usize);
        Ok(found)
    }

    async fn query_transactions(
        &self,
        coordinator: u32,
        query: TransactionQuery,
    ) -> BrokerResult<Vec<Transaction>> {
        match self.transactions_here(coordinator, &query).await {
            Ok(found) => return Ok(found),
            Err(PeerError::Broker(error)) if !error.retryable() => return Err(error),
            Err(_) => {}
        }
        let catalog = self.catalog();
        let placement = catalog.coordinators.get(coordinator as usize);
        let group = placement.ok_or(NO_LEADER)?.group;
        let wait = query.wait();
        let request = PeerRequest::Transactions { coordinator, query };
        self.ask_replicas(group, &request, wait).await
    }

    /// The same from this node's replica of the coordinator.
    pub(crate) async fn transactions_here(
        &self,
        coordinator: u32,
        query: &TransactionQuery,
    ) -> PeerResult<Vec<Transaction>> {
        let Some(local) = self.local.coordinator(coordinator) else {
            return Err(PeerError::NotHere);
        };
        if local.soundness.broken().is_some() {
            return Err(PeerError::NotHere);
        }
        let now = Instant::now();
        let mut changed = local.view.watch_transactions();
        let proof = self.barrier(&local.group, now + self.config.read_timeout);
        proof.await.map_err(PeerError::Broker)?;
        let deadline = now + query.wait();
        loop {
            changed.mark_unchanged();
            let found = match query {
                TransactionQuery::One(id) => local.view.transaction(id).map(Vec::from_iter),
                TransactionQuery::List { filter, .. } => local.view.transactions(filter),
            };
            let found = found.map_err(|cause| {
                local.soundness.set_broken(cause);
                PeerError::NotHere
            })?;
            if !found.is_empty() || Instant::now() >= deadline {
                return Ok(found);
            }
            match timeout_at(deadline, changed.changed()).await {
                Ok(Ok(())) => {}
                // Another replica may know more.
                Ok(Err(_)) => return Err(PeerError::Broker(BrokerError::ShuttingDown)),
                Err(_) => return Ok(found),
            }
        }
    }
}
