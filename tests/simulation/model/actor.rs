//! What every client of the message model does: ask any node, and repeat what is safe to repeat.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use quorate::broker::{
    Broker, BrokerError, BrokerResult, Consistency, Delay, Message, NewMessage, ProduceRequest,
    StartAt, Stored,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::node::NodeSlot;
use crate::oracle::Queue;
use crate::workload::{Called, Stage, fetch, topic_config};

/// What the clients of all capabilities share.
#[derive(Debug)]
pub struct Scene {
    pub stage: Arc<Stage>,
    /// Consumers end too.
    pub done: AtomicBool,
}

impl Scene {
    pub fn violation(&self, what: impl Display) {
        self.stage.history.violation(what);
    }

    /// No new work.
    pub fn is_closing(&self) -> bool {
        self.stage.closing.load(Ordering::Relaxed)
    }

    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }
}

/// The simulation's time, as the nodes see it.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_millis() as u64)
}

/// Makes clients, each with chances of its own, and starts them.
pub struct Troupe {
    pub scene: Arc<Scene>,
    seeds: StdRng,
    pub tasks: Vec<JoinHandle<()>>,
}

impl Troupe {
    pub fn new(scene: Arc<Scene>, seed: u64) -> Self {
        Self {
            scene,
            seeds: StdRng::seed_from_u64(seed),
            tasks: Vec::new(),
        }
    }

    pub fn actor(&mut self, name: impl Display) -> Actor {
        Actor {
            scene: self.scene.clone(),
            name: name.to_string(),
            rng: StdRng::seed_from_u64(self.seeds.random()),
        }
    }

    pub fn start(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(work));
    }
}

pub struct Actor {
    pub scene: Arc<Scene>,
    name: String,
    pub rng: StdRng,
}

impl Actor {
    pub fn note(&self, what: impl Display) {
        let history = &self.scene.stage.history;
        history.note(format_args!("{} {what}", self.name));
    }

    pub async fn pause(&mut self, ms: Range<u64>) {
        let ms = self.rng.random_range(ms);
        sleep(Duration::from_millis(ms)).await;
    }

    fn any_node(&mut self) -> Arc<NodeSlot> {
        let node = self.scene.stage.nodes.choose(&mut self.rng);
        node.expect("a cluster has nodes").clone()
    }

    /// Asks some node, with some patience.
    pub async fn call<T, F>(
        &mut self,
        work: impl FnOnce(Arc<Broker>) -> F + Send + 'static,
    ) -> Called<T>
    where
        T: Send + 'static,
        F: Future<Output = BrokerResult<T>> + Send + 'static,
    {
        let node = self.any_node();
        let patience = Duration::from_millis(self.rng.random_range(300..7000));
        let stage = self.scene.stage.clone();
        stage.call(&node, patience, work).await
    }

    /// Repeats what is safe to repeat until it is answered for good.
    pub async fn insist<T, F>(
        &mut self,
        work: impl Fn(Arc<Broker>) -> F + Clone + Send + 'static,
    ) -> BrokerResult<T>
    where
        T: Send + 'static,
        F: Future<Output = BrokerResult<T>> + Send + 'static,
    {
        loop {
            match self.call(work.clone()).await {
                Called::Done(done) => return Ok(done),
                Called::Refused(error) if !error.retryable() => return Err(error),
                Called::Refused(_) | Called::NotSent | Called::Unknown(_) => {}
            }
            self.pause(10..300).await;
        }
    }

    pub async fn create_topic(&mut self, name: &str, queues: u32) {
        let topic = name.to_owned();
        let made = self.insist(move |broker| {
            let topic = topic.clone();
            async move { broker.create_topic(&topic, topic_config(queues)).await }
        });
        if let Err(error) = made.await {
            self.scene
                .violation(format_args!("topic {name} is not made: {error}"));
        }
    }

    /// A page from an offset on, with the end of the queue; none without an answer.
    pub async fn page(&mut self, queue: &Queue, from: u64) -> Option<(Vec<Message>, u64)> {
        let request = fetch(queue, StartAt::Offset(from), Consistency::Linearizable, 0);
        let called = self.call(|broker| async move { broker.fetch(request).await });
        match called.await {
            Called::Done(page) => Some((page.messages, page.end_offset)),
            _ => None,
        }
    }

    /// All that is visible in a topic, once that can be read.
    pub async fn read(&mut self, topic: &str, queues: u32) -> Vec<Message> {
        let mut messages = Vec::new();
        for queue in 0..queues {
            let queue = (topic.to_owned(), queue);
            let mut next = 0;
            loop {
                if let Some((page, end)) = self.page(&queue, next).await {
                    next = page.last().map_or(next, |message| message.offset + 1);
                    messages.extend(page);
                    if next >= end {
                        break;
                    }
                }
                self.pause(10..50).await;
            }
        }
        messages
    }
}

/// One message for one topic; under a key it is safe to repeat.
pub fn put(topic: &str, message: NewMessage, key: Option<String>) -> ProduceRequest {
    ProduceRequest {
        topic: topic.to_owned(),
        messages: vec![message],
        producer: None,
        idempotency_key: key,
    }
}

pub async fn put_one(broker: Arc<Broker>, request: ProduceRequest) -> BrokerResult<Stored> {
    let mut results = broker.produce(request).await?.results;
    let missing = || BrokerError::Internal("a message without a result".to_owned());
    results.pop().unwrap_or_else(|| Err(missing()))
}

pub fn text(message: &Message) -> String {
    String::from_utf8_lossy(message.value.as_deref().unwrap_or_default()).into_owned()
}

pub fn delay(ms: u64) -> Option<Delay> {
    (ms > 0).then_some(Delay::For(ms))
}

/// The numbers that were acknowledged.
pub type Written = Arc<Mutex<BTreeSet<u64>>>;

/// Writes numbers, each until it is acknowledged.
pub async fn write_numbers(mut actor: Actor, topic: String, pause_ms: Range<u64>, acked: Written) {
    for number in 0u64.. {
        actor.pause(pause_ms.clone()).await;
        if actor.scene.is_closing() {
            return;
        }
        let message = NewMessage {
            value: Some(number.to_string().into()),
            key: Some(format!("k{}", number % 16)),
            ..NewMessage::default()
        };
        let request = put(&topic, message, Some(format!("{topic} {number}")));
        match actor.insist(move |b| put_one(b, request.clone())).await {
            Ok(stored) => {
                let place = (stored.queue, stored.offset);
                actor.note(format_args!("put {number} to {topic}: {place:?}"));
                acked.lock().insert(number);
            }
            Err(error) => {
                let text = format!("{topic}: {number} can't be stored: {error}");
                actor.scene.violation(text);
            }
        }
    }
}

pub fn number(message: &Message) -> Option<u64> {
    text(message).parse().ok()
}

/// How often each number is there.
pub fn counted(messages: &[Message]) -> BTreeMap<u64, u32> {
    let mut counts = BTreeMap::new();
    for message in messages {
        *counts
            .entry(number(message).unwrap_or(u64::MAX))
            .or_default() += 1;
    }
    counts
}
