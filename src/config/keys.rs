//! Every table of the configuration, declared once each.

use std::net::{Ipv4Addr, SocketAddr};

use super::nodes::NodeList;
use super::section::section;
use super::webhooks::{Secret, UrlList};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

section! {
    /// Which cluster this is and who belongs to it.
    ClusterConfig, ClusterKeys, "cluster" {
        /// Nodes refuse to talk to nodes of a cluster with another name.
        name: String = "quorate".to_owned(), "cluster-name", "QUORATE_CLUSTER_NAME";
        /// The nodes, this one included: `[{id, peer, url}]` in the file, `ID,PEER,URL;…` elsewhere.
        nodes: NodeList = NodeList::default(), "cluster-nodes", "QUORATE_CLUSTER_NODES";
        /// Raft groups that keep consumer groups' state. Fixed when the cluster first starts.
        coordinators: u32 = 16, "cluster-coordinators", "QUORATE_CLUSTER_COORDINATORS";
    }
}

section! {
    /// The HTTP listener and what bounds it.
    HttpConfig, HttpKeys, "http" {
        /// Address the HTTP API listens on.
        listen: SocketAddr = loopback(8080), "http-listen", "QUORATE_HTTP_LISTEN";
        /// Base URL that clients and other nodes reach this node under; empty: its url in the node list, else http:// and the listen address.
        advertise: String = String::new(), "http-advertise", "QUORATE_HTTP_ADVERTISE";
        /// A larger request is answered 413.
        max_request_bytes: u64 = 16 * MIB, "http-max-request-bytes", "QUORATE_HTTP_MAX_REQUEST_BYTES";
        /// Bytes of request bodies and of fetched answers that may be in memory together; over it 503.
        max_inflight_bytes: u64 = 256 * MIB, "http-max-inflight-bytes", "QUORATE_HTTP_MAX_INFLIGHT_BYTES";
        /// Connections open at once; further ones get 503 and are closed.
        max_connections: u32 = 4096, "http-max-connections", "QUORATE_HTTP_MAX_CONNECTIONS";
        /// A connection whose next request head isn't complete in this time is closed, idle ones too.
        header_timeout_ms: u64 = 30_000, "http-header-timeout-ms", "QUORATE_HTTP_HEADER_TIMEOUT_MS";
        /// Longest pause between two pieces of a request body.
        body_idle_timeout_ms: u64 = 10_000, "http-body-idle-timeout-ms", "QUORATE_HTTP_BODY_IDLE_TIMEOUT_MS";
        /// Longest time for a whole request body.
        body_timeout_ms: u64 = 60_000, "http-body-timeout-ms", "QUORATE_HTTP_BODY_TIMEOUT_MS";
        /// A client that takes nothing of its answer for this long is cut off.
        write_timeout_ms: u64 = 30_000, "http-write-timeout-ms", "QUORATE_HTTP_WRITE_TIMEOUT_MS";
        /// Time that requests in flight get to finish at shutdown.
        shutdown_timeout_ms: u64 = 5_000, "http-shutdown-timeout-ms", "QUORATE_HTTP_SHUTDOWN_TIMEOUT_MS";
    }
}

section! {
    /// The listener for the other nodes.
    PeerConfig, PeerKeys, "peer" {
        /// Address the other nodes connect to. Keep it inside your network: it trusts what reaches it. With dev, where there are no others, any free port of loopback.
        listen: SocketAddr = loopback(7080), "peer-listen", "QUORATE_PEER_LISTEN";
    }
}

section! {
    /// The commit log: the bytes on disk and the memory in front of them.
    LogConfig, LogKeys, "log" {
        /// Size of a segment file, allocated when it is begun.
        segment_bytes: u64 = 256 * MIB, "log-segment-bytes", "QUORATE_LOG_SEGMENT_BYTES";
        /// Newest entries kept in memory for replication and readers at the end.
        tail_cache_bytes: u64 = 64 * MIB, "log-tail-cache-bytes", "QUORATE_LOG_TAIL_CACHE_BYTES";
        /// Writes are refused (`disk_full`) while less space than this is free.
        reserve_bytes: u64 = 512 * MIB, "log-reserve-bytes", "QUORATE_LOG_RESERVE_BYTES";
        /// Bytes waiting for the disk before new writes get 503.
        queue_bytes: u64 = 128 * MIB, "log-queue-bytes", "QUORATE_LOG_QUEUE_BYTES";
        /// Most bytes that one write and its fsync take together.
        write_batch_bytes: u64 = 8 * MIB, "log-write-batch-bytes", "QUORATE_LOG_WRITE_BATCH_BYTES";
        /// Longest time an `async` topic's write waits for its fsync.
        async_flush_interval_ms: u64 = 500, "log-async-flush-interval-ms", "QUORATE_LOG_ASYNC_FLUSH_INTERVAL_MS";
        /// Pause between two looks for messages that their topic's retention keeps no longer.
        retention_check_ms: u64 = 30_000, "log-retention-check-ms", "QUORATE_LOG_RETENTION_CHECK_MS";
    }
}

section! {
    /// Elections, liveness and checkpoints.
    RaftConfig, RaftKeys, "raft" {
        /// Half of the time for which a follower that has heard its leader elects no other, unless a majority agrees that the leader's node is gone.
        lease_ms: u64 = 1_500, "raft-lease-ms", "QUORATE_RAFT_LEASE_MS";
        /// Pause between two candidates of a queue without a leader.
        election_retry_ms: u64 = 250, "raft-election-retry-ms", "QUORATE_RAFT_ELECTION_RETRY_MS";
        /// A replication request without an answer for this long is sent anew.
        replication_timeout_ms: u64 = 1_000, "raft-replication-timeout-ms", "QUORATE_RAFT_REPLICATION_TIMEOUT_MS";
        /// Pause between the pings of two nodes.
        ping_interval_ms: u64 = 100, "raft-ping-interval-ms", "QUORATE_RAFT_PING_INTERVAL_MS";
        /// A node silent for this long is suspected; its queues elect other leaders once a majority agrees.
        silence_timeout_ms: u64 = 600, "raft-silence-timeout-ms", "QUORATE_RAFT_SILENCE_TIMEOUT_MS";
        /// How long a node must have been up before it gets its leaderships back.
        rebalance_after_ms: u64 = 5_000, "raft-rebalance-after-ms", "QUORATE_RAFT_REBALANCE_AFTER_MS";
        /// Entries of a group between two checkpoints of its state.
        checkpoint_every: u64 = 10_000, "raft-checkpoint-every", "QUORATE_RAFT_CHECKPOINT_EVERY";
    }
}

section! {
    /// Bounds on what clients may ask the cluster to keep.
    LimitsConfig, LimitsKeys, "limits" {
        /// No topic may allow larger messages.
        max_message_bytes: u64 = 8 * MIB, "limits-max-message-bytes", "QUORATE_LIMITS_MAX_MESSAGE_BYTES";
        /// How long a queue remembers an Idempotency-Key. Fixed when the cluster first starts.
        idempotency_window_ms: u64 = 600_000, "limits-idempotency-window-ms", "QUORATE_LIMITS_IDEMPOTENCY_WINDOW_MS";
        /// Idempotency keys a queue remembers at once; further ones get 429. Fixed when the cluster first starts.
        idempotency_keys: u64 = 64 * KIB, "limits-idempotency-keys", "QUORATE_LIMITS_IDEMPOTENCY_KEYS";
        /// Delayed messages and parts of open transactions a queue holds at once; further ones get 429. Fixed when the cluster first starts.
        held_batches: u64 = 2_000_000, "limits-held-batches", "QUORATE_LIMITS_HELD_BATCHES";
        /// Producers a queue remembers at once; a further one gets 429 until one has been quiet long enough. Fixed when the cluster first starts.
        producers: u64 = 16 * KIB, "limits-producers", "QUORATE_LIMITS_PRODUCERS";
        /// A write that nobody has confirmed after this time is answered 504 with outcome unknown.
        write_timeout_ms: u64 = 5_000, "limits-write-timeout-ms", "QUORATE_LIMITS_WRITE_TIMEOUT_MS";
        /// Messages a second that one client address may send to this node; over it 429. 0: any number.
        client_messages_per_s: u64 = 0, "limits-client-messages-per-s", "QUORATE_LIMITS_CLIENT_MESSAGES_PER_S";
        /// The same in bytes of keys, values, tags and headers.
        client_bytes_per_s: u64 = 0, "limits-client-bytes-per-s", "QUORATE_LIMITS_CLIENT_BYTES_PER_S";
    }
}

section! {
    /// Checks of transactions that nobody ends.
    TransactionsConfig, TransactionsKeys, "transactions" {
        /// What a transaction's check_url may begin with: `["http://host:port/path"]` in the file, with commas elsewhere; empty: none is called.
        webhook_allow: UrlList = UrlList::default(), "transactions-webhook-allow", "QUORATE_TRANSACTIONS_WEBHOOK_ALLOW";
        /// Signs what is sent to a check_url; needed with webhook_allow, the same on every node.
        webhook_secret: Secret = Secret::default(), "transactions-webhook-secret", "QUORATE_TRANSACTIONS_WEBHOOK_SECRET";
    }
}

section! {
    /// What the node writes to stderr.
    TelemetryConfig, TelemetryKeys, "telemetry" {
        /// What is logged, in the form of tracing's EnvFilter: `info`, `info,quorate=debug`.
        filter: String = "info,openraft=warn".to_owned(), "telemetry-filter", "QUORATE_TELEMETRY_FILTER";
        /// `text` for people, `json` for machines.
        format: LogFormat = LogFormat::Text, "telemetry-format", "QUORATE_TELEMETRY_FORMAT";
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    Text,
    Json,
}

impl std::fmt::Display for LogFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}
