//! Producers: each sends one request after the other and writes down what became of it.
//!
//! Those without a number or key send every message once: acknowledged, refused or unknown. Those
//! with one repeat the request through other nodes until it is acknowledged, and now and then
//! once more after that.

use std::collections::HashMap;
use std::time::Duration;

use rand::Rng;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::super::super::super::client::{Repeat, Request};
use super::super::super::super::error::CliError;
use super::super::super::super::wire::{
    NewMessage, ProduceAnswer, ProduceBody, ProduceResult, ProducerIdentity, ProducerMark, Stored,
};
use super::super::findings::Kind;
use super::super::history::{Id, Outcome, Source, time};
use super::super::plan::Plan;
use super::super::stage::mark;
use super::{Actor, HEAL, node};

/// Longer than the servers' own bound on writes, so that mostly they say what became of one.
const ONCE_TIMEOUT: Duration = Duration::from_secs(7);
/// One try of a request that is repeated: a silent node must not eat the whole time.
const TRY_TIMEOUT: Duration = Duration::from_millis(1500);
const RETRY_AFTER: Duration = Duration::from_millis(30);
/// A request that was acknowledged is sent once more with this probability.
const AGAIN: f64 = 0.05;
const KEYS: u32 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    /// One message to a queue, once.
    Plain,
    /// Up to ten messages to a queue, once.
    Batch,
    /// Messages with keys, which find their queues themselves, once.
    Keyed,
    /// Repeated under an idempotency key.
    KeyRetry,
    /// Repeated under producer, epoch and sequence.
    Numbered,
}

const SORTS: [Sort; 8] = [
    Sort::Plain,
    Sort::Plain,
    Sort::Batch,
    Sort::Keyed,
    Sort::KeyRetry,
    Sort::KeyRetry,
    Sort::Numbered,
    Sort::Numbered,
];

struct Producer {
    actor: Actor,
    sort: Sort,
    number: u16,
    witness: u16,
    /// Between two messages, on average.
    pace: Duration,
    identity: Option<ProducerIdentity>,
    /// Of the next message, by queue.
    sequences: HashMap<u16, u64>,
    /// Where each key's messages went.
    homes: HashMap<(usize, u32), u16>,
}

pub fn start(tasks: &mut JoinSet<()>, plan: &Plan, mut actor: impl FnMut() -> Actor) {
    let share = plan.rate as f64 / SORTS.len() as f64;
    for (place, sort) in SORTS.into_iter().enumerate() {
        let actor = actor();
        let (number, witness) = {
            let mut history = actor.stage.history.lock();
            let name = format!("producer {place} ({sort:?})").to_lowercase();
            let witness = history.add_witness(format!("an acknowledgement to {name}"));
            (history.add_producer(name), witness)
        };
        let producer = Producer {
            actor,
            sort,
            number,
            witness,
            pace: Duration::from_secs_f64(1.0 / share),
            identity: None,
            sequences: HashMap::new(),
            homes: HashMap::new(),
        };
        tasks.spawn(producer.run());
    }
}

/// A request that was put together: its messages have consecutive ids from the first on.
struct Prepared {
    topic: usize,
    first: Id,
    /// The queue it names.
    lane: Option<u16>,
    messages: Vec<NewMessage>,
    keys: Vec<u32>,
    idempotency_key: Option<String>,
    sequence: Option<u64>,
}

impl Producer {
    async fn run(mut self) {
        let mut due = Instant::now();
        while !self.actor.stop.is_cancelled() {
            if self.sort == Sort::Numbered && self.identity.is_none() {
                self.register().await;
                continue;
            }
            let sent = self.send().await;
            // A cluster that was away is not flooded afterwards.
            due = (due + self.pace * sent).max(Instant::now());
            tokio::select! {
                () = self.actor.stop.cancelled() => {}
                () = sleep_until(due) => {}
            }
        }
    }

    async fn register(&mut self) {
        let place = self.actor.pick();
        let request = Request::new(Method::POST, &["v1", "producers"], Repeat::Always);
        let name = format!("{}-{}", self.actor.run, self.number);
        let Ok(request) = request.timeout(TRY_TIMEOUT).json(&json!({ "name": name })) else {
            return;
        };
        match node(&self.actor.stage, place).client.read(request).await {
            Ok(identity) => self.identity = Some(identity),
            Err(_) => {
                self.actor.pause(RETRY_AFTER).await;
            }
        }
    }

    /// Sends one request; gives the number of its messages.
    async fn send(&mut self) -> u32 {
        let place = self.actor.pick();
        let prepared = self.prepare(node(&self.actor.stage, place).id);
        let count = prepared.messages.len() as u32;
        match self.sort {
            Sort::Plain | Sort::Batch | Sort::Keyed => self.once(&prepared, place).await,
            Sort::KeyRetry | Sort::Numbered => self.until_acked(&prepared, place).await,
        }
        count
    }

    fn prepare(&mut self, node: u64) -> Prepared {
        let topics = self.actor.stage.topics.len();
        let topic = self.actor.rng.random_range(0..topics);
        let queue = self.actor.rng.random_range(0..self.actor.stage.queues());
        let rng = &mut self.actor.rng;
        let count: u16 = match self.sort {
            Sort::Plain => 1,
            Sort::Batch => rng.random_range(2..=10),
            Sort::Keyed | Sort::KeyRetry => rng.random_range(1..=3),
            Sort::Numbered => rng.random_range(1..=5),
        };
        let named = !matches!(self.sort, Sort::Keyed | Sort::KeyRetry);
        let lane = named.then(|| self.actor.stage.lane_of(topic, queue));
        let keys: Vec<u32> = match self.sort {
            Sort::Keyed => (0..count).map(|_| rng.random_range(0..KEYS)).collect(),
            _ => Vec::new(),
        };
        let mut history = self.actor.stage.history.lock();
        let now_us = self.actor.stage.now_us();
        let first = history.begin(self.number, count, lane, (node, now_us));
        drop(history);
        let messages = (0..count).map(|part| NewMessage {
            value: Some(nth(first, part.into()).value(&self.actor.run)),
            key: keys.get(usize::from(part)).map(|key| format!("key-{key}")),
            queue: lane.map(|_| queue),
            ..NewMessage::default()
        });
        let messages = messages.collect();
        let sequence = (self.sort == Sort::Numbered).then(|| {
            let next = lane.and_then(|lane| self.sequences.get(&lane).copied());
            next.unwrap_or(0)
        });
        let name = || format!("{}-{}-{}", self.actor.run, self.number, first.number);
        Prepared {
            topic,
            first,
            lane,
            messages,
            keys,
            idempotency_key: (self.sort == Sort::KeyRetry).then(name),
            sequence,
        }
    }

    async fn post(
        &self,
        prepared: &Prepared,
        place: usize,
        timeout: Duration,
    ) -> Result<ProduceAnswer, CliError> {
        let stage = &self.actor.stage;
        let mark = self.identity.as_ref().zip(prepared.sequence);
        let body = ProduceBody {
            messages: &prepared.messages,
            producer: mark.map(|(identity, sequence)| ProducerMark {
                id: &identity.id,
                epoch: identity.epoch,
                sequence,
            }),
        };
        let path = ["v1", "topics", &stage.topics[prepared.topic], "messages"];
        let mut request = Request::new(Method::POST, &path, Repeat::IfUnsent)
            .timeout(timeout)
            .json(&body)?;
        if let Some(key) = &prepared.idempotency_key {
            request = request.header("idempotency-key", key);
        }
        node(stage, place).client.read(request).await
    }

    async fn once(&mut self, prepared: &Prepared, place: usize) {
        let answer = self.post(prepared, place, ONCE_TIMEOUT).await;
        let failed = answer.is_err();
        match answer {
            Ok(answer) => self.take(prepared, &answer, place),
            Err(error) => {
                let outcome = outcome(&error);
                let now_us = self.actor.stage.now_us();
                let mut history = self.actor.stage.history.lock();
                for part in 0..prepared.messages.len() {
                    history.settle(nth(prepared.first, part), outcome, now_us);
                }
            }
        }
        if failed {
            self.actor.pause(RETRY_AFTER).await;
        }
    }

    /// Repeats until acknowledged; gives up only long after the stop.
    async fn until_acked(&mut self, prepared: &Prepared, mut place: usize) {
        let mut give_up = None;
        loop {
            match self.post(prepared, place, TRY_TIMEOUT).await {
                Ok(answer) if all_stored(&answer) => {
                    self.take(prepared, &answer, place);
                    break;
                }
                Ok(answer) => {
                    if let Some(refused) = refused_for_good(&answer) {
                        return self.complain(prepared, &refused);
                    }
                }
                Err(error) if !error.retryable() && !error.outcome_unknown() => {
                    return self.complain(prepared, &error.to_string());
                }
                Err(_) => {}
            }
            if self.actor.stop.is_cancelled() {
                let give_up = *give_up.get_or_insert_with(|| Instant::now() + HEAL);
                if Instant::now() > give_up {
                    let text = "a retry was still not acknowledged long after the last fault";
                    let lane = prepared.lane.unwrap_or(0);
                    let mut history = self.actor.stage.history.lock();
                    history.found(Kind::NotHealed, lane, text, vec![prepared.first], vec![]);
                    return;
                }
                tokio::time::sleep(RETRY_AFTER).await;
            } else {
                self.actor.pause(RETRY_AFTER).await;
            }
            place += 1;
        }
        if let (Some(lane), Some(sequence)) = (prepared.lane, prepared.sequence) {
            let next = sequence + prepared.messages.len() as u64;
            self.sequences.insert(lane, next);
        }
        // A client that did not hear the answer asks again: it must hear the same.
        if self.actor.rng.random_bool(AGAIN) {
            let place = self.actor.pick();
            if let Ok(answer) = self.post(prepared, place, TRY_TIMEOUT).await {
                self.take(prepared, &answer, place);
            }
        }
    }

    /// The request can't have been wrong: it is as good as it was the first time.
    fn complain(&mut self, prepared: &Prepared, why: &str) {
        let line = format!("{} it was refused: {why}", self.actor.stage.time());
        let lane = prepared.lane.unwrap_or(0);
        let text = "a request that names its producer or key was refused for good";
        let mut history = self.actor.stage.history.lock();
        let ids = vec![prepared.first];
        history.found(Kind::RetryRefused, lane, text, ids, vec![line]);
        drop(history);
        // Begins anew, with a new epoch.
        self.identity = None;
        self.sequences.clear();
    }

    fn take(&mut self, prepared: &Prepared, answer: &ProduceAnswer, place: usize) {
        let stage = self.actor.stage.clone();
        let now_us = stage.now_us();
        let by = Source {
            witness: self.witness,
            node: node(&stage, place).id,
            at_us: now_us,
        };
        let mut history = stage.history.lock();
        if answer.results.len() != prepared.messages.len() {
            let (results, messages) = (answer.results.len(), prepared.messages.len());
            let text = format!("{results} results for {messages} messages");
            let lane = prepared.lane.unwrap_or(0);
            history.found(
                Kind::RetryRefused,
                lane,
                &text,
                vec![prepared.first],
                vec![],
            );
        }
        for (part, result) in answer.results.iter().enumerate() {
            let id = nth(prepared.first, part);
            match result {
                ProduceResult::Stored(Stored {
                    queue,
                    offset: Some(offset),
                    message_id,
                }) if *queue < stage.queues() => {
                    let lane = stage.lane_of(prepared.topic, *queue);
                    let place = (lane, *offset);
                    history.acked(id, place, mark(message_id), by);
                    if let Some(key) = prepared.keys.get(part) {
                        let home = *self.homes.entry((prepared.topic, *key)).or_insert(lane);
                        if home != lane {
                            let other = history.lane(home).name();
                            let text = format!("key-{key} went to {other} before");
                            history.found(Kind::KeyMoved, lane, &text, vec![id], vec![]);
                        }
                    }
                }
                ProduceResult::Stored(_) => {
                    let line = format!("{} acknowledged without a place", time(now_us));
                    let text = "an acknowledgement names no place";
                    history.found(Kind::NeverSent, 0, text, vec![id], vec![line]);
                }
                ProduceResult::Dropped { .. } => history.settle(id, Outcome::Refused, now_us),
                ProduceResult::Failed { error } => {
                    let outcome = match error.outcome.as_deref() {
                        Some("not_committed") => Outcome::Refused,
                        _ => Outcome::Unknown,
                    };
                    history.settle(id, outcome, now_us);
                }
            }
        }
    }
}

fn nth(first: Id, part: usize) -> Id {
    Id {
        number: first.number + part as u32,
        ..first
    }
}

/// What a failed request says of all its messages.
pub fn outcome(error: &CliError) -> Outcome {
    match error {
        // Nobody has taken a byte of it.
        CliError::Unreachable { .. } => Outcome::Refused,
        CliError::Problem(problem) if problem.outcome.as_deref() == Some("not_committed") => {
            Outcome::Refused
        }
        _ => Outcome::Unknown,
    }
}

fn all_stored(answer: &ProduceAnswer) -> bool {
    let stored = |result: &ProduceResult| matches!(result, ProduceResult::Stored(_));
    answer.results.iter().all(stored)
}

fn refused_for_good(answer: &ProduceAnswer) -> Option<String> {
    answer.results.iter().find_map(|result| match result {
        ProduceResult::Failed { error } if !error.retryable && !error.outcome_unknown() => {
            Some(format!("{}: {:?}", error.code, error.detail))
        }
        _ => None,
    })
}
