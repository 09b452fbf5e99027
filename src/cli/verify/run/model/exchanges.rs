//! An exchange over three topics: each message reaches each topic it is routed to, once, and no other.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use reqwest::Method;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::super::findings::Kind;
use super::super::load::HEAL;
use super::{Actor, Scene, api, numbered};
use crate::cli::error::CliError;

const QUEUES: u32 = 2;
const PAUSE_MS: u64 = 80;
/// The end of a topic's name, and what it is bound with.
const BINDINGS: [(&str, &str); 3] = [
    ("exchange-any", "#"),
    ("exchange-orders", "order.*"),
    ("exchange-created", "*.created"),
];
const KEYS: [&str; 4] = [
    "order.created",
    "order.paid",
    "user.created",
    "user.gone.far",
];

#[derive(Debug)]
pub struct Exchanges {
    scene: Arc<Scene>,
    exchange: String,
    topics: Vec<String>,
    acked: Mutex<Vec<u64>>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    published: usize,
    delivered: usize,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals {
            published,
            delivered,
        } = self;
        write!(f, "exchanges: {published} published, {delivered} delivered")
    }
}

fn key(number: u64) -> &'static str {
    KEYS[number as usize % KEYS.len()]
}

/// Whether the binding at this place takes the message: written out, not by a matcher.
fn takes(place: usize, number: u64) -> bool {
    match place {
        0 => true,
        1 => matches!(key(number), "order.created" | "order.paid"),
        _ => matches!(key(number), "order.created" | "user.created"),
    }
}

pub async fn start(
    tasks: &mut JoinSet<()>,
    replicas: u64,
    actor: &mut impl FnMut() -> Actor,
) -> Result<Arc<Exchanges>, CliError> {
    let writer = actor();
    let scene = writer.scene.clone();
    let exchange = scene.name("exchange");
    let put = |path: Vec<String>, body| {
        let scene = scene.clone();
        async move {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            api::until_done(&scene, 0, (Method::PUT, &path), Some(&body), None).await
        }
    };
    let path = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
    let own = path(&["v1", "exchanges", &exchange]);
    put(own, json!({ "kind": "topic" })).await?;
    let mut topics = Vec::new();
    for (name, routing_key) in BINDINGS {
        let topic = scene.name(name);
        api::create_topic(&scene, &topic, QUEUES, replicas).await?;
        let binding = path(&["v1", "exchanges", &exchange, "bindings", &topic]);
        put(binding, json!({ "routing_key": routing_key })).await?;
        topics.push(topic);
    }
    let exchanges = Arc::new(Exchanges {
        scene,
        exchange,
        topics,
        acked: Mutex::default(),
    });
    tasks.spawn(exchanges.clone().publish(writer));
    Ok(exchanges)
}

impl Exchanges {
    pub fn name(&self) -> &str {
        &self.exchange
    }

    async fn publish(self: Arc<Self>, mut actor: Actor) {
        let path = ["v1", "exchanges", &self.exchange, "messages"];
        let pause = std::time::Duration::from_millis(PAUSE_MS);
        let mut number = 0;
        while self.scene.pause_writing(pause).await {
            let value = numbered::value(&self.scene, number);
            let message = json!({
                "value": value,
                "key": format!("k{}", number % 16),
                "routing_key": key(number),
            });
            let body = json!({ "messages": [message] });
            let once = format!("{}-{number}", self.exchange);
            let call = (Method::POST, &path[..]);
            let place = actor.place();
            match api::until_done(&self.scene, place, call, Some(&body), Some(&once)).await {
                Ok(answer) => {
                    let routed = answer["results"][0]["routed"].as_array().map(Vec::len);
                    let expected = (0..BINDINGS.len()).filter(|p| takes(*p, number)).count();
                    if routed != Some(expected) {
                        let text = format!("message {number} was routed to {routed:?} topics");
                        self.scene.found(Kind::Misrouted, text);
                    }
                    self.acked.lock().push(number);
                }
                Err(error) => {
                    let text = format!("the exchange did not take message {number}: {error}");
                    self.scene.found(Kind::NotHealed, text);
                }
            }
            number += 1;
        }
    }

    pub async fn settle(&self) -> Totals {
        let deadline = tokio::time::Instant::now() + HEAL;
        loop {
            let mut stored = Vec::new();
            for topic in &self.topics {
                let mut counts: BTreeMap<u64, u32> = BTreeMap::new();
                for message in api::read_topic(&self.scene, topic).await {
                    let number = numbered::number(&self.scene, message.value.as_deref());
                    *counts.entry(number.unwrap_or(u64::MAX)).or_default() += 1;
                }
                stored.push(counts);
            }
            let missing = self.missing(&stored);
            if missing.is_empty() || tokio::time::Instant::now() > deadline {
                for text in missing {
                    self.scene.found(Kind::Lost, text);
                }
                return self.judge(&stored);
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    }

    fn missing(&self, stored: &[BTreeMap<u64, u32>]) -> Vec<String> {
        let acked = self.acked.lock();
        let mut missing = Vec::new();
        for (place, counts) in stored.iter().enumerate() {
            let wanted = acked.iter().filter(|number| takes(place, **number));
            for number in wanted.filter(|number| !counts.contains_key(number)) {
                let topic = &self.topics[place];
                missing.push(format!("message {number} did not reach {topic}"));
            }
        }
        missing
    }

    fn judge(&self, stored: &[BTreeMap<u64, u32>]) -> Totals {
        for (place, counts) in stored.iter().enumerate() {
            let topic = &self.topics[place];
            for (number, count) in counts {
                if *count > 1 {
                    let text = format!("{topic} has message {number} {count} times");
                    self.scene.found(Kind::Twice, text);
                }
                if *number == u64::MAX || !takes(place, *number) {
                    let text = format!("{topic} has message {number}, not routed to it");
                    self.scene.found(Kind::Misrouted, text);
                }
            }
        }
        let published = self.acked.lock().len();
        if published == 0 {
            let text = "no exchange took a message";
            self.scene.found(Kind::ProvesNothing, text);
        }
        Totals {
            published,
            delivered: stored.iter().map(BTreeMap::len).sum(),
        }
    }
}
