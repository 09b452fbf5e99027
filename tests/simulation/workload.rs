//! Clients: they write, retry, read, move leaders, make topics and delete them.
//!
//! A client asks any node, as over a network: the node may be down, or go down before it answers,
//! and the client may lose patience. It tells the oracle what it knows, never more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorate::broker::{
    Broker, BrokerError, BrokerResult, CommitRequest, Consistency, FetchRequest, NewMessage,
    OffsetCommit, Outcome, ProduceAnswer, ProduceRequest, ProducerMark, Selection, StartAt,
    TopicConfig,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::time::{sleep, timeout};

use crate::history::History;
use crate::node::{NoAnswer, NodeSlot};
use crate::oracle::{Oracle, Queue};

/// What the clients share.
#[derive(Debug)]
pub struct Stage {
    pub nodes: Vec<Arc<NodeSlot>>,
    pub history: Arc<History>,
    pub oracle: Oracle,
    pub queues: Vec<Queue>,
    /// No new work; what is open is brought to its end.
    pub closing: AtomicBool,
}

/// What became of a call that was to change something.
pub enum Called<T> {
    Done(T),
    /// For certain without effect.
    Refused(BrokerError),
    NotSent,
    Unknown(String),
}

impl Stage {
    pub async fn call<T, F>(
        &self,
        node: &NodeSlot,
        patience: Duration,
        work: impl FnOnce(Arc<Broker>) -> F + Send + 'static,
    ) -> Called<T>
    where
        T: Send + 'static,
        F: Future<Output = BrokerResult<T>> + Send + 'static,
    {
        let asked = node.ask(move |handles| work(handles.broker));
        match timeout(patience, asked).await {
            Err(_) => Called::Unknown("patience".to_owned()),
            Ok(Err(NoAnswer::NotSent)) => Called::NotSent,
            Ok(Err(NoAnswer::Lost)) => Called::Unknown("lost".to_owned()),
            Ok(Ok(Ok(done))) => Called::Done(done),
            Ok(Ok(Err(error))) => match error.outcome() {
                Outcome::NotCommitted => Called::Refused(error),
                Outcome::Unknown => Called::Unknown(error.to_string()),
            },
        }
    }
}

/// What makes a write safe to repeat.
#[derive(Debug, Clone)]
enum Mark {
    None,
    Key(String),
    Sequence(ProducerMark),
}

/// What is known of a whole request after an attempt.
enum Attempt {
    Acked,
    /// Nothing of it is stored; `again` says whether that may change.
    Refused {
        again: bool,
    },
    Open,
}

pub struct Client {
    id: u64,
    stage: Arc<Stage>,
    rng: StdRng,
    sent: u64,
    /// The queue it writes to with sequences, and its mark.
    producer: Option<(Queue, ProducerMark)>,
    /// Its consumer group's place in each queue: what was acknowledged, and the furthest tried.
    committed: BTreeMap<Queue, (u64, u64)>,
    /// The last write with a mark, to be repeated although it was acknowledged.
    last: Option<(Queue, Vec<String>, Mark)>,
}

impl Client {
    pub fn new(id: u64, seed: u64, stage: Arc<Stage>) -> Self {
        Self {
            id,
            stage,
            rng: StdRng::seed_from_u64(seed ^ (id + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            sent: 0,
            producer: None,
            committed: BTreeMap::new(),
            last: None,
        }
    }

    pub async fn run(mut self) {
        while !self.stage.closing.load(Ordering::Relaxed) {
            match self.rng.random_range(0..100) {
                0..25 => self.write(Mark::None).await,
                25..40 => self.write_with_key().await,
                40..58 => self.write_with_sequence().await,
                58..64 => self.repeat().await,
                64..80 => self.read(Consistency::Linearizable).await,
                80..88 => self.read(Consistency::Stale).await,
                88..91 => self.find_end().await,
                91..94 => self.transfer().await,
                94..97 => self.commit_offset().await,
                97..98 => self.read_offset().await,
                98..99 => self.passing_topic().await,
                _ => sleep(Duration::from_millis(500)).await,
            }
            let pause = self.rng.random_range(5..120);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    fn note(&self, text: String) {
        self.stage.history.note(format_args!("c{} {text}", self.id));
    }

    fn any_node(&mut self) -> Arc<NodeSlot> {
        let node = self.stage.nodes.choose(&mut self.rng);
        node.expect("a cluster has nodes").clone()
    }

    fn any_queue(&mut self) -> Queue {
        let queue = self.stage.queues.choose(&mut self.rng);
        queue.expect("there are topics").clone()
    }

    fn patience(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(300..7000))
    }

    fn new_values(&mut self) -> Vec<String> {
        let count = self.rng.random_range(1..4);
        let values = (0..count).map(|_| {
            self.sent += 1;
            format!("c{}-{}", self.id, self.sent)
        });
        let values: Vec<_> = values.collect();
        for value in &values {
            self.stage.oracle.sending(value);
        }
        values
    }

    async fn write(&mut self, mark: Mark) {
        let (queue, values) = (self.any_queue(), self.new_values());
        self.attempt(&queue, &values, &mark).await;
    }

    async fn write_with_key(&mut self) {
        let (queue, values) = (self.any_queue(), self.new_values());
        let mark = Mark::Key(format!("key of {}", values[0]));
        self.insist(&queue, values, mark).await;
    }

    async fn write_with_sequence(&mut self) {
        let Some((queue, mark)) = self.producer().await else {
            return;
        };
        let values = self.new_values();
        let count = values.len() as u64;
        let sequence = mark.sequence;
        let mark = Mark::Sequence(mark);
        if self.insist(&queue, values, mark).await
            && let Some((_, mark)) = &mut self.producer
        {
            mark.sequence = sequence + count;
        }
    }

    async fn producer(&mut self) -> Option<(Queue, ProducerMark)> {
        if self.producer.is_none() {
            let (node, patience, queue) = (self.any_node(), self.patience(), self.any_queue());
            let registered = self
                .stage
                .call(&node, patience, |broker| async move {
                    broker.register_producer(None).await
                })
                .await;
            if let Called::Done(identity) = registered {
                self.note(format!("is producer {}", identity.id));
                let mark = ProducerMark {
                    id: identity.id,
                    epoch: identity.epoch,
                    sequence: 0,
                };
                self.producer = Some((queue, mark));
            }
        }
        self.producer.clone()
    }

    /// Tries until it is known what became of it, on whatever node. True when it is stored.
    async fn insist(&mut self, queue: &Queue, values: Vec<String>, mark: Mark) -> bool {
        loop {
            match self.attempt(queue, &values, &mark).await {
                Attempt::Acked => {
                    self.last = Some((queue.clone(), values, mark));
                    return true;
                }
                Attempt::Refused { again: false } => {
                    let text = format!("c{}: {values:?} can't be stored", self.id);
                    self.stage.history.violation(text);
                    return false;
                }
                Attempt::Refused { again: true } | Attempt::Open => {
                    sleep(Duration::from_millis(self.rng.random_range(10..400))).await;
                    values.iter().for_each(|v| self.stage.oracle.retrying(v));
                }
            }
        }
    }

    /// What is acknowledged is acknowledged again, at the same place.
    async fn repeat(&mut self) {
        if let Some((queue, values, mark)) = self.last.clone() {
            self.attempt(&queue, &values, &mark).await;
        }
    }

    async fn attempt(&mut self, queue: &Queue, values: &[String], mark: &Mark) -> Attempt {
        let request = request(queue, values, mark);
        let (node, patience) = (self.any_node(), self.patience());
        let what = format!(
            "put {values:?} to {}/{} via {}",
            queue.0,
            queue.1,
            node.id()
        );
        self.note(format!("{what} ({mark:?})"));
        let called = self
            .stage
            .call(&node, patience, |broker| async move {
                broker.produce(request).await
            })
            .await;
        let oracle = &self.stage.oracle;
        let (attempt, how) = match called {
            Called::Done(answer) => self.judge(queue, values, answer),
            Called::Refused(error) => {
                values.iter().for_each(|value| oracle.refused(value));
                let again = error.retryable();
                (Attempt::Refused { again }, format!("refused: {error}"))
            }
            Called::NotSent => {
                values.iter().for_each(|value| oracle.refused(value));
                (Attempt::Refused { again: true }, "not sent".to_owned())
            }
            Called::Unknown(why) => {
                values.iter().for_each(|value| oracle.unknown(value));
                (Attempt::Open, format!("unknown: {why}"))
            }
        };
        self.note(format!("{what}: {how}"));
        attempt
    }

    /// All messages of a request go into one batch: they have one fate.
    fn judge(&self, queue: &Queue, values: &[String], answer: ProduceAnswer) -> (Attempt, String) {
        let oracle = &self.stage.oracle;
        let mut attempt = (Attempt::Acked, String::new());
        for (value, result) in values.iter().zip(answer.results) {
            attempt = match result {
                Ok(stored) if stored.queue == queue.1 => match stored.offset {
                    Some(offset) => {
                        oracle.acked(value, queue, offset);
                        (Attempt::Acked, format!("stored at {offset}"))
                    }
                    None => (Attempt::Open, "invisible".to_owned()),
                },
                Ok(stored) => {
                    let text = format!("{value} was sent to {queue:?} and is in {}", stored.queue);
                    self.stage.history.violation(text);
                    (Attempt::Acked, String::new())
                }
                Err(error) if error.outcome() == Outcome::NotCommitted => {
                    oracle.refused(value);
                    let again = error.retryable();
                    (Attempt::Refused { again }, format!("refused: {error}"))
                }
                Err(error) => {
                    oracle.unknown(value);
                    (Attempt::Open, format!("unknown: {error}"))
                }
            };
        }
        attempt
    }

    async fn read(&mut self, consistency: Consistency) {
        let (queue, node, patience) = (self.any_queue(), self.any_node(), self.patience());
        let end = self.stage.oracle.end(&queue);
        let start = self.rng.random_range(end.saturating_sub(30)..=end);
        let wait_ms = [0, 0, 700][self.rng.random_range(0..3)];
        let request = fetch(&queue, StartAt::Offset(start), consistency, wait_ms);
        let what = format!(
            "get {}/{} from {start} {consistency:?} via {}",
            queue.0,
            queue.1,
            node.id()
        );
        let called = self
            .stage
            .call(&node, patience, |broker| async move {
                broker.fetch(request).await
            })
            .await;
        let history = &self.stage.history;
        match called {
            Called::Done(answer) => {
                let seen = answer.messages.len();
                self.note(format!(
                    "{what}: {seen} messages, end {}",
                    answer.end_offset
                ));
                // A page may end early, but what is known and asked for is not missing.
                let misses = seen == 0 && (start < end || answer.end_offset < end);
                if misses && consistency == Consistency::Linearizable {
                    history.violation(format!("{what}: {end} were known before"));
                }
                for (offset, message) in (start..).zip(&answer.messages) {
                    if message.offset != offset {
                        let found = message.offset;
                        history.violation(format!("{what}: {found} where {offset} should be"));
                    }
                    let value = message.value.as_deref().unwrap_or_default();
                    let value = String::from_utf8_lossy(value);
                    self.stage.oracle.seen(&queue, message.offset, &value);
                }
            }
            Called::Refused(error) => {
                let out_of_range = matches!(error, BrokerError::OffsetOutOfRange { .. });
                if out_of_range && consistency == Consistency::Linearizable {
                    history.violation(format!("{what}: {error}"));
                }
                self.note(format!("{what}: {error}"));
            }
            Called::NotSent => {}
            Called::Unknown(why) => self.note(format!("{what}: {why}")),
        }
    }

    async fn find_end(&mut self) {
        let (queue, node, patience) = (self.any_queue(), self.any_node(), self.patience());
        let end = self.stage.oracle.end(&queue);
        let request = fetch(&queue, StartAt::Latest, Consistency::Linearizable, 0);
        let what = format!("end of {}/{} via {}", queue.0, queue.1, node.id());
        let called = self
            .stage
            .call(&node, patience, |broker| async move {
                broker.fetch(request).await
            })
            .await;
        if let Called::Done(answer) = called {
            self.note(format!("{what}: {}", answer.end_offset));
            if answer.end_offset < end {
                let text = format!("{what}: {} and {end} were known before", answer.end_offset);
                self.stage.history.violation(text);
            }
        }
    }

    fn consumer_group(&self) -> String {
        format!("consumers-{}", self.id)
    }

    async fn commit_offset(&mut self) {
        let (queue, node, patience) = (self.any_queue(), self.any_node(), self.patience());
        let end = self.stage.oracle.end(&queue);
        let (floor, tried) = self.committed.get(&queue).copied().unwrap_or_default();
        let offset = self.rng.random_range(floor..=end.max(floor));
        self.committed
            .insert(queue.clone(), (floor, tried.max(offset)));
        let request = CommitRequest {
            group: self.consumer_group(),
            offsets: vec![OffsetCommit {
                topic: queue.0.clone(),
                queue: queue.1,
                offset,
            }],
            member: None,
            allow_rewind: false,
        };
        let what = format!(
            "commit {offset} of {}/{} via {}",
            queue.0,
            queue.1,
            node.id()
        );
        let called = self
            .stage
            .call(&node, patience, |broker| async move {
                let mut results = broker.commit_offsets(request).await?;
                results.remove(0).map(drop)
            })
            .await;
        match called {
            Called::Done(()) => {
                self.note(what);
                self.committed.insert(queue, (offset, tried.max(offset)));
            }
            // An earlier attempt got through, after all.
            Called::Refused(BrokerError::OffsetConflict { committed, .. })
                if committed > offset && committed <= tried =>
            {
                self.committed.insert(queue, (committed, tried));
            }
            Called::Refused(error) if !error.retryable() => {
                let text = format!("c{}: {what}: {error}", self.id);
                self.stage.history.violation(text);
            }
            Called::Refused(_) | Called::NotSent | Called::Unknown(_) => {
                self.note(format!("{what}: no answer"));
            }
        }
    }

    /// What was committed has not gone back.
    async fn read_offset(&mut self) {
        let ((topic, queue), node, patience) = (self.any_queue(), self.any_node(), self.patience());
        let group = self.consumer_group();
        let of = topic.clone();
        let called = self
            .stage
            .call(&node, patience, |broker| async move {
                broker.group_offsets(&group, Some(&of)).await
            })
            .await;
        let Called::Done(rows) = called else { return };
        let row = rows.iter().find(|row| row.queue == queue);
        let found = row.and_then(|row| row.offset).unwrap_or(0);
        let known = self.committed.get(&(topic.clone(), queue));
        let (floor, tried) = known.copied().unwrap_or_default();
        self.note(format!("has {found} of {topic}/{queue} via {}", node.id()));
        if found < floor || found > tried {
            let text = format!(
                "c{}: {topic}/{queue} via {}: {found} is committed, not {floor} to {tried}",
                self.id,
                node.id()
            );
            self.stage.history.violation(text);
        }
    }

    async fn transfer(&mut self) {
        let ((topic, queue), node, to) = (self.any_queue(), self.any_node(), self.any_node().id());
        let patience = self.patience();
        self.note(format!("move {topic}/{queue} to {to} via {}", node.id()));
        self.stage
            .call(&node, patience, move |broker| async move {
                broker.transfer_leader(&topic, queue, to).await
            })
            .await;
    }

    /// A topic that comes, is written to, and goes; what is in it is nobody's business.
    async fn passing_topic(&mut self) {
        self.sent += 1;
        let name = format!("passing-{}-{}", self.id, self.sent);
        let (node, patience) = (self.any_node(), self.patience());
        self.note(format!("make {name} via {}", node.id()));
        let topic = name.clone();
        self.stage
            .call(&node, patience, |broker| async move {
                broker.create_topic(&topic, topic_config(1)).await
            })
            .await;
        let node = self.any_node();
        let put = request(&(name.clone(), 0), &["in passing".to_owned()], &Mark::None);
        self.stage
            .call(&node, patience, |broker| async move {
                broker.produce(put).await
            })
            .await;
        let node = self.any_node();
        self.note(format!("delete {name} via {}", node.id()));
        self.stage
            .call(&node, patience, |broker| async move {
                broker.delete_topic(&name).await
            })
            .await;
    }

    /// Writes to a queue until that works.
    pub async fn write_at_last(&mut self, queue: &Queue) {
        loop {
            let values = self.new_values();
            if let Attempt::Acked = self.attempt(queue, &values, &Mark::None).await {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

pub fn topic_config(queues: u32) -> TopicConfig {
    TopicConfig {
        queues,
        hash_queues: 0,
        ..TopicConfig::default()
    }
}

fn request(queue: &Queue, values: &[String], mark: &Mark) -> ProduceRequest {
    let message = |value: &String| NewMessage {
        value: Some(value.clone().into()),
        queue: Some(queue.1),
        ..NewMessage::default()
    };
    ProduceRequest {
        topic: queue.0.clone(),
        messages: values.iter().map(message).collect(),
        producer: match mark {
            Mark::Sequence(mark) => Some(mark.clone()),
            _ => None,
        },
        idempotency_key: match mark {
            Mark::Key(key) => Some(key.clone()),
            _ => None,
        },
    }
}

pub fn fetch(
    (topic, queue): &Queue,
    start: StartAt,
    consistency: Consistency,
    wait_ms: u64,
) -> FetchRequest {
    FetchRequest {
        topic: topic.clone(),
        queue: *queue,
        start,
        max_messages: 1000,
        max_bytes: 1 << 20,
        wait_ms,
        selection: Selection::default(),
        consistency,
    }
}
