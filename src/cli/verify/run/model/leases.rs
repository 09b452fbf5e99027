//! Messages consumed by lease: none after its ack, none to two at once, and the dead exactly once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinSet;

use super::super::findings::Kind;
use super::numbered::{self, Written};
use super::{Actor, Scene, api};
use crate::cli::error::CliError;

const QUEUES: u32 = 4;
const CONSUMERS: usize = 3;
const RATE: u32 = 15;
const LEASE: Duration = Duration::from_secs(3);
const MAX_DELIVERIES: u32 = 5;
/// Every so many messages one cannot be processed by anybody.
const POISON: u64 = 25;

#[derive(Debug)]
pub struct Leases {
    scene: Arc<Scene>,
    topic: String,
    group: String,
    written: Arc<Mutex<Written>>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    last: BTreeMap<u64, Delivery>,
    /// When the acknowledgement was answered.
    acked: BTreeMap<u64, u64>,
    /// Acknowledged without an answer: it may have counted.
    maybe_acked: BTreeSet<u64>,
    deliveries: u64,
    redelivered: u64,
    lease_lost: u64,
}

#[derive(Debug, Clone, Copy)]
struct Delivery {
    begun_us: u64,
    count: u32,
    /// The consumer let it go.
    given_back: bool,
}

#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    written: usize,
    acked: usize,
    dead: usize,
    deliveries: u64,
    redelivered: u64,
    lease_lost: u64,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "leases: {} messages, {} acknowledged, {} dead letters; {} deliveries, {} of them again, {} acks too late",
            self.written, self.acked, self.dead, self.deliveries, self.redelivered, self.lease_lost
        )
    }
}

#[derive(Debug, Deserialize)]
struct Received {
    messages: Vec<Leased>,
}

#[derive(Debug, Deserialize)]
struct Leased {
    receipt: String,
    delivery_count: u32,
    #[serde(default)]
    value: Option<String>,
}

pub async fn start(
    tasks: &mut JoinSet<()>,
    replicas: u64,
    actor: &mut impl FnMut() -> Actor,
) -> Result<Arc<Leases>, CliError> {
    let writer = actor();
    let scene = writer.scene.clone();
    let topic = scene.name("leases");
    api::create_topic(&scene, &topic, QUEUES, replicas).await?;
    let policy = json!({ "max_deliveries": MAX_DELIVERIES, "backoff_ms": [200, 500] });
    let path = ["v1", "groups", &topic, "retry_policy"];
    api::until_done(&scene, 0, (Method::PUT, &path), Some(&policy), None).await?;
    let leases = Arc::new(Leases {
        group: topic.clone(),
        written: Arc::default(),
        seen: Mutex::default(),
        topic,
        scene,
    });
    let (topic, written) = (leases.topic.clone(), leases.written.clone());
    tasks.spawn(numbered::write(writer, topic, RATE, written, |_, _| {}));
    for _ in 0..CONSUMERS {
        tasks.spawn(leases.clone().consume(actor()));
    }
    Ok(leases)
}

fn is_poison(number: u64) -> bool {
    number % POISON == 4
}

impl Leases {
    async fn consume(self: Arc<Self>, mut actor: Actor) {
        let path = ["v1", "groups", &self.group, "receive"];
        let body = json!({
            "topics": [self.topic],
            "max_messages": 10,
            "wait_ms": 500,
            "lease_ms": LEASE.as_millis() as u64,
        });
        while !self.scene.reading.is_cancelled() {
            let begun_us = self.scene.now_us();
            let place = actor.place();
            let call = (Method::POST, &path[..]);
            let answer = api::send(&self.scene, place, call, Some(&body), None).await;
            let Ok(answer) = answer else {
                self.scene.pause_reading(api::RETRY_AFTER).await;
                continue;
            };
            match Received::deserialize(&answer) {
                Ok(received) => {
                    for leased in received.messages {
                        self.process(&mut actor, leased, begun_us).await;
                    }
                }
                Err(error) => {
                    let text = format!("an answer to receive is none: {error}");
                    self.scene.found(Kind::ProvesNothing, text);
                }
            }
        }
    }

    async fn process(&self, actor: &mut Actor, leased: Leased, begun_us: u64) {
        let Some(number) = numbered::number(&self.scene, leased.value.as_deref()) else {
            let text = format!("a group was given what nobody sent: {:?}", leased.value);
            return self.scene.found(Kind::NeverSent, text);
        };
        self.delivered(number, leased.delivery_count, begun_us);
        let chance: f64 = actor.rng.random();
        if is_poison(number) || chance < 0.04 {
            self.give_back(actor, number, &leased.receipt).await;
        } else if chance < 0.06 && !self.scene.writing.is_cancelled() {
            // A consumer that crashed: the lease runs out.
        } else {
            self.ack(actor, number, &leased.receipt).await;
        }
    }

    fn delivered(&self, number: u64, count: u32, begun_us: u64) {
        let now_us = self.scene.now_us();
        let mut seen = self.seen.lock();
        seen.deliveries += 1;
        if let Some(at_us) = seen.acked.get(&number).filter(|at_us| **at_us < begun_us) {
            let ms = (begun_us - at_us) / 1000;
            let text = format!("message {number} was delivered {ms} ms after its ack");
            self.scene.found(Kind::AfterAck, text);
        }
        if count > MAX_DELIVERIES {
            let text = format!("message {number} was delivered for the {count}th time");
            self.scene.found(Kind::DeadLetter, text);
        }
        if let Some(last) = seen.last.get(&number).copied() {
            seen.redelivered += 1;
            if count <= last.count && last.begun_us < begun_us {
                let was = last.count;
                let text = format!("message {number} has delivery count {count} after {was}");
                self.scene.found(Kind::LeasedTwice, text);
            }
            let leased_until_us = last.begun_us + LEASE.as_micros() as u64;
            if !last.given_back && now_us < leased_until_us && count > last.count {
                let ms = (leased_until_us - now_us) / 1000;
                let text =
                    format!("message {number} was leased again {ms} ms before its lease ended");
                self.scene.found(Kind::LeasedTwice, text);
            }
        }
        let delivery = Delivery {
            begun_us,
            count,
            given_back: false,
        };
        seen.last.insert(number, delivery);
    }

    async fn give_back(&self, actor: &mut Actor, number: u64, receipt: &str) {
        if let Some(last) = self.seen.lock().last.get_mut(&number) {
            last.given_back = true;
        }
        let body = json!({ "receipts": [receipt] });
        let path = ["v1", "groups", &self.group, "nack"];
        let place = actor.place();
        let call = (Method::POST, &path[..]);
        // Without an answer the lease runs out.
        api::send(&self.scene, place, call, Some(&body), None)
            .await
            .ok();
    }

    async fn ack(&self, actor: &mut Actor, number: u64, receipt: &str) {
        let body = json!({ "receipts": [receipt] });
        let path = ["v1", "groups", &self.group, "ack"];
        let mut uncertain = false;
        for _ in 0..3 {
            let place = actor.place();
            let call = (Method::POST, &path[..]);
            match api::send(&self.scene, place, call, Some(&body), None).await {
                Ok(_) => {
                    let now_us = self.scene.now_us();
                    self.seen.lock().acked.entry(number).or_insert(now_us);
                    return;
                }
                Err(error) if error.outcome_unknown() => {
                    uncertain = true;
                    self.seen.lock().maybe_acked.insert(number);
                }
                Err(error) if error.retryable() => {}
                Err(_) => {
                    self.seen.lock().lease_lost += u64::from(!uncertain);
                    return;
                }
            }
            self.scene.pause_reading(api::RETRY_AFTER).await;
        }
    }

    /// Every message is acknowledged or dead in the end, the poison dead, and none of them twice.
    pub async fn settle(&self) -> Totals {
        let dead_topic = format!("_dlq.{}", self.group);
        let mut dead: Vec<u64> = Vec::new();
        let mut left = self.left(&dead);
        for _ in 0..8 {
            let done = || self.left(&dead).iter().all(|number| is_poison(*number));
            self.scene.until(done).await;
            let letters = api::read_topic(&self.scene, &dead_topic).await;
            let of = |value: &Option<String>| numbered::number(&self.scene, value.as_deref());
            dead = letters.iter().filter_map(|m| of(&m.value)).collect();
            left = self.left(&dead);
            if left.is_empty() {
                break;
            }
            self.scene.pause_reading(Duration::from_secs(2)).await;
        }
        if !left.is_empty() {
            let text = format!("{} messages are neither acknowledged nor dead", left.len());
            self.scene
                .found(Kind::NotProcessed, format!("{text}: {left:?}"));
        }
        let unique: BTreeSet<u64> = dead.iter().copied().collect();
        if unique.len() != dead.len() {
            let twice = dead.len() - unique.len();
            let text = format!("{twice} dead letters are stored more than once");
            self.scene.found(Kind::DeadLetter, text);
        }
        let seen = self.seen.lock();
        for number in unique.iter().filter(|n| seen.acked.contains_key(n)) {
            let text = format!("message {number} was acknowledged and is a dead letter");
            self.scene.found(Kind::DeadLetter, text);
        }
        if seen.acked.is_empty() || unique.is_empty() {
            let text = "no message was acknowledged by lease, or none died";
            self.scene.found(Kind::ProvesNothing, text);
        }
        Totals {
            written: self.written.lock().acked.len(),
            acked: seen.acked.len(),
            dead: unique.len(),
            deliveries: seen.deliveries,
            redelivered: seen.redelivered,
            lease_lost: seen.lease_lost,
        }
    }

    fn left(&self, dead: &[u64]) -> Vec<u64> {
        let (written, seen) = (self.written.lock(), self.seen.lock());
        let ended = |number: &u64| {
            seen.acked.contains_key(number)
                || seen.maybe_acked.contains(number)
                || dead.contains(number)
        };
        let left = written.acked.iter().filter(|number| !ended(number));
        left.copied().collect()
    }
}
