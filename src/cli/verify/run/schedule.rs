//! The seed made into faults: what happens to whom, for how long. Pure: one seed, one schedule.
//!
//! Whom a fault hits is settled here as far as it can be; "the leader" is whoever leads when the
//! fault begins. Each requested kind comes once, in some order, before any comes again.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use super::plan::{FaultKind, Plan};

/// A fault lasts about this long where the run is long enough.
const HOLD_MAX: Duration = Duration::from_secs(5);
const HOLD_MIN: Duration = Duration::from_millis(700);
/// A cluster without a majority is left alone after this.
const OUTAGE_MAX: Duration = Duration::from_millis(1500);

/// Who is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The leader of this queue, counted over all topics.
    LeaderOf(u16),
    Node(u64),
}

/// Who can't hear whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// These nodes on one side, all others on the other.
    Halves(Vec<u64>),
    Isolated(Target),
    /// Each node hears only its two neighbours of this circle.
    Ring(Vec<u64>),
    /// The first node hears all; the others, split in two, only their own half and it.
    Bridge(Vec<u64>),
    /// Nothing from this node arrives; it hears the others.
    Mute(u64),
    /// Nothing arrives at this node; the others hear it.
    Deaf(u64),
    /// Nobody hears anybody.
    Total,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    Kill(Target),
    KillAll,
    Pause(Target),
    Restart(Target),
    Partition {
        shape: Shape,
        /// Connections are closed instead of falling silent.
        closed: bool,
    },
    Delay {
        /// The node on whose links, or all of them.
        of: Option<u64>,
        most: Duration,
    },
    Duplicate {
        of: Option<u64>,
    },
    Reorder {
        of: Option<u64>,
    },
    Damage {
        target: Target,
        /// Where in its log.
        permille: u16,
    },
}

impl Fault {
    pub fn kind(&self) -> FaultKind {
        match self {
            Self::Kill(_) => FaultKind::Kill,
            Self::KillAll => FaultKind::KillAll,
            Self::Pause(_) => FaultKind::Pause,
            Self::Restart(_) => FaultKind::Restart,
            Self::Partition { .. } => FaultKind::Partition,
            Self::Delay { .. } => FaultKind::Delay,
            Self::Duplicate { .. } => FaultKind::Duplicate,
            Self::Reorder { .. } => FaultKind::Reorder,
            Self::Damage { .. } => FaultKind::Damage,
        }
    }
}

/// Faults that are there at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Peace before it.
    pub quiet: Duration,
    pub hold: Duration,
    pub faults: Vec<Fault>,
}

/// Never ends: whoever follows it decides when it is enough.
#[derive(Debug)]
pub struct Schedule {
    rng: StdRng,
    kinds: Vec<FaultKind>,
    first: VecDeque<FaultKind>,
    nodes: Vec<u64>,
    faulty: usize,
    lanes: u16,
    hold: Duration,
    shapes: u64,
}

impl Schedule {
    pub fn new(plan: &Plan) -> Self {
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let mut first = plan.faults.clone();
        first.shuffle(&mut rng);
        let slot = plan.duration / (2 * first.len().max(1) as u32);
        Self {
            kinds: plan.faults.clone(),
            first: first.into(),
            nodes: (1..=plan.nodes).collect(),
            faulty: plan.faulty as usize,
            lanes: (plan.topics * plan.queues) as u16,
            hold: slot.clamp(HOLD_MIN, HOLD_MAX),
            shapes: rng.random_range(0..7),
            rng,
        }
    }

    fn step(&mut self) -> Option<Step> {
        let kind = match self.first.pop_front() {
            Some(kind) => kind,
            None => *self.kinds.choose(&mut self.rng)?,
        };
        let mut faults = vec![self.fault(kind)];
        if self.faulty > 1 {
            faults.extend(self.companion(kind));
        }
        // Short ones among the long: most bugs live in the moment of a change.
        let part = match self.rng.random_bool(0.25) {
            true => self.rng.random_range(0.1..0.4),
            false => self.rng.random_range(0.5..1.5),
        };
        let mut hold = self.hold.mul_f64(part);
        if self.is_outage(&faults) {
            hold = hold.min(OUTAGE_MAX);
        }
        Some(Step {
            quiet: self.hold.mul_f64(self.rng.random_range(0.1..0.8)),
            hold,
            faults,
        })
    }

    fn is_outage(&self, faults: &[Fault]) -> bool {
        faults.iter().any(|fault| match fault {
            Fault::KillAll => true,
            Fault::Partition { shape, .. } => *shape == Shape::Total,
            _ => false,
        })
    }

    fn fault(&mut self, kind: FaultKind) -> Fault {
        match kind {
            FaultKind::Kill => Fault::Kill(self.target()),
            FaultKind::KillAll => Fault::KillAll,
            FaultKind::Pause => Fault::Pause(self.target()),
            FaultKind::Restart => Fault::Restart(self.target()),
            FaultKind::Partition => Fault::Partition {
                shape: self.shape(),
                closed: self.rng.random_bool(0.3),
            },
            FaultKind::Delay => Fault::Delay {
                of: self.links(),
                most: Duration::from_millis(self.rng.random_range(10..400)),
            },
            FaultKind::Duplicate => Fault::Duplicate { of: self.links() },
            FaultKind::Reorder => Fault::Reorder { of: self.links() },
            FaultKind::Damage => Fault::Damage {
                target: self.target(),
                permille: self.rng.random_range(0..1000),
            },
        }
    }

    /// With two nodes to break: a second fault beside one that leaves room for it.
    fn companion(&mut self, kind: FaultKind) -> Option<Fault> {
        let process = [FaultKind::Kill, FaultKind::Pause, FaultKind::Restart];
        let others: Vec<FaultKind> = match kind {
            FaultKind::KillAll | FaultKind::Partition | FaultKind::Damage => Vec::new(),
            _ => process
                .into_iter()
                .filter(|kind| self.kinds.contains(kind))
                .collect(),
        };
        let kind = *others.choose(&mut self.rng)?;
        Some(self.fault(kind))
    }

    fn target(&mut self) -> Target {
        match self.rng.random_bool(0.5) {
            true => Target::LeaderOf(self.rng.random_range(0..self.lanes)),
            false => Target::Node(self.node()),
        }
    }

    fn node(&mut self) -> u64 {
        self.rng.random_range(1..=self.nodes.len() as u64)
    }

    fn links(&mut self) -> Option<u64> {
        self.rng.random_bool(0.5).then(|| self.node())
    }

    /// The shapes in turns.
    fn shape(&mut self) -> Shape {
        self.shapes += 1;
        let mut order = self.nodes.clone();
        order.shuffle(&mut self.rng);
        match self.shapes % 8 {
            0 => Shape::Halves(order[..self.faulty.max(1)].to_vec()),
            1 => Shape::Isolated(Target::LeaderOf(self.rng.random_range(0..self.lanes))),
            2 => Shape::Isolated(Target::Node(order[0])),
            // Three nodes are a ring as they are.
            3 if order.len() > 3 => Shape::Ring(order),
            3 | 4 => Shape::Bridge(order),
            5 => Shape::Mute(order[0]),
            6 => Shape::Deaf(order[0]),
            _ => Shape::Total,
        }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        self.step()
    }
}

impl Shape {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Halves(_) => "halves",
            Self::Isolated(Target::LeaderOf(_)) => "isolated leader",
            Self::Isolated(Target::Node(_)) => "isolated node",
            Self::Ring(_) => "ring",
            Self::Bridge(_) => "bridge",
            Self::Mute(_) => "one way, mute",
            Self::Deaf(_) => "one way, deaf",
            Self::Total => "total",
        }
    }

    /// Whether what `from` sends to `to` is cut off; `isolated` is who [`Target`] turned out to be.
    pub fn cuts(&self, from: u64, to: u64, isolated: u64) -> bool {
        let place = |order: &[u64], node| order.iter().position(|n| *n == node).unwrap_or(0);
        match self {
            Self::Halves(side) => side.contains(&from) != side.contains(&to),
            Self::Isolated(_) => from == isolated || to == isolated,
            Self::Ring(order) => {
                let apart = place(order, from).abs_diff(place(order, to));
                apart != 1 && apart != order.len() - 1
            }
            Self::Bridge(order) => {
                let (a, b) = (place(order, from), place(order, to));
                let half = order.len() / 2;
                a != 0 && b != 0 && (a <= half) != (b <= half)
            }
            Self::Mute(node) => from == *node,
            Self::Deaf(node) => to == *node,
            Self::Total => true,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeaderOf(lane) => write!(f, "the leader of queue {lane}"),
            Self::Node(node) => write!(f, "node {node}"),
        }
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
