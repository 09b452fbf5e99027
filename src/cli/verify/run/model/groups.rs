//! A consumer group whose members come, crash and go: every message is processed, no queue has two
//! owners in one epoch, and who lost a queue commits nothing for it any more.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::findings::Kind;
use super::numbered::{self, Written};
use super::{Actor, Scene, api};
use crate::cli::error::CliError;

const QUEUES: u32 = 8;
const MEMBERS: usize = 4;
const RATE: u32 = 25;
const SESSION: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub struct Groups {
    scene: Arc<Scene>,
    topic: String,
    group: String,
    written: Arc<Mutex<Written>>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// How often each number was processed.
    processed: BTreeMap<u64, u32>,
    owners: HashMap<(u64, u32), String>,
    /// Who was last told to own a queue: epoch, member, when the answer came.
    latest: HashMap<u32, (u64, String, u64)>,
    committed: HashMap<u32, u64>,
    joins: u64,
    crashes: u64,
    commits: u64,
    fenced: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    written: usize,
    processed: usize,
    redelivered: u64,
    joins: u64,
    crashes: u64,
    commits: u64,
    fenced: u64,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "groups: {} messages, {} processed, {} of them again; {} joins, {} crashes, {} commits, {} fenced",
            self.written,
            self.processed,
            self.redelivered,
            self.joins,
            self.crashes,
            self.commits,
            self.fenced
        )
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Place {
    queue: u32,
    offset: u64,
}

#[derive(Debug, Deserialize)]
struct Joined {
    member_id: String,
    epoch: u64,
    assignment: Vec<Place>,
    heartbeat_interval_ms: u64,
}

#[derive(Debug, Deserialize)]
struct Beat {
    epoch: u64,
    assignment: Vec<Place>,
}

pub async fn start(
    tasks: &mut JoinSet<()>,
    replicas: u64,
    actor: &mut impl FnMut() -> Actor,
) -> Result<Arc<Groups>, CliError> {
    let writer = actor();
    let scene = writer.scene.clone();
    let topic = scene.name("groups");
    api::create_topic(&scene, &topic, QUEUES, replicas).await?;
    let groups = Arc::new(Groups {
        group: topic.clone(),
        written: Arc::default(),
        seen: Mutex::default(),
        topic,
        scene,
    });
    tasks.spawn(numbered::write(
        writer,
        groups.topic.clone(),
        RATE,
        groups.written.clone(),
        |number, message| message["key"] = json!(format!("k{}", number % 64)),
    ));
    for _ in 0..MEMBERS {
        tasks.spawn(groups.clone().consume(actor()));
    }
    Ok(groups)
}

/// What a member believes of itself.
struct Member {
    id: String,
    epoch: u64,
    beat_every: Duration,
    /// The next offset of each queue it owns.
    positions: BTreeMap<u32, u64>,
    beaten: Instant,
}

impl Groups {
    async fn consume(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.reading.is_cancelled() {
            let Some(mut member) = self.join(&mut actor).await else {
                self.scene.pause_reading(api::RETRY_AFTER).await;
                continue;
            };
            let crashes = self.live(&mut actor, &mut member).await;
            if crashes {
                self.seen.lock().crashes += 1;
                let away = Duration::from_millis(actor.rng.random_range(0..4000));
                self.scene.pause_reading(away).await;
            }
        }
    }

    async fn join(&self, actor: &mut Actor) -> Option<Member> {
        let before = self.seen.lock().committed.clone();
        let body = json!({
            "topics": [self.topic],
            "session_timeout_ms": SESSION.as_millis() as u64,
        });
        let path = ["v1", "groups", &self.group, "members"];
        let place = actor.place();
        let answer = api::send(&self.scene, place, (Method::POST, &path), Some(&body), None);
        let joined = Joined::deserialize(&answer.await.ok()?);
        let joined = self.understood(joined)?;
        self.seen.lock().joins += 1;
        let mut member = Member {
            id: joined.member_id,
            epoch: joined.epoch,
            beat_every: Duration::from_millis(joined.heartbeat_interval_ms.clamp(50, 1000)),
            positions: BTreeMap::new(),
            beaten: Instant::now(),
        };
        self.assigned(&mut member, &joined.assignment, &before);
        Some(member)
    }

    fn understood<T>(&self, answer: Result<T, serde_json::Error>) -> Option<T> {
        let complain = |error| {
            let text = format!("an answer about membership is none: {error}");
            self.scene.found(Kind::ProvesNothing, text);
        };
        answer.map_err(complain).ok()
    }

    /// Lives as a member until it is fenced (false) or crashes (true).
    async fn live(&self, actor: &mut Actor, member: &mut Member) -> bool {
        let mut beat_at = Instant::now() + member.beat_every;
        while !self.scene.reading.is_cancelled() {
            if Instant::now() >= beat_at {
                beat_at = Instant::now() + member.beat_every;
                if !self.beat(actor, member).await {
                    return false;
                }
            }
            // Who was not heard for so long may have been replaced.
            if member.beaten.elapsed() < SESSION {
                for queue in member.positions.keys().copied().collect::<Vec<_>>() {
                    if !self.process(actor, member, queue).await {
                        return false;
                    }
                }
            }
            if !self.scene.writing.is_cancelled() && actor.rng.random_bool(0.002) {
                return true;
            }
            self.scene.pause_reading(Duration::from_millis(60)).await;
        }
        false
    }

    /// False when the member is none any more.
    async fn beat(&self, actor: &mut Actor, member: &mut Member) -> bool {
        let before = self.seen.lock().committed.clone();
        let (begun, topic) = (Instant::now(), &self.topic);
        let owned = member.positions.keys();
        let owned: Vec<_> = owned
            .map(|queue| json!({ "topic": topic, "queue": queue }))
            .collect();
        let body = json!({ "epoch": member.epoch, "owned": owned });
        let path = [
            "v1",
            "groups",
            &self.group,
            "members",
            &member.id,
            "heartbeat",
        ];
        let place = actor.place();
        match api::send(&self.scene, place, (Method::POST, &path), Some(&body), None).await {
            Ok(answer) => {
                let Some(beat) = self.understood(Beat::deserialize(&answer)) else {
                    return false;
                };
                member.beaten = begun;
                member.epoch = beat.epoch;
                self.assigned(member, &beat.assignment, &before);
                true
            }
            Err(error) => error.retryable() || error.outcome_unknown(),
        }
    }

    /// Takes over what a member was told to own; `before` was committed before it asked.
    fn assigned(&self, member: &mut Member, assignment: &[Place], before: &HashMap<u32, u64>) {
        let now_us = self.scene.now_us();
        let mut seen = self.seen.lock();
        for place in assignment {
            let owner = seen.owners.entry((member.epoch, place.queue));
            let owner = owner.or_insert_with(|| member.id.clone()).clone();
            if owner != member.id {
                let (id, epoch, queue) = (&member.id, member.epoch, place.queue);
                let text = format!("queue {queue} belongs to {owner} and {id} in epoch {epoch}");
                self.scene.found(Kind::OwnedTwice, text);
            }
            let latest = seen.latest.get(&place.queue);
            if latest.is_none_or(|(epoch, ..)| *epoch <= member.epoch) {
                let mark = (member.epoch, member.id.clone(), now_us);
                seen.latest.insert(place.queue, mark);
            }
            if let Entry::Vacant(begun) = member.positions.entry(place.queue) {
                let committed = before.get(&place.queue).copied().unwrap_or(0);
                if place.offset < committed {
                    let (queue, offset) = (place.queue, place.offset);
                    let text = format!(
                        "queue {queue} was handed over at {offset}, {committed} had been committed"
                    );
                    self.scene.found(Kind::CommittedOffset, text);
                }
                begun.insert(place.offset);
            }
        }
        let kept: BTreeSet<u32> = assignment.iter().map(|place| place.queue).collect();
        member.positions.retain(|queue, _| kept.contains(queue));
    }

    /// Reads, processes and commits what is next in a queue. False when the member was fenced.
    async fn process(&self, actor: &mut Actor, member: &mut Member, queue: u32) -> bool {
        let from = member.positions.get(&queue).copied().unwrap_or(0);
        let place = actor.place();
        let Ok(page) = api::page(&self.scene, place, &self.topic, queue, from).await else {
            return true;
        };
        if page.next_offset == from {
            return true;
        }
        {
            let mut seen = self.seen.lock();
            for message in &page.messages {
                if let Some(number) = numbered::number(&self.scene, message.value.as_deref()) {
                    *seen.processed.entry(number).or_default() += 1;
                }
            }
        }
        member.positions.insert(queue, page.next_offset);
        let begun_us = self.scene.now_us();
        let body = json!({
            "offsets": [{ "topic": self.topic, "queue": queue, "offset": page.next_offset }],
            "member": { "id": member.id, "epoch": member.epoch },
        });
        let path = ["v1", "groups", &self.group, "offsets"];
        let place = actor.place();
        let call = (Method::PUT, &path[..]);
        match api::send(&self.scene, place, call, Some(&body), None).await {
            Ok(_) => {
                self.committed(member, queue, page.next_offset, begun_us);
                true
            }
            Err(error) if error.retryable() || error.outcome_unknown() => true,
            Err(_) => {
                self.seen.lock().fenced += 1;
                false
            }
        }
    }

    fn committed(&self, member: &Member, queue: u32, offset: u64, begun_us: u64) {
        let mut seen = self.seen.lock();
        seen.commits += 1;
        let other = seen.latest.get(&queue).filter(|(epoch, id, at_us)| {
            *id != member.id && *epoch > member.epoch && *at_us < begun_us
        });
        if let Some((epoch, id, _)) = other {
            let (own, was) = (&member.id, member.epoch);
            let text = format!(
                "{own} committed {offset} of queue {queue} in epoch {was}, after {id} owned it in epoch {epoch}"
            );
            self.scene.found(Kind::NotFenced, text);
        }
        let last = seen.committed.entry(queue).or_default();
        *last = offset.max(*last);
    }

    /// Every acknowledged message is processed in the end.
    pub async fn settle(&self) -> Totals {
        let missing = || {
            let (written, seen) = (self.written.lock(), self.seen.lock());
            let all = written.acked.iter();
            let missing = all.filter(|number| !seen.processed.contains_key(number));
            missing.copied().collect::<Vec<u64>>()
        };
        if !self.scene.until(|| missing().is_empty()).await {
            let left = missing();
            let text = format!("{} messages were not processed: {left:?}", left.len());
            self.scene.found(Kind::NotProcessed, text);
        }
        let (written, seen) = (self.written.lock(), self.seen.lock());
        if written.acked.is_empty() || seen.commits == 0 {
            let text = "the consumer group processed or committed nothing";
            self.scene.found(Kind::ProvesNothing, text);
        }
        Totals {
            written: written.acked.len(),
            processed: seen.processed.len(),
            redelivered: seen.processed.values().map(|n| u64::from(n - 1)).sum(),
            joins: seen.joins,
            crashes: seen.crashes,
            commits: seen.commits,
            fenced: seen.fenced,
        }
    }
}
