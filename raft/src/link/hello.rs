//! The handshake: two nodes agree on who they are before any other byte counts.
//!
//! ```text
//! dialer                          acceptor
//!   Hello ───────────────────────▶  checks it
//!   checks it  ◀─────────── Hello
//!   remembers the peer
//!   Accept ──────────────────────▶  remembers the peer
//! ```
//!
//! Either side may send `Refuse` (code u8, text UTF-8) in place of its next step, and closes. A
//! node that may not dial (its id is the higher one) sends `Knock`, which is a hello, and closes.
//!
//! A hello's body: magic (8 bytes `QUORLINK`), protocol version u16 little-endian, then
//! [`Greeting`] in postcard. The first ten bytes stay the same in every version, so that any two
//! versions can tell each other that they don't match.

use std::{io, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

use super::transport::Socket;
use super::wire::{self, Frame, FrameNumber, Header, Kind, WireError};
use super::{LinkConfig, PeerRegistry, RefuseCode, RefuseReason};
use crate::{NodeId, blocking};

const MAGIC: &[u8; 8] = b"QUORLINK";
/// 2: frames behind the handshake are numbered.
const PROTOCOL_VERSION: u16 = 3;
const PREFIX_BYTES: usize = MAGIC.len() + 2;
/// Bound on a frame of the handshake: a stranger makes us hold no more than this.
const FRAME_BYTES_MAX: usize = 4096;

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    pub cluster: String,
    pub cluster_id: Option<Uuid>,
    pub node: NodeId,
    pub uuid: Uuid,
    pub incarnation: u64,
    /// The node this hello is meant for.
    pub to: NodeId,
    /// What a stream's sender may have unconsumed at this node.
    pub stream_window_bytes: u32,
}

impl Greeting {
    pub(crate) fn new(config: &LinkConfig, cluster_id: Option<Uuid>, to: NodeId) -> Greeting {
        Greeting {
            cluster: config.cluster.clone(),
            cluster_id,
            node: config.node_id,
            uuid: config.uuid,
            incarnation: config.incarnation,
            to,
            // `LinkConfig::validate` keeps the window below 2^28.
            stream_window_bytes: config.stream_window_bytes as u32,
        }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut body = BytesMut::with_capacity(128);
        body.put_slice(MAGIC);
        body.put_u16_le(PROTOCOL_VERSION);
        let fields = postcard::to_stdvec(self).unwrap_or_default();
        body.put_slice(&fields);
        body.freeze()
    }

    pub(super) fn decode(body: &[u8]) -> Result<Greeting, HandshakeError> {
        if body.len() < PREFIX_BYTES || &body[..MAGIC.len()] != MAGIC {
            return Err(HandshakeError::NotQuorate);
        }
        let version = u16::from_le_bytes([body[8], body[9]]);
        if version != PROTOCOL_VERSION {
            let text = format!(
                "the peer speaks link protocol version {version}, this node {PROTOCOL_VERSION}: \
                 run versions that are next to each other"
            );
            return Err(HandshakeError::Refused(RefuseReason::new(
                RefuseCode::ProtocolVersion,
                text,
            )));
        }
        postcard::from_bytes(&body[PREFIX_BYTES..]).map_err(|_| HandshakeError::NotQuorate)
    }

    /// Judges a peer's hello against our own; pure. The uuid is the registry's to judge.
    pub(super) fn judge(&self, theirs: &Greeting) -> Result<(), RefuseReason> {
        let refuse = |code, text: String| Err(RefuseReason::new(code, text));
        if theirs.cluster != self.cluster {
            let text = format!(
                "node {} belongs to cluster {:?}, node {} to {:?}",
                self.node, self.cluster, theirs.node, theirs.cluster
            );
            return refuse(RefuseCode::WrongCluster, text);
        }
        if theirs.incarnation == self.incarnation && theirs.uuid == self.uuid {
            let text = format!(
                "node {} reached itself: check the peers' addresses",
                self.node
            );
            return refuse(RefuseCode::SelfConnection, text);
        }
        if theirs.to != self.node {
            let text = format!("this is node {}, not node {}", self.node, theirs.to);
            return refuse(RefuseCode::WrongNodeId, text);
        }
        if let (Some(ours), Some(other)) = (self.cluster_id, theirs.cluster_id)
            && ours != other
        {
            let text = format!(
                "two clusters are named {:?}: node {} belongs to {ours}, node {} to {other}",
                self.cluster, self.node, theirs.node
            );
            return refuse(RefuseCode::WrongClusterId, text);
        }
        Ok(())
    }
}

/// How a handshake fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("this node refused the peer: {0}")]
    Refused(RefuseReason),
    #[error("node {node} refused this node: {reason}")]
    RefusedByPeer { node: NodeId, reason: RefuseReason },
    #[error("the peer does not speak this protocol")]
    NotQuorate,
    #[error("unexpected {0:?} in the handshake")]
    Unexpected(Kind),
    #[error("closed before the first byte")]
    Probe,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What came in on an accepted connection.
#[derive(Debug)]
pub(crate) enum Accepted {
    /// A peer, and what it had sent behind its handshake.
    Peer(Greeting, BytesMut),
    /// A peer that asks to be dialed.
    Knock(Greeting),
}

/// The dialing side. Returns the peer's greeting and what it had sent behind its handshake.
pub(crate) async fn dial(
    socket: &mut Socket,
    ours: &Greeting,
    registry: &Arc<dyn PeerRegistry>,
) -> Result<(Greeting, BytesMut), HandshakeError> {
    let mut buffer = BytesMut::new();
    send(socket, Kind::Hello, ours.encode()).await?;
    let frame = receive(socket, &mut buffer).await?;
    let judged = match frame.header.kind {
        Kind::Hello => judge_hello(&frame.body, ours, Some(ours.to), registry).await,
        Kind::Refuse => return Err(refused_by_peer(ours.to, &frame.body)),
        other => return Err(HandshakeError::Unexpected(other)),
    };
    let theirs = refuse_if_err(socket, judged).await?;
    let remembered = remember(&theirs, registry).await;
    refuse_if_err(socket, remembered).await?;
    send(socket, Kind::Accept, Bytes::new()).await?;
    Ok((theirs, buffer))
}

/// The accepting side. `is_peer` tells the configured peers.
pub(crate) async fn accept(
    socket: &mut Socket,
    ours_to: impl Fn(NodeId) -> Greeting,
    is_peer: impl Fn(NodeId) -> bool,
    registry: &Arc<dyn PeerRegistry>,
) -> Result<Accepted, HandshakeError> {
    let mut buffer = BytesMut::new();
    let frame = receive(socket, &mut buffer).await?;
    let theirs = match frame.header.kind {
        Kind::Hello | Kind::Knock => refuse_if_err(socket, Greeting::decode(&frame.body)).await?,
        other => return Err(HandshakeError::Unexpected(other)),
    };
    let ours = ours_to(theirs.node);
    let judged = judge_stranger(&ours, &theirs, is_peer);
    refuse_if_err(socket, judged.map_err(HandshakeError::Refused)).await?;
    if frame.header.kind == Kind::Knock {
        return Ok(Accepted::Knock(theirs));
    }
    let judged = judge_hello(&frame.body, &ours, None, registry).await;
    let theirs = refuse_if_err(socket, judged).await?;
    send(socket, Kind::Hello, ours.encode()).await?;
    let frame = receive(socket, &mut buffer).await?;
    match frame.header.kind {
        Kind::Accept => {
            let remembered = remember(&theirs, registry).await;
            refuse_if_err(socket, remembered).await?;
            Ok(Accepted::Peer(theirs, buffer))
        }
        Kind::Refuse => Err(refused_by_peer(theirs.node, &frame.body)),
        other => Err(HandshakeError::Unexpected(other)),
    }
}

/// Tells a node that dials us that we are here. Its only answer is to dial.
pub(crate) async fn knock(socket: &mut Socket, ours: &Greeting) -> io::Result<()> {
    send(socket, Kind::Knock, ours.encode()).await?;
    socket.shutdown().await
}

fn judge_stranger(
    ours: &Greeting,
    theirs: &Greeting,
    is_peer: impl Fn(NodeId) -> bool,
) -> Result<(), RefuseReason> {
    ours.judge(theirs)?;
    if !is_peer(theirs.node) {
        let text = format!("node {} does not know a node {}", ours.node, theirs.node);
        return Err(RefuseReason::new(RefuseCode::UnknownNode, text));
    }
    Ok(())
}

async fn judge_hello(
    body: &[u8],
    ours: &Greeting,
    expected: Option<NodeId>,
    registry: &Arc<dyn PeerRegistry>,
) -> Result<Greeting, HandshakeError> {
    let theirs = Greeting::decode(body)?;
    ours.judge(&theirs).map_err(HandshakeError::Refused)?;
    let reason = match expected {
        Some(node) if node != theirs.node => Some((
            RefuseCode::WrongNodeId,
            format!("node {} was dialed and node {} answered", node, theirs.node),
        )),
        None if theirs.node > ours.node => Some((
            RefuseCode::WrongDirection,
            format!(
                "node {} dials node {}, not the reverse",
                ours.node, theirs.node
            ),
        )),
        _ => None,
    };
    if let Some((code, text)) = reason {
        return Err(HandshakeError::Refused(RefuseReason::new(code, text)));
    }
    let (node, uuid) = (theirs.node, theirs.uuid);
    on_blocking_pool(registry, move |registry| registry.check(node, uuid)).await?;
    Ok(theirs)
}

async fn remember(
    theirs: &Greeting,
    registry: &Arc<dyn PeerRegistry>,
) -> Result<(), HandshakeError> {
    let (node, uuid) = (theirs.node, theirs.uuid);
    on_blocking_pool(registry, move |registry| registry.accepted(node, uuid)).await
}

async fn on_blocking_pool(
    registry: &Arc<dyn PeerRegistry>,
    work: impl FnOnce(&dyn PeerRegistry) -> Result<(), RefuseReason> + Send + 'static,
) -> Result<(), HandshakeError> {
    let registry = registry.clone();
    match blocking::on_pool(move || work(&*registry)).await {
        Ok(judged) => judged.map_err(HandshakeError::Refused),
        Err(_) => Err(HandshakeError::Refused(RefuseReason::new(
            RefuseCode::Internal,
            "the identity of peers can't be checked now",
        ))),
    }
}

/// Tells the peer when the reason to fail is one it should hear.
async fn refuse_if_err<T>(
    socket: &mut Socket,
    result: Result<T, HandshakeError>,
) -> Result<T, HandshakeError> {
    if let Err(HandshakeError::Refused(reason)) = &result {
        let mut body = BytesMut::with_capacity(1 + reason.text.len());
        body.put_u8(reason.code as u8);
        body.put_slice(reason.text.as_bytes());
        body.truncate(FRAME_BYTES_MAX - wire::HEADER_BYTES);
        // The refusal stands whether or not the peer hears of it.
        let _ = send(socket, Kind::Refuse, body.freeze()).await;
        let _ = socket.shutdown().await;
    }
    result
}

fn refused_by_peer(node: NodeId, body: &[u8]) -> HandshakeError {
    let code = RefuseCode::from_byte(body.first().copied().unwrap_or(255));
    let text = String::from_utf8_lossy(body.get(1..).unwrap_or_default());
    HandshakeError::RefusedByPeer {
        node,
        reason: RefuseReason::new(code, text),
    }
}

async fn send(socket: &mut Socket, kind: Kind, body: Bytes) -> io::Result<()> {
    let mut bytes = BytesMut::with_capacity(wire::HEADER_BYTES + body.len());
    let parts = std::slice::from_ref(&body);
    wire::encode_header(&Header::of(kind), parts, FrameNumber::HANDSHAKE, &mut bytes);
    bytes.put_slice(&body);
    socket.write_all(&bytes).await
}

async fn receive(socket: &mut Socket, buffer: &mut BytesMut) -> Result<Frame, HandshakeError> {
    loop {
        if let Some(frame) = wire::decode(buffer, FRAME_BYTES_MAX, FrameNumber::HANDSHAKE)? {
            return Ok(frame);
        }
        if socket.read_buf(buffer).await? == 0 {
            let silent = buffer.is_empty();
            return Err(if silent {
                HandshakeError::Probe
            } else {
                HandshakeError::NotQuorate
            });
        }
    }
}
