//! Rates: token buckets that hold one second's worth.
//!
//! Own code rather than a crate: a request takes many tokens at once and may be larger than the
//! bucket (it then needs a full one and leaves a debt), rates change while a bucket is in use, and
//! the clock must be tokio's for the simulation. `governor` has neither debts nor changing rates.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{Broker, BrokerError, BrokerResult, Quota};
use crate::catalog::{Topic, TopicId};

/// How long a node goes on with the number of queues it leads before it counts again.
const RECOUNT: Duration = Duration::from_millis(200);

/// Tokens that come at a steady rate; at most one second's worth gathers, and at least one.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    tokens: f64,
    at: Instant,
}

impl TokenBucket {
    pub fn full(now: Instant) -> Self {
        Self {
            tokens: f64::INFINITY,
            at: now,
        }
    }

    /// How long until `need` tokens can be taken; zero if they can be now.
    pub fn wait(&mut self, rate: f64, need: f64, now: Instant) -> Duration {
        let capacity = rate.max(1.0);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * rate).min(capacity);
        self.at = now;
        let missing = need.min(capacity) - self.tokens;
        match missing > 1e-9 {
            true => Duration::try_from_secs_f64(missing / rate).unwrap_or(Duration::MAX),
            false => Duration::ZERO,
        }
    }

    /// To be called after [`wait`](Self::wait) has said that they can be taken.
    pub fn take(&mut self, need: f64) {
        self.tokens -= need;
    }
}

/// The buckets of one quota.
#[derive(Debug, Clone, Copy)]
pub struct Buckets {
    messages: TokenBucket,
    bytes: TokenBucket,
}

impl Buckets {
    pub fn full(now: Instant) -> Self {
        Self {
            messages: TokenBucket::full(now),
            bytes: TokenBucket::full(now),
        }
    }

    /// Takes for `messages` of `bytes` together, or takes nothing and says how long to wait.
    /// `share` is what part of the quota is given out here.
    pub fn take(
        &mut self,
        quota: Quota,
        share: f64,
        messages: u64,
        bytes: u64,
        now: Instant,
    ) -> Result<(), Duration> {
        let rate = |limit: u64| limit as f64 * share;
        let mut wait = Duration::ZERO;
        if let Some(limit) = quota.messages_per_s {
            wait = self.messages.wait(rate(limit), messages as f64, now);
        }
        if let Some(limit) = quota.bytes_per_s {
            wait = wait.max(self.bytes.wait(rate(limit), bytes as f64, now));
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        if quota.messages_per_s.is_some() {
            self.messages.take(messages as f64);
        }
        if quota.bytes_per_s.is_some() {
            self.bytes.take(bytes as f64);
        }
        Ok(())
    }
}

/// Buckets by whom they are for, bounded in number.
#[derive(Debug)]
pub struct BucketTable<K> {
    most: usize,
    known: HashMap<K, Buckets>,
    /// Shared by all that found the table full.
    others: Option<Buckets>,
}

impl<K: Hash + Eq> BucketTable<K> {
    pub fn new(most: usize) -> Self {
        Self {
            most,
            known: HashMap::new(),
            others: None,
        }
    }

    pub fn of(&mut self, key: K, now: Instant) -> &mut Buckets {
        if self.known.len() >= self.most && !self.known.contains_key(&key) {
            // Whoever was quiet for long enough to have full buckets again can be forgotten.
            let recent = |buckets: &Buckets| {
                now.saturating_duration_since(buckets.messages.at.max(buckets.bytes.at))
                    < Duration::from_secs(60)
            };
            self.known.retain(|_, buckets| recent(buckets));
        }
        let room = self.known.len() < self.most;
        match self.known.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) if room => new.insert(Buckets::full(now)),
            Entry::Vacant(_) => self.others.get_or_insert_with(|| Buckets::full(now)),
        }
    }
}

/// A topic's buckets on this node.
#[derive(Debug)]
struct TopicBuckets {
    buckets: Buckets,
    led: usize,
    counted: Instant,
}

/// Of the topics that have a quota and a queue that is led here.
#[derive(Debug, Default)]
pub(super) struct TopicQuotas(Mutex<HashMap<TopicId, TopicBuckets>>);

impl Quota {
    pub fn is_set(&self) -> bool {
        self.messages_per_s.is_some() || self.bytes_per_s.is_some()
    }
}

/// The answer to who sends more than a quota allows.
pub fn over_quota(whose: &str, wait: Duration) -> BrokerError {
    // Rounded up: who waits as long as told must find what was promised.
    let ms = wait.as_nanos().div_ceil(1_000_000);
    BrokerError::RateExceeded {
        whose: whose.to_owned(),
        retry_after_ms: u64::try_from(ms).unwrap_or(u64::MAX),
    }
}

impl Broker {
    /// Takes from the topic's quota for messages that a queue led here is about to store.
    ///
    /// Every node gives out the part of the quota that its led queues are of all queues, so that
    /// the nodes together never give out more than the quota.
    pub(super) fn take_quota(&self, topic: &Topic, messages: u64, bytes: u64) -> BrokerResult<()> {
        let quota = topic.config.quota;
        if !quota.is_set() {
            return Ok(());
        }
        let now = Instant::now();
        let mut known = self.quotas.0.lock();
        if !known.contains_key(&topic.id) {
            let catalog = self.catalog();
            known.retain(|id, _| catalog.topics.contains_key(id));
        }
        let here = known.entry(topic.id).or_insert_with(|| TopicBuckets {
            buckets: Buckets::full(now),
            led: self.led_here(topic),
            counted: now,
        });
        if now.saturating_duration_since(here.counted) >= RECOUNT {
            (here.led, here.counted) = (self.led_here(topic), now);
        }
        let share = here.led.max(1) as f64 / topic.queues.len().max(1) as f64;
        let taken = here.buckets.take(quota, share, messages, bytes, now);
        taken.map_err(|wait| over_quota(&format!("topic {:?}", topic.name), wait))
    }

    fn led_here(&self, topic: &Topic) -> usize {
        let led = |group: u64| self.local.queue(group).is_some_and(|q| q.group.is_leader());
        topic.queues.iter().filter(|q| led(q.group)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(messages: Option<u64>, bytes: Option<u64>) -> Quota {
        Quota {
            messages_per_s: messages,
            bytes_per_s: bytes,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_second_is_given_at_once_and_then_the_rate() {
        let begun = Instant::now();
        let mut buckets = Buckets::full(begun);
        let mut take = |at| buckets.take(quota(Some(10), None), 1.0, 1, 999, begun + ms(at));
        for _ in 0..10 {
            assert_eq!(take(0), Ok(()));
        }
        assert_eq!(take(0), Err(ms(100)));
        assert_eq!(take(99), Err(ms(1)));
        assert_eq!(take(100), Ok(()));
        // Whoever waits as long as told is served.
        let wait = take(100).unwrap_err().as_millis() as u64;
        assert_eq!(take(100 + wait), Ok(()));
        for _ in 0..10 {
            assert_eq!(
                take(60_000),
                Ok(()),
                "not more than a second's worth gathers"
            );
        }
        assert!(take(60_000).is_err());
    }

    #[test]
    fn what_is_larger_than_a_second_needs_a_full_bucket_and_leaves_a_debt() {
        let begun = Instant::now();
        let mut buckets = Buckets::full(begun);
        let mut take = |bytes, at| {
            let quota = quota(None, Some(100));
            buckets.take(quota, 1.0, 1, bytes, begun + ms(at))
        };
        assert_eq!(take(1, 0), Ok(()));
        assert_eq!(take(300, 0), Err(ms(10)));
        assert_eq!(take(300, 10), Ok(()));
        assert_eq!(take(1, 10), Err(ms(2010)));
        assert_eq!(take(1, 2020), Ok(()));
    }

    #[test]
    fn refused_by_one_bucket_nothing_is_taken_of_the_other() {
        let now = Instant::now();
        let mut buckets = Buckets::full(now);
        let both = quota(Some(2), Some(100));
        assert!(buckets.take(both, 1.0, 1, 100, now).is_ok());
        assert!(buckets.take(both, 1.0, 1, 1, now).is_err());
        assert!(buckets.take(quota(Some(2), None), 1.0, 1, 0, now).is_ok());
    }

    #[test]
    fn a_share_and_a_new_rate_count_at_once() {
        let begun = Instant::now();
        let mut buckets = Buckets::full(begun);
        for n in 0..5 {
            assert!(
                buckets
                    .take(quota(Some(10), None), 0.5, 1, 0, begun)
                    .is_ok(),
                "{n}"
            );
        }
        let slow = buckets.take(quota(Some(10), None), 0.5, 1, 0, begun);
        assert_eq!(slow, Err(ms(200)));
        let fast = buckets.take(quota(Some(1000), None), 1.0, 1, 0, begun);
        assert_eq!(fast, Err(ms(1)));
    }

    #[test]
    fn a_table_of_buckets_is_bounded() {
        let now = Instant::now();
        let mut table = BucketTable::new(2);
        let quota = quota(Some(1), None);
        let mut take = |key: u32, at| {
            table
                .of(key, now + ms(at))
                .take(quota, 1.0, 1, 0, now + ms(at))
        };
        assert!(take(1, 0).is_ok() && take(2, 0).is_ok());
        assert!(take(3, 0).is_ok());
        assert!(take(4, 0).is_err(), "those that find no place share one");
        assert!(take(5, 60_000).is_ok() && take(6, 60_000).is_ok());
    }
}
