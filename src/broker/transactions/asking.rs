//! Asking producers by webhook what became of their transactions: in the background, those at one
//! address a few at a time. Whoever doesn't answer holds up nothing but the asking there.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::webhook;
use crate::broker::Broker;
use crate::broker::batcher::now_ms;
use crate::broker::local::LocalCoordinator;
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::transactions::{Decision, Transaction};

/// Checks under way at one address; each may take seconds to be answered.
const AT_ONE_ADDRESS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct Asking {
    /// By address. They are few: the operator lists what may be asked.
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
    /// Transactions that are being asked for, or wait for a turn.
    asked: Mutex<HashSet<TransactionId>>,
}

impl Asking {
    /// Has the producer asked, unless that is under way already.
    pub(super) fn start(
        self: &Arc<Self>,
        broker: &Arc<Broker>,
        local: &Arc<LocalCoordinator>,
        checked: &Transaction,
    ) {
        let Some(address) = webhook::address(&broker.config.webhooks, checked) else {
            return;
        };
        let id = checked.id;
        if !self.asked.lock().insert(id) {
            return;
        }
        let mut turns = self.turns.lock();
        let turns = turns
            .entry(address)
            .or_insert_with(|| Arc::new(Semaphore::new(AT_ONE_ADDRESS)))
            .clone();
        let (asking, broker, local) = (self.clone(), broker.clone(), local.clone());
        tokio::spawn(async move {
            let turn = turns.acquire().await;
            let answer = broker.ask_producer(&local, &id).await;
            drop(turn);
            asking.asked.lock().remove(&id);
            let Some(decision) = answer else {
                return;
            };
            if let Err(error) = broker.end_transaction(&id, decision).await {
                tracing::debug!(%error, "a producer's answer to a check came to nothing");
            }
        });
    }
}

impl Broker {
    async fn ask_producer(&self, local: &LocalCoordinator, id: &TransactionId) -> Option<Decision> {
        // Much may have happened while others were asked.
        if !local.group.is_leader() {
            return None;
        }
        let known = local.view.transaction(id).ok().flatten();
        let undecided = known.filter(|transaction| transaction.decision.is_none())?;
        webhook::ask(&self.config.webhooks, &undecided, now_ms()).await
    }
}
