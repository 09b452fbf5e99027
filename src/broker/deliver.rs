//! Delivering delayed messages: the leader of their queue proposes it when they are due.
//!
//! One task per node looks at the due times that the queues' state machines publish, and sleeps until
//! the next one or until it is told of an earlier one. What is due is known to every replica, so
//! whoever leads next goes on by itself. A queue that sleeps needs no waking: an entry is all it takes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::Broker;
use super::batcher::now_ms;
use super::local::LocalQueue;
use super::queue::{decode_delivered, entry};

/// Batches one entry makes visible: what each replica applies in a few milliseconds.
const PER_ENTRY: u16 = 1024;
/// While something is due that another node has to deliver, or that could not be delivered.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How late something is when its leader is asked whether it is there.
const SUSPICIOUS_MS: u64 = 500;
/// The clock of the machine may be set while this waits for a time.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// With nothing to wait for.
const IDLE_WAIT: Duration = Duration::from_secs(60);

/// Delivers what is due in the queues led here, until the broker goes.
pub(super) fn start(broker: &Arc<Broker>) {
    let told = broker.local.due_earlier.clone();
    let broker = Arc::downgrade(broker);
    tokio::spawn(async move {
        loop {
            let Some(alive) = broker.upgrade() else {
                return;
            };
            let wait = alive.deliver_due();
            drop(alive);
            timeout(wait, told.notified()).await.ok();
        }
    });
}

impl Broker {
    /// Begins to deliver what is due, and says how long there is nothing more to do.
    fn deliver_due(&self) -> Duration {
        let now_ms = now_ms();
        let mut wait = IDLE_WAIT;
        for queue in self.local.queues() {
            let Some(due_ms) = queue.shared.next_due_ms() else {
                continue;
            };
            if due_ms > now_ms {
                let until = Duration::from_millis(due_ms - now_ms);
                wait = wait.min(until).min(LONGEST_WAIT);
            } else if !queue.group.is_leader() {
                wait = wait.min(LOOK_AGAIN);
                if due_ms.saturating_add(SUSPICIOUS_MS) <= now_ms {
                    let group = queue.group.clone();
                    tokio::spawn(async move { group.check_leader().await });
                }
            } else if !queue.delivering.swap(true, Ordering::AcqRel) {
                tokio::spawn(self.deliver(queue));
            }
        }
        wait
    }

    /// Delivers what is due in one queue, entry by entry.
    fn deliver(&self, queue: Arc<LocalQueue>) -> impl Future<Output = ()> + Send + use<> {
        let patience = self.config.write_timeout;
        let (log, metrics) = (self.log.clone(), self.metrics.clone());
        let told: Arc<Notify> = self.local.due_earlier.clone();
        async move {
            loop {
                let now_ms = now_ms();
                if queue.shared.next_due_ms().is_none_or(|due| due > now_ms) {
                    break;
                }
                let body = entry::deliver(now_ms, PER_ENTRY);
                let proposed = match log.disk_has_room() {
                    true => timeout(patience, queue.group.propose(body)).await.ok(),
                    false => None,
                };
                let reply = proposed.and_then(Result::ok);
                match reply.and_then(|(_, reply)| decode_delivered(&reply)) {
                    Some(batches) => metrics.observe_delivered(batches.into()),
                    None => {
                        // Not the leader any more, no majority, no room: whoever can goes on.
                        sleep(LOOK_AGAIN).await;
                        break;
                    }
                }
            }
            queue.delivering.store(false, Ordering::Release);
            told.notify_one();
        }
    }
}
