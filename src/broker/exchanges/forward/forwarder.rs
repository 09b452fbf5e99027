//! Brings the messages of one queue of an exchange to their topics, in order, each once.
//!
//! Where it stands is saved now and then by the coordinator of an internal consumer group. Whoever
//! leads the queue next begins there, and brings some messages again; the queues they go to know
//! each source's last one. A topic's next messages leave only when it has the ones before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, sleep_until};

use super::super::super::batcher::now_ms;
use super::super::progress_group;
use super::bring::bring;
use super::chunk::Chunk;
use super::lanes::Lanes;
use crate::broker::local::LocalQueue;
use crate::broker::queue::entry;
use crate::broker::{Broker, BrokerResult};
use crate::catalog::{Topic, TopicId};
use crate::coordinator::{CoordinatorCommand, QueueOffset};

/// Progress is saved so long after the first of it.
const SAVE_AFTER: Duration = Duration::from_millis(500);
/// What is done is removed so long after it was saved, at most this often.
const TRIM_AFTER: Duration = Duration::from_secs(60);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// The queue whose messages are brought.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub exchange: String,
    /// The exchange's internal topic.
    pub store: TopicId,
    pub queue: u32,
}

impl Source {
    fn group(&self) -> String {
        progress_group(self.store)
    }
}

fn pause(failures: u32) -> Duration {
    let doubled = RETRY_MIN.saturating_mul(1 << failures.saturating_sub(1).min(10));
    doubled.min(RETRY_MAX)
}

/// What ended.
enum Done {
    Brought {
        topic: TopicId,
        /// By queue: everything before this offset.
        reached: BTreeMap<u32, u64>,
        result: BrokerResult<u64>,
    },
    Saved {
        /// Everything before it is done.
        done: u64,
        result: BrokerResult<()>,
    },
    Trimmed,
}

type Step = BoxFuture<'static, Done>;

/// What a topic that did not take everything is tried again with.
struct Retry {
    due: Instant,
    reached: BTreeMap<u32, u64>,
}

pub(super) struct Forwarder {
    broker: Arc<Broker>,
    queue: Arc<LocalQueue>,
    source: Source,
    lanes: Lanes,
    /// What the scan read last.
    chunk: Option<Arc<Chunk>>,
    /// The lanes that failed.
    retries: BTreeMap<TopicId, Retry>,
    /// When the scan goes on after a failure.
    rescan: Option<Instant>,
    /// When progress is to be saved; none when it is, or is being.
    save_at: Option<Instant>,
    saving: bool,
    save_failures: u32,
    /// Everything before it is done, for whoever comes next too.
    saved: u64,
    /// When what is done may be removed; none when nothing is.
    trim_at: Option<Instant>,
}

impl Forwarder {
    pub fn new(broker: Arc<Broker>, queue: Arc<LocalQueue>, source: Source) -> Self {
        Self {
            broker,
            queue,
            source,
            lanes: Lanes::default(),
            chunk: None,
            retries: BTreeMap::new(),
            rescan: None,
            save_at: None,
            saving: false,
            save_failures: 0,
            saved: 0,
            trim_at: None,
        }
    }

    /// Ends when the replica is closed; whoever sees the leadership go aborts it.
    pub async fn run(mut self) {
        self.load().await;
        let mut wake = self.queue.shared.subscribe();
        let mut steps: FuturesUnordered<Step> = FuturesUnordered::new();
        loop {
            wake.borrow_and_update();
            if self.queue.shared.is_closed() {
                return;
            }
            self.lanes.leave_the_slow(Instant::now());
            self.scan_on().await;
            for step in self.next_steps() {
                steps.push(step);
            }
            let next = self.next_time();
            tokio::select! {
                Some(done) = steps.next(), if !steps.is_empty() => self.end_step(done),
                changed = wake.changed() => if changed.is_err() { return },
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    fn group(&self) -> u64 {
        self.queue.group.id().0
    }

    /// Goes on where the last forwarder of this queue saved that it was.
    async fn load(&mut self) {
        let mut failures = 0;
        loop {
            match self.broker.committed(&self.source.group()).await {
                Ok(saved) => {
                    let own = saved.iter().filter(|o| o.queue == self.source.queue);
                    self.lanes = Lanes::load(own.map(|o| (o.topic, o.offset)));
                    self.saved = self.lanes.done();
                    self.trim_at = (self.saved > 0).then(|| Instant::now() + TRIM_AFTER);
                    return;
                }
                Err(error) => {
                    let group = self.group();
                    tracing::debug!(group, %error, "where the forwarder was is not known yet");
                    failures += 1;
                    sleep(pause(failures)).await;
                }
            }
        }
    }

    /// Reads on until the topics that keep up have something to do, or to the end.
    async fn scan_on(&mut self) {
        let now = Instant::now();
        if self.rescan.is_some_and(|at| at > now) {
            return;
        }
        self.rescan = None;
        while self.lanes.may_scan() && self.lanes.scan() < self.queue.shared.bounds().end {
            match Chunk::read(&self.broker, self.group(), self.lanes.scan()).await {
                Ok(Some(chunk)) => {
                    self.broker.metrics.count_forward_skipped(chunk.skipped);
                    self.lanes.scanned(chunk.next, chunk.topics());
                    self.chunk = Some(Arc::new(chunk));
                    self.note_progress();
                }
                Ok(None) => return,
                Err(error) => {
                    let group = self.group();
                    tracing::debug!(group, %error, "what was published cannot be read now");
                    self.rescan = Some(now + RETRY_MAX);
                    return;
                }
            }
        }
    }

    /// What can begin now: a step of each lane that is behind and due, and saving.
    fn next_steps(&mut self) -> Vec<Step> {
        let now = Instant::now();
        let catalog = self.broker.catalog();
        let mut steps: Vec<Step> = Vec::new();
        let waiting: Vec<_> = self.lanes.waiting().collect();
        for (topic, at, _) in waiting {
            if self
                .retries
                .get(&topic)
                .is_some_and(|retry| retry.due > now)
            {
                continue;
            }
            match catalog.topics.get(&topic) {
                Some(known) => {
                    self.lanes.begin(topic, now);
                    steps.push(self.bring(known.clone(), at));
                }
                None if catalog.knew_topic(topic) => self.forget(topic),
                // Made a moment ago: this node's catalog is behind the publisher's.
                None => self.retry_later(topic, BTreeMap::new()),
            }
        }
        if !self.saving && self.save_at.is_some_and(|at| at <= now) {
            self.report_lag(Some(self.queue.shared.bounds().end));
            steps.push(self.save());
        }
        if self.trim_at.is_some_and(|at| at <= now) {
            self.trim_at = None;
            steps.extend(self.trim());
        }
        steps
    }

    fn next_time(&self) -> Option<Instant> {
        let waiting = self.lanes.waiting();
        let retries = waiting.filter_map(|(topic, ..)| Some(self.retries.get(&topic)?.due));
        let save = self.save_at.filter(|_| !self.saving);
        let others = self.rescan.into_iter().chain(save).chain(self.trim_at);
        let others = others.chain(self.lanes.patience_ends());
        retries.chain(others).min()
    }

    fn end_step(&mut self, done: Done) {
        match done {
            Done::Brought {
                topic,
                result: Ok(next),
                ..
            } => {
                self.retries.remove(&topic);
                self.lanes.advance(topic, next);
                self.note_progress();
            }
            Done::Brought {
                topic,
                reached,
                result: Err(error),
            } => {
                let group = self.group();
                tracing::debug!(group, topic, %error, "a topic does not take what is for it now");
                self.retry_later(topic, reached);
            }
            Done::Saved {
                done,
                result: Ok(()),
            } => {
                (self.saving, self.save_failures) = (false, 0);
                self.saved = self.saved.max(done);
                self.trim_at
                    .get_or_insert_with(|| Instant::now() + TRIM_AFTER);
            }
            Done::Saved {
                result: Err(error), ..
            } => {
                let group = self.group();
                tracing::debug!(group, %error, "where the forwarder is was not saved");
                self.save_failures += 1;
                self.saving = false;
                self.save_at = Some(Instant::now() + pause(self.save_failures));
            }
            Done::Trimmed => {
                let left = self.queue.shared.bounds().earliest < self.saved;
                self.trim_at = left.then(|| Instant::now() + TRIM_AFTER);
            }
        }
    }

    fn retry_later(&mut self, topic: TopicId, reached: BTreeMap<u32, u64>) {
        let due = Instant::now() + pause(self.lanes.fail(topic));
        self.retries.insert(topic, Retry { due, reached });
    }

    /// The topic was deleted: what was for it goes nowhere.
    fn forget(&mut self, topic: TopicId) {
        let chunk = self.chunk.as_ref();
        let left = chunk.map(|chunk| chunk.for_topic(topic, 0, &BTreeMap::new(), [0; 16]));
        let left = left
            .iter()
            .flatten()
            .map(|(_, batches)| batches.len() as u64);
        self.broker.metrics.count_forward_skipped(left.sum());
        self.lanes.forget(topic);
        self.retries.remove(&topic);
        self.note_progress();
    }

    fn note_progress(&mut self) {
        self.save_at
            .get_or_insert_with(|| Instant::now() + SAVE_AFTER);
    }

    fn bring(&self, topic: Arc<Topic>, at: u64) -> Step {
        let (broker, group) = (self.broker.clone(), self.group());
        let reached = self.retries.get(&topic.id).map(|r| r.reached.clone());
        let mut reached = reached.unwrap_or_default();
        let shared = self.chunk.clone().filter(|chunk| chunk.covers(at));
        Box::pin(async move {
            let result = bring(&broker, group, shared, &topic, at, &mut reached).await;
            Done::Brought {
                topic: topic.id,
                reached,
                result,
            }
        })
    }

    fn save(&mut self) -> Step {
        (self.save_at, self.saving) = (None, true);
        let group = self.source.group();
        let offsets = self.lanes.to_save().into_iter();
        let command = CoordinatorCommand::Commit {
            group: group.clone(),
            offsets: offsets
                .map(|(topic, offset)| QueueOffset {
                    topic,
                    queue: self.source.queue,
                    offset,
                })
                .collect(),
            // What another forwarder of this queue saved is as true.
            allow_rewind: false,
            member: None,
        };
        let (broker, done) = (self.broker.clone(), self.lanes.done());
        Box::pin(async move {
            let saved = broker.commit(&group, &command).await;
            Done::Saved {
                done,
                result: saved.map(drop),
            }
        })
    }

    /// Removes what is done, but for what a retry of its publisher may ask for.
    fn trim(&self) -> Option<Step> {
        let window_ms = self.broker.catalog().limits.key_window_ms;
        let since_ms = now_ms().saturating_sub(window_ms);
        let index = self.queue.shared.index();
        // Where the index is broken, whoever reads the queue has it mended.
        let asked_for = index.offset_at_time(since_ms).ok()?;
        let to = asked_for.map_or(self.saved, |offset| offset.min(self.saved));
        let (broker, group) = (self.broker.clone(), self.group());
        let needed = to > self.queue.shared.bounds().earliest;
        Some(Box::pin(async move {
            if needed {
                let body = entry::trim(now_ms(), to);
                let trimmed = broker.propose_here(group, body, broker.config.write_timeout);
                if let Err(error) = trimmed.await {
                    tracing::debug!(group, ?error, "what is forwarded was not removed yet");
                }
            }
            Done::Trimmed
        }))
    }

    /// For each topic how much of the queue up to `end` it has not seen; none at the very end.
    fn report_lag(&mut self, end: Option<u64>) {
        let catalog = self.broker.catalog();
        for (topic, at) in self.lanes.all() {
            let Some(known) = catalog.topics.get(&topic) else {
                continue;
            };
            let lag = end.map(|end| end.saturating_sub(at));
            let (exchange, queue) = (&self.source.exchange, self.source.queue);
            let metrics = &self.broker.metrics;
            metrics.set_forward_lag(exchange, &known.name, queue, lag);
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.report_lag(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_growing() {
        assert_eq!(pause(1), RETRY_MIN);
        assert_eq!(pause(2), RETRY_MIN * 2);
        assert_eq!(pause(100), RETRY_MAX);
        assert_eq!(pause(u32::MAX), RETRY_MAX);
    }
}
