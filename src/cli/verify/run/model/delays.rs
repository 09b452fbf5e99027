//! Delayed messages: never early, once, not at all when cancelled, and soon once all is well.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rand::Rng;
use reqwest::Method;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::super::findings::Kind;
use super::super::load::HEAL;
use super::{Actor, Scene, api, numbered};
use crate::cli::error::CliError;

const QUEUES: u32 = 4;
const WRITERS: u64 = 2;
const PAUSE: Duration = Duration::from_millis(120);
const LONGEST_MS: u64 = 8_000;
/// Sent after the last fault, to see how late they are in a whole cluster.
const AFTERWARDS: u64 = 40;

#[derive(Debug)]
pub struct Delays {
    scene: Arc<Scene>,
    topic: String,
    sent: Mutex<BTreeMap<u64, Sent>>,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    /// Not visible before this time of this machine's clock.
    due_ms: u64,
    /// Visible soon after this one, if nothing is wrong.
    expected_ms: u64,
    acked: bool,
    fate: Fate,
    /// Sent to a whole cluster.
    afterwards: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Due,
    Cancelled,
    /// The cancellation has no answer.
    Either,
}

#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    written: usize,
    cancelled: usize,
    visible: usize,
    late_ms_max: u64,
    late_whole_ms_max: u64,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "delays: {} messages, {} cancelled, {} visible; late by at most {} ms under faults, {} ms once whole",
            self.written, self.cancelled, self.visible, self.late_ms_max, self.late_whole_ms_max
        )
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_millis() as u64)
}

pub async fn start(
    tasks: &mut JoinSet<()>,
    replicas: u64,
    actor: &mut impl FnMut() -> Actor,
) -> Result<Arc<Delays>, CliError> {
    let scene = actor().scene;
    let topic = scene.name("delays");
    api::create_topic(&scene, &topic, QUEUES, replicas).await?;
    let delays = Arc::new(Delays {
        topic,
        scene,
        sent: Mutex::default(),
    });
    for writer in 0..WRITERS {
        tasks.spawn(delays.clone().write(actor(), writer));
    }
    Ok(delays)
}

impl Delays {
    async fn write(self: Arc<Self>, mut actor: Actor, writer: u64) {
        let mut number = writer;
        while self.scene.pause_writing(PAUSE).await {
            let delay_ms = actor.rng.random_range(0..LONGEST_MS);
            let place = actor.place();
            let id = self.send(place, number, delay_ms, false).await;
            if let Some(id) = id
                && actor.rng.random_bool(0.1)
            {
                self.cancel(actor.place(), number, &id).await;
            }
            number += WRITERS;
        }
    }

    /// Sends until acknowledged; gives the message's id.
    async fn send(&self, place: usize, number: u64, delay_ms: u64, after: bool) -> Option<String> {
        let sent = Sent {
            due_ms: now_ms() + delay_ms,
            expected_ms: u64::MAX,
            acked: false,
            fate: Fate::Due,
            afterwards: after,
        };
        self.sent.lock().insert(number, sent);
        let value = numbered::value(&self.scene, number);
        let body = json!({ "messages": [{ "value": value, "delay_ms": delay_ms }] });
        let path = ["v1", "topics", &self.topic, "messages"];
        let key = format!("{}-{number}", self.topic);
        let call = (Method::POST, &path[..]);
        match api::until_done(&self.scene, place, call, Some(&body), Some(&key)).await {
            Ok(answer) => {
                if let Some(sent) = self.sent.lock().get_mut(&number) {
                    sent.acked = true;
                    sent.expected_ms = now_ms() + delay_ms;
                }
                let id = answer["results"][0]["message_id"].as_str();
                id.map(str::to_owned)
            }
            Err(error) => {
                let text = format!("delayed message {number} was not taken: {error}");
                self.scene.found(Kind::NotHealed, text);
                None
            }
        }
    }

    async fn cancel(&self, place: usize, number: u64, id: &str) {
        let path = ["v1", "topics", &self.topic, "messages", id];
        let call = (Method::DELETE, &path[..]);
        let fate = match api::send(&self.scene, place, call, None, None).await {
            Ok(_) => Fate::Cancelled,
            Err(error) if api::code(&error) == Some("already_delivered") => Fate::Due,
            Err(error) if error.retryable() && !error.outcome_unknown() => Fate::Due,
            Err(_) => Fate::Either,
        };
        if let Some(sent) = self.sent.lock().get_mut(&number) {
            sent.fate = fate;
        }
    }

    /// Everything due is visible in the end, once; nothing was early, nothing cancelled is there.
    pub async fn settle(&self) -> Totals {
        let first = self.sent.lock().keys().last().map_or(0, |last| last + 1);
        for number in first..first + AFTERWARDS {
            self.send(number as usize, number, 500, true).await;
        }
        let last_due = self.sent.lock().values().map(|sent| sent.due_ms).max();
        let wait = last_due.unwrap_or(0).saturating_sub(now_ms());
        tokio::time::sleep(Duration::from_millis(wait) + self.scene.late).await;
        let deadline = tokio::time::Instant::now() + HEAL;
        loop {
            let visible = self.visible().await;
            let missing = self.missing(&visible);
            if missing.is_empty() || tokio::time::Instant::now() > deadline {
                if !missing.is_empty() {
                    let text =
                        format!("{} delayed messages never came: {missing:?}", missing.len());
                    self.scene.found(Kind::Lost, text);
                }
                return self.judge(&visible);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// When each number became visible, as often as it did.
    async fn visible(&self) -> BTreeMap<u64, Vec<u64>> {
        let mut visible: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for message in api::read_topic(&self.scene, &self.topic).await {
            match numbered::number(&self.scene, message.value.as_deref()) {
                Some(number) => visible
                    .entry(number)
                    .or_default()
                    .push(message.timestamp_ms),
                None => {
                    let text = format!("{} holds what nobody sent", self.topic);
                    self.scene.found(Kind::NeverSent, text);
                }
            }
        }
        visible
    }

    fn missing(&self, visible: &BTreeMap<u64, Vec<u64>>) -> Vec<u64> {
        let sent = self.sent.lock();
        let due = sent.iter().filter(|(_, s)| s.acked && s.fate == Fate::Due);
        let due = due.map(|(number, _)| *number);
        due.filter(|number| !visible.contains_key(number)).collect()
    }

    fn judge(&self, visible: &BTreeMap<u64, Vec<u64>>) -> Totals {
        let sent = self.sent.lock();
        let (mut late_ms_max, mut late_whole_ms_max) = (0, 0);
        for (number, times) in visible {
            let Some(message) = sent.get(number) else {
                let text = format!("{} holds message {number}, never sent", self.topic);
                self.scene.found(Kind::NeverSent, text);
                continue;
            };
            if times.len() > 1 {
                let text = format!("delayed message {number} came {} times", times.len());
                self.scene.found(Kind::Twice, text);
            }
            let at_ms = times[0];
            if at_ms < message.due_ms {
                let early = message.due_ms - at_ms;
                let text = format!("delayed message {number} came {early} ms early");
                self.scene.found(Kind::Early, text);
            }
            if message.fate == Fate::Cancelled {
                let text = format!("delayed message {number} came although it was cancelled");
                self.scene.found(Kind::Early, text);
            }
            let late = at_ms.saturating_sub(message.expected_ms);
            match message.afterwards {
                true => late_whole_ms_max = late.max(late_whole_ms_max),
                false => late_ms_max = late.max(late_ms_max),
            }
        }
        if u128::from(late_whole_ms_max) > self.scene.late.as_millis() {
            let text = format!("a delayed message came {late_whole_ms_max} ms late");
            self.scene.found(Kind::Late, text);
        }
        if visible.is_empty() {
            let text = "no delayed message became visible";
            self.scene.found(Kind::ProvesNothing, text);
        }
        let cancelled = sent.values().filter(|s| s.fate == Fate::Cancelled);
        Totals {
            written: sent.values().filter(|s| s.acked).count(),
            cancelled: cancelled.count(),
            visible: visible.len(),
            late_ms_max,
            late_whole_ms_max,
        }
    }
}
