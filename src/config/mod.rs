//! The server's configuration: one struct, loaded once, checked before anything starts.
//!
//! Each key can come from a flag, the environment (`QUORATE_…`), the file or its default, in this
//! order. A key nobody knows is an error that names it: an option is never silently ignored.

mod error;
mod keys;
mod nodes;
mod section;
#[cfg(test)]
mod tests;
mod validate;
mod webhooks;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use quorate_raft::NodeId;
use serde::Deserialize;

pub use error::ConfigError;
pub use keys::{
    ClusterConfig, ClusterKeys, HttpConfig, HttpKeys, LimitsConfig, LimitsKeys, LogConfig,
    LogFormat, LogKeys, PeerConfig, PeerKeys, RaftConfig, RaftKeys, TelemetryConfig, TelemetryKeys,
    TransactionsConfig, TransactionsKeys,
};
pub use nodes::{NodeList, NodeSpec};
pub use section::KeyDoc;
pub use webhooks::{Secret, UrlList};

/// Where `--dev` keeps its data when no directory is given.
pub const DEV_DATA_DIR: &str = ".quorate/dev";

/// What one source (flags and environment, or the file) says; everything is optional.
#[derive(Debug, Clone, Default, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerArgs {
    /// Configuration file (TOML).
    #[arg(long, env = "QUORATE_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// One node on its own, ready without any configuration.
    #[arg(long, env = "QUORATE_DEV", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub dev: Option<bool>,
    /// This node's number in the node list.
    #[arg(long, env = "QUORATE_NODE_ID", value_name = "ID")]
    pub node_id: Option<NodeId>,
    /// Directory of everything this node keeps.
    #[arg(long, env = "QUORATE_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    #[command(flatten)]
    pub cluster: ClusterKeys,
    #[command(flatten)]
    pub http: HttpKeys,
    #[command(flatten)]
    pub peer: PeerKeys,
    #[command(flatten)]
    pub log: LogKeys,
    #[command(flatten)]
    pub raft: RaftKeys,
    #[command(flatten)]
    pub limits: LimitsKeys,
    #[command(flatten)]
    pub transactions: TransactionsKeys,
    #[command(flatten)]
    pub telemetry: TelemetryKeys,
}

impl ServerArgs {
    fn over(self, below: Self) -> Self {
        Self {
            config: self.config,
            dev: self.dev.or(below.dev),
            node_id: self.node_id.or(below.node_id),
            data_dir: self.data_dir.or(below.data_dir),
            cluster: self.cluster.over(below.cluster),
            http: self.http.over(below.http),
            peer: self.peer.over(below.peer),
            log: self.log.over(below.log),
            raft: self.raft.over(below.raft),
            limits: self.limits.over(below.limits),
            transactions: self.transactions.over(below.transactions),
            telemetry: self.telemetry.over(below.telemetry),
        }
    }
}

/// Everything a node needs to know to start.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerConfig {
    pub dev: bool,
    pub node_id: NodeId,
    pub data_dir: PathBuf,
    pub cluster: ClusterConfig,
    pub http: HttpConfig,
    pub peer: PeerConfig,
    pub log: LogConfig,
    pub raft: RaftConfig,
    pub limits: LimitsConfig,
    pub transactions: TransactionsConfig,
    pub telemetry: TelemetryConfig,
}

impl ServerConfig {
    /// Flags and environment over the file they name over the defaults, checked.
    pub fn load(args: ServerArgs) -> Result<Self, ConfigError> {
        let file = match &args.config {
            Some(path) => Self::read_file(path)?,
            None => ServerArgs::default(),
        };
        let config = Self::resolve(args.over(file))?;
        config.validate()?;
        Ok(config)
    }

    /// One node on its own with its data in `dir`.
    pub fn dev(dir: &Path) -> Self {
        let mut config = Self {
            dev: true,
            node_id: 1,
            data_dir: dir.to_owned(),
            cluster: ClusterConfig::default(),
            http: HttpConfig::default(),
            peer: PeerConfig::default(),
            log: LogConfig::default(),
            raft: RaftConfig::default(),
            limits: LimitsConfig::default(),
            transactions: TransactionsConfig::default(),
            telemetry: TelemetryConfig::default(),
        };
        config.complete();
        config
    }

    /// Replicas of a topic that doesn't say: three, or all nodes where there are fewer.
    pub fn default_replicas(&self) -> u32 {
        u32::try_from(self.cluster.nodes.0.len()).map_or(3, |nodes| nodes.clamp(1, 3))
    }

    /// The rows of the configuration's reference.
    pub fn key_docs() -> Vec<KeyDoc> {
        let top = |key: &str, flag, env, default: &str, doc: &str| KeyDoc {
            key: key.to_owned(),
            flag,
            env,
            default: default.to_owned(),
            doc: doc.to_owned(),
        };
        let mut rows = vec![
            top(
                "dev",
                "--dev",
                "QUORATE_DEV",
                "false",
                "One node on its own, ready without any configuration.",
            ),
            top(
                "node_id",
                "--node-id",
                "QUORATE_NODE_ID",
                "",
                "This node's number in the node list.",
            ),
            top(
                "data_dir",
                "--data-dir",
                "QUORATE_DATA_DIR",
                "",
                "Directory of everything this node keeps.",
            ),
        ];
        rows.extend(ClusterConfig::key_docs());
        rows.extend(HttpConfig::key_docs());
        rows.extend(PeerConfig::key_docs());
        rows.extend(LogConfig::key_docs());
        rows.extend(RaftConfig::key_docs());
        rows.extend(LimitsConfig::key_docs());
        rows.extend(TransactionsConfig::key_docs());
        rows.extend(TelemetryConfig::key_docs());
        rows
    }

    fn read_file(path: &Path) -> Result<ServerArgs, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::Malformed {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    fn resolve(args: ServerArgs) -> Result<Self, ConfigError> {
        let dev = args.dev.unwrap_or(false);
        let missing = |key, flag, env| ConfigError::Missing { key, flag, env };
        let node_id = match args.node_id {
            Some(id) => id,
            None if dev => 1,
            None => return Err(missing("node_id", "--node-id", "QUORATE_NODE_ID")),
        };
        let data_dir = match args.data_dir {
            Some(dir) => dir,
            None if dev => PathBuf::from(DEV_DATA_DIR),
            None => return Err(missing("data_dir", "--data-dir", "QUORATE_DATA_DIR")),
        };
        // Nobody connects to a node that is alone: any free port will do.
        let alone = dev && args.cluster.nodes.is_none();
        let peer = match alone {
            true => PeerConfig {
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            },
            false => PeerConfig::default(),
        };
        let mut config = Self {
            dev,
            node_id,
            data_dir,
            cluster: args.cluster.resolve(ClusterConfig::default()),
            http: args.http.resolve(HttpConfig::default()),
            peer: args.peer.resolve(peer),
            log: args.log.resolve(LogConfig::default()),
            raft: args.raft.resolve(RaftConfig::default()),
            limits: args.limits.resolve(LimitsConfig::default()),
            transactions: args.transactions.resolve(TransactionsConfig::default()),
            telemetry: args.telemetry.resolve(TelemetryConfig::default()),
        };
        config.complete();
        Ok(config)
    }

    /// Fills what follows from other keys: the advertised URL, and the node list of a dev server.
    fn complete(&mut self) {
        if self.http.advertise.is_empty() {
            self.http.advertise = match self.cluster.nodes.get(self.node_id) {
                Some(node) => node.url.clone(),
                None => format!("http://{}", self.http.listen),
            };
        }
        if self.dev && self.cluster.nodes.0.is_empty() {
            self.cluster.nodes.0.push(NodeSpec {
                id: self.node_id,
                peer: self.peer.listen.to_string(),
                url: self.http.advertise.clone(),
            });
        }
    }
}
