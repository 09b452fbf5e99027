//! The queue's batcher, on its leader: joins what is waiting into one Raft entry.
//!
//! There is no linger: what finds the queue idle is proposed at once. While an entry is on its way
//! the next one gathers, until that entry is done or enough has gathered to be worth an entry
//! ([`BrokerConfig::pipeline_bytes`]); then several are in flight, proposed in order without waiting
//! for each other. So many small requests cost few entries. A batcher begins with the first
//! submission and ends when it has been idle.
//!
//! Invariant: a submission is proposed at most once. Whoever waits for it may withdraw it until it
//! has been taken ([`Claim`]), and knows for certain that it was not stored if that worked.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use quorate_raft::{NodeId, ProposeError};
use quorate_storage::batch::{BatchView, ProducerStamp};
use tokio::sync::{mpsc, oneshot};

use super::backlog::Admission;
use super::config::BrokerConfig;
use super::encode::records_in;
use super::local::{LocalGroups, LocalQueue};
use super::queue::entry::{AppendBuilder, MAX_BATCHES};
use super::queue::{BatchOutcome, decode_outcomes};
use crate::metrics::Metrics;
use crate::peer::NewBatch;

/// Why a submission has no outcomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SubmitError {
    /// Nobody took it.
    NotLeader { leader: Option<NodeId> },
    /// Nobody took it: too much is waiting already.
    Overloaded,
    /// Nobody took it in time.
    NotTaken,
    /// It may be stored or not.
    Unknown,
}

const WAITING: u8 = 0;
const TAKEN: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Decides between the batcher that takes a submission and the waiter that gives up on it.
#[derive(Debug, Default)]
pub(super) struct Claim(AtomicU8);

impl Claim {
    fn settle(&self, to: u8) -> bool {
        let settled = self
            .0
            .compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire);
        settled.is_ok()
    }
}

/// One request's batches for one queue; they go into the same entry.
#[derive(Debug)]
pub(super) struct Submission {
    batches: Vec<NewBatch>,
    bytes: usize,
    claim: Arc<Claim>,
    reply: oneshot::Sender<Result<Vec<BatchOutcome>, SubmitError>>,
    reserved: Reservation,
    admitted: Option<Admission>,
}

/// Bytes counted against the bounds until the submission has its answer.
#[derive(Debug)]
struct Reservation {
    queue: Arc<LocalQueue>,
    node: Arc<AtomicUsize>,
    bytes: usize,
}

impl Reservation {
    fn take(
        queue: &Arc<LocalQueue>,
        groups: &LocalGroups,
        bytes: usize,
        config: &BrokerConfig,
    ) -> Option<Self> {
        let node = groups.queued_bytes.clone();
        let in_queue = queue.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let in_node = node.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let reserved = Self {
            queue: queue.clone(),
            node,
            bytes,
        };
        // Dropped, and so given back, when it does not fit. Alone in the queue, anything fits.
        let fits = in_queue == bytes || in_queue <= config.max_queued_bytes_per_queue;
        (fits && in_node <= config.max_queued_bytes).then_some(reserved)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.queue
            .queued_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
        self.node.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Hands batches to the batcher of a queue that this node leads, and waits for what becomes of them.
pub(super) async fn submit(
    queue: &Arc<LocalQueue>,
    groups: &LocalGroups,
    config: &Arc<BrokerConfig>,
    metrics: &Arc<Metrics>,
    batches: Vec<NewBatch>,
    admitted: Option<Admission>,
    timeout: Duration,
) -> Result<Vec<BatchOutcome>, SubmitError> {
    let bytes = batches.iter().map(|b| b.batch.len() + 64).sum();
    let reserved =
        Reservation::take(queue, groups, bytes, config).ok_or(SubmitError::Overloaded)?;
    let claim = Arc::new(Claim::default());
    let (reply, answer) = oneshot::channel();
    let submission = Submission {
        batches,
        bytes,
        claim: claim.clone(),
        reply,
        reserved,
        admitted,
    };
    send(queue, config, metrics, submission);
    match tokio::time::timeout(timeout, answer).await {
        Ok(Ok(result)) => result,
        // The batcher went away with it: the process or the queue is being shut down.
        Ok(Err(_)) if claim.settle(WITHDRAWN) => Err(SubmitError::NotTaken),
        Ok(Err(_)) => Err(SubmitError::Unknown),
        Err(_) if claim.settle(WITHDRAWN) => Err(SubmitError::NotTaken),
        Err(_) => Err(SubmitError::Unknown),
    }
}

fn send(
    queue: &Arc<LocalQueue>,
    config: &Arc<BrokerConfig>,
    metrics: &Arc<Metrics>,
    submission: Submission,
) {
    let mut running = queue.batcher.lock();
    let submission = match running.as_ref() {
        Some(batcher) => match batcher.send(submission) {
            Ok(()) => return,
            Err(refused) => refused.0,
        },
        None => submission,
    };
    // Unbounded in count, bounded in bytes by the reservations.
    let (tx, rx) = mpsc::unbounded_channel();
    // The receiver is in scope, so the channel is open.
    tx.send(submission).ok();
    *running = Some(tx);
    let batcher = Batcher {
        queue: queue.clone(),
        config: config.clone(),
        metrics: metrics.clone(),
        rx,
        waiting: VecDeque::new(),
        waiting_bytes: 0,
        stamp_ms: 0,
    };
    tokio::spawn(batcher.run());
}

struct Batcher {
    queue: Arc<LocalQueue>,
    config: Arc<BrokerConfig>,
    metrics: Arc<Metrics>,
    rx: mpsc::UnboundedReceiver<Submission>,
    /// Received and not yet in an entry.
    waiting: VecDeque<Submission>,
    waiting_bytes: usize,
    /// Of the last entry; stamps never go back.
    stamp_ms: u64,
}

type Proposal = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Batcher {
    async fn run(mut self) {
        let mut in_flight: FuturesUnordered<Proposal> = FuturesUnordered::new();
        loop {
            while let Ok(submission) = self.rx.try_recv() {
                self.receive(submission);
            }
            if self.is_due(in_flight.len()) {
                // Polled once before the next is made: this is what keeps entries in order.
                if let Some(mut proposal) = self.next_entry()
                    && futures_util::poll!(&mut proposal).is_pending()
                {
                    in_flight.push(proposal);
                }
                continue;
            }
            tokio::select! {
                biased;
                Some(()) = in_flight.next(), if !in_flight.is_empty() => {}
                received = tokio::time::timeout(self.config.batcher_idle, self.rx.recv()) => {
                    match received {
                        Ok(Some(submission)) => self.receive(submission),
                        Ok(None) => return,
                        Err(_) if in_flight.is_empty() => match self.last_look() {
                            Some(submission) => self.receive(submission),
                            None => return,
                        },
                        Err(_) => {}
                    }
                }
            }
        }
    }

    fn receive(&mut self, submission: Submission) {
        self.waiting_bytes += submission.bytes;
        self.waiting.push_back(submission);
    }

    /// Whether what is waiting should be proposed beside that many entries under way.
    fn is_due(&self, in_flight: usize) -> bool {
        match in_flight {
            _ if self.waiting.is_empty() => false,
            0 => true,
            entries if entries >= self.config.max_entries_in_flight => false,
            _ => self.waiting_bytes >= self.config.pipeline_bytes,
        }
    }

    /// Ends the batcher unless something came in at the last moment.
    fn last_look(&mut self) -> Option<Submission> {
        let queue = self.queue.clone();
        let mut running = queue.batcher.lock();
        let last = self.rx.try_recv().ok();
        if last.is_none() {
            *running = None;
        }
        last
    }

    /// Joins what is waiting, as far as it fits; none if all of that was withdrawn.
    fn next_entry(&mut self) -> Option<Proposal> {
        let mut taken: Vec<Submission> = Vec::new();
        let (mut batches, mut bytes) = (0, 0);
        while let Some(next) = self.waiting.front() {
            let fits = bytes + next.bytes <= self.config.max_entry_bytes
                && batches + next.batches.len() <= MAX_BATCHES;
            if !taken.is_empty() && !fits {
                break;
            }
            let Some(submission) = self.waiting.pop_front() else {
                break;
            };
            self.waiting_bytes -= submission.bytes;
            if submission.claim.settle(TAKEN) {
                batches += submission.batches.len();
                bytes += submission.bytes;
                taken.push(submission);
            }
        }
        if taken.is_empty() {
            return None;
        }
        self.stamp_ms = now_ms()
            .max(self.stamp_ms)
            .max(self.queue.shared.last_stamp_ms());
        let mut entry = AppendBuilder::new(self.stamp_ms, batches, bytes);
        let mut waiters = Vec::with_capacity(taken.len());
        let mut messages = 0;
        for submission in taken {
            let from = entry.count();
            for new in &submission.batches {
                // Batches were validated where they came in; what is none would be left out, and
                // its waiter told so by the number of outcomes.
                entry.push(&new.mark, new.hold.as_ref(), &new.batch);
                messages += u64::from(records_in(&new.batch));
            }
            let places = usize::from(from)..usize::from(entry.count());
            let expected = submission.batches.len();
            let held = (submission.reserved, submission.admitted);
            waiters.push((submission.reply, places, expected, held));
        }
        let group = self.queue.group.clone();
        let body = entry.finish();
        self.metrics.observe_entry(messages, body.len() as u64);
        Some(Box::pin(async move {
            let result = group.propose(body).await;
            let outcomes = match result {
                Ok((_, reply)) => decode_outcomes(&reply).ok_or(SubmitError::Unknown),
                Err(ProposeError::NotLeader { leader }) => Err(SubmitError::NotLeader { leader }),
                Err(ProposeError::Closed) => Err(SubmitError::NotLeader { leader: None }),
                Err(ProposeError::Unknown(reason)) => {
                    tracing::debug!(group = %group.id(), %reason, "fate of an entry unknown");
                    Err(SubmitError::Unknown)
                }
            };
            for (reply, places, expected, held) in waiters {
                // Before the answer: who has it finds room for the next one.
                drop(held);
                let answer = match &outcomes {
                    Ok(all) => match all.get(places) {
                        Some(own) if own.len() == expected => Ok(own.to_vec()),
                        _ => Err(SubmitError::Unknown),
                    },
                    Err(error) => Err(error.clone()),
                };
                reply.send(answer).ok();
            }
        }))
    }
}

/// Of a batch that has been validated.
pub(super) fn producer_of(batch: &Bytes) -> Option<ProducerStamp> {
    BatchView::parse_trusted(batch.clone()).ok()?.producer()
}

/// Milliseconds since 1970 by this node's clock.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 counts as 1970; stamps never go back anyway.
    since.map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_is_either_taken_or_withdrawn() {
        let claim = Claim::default();
        assert!(claim.settle(TAKEN));
        assert!(!claim.settle(WITHDRAWN));
        let claim = Claim::default();
        assert!(claim.settle(WITHDRAWN));
        assert!(!claim.settle(TAKEN));
    }
}
