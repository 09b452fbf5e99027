//! What goes wrong, drawn from the seed.

use std::time::Duration;

use quorate_raft::NodeId;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

use crate::machine::DiskSpeed;

/// How a process ends.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// With its machine. The disk may stop in the middle of something, that many changes later.
    Power { halt_after: Option<u64> },
    /// Alone.
    Kill,
}

#[derive(Debug, Clone, Copy)]
pub enum Cut {
    /// What is sent is lost, both ways.
    Both,
    /// Only one way.
    OneWay,
    /// What is sent arrives at the end.
    Held,
}

#[derive(Debug, Clone)]
pub enum Fault {
    Crash {
        nodes: Vec<NodeId>,
        end: End,
    },
    /// As an operator would stop it.
    Stop {
        node: NodeId,
    },
    /// Between each of the first and each of the second.
    Cut {
        from: Vec<NodeId>,
        to: Vec<NodeId>,
        cut: Cut,
    },
    SlowDisk {
        node: NodeId,
        speed: DiskSpeed,
    },
    /// All of them, as between machines that are short of time.
    SlowWires {
        latency: Duration,
    },
    /// One of the next fsyncs fails; the node must stop. Then its machine goes down or it does not.
    FailedSync {
        node: NodeId,
        nth: u64,
    },
}

/// A fault and how long it lasts.
#[derive(Debug, Clone)]
pub struct Planned {
    pub at: Duration,
    pub lasts: Duration,
    pub fault: Fault,
}

/// Faults within `[0, span]`.
pub fn plan(rng: &mut StdRng, seed: u64, nodes: u64, span: Duration) -> Vec<Planned> {
    let count = rng.random_range(2..8);
    let mut all: Vec<Planned> = (0..count)
        .map(|_| Planned {
            at: span.mul_f64(rng.random_range(0.0..0.9)),
            lasts: Duration::from_millis(rng.random_range(20..5000)),
            fault: fault(rng, nodes),
        })
        .collect();
    all.extend(slow_wires(seed, span));
    all.sort_by_key(|planned| planned.at);
    all
}

/// On one seed of six. Drawn apart, so that the other faults of a seed are what they were without.
fn slow_wires(seed: u64, span: Duration) -> Option<Planned> {
    let mut rng = StdRng::seed_from_u64(seed);
    let planned = Planned {
        at: span.mul_f64(rng.random_range(0.0..0.5)),
        lasts: span.mul_f64(rng.random_range(0.2..0.5)),
        fault: Fault::SlowWires {
            latency: Duration::from_millis(rng.random_range(100..400)),
        },
    };
    (seed % 6 == 4).then_some(planned)
}

fn fault(rng: &mut StdRng, nodes: u64) -> Fault {
    let node = rng.random_range(1..=nodes);
    match rng.random_range(0..100) {
        0..30 => Fault::Crash {
            nodes: vec![node],
            end: end(rng),
        },
        30..40 => {
            // All of them as likely as some.
            let count = if rng.random() {
                nodes
            } else {
                rng.random_range(2..=nodes)
            };
            Fault::Crash {
                nodes: (1..=nodes).choose_multiple(rng, count as usize),
                end: end(rng),
            }
        }
        40..47 => Fault::Stop { node },
        47..77 => {
            let count = rng.random_range(1..=nodes / 2) as usize;
            let from = (1..=nodes).choose_multiple(rng, count);
            let others = (1..=nodes).filter(|node| !from.contains(node));
            // Some pairs, or one side from the other.
            let to = match rng.random_bool(0.4) {
                true => others.choose_multiple(rng, 1),
                false => others.collect(),
            };
            let cut = match rng.random_range(0..10) {
                0..4 => Cut::Both,
                4..7 => Cut::OneWay,
                _ => Cut::Held,
            };
            Fault::Cut { from, to, cut }
        }
        77..90 => {
            let slowest = [20, 100, 600][rng.random_range(0..3)];
            let sync_ms = (slowest / 4, slowest);
            Fault::SlowDisk {
                node,
                speed: DiskSpeed { sync_ms },
            }
        }
        _ => Fault::FailedSync {
            node,
            nth: rng.random_range(1..20),
        },
    }
}

fn end(rng: &mut StdRng) -> End {
    match rng.random_range(0..10) {
        0..3 => End::Kill,
        3..6 => End::Power { halt_after: None },
        _ => End::Power {
            halt_after: Some(rng.random_range(0..8)),
        },
    }
}
