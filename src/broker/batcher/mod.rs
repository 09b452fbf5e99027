//! The queue's batcher, on its leader: joins what is waiting into one Raft entry.
//!
//! There is no linger: what finds the queue idle is proposed at once. While an entry is on its way
//! the next one gathers, until that entry is done or enough has gathered to be worth an entry
//! ([`BrokerConfig::pipeline_bytes`]); then several are in flight, proposed in order without waiting
//! for each other. So many small requests cost few entries. A batcher begins with the first
//! submission and ends when it has been idle.
//!
//! Invariant: a submission is proposed again only after apply has said that it was not stored (its
//! producer's requests overtook each other, see [`reorder`]). Whoever waits for it may withdraw it
//! while it is not in an entry ([`Claim`]), and knows for certain that it was not stored if that
//! worked.

mod reorder;
mod run;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use quorate_raft::NodeId;
use quorate_storage::batch::{BatchView, ProducerStamp};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::backlog::Admission;
use super::config::BrokerConfig;
use super::encode::records_in;
use super::local::{LocalGroups, LocalQueue};
use super::queue::{BatchOutcome, advance};
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

    /// It was taken and is not stored: it can be withdrawn again.
    fn reopen(&self) {
        self.0.store(WAITING, Ordering::Release);
    }
}

/// Batches of one idempotent producer that follow each other.
#[derive(Debug)]
struct Sequenced {
    /// Of the first.
    stamp: ProducerStamp,
    /// Messages of all of them.
    count: u32,
    /// Until when they may be held for those before them; from the first time that they are.
    until: Option<Instant>,
    /// What apply said of them the last time they were too early.
    verdict: Option<Vec<BatchOutcome>>,
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
    /// Of a producer whose requests may overtake each other.
    sequenced: Option<Sequenced>,
}

impl Submission {
    fn answer(self, result: Result<Vec<BatchOutcome>, SubmitError>) {
        // Before the answer: who has it finds room for the next one.
        drop((self.reserved, self.admitted));
        self.reply.send(result).ok();
    }
}

fn sequenced(batches: &[NewBatch]) -> Option<Sequenced> {
    let stamp = producer_of(&batches.first()?.batch)?;
    let mut count = 0;
    for new in batches {
        let follows = ProducerStamp {
            base_sequence: advance(stamp.base_sequence, count),
            ..stamp
        };
        if producer_of(&new.batch)? != follows {
            return None;
        }
        count += records_in(&new.batch);
    }
    Some(Sequenced {
        stamp,
        count,
        until: None,
        verdict: None,
    })
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
        sequenced: sequenced(&batches),
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
    let (queue, config, metrics) = (queue.clone(), config.clone(), metrics.clone());
    tokio::spawn(run::Batcher::new(queue, config, metrics, rx).run());
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
    use quorate_storage::batch::{BatchBuilder, RecordInput};

    use super::*;
    use crate::broker::queue::entry::Mark;

    fn batch(id: i64, base_sequence: i32, messages: u32) -> NewBatch {
        let mut builder = BatchBuilder::new().producer(id, 0, base_sequence);
        for _ in 0..messages {
            builder.push(RecordInput::default());
        }
        NewBatch {
            mark: Mark::None,
            hold: None,
            batch: builder.finish(),
        }
    }

    #[test]
    fn batches_of_a_producer_are_one_run_where_they_follow_each_other() {
        let run = |batches: &[NewBatch]| {
            let found = sequenced(batches)?;
            Some((found.stamp.base_sequence, found.count))
        };
        assert_eq!(run(&[batch(7, 5, 2)]), Some((5, 2)));
        let three = [batch(7, 5, 2), batch(7, 7, 1), batch(7, 8, 3)];
        assert_eq!(run(&three), Some((5, 6)));
        let wraps = [batch(7, i32::MAX, 1), batch(7, 0, 1)];
        assert_eq!(run(&wraps), Some((i32::MAX, 2)));
        assert_eq!(run(&[batch(7, 5, 2), batch(7, 8, 1)]), None);
        assert_eq!(run(&[batch(7, 5, 2), batch(8, 7, 1)]), None);
        assert_eq!(run(&[batch(7, 5, 2), batch(-1, -1, 1)]), None);
        assert_eq!(run(&[batch(-1, -1, 1)]), None);
        assert_eq!(run(&[]), None);
    }

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
