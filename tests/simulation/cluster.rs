//! One run: a cluster on simulated machines, its clients, its faults, and its healing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use quorate_raft::NodeId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use turmoil::Sim;

use crate::faults::{self, Cut, End, Fault, Planned};
use crate::healing::{self, Progress};
use crate::history::History;
use crate::machine::{DiskSpeed, Machine};
use crate::model::{self, Capability};
use crate::node::{NodeSlot, Shape};
use crate::oracle::{Oracle, Queue};
use crate::replicas::Replicas;
use crate::wires::{Wires, host_name};
use crate::workload::Stage;

/// Simulated time for the cluster to begin, and to be whole again after the last fault.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a wire takes that was slow.
const GOOD_WIRE: Duration = Duration::from_millis(2);
const LEADERS_EVERY: u32 = 5;
const LOGS_EVERY: u32 = 50;

/// The steps of one seed, drawn from it before anything runs.
#[derive(Debug)]
struct Script {
    nodes: u64,
    clients: u64,
    cover: Vec<Capability>,
    topics: Vec<(String, u32)>,
    work: Duration,
    shape: Shape,
    faults: Vec<Planned>,
}

impl Script {
    fn of(rng: &mut StdRng, seed: u64) -> Self {
        let nodes = if rng.random_bool(0.25) { 5 } else { 3 };
        let work = Duration::from_secs(rng.random_range(6..14));
        let count = rng.random_range(1..3);
        let topics = (0..count).map(|n| (format!("t{n}"), rng.random_range(1..3)));
        let topics = topics.collect();
        Self {
            nodes,
            clients: rng.random_range(1..4),
            cover: model::cover(seed),
            topics,
            work,
            shape: Shape {
                segment_bytes: [32 << 10, 64 << 10, 256 << 10][rng.random_range(0..3)],
                checkpoint_every: [8, 32, 1000][rng.random_range(0..3)],
                tail_cache_bytes: [0, 4 << 10, 1 << 20][rng.random_range(0..3)],
            },
            faults: faults::plan(rng, seed, nodes, work),
        }
    }
}

/// What is to be done at some time.
#[derive(Debug)]
enum Action {
    Begin(Fault, Duration),
    End { node: NodeId, end: End },
    Start(NodeId),
    Mend(Vec<NodeId>, Vec<NodeId>, Cut),
    Quicken(NodeId),
    QuickenWires,
}

struct Run<'a> {
    sim: Sim<'a>,
    rng: StdRng,
    history: Arc<History>,
    stage: Arc<Stage>,
    replicas: Arc<Mutex<Replicas>>,
    wires: Arc<Wires>,
    /// In the order of their times.
    actions: BTreeMap<(Duration, u64), Action>,
    added: u64,
}

/// Runs one seed; the history says whether it failed.
pub fn run(seed: u64) -> Arc<History> {
    let mut rng = StdRng::seed_from_u64(seed);
    let script = Script::of(&mut rng, seed);
    let history = Arc::new(History::default());
    history.note(format_args!("{script:?}"));
    let wires = Arc::new(Wires::default());
    let machine = |node| Machine::new(node, seed, wires.clone());
    let slot = |node| NodeSlot::new(Arc::new(machine(node)), script.nodes, script.shape);
    let nodes: Vec<_> = (1..=script.nodes)
        .map(|node| Arc::new(slot(node)))
        .collect();
    let queues = script.topics.iter();
    let queues = queues.flat_map(|(topic, count)| (0..*count).map(|n| (topic.clone(), n)));
    let stage = Arc::new(Stage {
        nodes,
        history: history.clone(),
        oracle: Oracle::new(history.clone()),
        queues: queues.collect::<Vec<Queue>>(),
        closing: AtomicBool::new(false),
    });
    let sim = turmoil::Builder::new()
        .rng_seed(rng.random())
        .simulation_duration(Duration::from_secs(3600))
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_millis(0))
        .max_message_latency(Duration::from_millis(rng.random_range(1..8)))
        .tcp_capacity(4096)
        .build();
    let mut run = Run {
        sim,
        rng,
        replicas: Arc::new(Mutex::new(Replicas::new(history.clone()))),
        history: history.clone(),
        stage,
        wires,
        actions: BTreeMap::new(),
        added: 0,
    };
    run.all(&script, seed);
    history
}

impl Run<'_> {
    fn all(&mut self, script: &Script, seed: u64) {
        for slot in &self.stage.nodes {
            let slot = slot.clone();
            let name = host_name(slot.id());
            self.sim.host(name, move || slot.clone().run());
        }
        let progress = Arc::new(Progress::default());
        let plan = healing::Plan {
            stage: self.stage.clone(),
            replicas: self.replicas.clone(),
            progress: progress.clone(),
            topics: script.topics.clone(),
            clients: script.clients,
            cover: script.cover.clone(),
            seed,
        };
        self.sim.client("clients", plan.run());
        let mut heal_at = None;
        let mut limit = PATIENCE;
        let mut begun = false;
        for step in 0u32.. {
            let done = match self.sim.step() {
                Ok(done) => done,
                Err(error) => return self.history.violation(format_args!("the run: {error}")),
            };
            let now = self.sim.elapsed();
            self.history.set_now(now);
            self.note_ended(now);
            self.act(now);
            self.check(step);
            if !begun && progress.has_begun() {
                begun = true;
                limit = Duration::MAX;
                heal_at = Some(now + script.work);
                for planned in &script.faults {
                    let action = Action::Begin(planned.fault.clone(), planned.lasts);
                    self.at(now + planned.at, action);
                }
            }
            if heal_at.is_some_and(|at| now >= at) {
                heal_at = None;
                limit = now + PATIENCE;
                self.heal(now);
            }
            if now > limit {
                let open = progress.open();
                self.history.violation(format_args!("no progress: {open}"));
            }
            if done || !self.history.is_sound() {
                break;
            }
        }
        let (acked, refused, unknown) = self.stage.oracle.counts();
        let text = format!("{acked} acknowledged, {refused} refused, {unknown} unknown");
        self.history.note(text);
    }

    fn at(&mut self, time: Duration, action: Action) {
        self.added += 1;
        self.actions.insert((time, self.added), action);
    }

    fn act(&mut self, now: Duration) {
        while let Some(next) = self.actions.first_entry()
            && next.key().0 <= now
        {
            let action = next.remove();
            self.perform(now, action);
        }
    }

    fn perform(&mut self, now: Duration, action: Action) {
        match action {
            Action::Begin(fault, lasts) => self.begin(now, fault, lasts),
            Action::End { node, end } => self.end(node, end),
            Action::Start(node) => self.start(node),
            Action::Mend(from, to, cut) => self.mend(&from, &to, cut),
            Action::Quicken(node) => self.slot(node).machine.set_speed(DiskSpeed::GOOD),
            Action::QuickenWires => self.set_wires(GOOD_WIRE),
        }
    }

    fn begin(&mut self, now: Duration, fault: Fault, lasts: Duration) {
        self.history.note(format_args!("{fault:?} for {lasts:?}"));
        match fault {
            Fault::Crash { nodes, end } => {
                for node in nodes {
                    let mut at = now;
                    if let End::Power {
                        halt_after: Some(n),
                    } = end
                    {
                        let machine = &self.slot(node).machine;
                        machine.excuse();
                        machine.halt_after(n);
                        at += Duration::from_millis(self.rng.random_range(1..20));
                    }
                    self.at(at, Action::End { node, end });
                    self.at(at + lasts, Action::Start(node));
                }
            }
            Fault::Stop { node } => self.slot(node).ask_to_stop(),
            Fault::Cut { from, to, cut } => {
                self.cut(&from, &to, cut);
                self.at(now + lasts, Action::Mend(from, to, cut));
            }
            Fault::SlowDisk { node, speed } => {
                self.slot(node).machine.set_speed(speed);
                self.at(now + lasts, Action::Quicken(node));
            }
            Fault::SlowWires { latency } => {
                self.set_wires(latency);
                self.at(now + lasts, Action::QuickenWires);
            }
            Fault::FailedSync { node, nth } => {
                let machine = &self.slot(node).machine;
                machine.excuse();
                machine.fail_nth_sync(nth);
            }
        }
    }

    fn slot(&self, node: NodeId) -> Arc<NodeSlot> {
        self.stage.nodes[node as usize - 1].clone()
    }

    fn end(&mut self, node: NodeId, end: End) {
        let slot = self.slot(node);
        if slot.is_down() {
            return;
        }
        match end {
            End::Power { .. } => slot.machine.lose_power(self.rng.random()),
            End::Kill => slot.machine.lose_process(),
        }
        self.history.note(format_args!("node {node} ends: {end:?}"));
        self.replicas.lock().ended(node);
        self.sim.crash(host_name(node));
        slot.went_down();
    }

    fn start(&mut self, node: NodeId) {
        if self.slot(node).is_down() {
            self.history.note(format_args!("node {node} starts"));
            self.sim.bounce(host_name(node));
        }
    }

    /// Processes that ended by themselves, or as they were told, are started again.
    fn note_ended(&mut self, now: Duration) {
        for slot in self.stage.nodes.clone() {
            let Some((reason, asked)) = slot.ended() else {
                continue;
            };
            let node = slot.id();
            self.history
                .note(format_args!("node {node} has stopped: {reason}"));
            if !asked && !slot.machine.is_excused() {
                self.history
                    .violation(format_args!("node {node} stopped by itself: {reason}"));
            }
            let end = match asked || self.rng.random() {
                true => End::Kill,
                false => End::Power { halt_after: None },
            };
            self.end(node, end);
            let pause = Duration::from_millis(self.rng.random_range(20..3000));
            self.at(now + pause, Action::Start(node));
        }
    }

    fn cut(&mut self, from: &[NodeId], to: &[NodeId], cut: Cut) {
        for (a, b) in pairs(from, to) {
            match cut {
                Cut::Both => self.sim.partition(host_name(a), host_name(b)),
                Cut::OneWay => self.sim.partition_oneway(host_name(a), host_name(b)),
                Cut::Held => {
                    self.sim.hold(host_name(a), host_name(b));
                    continue;
                }
            }
            self.wires.cut(a, b);
        }
    }

    fn set_wires(&self, latency: Duration) {
        let all: Vec<_> = self.stage.nodes.iter().map(|slot| slot.id()).collect();
        for (a, b) in pairs(&all, &all).into_iter().filter(|(a, b)| a < b) {
            self.sim
                .set_link_latency(host_name(a), host_name(b), latency);
        }
    }

    fn mend(&mut self, from: &[NodeId], to: &[NodeId], cut: Cut) {
        self.history
            .note(format_args!("mended: {from:?} and {to:?} {cut:?}"));
        for (a, b) in pairs(from, to) {
            // Another fault between the two ends with it, whatever it was.
            self.sim.release(host_name(a), host_name(b));
            self.wires.mend(a, b);
        }
    }

    /// All faults end.
    fn heal(&mut self, now: Duration) {
        self.history.note("healing");
        self.stage.closing.store(true, Ordering::Relaxed);
        let open = std::mem::take(&mut self.actions);
        for action in open.into_values() {
            match action {
                Action::Begin(..) => {}
                // A disk that has stopped stays so.
                other => self.perform(now, other),
            }
        }
        let all: Vec<_> = self.stage.nodes.iter().map(|slot| slot.id()).collect();
        for (a, b) in pairs(&all, &all).into_iter().filter(|(a, b)| a != b) {
            self.sim.release(host_name(a), host_name(b));
            self.wires.mend(a, b);
        }
        for slot in self.stage.nodes.clone() {
            if slot.is_down() {
                self.start(slot.id());
            }
        }
    }

    fn check(&mut self, step: u32) {
        let mut replicas = self.replicas.lock();
        if step.is_multiple_of(LEADERS_EVERY) {
            replicas.check_leaders(&self.stage.nodes);
        }
        if step.is_multiple_of(LOGS_EVERY) {
            replicas.check_logs(&self.stage.nodes);
        }
    }
}

fn pairs(from: &[NodeId], to: &[NodeId]) -> Vec<(NodeId, NodeId)> {
    let pair = |a: &NodeId| to.iter().map(|b| (*a, *b)).collect::<Vec<_>>();
    from.iter().flat_map(pair).collect()
}
