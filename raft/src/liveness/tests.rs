//! Agreement between real links; the detector's own rules are tested without time beside it.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Mutex;

use super::*;
use crate::link::tests::{DEADLINE, Node, addr, cluster, config, eventually, listener, within};
use crate::link::{LinkConfig, Socket, raw_peer};

/// A link with its detector.
struct Watched {
    node: Node,
    liveness: Arc<Liveness>,
    events: Mutex<broadcast::Receiver<LivenessEvent>>,
}

impl Watched {
    fn new(node: Node) -> Watched {
        let liveness = Liveness::start(node.table.clone());
        let events = Mutex::new(liveness.events());
        Watched {
            node,
            liveness,
            events,
        }
    }

    async fn event(&self) -> LivenessEvent {
        within(self.events.lock().await.recv())
            .await
            .expect("no event is lost")
    }

    /// The next event about that node.
    async fn event_of(&self, wanted: NodeId) -> LivenessEvent {
        loop {
            let event = self.event().await;
            let (LivenessEvent::Suspect { node, .. }
            | LivenessEvent::Dead { node, .. }
            | LivenessEvent::Alive { node, .. }) = event;
            if node == wanted {
                return event;
            }
        }
    }
}

/// No silence in this test is long enough to count: only closed connections and ports do.
fn patient(config: &mut LinkConfig) {
    config.silence_timeout = DEADLINE * 10;
    config.drop_silent_after = DEADLINE * 10;
}

async fn watched(count: u64, change: impl Fn(&mut LinkConfig)) -> Vec<Watched> {
    cluster(count, change)
        .await
        .into_iter()
        .map(Watched::new)
        .collect()
}

#[tokio::test]
async fn a_process_that_goes_is_agreed_dead_without_any_silence() {
    for gone in [1, 2, 3] {
        let nodes = watched(3, patient).await;
        let incarnation = nodes[gone as usize - 1].node.table.config().incarnation;
        for node in &nodes {
            for peer in node.node.table.peers() {
                eventually("up", || node.liveness.state(peer) == PeerState::Up).await;
            }
        }
        nodes[gone as usize - 1].node.table.shutdown().await;
        for node in nodes
            .iter()
            .filter(|node| node.node.table.config().node_id != gone)
        {
            let alive = LivenessEvent::Alive {
                node: gone,
                incarnation,
            };
            assert_eq!(node.event_of(gone).await, alive);
            let suspect = LivenessEvent::Suspect {
                node: gone,
                incarnation,
            };
            assert_eq!(node.event_of(gone).await, suspect);
            let dead = LivenessEvent::Dead {
                node: gone,
                incarnation,
            };
            assert_eq!(node.event_of(gone).await, dead);
            assert_eq!(node.liveness.state(gone), PeerState::Down);
        }
    }
}

#[tokio::test]
async fn in_a_cluster_of_two_nobody_is_agreed_dead_but_a_new_process_buries_the_old() {
    let (bound_1, bound_2) = (listener().await, listener().await);
    let (at_1, at_2) = (addr(&bound_1), addr(&bound_2));
    let mut config_1 = config(1, vec![(2, at_2)]);
    patient(&mut config_1);
    let one = Watched::new(Node::start(config_1, bound_1));
    let two = Node::start(config(2, vec![(1, at_1.clone())]), bound_2);
    let old = two.table.config().incarnation;
    assert_eq!(
        one.event().await,
        LivenessEvent::Alive {
            node: 2,
            incarnation: old
        }
    );
    two.table.shutdown().await;
    assert_eq!(
        one.event().await,
        LivenessEvent::Suspect {
            node: 2,
            incarnation: old
        }
    );
    assert_eq!(one.liveness.state(2), PeerState::Down);
    assert!(!one.liveness.agree_dead(2, old).await);
    // The new process listens elsewhere, so that no port has to be taken again.
    let bound_2 = listener().await;
    one.node.table.add_peer(2, addr(&bound_2));
    let two = Node::start(config(2, vec![(1, at_1)]), bound_2);
    let new = two.table.config().incarnation;
    assert_eq!(
        one.event().await,
        LivenessEvent::Dead {
            node: 2,
            incarnation: old
        }
    );
    assert_eq!(
        one.event().await,
        LivenessEvent::Alive {
            node: 2,
            incarnation: new
        }
    );
    assert_eq!(one.liveness.incarnation(2), Some(new));
}

/// Node 1, played by raw sockets to nodes 2 and 3 that answer pings as told.
struct Puppet {
    speaks: [Arc<AtomicBool>; 2],
}

const PUPPET_INCARNATION: u64 = 77;

async fn puppet(mut socket: Socket, speaks: Arc<AtomicBool>) {
    let mut sink = vec![0; 4096];
    let mut frames = raw_peer::Frames::default();
    loop {
        match socket.read(&mut sink).await {
            Ok(0) | Err(_) => return,
            Ok(_) if speaks.load(Ordering::SeqCst) => {
                let _ = socket.write_all(&frames.ping(PUPPET_INCARNATION)).await;
            }
            Ok(_) => {}
        }
    }
}

/// Nodes 2 and 3, watched, and the puppet.
async fn puppet_show() -> (Vec<Watched>, Puppet) {
    let (bound_2, bound_3) = (listener().await, listener().await);
    let (at_2, at_3) = (addr(&bound_2), addr(&bound_3));
    // Nobody listens for node 1, and that must not be what gives it away: its knocks go to 3.
    let start = |node, bound, other: NodeId, at_other: &str| {
        let peers = vec![(1, at_other.to_owned()), (other, at_other.to_owned())];
        let mut config = config(node, peers);
        config.drop_silent_after = DEADLINE * 10;
        Watched::new(Node::start(config, bound))
    };
    let nodes = vec![start(2, bound_2, 3, &at_3), start(3, bound_3, 2, &at_2)];
    let speaks = [
        Arc::new(AtomicBool::new(true)),
        Arc::new(AtomicBool::new(true)),
    ];
    for ((at, node), speaks) in [(at_2, 2), (at_3, 3)].into_iter().zip(&speaks) {
        let socket = raw_peer::greet(&at, 1, PUPPET_INCARNATION, node).await;
        tokio::spawn(puppet(socket, speaks.clone()));
    }
    for node in &nodes {
        let alive = LivenessEvent::Alive {
            node: 1,
            incarnation: PUPPET_INCARNATION,
        };
        assert_eq!(node.event_of(1).await, alive);
    }
    nodes[0].node.connected_to(3).await;
    (nodes, Puppet { speaks })
}

const SUSPECT: LivenessEvent = LivenessEvent::Suspect {
    node: 1,
    incarnation: PUPPET_INCARNATION,
};
const DEAD: LivenessEvent = LivenessEvent::Dead {
    node: 1,
    incarnation: PUPPET_INCARNATION,
};
const ALIVE: LivenessEvent = LivenessEvent::Alive {
    node: 1,
    incarnation: PUPPET_INCARNATION,
};

#[tokio::test]
async fn a_paused_peer_is_suspected_agreed_dead_and_welcomed_back() {
    let (nodes, puppet) = puppet_show().await;
    puppet
        .speaks
        .iter()
        .for_each(|speaks| speaks.store(false, Ordering::SeqCst));
    for node in &nodes {
        assert_eq!(node.event_of(1).await, SUSPECT);
        assert_eq!(node.event_of(1).await, DEAD);
        assert_eq!(node.liveness.state(1), PeerState::Down);
        assert!(node.node.table.connected(1), "its connection is still open");
    }
    puppet
        .speaks
        .iter()
        .for_each(|speaks| speaks.store(true, Ordering::SeqCst));
    for node in &nodes {
        assert_eq!(node.event_of(1).await, ALIVE);
        assert_eq!(node.liveness.state(1), PeerState::Up);
    }
}

#[tokio::test]
async fn one_way_silence_is_suspicious_and_not_death() {
    let (nodes, puppet) = puppet_show().await;
    puppet.speaks[0].store(false, Ordering::SeqCst);
    assert_eq!(nodes[0].event_of(1).await, SUSPECT);
    // Node 3 hears it, and says so however often it is asked, even when node 2 has lost all hope.
    eventually("down for node 2", || {
        nodes[0].liveness.state(1) == PeerState::Down
    })
    .await;
    for _ in 0..10 {
        assert!(!nodes[0].liveness.agree_dead(1, PUPPET_INCARNATION).await);
    }
    assert_eq!(nodes[1].liveness.state(1), PeerState::Up);
    assert!(
        nodes[0].events.lock().await.try_recv().is_err(),
        "no death was announced"
    );
    // Once node 3 hears nothing either, both agree.
    puppet.speaks[1].store(false, Ordering::SeqCst);
    assert_eq!(nodes[0].event_of(1).await, DEAD);
    assert_eq!(nodes[1].event_of(1).await, SUSPECT);
    assert_eq!(nodes[1].event_of(1).await, DEAD);
}
