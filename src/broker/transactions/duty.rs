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
use quorate_storage::StorageError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::asking::Asking;
use super::end::Telling;
use crate::broker::Broker;
use crate::broker::batcher::now_ms;
use crate::broker::local::LocalCoordinator;
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::CoordinatorView;
use crate::coordinator::transactions::{Duty, Transaction, TransactionCommand, TransactionReply};

/// Leaderships are looked at again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Between two attempts at the same transaction, doubling.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Transactions read in one go.
const PAGE: usize = 4_096;
/// Transactions worked at at the same time, for each of the duties.
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

impl Attempt {
    /// Nothing is to be done now.
    fn waits(&self, now: Instant) -> bool {
        self.running || self.not_before > now
    }
}

type Attempts = Arc<Mutex<HashMap<TransactionId, Attempt>>>;

/// The work under way, and what bounds it.
#[derive(Debug, Clone)]
struct Work {
    attempts: Attempts,
    looking: Arc<Semaphore>,
    /// Apart from looking: a queue that can't be told must not keep any transaction from being
    /// checked.
    telling: Arc<Semaphore>,
    asking: Arc<Asking>,
}

impl Work {
    fn new() -> Self {
        Self {
            attempts: Arc::default(),
            looking: Arc::new(Semaphore::new(AT_ONCE)),
            telling: Arc::new(Semaphore::new(AT_ONCE)),
            asking: Arc::default(),
        }
    }

    fn turn(&self, duty: Duty) -> Option<OwnedSemaphorePermit> {
        let turns = match duty {
            Duty::Look => &self.looking,
            Duty::Tell => &self.telling,
        };
        turns.clone().try_acquire_owned().ok()
    }
}

/// Runs until the broker goes.
pub(in crate::broker) async fn run(broker: Weak<Broker>) {
    let work = Work::new();
    loop {
        let (wake, mut watched) = {
            let Some(broker) = broker.upgrade() else {
                return;
            };
            look(&broker, &work)
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
fn look(broker: &Arc<Broker>, work: &Work) -> (Instant, Vec<tokio::sync::watch::Receiver<()>>) {
    let now = Instant::now();
    let now_ms = now_ms();
    let mut wake = now + LOOK_AGAIN;
    let mut watched = Vec::new();
    work.attempts
        .lock()
        .retain(|_, attempt| attempt.running || attempt.not_before + RETRY_MAX > now);
    for (number, local) in broker.local.coordinators() {
        if !local.group.is_leader() || local.soundness.broken().is_some() {
            continue;
        }
        let mut changes = local.view.watch_transactions();
        changes.mark_unchanged();
        watched.push(changes);
        for duty in [Duty::Look, Duty::Tell] {
            match due(&local.view, duty, &work.attempts, now_ms, PAGE) {
                Ok(found) => {
                    for id in found.due {
                        if !start(broker, number, &local, duty, id, work) {
                            break;
                        }
                    }
                    if let Some(next_ms) = found.next_ms {
                        let left = Duration::from_millis(next_ms.saturating_sub(now_ms));
                        wake = wake.min(now + left.max(GATHER));
                    }
                }
                Err(cause) => local.soundness.set_broken(cause),
            }
        }
        match local.view.forget_transactions_at() {
            Ok(at) if at.is_some_and(|at| at <= now_ms) => forget(broker, number),
            Ok(_) => {}
            Err(cause) => local.soundness.set_broken(cause),
        }
    }
    (wake, watched)
}

#[derive(Debug, Default)]
struct Due {
    due: Vec<TransactionId>,
    next_ms: Option<u64>,
}

/// What is due. However many there are that wait for their next attempt, something behind them is
/// found.
fn due(
    view: &CoordinatorView,
    duty: Duty,
    attempts: &Attempts,
    now_ms: u64,
    page: usize,
) -> Result<Due, StorageError> {
    let now = Instant::now();
    let mut found = Due::default();
    let mut after = None;
    loop {
        let read = view.due_transactions(duty, after, page)?;
        let known = attempts.lock();
        for (due_ms, id) in &read {
            if *due_ms > now_ms {
                found.next_ms = Some(*due_ms);
                break;
            }
            if !known.get(id).is_some_and(|attempt| attempt.waits(now)) {
                found.due.push(*id);
            }
        }
        after = read.last().copied();
        if read.len() < page || found.next_ms.is_some() || !found.due.is_empty() {
            break;
        }
    }
    Ok(found)
}

/// Works at one transaction in the background, unless that is being done or was in vain lately.
/// False: there is no turn for more; the next look finds it again.
fn start(
    broker: &Arc<Broker>,
    number: u32,
    local: &Arc<LocalCoordinator>,
    duty: Duty,
    id: TransactionId,
    work: &Work,
) -> bool {
    let now = Instant::now();
    let mut known = work.attempts.lock();
    let pause = match known.get(&id) {
        Some(attempt) if attempt.waits(now) => return true,
        Some(attempt) => (attempt.pause * 2).min(RETRY_MAX),
        None => RETRY_MIN,
    };
    let in_vain = move |now| Attempt {
        running: false,
        not_before: now + pause,
        pause,
    };
    // It takes no turn from those that can go on.
    if duty == Duty::Tell && broker.can_tell_nobody(local, &id) {
        known.insert(id, in_vain(now));
        return true;
    }
    let Some(turn) = work.turn(duty) else {
        return false;
    };
    let running = Attempt {
        running: true,
        not_before: now,
        pause,
    };
    known.insert(id, running);
    let (broker, local, work) = (broker.clone(), local.clone(), work.clone());
    tokio::spawn(async move {
        let worked = broker.work_at(number, &local, id).await;
        drop(turn);
        let mut known = work.attempts.lock();
        match &worked {
            Worked::Done | Worked::Ask(_) => drop(known.remove(&id)),
            Worked::InVain => drop(known.insert(id, in_vain(Instant::now()))),
        }
        drop(known);
        if let Worked::Ask(checked) = worked {
            work.asking.start(&broker, &local, &checked);
        }
    });
    true
}

/// What came of an attempt.
enum Worked {
    Done,
    /// It is tried again later.
    InVain,
    /// A check was counted: whoever began it may be asked.
    Ask(Box<Transaction>),
}

impl From<Transaction> for Worked {
    fn from(decided: Transaction) -> Self {
        match decided.done_ms {
            Some(_) => Self::Done,
            None => Self::InVain,
        }
    }
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
    /// Does what is due, but for asking the producer.
    async fn work_at(
        self: &Arc<Self>,
        coordinator: u32,
        local: &LocalCoordinator,
        id: TransactionId,
    ) -> Worked {
        let decided = match local.view.transaction(&id) {
            Ok(Some(transaction)) if transaction.decision.is_some() => Some(transaction),
            Ok(Some(_)) => None,
            Ok(None) => return Worked::Done,
            Err(cause) => {
                local.soundness.set_broken(cause);
                return Worked::InVain;
            }
        };
        if let Some(decided) = decided {
            return self
                .settle_transaction(&decided, Telling::Reachable)
                .await
                .into();
        }
        let due = TransactionCommand::Due { id };
        match self.transact_at(coordinator, due).await {
            Ok(TransactionReply::Is(now)) if now.decision.is_some() => match now.done_ms {
                Some(_) => Worked::Done,
                None => self
                    .settle_transaction(&now, Telling::Reachable)
                    .await
                    .into(),
            },
            Ok(TransactionReply::Is(now)) if now.checks > 0 && now.check_url.is_some() => {
                Worked::Ask(now)
            }
            Ok(_) => Worked::Done,
            Err(error) => {
                tracing::debug!(%error, "a transaction that is due could not be looked at");
                Worked::InVain
            }
        }
    }

    /// All that would have to be told are out of reach.
    fn can_tell_nobody(&self, local: &LocalCoordinator, id: &TransactionId) -> bool {
        // What can't be read is looked at by who works at it.
        let Ok(Some(decided)) = local.view.transaction(id) else {
            return false;
        };
        let groups = decided
            .unsettled_offsets()
            .filter_map(|g| self.group_of_offsets(g));
        let mut all = decided.unsettled_queues().into_iter().chain(groups);
        all.all(|group| self.unreachable.is_down(group))
    }
}

#[cfg(test)]
mod tests {
    use quorate_raft::StateMachine;
    use quorate_storage::derived::DerivedStore;
    use quorate_storage::{LogId, RaftGroupId};

    use super::*;
    use crate::coordinator::transactions::{NewTransaction, Timing};
    use crate::coordinator::{CoordinatorCommand, CoordinatorMachine, stamp};

    #[tokio::test]
    async fn those_that_cannot_be_settled_hide_nothing_behind_them() {
        let store = DerivedStore::in_memory();
        let group = store.group(RaftGroupId(16));
        let mut machine = CoordinatorMachine::new(0, group, Arc::default());
        machine.restore(None, None).unwrap();
        for n in 1..=5 {
            let new = NewTransaction {
                producer_group: "p".to_owned(),
                timing: Timing {
                    timeout_ms: 1,
                    check_interval_ms: 1,
                    max_checks: 1,
                },
                check_url: None,
                parts: Vec::new(),
                offset_groups: Vec::new(),
                prepare_ms: 1,
            };
            let id = [n; 16];
            let begin = CoordinatorCommand::Transaction(TransactionCommand::Begin { id, new });
            let body = stamp(n.into(), &postcard::to_stdvec(&begin).unwrap());
            machine.apply(LogId::new(1, n.into()), &body);
        }
        let running = Attempt {
            running: true,
            not_before: Instant::now(),
            pause: RETRY_MIN,
        };
        let attempts: Attempts = Arc::default();
        let found = |now_ms| due(&machine.view(), Duty::Look, &attempts, now_ms, 2).unwrap();
        assert_eq!(found(100).due, [[1; 16], [2; 16]]);
        for n in 1..=4 {
            attempts.lock().insert([n; 16], running);
        }
        assert_eq!(found(100).due, [[5; 16]]);
        let early = found(5);
        assert_eq!((early.due, early.next_ms), (Vec::new(), Some(6)));
    }
}
