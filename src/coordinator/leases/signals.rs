//! What apply tells those who wait on this node: consumers for messages, the duty for its time.
//!
//! None of it is state. Whoever begins to wait looks at the state first.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

/// What a waiting consumer wants to hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interest {
    /// A message may be due, or earlier than before.
    Free,
    /// Something was acked, nacked or dropped.
    Settled,
}

/// More than this are looked through for those that nobody waits for.
const WAITING_KEPT: usize = 1024;

/// One coordinator's signals on this node.
#[derive(Debug)]
pub struct LeaseSignals {
    waiting: Mutex<HashMap<(String, Interest), watch::Sender<u64>>>,
    /// When the duty looks again.
    alarm_ms: AtomicU64,
    duty: Notify,
}

impl Default for LeaseSignals {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            alarm_ms: AtomicU64::new(u64::MAX),
            duty: Notify::new(),
        }
    }
}

impl LeaseSignals {
    /// Changes when something happens to the group.
    pub fn subscribe(&self, group: &str, interest: Interest) -> watch::Receiver<u64> {
        let mut waiting = self.waiting.lock();
        if waiting.len() > WAITING_KEPT {
            waiting.retain(|_, sender| sender.receiver_count() > 0);
        }
        waiting
            .entry((group.to_owned(), interest))
            .or_default()
            .subscribe()
    }

    fn tell(&self, group: &str, interest: Interest) {
        let mut waiting = self.waiting.lock();
        if waiting.is_empty() {
            return;
        }
        let key = (group.to_owned(), interest);
        let gone = waiting.get(&key).is_some_and(|sender| {
            sender.send_modify(|count| *count += 1);
            sender.receiver_count() == 0
        });
        if gone {
            waiting.remove(&key);
        }
    }

    /// Makes the duty look at `due_ms` or earlier.
    pub fn alarm(&self, due_ms: u64) {
        if due_ms < self.alarm_ms.fetch_min(due_ms, Ordering::AcqRel) {
            self.duty.notify_one();
        }
    }

    /// The duty has nothing to do before the alarms that are set from here on.
    pub fn disarm(&self) {
        self.alarm_ms.store(u64::MAX, Ordering::Release);
    }

    /// Adds what the duty found itself.
    pub fn arm(&self, due_ms: u64) {
        self.alarm_ms.fetch_min(due_ms, Ordering::AcqRel);
    }

    pub fn alarm_ms(&self) -> u64 {
        self.alarm_ms.load(Ordering::Acquire)
    }

    /// An alarm was set that is earlier than the ones before.
    pub async fn alarmed(&self) {
        self.duty.notified().await;
    }
}

/// What one command has to tell, once its changes can be seen.
#[derive(Debug, Default)]
pub(in crate::coordinator) struct News {
    group: Option<String>,
    freed: bool,
    settled: bool,
    alarm_ms: Option<u64>,
}

impl News {
    pub(super) fn about(&mut self, group: &str) {
        self.group = Some(group.to_owned());
    }

    pub(super) fn freed(&mut self) {
        self.freed = true;
        self.settled = true;
    }

    pub(super) fn settled(&mut self) {
        self.settled = true;
    }

    /// At `due_ms` there is something for the duty. 0: now.
    pub(super) fn alarm(&mut self, due_ms: u64) {
        let earlier = self.alarm_ms.map_or(due_ms, |known| known.min(due_ms));
        self.alarm_ms = Some(earlier);
    }

    pub(in crate::coordinator) fn publish(&mut self, signals: &LeaseSignals) {
        let news = std::mem::take(self);
        let Some(group) = news.group else {
            return;
        };
        if news.freed {
            signals.tell(&group, Interest::Free);
        }
        if news.settled {
            signals.tell(&group, Interest::Settled);
        }
        if let Some(due_ms) = news.alarm_ms {
            signals.alarm(due_ms);
        }
    }
}
