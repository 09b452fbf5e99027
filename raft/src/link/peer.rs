//! One peer's slot and what fills and empties it: connections put to use, replaced, lost.
//!
//! Invariant: events about a peer are sent under its slot's lock, so they come in the order in
//! which the slot changed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::BytesMut;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::connection::Connection;
use super::error::{DisconnectReason, RefuseReason};
use super::hello::Greeting;
use super::reader::{self, Services};
use super::transport::{Dialer, Socket};
use super::{LinkConfig, LinkHandler, LinkStats, PeerEvent, PeerStats, PeerView, writer};
use crate::NodeId;

/// Events a subscriber may lag behind.
const EVENTS_MAX: usize = 1024;

/// What the table and all tasks of the link share.
pub(crate) struct Shared {
    pub(super) config: LinkConfig,
    pub(super) cluster_id: Mutex<Option<Uuid>>,
    pub(super) epoch: Instant,
    pub(super) services: Arc<Services>,
    pub(super) dialer: Box<dyn Dialer>,
    pub(super) peers: RwLock<BTreeMap<NodeId, Arc<Peer>>>,
    pub(super) events: broadcast::Sender<PeerEvent>,
    /// Has every event since the start; goes to the first who asks.
    pub(super) first_events: Mutex<Option<broadcast::Receiver<PeerEvent>>>,
    pub(super) changes: watch::Sender<u64>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// One other node.
pub(crate) struct Peer {
    pub node: NodeId,
    addr: Mutex<String>,
    slot: Mutex<Slot>,
    /// The connection was lost, or the peer asks to be dialed.
    pub wake: Notify,
    pub stop: CancellationToken,
    stats: Arc<PeerStats>,
}

#[derive(Default)]
struct Slot {
    connection: Option<Arc<Connection>>,
    /// Incarnation and end of the last connection.
    lost: Option<(u64, Instant)>,
    /// The latest attempt since then: whether the port was closed.
    refused: Option<bool>,
    refusal: Option<RefuseReason>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Peer {
    pub(crate) fn new(node: NodeId, addr: String, stop: CancellationToken) -> Peer {
        Peer {
            node,
            addr: Mutex::new(addr),
            slot: Mutex::default(),
            wake: Notify::new(),
            stop,
            stats: Arc::default(),
        }
    }

    /// From the next attempt on, which is soon.
    pub(crate) fn set_addr(&self, addr: String) {
        *self.addr.lock() = addr;
        self.wake.notify_one();
    }

    pub(crate) fn refusal(&self) -> Option<RefuseReason> {
        self.slot.lock().refusal.clone()
    }

    pub(crate) fn stats(&self) -> LinkStats {
        self.stats.read()
    }

    pub(crate) fn addr(&self) -> String {
        self.addr.lock().clone()
    }

    pub(crate) fn connection(&self) -> Option<Arc<Connection>> {
        self.slot.lock().connection.clone()
    }

    pub(crate) fn view(&self, started: Instant) -> PeerView {
        let slot = self.slot.lock();
        let refused = slot.refused.unwrap_or(false);
        match (&slot.connection, slot.lost) {
            (Some(connection), _) => PeerView::Connected {
                incarnation: connection.peer.incarnation,
                heard: connection.heard(),
            },
            (None, Some((incarnation, since))) => PeerView::Lost {
                incarnation,
                since,
                refused,
            },
            (None, None) => PeerView::Never {
                since: started,
                refused,
            },
        }
    }
}

impl Shared {
    pub(crate) fn new(
        config: LinkConfig,
        dialer: Box<dyn Dialer>,
        handler: Arc<dyn LinkHandler>,
    ) -> Shared {
        let (events, first_events) = broadcast::channel(EVENTS_MAX);
        Shared {
            cluster_id: Mutex::new(config.cluster_id),
            epoch: Instant::now(),
            services: Arc::new(Services {
                handler,
                responders: RwLock::default(),
            }),
            dialer,
            peers: RwLock::default(),
            events,
            first_events: Mutex::new(Some(first_events)),
            changes: watch::Sender::new(0),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            config,
        }
    }

    pub(crate) fn peer(&self, node: NodeId) -> Option<Arc<Peer>> {
        self.peers.read().get(&node).cloned()
    }

    pub(crate) fn greeting_to(&self, node: NodeId) -> Greeting {
        Greeting::new(&self.config, *self.cluster_id.lock(), node)
    }

    /// An attempt to reach the peer ended without a connection.
    pub(crate) fn attempt_failed(&self, peer: &Peer, refused: bool) {
        let mut slot = peer.slot.lock();
        // The peer may have connected meanwhile.
        if slot.connection.is_some() {
            return;
        }
        slot.refused = Some(refused);
        drop(slot);
        self.changed();
    }

    /// The peer refused this node.
    pub(crate) fn refused_by(&self, peer: &Peer, reason: RefuseReason) {
        let (node, code, text) = (peer.node, reason.code, reason.text.clone());
        let known = peer.slot.lock().refusal.replace(reason.clone());
        if known != Some(reason) {
            tracing::error!(node, ?code, text, "a peer refuses this node");
        }
        // Without subscribers nobody has to know.
        let _ = self.events.send(PeerEvent::Refused { node, code, text });
    }

    /// Puts a finished handshake's connection to use in place of an older one.
    pub(crate) fn install(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        greeting: Greeting,
        socket: Socket,
        buffer: BytesMut,
    ) {
        let (connection, urgent, ordinary) =
            Connection::new(&self.config, greeting, self.epoch, peer.stats.clone());
        let mut slot = peer.slot.lock();
        // `stop` closes what it finds in the slots after the token: so nothing slips in behind it.
        if peer.stop.is_cancelled() {
            return;
        }
        if let Some(old) = slot.connection.replace(connection.clone()) {
            old.close(DisconnectReason::Replaced);
            let reason = DisconnectReason::Replaced;
            let _ = self.events.send(PeerEvent::Disconnected {
                node: peer.node,
                reason,
            });
        }
        slot.lost = None;
        slot.refused = None;
        slot.refusal = None;
        let (node, greeting) = (peer.node, &connection.peer);
        let (incarnation, uuid) = (greeting.incarnation, greeting.uuid);
        let _ = self.events.send(PeerEvent::Connected {
            node,
            incarnation,
            uuid,
        });
        drop(slot);
        peer.stats.connections.fetch_add(1, Ordering::Relaxed);
        self.changed();
        tracing::info!(node, incarnation, "peer connected");

        let (read_half, write_half) = socket.into_split();
        self.tasks.spawn(writer::run(
            connection.clone(),
            write_half,
            urgent,
            ordinary,
        ));
        self.tasks
            .spawn(keep_alive(self.config.clone(), connection.clone()));
        let in_use = InUse {
            shared: self.clone(),
            peer: peer.clone(),
            connection,
        };
        let services = self.services.clone();
        self.tasks.spawn(async move {
            let reason = reader::run(&in_use.connection, &services, read_half, buffer).await;
            in_use.connection.close(reason);
        });
    }

    fn uninstall(&self, peer: &Peer, connection: &Arc<Connection>) {
        let mut slot = peer.slot.lock();
        if !slot
            .connection
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, connection))
        {
            return;
        }
        slot.connection = None;
        slot.lost = Some((connection.peer.incarnation, Instant::now()));
        slot.refused = None;
        let (node, reason) = (peer.node, connection.close_reason());
        let reason = reason.unwrap_or(DisconnectReason::Closed);
        tracing::info!(node, %reason, "peer disconnected");
        let _ = self.events.send(PeerEvent::Disconnected { node, reason });
        drop(slot);
        peer.wake.notify_one();
        self.changed();
    }

    pub(crate) fn changed(&self) {
        self.changes.send_modify(|version| *version += 1);
    }
}

/// A connection that occupies its peer's slot for as long as its reader runs, panics included.
struct InUse {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    connection: Arc<Connection>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.connection.close(DisconnectReason::Closed);
        self.shared.uninstall(&self.peer, &self.connection);
    }
}

/// Pings, and closes the connection when nothing was heard for `drop_silent_after`. Silence that
/// this process slept through (stopped, starved) does not count: it says nothing about the peer.
async fn keep_alive(config: LinkConfig, connection: Arc<Connection>) {
    let mut awake_since = Instant::now();
    let mut last = awake_since;
    loop {
        tokio::select! {
            () = connection.closed.cancelled() => return,
            () = tokio::time::sleep(config.ping_interval) => {}
        }
        let now = Instant::now();
        if now.duration_since(last) > config.ping_interval + config.silence_timeout / 2 {
            awake_since = now;
        }
        last = now;
        let heard = connection.heard().max(awake_since);
        if now.saturating_duration_since(heard) > config.drop_silent_after {
            connection.close(DisconnectReason::Silent);
            return;
        }
        connection.ping();
    }
}
