//! Transactions over two topics, and one that reads, processes and writes: all of it or nothing.
//!
//! Some producers decide themselves, some crash and leave the decision to the check-back, which a
//! poller answers out of a "database" that remembers what it has said.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use reqwest::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::findings::Kind;
use super::super::load::HEAL;
use super::{Actor, Scene, api, numbered};
use crate::cli::error::CliError;

const QUEUES: u32 = 2;
const PRODUCERS: u64 = 3;
const PAUSE: Duration = Duration::from_millis(200);
const TIMEOUT_MS: u64 = 2_000;
const CHECK_INTERVAL_MS: u64 = 1_000;

#[derive(Debug)]
pub struct Transactions {
    scene: Arc<Scene>,
    topics: [String; 2],
    /// What the read-process-write worker writes to.
    derived: String,
    producer_group: String,
    worker_group: String,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    begun: BTreeMap<u64, Begun>,
    /// What was answered of each transaction, by its id.
    ends: HashMap<String, End>,
    /// What the "database" says of a transaction whose producer is gone.
    decided: HashMap<String, bool>,
    checked: u64,
    worked: u64,
    both: u64,
}

#[derive(Debug, Clone)]
struct Begun {
    parts: u64,
    /// None: the answer never came.
    id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Committed,
    RolledBack,
}

#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    begun: usize,
    committed: usize,
    rolled_back: usize,
    unknown: usize,
    checked_back: u64,
    derived: usize,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "transactions: {} begun, {} committed, {} rolled back, {} of unknown fate; {} ended by check-back; {} messages derived in one with their offset",
            self.begun,
            self.committed,
            self.rolled_back,
            self.unknown,
            self.checked_back,
            self.derived
        )
    }
}

pub async fn start(
    tasks: &mut JoinSet<()>,
    replicas: u64,
    actor: &mut impl FnMut() -> Actor,
) -> Result<Arc<Transactions>, CliError> {
    let scene = actor().scene;
    let topics = [scene.name("tx-1"), scene.name("tx-2")];
    let derived = scene.name("tx-derived");
    for topic in topics.iter().chain([&derived]) {
        api::create_topic(&scene, topic, QUEUES, replicas).await?;
    }
    let transactions = Arc::new(Transactions {
        topics,
        derived,
        producer_group: scene.name("tx-producers"),
        worker_group: scene.name("tx-worker"),
        ledger: Mutex::default(),
        scene,
    });
    for producer in 0..PRODUCERS {
        tasks.spawn(transactions.clone().produce(actor(), producer));
    }
    tasks.spawn(transactions.clone().check_back(actor()));
    tasks.spawn(transactions.clone().work(actor()));
    Ok(transactions)
}

impl Transactions {
    async fn produce(self: Arc<Self>, mut actor: Actor, producer: u64) {
        let mut number = producer;
        while self.scene.pause_writing(PAUSE).await {
            let parts = actor.rng.random_range(2..=4u64);
            if let Some(id) = self.begin(actor.place(), number, parts).await {
                match actor.rng.random_range(0..10) {
                    // A producer that crashed; the check-back finds it.
                    0..3 => {}
                    3..5 => self.end(actor.place(), &id, End::RolledBack).await,
                    _ => self.end(actor.place(), &id, End::Committed).await,
                }
            }
            number += PRODUCERS;
        }
    }

    async fn begin(&self, place: usize, number: u64, parts: u64) -> Option<String> {
        let begun = Begun { parts, id: None };
        self.ledger.lock().begun.insert(number, begun);
        let messages: Vec<Value> = (0..parts)
            .map(|part| {
                let value = numbered::value(&self.scene, number);
                let topic = &self.topics[part as usize % 2];
                json!({ "topic": topic, "value": format!("{value}:{part}") })
            })
            .collect();
        let body = json!({
            "producer_group": self.producer_group,
            "timeout_ms": TIMEOUT_MS,
            "check_interval_ms": CHECK_INTERVAL_MS,
            "messages": messages,
        });
        let path = ["v1", "transactions"];
        let answer = api::send(&self.scene, place, (Method::POST, &path), Some(&body), None);
        let id = answer.await.ok()?["transaction_id"].as_str()?.to_owned();
        if let Some(begun) = self.ledger.lock().begun.get_mut(&number) {
            begun.id = Some(id.clone());
        }
        Some(id)
    }

    /// Asks for an end until it is answered. Another end than asked for may have come first.
    async fn end(&self, place: usize, id: &str, end: End) {
        self.ledger
            .lock()
            .decided
            .insert(id.to_owned(), end == End::Committed);
        let verb = match end {
            End::Committed => "commit",
            End::RolledBack => "rollback",
        };
        let path = ["v1", "transactions", id, verb];
        let call = (Method::POST, &path[..]);
        match api::until_done(&self.scene, place, call, Some(&json!({})), None).await {
            Ok(_) => self.ended(id, end),
            // It had ended the other way: by expiry, or by the poller's answer.
            Err(error) if api::code(&error) == Some("transaction_ended") => {}
            Err(error) => {
                let text = format!("transaction {id} could not be ended: {error}");
                self.scene.found(Kind::NotHealed, text);
            }
        }
    }

    fn ended(&self, id: &str, end: End) {
        let mut ledger = self.ledger.lock();
        let known = *ledger.ends.entry(id.to_owned()).or_insert(end);
        if known != end {
            ledger.both += 1;
            let text = format!("transaction {id} was answered as committed and as rolled back");
            self.scene.found(Kind::BothEnds, text);
        }
    }

    /// Any instance of the producer group: asks what needs an answer, and gives it.
    async fn check_back(self: Arc<Self>, mut actor: Actor) {
        while self.scene.pause_reading(Duration::from_millis(200)).await {
            for id in self.listed("needs_check", actor.place()).await {
                let commit = {
                    let mut ledger = self.ledger.lock();
                    ledger.checked += 1;
                    let chance = actor.rng.random_bool(0.5);
                    *ledger.decided.entry(id.clone()).or_insert(chance)
                };
                let end = match commit {
                    true => End::Committed,
                    false => End::RolledBack,
                };
                self.end(actor.place(), &id, end).await;
            }
        }
    }

    /// Ids of the transactions in this state.
    async fn listed(&self, state: &str, place: usize) -> Vec<String> {
        let path = ["v1", "transactions"];
        let nodes = &self.scene.stage.nodes;
        let request = crate::cli::client::Request::get(&path)
            .timeout(api::TRY)
            .query("producer_group", &self.producer_group)
            .query("state", state);
        let answer = nodes[place % nodes.len()].client.call(request).await;
        let Ok(answer) = answer else {
            return Vec::new();
        };
        let listed = answer["transactions"].as_array().cloned();
        let listed = listed.unwrap_or_default().into_iter();
        let ids = listed.filter_map(|t| Some(t["transaction_id"].as_str()?.to_owned()));
        ids.collect()
    }

    /// Reads queue 0 of the first topic, and writes what it makes of a message together with its
    /// own offset. It begins again from the committed offset whenever it is unsure.
    async fn work(self: Arc<Self>, mut actor: Actor) {
        while self.scene.pause_reading(Duration::from_millis(100)).await {
            if self.step(&mut actor).await.is_none() {
                self.scene.pause_reading(Duration::from_millis(300)).await;
            }
        }
    }

    async fn step(&self, actor: &mut Actor) -> Option<()> {
        let from = self.committed(actor.place()).await?;
        let topic = &self.topics[0];
        let page = api::page(&self.scene, actor.place(), topic, 0, from).await;
        let page = page.ok()?;
        let message = page.messages.first()?;
        let (value, next) = (message.offset.to_string(), message.offset + 1);
        let body = json!({
            "producer_group": self.worker_group,
            "timeout_ms": TIMEOUT_MS,
            "check_interval_ms": CHECK_INTERVAL_MS,
            "max_checks": 2,
            "messages": [{ "topic": self.derived, "value": value }],
            "offsets": [{
                "group": self.worker_group, "topic": topic, "queue": 0, "offset": next,
            }],
        });
        let path = ["v1", "transactions"];
        let call = (Method::POST, &path[..]);
        let answer = api::send(&self.scene, actor.place(), call, Some(&body), None).await;
        let id = answer.ok()?["transaction_id"].as_str()?.to_owned();
        // From here on nobody moves the offset. The transaction before may have, until now.
        let moved = self.committed(actor.place()).await != Some(from);
        let end = if moved { "rollback" } else { "commit" };
        let path = ["v1", "transactions", &id, end];
        let call = (Method::POST, &path[..]);
        let body = json!({});
        let place = actor.place();
        let ended = api::until_done(&self.scene, place, call, Some(&body), None).await;
        if ended.is_ok() && !moved {
            self.ledger.lock().worked += 1;
        }
        Some(())
    }

    /// The worker's committed offset in queue 0 of the first topic.
    async fn committed(&self, place: usize) -> Option<u64> {
        let path = ["v1", "groups", &self.worker_group, "offsets"];
        let nodes = &self.scene.stage.nodes;
        let request = crate::cli::client::Request::get(&path)
            .timeout(api::TRY)
            .query("topic", &self.topics[0]);
        let answer = nodes[place % nodes.len()].client.call(request).await;
        let offsets = answer.ok()?["offsets"].as_array()?.clone();
        let own = offsets.iter().find(|offset| offset["queue"] == 0)?;
        Some(own["offset"].as_u64().unwrap_or(0))
    }

    /// Everything has ended; each transaction is visible as a whole or not at all.
    pub async fn settle(&self) -> Totals {
        let deadline = Instant::now() + HEAL * 2;
        let mut place = 0;
        loop {
            place += 1;
            let mut open = self.listed("needs_check", place).await;
            open.extend(self.listed("open", place).await);
            open.extend(self.listed("preparing", place).await);
            if open.is_empty() || Instant::now() > deadline {
                if !open.is_empty() {
                    let text = format!("transactions that did not end: {open:?}");
                    self.scene.found(Kind::NotHealed, text);
                }
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let mut missing = self.judge().await;
        // A decision reaches the queues one after the other.
        let deadline = Instant::now() + HEAL;
        while !missing.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_secs(1)).await;
            missing = self.judge().await;
        }
        for (kind, text) in missing {
            self.scene.found(kind, text);
        }
        self.derived_once().await;
        self.totals().await
    }

    /// What is wrong with what is visible now.
    async fn judge(&self) -> Vec<(Kind, String)> {
        let mut parts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let mut wrong = Vec::new();
        for topic in &self.topics {
            for message in api::read_topic(&self.scene, topic).await {
                let value = message.value.as_deref().and_then(|v| v.rsplit_once(':'));
                let number = value.and_then(|(v, _)| numbered::number(&self.scene, Some(v)));
                let part = value.and_then(|(_, part)| part.parse().ok());
                match number.zip(part) {
                    Some((number, part)) => parts.entry(number).or_default().push(part),
                    None => wrong.push((Kind::NeverSent, format!("{:?}", message.value))),
                }
            }
        }
        let ledger = self.ledger.lock();
        for (number, begun) in &ledger.begun {
            let mut visible = parts.remove(number).unwrap_or_default();
            visible.sort_unstable();
            let all = visible == (0..begun.parts).collect::<Vec<_>>();
            let end = begun.id.as_ref().and_then(|id| ledger.ends.get(id));
            let id = begun.id.as_deref().unwrap_or("without an answer");
            let bad = match end {
                _ if !all && !visible.is_empty() => Some(Kind::HalfVisible),
                Some(End::Committed) if !all => Some(Kind::Lost),
                Some(End::RolledBack) if all => Some(Kind::BothEnds),
                _ => None,
            };
            if let Some(kind) = bad {
                let text = format!(
                    "transaction {number} ({id}) with {} parts ended {end:?}, and parts {visible:?} are visible",
                    begun.parts
                );
                wrong.push((kind, text));
            }
        }
        for number in parts.keys() {
            wrong.push((Kind::NeverSent, format!("transaction {number}")));
        }
        wrong
    }

    /// What the worker wrote is there once for each offset that it has behind it.
    async fn derived_once(&self) {
        // The last one's fate may be open until its checks are over.
        let deadline = Instant::now() + HEAL;
        loop {
            let mut made: BTreeMap<u64, u32> = BTreeMap::new();
            for message in api::read_topic(&self.scene, &self.derived).await {
                let source = message.value.as_deref().and_then(|v| v.parse().ok());
                *made.entry(source.unwrap_or(u64::MAX)).or_default() += 1;
            }
            let committed = self.committed(0).await;
            let dense = made.keys().copied().eq(0..committed.unwrap_or(0));
            let once = made.values().all(|count| *count == 1);
            if once && dense && committed.is_some() {
                return;
            }
            if !once || Instant::now() > deadline {
                let count = made.len();
                let text = format!(
                    "{count} offsets were processed, {committed:?} is committed, each once: {once}"
                );
                return self.scene.found(Kind::HalfVisible, text);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn totals(&self) -> Totals {
        let derived = api::read_topic(&self.scene, &self.derived).await.len();
        let ledger = self.ledger.lock();
        let count = |end| ledger.ends.values().filter(|e| **e == end).count();
        let known = |b: &&Begun| b.id.as_ref().is_none_or(|id| !ledger.ends.contains_key(id));
        let unknown = ledger.begun.values().filter(known).count();
        if count(End::Committed) == 0 || ledger.checked == 0 || ledger.worked == 0 {
            let text = "no transaction was committed, checked back, or moved an offset";
            self.scene.found(Kind::ProvesNothing, text);
        }
        Totals {
            begun: ledger.begun.len(),
            committed: count(End::Committed),
            rolled_back: count(End::RolledBack),
            unknown,
            checked_back: ledger.checked,
            derived,
        }
    }
}
