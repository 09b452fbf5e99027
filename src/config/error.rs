//! What is wrong with a configuration, and what to do about it.

use std::path::PathBuf;

/// One variant per way to be wrong; each message ends with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path}: {source}; check --config", path = path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a valid configuration: {source}", path = path.display())]
    Malformed {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error(
        "{key} is not set; set it with {flag}, {env} or in the configuration file, or start with --dev for one node on its own"
    )]
    Missing {
        key: &'static str,
        flag: &'static str,
        env: &'static str,
    },
    #[error("{key} = {value} is outside {min} to {max}; set it to something in between")]
    OutOfRange {
        key: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("transactions.webhook_allow has {url:?}: {reason}; correct it or take it out")]
    BadWebhook { url: String, reason: String },
    #[error(
        "transactions.webhook_secret has less than 16 characters; what is sent to the URLs of transactions.webhook_allow is signed with it"
    )]
    NoWebhookSecret,
    #[error(
        "{small} = {small_value} must be at least {factor} times {large} = {large_value}; raise {small} or lower {large}"
    )]
    TooSmallAgainst {
        small: &'static str,
        small_value: u64,
        factor: u64,
        large: &'static str,
        large_value: u64,
    },
    #[error(
        "cluster.nodes is empty; list every node as {{id, peer, url}}, this one included, or start with --dev for one node on its own"
    )]
    NoNodes,
    #[error(
        "node_id {node_id} is not in cluster.nodes (which has {known}); add it there or correct node_id"
    )]
    NotInNodes { node_id: u64, known: String },
    #[error("cluster.nodes names {what} {value} twice; give each node its own")]
    DuplicateNode { what: &'static str, value: String },
    #[error("node {id} has the peer address {peer:?}, which is not HOST:PORT")]
    BadPeerAddress { id: u64, peer: String },
    #[error("{key} = {url:?} is not a URL; it must begin with http:// or https:// and name a host")]
    BadUrl { key: String, url: String },
    #[error("cluster.name = {name:?} must be 1 to 120 characters of A-Z a-z 0-9 . _ -")]
    BadClusterName { name: String },
    #[error("node ids begin at 1; change node_id 0")]
    NodeIdZero,
    #[error(
        "telemetry.filter = {filter:?} is not understood: {reason}; example: info,quorate=debug"
    )]
    BadLogFilter { filter: String, reason: String },
}
