//! Who is alive, decided from what the link saw. Pure: time comes in as an argument.
//!
//! ```text
//!            connected                 silent, or connection lost and not back soon
//!   (Down) ────────────▶  Up  ───────────────────────────────────────▶  Suspect
//!      ▲                  │  ▲─────────────── heard again ─────────────────┤  │
//!      │                  └── lost and port closed, or new incarnation ─┐  │  │
//!      └──────── agreed dead, or suspect for `down_after` ──────────────┴──┼──┘
//! ```
//!
//! A process that was held for dead and spoke again soon was slow and not stopped: from then on its
//! silence counts later, until it has been up for a while. Else a machine that is short of time would
//! lose and regain its leaderships every few seconds.
//!
//! Invariant: silence counts only while this process was awake to hear. When [`Detector::run`]
//! was not called for half of `silence_timeout`, all clocks of silence start anew.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::NodeId;
use crate::link::PeerView;

/// A process is given twice the silence so many times at most.
const STRIKES_MAX: u32 = 2;

/// What this node thinks of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// Connected, and heard within `silence_timeout`.
    Up,
    /// Silent, or disconnected with its port not known closed.
    Suspect,
    /// Gone: its port is closed, a majority agreed, it was suspect for `down_after`, or it was
    /// never there.
    Down,
}

/// The detector's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivenessConfig {
    /// Without a byte for so long on an open connection, a peer is suspect.
    pub silence_timeout: Duration,
    /// A peer that lost its connection is suspect if it is not back after this.
    pub reconnect_grace: Duration,
    /// Suspect for so long without agreement, a peer is down for this node.
    pub down_after: Duration,
    /// Between two looks at the link; changes of connections are looked at immediately.
    pub tick: Duration,
    /// Bound on asking the others about a death.
    pub agree_timeout: Duration,
    /// Up for so long, a peer that was falsely held for dead is given less silence again.
    pub calm_after: Duration,
}

impl Default for LivenessConfig {
    fn default() -> LivenessConfig {
        LivenessConfig::from_silence(Duration::from_millis(600))
    }
}

impl LivenessConfig {
    /// All times in proportion to `silence_timeout`.
    pub fn from_silence(silence_timeout: Duration) -> LivenessConfig {
        LivenessConfig {
            silence_timeout,
            reconnect_grace: silence_timeout / 3,
            down_after: silence_timeout * 10 / 3,
            tick: silence_timeout / 12,
            agree_timeout: silence_timeout / 2,
            calm_after: silence_timeout * 100,
        }
    }
}

/// What changed in one look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Suspect {
        node: NodeId,
        incarnation: u64,
    },
    Down {
        node: NodeId,
        incarnation: u64,
        was_suspect: bool,
    },
    /// Another incarnation came back: this one is dead without asking anybody.
    Replaced {
        node: NodeId,
        incarnation: u64,
    },
    Up {
        node: NodeId,
        incarnation: u64,
    },
}

#[derive(Debug)]
pub(crate) struct Detector {
    config: LivenessConfig,
    lives: BTreeMap<NodeId, Life>,
    last_run: Instant,
    /// No silence began before this: see the module's invariant.
    awake_since: Instant,
}

/// A peer that was connected at least once.
#[derive(Debug)]
struct Life {
    incarnation: u64,
    state: PeerState,
    suspect_since: Instant,
    /// The owner was told of this incarnation's death.
    dead: bool,
    /// How often that was too early, as far as it still counts.
    strikes: u32,
    /// When that last became more or less.
    struck_at: Instant,
}

impl Detector {
    pub(crate) fn new(config: LivenessConfig, now: Instant) -> Detector {
        Detector {
            config,
            lives: BTreeMap::new(),
            last_run: now,
            awake_since: now,
        }
    }

    /// Looks at all peers. To be called about every `tick`.
    pub(crate) fn run(&mut self, now: Instant, views: &[(NodeId, PeerView)]) -> Vec<Change> {
        if self.overslept(now) {
            self.awake_since = now;
        }
        self.last_run = now;
        self.lives
            .retain(|node, _| views.iter().any(|(known, _)| known == node));
        let mut changes = Vec::new();
        for (node, view) in views {
            self.look(now, *node, view, &mut changes);
        }
        changes
    }

    fn look(&mut self, now: Instant, node: NodeId, view: &PeerView, changes: &mut Vec<Change>) {
        let (incarnation, refused, not_heard) = match *view {
            PeerView::Never { .. } => return,
            PeerView::Connected { incarnation, heard } => {
                (incarnation, false, now.saturating_duration_since(heard))
            }
            PeerView::Lost {
                incarnation,
                refused,
                ..
            } => (incarnation, refused, Duration::MAX),
        };
        let life = self.lives.entry(node).or_insert_with(|| {
            changes.push(Change::Up { node, incarnation });
            Life::born(incarnation, now)
        });
        if life.incarnation != incarnation {
            if !life.dead {
                changes.push(Change::Replaced {
                    node,
                    incarnation: life.incarnation,
                });
            }
            changes.push(Change::Up { node, incarnation });
            *life = Life::born(incarnation, now);
        }
        let silent = silent(&self.config, life.strikes, self.awake_since, now, view);
        match life.state {
            PeerState::Up if refused => {
                life.state = PeerState::Down;
                changes.push(Change::Down {
                    node,
                    incarnation,
                    was_suspect: false,
                });
            }
            PeerState::Up if silent => {
                life.state = PeerState::Suspect;
                life.suspect_since = now;
                changes.push(Change::Suspect { node, incarnation });
            }
            PeerState::Up => life.calm_down(now, &self.config),
            // Being awake again is no sign of the peer's life: only a byte is.
            PeerState::Suspect | PeerState::Down if not_heard <= self.config.silence_timeout => {
                life.returns(now, &self.config);
                changes.push(Change::Up { node, incarnation });
            }
            PeerState::Suspect => {
                let since = life.suspect_since.max(self.awake_since);
                if refused || now.saturating_duration_since(since) >= self.config.down_after {
                    life.state = PeerState::Down;
                    changes.push(Change::Down {
                        node,
                        incarnation,
                        was_suspect: true,
                    });
                }
            }
            PeerState::Down => {}
        }
    }

    /// Whether this node, asked right now, sees nothing of that process. Being connected to
    /// another incarnation of the node is enough: a node has one process.
    pub(crate) fn not_alive(&self, now: Instant, incarnation: u64, view: &PeerView) -> bool {
        match *view {
            PeerView::Connected {
                incarnation: other, ..
            } if other != incarnation => true,
            PeerView::Lost { .. } | PeerView::Never { refused: true, .. } => true,
            PeerView::Connected { .. } | PeerView::Never { .. } => {
                let mut lives = self.lives.values();
                let life = lives.find(|life| life.incarnation == incarnation);
                let strikes = life.map_or(0, |life| life.strikes);
                !self.overslept(now) && silent(&self.config, strikes, self.awake_since, now, view)
            }
        }
    }

    /// A majority agreed on a death. True when this is news and still fits what is known.
    pub(crate) fn agreed_dead(&mut self, node: NodeId, incarnation: u64) -> bool {
        let Some(life) = self.lives.get_mut(&node) else {
            return false;
        };
        if life.incarnation != incarnation || life.state == PeerState::Up || life.dead {
            return false;
        }
        life.state = PeerState::Down;
        life.dead = true;
        true
    }

    /// Whether the question of this process's death is still open.
    pub(crate) fn in_doubt(&self, node: NodeId, incarnation: u64) -> bool {
        self.lives.get(&node).is_some_and(|life| {
            life.incarnation == incarnation && life.state != PeerState::Up && !life.dead
        })
    }

    pub(crate) fn state(&self, node: NodeId) -> PeerState {
        self.lives
            .get(&node)
            .map_or(PeerState::Down, |life| life.state)
    }

    pub(crate) fn incarnation(&self, node: NodeId) -> Option<u64> {
        self.lives.get(&node).map(|life| life.incarnation)
    }

    fn overslept(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_run) > self.config.silence_timeout / 2
    }
}

impl Life {
    fn born(incarnation: u64, now: Instant) -> Life {
        Life {
            incarnation,
            state: PeerState::Up,
            suspect_since: now,
            dead: false,
            strikes: 0,
            struck_at: now,
        }
    }

    /// It is heard again.
    fn returns(&mut self, now: Instant, config: &LivenessConfig) {
        // Who was away for longer was stopped, or cut off, and will be missed as soon as any other.
        let soon = now.saturating_duration_since(self.suspect_since) <= config.down_after;
        if self.dead && soon {
            self.strikes = (self.strikes + 1).min(STRIKES_MAX);
        }
        self.struck_at = now;
        self.state = PeerState::Up;
        self.dead = false;
    }

    fn calm_down(&mut self, now: Instant, config: &LivenessConfig) {
        let calm = now.saturating_duration_since(self.struck_at) >= config.calm_after;
        if self.strikes > 0 && calm {
            self.strikes -= 1;
            self.struck_at = now;
        }
    }
}

/// Whether nothing was heard for too long, of what this process was awake for.
fn silent(
    config: &LivenessConfig,
    strikes: u32,
    awake_since: Instant,
    now: Instant,
    view: &PeerView,
) -> bool {
    let (since, patience) = match *view {
        PeerView::Connected { heard, .. } => (heard, config.silence_timeout * (1 << strikes)),
        PeerView::Lost { since, .. } => (since, config.reconnect_grace),
        PeerView::Never { since, .. } => (since, config.silence_timeout),
    };
    now.saturating_duration_since(since.max(awake_since)) > patience
}

#[cfg(test)]
#[path = "detector_tests.rs"]
mod tests;
