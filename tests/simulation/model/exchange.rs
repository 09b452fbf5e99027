//! An exchange: each message reaches each topic it is routed to, once, and no other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::{
    Broker, BrokerError, BrokerResult, Message, NewMessage, PublishRequest, Published,
};
use quorate::exchange::{Binding, ExchangeKind};
use rand::Rng;

use super::Work;
use super::actor::{Actor, Scene, Troupe, counted, number};
use crate::workload::Called;

const EXCHANGE: &str = "exchange";
const QUEUES: u32 = 2;
/// A topic, and what it is bound with.
const BINDINGS: [(&str, &str); 3] = [
    ("routed-all", "#"),
    ("routed-orders", "order.*"),
    ("routed-created", "*.created"),
];
const KEYS: [&str; 4] = [
    "order.created",
    "order.paid",
    "user.created",
    "user.gone.far",
];

#[derive(Debug)]
pub struct Exchange {
    scene: Arc<Scene>,
    sent: Mutex<BTreeMap<u64, Fate>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Before the next one was sent.
    Acked,
    Unknown,
    Refused,
}

fn routing_key(number: u64) -> &'static str {
    KEYS[number as usize % KEYS.len()]
}

/// Whether the topic at this place gets the message: written out, not by a matcher.
fn takes(place: usize, number: u64) -> bool {
    match place {
        0 => true,
        1 => matches!(routing_key(number), "order.created" | "order.paid"),
        _ => matches!(routing_key(number), "order.created" | "user.created"),
    }
}

/// Messages of one key stay in order.
fn key(number: u64) -> u64 {
    number / KEYS.len() as u64 % 3
}

async fn publish(broker: Arc<Broker>, request: PublishRequest) -> BrokerResult<Published> {
    let mut results = broker.publish_messages(request).await?.results;
    let missing = || BrokerError::Internal("a message without a result".to_owned());
    results.pop().unwrap_or_else(|| Err(missing()))
}

impl Exchange {
    pub async fn prepare(scene: Arc<Scene>, actor: &mut Actor) -> Arc<dyn Work> {
        let kind = ExchangeKind::Topic;
        let made = actor.insist(move |b| async move { b.put_exchange(EXCHANGE, kind).await });
        if let Err(error) = made.await {
            scene.violation(format_args!("the exchange is not made: {error}"));
        }
        for (topic, pattern) in BINDINGS {
            actor.create_topic(topic, QUEUES).await;
            let binding = Binding::Keys(BTreeSet::from([pattern.to_owned()]));
            let bound = actor.insist(move |broker| {
                let binding = binding.clone();
                async move { broker.bind(EXCHANGE, topic, binding).await }
            });
            if let Err(error) = bound.await {
                scene.violation(format_args!("{topic} is not bound: {error}"));
            }
        }
        let sent = Mutex::default();
        Arc::new(Self { scene, sent })
    }

    async fn publish(self: Arc<Self>, mut actor: Actor) {
        for number in 0u64.. {
            actor.pause(20..200).await;
            if self.scene.is_closing() {
                return;
            }
            self.sent.lock().insert(number, Fate::Unknown);
            let insists = actor.rng.random_bool(0.8);
            let message = NewMessage {
                value: Some(number.to_string().into()),
                key: Some(format!("k{}", key(number))),
                ..NewMessage::default()
            };
            let request = PublishRequest {
                exchange: EXCHANGE.to_owned(),
                messages: vec![(message, routing_key(number).to_owned())],
                producer: None,
                idempotency_key: insists.then(|| format!("publish {number}")),
            };
            let answer = match insists {
                true => actor.insist(move |b| publish(b, request.clone())).await,
                false => match actor.call(|b| publish(b, request)).await {
                    Called::Done(published) => Ok(published),
                    Called::Refused(error) => Err(error),
                    Called::NotSent => Err(BrokerError::ShuttingDown),
                    Called::Unknown(why) => {
                        actor.note(format_args!("publish {number}: {why}"));
                        continue;
                    }
                },
            };
            actor.note(format_args!("publish {number}: {}", told(&answer)));
            let fate = match answer {
                Ok(published) => {
                    let routed = published.routed;
                    let places = (0..BINDINGS.len()).filter(|place| takes(*place, number));
                    let wanted: Vec<_> = places.map(|place| BINDINGS[place].0).collect();
                    if routed.len() != wanted.len()
                        || wanted
                            .iter()
                            .any(|topic| !routed.iter().any(|r| r == topic))
                    {
                        let text = format!("{number} goes to {routed:?} and not to {wanted:?}");
                        self.scene.violation(text);
                    }
                    Fate::Acked
                }
                Err(error) if insists => {
                    let text = format!("{number} can't be published: {error}");
                    self.scene.violation(text);
                    Fate::Refused
                }
                Err(_) => Fate::Refused,
            };
            self.sent.lock().insert(number, fate);
        }
    }

    /// What is not where it belongs, as far as these topics have come.
    fn missing(&self, topics: &[Vec<Message>]) -> Vec<String> {
        let there: Vec<BTreeSet<u64>> = topics
            .iter()
            .map(|messages| messages.iter().filter_map(number).collect())
            .collect();
        let mut missing = Vec::new();
        for (number, fate) in self.sent.lock().iter() {
            // Of what is stored for one topic, nothing is left out.
            let wanted = *fate == Fate::Acked || there.iter().any(|t| t.contains(number));
            for (place, topic) in there.iter().enumerate() {
                if wanted && takes(place, *number) && !topic.contains(number) {
                    missing.push(format!("{number} in {}", BINDINGS[place].0));
                }
            }
        }
        missing
    }

    async fn topics(&self, actor: &mut Actor) -> Vec<Vec<Message>> {
        let mut topics = Vec::new();
        for (topic, _) in BINDINGS {
            topics.push(actor.read(topic, QUEUES).await);
        }
        topics
    }

    fn check(&self, place: usize, messages: &[Message]) {
        let topic = BINDINGS[place].0;
        let sent = self.sent.lock();
        for (number, count) in counted(messages) {
            let fate = sent.get(&number).copied().unwrap_or(Fate::Refused);
            if count > 1 || fate == Fate::Refused || !takes(place, number) {
                let text = format!("{topic} has {number} {count} times, and it is {fate:?}");
                self.scene.violation(text);
            }
        }
        for of in 0..3 {
            let numbers = messages.iter().filter_map(number);
            let own: Vec<u64> = numbers
                .filter(|n| key(*n) == of && sent.get(n) == Some(&Fate::Acked))
                .collect();
            if !own.is_sorted() {
                let text = format!("{topic} has the messages of key k{of} as {own:?}");
                self.scene.violation(text);
            }
        }
    }
}

fn told<T>(answer: &BrokerResult<T>) -> String {
    match answer {
        Ok(_) => "stored".to_owned(),
        Err(error) => error.to_string(),
    }
}

impl Work for Exchange {
    fn start(self: Arc<Self>, troupe: &mut Troupe) {
        let actor = troupe.actor("publisher");
        troupe.start(self.publish(actor));
    }

    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>> {
        async move {
            let missing = self.missing(&self.topics(actor).await);
            (!missing.is_empty()).then(|| format!("routed messages: {missing:?}"))
        }
        .boxed()
    }

    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()> {
        async move {
            let topics = self.topics(actor).await;
            let missing = self.missing(&topics);
            if !missing.is_empty() {
                let text = format!("routed messages are gone again: {missing:?}");
                self.scene.violation(text);
            }
            for (place, messages) in topics.iter().enumerate() {
                self.check(place, messages);
            }
            let (sent, routed) = (self.sent.lock().len(), topics.iter().map(Vec::len));
            let routed: usize = routed.sum();
            actor.note(format_args!("{sent} published, {routed} routed"));
        }
        .boxed()
    }
}
