//! What the leader of a coordinator does about its transactions unasked: it goes on with what was
//! decided and not settled, gives up on what was never prepared, has open ones checked when their
//! time comes, and forgets the old ones.
//!
//! One task a node. It sleeps until the next time in the records of the coordinators that are led
//! here, until one of their transactions changes, or for [`LOOK_AGAIN`], in which leaderships may
//! have moved. It keeps nothing that a new leader would miss.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::select_all;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::webhook;
use crate::broker::Broker;
use crate::broker::batcher::now_ms;
use crate::broker::local::LocalCoordinator;
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::transactions::{Transaction, TransactionCommand, TransactionReply};

/// Leaderships are looked at again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Between two attempts at the same transaction, doubling.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Transactions looked at in one go (those that wait for a retry among them), and worked at at the
/// same time.
const PAGE: usize = 4_096;
const AT_ONCE: usize = 64;
/// Changes come in bursts; one look is enough for those of this time.
const GATHER: Duration = Duration::from_millis(20);

/// Attempts under way or to be repeated later.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    running: bool,
    not_before: Instant,
    pause: Duration,
}

type Attempts = Arc<Mutex<HashMap<TransactionId, Attempt>>>;

/// Runs until the broker goes.
pub(in crate::broker) async fn run(broker: Weak<Broker>) {
    let attempts: Attempts = Arc::default();
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let (wake, mut watched) = {
            let Some(broker) = broker.upgrade() else {
                return;
            };
            look(&broker, &attempts, &turns)
        };
        let changed = async {
            // A replica that went away never changes; it is left out at the next look.
            let each = watched.iter_mut().map(|w| {
                Box::pin(async move {
                    if w.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                })
            });
            let each: Vec<_> = each.collect();
            if each.is_empty() {
                std::future::pending::<()>().await;
            }
            select_all(each).await;
            tokio::time::sleep(GATHER).await;
        };
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

/// Starts what is due in the coordinators led here. Gives when to look again, and what to watch.
fn look(
    broker: &Arc<Broker>,
    attempts: &Attempts,
    turns: &Arc<Semaphore>,
) -> (Instant, Vec<tokio::sync::watch::Receiver<()>>) {
    let now = Instant::now();
    let now_ms = now_ms();
    let mut wake = now + LOOK_AGAIN;
    let mut watched = Vec::new();
    attempts
        .lock()
        .retain(|_, attempt| attempt.running || attempt.not_before + RETRY_MAX > now);
    for (number, local) in broker.local.coordinators() {
        if !local.group.is_leader() || local.soundness.broken().is_some() {
            continue;
        }
        let mut changes = local.view.watch_transactions();
        changes.mark_unchanged();
        watched.push(changes);
        match due(&local, now_ms) {
            Ok(found) => {
                for id in found.due {
                    start(broker, number, &local, id, attempts, turns);
                }
                if found.forget {
                    forget(broker, number);
                }
                if let Some(next_ms) = found.next_ms {
                    let left = Duration::from_millis(next_ms.saturating_sub(now_ms));
                    wake = wake.min(now + left.max(GATHER));
                }
            }
            Err(cause) => local.soundness.set_broken(cause),
        }
    }
    (wake, watched)
}

#[derive(Debug, Default)]
struct Due {
    due: Vec<TransactionId>,
    next_ms: Option<u64>,
    forget: bool,
}

fn due(local: &LocalCoordinator, now_ms: u64) -> Result<Due, quorate_storage::StorageError> {
    let mut found = Due::default();
    for (due_ms, id) in local.view.due_transactions(PAGE)? {
        if due_ms > now_ms {
            found.next_ms = Some(due_ms);
            break;
        }
        found.due.push(id);
    }
    let forget_at = local.view.forget_transactions_at()?;
    found.forget = forget_at.is_some_and(|at| at <= now_ms);
    Ok(found)
}

/// Works at one transaction in the background, unless that is being done or was in vain lately.
fn start(
    broker: &Arc<Broker>,
    number: u32,
    local: &Arc<LocalCoordinator>,
    id: TransactionId,
    attempts: &Attempts,
    turns: &Arc<Semaphore>,
) {
    let now = Instant::now();
    let mut known = attempts.lock();
    let pause = match known.get(&id) {
        Some(attempt) if attempt.running || attempt.not_before > now => return,
        Some(attempt) => (attempt.pause * 2).min(RETRY_MAX),
        None => RETRY_MIN,
    };
    // All busy: the next look finds it again.
    let Ok(turn) = turns.clone().try_acquire_owned() else {
        return;
    };
    let running = Attempt {
        running: true,
        not_before: now,
        pause,
    };
    known.insert(id, running);
    let (broker, local, attempts) = (broker.clone(), local.clone(), attempts.clone());
    tokio::spawn(async move {
        let over = broker.work_at(number, &local, id).await;
        let mut known = attempts.lock();
        match over {
            true => drop(known.remove(&id)),
            false => {
                let attempt = Attempt {
                    running: false,
                    not_before: Instant::now() + pause,
                    pause,
                };
                known.insert(id, attempt);
            }
        }
        drop(turn);
    });
}

fn forget(broker: &Arc<Broker>, coordinator: u32) {
    let broker = broker.clone();
    tokio::spawn(async move {
        let forgot = broker.transact_at(coordinator, TransactionCommand::Forget);
        if let Err(error) = forgot.await {
            tracing::debug!(%error, "old transactions were not forgotten");
        }
    });
}

impl Broker {
    /// Does what is due. Whether it is done with: if not, it is tried again later.
    async fn work_at(
        self: &Arc<Self>,
        coordinator: u32,
        local: &LocalCoordinator,
        id: TransactionId,
    ) -> bool {
        let decided = match local.view.transaction(&id) {
            Ok(Some(transaction)) if transaction.decision.is_some() => Some(transaction),
            Ok(Some(_)) => None,
            Ok(None) => return true,
            Err(cause) => {
                local.soundness.set_broken(cause);
                return false;
            }
        };
        if let Some(decided) = decided {
            return self.settle_transaction(&decided).await.done_ms.is_some();
        }
        let due = TransactionCommand::Due { id };
        match self.transact_at(coordinator, due).await {
            Ok(TransactionReply::Is(now)) if now.decision.is_some() => {
                now.done_ms.is_some() || self.settle_transaction(&now).await.done_ms.is_some()
            }
            Ok(TransactionReply::Is(now)) => {
                self.ask_producer(&now).await;
                true
            }
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, "a transaction that is due could not be looked at");
                false
            }
        }
    }

    /// Asks by webhook where one was given.
    async fn ask_producer(self: &Arc<Self>, checked: &Transaction) {
        if checked.checks == 0 {
            return;
        }
        let asked = webhook::ask(&self.config.webhooks, checked, now_ms());
        let Some(decision) = asked.await else {
            return;
        };
        if let Err(error) = self.end_transaction(&checked.id, decision).await {
            tracing::debug!(%error, "a producer's answer to a check came to nothing");
        }
    }
}
