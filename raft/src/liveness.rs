//! Who is alive in the cluster, once per pair of nodes and for all Raft groups at once.
//!
//! A detector judges what the link saw; this module drives it and asks the other nodes before
//! it calls anybody dead. No consensus is involved: each node answers from what it sees right
//! now, and a node that hears the accused says so. An agreed death may still be wrong (the accused
//! may be cut off, or sleep); what is done about it has to be safe then too, and is: elections need
//! a majority's votes whatever is believed here.
//!
//! Invariant: of one incarnation, an owner reads `Alive` before `Suspect` before `Dead`, and
//! `Dead` once unless `Alive` came between.

mod detector;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::NodeId;
use crate::link::{LinkTable, PeerView};
use detector::{Change, Detector};

pub use detector::{LivenessConfig, PeerState};

/// The call class of "do you see this process?": node u64 and incarnation u64, little-endian;
/// the answer is one byte, 1 for "no, not alive".
pub const WITNESS_CLASS: u8 = 250;

/// Events a subscriber may lag behind.
const EVENTS_MAX: usize = 1024;
/// Between two rounds of asking while a death is in doubt; doubles up to the second.
const ASK_PAUSE_MIN: Duration = Duration::from_millis(20);
const ASK_PAUSE_MAX: Duration = Duration::from_millis(500);

/// News about other nodes' processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LivenessEvent {
    /// Silent, disconnected or gone, in this node's eyes.
    Suspect { node: NodeId, incarnation: u64 },
    /// A majority of the cluster agrees that it is gone, or it has been replaced by a new
    /// incarnation of its node. Without a majority (in a cluster of two, say) only the latter.
    Dead { node: NodeId, incarnation: u64 },
    /// Connected and heard.
    Alive { node: NodeId, incarnation: u64 },
}

/// The running detector. Dropping it stops it.
pub struct Liveness {
    inner: Arc<Inner>,
    stop: CancellationToken,
}

struct Inner {
    table: Arc<LinkTable>,
    config: LivenessConfig,
    /// Also held while events are sent, which keeps them in order.
    detector: Mutex<Detector>,
    events: broadcast::Sender<LivenessEvent>,
    /// Has every event since the start; goes to the first who asks.
    first_events: Mutex<Option<broadcast::Receiver<LivenessEvent>>>,
}

impl fmt::Debug for Liveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Liveness")
            .field("detector", &*self.inner.detector.lock())
            .finish()
    }
}

impl Drop for Liveness {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Liveness {
    /// Watches the peers of `table`, with all times in proportion to its `silence_timeout`.
    pub fn start(table: Arc<LinkTable>) -> Arc<Liveness> {
        let config = LivenessConfig::from_silence(table.config().silence_timeout);
        Liveness::start_with(table, config)
    }

    /// As [`start`](Self::start), with these times. Also answers the other nodes' questions.
    pub fn start_with(table: Arc<LinkTable>, config: LivenessConfig) -> Arc<Liveness> {
        let (events, first_events) = broadcast::channel(EVENTS_MAX);
        let inner = Arc::new(Inner {
            table,
            config,
            detector: Mutex::new(Detector::new(config, Instant::now())),
            events,
            first_events: Mutex::new(Some(first_events)),
        });
        let witness = Arc::downgrade(&inner);
        inner
            .table
            .answer_class(WITNESS_CLASS, move |_from, _group, question| {
                let not_alive = witness
                    .upgrade()
                    .is_some_and(|inner| inner.testify(question));
                Bytes::from_static(if not_alive { &[1] } else { &[0] })
            });
        let stop = CancellationToken::new();
        tokio::spawn(watch(inner.clone(), stop.clone()));
        Arc::new(Liveness { inner, stop })
    }

    /// What this node thinks of another; of itself, that it is up.
    pub fn state(&self, node: NodeId) -> PeerState {
        if node == self.inner.table.config().node_id {
            return PeerState::Up;
        }
        self.inner.detector.lock().state(node)
    }

    /// The process last seen of a node.
    pub fn incarnation(&self, node: NodeId) -> Option<u64> {
        self.inner.detector.lock().incarnation(node)
    }

    /// Suspicions, deaths and births. The first subscriber gets every event since the start,
    /// later ones from now on.
    pub fn events(&self) -> broadcast::Receiver<LivenessEvent> {
        let first = self.inner.first_events.lock().take();
        first.unwrap_or_else(|| self.inner.events.subscribe())
    }

    /// Asks all other nodes whether they, too, see nothing of that process right now. True when a
    /// majority of the whole cluster says so, this node included.
    pub async fn agree_dead(&self, node: NodeId, incarnation: u64) -> bool {
        self.inner.agree_dead(node, incarnation).await
    }
}

/// Looks at the link at every change and every tick.
async fn watch(inner: Arc<Inner>, stop: CancellationToken) {
    let mut changes = inner.table.changes();
    loop {
        inner.look(&stop);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(inner.config.tick) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
        if inner.table.is_stopped() {
            return;
        }
    }
}

/// Asks the others until the death of a process is agreed or no longer in doubt.
async fn settle(inner: Arc<Inner>, stop: CancellationToken, node: NodeId, incarnation: u64) {
    let mut pause = ASK_PAUSE_MIN;
    while inner.detector.lock().in_doubt(node, incarnation) {
        if inner.agree_dead(node, incarnation).await {
            let mut detector = inner.detector.lock();
            if detector.agreed_dead(node, incarnation) {
                tracing::warn!(node, incarnation, "a majority agrees that the node is dead");
                inner.send(LivenessEvent::Dead { node, incarnation });
                drop(detector);
                inner.table.give_up_calls(node);
            }
            return;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(ASK_PAUSE_MAX),
        }
    }
}

impl Inner {
    fn look(self: &Arc<Self>, stop: &CancellationToken) {
        let views = self.table.views();
        let mut detector = self.detector.lock();
        for change in detector.run(Instant::now(), &views) {
            match change {
                Change::Up { node, incarnation } => {
                    tracing::info!(node, incarnation, "node is alive");
                    self.send(LivenessEvent::Alive { node, incarnation });
                }
                Change::Suspect { node, incarnation } => {
                    tracing::warn!(node, incarnation, "node is suspect");
                    self.doubt(stop, node, incarnation, true);
                }
                Change::Down {
                    node,
                    incarnation,
                    was_suspect,
                } => {
                    tracing::warn!(node, incarnation, "node is down");
                    self.doubt(stop, node, incarnation, !was_suspect);
                }
                Change::Replaced { node, incarnation } => {
                    tracing::warn!(node, incarnation, "node has a new process");
                    self.send(LivenessEvent::Dead { node, incarnation });
                }
            }
        }
    }

    /// Tells of the suspicion and starts to ask the others, if it is `fresh`.
    fn doubt(
        self: &Arc<Self>,
        stop: &CancellationToken,
        node: NodeId,
        incarnation: u64,
        fresh: bool,
    ) {
        if fresh {
            self.send(LivenessEvent::Suspect { node, incarnation });
            tokio::spawn(settle(self.clone(), stop.clone(), node, incarnation));
        }
    }

    fn send(&self, event: LivenessEvent) {
        // Without subscribers nobody has to know.
        let _ = self.events.send(event);
    }

    async fn agree_dead(&self, node: NodeId, incarnation: u64) -> bool {
        if !self.not_alive(node, incarnation) {
            return false;
        }
        let peers = self.table.peers();
        let majority = peers.len().div_ceil(2) + 1;
        let mut question = BytesMut::with_capacity(16);
        question.put_u64_le(node);
        question.put_u64_le(incarnation);
        let question = question.freeze();
        let timeout = self.config.agree_timeout;
        let mut answers: FuturesUnordered<_> = peers
            .into_iter()
            .filter(|peer| *peer != node)
            .map(|peer| {
                self.table
                    .call(peer, WITNESS_CLASS, 0, question.clone(), timeout)
            })
            .collect();
        let mut agreed = 1;
        while agreed < majority {
            match answers.next().await {
                Some(Ok(answer)) if answer[..] == [1] => agreed += 1,
                Some(_) => {}
                None => return false,
            }
        }
        // It may have come back while the others were asked.
        self.not_alive(node, incarnation)
    }

    /// This node's answer to another's question.
    fn testify(&self, mut question: Bytes) -> bool {
        if question.len() != 16 {
            return false;
        }
        let (node, incarnation) = (question.get_u64_le(), question.get_u64_le());
        self.not_alive(node, incarnation)
    }

    fn not_alive(&self, node: NodeId, incarnation: u64) -> bool {
        let view = self.table.view(node);
        let detector = self.detector.lock();
        view.is_some_and(|view: PeerView| detector.not_alive(Instant::now(), incarnation, &view))
    }
}
