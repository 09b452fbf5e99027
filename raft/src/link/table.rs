//! All peers of a node: their connections, their events, and the calls and streams to them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::connection::Connection;
use super::error::{CallError, DisconnectReason, RefuseReason};
use super::peer::{Peer, Shared};
use super::stream::LinkStream;
use super::transport::Network;
use super::wire::Body;
use super::{LinkConfig, LinkHandler, LinkStats, PeerEvent, PeerView, RESERVED_CLASSES, dial};
use crate::NodeId;

/// The links to all peers. Dropping it closes them, [`shutdown`](Self::shutdown) also waits.
#[derive(Debug)]
pub struct LinkTable {
    shared: Arc<Shared>,
}

impl LinkTable {
    /// Starts to accept and to dial. The configuration should have been
    /// [validated](LinkConfig::validate).
    pub fn start(
        config: LinkConfig,
        network: impl Into<Network>,
        handler: Arc<dyn LinkHandler>,
    ) -> Arc<LinkTable> {
        debug_assert_eq!(config.validate(), Ok(()));
        let Network { listener, dialer } = network.into();
        let shared = Arc::new(Shared::new(config, dialer, handler));
        let table = LinkTable { shared };
        for (node, addr) in table.shared.config.peers.clone() {
            table.add_peer(node, addr);
        }
        table
            .shared
            .tasks
            .spawn(dial::accept_peers(table.shared.clone(), listener));
        Arc::new(table)
    }

    /// Asks `node` and waits for its answer. `class` below [`RESERVED_CLASSES`] is the owner's.
    pub async fn call(
        &self,
        node: NodeId,
        class: u8,
        group: u64,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        self.connection(node)?
            .call(class, group, Body::One(body), timeout)
            .await
    }

    /// As [`call`](Self::call): one body from many pieces, which are not copied together.
    pub async fn call_parts(
        &self,
        node: NodeId,
        class: u8,
        group: u64,
        parts: Vec<Bytes>,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        self.connection(node)?
            .call(class, group, Body::Parts(parts), timeout)
            .await
    }

    /// Opens an ordered stream; the other side gets `hello` with it. Does not wait for the peer:
    /// a stream the peer does not want ends at once.
    pub fn open_stream(
        &self,
        node: NodeId,
        group: u64,
        hello: Bytes,
    ) -> Result<LinkStream, CallError> {
        self.connection(node)?.open_stream(group, hello)
    }

    /// Ends all calls to a node that was found dead, as if its connection were lost. It stays open: a
    /// process that was stopped may go on.
    pub fn give_up_calls(&self, node: NodeId) {
        if let Ok(connection) = self.connection(node) {
            connection.give_up_calls();
        }
    }

    /// The other nodes, connected or not.
    pub fn peers(&self) -> Vec<NodeId> {
        self.shared.peers.read().keys().copied().collect()
    }

    /// Whether there is a connection; it may be silent.
    pub fn connected(&self, node: NodeId) -> bool {
        self.connection(node).is_ok()
    }

    /// Adds a peer, or changes where it listens from the next attempt on.
    pub fn add_peer(&self, node: NodeId, addr: String) {
        let shared = &self.shared;
        if node == shared.config.node_id {
            return;
        }
        let mut peers = shared.peers.write();
        if let Some(peer) = peers.get(&node) {
            peer.set_addr(addr);
            return;
        }
        let peer = Arc::new(Peer::new(node, addr, shared.stop.child_token()));
        peers.insert(node, peer.clone());
        shared
            .tasks
            .spawn(dial::keep_connected(shared.clone(), peer));
        drop(peers);
        shared.changed();
    }

    /// Closes the connection to a peer and accepts it no more.
    pub fn remove_peer(&self, node: NodeId) {
        let Some(peer) = self.shared.peers.write().remove(&node) else {
            return;
        };
        peer.stop.cancel();
        if let Some(connection) = peer.connection() {
            connection.close(DisconnectReason::Removed);
        }
        self.shared.changed();
    }

    /// The cluster's identity has become known: shown in handshakes from now on.
    pub fn set_cluster_id(&self, cluster_id: Uuid) {
        *self.shared.cluster_id.lock() = Some(cluster_id);
    }

    /// The cluster's identity as a connected peer knows it.
    pub fn cluster_id_of(&self, node: NodeId) -> Option<Uuid> {
        self.connection(node).ok()?.peer.cluster_id
    }

    /// Connections made, lost, refused. The first subscriber gets every event since the start,
    /// later ones from now on.
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        let first = self.shared.first_events.lock().take();
        first.unwrap_or_else(|| self.shared.events.subscribe())
    }

    /// Why the peer refuses this node, if its latest answer was that.
    pub fn refusal(&self, node: NodeId) -> Option<RefuseReason> {
        self.shared.peer(node)?.refusal()
    }

    /// Changes whenever [`views`](Self::views) does, apart from bytes that come in.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// What is known of each peer's life right now.
    pub fn views(&self) -> Vec<(NodeId, PeerView)> {
        let peers = self.shared.peers.read();
        peers
            .values()
            .map(|peer| (peer.node, peer.view(self.shared.epoch)))
            .collect()
    }

    /// What is known of one peer's life right now.
    pub fn view(&self, node: NodeId) -> Option<PeerView> {
        Some(self.shared.peer(node)?.view(self.shared.epoch))
    }

    /// Whether [`shutdown`](Self::shutdown) has begun.
    pub fn is_stopped(&self) -> bool {
        self.shared.stop.is_cancelled()
    }

    /// Counters of one peer.
    pub fn stats(&self, node: NodeId) -> Option<LinkStats> {
        Some(self.shared.peer(node)?.stats())
    }

    /// Lets `respond` answer the calls of a reserved class. It runs on the reader tasks: from
    /// memory, without blocking. Until then such calls are refused.
    pub fn answer_class(
        &self,
        class: u8,
        respond: impl Fn(NodeId, u64, Bytes) -> Bytes + Send + Sync + 'static,
    ) {
        debug_assert!(class >= RESERVED_CLASSES);
        self.shared
            .services
            .responders
            .write()
            .insert(class, Arc::new(respond));
    }

    /// Closes every connection and the listener and waits for their tasks. What is queued is
    /// lost, and calls in service run on without anyone to answer.
    pub async fn shutdown(&self) {
        self.stop();
        self.shared.tasks.wait().await;
    }

    /// Who this node is and how its link is bounded.
    pub fn config(&self) -> &LinkConfig {
        &self.shared.config
    }

    fn stop(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        for peer in self.shared.peers.read().values() {
            if let Some(connection) = peer.connection() {
                connection.close(DisconnectReason::Shutdown);
            }
        }
    }

    fn connection(&self, node: NodeId) -> Result<Arc<Connection>, CallError> {
        let peer = self.shared.peer(node).ok_or(CallError::NotConnected)?;
        peer.connection().ok_or(CallError::NotConnected)
    }
}

impl Drop for LinkTable {
    fn drop(&mut self) {
        self.stop();
    }
}
