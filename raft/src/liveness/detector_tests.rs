use super::*;

const NODE: NodeId = 2;
const OLD: u64 = 11;
const NEW: u64 = 12;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A detector with the default times, looked at every 50 ms.
struct Stage {
    detector: Detector,
    now: Instant,
    started: Instant,
}

impl Stage {
    fn new() -> Stage {
        let now = Instant::now();
        Stage {
            detector: Detector::new(LivenessConfig::default(), now),
            now,
            started: now,
        }
    }

    /// As [`Stage::new`], with the peer up.
    fn up() -> Stage {
        let mut stage = Stage::new();
        let up = Change::Up {
            node: NODE,
            incarnation: OLD,
        };
        assert_eq!(stage.look(stage.connected(0)), [up]);
        stage
    }

    /// Heard so many milliseconds ago.
    fn connected(&self, heard_ms_ago: u64) -> PeerView {
        PeerView::Connected {
            incarnation: OLD,
            heard: self.now - ms(heard_ms_ago),
        }
    }

    fn look(&mut self, view: PeerView) -> Vec<Change> {
        self.detector.run(self.now, &[(NODE, view)])
    }

    /// Looks every 50 ms until something changes; the changes and after how many milliseconds.
    fn until_change(&mut self, view: PeerView, limit_ms: u64) -> Option<(Vec<Change>, u64)> {
        let from = self.now;
        while self.now - from < ms(limit_ms) {
            self.now += ms(50);
            let changes = self.look(view);
            if !changes.is_empty() {
                return Some((changes, (self.now - from).as_millis() as u64));
            }
        }
        None
    }

    fn state(&self) -> PeerState {
        self.detector.state(NODE)
    }
}

const SUSPECT: Change = Change::Suspect {
    node: NODE,
    incarnation: OLD,
};
const DOWN: Change = Change::Down {
    node: NODE,
    incarnation: OLD,
    was_suspect: true,
};
const GONE: Change = Change::Down {
    node: NODE,
    incarnation: OLD,
    was_suspect: false,
};
const UP: Change = Change::Up {
    node: NODE,
    incarnation: OLD,
};

#[test]
fn a_node_never_seen_is_down_without_news() {
    let mut stage = Stage::new();
    for refused in [false, true] {
        let view = PeerView::Never {
            since: stage.started,
            refused,
        };
        assert_eq!(stage.until_change(view, 5000), None);
        assert_eq!(stage.state(), PeerState::Down);
    }
}

#[test]
fn silence_makes_suspect_then_down_and_a_byte_makes_up() {
    let mut stage = Stage::up();
    let view = stage.connected(0);
    assert_eq!(stage.until_change(view, 9000), Some((vec![SUSPECT], 650)));
    assert_eq!(stage.until_change(view, 9000), Some((vec![DOWN], 2000)));
    assert_eq!(stage.until_change(view, 9000), None);
    let heard = stage.connected(0);
    assert_eq!(stage.look(heard), [UP]);
    assert_eq!(stage.state(), PeerState::Up);
}

#[test]
fn bytes_keep_a_peer_up() {
    let mut stage = Stage::up();
    for _ in 0..1000 {
        stage.now += ms(50);
        let view = stage.connected(599);
        assert_eq!(stage.look(view), []);
    }
}

#[test]
fn a_closed_port_makes_down_at_once_whether_up_or_suspect() {
    let lost = |stage: &Stage, refused| PeerView::Lost {
        incarnation: OLD,
        since: stage.now,
        refused,
    };
    let mut stage = Stage::up();
    let view = lost(&stage, true);
    assert_eq!(stage.look(view), [GONE]);

    let mut stage = Stage::up();
    let view = lost(&stage, false);
    assert_eq!(stage.until_change(view, 9000), Some((vec![SUSPECT], 250)));
    let view = lost(&stage, true);
    assert_eq!(stage.look(view), [DOWN]);
}

#[test]
fn a_quick_reconnect_is_no_news() {
    let mut stage = Stage::up();
    let lost = PeerView::Lost {
        incarnation: OLD,
        since: stage.now,
        refused: false,
    };
    stage.now += ms(150);
    assert_eq!(stage.look(lost), []);
    let view = stage.connected(0);
    assert_eq!(stage.look(view), []);
}

#[test]
fn a_new_incarnation_is_a_death_and_a_birth() {
    let replaced = Change::Replaced {
        node: NODE,
        incarnation: OLD,
    };
    let born = Change::Up {
        node: NODE,
        incarnation: NEW,
    };
    let mut stage = Stage::up();
    let view = PeerView::Connected {
        incarnation: NEW,
        heard: stage.now,
    };
    assert_eq!(stage.look(view), [replaced, born]);
    assert_eq!(stage.state(), PeerState::Up);

    // Lost again before anybody looked: the birth is still told before the suspicion.
    let mut stage = Stage::up();
    let since = stage.now;
    let lost = PeerView::Lost {
        incarnation: NEW,
        since,
        refused: true,
    };
    let down = Change::Down {
        node: NODE,
        incarnation: NEW,
        was_suspect: false,
    };
    assert_eq!(stage.look(lost), [replaced, born, down]);
}

#[test]
fn a_death_that_was_agreed_is_not_told_twice() {
    let mut stage = Stage::up();
    let view = stage.connected(0);
    assert!(!stage.detector.agreed_dead(NODE, OLD), "it is up");
    stage.until_change(view, 9000).expect("suspect");
    assert!(stage.detector.in_doubt(NODE, OLD));
    assert!(!stage.detector.agreed_dead(NODE, NEW), "another process");
    assert!(stage.detector.agreed_dead(NODE, OLD));
    assert!(!stage.detector.agreed_dead(NODE, OLD), "no news");
    assert!(!stage.detector.in_doubt(NODE, OLD));
    assert_eq!(stage.state(), PeerState::Down);
    let born = Change::Up {
        node: NODE,
        incarnation: NEW,
    };
    let view = PeerView::Connected {
        incarnation: NEW,
        heard: stage.now,
    };
    assert_eq!(stage.look(view), [born]);
}

#[test]
fn silence_this_process_slept_through_suspects_nobody() {
    let mut stage = Stage::up();
    let view = stage.connected(0);
    // Stopped for a minute, then it looks before the reader had its turn.
    stage.now += ms(60_000);
    assert!(
        !stage.detector.not_alive(stage.now, OLD, &view),
        "asked before it looked"
    );
    assert_eq!(stage.look(view), []);
    assert!(!stage.detector.not_alive(stage.now, OLD, &view));
    // From then on silence counts in full.
    assert_eq!(stage.until_change(view, 9000), Some((vec![SUSPECT], 650)));
    // Stopped again: being awake is no sign of the peer's life, nor of its death.
    stage.now += ms(60_000);
    assert_eq!(stage.look(view), []);
    assert_eq!(stage.state(), PeerState::Suspect);
    assert_eq!(stage.until_change(view, 9000), Some((vec![DOWN], 2000)));
}

#[test]
fn a_lost_connection_slept_through_has_its_grace() {
    let mut stage = Stage::up();
    let lost = PeerView::Lost {
        incarnation: OLD,
        since: stage.now,
        refused: false,
    };
    stage.now += ms(60_000);
    assert_eq!(stage.look(lost), []);
    assert_eq!(stage.until_change(lost, 9000), Some((vec![SUSPECT], 250)));
}

#[test]
fn what_a_witness_says() {
    let mut stage = Stage::up();
    let not_alive = |stage: &Stage, view| stage.detector.not_alive(stage.now, OLD, &view);
    for _ in 0..20 {
        stage.now += ms(50);
        let view = stage.connected(0);
        stage.look(view);
    }
    assert!(
        !not_alive(&stage, stage.connected(600)),
        "heard within the timeout"
    );
    assert!(not_alive(&stage, stage.connected(601)), "silent");
    let since = stage.now;
    assert!(not_alive(
        &stage,
        PeerView::Lost {
            incarnation: OLD,
            since,
            refused: false
        }
    ));
    assert!(not_alive(
        &stage,
        PeerView::Connected {
            incarnation: NEW,
            heard: since
        }
    ));
    // A witness that has just started has seen nobody yet, which says nothing.
    assert!(!not_alive(
        &stage,
        PeerView::Never {
            since,
            refused: false
        }
    ));
    assert!(not_alive(
        &stage,
        PeerView::Never {
            since,
            refused: true
        }
    ));
    assert!(not_alive(
        &stage,
        PeerView::Never {
            since: since - ms(601),
            refused: false
        }
    ));
}

impl Stage {
    /// The peer says nothing for so long after it became suspect; before that it is agreed dead.
    /// Then it is heard. After how many milliseconds of silence was it suspect?
    fn held_for_dead(&mut self, for_ms: u64) -> u64 {
        let view = self.connected(0);
        let (changes, silence) = self.until_change(view, 9000).expect("suspect");
        assert_eq!(changes, [SUSPECT]);
        assert!(self.detector.agreed_dead(NODE, OLD));
        let suspect_at = self.now;
        while self.now - suspect_at < ms(for_ms) {
            self.now += ms(50);
            self.look(view);
        }
        let heard = self.connected(0);
        assert_eq!(self.look(heard), [UP]);
        silence
    }

    /// Heard all the time.
    fn stays(&mut self, for_ms: u64) {
        for _ in 0..for_ms / 50 {
            self.now += ms(50);
            let view = self.connected(0);
            assert_eq!(self.look(view), []);
        }
    }
}

#[test]
fn who_was_only_slow_is_given_more_silence_for_a_while() {
    let mut stage = Stage::up();
    let silences = [(); 4].map(|()| stage.held_for_dead(500));
    assert_eq!(silences, [650, 1250, 2450, 2450]);
    let silent = stage.connected(2400);
    assert!(
        !stage.detector.not_alive(stage.now, OLD, &silent),
        "a witness is as patient"
    );
    stage.stays(60_000);
    assert_eq!(stage.held_for_dead(3000), 1250, "calm for a minute");
    stage.stays(60_000);
    assert_eq!(stage.held_for_dead(3000), 650, "and for another");
}

#[test]
fn who_was_stopped_is_missed_as_soon_the_next_time() {
    let mut stage = Stage::up();
    let silences = [(); 3].map(|()| stage.held_for_dead(2050));
    assert_eq!(silences, [650; 3]);
}

#[test]
fn a_removed_peer_is_forgotten() {
    let mut stage = Stage::up();
    assert_eq!(stage.detector.run(stage.now, &[]), []);
    assert_eq!(stage.state(), PeerState::Down);
    assert_eq!(stage.detector.incarnation(NODE), None);
}
