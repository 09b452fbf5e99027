//! The relations between keys that must hold before a node starts.

use std::collections::HashSet;

use tracing_subscriber::EnvFilter;

use super::{ConfigError, ServerConfig};
use crate::names::is_valid_name;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn in_range(key: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange {
            key,
            value,
            min,
            max,
        })
    }
}

/// `small` must be at least `factor` times `large`; the names say which one is usually at fault.
fn at_least(
    small: (&'static str, u64),
    factor: u64,
    large: (&'static str, u64),
) -> Result<(), ConfigError> {
    if small.1 >= large.1.saturating_mul(factor) {
        Ok(())
    } else {
        Err(ConfigError::TooSmallAgainst {
            small: small.0,
            small_value: small.1,
            factor,
            large: large.0,
            large_value: large.1,
        })
    }
}

fn check_url(key: String, url: &str) -> Result<(), ConfigError> {
    let host = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"));
    match host {
        Some(host) if !host.is_empty() && !host.starts_with(['/', ':']) => Ok(()),
        _ => Err(ConfigError::BadUrl {
            key,
            url: url.to_owned(),
        }),
    }
}

impl ServerConfig {
    /// Checks every key and every relation between keys; the message says what to do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_nodes()?;
        self.validate_http()?;
        self.validate_log()?;
        self.validate_raft()?;
        in_range(
            "limits.idempotency_window_ms",
            self.limits.idempotency_window_ms,
            1_000,
            86_400_000,
        )?;
        in_range(
            "limits.idempotency_keys",
            self.limits.idempotency_keys,
            1,
            10_000_000,
        )?;
        in_range(
            "limits.held_batches",
            self.limits.held_batches,
            1,
            10_000_000,
        )?;
        in_range("limits.producers", self.limits.producers, 1, 1_000_000)?;
        in_range(
            "limits.write_timeout_ms",
            self.limits.write_timeout_ms,
            100,
            600_000,
        )?;
        EnvFilter::try_new(&self.telemetry.filter).map_err(|reason| ConfigError::BadLogFilter {
            filter: self.telemetry.filter.clone(),
            reason: reason.to_string(),
        })?;
        Ok(())
    }

    fn validate_nodes(&self) -> Result<(), ConfigError> {
        if !is_valid_name(&self.cluster.name) {
            return Err(ConfigError::BadClusterName {
                name: self.cluster.name.clone(),
            });
        }
        in_range(
            "cluster.coordinators",
            u64::from(self.cluster.coordinators),
            1,
            256,
        )?;
        let nodes = &self.cluster.nodes.0;
        if nodes.is_empty() {
            return Err(ConfigError::NoNodes);
        }
        if self.node_id == 0 || nodes.iter().any(|node| node.id == 0) {
            return Err(ConfigError::NodeIdZero);
        }
        let (mut ids, mut peers) = (HashSet::new(), HashSet::new());
        for node in nodes {
            if !ids.insert(node.id) {
                return Err(ConfigError::DuplicateNode {
                    what: "id",
                    value: node.id.to_string(),
                });
            }
            if !peers.insert(&node.peer) {
                return Err(ConfigError::DuplicateNode {
                    what: "peer",
                    value: node.peer.clone(),
                });
            }
            let port = node
                .peer
                .rsplit_once(':')
                .filter(|(host, _)| !host.is_empty());
            if port
                .and_then(|(_, port)| port.parse::<u16>().ok())
                .is_none()
            {
                return Err(ConfigError::BadPeerAddress {
                    id: node.id,
                    peer: node.peer.clone(),
                });
            }
            check_url(format!("url of node {}", node.id), &node.url)?;
        }
        if !ids.contains(&self.node_id) {
            let known: Vec<String> = nodes.iter().map(|node| node.id.to_string()).collect();
            return Err(ConfigError::NotInNodes {
                node_id: self.node_id,
                known: known.join(", "),
            });
        }
        check_url("http.advertise".to_owned(), &self.http.advertise)
    }

    fn validate_http(&self) -> Result<(), ConfigError> {
        let http = &self.http;
        // Above this a u32 count of semaphore permits, one a byte, would not do.
        in_range(
            "http.max_inflight_bytes",
            http.max_inflight_bytes,
            MIB,
            u64::from(u32::MAX),
        )?;
        // A request becomes at most one entry for each queue, which has to fit into a frame between
        // nodes (64 MiB) with what belongs to it.
        let request_max = 48 * MIB;
        in_range(
            "http.max_request_bytes",
            http.max_request_bytes,
            1024,
            request_max,
        )?;
        in_range(
            "http.max_connections",
            u64::from(http.max_connections),
            1,
            1_000_000,
        )?;
        for (key, value) in [
            ("http.header_timeout_ms", http.header_timeout_ms),
            ("http.body_idle_timeout_ms", http.body_idle_timeout_ms),
            ("http.body_timeout_ms", http.body_timeout_ms),
            ("http.write_timeout_ms", http.write_timeout_ms),
        ] {
            in_range(key, value, 1, 3_600_000)?;
        }
        in_range(
            "http.shutdown_timeout_ms",
            http.shutdown_timeout_ms,
            0,
            600_000,
        )?;
        let request = ("http.max_request_bytes", http.max_request_bytes);
        at_least(
            ("http.max_inflight_bytes", http.max_inflight_bytes),
            1,
            request,
        )?;
        in_range(
            "limits.max_message_bytes",
            self.limits.max_message_bytes,
            1024,
            GIB,
        )?;
        at_least(
            request,
            1,
            ("limits.max_message_bytes", self.limits.max_message_bytes),
        )
    }

    fn validate_log(&self) -> Result<(), ConfigError> {
        let log = &self.log;
        in_range("log.segment_bytes", log.segment_bytes, MIB, 4 * GIB)?;
        in_range("log.tail_cache_bytes", log.tail_cache_bytes, 0, 1024 * GIB)?;
        in_range("log.reserve_bytes", log.reserve_bytes, 0, 1024 * 1024 * GIB)?;
        in_range("log.write_batch_bytes", log.write_batch_bytes, 4096, GIB)?;
        in_range(
            "log.async_flush_interval_ms",
            log.async_flush_interval_ms,
            1,
            60_000,
        )?;
        in_range(
            "log.retention_check_ms",
            log.retention_check_ms,
            10,
            86_400_000,
        )?;
        let message = ("limits.max_message_bytes", self.limits.max_message_bytes);
        let request = ("http.max_request_bytes", self.http.max_request_bytes);
        at_least(("log.segment_bytes", log.segment_bytes), 2, request)?;
        at_least(("log.queue_bytes", log.queue_bytes), 2, message)
    }

    fn validate_raft(&self) -> Result<(), ConfigError> {
        let raft = &self.raft;
        in_range("raft.lease_ms", raft.lease_ms, 100, 600_000)?;
        in_range("raft.election_retry_ms", raft.election_retry_ms, 50, 60_000)?;
        in_range(
            "raft.replication_timeout_ms",
            raft.replication_timeout_ms,
            50,
            60_000,
        )?;
        in_range(
            "raft.rebalance_after_ms",
            raft.rebalance_after_ms,
            0,
            86_400_000,
        )?;
        in_range("raft.ping_interval_ms", raft.ping_interval_ms, 10, 60_000)?;
        in_range(
            "raft.checkpoint_every",
            raft.checkpoint_every,
            10,
            100_000_000,
        )?;
        let silence = ("raft.silence_timeout_ms", raft.silence_timeout_ms);
        at_least(silence, 3, ("raft.ping_interval_ms", raft.ping_interval_ms))
    }
}
