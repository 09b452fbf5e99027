//! One multiplexed TCP connection per pair of nodes.
//!
//! The node with the lower id dials, the other accepts; calls, streams and pings of both
//! directions and of all Raft groups share that connection. A writer task gathers frames into few
//! writes, a reader task decodes and hands out, and neither ever waits for what a frame causes: a
//! slow handler, a slow stream reader or a flood of calls costs itself and not the others.
//!
//! The link knows bytes, not meanings: no Raft, no broker. It also reports what the liveness
//! detector needs: when a peer was last heard, and whether its port refuses connections.
//!
//! **Invariants.** A call reported as not sent ([`CallError::nobody_took_it`]) was never written
//! to a socket. The frames of a stream arrive in the order they were sent, without gaps, or the
//! stream ends. At most one connection per peer is in use.
//!
//! The link trusts its network: whoever can reach the port can say it is a peer.
//!
//! | module | part |
//! |---|---|
//! | `wire` | bytes of a frame, decoder |
//! | `hello` | handshake |
//! | `connection` | what one connection's tasks share: calls, streams, closing |
//! | `writer`, `reader`, `service` | the tasks of a connection and their bounds |
//! | `stream` | ordered streams and their windows |
//! | `table`, `peer` | all peers, and one peer's slot with its events |
//! | `dial` | making and accepting connections |
//! | `transport` | the sockets, real or simulated |
//! | `reserved_port` | ports for nodes that are started by tests and by `verify` |

mod config;
mod connection;
mod dial;
mod error;
mod hello;
mod peer;
#[cfg(test)]
pub(crate) mod raw_peer;
mod reader;
mod reserved_port;
mod service;
mod stream;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod transport;
mod wire;
mod writer;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use uuid::Uuid;

use crate::NodeId;

pub use config::{LinkConfig, LinkConfigError, PeerRegistry, TrustAll};
pub use error::{
    CallError, DisconnectReason, NotSent, RefuseCode, RefuseReason, StreamEnd, StreamError,
};
pub use reserved_port::ReservedPort;
pub use stream::LinkStream;
pub use table::LinkTable;
pub use transport::{Dialer, Listener, Network, Socket};
pub use wire::frame_bytes;

/// Call classes from here on belong to this crate's own parts; see [`LinkTable::answer_class`].
pub const RESERVED_CLASSES: u8 = 240;

/// What the owner of a link does with what comes in.
pub trait LinkHandler: Send + Sync + 'static {
    /// Answers one call. Runs on a task of its own; bounded in number per peer and class. A panic
    /// reaches the caller as [`CallError::PeerFailed`]. The future is not dropped when the
    /// connection is lost: it runs to its end.
    fn call(&self, from: NodeId, class: u8, group: u64, body: Bytes) -> BoxFuture<'static, Bytes>;

    /// Serves a stream a peer has opened, on a task of its own. The connection's end ends the
    /// stream, which the future notices as `None` from [`LinkStream::recv`].
    fn stream(
        &self,
        from: NodeId,
        group: u64,
        hello: Bytes,
        stream: LinkStream,
    ) -> BoxFuture<'static, ()>;
}

/// What happens to the connections. A slow subscriber loses the oldest ones; the state itself is
/// at [`LinkTable::connected`] and [`LinkTable::refusal`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    Connected {
        node: NodeId,
        incarnation: u64,
        uuid: Uuid,
    },
    Disconnected {
        node: NodeId,
        reason: DisconnectReason,
    },
    /// The peer refused this node, as it does at every attempt. [`RefuseCode::KnownIdOtherDisk`]
    /// will not go away by itself.
    Refused {
        node: NodeId,
        code: RefuseCode,
        text: String,
    },
}

/// What the link knows of a peer's life right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerView {
    /// There is a connection, and the last byte came in at `heard`.
    Connected { incarnation: u64, heard: Instant },
    /// There was a connection until `since`; `refused` when the latest attempt since then found
    /// the port closed.
    Lost {
        incarnation: u64,
        since: Instant,
        refused: bool,
    },
    /// There was none since this link's start at `since`.
    Never { since: Instant, refused: bool },
}

/// What one peer's connections have carried since this link's start.
#[derive(Debug, Default)]
pub(crate) struct PeerStats {
    pub frames_sent: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub writes: AtomicU64,
    pub frames_received: AtomicU64,
    pub bytes_received: AtomicU64,
    pub calls_refused: AtomicU64,
    pub connections: AtomicU64,
    pub rtt_ns: AtomicU64,
}

/// A reading of one peer's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    pub frames_sent: u64,
    pub bytes_sent: u64,
    /// Writes the operating system was asked for; far below `frames_sent` under load.
    pub writes: u64,
    pub frames_received: u64,
    pub bytes_received: u64,
    /// Calls of the peer that this node refused as overloaded.
    pub calls_refused: u64,
    /// Connections made so far.
    pub connections: u64,
    /// Of the last ping.
    pub round_trip: Duration,
}

impl PeerStats {
    fn read(&self) -> LinkStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LinkStats {
            frames_sent: get(&self.frames_sent),
            bytes_sent: get(&self.bytes_sent),
            writes: get(&self.writes),
            frames_received: get(&self.frames_received),
            bytes_received: get(&self.bytes_received),
            calls_refused: get(&self.calls_refused),
            connections: get(&self.connections),
            round_trip: Duration::from_nanos(get(&self.rtt_ns)),
        }
    }
}
