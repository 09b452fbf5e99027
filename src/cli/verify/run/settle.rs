//! After the last fault: the cluster becomes whole by itself within a bound, and every replica is
//! read to its end.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use tokio::time::{Instant, sleep};

use super::super::super::client::{Client, Repeat, Request};
use super::super::super::error::CliError;
use super::super::super::replicas;
use super::super::super::wire::{NewMessage, ProduceAnswer, ProduceBody, ProduceResult, Topic};
use super::findings::Kind;
use super::history::{Id, Outcome, Source};
use super::judge::{LaneLogs, ReplicaLog};
use super::load::{Fetched, HEAL, Wanted, fetch, outcome, proved_end};
use super::stage::{NodeClient, Stage, mark};

const LOOK_AGAIN: Duration = Duration::from_millis(100);
const TIMEOUT: Duration = Duration::from_secs(6);
const PAGE: u32 = 1000;

/// The last acts of a run. What does not come about in time is a finding.
#[derive(Debug)]
pub struct Settle {
    stage: Arc<Stage>,
    run: String,
    /// Moves on with every success: what takes long is no failure, what does not come about is.
    deadline: Cell<Instant>,
}

impl Settle {
    pub fn new(stage: Arc<Stage>, run: &str) -> Self {
        Self {
            stage,
            run: run.to_owned(),
            deadline: Cell::new(Instant::now() + HEAL),
        }
    }

    fn not_healed(&self, lane: u16, what: &str) {
        let mut history = self.stage.history.lock();
        history.found(Kind::NotHealed, lane, what, vec![], vec![]);
    }

    async fn again(&self) -> bool {
        sleep(LOOK_AGAIN).await;
        Instant::now() < self.deadline.get()
    }

    pub fn went_well(&self) {
        self.deadline.set(Instant::now() + HEAL);
    }

    /// Every queue takes a write.
    pub async fn writes(&self) {
        let (producer, witness) = {
            let mut history = self.stage.history.lock();
            let name = "the last producer".to_owned();
            let witness = history.add_witness(format!("an acknowledgement to {name}"));
            (history.add_producer(name), witness)
        };
        for lane in 0..self.stage.lanes() {
            let mut place = usize::from(lane);
            while let Err(error) = self.write(lane, place, (producer, witness)).await {
                place += 1;
                if !self.again().await {
                    let text = format!("no write was taken {HEAL:?} after the last fault: {error}");
                    self.not_healed(lane, &text);
                    break;
                }
            }
        }
    }

    async fn write(
        &self,
        lane: u16,
        place: usize,
        (producer, witness): (u16, u16),
    ) -> Result<(), CliError> {
        let stage = &self.stage;
        let node = &stage.nodes[place % stage.nodes.len()];
        let (topic, queue) = stage.place(lane);
        let begun = (node.id, stage.now_us());
        let id = stage.history.lock().begin(producer, 1, Some(lane), begun);
        let messages = [NewMessage {
            value: Some(id.value(&self.run)),
            queue: Some(queue),
            ..NewMessage::default()
        }];
        let body = ProduceBody {
            messages: &messages,
            producer: None,
        };
        let path = ["v1", "topics", &topic, "messages"];
        let request = Request::new(Method::POST, &path, Repeat::IfUnsent);
        let request = request.timeout(TIMEOUT).json(&body)?;
        let answer = node.client.read::<ProduceAnswer>(request).await;
        let by = Source {
            witness,
            node: node.id,
            at_us: stage.now_us(),
        };
        self.take(id, lane, by, answer)
    }

    fn take(
        &self,
        id: Id,
        lane: u16,
        by: Source,
        answer: Result<ProduceAnswer, CliError>,
    ) -> Result<(), CliError> {
        let mut history = self.stage.history.lock();
        let result = answer.map(|answer| answer.results.into_iter().next());
        match result {
            Ok(Some(ProduceResult::Stored(stored))) => {
                let offset = stored.offset.unwrap_or(u64::MAX);
                let mark = mark(&stored.message_id);
                history.acked(id, (lane, offset), mark, by);
                self.went_well();
                Ok(())
            }
            Ok(_) => {
                history.settle(id, Outcome::Unknown, by.at_us);
                Err(CliError::Failed("a result that is none".into()))
            }
            Err(error) => {
                history.settle(id, outcome(&error), by.at_us);
                Err(error)
            }
        }
    }

    /// All nodes name the same leader of every queue. Gives the replicas of each.
    pub async fn leaders(&self) -> Vec<Vec<u64>> {
        let mut replicas = Vec::new();
        for topic in 0..self.stage.topics.len() {
            loop {
                match self.agreed(topic).await {
                    Ok(of_topic) => {
                        self.went_well();
                        replicas.extend(of_topic);
                        break;
                    }
                    Err(disagree) if !self.again().await => {
                        let lane = self.stage.lane_of(topic, 0);
                        self.not_healed(lane, &disagree);
                        let all = self.stage.nodes.iter().map(|node| node.id).collect();
                        let queues = self.stage.queues() as usize;
                        replicas.extend(vec![all; queues]);
                        break;
                    }
                    Err(_) => {}
                }
            }
        }
        replicas
    }

    async fn agreed(&self, topic: usize) -> Result<Vec<Vec<u64>>, String> {
        let name = &self.stage.topics[topic];
        let mut views: Vec<(u64, Topic)> = Vec::new();
        for node in &self.stage.nodes {
            let path = ["v1", "topics", name];
            let request = Request::get(&path).timeout(TIMEOUT);
            let view = node.client.read::<Topic>(request).await;
            views.push((node.id, view.map_err(|error| error.to_string())?));
        }
        let Some(((first, reference), others)) = views.split_first() else {
            return Err("there are no nodes".into());
        };
        for queue in &reference.queues {
            let number = queue.queue;
            let Some(leader) = queue.leader else {
                return Err(format!("node {first} knows no leader of queue {number}"));
            };
            for (node, other) in others {
                let theirs = other.queues.iter().find(|q| q.queue == number);
                let theirs = theirs.and_then(|queue| queue.leader);
                if theirs != Some(leader) {
                    return Err(format!(
                        "node {first} takes node {leader} for the leader of queue {number}, node {node} {theirs:?}"
                    ));
                }
            }
        }
        let replicas = reference.queues.iter().map(|q| q.replicas.clone());
        Ok(replicas.collect())
    }

    /// All replicas of each Raft group come to one index and hold the same there: of queues, of
    /// coordinators and of the catalog, internal topics included.
    pub async fn same_state(&self) {
        let nodes: Vec<&Client> = self.stage.nodes.iter().map(|node| &node.client).collect();
        let seen = replicas::compare(&nodes, HEAL).await;
        self.went_well();
        let findings = &mut self.stage.history.lock().findings;
        match seen {
            Ok(seen) => {
                for difference in seen.differing {
                    findings.say(Kind::Diverged, format!("replicas differ: {difference}"));
                }
                for group in seen.apart {
                    let text = format!("replicas did not come to the same index: {group}");
                    findings.say(Kind::NotHealed, text);
                }
            }
            Err(error) => {
                let text = format!("a node does not say what it holds: {error}");
                findings.say(Kind::NotHealed, text);
            }
        }
    }

    fn nodes<'a>(&'a self, ids: &'a [u64]) -> impl Iterator<Item = &'a NodeClient> {
        let nodes = self.stage.nodes.iter();
        nodes.filter(move |node| ids.contains(&node.id))
    }

    /// Every replica of every queue, read from its first offset to the proved end.
    pub async fn read_all(&self, replicas: &[Vec<u64>]) -> Vec<LaneLogs> {
        let mut logs = Vec::new();
        for (lane, nodes) in (0..).zip(replicas) {
            let end = self.end_of(lane).await;
            let mut of_lane = Vec::new();
            for node in self.nodes(nodes) {
                of_lane.push(self.read_one(lane, node, end).await);
            }
            logs.push(LaneLogs {
                lane,
                replicas: of_lane,
            });
        }
        logs
    }

    async fn end_of(&self, lane: u16) -> u64 {
        let name = "the end of a queue".to_owned();
        let witness = self.stage.history.lock().add_witness(name);
        for node in self.stage.nodes.iter().cycle() {
            match proved_end(&self.stage, node, lane, witness).await {
                Ok(end) => return end,
                Err(error) if !self.again().await => {
                    self.not_healed(lane, &format!("nobody proves where it ends: {error}"));
                    break;
                }
                Err(_) => {}
            }
        }
        self.stage.history.lock().lane(lane).floor()
    }

    async fn read_one(&self, lane: u16, node: &NodeClient, end: u64) -> ReplicaLog {
        let stage = &self.stage;
        let name = format!("node {}'s replica at the end", node.id);
        let witness = stage.history.lock().add_witness(name);
        let mut log = ReplicaLog {
            node: node.id,
            messages: Vec::new(),
        };
        loop {
            let from = log.messages.len() as u64;
            let wanted = Wanted {
                lane,
                witness,
                from,
                stale: true,
                most: PAGE,
            };
            let fetched = fetch(stage, &self.run, node, wanted).await;
            let stuck = match fetched {
                Ok(Fetched { read, shown, .. }) => {
                    stage.history.lock().read(&read, &shown);
                    let stored = shown.into_iter().map(|message| message.stored.ok());
                    log.messages.extend(stored);
                    let read_all = from >= end;
                    if log.messages.len() as u64 > from || read_all {
                        self.went_well();
                    }
                    if log.messages.len() as u64 > from {
                        continue;
                    }
                    if read_all {
                        return log;
                    }
                    format!("node {} has only {from} of {end} messages", node.id)
                }
                Err(error) => format!("node {} does not show its replica: {error}", node.id),
            };
            if !self.again().await {
                self.not_healed(lane, &stuck);
                return log;
            }
        }
    }
}
