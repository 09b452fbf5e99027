//! `quorate server`: from a configuration to a running node, and to its orderly end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use quorate_raft::HostConfig;
use quorate_storage::commit_log::CommitLogConfig;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::broker::queue::QueueLimits;
use crate::broker::{BrokerConfig, WebhookPolicy};
use crate::config::ServerConfig;
use crate::http::{self, HttpState};
use crate::metrics::Metrics;
use crate::node::{Node, NodeConfig};

/// How long handing over leaderships may take at the end.
const HAND_OVER: Duration = Duration::from_secs(3);

/// Runs a node until SIGTERM, SIGINT or a failure it must not go on after.
///
/// # Errors
/// When it could not start or had to stop; the message says why and what to do.
pub fn run(config: ServerConfig) -> Result<()> {
    crate::telemetry::init(&config.telemetry)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(config: ServerConfig) -> Result<()> {
    let bind = |what: &'static str, address| async move {
        let bound = TcpListener::bind(address).await;
        bound.with_context(|| {
            format!("cannot listen on {address} ({what}); is another process using it?")
        })
    };
    let http_listener = bind("http.listen", config.http.listen).await?;
    let peer_listener = bind("peer.listen", config.peer.listen).await?;
    let peer = peer_listener.local_addr()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let metrics = Arc::new(Metrics::new());
    let mut node = Node::start(node_config(&config), peer_listener, metrics.clone()).await?;
    let shutdown = CancellationToken::new();
    let state = HttpState::new(
        node.broker().clone(),
        metrics.clone(),
        &config,
        shutdown.clone(),
    );
    let limits = state.limits.clone();
    let app = http::router(state);
    tracing::info!(node = config.node_id, http = %config.http.listen, peer = %peer, "listening");
    let serving = http::serve(http_listener, app, limits, metrics, shutdown.clone());
    let serving = tokio::spawn(serving);
    let failure = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        reason = node.fatal() => Some(reason),
    };
    if let Some(reason) = failure {
        // The disk or the cluster said no: nothing more may be acknowledged, so nothing is drained.
        bail!("this node stops: {reason}");
    }
    tracing::info!("stopping: leaderships are handed over, requests in flight are finished");
    shutdown.cancel();
    serving.await.context("the HTTP server ended badly")?;
    node.shutdown(HAND_OVER).await?;
    tracing::info!("stopped");
    Ok(())
}

fn node_config(config: &ServerConfig) -> NodeConfig {
    let ms = Duration::from_millis;
    let nodes: Vec<_> = config
        .cluster
        .nodes
        .0
        .iter()
        .map(|n| (n.id, n.peer.clone()))
        .collect();
    let mut host = HostConfig::new(&config.cluster.name, config.node_id, nodes.clone());
    host.lease = ms(config.raft.lease_ms);
    host.election_retry = ms(config.raft.election_retry_ms);
    host.replication_timeout = ms(config.raft.replication_timeout_ms);
    host.ping_interval = ms(config.raft.ping_interval_ms);
    host.silence_timeout = ms(config.raft.silence_timeout_ms);
    host.rebalance_after = ms(config.raft.rebalance_after_ms);
    NodeConfig {
        cluster_name: config.cluster.name.clone(),
        node_id: config.node_id,
        nodes,
        url: config.http.advertise.clone(),
        data_dir: config.data_dir.clone(),
        coordinators: config.cluster.coordinators,
        log: CommitLogConfig {
            segment_bytes: config.log.segment_bytes,
            tail_cache_bytes: config.log.tail_cache_bytes as usize,
            write_batch_bytes: config.log.write_batch_bytes as usize,
            queue_bytes: config.log.queue_bytes as usize,
            async_flush_interval: ms(config.log.async_flush_interval_ms),
            reserve_bytes: config.log.reserve_bytes,
            ..CommitLogConfig::default()
        },
        host,
        queue_limits: QueueLimits {
            max_producers: u32::try_from(config.limits.producers).unwrap_or(u32::MAX),
            max_keys: u32::try_from(config.limits.idempotency_keys).unwrap_or(u32::MAX),
            key_window_ms: config.limits.idempotency_window_ms,
            max_held: u32::try_from(config.limits.held_batches).unwrap_or(u32::MAX),
        },
        checkpoint_every: config.raft.checkpoint_every,
        broker: BrokerConfig {
            write_timeout: ms(config.limits.write_timeout_ms),
            transaction_prepare: ms(config.limits.write_timeout_ms.max(5_000) * 6),
            webhooks: WebhookPolicy {
                allow: config.transactions.webhook_allow.0.clone(),
                secret: config.transactions.webhook_secret.0.clone(),
            },
            retention_check: ms(config.log.retention_check_ms),
            ..BrokerConfig::default()
        },
    }
}
