//! Readers: every answer is handed to the judges, and each reader goes on where it was.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::super::super::super::client::{Repeat, Request};
use super::super::super::super::error::CliError;
use super::super::super::super::wire::{FetchAnswer, GroupOffsets};
use super::super::findings::Kind;
use super::super::history::Source;
use super::super::stage::{NodeClient, Stage};
use super::super::watch::{Committed, Read, Shown};
use super::{Actor, HEAL, node, stream};

const TIMEOUT: Duration = Duration::from_millis(2500);
/// Between two looks at queues without news.
const PAUSE: Duration = Duration::from_millis(60);
const STALE_PAUSE: Duration = Duration::from_millis(150);
const PROBE_PAUSE: Duration = Duration::from_millis(40);
const PAGE: u32 = 200;
/// After a commit, the group's reader forgets where it was with this probability.
const FORGET: f64 = 0.1;

pub fn start(tasks: &mut JoinSet<()>, stage: &Arc<Stage>, mut actor: impl FnMut() -> Actor) {
    tasks.spawn(pull(actor()));
    tasks.spawn(group(actor()));
    tasks.spawn(probe(actor()));
    for place in 0..stage.nodes.len() {
        tasks.spawn(stale(actor(), place));
    }
    for lane in 0..stage.lanes() {
        tasks.spawn(stream::follow(actor(), lane));
    }
}

/// One fetch and what it is to the judges.
pub struct Fetched {
    pub read: Read,
    pub shown: Vec<Shown>,
}

/// What a fetch asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub lane: u16,
    pub witness: u16,
    pub from: u64,
    pub stale: bool,
    pub most: u32,
}

/// Asks one node; the answer is not judged yet.
pub async fn fetch(
    stage: &Stage,
    run: &str,
    node: &NodeClient,
    wanted: Wanted,
) -> Result<Fetched, CliError> {
    let began_us = stage.now_us();
    let floor = match wanted.stale {
        true => 0,
        false => stage.history.lock().lane(wanted.lane).floor(),
    };
    let read = |at_us| Read {
        lane: wanted.lane,
        by: Source {
            witness: wanted.witness,
            node: node.id,
            at_us,
        },
        from: wanted.from,
        floor,
        began_us,
    };
    let (topic, queue) = stage.place(wanted.lane);
    let queue = queue.to_string();
    let path = ["v1", "topics", &topic, "queues", &queue, "messages"];
    let mut request = Request::get(&path)
        .query("offset", wanted.from)
        .query("max_messages", wanted.most)
        .timeout(TIMEOUT);
    if wanted.stale {
        request = request.query("consistency", "stale");
    }
    match node.client.read::<FetchAnswer>(request).await {
        Ok(answer) => {
            let read = read(stage.now_us());
            stage.history.lock().ended_early(&read, answer.end_offset);
            let messages = answer.messages.iter();
            let shown = messages.map(|message| Stage::shown(run, message)).collect();
            Ok(Fetched { read, shown })
        }
        Err(CliError::Problem(problem)) if problem.code == "offset_out_of_range" => {
            // A reader never asks beyond what was shown to it: to the judges this is an end.
            let end = problem.end_offset.unwrap_or(0);
            stage.history.lock().ended_early(&read(stage.now_us()), end);
            Err(CliError::Problem(problem))
        }
        Err(error) => Err(error),
    }
}

/// Reads all queues, any node answering, and at the stop goes on until it has seen everything.
async fn pull(mut actor: Actor) {
    let stage = actor.stage.clone();
    let witness = stage.history.lock().add_witness("a reader".into());
    let mut next = vec![0; usize::from(stage.lanes())];
    let mut deadline = None;
    loop {
        let mut news = false;
        for lane in 0..stage.lanes() {
            let place = actor.pick();
            let wanted = Wanted {
                lane,
                witness,
                from: next[usize::from(lane)],
                stale: false,
                most: PAGE,
            };
            let fetched = fetch(&stage, &actor.run, node(&stage, place), wanted).await;
            if let Ok(Fetched { read, shown, .. }) = fetched {
                news |= !shown.is_empty();
                let mut history = stage.history.lock();
                history.consumed.pull += shown.len() as u64;
                next[usize::from(lane)] = history.read(&read, &shown);
            }
        }
        if actor.stop.is_cancelled() {
            let deadline = *deadline.get_or_insert_with(|| tokio::time::Instant::now() + HEAL);
            let mut history = stage.history.lock();
            let behind = (0..stage.lanes())
                .find(|lane| next[usize::from(*lane)] < history.lane(*lane).floor());
            let Some(lane) = behind else { return };
            if tokio::time::Instant::now() > deadline {
                let at = next[usize::from(lane)];
                let text = format!("a reader did not get beyond offset {at}");
                return history.found(Kind::NotHealed, lane, &text, vec![], vec![]);
            }
        }
        if !news {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Asks any node for the newest known message of any queue, and for the queue's end.
async fn probe(mut actor: Actor) {
    let stage = actor.stage.clone();
    let name = "a reader of the newest message";
    let witness = stage.history.lock().add_witness(name.into());
    while actor.pause(PROBE_PAUSE).await {
        let (lane, place) = (actor.lane(), actor.pick());
        let floor = stage.history.lock().lane(lane).floor();
        let wanted = Wanted {
            lane,
            witness,
            from: floor.saturating_sub(1),
            stale: false,
            most: 1,
        };
        let fetched = fetch(&stage, &actor.run, node(&stage, place), wanted).await;
        if let Ok(Fetched { read, shown, .. }) = fetched {
            stage.history.lock().read(&read, &shown);
        }
        proved_end(&stage, node(&stage, place), lane, witness)
            .await
            .ok();
    }
}

/// The end of a queue as one node proves it.
pub async fn proved_end(
    stage: &Stage,
    node: &NodeClient,
    lane: u16,
    witness: u16,
) -> Result<u64, CliError> {
    let began_us = stage.now_us();
    let floor = stage.history.lock().lane(lane).floor();
    let (topic, queue) = stage.place(lane);
    let queue = queue.to_string();
    let path = ["v1", "topics", &topic, "queues", &queue, "messages"];
    let request = Request::get(&path)
        .query("offset", "latest")
        .timeout(TIMEOUT);
    let answer = node.client.read::<FetchAnswer>(request).await?;
    let read = Read {
        lane,
        by: Source {
            witness,
            node: node.id,
            at_us: stage.now_us(),
        },
        from: answer.next_offset,
        floor,
        began_us,
    };
    let end = answer.end_offset;
    stage.history.lock().ended_early(&read, end);
    Ok(end)
}

/// Reads one replica, whatever the others are up to.
async fn stale(actor: Actor, place: usize) {
    let stage = actor.stage.clone();
    let id = node(&stage, place).id;
    let name = format!("a reader of node {id}'s own replica");
    let witness = stage.history.lock().add_witness(name);
    let mut next = vec![0; usize::from(stage.lanes())];
    while actor.pause(STALE_PAUSE).await {
        for lane in 0..stage.lanes() {
            let wanted = Wanted {
                lane,
                witness,
                from: next[usize::from(lane)],
                stale: true,
                most: PAGE,
            };
            let fetched = fetch(&stage, &actor.run, node(&stage, place), wanted).await;
            let Ok(Fetched { read, shown, .. }) = fetched else {
                // This node is away; so are its other queues.
                break;
            };
            let mut history = stage.history.lock();
            history.consumed.stale += shown.len() as u64;
            next[usize::from(lane)] = history.read(&read, &shown);
        }
    }
}

#[derive(Deserialize)]
struct CommitAnswer {
    results: Vec<serde_json::Value>,
}

/// A consumer group of one: reads, commits, and now and then begins again where it has committed.
struct Group {
    actor: Actor,
    name: String,
    witness: u16,
    next: Vec<Option<u64>>,
    committed: Vec<Committed>,
}

async fn group(actor: Actor) {
    let stage = actor.stage.clone();
    let lanes = usize::from(stage.lanes());
    let witness = stage.history.lock().add_witness("a consumer group".into());
    let mut group = Group {
        name: format!("group-{}", actor.run),
        actor,
        witness,
        next: vec![None; lanes],
        committed: vec![Committed::default(); lanes],
    };
    while group.actor.pause(PAUSE).await {
        for lane in 0..stage.lanes() {
            // Whatever fails is tried again in the next round.
            let _ = group.round(lane).await;
        }
    }
}

impl Group {
    async fn round(&mut self, lane: u16) -> Result<(), CliError> {
        let stage = self.actor.stage.clone();
        let place = self.actor.pick();
        let from = match self.next[usize::from(lane)] {
            Some(next) => next,
            None => self.resume(lane).await?,
        };
        let wanted = Wanted {
            lane,
            witness: self.witness,
            from,
            stale: false,
            most: PAGE,
        };
        let fetched = fetch(&stage, &self.actor.run, node(&stage, place), wanted).await?;
        if fetched.shown.is_empty() {
            stage.history.lock().read(&fetched.read, &[]);
            return Ok(());
        }
        let next = {
            let mut history = stage.history.lock();
            history.consumed.group += fetched.shown.len() as u64;
            history.read(&fetched.read, &fetched.shown)
        };
        self.next[usize::from(lane)] = Some(next);
        let result = self.commit(lane, next).await;
        if result.is_err() || self.actor.rng.random_bool(FORGET) {
            self.next[usize::from(lane)] = None;
        }
        result
    }

    async fn commit(&mut self, lane: u16, offset: u64) -> Result<(), CliError> {
        let stage = self.actor.stage.clone();
        let place = self.actor.pick();
        let (topic, queue) = stage.place(lane);
        let body = json!({"offsets": [{"topic": topic, "queue": queue, "offset": offset}]});
        let path = ["v1", "groups", &self.name, "offsets"];
        let request = Request::new(Method::PUT, &path, Repeat::IfUnsent)
            .timeout(TIMEOUT)
            .json(&body)?;
        let committed = &mut self.committed[usize::from(lane)];
        committed.ask(offset);
        let answer = node(&stage, place)
            .client
            .read::<CommitAnswer>(request)
            .await?;
        if answer
            .results
            .iter()
            .all(|result| result["offset"] == offset)
        {
            committed.acked(offset);
            stage.history.lock().commits += 1;
        }
        Ok(())
    }

    /// Where the group begins after its reader has forgotten everything.
    async fn resume(&mut self, lane: u16) -> Result<u64, CliError> {
        let stage = self.actor.stage.clone();
        let place = self.actor.pick();
        let node = node(&stage, place);
        let (topic, queue) = stage.place(lane);
        let path = ["v1", "groups", &self.name, "offsets"];
        let request = Request::get(&path).query("topic", &topic).timeout(TIMEOUT);
        let began = stage.time();
        let answer = node.client.read::<GroupOffsets>(request).await?;
        let mut offsets = answer.offsets.iter();
        let entry = offsets.find(|entry| entry.topic == topic && entry.queue == queue);
        let found = entry.and_then(|entry| entry.offset);
        let wrong = self.committed[usize::from(lane)].read(found);
        let mut history = stage.history.lock();
        if let Some(wrong) = wrong {
            let line = format!("{began} {} was read through node {}", self.name, node.id);
            history.found(Kind::CommittedOffset, lane, &wrong, vec![], vec![line]);
        }
        history.resumed += 1;
        Ok(found.unwrap_or(0))
    }
}
