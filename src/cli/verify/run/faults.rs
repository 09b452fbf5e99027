//! Carries out the schedule on a cluster of the run's own, one step after the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::super::super::client::{Client, Request};
use super::super::super::error::CliError;
use super::super::super::out::Output;
use super::super::super::wire::Topic;
use super::cluster::Cluster;
use super::findings::Kind;
use super::plan::{FaultKind, Plan};
use super::proxy::{Cut, Frames, Network};
use super::schedule::{Fault, Schedule, Shape, Step, Target};
use super::stage::Stage;

/// So long after its time a run still does kinds of faults that have not come yet.
const OVERTIME: Duration = Duration::from_secs(90);
const LOOK_AGAIN: Duration = Duration::from_millis(250);
const ASK_TIMEOUT: Duration = Duration::from_millis(700);

/// What was done, and how often.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct Done {
    pub kinds: BTreeMap<FaultKind, u64>,
    pub shapes: BTreeMap<&'static str, u64>,
}

/// A cluster and the network between its nodes.
#[derive(Debug)]
pub struct Faults {
    pub cluster: Cluster,
    pub network: Network,
    pub done: Done,
    stage: Arc<Stage>,
    client: Client,
    out: Output,
}

/// Processes to bring back when the step is over.
#[derive(Debug, Default)]
struct Broken {
    stopped: Vec<u64>,
    paused: Vec<u64>,
}

impl Faults {
    pub fn new(
        cluster: Cluster,
        network: Network,
        stage: Arc<Stage>,
        client: Client,
        out: Output,
    ) -> Self {
        Self {
            cluster,
            network,
            done: Done::default(),
            stage,
            client,
            out,
        }
    }

    /// Follows the schedule until the time is over and each kind has come.
    pub async fn run(&mut self, plan: &Plan) -> Result<(), CliError> {
        let began = Instant::now();
        for step in Schedule::new(plan) {
            let elapsed = began.elapsed();
            let all = plan.faults.iter().all(|k| self.done.kinds.contains_key(k));
            if elapsed >= plan.duration && (all || elapsed >= plan.duration + OVERTIME) {
                return Ok(());
            }
            let left = plan.duration.saturating_sub(elapsed);
            sleep(if all {
                step.quiet.min(left)
            } else {
                step.quiet
            })
            .await;
            self.step(&step).await?;
        }
        // No kinds of faults: the load alone.
        self.watch(plan.duration.saturating_sub(began.elapsed()))
            .await
    }

    /// Lets time pass, as long as no node ends by itself.
    async fn watch(&mut self, time: Duration) -> Result<(), CliError> {
        let until = Instant::now() + time;
        loop {
            if self.note_failures() {
                return Err(CliError::Failed(
                    "a node ended without being told to".into(),
                ));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            sleep(left.min(LOOK_AGAIN)).await;
        }
    }

    /// Breaks, waits, mends, and waits until everybody is back: the next step finds a whole
    /// cluster, so that never more than a minority is gone.
    async fn step(&mut self, step: &Step) -> Result<(), CliError> {
        let mut broken = Broken::default();
        let before = self.network.frames();
        for fault in &step.faults {
            self.begin(fault, &mut broken).await?;
        }
        let held = self.watch(step.hold).await;
        self.network.heal();
        for id in &broken.paused {
            self.cluster.node(*id).resume()?;
        }
        for id in &broken.stopped {
            self.cluster.node(*id).start()?;
        }
        self.say("mended");
        self.count_happened(step, before);
        held?;
        let mut ready = self.cluster.wait_ready(&self.client).await;
        if ready.is_ok() && step.faults.iter().any(|f| f.kind() == FaultKind::Damage) {
            ready = self.cluster.wait_filled(&self.client).await;
        }
        ready.inspect_err(|error| {
            let mut history = self.stage.history.lock();
            history.findings.say(Kind::NotHealed, error.to_string());
        })
    }

    /// Nodes that are down although nobody told them to end; true if there are any.
    pub fn note_failures(&mut self) -> bool {
        let failures = self.cluster.failures();
        let mut history = self.stage.history.lock();
        for failure in &failures {
            history.findings.say(Kind::NodeFailed, failure.clone());
        }
        !failures.is_empty()
    }

    /// A fault of the network has happened when it hit a frame or a connection.
    fn count_happened(&mut self, step: &Step, before: Frames) {
        let now = self.network.frames();
        for fault in &step.faults {
            let kind = fault.kind();
            let happened = match kind {
                FaultKind::Partition => {
                    now.held + now.connections_closed > before.held + before.connections_closed
                }
                FaultKind::Delay => now.delayed > before.delayed,
                FaultKind::Duplicate => now.duplicated > before.duplicated,
                FaultKind::Reorder => now.reordered > before.reordered,
                // Counted when the signal was sent.
                FaultKind::Kill
                | FaultKind::KillAll
                | FaultKind::Pause
                | FaultKind::Restart
                | FaultKind::Damage => false,
            };
            if happened {
                self.count(kind);
            }
        }
    }

    fn say(&self, text: &str) {
        if !self.out.is_json() {
            self.out.note(&format!("{:>9}  {text}", self.stage.time()));
        }
    }

    async fn begin(&mut self, fault: &Fault, broken: &mut Broken) -> Result<(), CliError> {
        match fault {
            Fault::Kill(target) => {
                if let Some(id) = self.choose(*target, broken).await {
                    self.say(&format!("kill node {id} ({target})"));
                    self.cluster.node(id).kill();
                    broken.stopped.push(id);
                    self.count(fault.kind());
                }
            }
            Fault::KillAll => {
                self.say("kill all nodes");
                for node in &mut self.cluster.nodes {
                    node.kill();
                    broken.stopped.push(node.id);
                }
                self.count(fault.kind());
            }
            Fault::Pause(target) => {
                if let Some(id) = self.choose(*target, broken).await {
                    self.say(&format!("pause node {id} ({target})"));
                    self.cluster.node(id).pause()?;
                    broken.paused.push(id);
                    self.count(fault.kind());
                }
            }
            Fault::Restart(target) => {
                if let Some(id) = self.choose(*target, broken).await {
                    self.say(&format!("restart node {id} ({target})"));
                    self.restart(id, broken).await?;
                    self.count(fault.kind());
                }
            }
            Fault::Partition { shape, closed } => self.partition(shape, *closed).await,
            Fault::Delay { of, most } => {
                self.say(&format!("delay frames by up to {most:?} {}", links(*of)));
                self.network
                    .change(|a, b, rules| rules.delay = touches(*of, a, b).then_some(*most));
            }
            Fault::Duplicate { of } => {
                self.say(&format!("repeat frames {}", links(*of)));
                self.network
                    .change(|a, b, rules| rules.duplicate = touches(*of, a, b));
            }
            Fault::Reorder { of } => {
                self.say(&format!("swap frames {}", links(*of)));
                self.network
                    .change(|a, b, rules| rules.reorder = touches(*of, a, b));
            }
            Fault::Damage { target, permille } => {
                if let Some(id) = self.choose(*target, broken).await {
                    self.cluster.node(id).kill();
                    broken.stopped.push(id);
                    if let Some(place) = self.cluster.node(id).damage_log(*permille)? {
                        self.say(&format!("kill node {id} ({target}) and damage {place}"));
                        self.count(fault.kind());
                    }
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, kind: FaultKind) {
        *self.done.kinds.entry(kind).or_default() += 1;
    }

    async fn restart(&mut self, id: u64, broken: &mut Broken) -> Result<(), CliError> {
        // Not there for the others any more, whatever comes.
        broken.stopped.push(id);
        if let Some(wrong) = self.cluster.node(id).terminate().await? {
            let text = format!("node {id} {wrong}");
            self.stage
                .history
                .lock()
                .findings
                .say(Kind::NodeFailed, text);
        }
        Ok(())
    }

    async fn partition(&mut self, shape: &Shape, closed: bool) {
        let isolated = match shape {
            Shape::Isolated(target) => self.choose(*target, &Broken::default()).await,
            _ => None,
        };
        let isolated = isolated.unwrap_or(1);
        let cut = if closed { Cut::Closed } else { Cut::Silent };
        let mut apart = Vec::new();
        let nodes: Vec<u64> = self.cluster.nodes.iter().map(|node| node.id).collect();
        for from in &nodes {
            let cut_to = nodes
                .iter()
                .filter(|to| *to != from && shape.cuts(*from, **to, isolated));
            apart.extend(cut_to.map(|to| format!("{from}>{to}")));
        }
        let (name, how) = (shape.name(), if closed { "closed" } else { "silent" });
        self.say(&format!("partition, {name}, {how}: {}", apart.join(" ")));
        self.network.change(|from, to, rules| {
            rules.cut = shape.cuts(from, to, isolated).then_some(cut);
        });
        *self.done.shapes.entry(name).or_default() += 1;
    }

    /// The node that is meant, unless it is broken already: then any other.
    async fn choose(&self, target: Target, broken: &Broken) -> Option<u64> {
        let meant = match target {
            Target::Node(id) => Some(id),
            Target::LeaderOf(lane) => self.leader(lane).await,
        };
        let whole = |id: &u64| !broken.stopped.contains(id) && !broken.paused.contains(id);
        let others = self.cluster.nodes.iter().map(|node| node.id);
        meant.into_iter().chain(others).find(whole)
    }

    async fn leader(&self, lane: u16) -> Option<u64> {
        let (topic, queue) = self.stage.place(lane);
        for node in &self.stage.nodes {
            let path = ["v1", "topics", topic.as_str()];
            let request = Request::get(&path).timeout(ASK_TIMEOUT);
            let described = node.client.read::<Topic>(request).await;
            let leader = described.ok().and_then(|topic| {
                let queue = topic.queues.iter().find(|q| q.queue == queue)?;
                queue.leader
            });
            if leader.is_some() {
                return leader;
            }
        }
        None
    }

    /// Mends what may still be broken, and says which faults were asked for in vain. Nodes that
    /// ended by themselves are started again, so that their replicas can be judged too.
    pub async fn end(&mut self, plan: &Plan) {
        self.network.heal();
        let started = self.cluster.start_ended();
        let ready = match started {
            Ok(()) => self.cluster.wait_ready(&self.client).await,
            Err(error) => Err(error),
        };
        let mut history = self.stage.history.lock();
        if let Err(error) = ready {
            history.findings.say(Kind::NotHealed, error.to_string());
        }
        for kind in &plan.faults {
            if !self.done.kinds.contains_key(kind) {
                let text = format!("the fault {} was asked for and never happened", kind.name());
                history.findings.say(Kind::ProvesNothing, text);
            }
        }
    }
}

fn touches(of: Option<u64>, from: u64, to: u64) -> bool {
    of.is_none_or(|node| node == from || node == to)
}

fn links(of: Option<u64>) -> String {
    of.map_or("on all links".to_owned(), |node| {
        format!("on the links of node {node}")
    })
}
