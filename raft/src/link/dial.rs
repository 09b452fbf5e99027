//! Making connections: the accept loop, and one task per peer that keeps it connected.
//!
//! The node with the lower id dials. The other one, when it has no connection, knocks: it
//! connects, says who it is and closes. That tells it whether the peer's port is open (liveness
//! wants to know at once), and makes a peer that waits out a long backoff dial right away.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use super::error::DisconnectReason;
use super::hello::{self, Accepted, HandshakeError};
use super::peer::{Peer, Shared};
use super::transport::{Listener, Socket};

/// Between two attempts however often the peer knocks.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);
/// Pause after a failed accept (out of file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connects to `peer` whenever there is no connection, until the link stops.
pub(crate) async fn keep_connected(shared: Arc<Shared>, peer: Arc<Peer>) {
    let stop = peer.stop.clone();
    tokio::select! {
        () = stop.cancelled() => {}
        () = connect_forever(&shared, &peer) => {}
    }
}

async fn connect_forever(shared: &Arc<Shared>, peer: &Arc<Peer>) {
    let config = &shared.config;
    let we_dial = config.node_id < peer.node;
    let mut backoff = config.backoff_min;
    if !we_dial {
        // At a common start the peer is just about to dial.
        let _ = timeout(config.backoff_min, peer.wake.notified()).await;
    }
    loop {
        if peer.connection().is_some() {
            peer.wake.notified().await;
            backoff = config.backoff_min;
            continue;
        }
        let started = Instant::now();
        let waits = attempt(shared, peer, we_dial).await;
        if peer.connection().is_some() {
            continue;
        }
        let pause = if waits { config.backoff_max } else { backoff };
        match timeout(pause, peer.wake.notified()).await {
            // Woken: soon again, but never in a spin.
            Ok(()) => {
                backoff = config.backoff_min;
                sleep(ATTEMPT_PAUSE.saturating_sub(started.elapsed())).await;
            }
            Err(_) => backoff = (backoff * 2).min(config.backoff_max),
        }
    }
}

/// One attempt to connect. True when another soon makes no sense: one side refused the other.
async fn attempt(shared: &Arc<Shared>, peer: &Arc<Peer>, we_dial: bool) -> bool {
    let (config, node) = (&shared.config, peer.node);
    let connected = timeout(config.connect_timeout, shared.dialer.connect(peer.addr())).await;
    let mut socket = match connected {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => {
            tracing::debug!(node, %error, "can't connect to peer");
            shared.attempt_failed(peer, error.kind() == io::ErrorKind::ConnectionRefused);
            return false;
        }
        Err(_) => {
            tracing::debug!(node, "no answer to connecting to peer");
            shared.attempt_failed(peer, false);
            return false;
        }
    };
    let ours = shared.greeting_to(node);
    if !we_dial {
        let knocked = timeout(config.handshake_timeout, hello::knock(&mut socket, &ours)).await;
        tracing::debug!(node, ?knocked, "knocked");
        shared.attempt_failed(peer, false);
        return false;
    }
    let shaken = timeout(
        config.handshake_timeout,
        hello::dial(&mut socket, &ours, &config.registry),
    );
    match shaken.await {
        Ok(Ok((greeting, buffer))) => {
            shared.install(peer, greeting, socket, buffer);
            false
        }
        Ok(Err(error)) => {
            shared.attempt_failed(peer, false);
            handshake_failed(shared, peer, error)
        }
        Err(_) => {
            tracing::debug!(node, "no answer to the handshake");
            shared.attempt_failed(peer, false);
            false
        }
    }
}

/// Tells who has to know. True when one side refused the other.
fn handshake_failed(shared: &Shared, peer: &Peer, error: HandshakeError) -> bool {
    match error {
        HandshakeError::RefusedByPeer { reason, .. } => {
            shared.refused_by(peer, reason);
            true
        }
        HandshakeError::Refused(reason) => {
            let (node, code) = (peer.node, reason.code);
            tracing::warn!(node, ?code, text = reason.text, "refused a peer");
            true
        }
        error => {
            tracing::debug!(node = peer.node, %error, "handshake failed");
            false
        }
    }
}

/// Accepts connections until the link stops. Strangers are bounded in number, bytes and time.
pub(crate) async fn accept_peers(shared: Arc<Shared>, mut listener: Box<dyn Listener>) {
    let places = Arc::new(Semaphore::new(shared.config.max_handshakes));
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let socket = match accepted {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("too many handshakes at once, closed a new connection");
            continue;
        };
        let shared = shared.clone();
        let tasks = shared.tasks.clone();
        tasks.spawn(async move {
            let _place = place;
            let stop = shared.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = greet(&shared, socket) => {}
            }
        });
    }
}

async fn greet(shared: &Arc<Shared>, mut socket: Socket) {
    let config = &shared.config;
    let shaken = hello::accept(
        &mut socket,
        |node| shared.greeting_to(node),
        |node| shared.peer(node).is_some(),
        &config.registry,
    );
    match timeout(config.handshake_timeout, shaken).await {
        Ok(Ok(Accepted::Peer(greeting, buffer))) => {
            if let Some(peer) = shared.peer(greeting.node) {
                shared.install(&peer, greeting, socket, buffer);
            }
        }
        Ok(Ok(Accepted::Knock(greeting))) => {
            let Some(peer) = shared.peer(greeting.node) else {
                return;
            };
            // Another process answers to this id: what we hold leads to one that is gone.
            if let Some(connection) = peer.connection()
                && connection.peer.incarnation != greeting.incarnation
            {
                connection.close(DisconnectReason::Replaced);
            }
            peer.wake.notify_one();
        }
        Ok(Err(HandshakeError::RefusedByPeer { node, reason })) => {
            if let Some(peer) = shared.peer(node) {
                shared.refused_by(&peer, reason);
            }
        }
        Ok(Err(HandshakeError::Refused(reason))) => {
            tracing::warn!(code = ?reason.code, text = reason.text, "refused a peer");
        }
        Ok(Err(HandshakeError::Probe)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "handshake failed"),
        Err(_) => tracing::debug!("handshake took too long"),
    }
}
