//! Generators: a topic that makes messages of itself, at a steady rate.
//!
//! The leader of the topic's queue 0 stores the generator's value there, as long as the topic's
//! backlog has room. With a bounded backlog the messages are the tokens of a token bucket: whoever
//! consumes one has taken a token, and as many gather as the backlog holds.
//!
//! What is missed (while there was no room or no leader) is not made up for. A new leader goes on one
//! interval after the log's last entry, so that a slow generator neither starts again from the
//! beginning nor comes twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use quorate_storage::batch::{BATCH_HEADER_BYTES, BatchBuilder, MessageRecord};
use tokio::sync::watch;
use tokio::time::Instant;

use super::batcher::{now_ms, submit};
use super::local::LocalQueue;
use super::queue::entry::Mark;
use super::topics::check_own_name;
use super::{Broker, BrokerError, BrokerResult, Generator};
use crate::catalog::{CatalogCommand, CatalogReply, CatalogState, Topic, TopicId};
use crate::peer::NewBatch;

/// Messages that come faster than this are stored together.
const STEP: Duration = Duration::from_millis(50);
/// Between two looks at a generator that has no room, or is not led here.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const MAX_STEP_BYTES: usize = 1 << 20;
/// What a record without key and headers has beside its value, at most.
const RECORD_BYTES: usize = 32;

impl Generator {
    /// Rates are kept in thousandths of a message a second.
    pub const RATES_PER_1000_S: std::ops::RangeInclusive<u64> = 1..=10_000_000;
    pub const MAX_VALUE_BYTES: usize = 64 << 10;

    fn interval(&self) -> Duration {
        Duration::from_secs(1000) / u32::try_from(self.per_1000_s).unwrap_or(u32::MAX).max(1)
    }

    /// How many messages came due in `passed` at most, and the rest of an interval.
    fn owed(&self, passed: Duration) -> (u64, Duration) {
        let interval = self.interval();
        // A pause is not made up for: two steps' worth, or one message, is all there is.
        let passed = passed.min(interval.max(STEP * 2));
        let count = passed.as_nanos() / interval.as_nanos().max(1);
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        let used = interval * u32::try_from(count).unwrap_or(u32::MAX);
        (count, passed.saturating_sub(used))
    }
}

/// When a generator that is led here goes on.
struct Schedule {
    generator: Generator,
    /// Up to here all is made, or missed.
    until: Instant,
    next: Instant,
    busy: Arc<AtomicBool>,
    full: Arc<AtomicBool>,
}

impl Schedule {
    /// Begins one interval after the last entry, however long ago that was.
    fn begin(generator: &Generator, queue: &LocalQueue, now: Instant) -> Self {
        let last_ms = queue.shared.last_stamp_ms();
        let passed = Duration::from_millis(now_ms().saturating_sub(last_ms));
        let interval = generator.interval();
        let left = interval.saturating_sub(passed);
        Self {
            generator: generator.clone(),
            until: (now + left).checked_sub(interval).unwrap_or(now),
            next: now + left,
            busy: Arc::default(),
            full: Arc::default(),
        }
    }

    /// How many messages are to be made now. While others are being stored none are: those that come
    /// due meanwhile are made after them.
    fn due(&mut self, now: Instant) -> u64 {
        if self.busy.load(Ordering::Acquire) {
            self.next = now + STEP;
            return 0;
        }
        let passed = now.saturating_duration_since(self.until);
        let (count, rest) = self.generator.owed(passed);
        self.until = now.checked_sub(rest).unwrap_or(now);
        self.next = (self.until + self.generator.interval()).max(now + STEP);
        if self.full.load(Ordering::Relaxed) {
            self.next = self.next.max(now + LOOK_AGAIN);
        }
        count
    }
}

pub(super) fn start(broker: &Arc<Broker>) {
    tokio::spawn(run(Arc::downgrade(broker), broker.catalog.clone()));
}

async fn run(broker: Weak<Broker>, mut catalog: watch::Receiver<Arc<CatalogState>>) {
    let mut schedules = HashMap::new();
    loop {
        let state = catalog.borrow_and_update().clone();
        let next = match broker.upgrade() {
            Some(broker) => broker.generate(&state, &mut schedules),
            None => return,
        };
        let changed = match next {
            Some(next) => tokio::time::timeout_at(next, catalog.changed()).await,
            None => Ok(catalog.changed().await),
        };
        if let Ok(Err(_)) = changed {
            return;
        }
    }
}

impl Broker {
    /// Has a topic generate messages, or stop it.
    pub async fn set_generator(
        &self,
        topic: &str,
        generator: Option<Generator>,
    ) -> BrokerResult<()> {
        if generator.is_some() {
            check_own_name(topic)?;
        }
        self.find_topic(topic).await?;
        let command = CatalogCommand::SetGenerator {
            name: topic.to_owned(),
            generator,
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Done => self.catalog_barrier().await,
            CatalogReply::NotFound => Err(BrokerError::TopicNotFound {
                topic: topic.to_owned(),
            }),
            CatalogReply::Invalid(text) => Err(BrokerError::InvalidRequest(text)),
            other => Err(BrokerError::Internal(format!(
                "unexpected answer of the catalog: {other:?}"
            ))),
        }
    }

    /// What a topic generates.
    pub async fn generator(&self, topic: &str) -> BrokerResult<Generator> {
        self.catalog_barrier().await?;
        let found = self.find_topic(topic).await?;
        let catalog = self.catalog();
        let generator = catalog.generators.get(&found.id).cloned();
        generator.ok_or_else(|| BrokerError::GeneratorNotFound {
            topic: topic.to_owned(),
        })
    }

    /// Starts what is due, and says when to look again. None: nothing generates anywhere.
    fn generate(
        self: &Arc<Self>,
        catalog: &CatalogState,
        schedules: &mut HashMap<TopicId, Schedule>,
    ) -> Option<Instant> {
        let now = Instant::now();
        schedules.retain(|id, _| catalog.generators.contains_key(id));
        let mut next: Option<Instant> = None;
        for (id, generator) in &catalog.generators {
            let topic = catalog.topics.get(id);
            let placement = topic.and_then(|topic| topic.queues.first());
            let queue = placement.and_then(|placement| self.local.queue(placement.group));
            let queue = queue.filter(|queue| queue.group.is_leader());
            let (Some(topic), Some(queue)) = (topic, queue) else {
                schedules.remove(id);
                next = earlier(next, now + LOOK_AGAIN);
                continue;
            };
            let begin = || Schedule::begin(generator, &queue, now);
            let schedule = schedules.entry(*id).or_insert_with(begin);
            if schedule.generator != *generator {
                *schedule = begin();
            }
            if schedule.next <= now {
                self.step(schedule, topic, &queue, now);
            }
            next = earlier(next, schedule.next);
        }
        next
    }

    fn step(
        self: &Arc<Self>,
        schedule: &mut Schedule,
        topic: &Arc<Topic>,
        queue: &Arc<LocalQueue>,
        now: Instant,
    ) {
        let count = schedule.due(now);
        if count == 0 {
            return;
        }
        schedule.busy.store(true, Ordering::Release);
        let generator = schedule.generator.clone();
        let (busy, full) = (schedule.busy.clone(), schedule.full.clone());
        let (broker, topic, queue) = (self.clone(), topic.clone(), queue.clone());
        tokio::spawn(async move {
            let made = broker.make(&topic, &queue, &generator, count).await;
            if let Err(error) = &made {
                tracing::debug!(topic = topic.name, %error, "nothing was generated");
            }
            full.store(made.is_ok_and(|made| made < count), Ordering::Relaxed);
            busy.store(false, Ordering::Release);
        });
    }

    /// Stores up to `count` messages, as far as there is room for them, and says how many.
    async fn make(
        &self,
        topic: &Topic,
        queue: &Arc<LocalQueue>,
        generator: &Generator,
        count: u64,
    ) -> BrokerResult<u64> {
        self.refuse_without_room()?;
        let room = self.backlog_room(queue, topic, 0).await?;
        let bytes = room.bytes.saturating_sub(BATCH_HEADER_BYTES as u64);
        let each = (generator.value.len() + RECORD_BYTES) as u64;
        let fits = (MAX_STEP_BYTES as u64 / each).max(1).min(bytes / each);
        let count = count.min(room.messages).min(fits);
        if count == 0 {
            return Ok(0);
        }
        let batches = vec![NewBatch {
            mark: Mark::None,
            hold: None,
            batch: batch_of(&generator.value, count)?,
        }];
        let admitted = match self.admit(queue, topic, 0, &batches).await {
            Ok(admitted) => admitted,
            Err(BrokerError::BacklogFull(_) | BrokerError::Dropped { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        let submitted = submit(
            queue,
            &self.local,
            &self.config,
            &self.metrics,
            batches,
            admitted,
            self.config.write_timeout,
        );
        let stored = submitted.await;
        stored.map_err(|error| BrokerError::Internal(format!("{error:?}")))?;
        Ok(count)
    }
}

fn earlier(known: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(known.map_or(other, |known| known.min(other)))
}

fn batch_of(value: &Bytes, count: u64) -> BrokerResult<Bytes> {
    let mut batch = BatchBuilder::new();
    let message = MessageRecord {
        value: Some(value.clone()),
        ..MessageRecord::default()
    };
    for _ in 0..count {
        let encoded = message.encode(&mut batch);
        encoded.map_err(|e| BrokerError::Internal(e.to_string()))?;
    }
    Ok(batch.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generator(per_1000_s: u64) -> Generator {
        Generator {
            per_1000_s,
            value: Bytes::new(),
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_rate_is_kept_over_many_uneven_steps() {
        for (per_1000_s, steps, expected) in [
            (10_000_000, vec![50, 51, 73, 99, 27], 3000),
            (100_000, vec![50, 55, 45, 49, 51], 25),
            (30_000, vec![50; 20], 30),
        ] {
            let generator = generator(per_1000_s);
            let (mut made, mut rest) = (0, Duration::ZERO);
            for step in steps {
                let (count, left) = generator.owed(ms(step) + rest);
                (made, rest) = (made + count, left);
            }
            assert_eq!(made, expected, "{per_1000_s}");
        }
    }

    #[test]
    fn what_comes_due_while_others_are_stored_is_made_after_them() {
        let begun = Instant::now();
        let mut schedule = Schedule {
            generator: generator(100_000),
            until: begun,
            next: begun,
            busy: Arc::default(),
            full: Arc::default(),
        };
        assert_eq!(schedule.due(begun + ms(50)), 5);
        schedule.busy.store(true, Ordering::Relaxed);
        assert_eq!(schedule.due(begun + ms(100)), 0);
        schedule.busy.store(false, Ordering::Relaxed);
        assert_eq!(schedule.due(begun + ms(150)), 10);
    }

    #[test]
    fn a_pause_is_followed_by_no_burst() {
        assert_eq!(generator(1).interval(), Duration::from_secs(1000));
        assert_eq!(generator(1).owed(Duration::from_secs(999)).0, 0);
        let day = Duration::from_secs(86_400);
        assert_eq!(generator(1).owed(day), (1, Duration::ZERO));
        assert_eq!(generator(1000).owed(day), (1, Duration::ZERO));
        assert_eq!(generator(10_000_000).owed(day).0, 1000);
    }
}
