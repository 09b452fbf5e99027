//! The batcher's task: what to propose when, and what its answers mean.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use quorate_raft::ProposeError;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::reorder::Reorder;
use super::{Sequenced, Submission, SubmitError, TAKEN, now_ms};
use crate::broker::config::BrokerConfig;
use crate::broker::encode::records_in;
use crate::broker::local::LocalQueue;
use crate::broker::queue::entry::{AppendBuilder, MAX_BATCHES};
use crate::broker::queue::{BatchOutcome, decode_outcomes};
use crate::metrics::Metrics;

pub(super) struct Batcher {
    queue: Arc<LocalQueue>,
    config: Arc<BrokerConfig>,
    metrics: Arc<Metrics>,
    rx: mpsc::UnboundedReceiver<Submission>,
    /// Received and not yet in an entry.
    waiting: VecDeque<Submission>,
    waiting_bytes: usize,
    /// Received, and ahead of others of the same producer.
    early: Reorder<Submission>,
    /// Of the last entry; stamps never go back.
    stamp_ms: u64,
}

/// An entry that has been applied, or not, with what was in it.
struct Done {
    submissions: Vec<Proposed>,
    outcomes: Result<Vec<BatchOutcome>, SubmitError>,
}

struct Proposed {
    submission: Submission,
    /// Its outcomes among the entry's, and how many there should be.
    places: Range<usize>,
    expected: usize,
}

/// What became of all batches of a producer's request.
enum Verdict {
    Stored,
    /// None of them is stored.
    OutOfOrder {
        expected: i32,
    },
    Other,
}

fn verdict_on(outcomes: &[BatchOutcome]) -> Verdict {
    let is_stored =
        |o: &BatchOutcome| matches!(o, BatchOutcome::Stored(_) | BatchOutcome::Held { .. });
    let is_early = |o: &BatchOutcome| matches!(o, BatchOutcome::OutOfOrder { .. });
    match outcomes.first() {
        Some(_) if outcomes.iter().all(is_stored) => Verdict::Stored,
        Some(BatchOutcome::OutOfOrder { expected }) if outcomes.iter().all(is_early) => {
            Verdict::OutOfOrder {
                expected: *expected,
            }
        }
        _ => Verdict::Other,
    }
}

type Proposal = Pin<Box<dyn Future<Output = Done> + Send>>;

impl Batcher {
    pub(super) fn new(
        queue: Arc<LocalQueue>,
        config: Arc<BrokerConfig>,
        metrics: Arc<Metrics>,
        rx: mpsc::UnboundedReceiver<Submission>,
    ) -> Self {
        Self {
            queue,
            early: Reorder::new(config.max_early_bytes),
            config,
            metrics,
            rx,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            stamp_ms: 0,
        }
    }

    pub(super) async fn run(mut self) {
        let mut in_flight: FuturesUnordered<Proposal> = FuturesUnordered::new();
        loop {
            while let Ok(submission) = self.rx.try_recv() {
                self.receive(submission);
            }
            if self.is_due(in_flight.len()) {
                // Polled once before the next is made: this is what keeps entries in order.
                if let Some(mut proposal) = self.next_entry() {
                    match futures_util::poll!(&mut proposal) {
                        std::task::Poll::Ready(done) => self.finish(done),
                        std::task::Poll::Pending => in_flight.push(proposal),
                    }
                }
                continue;
            }
            let idle = Instant::now() + self.config.batcher_idle;
            let due = self.early.next_due();
            tokio::select! {
                biased;
                Some(done) = in_flight.next(), if !in_flight.is_empty() => self.finish(done),
                received = tokio::time::timeout_at(due.unwrap_or(idle), self.rx.recv()) => {
                    match received {
                        Ok(Some(submission)) => self.receive(submission),
                        Ok(None) => return,
                        Err(_) if due.is_some() => self.give_up_waiting(),
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

    /// Goes before everything that waits.
    fn receive_first(&mut self, submission: Submission) {
        self.waiting_bytes += submission.bytes;
        self.waiting.push_front(submission);
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

    /// Holds a submission that is ahead of others of its producer, or gives it back: there is no
    /// room, or it has waited for long enough.
    fn hold(&mut self, mut submission: Submission) -> Option<Submission> {
        let Some(sequenced) = &mut submission.sequenced else {
            return Some(submission);
        };
        let now = Instant::now();
        let until = *sequenced.until.get_or_insert(now + self.config.early_wait);
        if until <= now || submission.reply.is_closed() {
            return Some(submission);
        }
        let (stamp, bytes) = (sequenced.stamp, submission.bytes);
        self.early.hold(stamp, submission, bytes, until).err()
    }

    /// What has been early for too long is answered, or put to apply if that has not judged it yet.
    fn give_up_waiting(&mut self) {
        for mut submission in self.early.overdue(Instant::now()) {
            let sequenced = submission.sequenced.as_mut();
            match sequenced.and_then(|s| s.verdict.take()) {
                Some(verdict) => submission.answer(Ok(verdict)),
                None => self.receive(submission),
            }
        }
    }

    /// The next submission that goes into an entry with `batches` of `bytes`; those that are too
    /// early or were withdrawn are left out.
    fn take_next(&mut self, batches: usize, bytes: usize) -> Option<Submission> {
        loop {
            let next = self.waiting.front()?;
            let fits = bytes + next.bytes <= self.config.max_entry_bytes
                && batches + next.batches.len() <= MAX_BATCHES;
            if batches > 0 && !fits {
                return None;
            }
            let mut submission = self.waiting.pop_front()?;
            self.waiting_bytes -= submission.bytes;
            let early = |s: &Sequenced| self.early.is_early(s.stamp);
            if submission.sequenced.as_ref().is_some_and(early) {
                match self.hold(submission) {
                    None => continue,
                    Some(refused) => submission = refused,
                }
            }
            if !submission.claim.settle(TAKEN) {
                continue;
            }
            if let Some(Sequenced { stamp, count, .. }) = &submission.sequenced
                && let Some(follows) = self.early.proposing(*stamp, *count)
            {
                self.receive_first(follows);
            }
            return Some(submission);
        }
    }

    /// Joins what is waiting, as far as it fits; none if all of that was withdrawn or is too early.
    fn next_entry(&mut self) -> Option<Proposal> {
        let mut taken: Vec<Submission> = Vec::new();
        let (mut batches, mut bytes) = (0, 0);
        while let Some(submission) = self.take_next(batches, bytes) {
            batches += submission.batches.len();
            bytes += submission.bytes;
            taken.push(submission);
        }
        if taken.is_empty() {
            return None;
        }
        let now_ms = now_ms();
        self.stamp_ms = now_ms
            .max(self.stamp_ms)
            .max(self.queue.shared.last_stamp_ms());
        let mut entry = AppendBuilder::new(self.stamp_ms, batches, bytes);
        let mut submissions = Vec::with_capacity(taken.len());
        let mut messages = 0;
        for mut submission in taken {
            let from = usize::from(entry.count());
            for new in &submission.batches {
                // Batches were validated where they came in; what is none would be left out, and
                // its waiter told so by the number of outcomes.
                let hold = new.hold.and_then(|hold| hold.taken(now_ms));
                entry.push(&new.mark, hold.as_ref(), &new.batch);
                messages += u64::from(records_in(&new.batch));
            }
            let places = from..usize::from(entry.count());
            let expected = submission.batches.len();
            // Only what may be proposed again is kept.
            if submission.sequenced.is_none() {
                submission.batches = Vec::new();
            }
            submissions.push(Proposed {
                submission,
                places,
                expected,
            });
        }
        let group = self.queue.group.clone();
        let body = entry.finish();
        self.metrics.observe_entry(messages, body.len() as u64);
        Some(Box::pin(async move {
            let outcomes = match group.propose(body).await {
                Ok((_, reply)) => decode_outcomes(&reply).ok_or(SubmitError::Unknown),
                Err(ProposeError::NotLeader { leader }) => Err(SubmitError::NotLeader { leader }),
                Err(ProposeError::Closed) => Err(SubmitError::NotLeader { leader: None }),
                Err(ProposeError::Unknown(reason)) => {
                    tracing::debug!(group = %group.id(), %reason, "fate of an entry unknown");
                    Err(SubmitError::Unknown)
                }
            };
            Done {
                submissions,
                outcomes,
            }
        }))
    }

    fn finish(&mut self, done: Done) {
        let outcomes = match done.outcomes {
            Ok(outcomes) => outcomes,
            Err(error) => return self.fail(done.submissions, &error),
        };
        let mut again = Vec::new();
        for proposed in done.submissions {
            let mut submission = proposed.submission;
            let own = outcomes.get(proposed.places);
            let Some(own) = own.filter(|own| own.len() == proposed.expected) else {
                submission.answer(Err(SubmitError::Unknown));
                continue;
            };
            let Some(sequenced) = &mut submission.sequenced else {
                submission.answer(Ok(own.to_vec()));
                continue;
            };
            let stamp = sequenced.stamp;
            match verdict_on(own) {
                Verdict::Stored => {
                    let follows = self.early.stored(stamp, sequenced.count);
                    again.extend(follows);
                }
                Verdict::OutOfOrder { expected } => {
                    sequenced.verdict = Some(own.to_vec());
                    if self.early.out_of_order(stamp, expected) {
                        submission.claim.reopen();
                        match self.hold(submission) {
                            None => continue,
                            Some(refused) => submission = refused,
                        }
                    }
                }
                Verdict::Other => again.extend(self.early.forget(stamp)),
            }
            submission.answer(Ok(own.to_vec()));
        }
        for submission in again.into_iter().rev() {
            self.receive_first(submission);
        }
    }

    fn fail(&mut self, entry: Vec<Proposed>, error: &SubmitError) {
        for Proposed { submission, .. } in entry {
            if let Some(sequenced) = &submission.sequenced {
                for follows in self.early.forget(sequenced.stamp) {
                    self.receive(follows);
                }
            }
            submission.answer(Err(error.clone()));
        }
        // Another node has what comes before, or will have it.
        if let SubmitError::NotLeader { .. } = error {
            for submission in self.early.drain() {
                submission.answer(Err(error.clone()));
            }
        }
    }
}
