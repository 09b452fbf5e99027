//! Messages consumed by lease: none after its ack, none to two at once, and the dead exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::leases::{LeasedMessage, ReceiveRequest, encode_receipt};
use quorate::broker::{BrokerError, BrokerResult, Selection, StartAt};
use quorate::coordinator::leases::RetryPolicy;
use rand::Rng;
use tokio::time::sleep;

use super::Work;
use super::actor::{Actor, Scene, Troupe, Written, counted, now_ms, number, write_numbers};
use crate::workload::Called;

const TOPIC: &str = "leased";
const GROUP: &str = "lessees";
const DEAD: &str = "_dlq.lessees";
const QUEUES: u32 = 2;
const CONSUMERS: u64 = 3;
const LEASE_MS: u64 = 1_500;
const MAX_DELIVERIES: u32 = 3;
/// Every so many messages one cannot be processed by anybody.
const POISON: u64 = 8;

#[derive(Debug)]
pub struct Leases {
    scene: Arc<Scene>,
    written: Written,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    last: BTreeMap<u64, Delivery>,
    /// When the ack was answered.
    acked: BTreeMap<u64, u64>,
    /// Those whose ack was answered while the lease went on.
    acked_in_time: BTreeSet<u64>,
    /// Acked without an answer: it may have counted.
    perhaps: BTreeSet<u64>,
    deliveries: u64,
    late: u64,
}

#[derive(Debug, Clone, Copy)]
struct Delivery {
    asked_ms: u64,
    answered_ms: u64,
    count: u32,
    /// The consumer let it go.
    given_back: bool,
}

fn is_poison(number: u64) -> bool {
    number % POISON == POISON - 1
}

impl Leases {
    pub async fn prepare(scene: Arc<Scene>, actor: &mut Actor) -> Arc<dyn Work> {
        actor.create_topic(TOPIC, QUEUES).await;
        let policy = RetryPolicy {
            max_deliveries: MAX_DELIVERIES,
            backoff_ms: vec![100, 400],
        };
        let settled = actor.insist(move |broker| {
            let policy = policy.clone();
            async move { broker.set_retry_policy(GROUP, policy).await }
        });
        if let Err(error) = settled.await {
            scene.violation(format_args!("no retry policy: {error}"));
        }
        Arc::new(Self {
            scene,
            written: Arc::default(),
            seen: Mutex::default(),
        })
    }

    async fn consume(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.is_done() {
            let wait_ms = [0, 300][actor.rng.random_range(0..2)];
            let request = ReceiveRequest {
                group: GROUP.to_owned(),
                topics: vec![TOPIC.to_owned()],
                max_messages: actor.rng.random_range(1..6),
                max_bytes: 1 << 20,
                wait_ms,
                lease_ms: LEASE_MS,
                ordered: false,
                selection: Selection::default(),
                start: StartAt::Earliest,
                consumer: None,
                held: Vec::new(),
            };
            let asked_ms = now_ms();
            let called = actor.call(|broker| async move { broker.receive(request).await });
            match called.await {
                Called::Done(received) => {
                    let messages = received.messages;
                    let answered_ms = now_ms();
                    for leased in &messages {
                        self.delivered(&actor, leased, asked_ms, answered_ms);
                    }
                    for leased in messages {
                        self.process(&mut actor, leased, asked_ms).await;
                    }
                }
                Called::Refused(error) if !error.retryable() => {
                    let text = format!("a receive was refused: {error}");
                    self.scene.violation(text);
                }
                _ => {}
            }
            actor.pause(20..200).await;
        }
    }

    fn delivered(&self, actor: &Actor, leased: &LeasedMessage, asked_ms: u64, answered_ms: u64) {
        let (count, wrong) = (leased.delivery_count, |what: String| {
            let text = format!("{:?}: {what}", number(&leased.message));
            self.scene.violation(text);
        });
        let Some(number) = number(&leased.message) else {
            return wrong("was leased, and nobody sent it".to_owned());
        };
        actor.note(format_args!("leased {number} for the {count}th time"));
        let mut seen = self.seen.lock();
        seen.deliveries += 1;
        if let Some(at_ms) = seen.acked.get(&number).filter(|at_ms| **at_ms < asked_ms) {
            wrong(format!("asked for at {asked_ms}, and acked at {at_ms}"));
        }
        if count > MAX_DELIVERIES {
            wrong(format!("leased for the {count}th time"));
        }
        let delivery = Delivery {
            asked_ms,
            answered_ms,
            count,
            given_back: false,
        };
        if let Some(last) = seen.last.get(&number).copied() {
            let later = last.answered_ms < asked_ms;
            let ended = last.given_back || answered_ms >= last.asked_ms + LEASE_MS;
            if count == last.count
                || (later && count < last.count)
                || (!ended && count > last.count)
            {
                wrong(format!("leased as {delivery:?} after {last:?}"));
            }
            if count < last.count {
                return;
            }
        }
        seen.last.insert(number, delivery);
    }

    async fn process(&self, actor: &mut Actor, leased: LeasedMessage, asked_ms: u64) {
        let Some(number) = number(&leased.message) else {
            return;
        };
        let receipt = encode_receipt(GROUP, &leased.receipt);
        let closing = self.scene.is_closing();
        match actor.rng.random_range(0..100) {
            // A consumer that crashed: the lease ends by itself.
            0..8 if !closing => actor.note(format_args!("forgets {number}")),
            // One that is slow.
            8..12 if !closing => {
                sleep(Duration::from_millis(LEASE_MS)).await;
                self.ack(actor, number, receipt, asked_ms).await;
            }
            _ if is_poison(number) => self.give_back(actor, number, receipt).await,
            12..25 => self.give_back(actor, number, receipt).await,
            _ => self.ack(actor, number, receipt, asked_ms).await,
        }
    }

    async fn give_back(&self, actor: &mut Actor, number: u64, receipt: String) {
        if let Some(last) = self.seen.lock().last.get_mut(&number) {
            last.given_back = true;
        }
        let called = actor
            .call(|broker| async move { only(broker.nack(GROUP, &[receipt], None).await) })
            .await;
        // Without an answer the lease ends by itself.
        actor.note(format_args!("nacks {number}: {}", told(&called)));
    }

    async fn ack(&self, actor: &mut Actor, number: u64, receipt: String, asked_ms: u64) {
        for _ in 0..3 {
            let receipt = receipt.clone();
            let called = actor
                .call(|broker| async move { only(broker.ack(GROUP, &[receipt], None).await) })
                .await;
            actor.note(format_args!("acks {number}: {}", told(&called)));
            if self.answered(number, called, asked_ms) {
                return;
            }
            actor.pause(10..200).await;
        }
    }

    /// True when that was an answer to an ack.
    fn answered(&self, number: u64, called: Called<()>, asked_ms: u64) -> bool {
        let mut seen = self.seen.lock();
        let in_time = now_ms() < asked_ms + LEASE_MS;
        match called {
            Called::Done(()) => {
                seen.acked.entry(number).or_insert_with(now_ms);
                if in_time {
                    seen.acked_in_time.insert(number);
                }
                true
            }
            Called::Unknown(_) => {
                seen.perhaps.insert(number);
                false
            }
            Called::Refused(BrokerError::LeaseExpired { .. }) => {
                seen.late += 1;
                if in_time {
                    let text = format!("{number} was acked in time, and that was refused");
                    self.scene.violation(text);
                }
                true
            }
            Called::Refused(error) if !error.retryable() => {
                let text = format!("the ack of {number} was refused: {error}");
                self.scene.violation(text);
                true
            }
            Called::Refused(_) | Called::NotSent => false,
        }
    }

    /// Neither acked nor among these.
    fn left(&self, dead: &BTreeMap<u64, u32>) -> Vec<u64> {
        let (written, seen) = (self.written.lock(), self.seen.lock());
        let ended = |number: &&u64| {
            seen.acked.contains_key(number)
                || seen.perhaps.contains(number)
                || dead.contains_key(number)
        };
        let left = written.iter().filter(|number| !ended(number));
        left.copied().collect()
    }

    async fn dead(&self, actor: &mut Actor) -> BTreeMap<u64, u32> {
        // Made when the first one dies.
        match actor
            .insist(|broker| async move { broker.topic(DEAD).await })
            .await
        {
            Ok(_) => counted(&actor.read(DEAD, 1).await),
            Err(_) => BTreeMap::new(),
        }
    }

    /// Messages with consumers, waiting, or on their way to the dead.
    async fn unfinished(&self, actor: &mut Actor) -> Option<u64> {
        let called = actor
            .call(|broker| async move { broker.in_flight(GROUP).await })
            .await;
        let Called::Done(queues) = called else {
            return None;
        };
        let counts = queues.iter().map(|(_, counts)| counts);
        let in_flight = counts.map(|c| u64::from(c.leased + c.waiting + c.dead));
        Some(in_flight.sum())
    }
}

/// The result for the only receipt.
fn only<T>(results: BrokerResult<Vec<BrokerResult<T>>>) -> BrokerResult<()> {
    results?.pop().map_or(Ok(()), |result| result.map(drop))
}

fn told(called: &Called<()>) -> String {
    match called {
        Called::Done(()) => "done".to_owned(),
        Called::Refused(error) => error.to_string(),
        Called::NotSent => "not sent".to_owned(),
        Called::Unknown(why) => format!("unknown: {why}"),
    }
}

impl Work for Leases {
    fn start(self: Arc<Self>, troupe: &mut Troupe) {
        let writer = troupe.actor("lease-writer");
        let acked = self.written.clone();
        troupe.start(write_numbers(writer, TOPIC.to_owned(), 50..250, acked));
        for consumer in 0..CONSUMERS {
            let actor = troupe.actor(format_args!("lessee-{consumer}"));
            troupe.start(self.clone().consume(actor));
        }
    }

    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>> {
        async move {
            let left = self.left(&self.dead(actor).await);
            if !left.is_empty() {
                return Some(format!("{left:?} are neither acked nor dead"));
            }
            match self.unfinished(actor).await {
                Some(0) => None,
                in_flight => Some(format!("{in_flight:?} messages are in flight")),
            }
        }
        .boxed()
    }

    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()> {
        async move {
            let dead = self.dead(actor).await;
            let left = self.left(&dead);
            let seen = self.seen.lock();
            for (number, count) in &dead {
                if *count > 1 || seen.acked_in_time.contains(number) {
                    let acked = seen.acked.get(number);
                    let text = format!("{number} is dead {count} times, and acked at {acked:?}");
                    self.scene.violation(text);
                }
            }
            if !left.is_empty() {
                let text = format!("{left:?} are neither acked nor dead any more");
                self.scene.violation(text);
            }
            let (written, acked) = (self.written.lock().len(), seen.acked.len());
            let (deliveries, late, dead) = (seen.deliveries, seen.late, dead.len());
            actor.note(format_args!(
                "{written} to lease, {acked} acked, {dead} dead; {deliveries} deliveries, {late} acks too late"
            ));
        }
        .boxed()
    }
}
