//! What a link is told at its start.

use std::{fmt, sync::Arc, time::Duration};

use uuid::Uuid;

use super::RefuseReason;
use crate::NodeId;

/// Who this node is, whom it talks to, and every bound of the link.
#[derive(Clone)]
pub struct LinkConfig {
    /// Only nodes that name the same cluster are accepted.
    pub cluster: String,
    /// The cluster's identity, once known. Two nodes that both know it must agree on it.
    pub cluster_id: Option<Uuid>,
    pub node_id: NodeId,
    /// Of this node's disk: written at its first start.
    pub uuid: Uuid,
    /// Random, of this process.
    pub incarnation: u64,
    /// The other nodes and where they listen (`host:port`). An entry for this node is ignored.
    pub peers: Vec<(NodeId, String)>,
    /// Judges and remembers the uuids peers show.
    pub registry: Arc<dyn PeerRegistry>,
    /// Between two pings on a connection.
    pub ping_interval: Duration,
    /// Without a byte for so long, a peer is suspect.
    pub silence_timeout: Duration,
    /// Without a byte for so long, the connection is closed and made anew: TCP's own retries
    /// back off so far that a healed network would go unnoticed for long.
    pub drop_silent_after: Duration,
    /// Bound on making a TCP connection, name resolution included.
    pub connect_timeout: Duration,
    /// Bound on the whole handshake.
    pub handshake_timeout: Duration,
    /// Wait after the first failed attempt to connect; doubles up to `backoff_max`.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// Bound on one frame with its header.
    pub max_frame_bytes: usize,
    /// Bound on the bytes of calls that wait to be written to one peer.
    pub max_queued_call_bytes: usize,
    /// Calls of these classes, if they are small, and the answers to them go ahead of all others.
    pub urgent_classes: &'static [u8],
    /// What a stream's sender may send before this node's reader has consumed it.
    pub stream_window_bytes: usize,
    /// Bound on the streams of one connection.
    pub max_streams: usize,
    /// Bound on the calls of one class from one peer that are in service here.
    pub max_calls_in_service: usize,
    /// Bound on the bytes of those calls.
    pub max_call_bytes_in_service: usize,
    /// Bound on accepted connections that have not finished their handshake.
    pub max_handshakes: usize,
}

impl LinkConfig {
    /// The defaults, a random incarnation, and a registry that trusts every uuid.
    pub fn new(
        cluster: impl Into<String>,
        node_id: NodeId,
        uuid: Uuid,
        peers: Vec<(NodeId, String)>,
    ) -> LinkConfig {
        LinkConfig {
            cluster: cluster.into(),
            cluster_id: None,
            node_id,
            uuid,
            incarnation: rand::random(),
            peers,
            registry: Arc::new(TrustAll),
            ping_interval: Duration::from_millis(100),
            silence_timeout: Duration::from_millis(600),
            drop_silent_after: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(1),
            handshake_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(1),
            max_frame_bytes: 64 << 20,
            max_queued_call_bytes: 64 << 20,
            urgent_classes: &[],
            stream_window_bytes: 8 << 20,
            max_streams: 100_000,
            max_calls_in_service: 4096,
            max_call_bytes_in_service: 256 << 20,
            max_handshakes: 64,
        }
    }

    /// Says which relation between the options is broken.
    pub fn validate(&self) -> Result<(), LinkConfigError> {
        use LinkConfigError::*;
        if self.cluster.is_empty() || self.cluster.len() > 255 {
            return Err(ClusterName);
        }
        if self.ping_interval.is_zero() || self.ping_interval * 2 > self.silence_timeout {
            return Err(PingInterval);
        }
        if self.drop_silent_after < self.silence_timeout {
            return Err(DropSilentAfter);
        }
        if self.backoff_min.is_zero() || self.backoff_min > self.backoff_max {
            return Err(Backoff);
        }
        if !(4096..=1 << 30).contains(&self.max_frame_bytes) {
            return Err(MaxFrameBytes);
        }
        if !(4096..=1 << 28).contains(&self.stream_window_bytes) {
            return Err(StreamWindow);
        }
        if !(4096..=1 << 30).contains(&self.max_queued_call_bytes) {
            return Err(QueuedCallBytes);
        }
        Ok(())
    }
}

impl fmt::Debug for LinkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkConfig")
            .field("cluster", &self.cluster)
            .field("node_id", &self.node_id)
            .field("uuid", &self.uuid)
            .field("incarnation", &self.incarnation)
            .field("peers", &self.peers)
            .finish_non_exhaustive()
    }
}

/// A broken relation between options of [`LinkConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkConfigError {
    #[error("cluster must have 1 to 255 bytes")]
    ClusterName,
    #[error("ping_interval must be above zero and at most half of silence_timeout")]
    PingInterval,
    #[error("drop_silent_after must be at least silence_timeout")]
    DropSilentAfter,
    #[error("backoff_min must be above zero and at most backoff_max")]
    Backoff,
    #[error("max_frame_bytes must lie between 4 KiB and 1 GiB")]
    MaxFrameBytes,
    #[error("stream_window_bytes must lie between 4 KiB and 256 MiB")]
    StreamWindow,
    #[error("max_queued_call_bytes must lie between 4 KiB and 1 GiB")]
    QueuedCallBytes,
}

/// Judges the uuids that peers show in the handshake. Called on the blocking pool: it may write
/// and fsync.
pub trait PeerRegistry: Send + Sync + 'static {
    /// Whether this node may be who it says. Changes nothing.
    fn check(&self, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason>;

    /// Both sides have accepted each other. Returns when the peer's uuid is remembered for good;
    /// an error refuses the connection.
    fn accepted(&self, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason>;
}

/// Accepts every uuid and remembers none: for tests and tools without a data directory.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrustAll;

impl PeerRegistry for TrustAll {
    fn check(&self, _node: NodeId, _uuid: Uuid) -> Result<(), RefuseReason> {
        Ok(())
    }

    fn accepted(&self, _node: NodeId, _uuid: Uuid) -> Result<(), RefuseReason> {
        Ok(())
    }
}
