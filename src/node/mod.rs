//! One node, assembled: disk, links, Raft groups, and the broker over them.
//!
//! The node follows the catalog: see `replicas`. Damage is made good with the others' help: see `mend`.

mod environment;
mod mend;
mod quarantine;
mod replicas;
mod scrub;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use quorate_raft::{
    Flush, GroupSpec, HostConfig, HostStorage, Identity, LogRetention, NodeId, OpenGroupError,
    RaftEvent, RaftHost, Replica, Run,
};
use quorate_storage::StorageError;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::vfs::Vfs;
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use self::environment::Environment;
use self::mend::Mender;
use self::quarantine::Quarantine;
use self::replicas::Replicas;
pub use self::scrub::Scrubbed;
use crate::broker::local::LocalGroups;
use crate::broker::queue::QueueLimits;
use crate::broker::{Broker, BrokerConfig, BrokerParts};
use crate::catalog::{CATALOG_GROUP, CatalogCommand, CatalogMachine, CatalogReply, CatalogState};
use crate::metrics::Metrics;
use crate::peer::BrokerService;

/// Between two attempts to be entered in the catalog.
const RETRY: Duration = Duration::from_millis(50);
/// Between two looks at replicas that a machine's crash made suspect.
const SETTLE_EVERY: Duration = Duration::from_secs(1);
/// The catalog and the coordinators are small: their logs are cut often.
const STATE_CHECKPOINT_EVERY: u64 = 2_000;

/// Of the groups whose state is all that counts.
fn state_checkpoint_every(config: &NodeConfig) -> u64 {
    STATE_CHECKPOINT_EVERY.min(config.checkpoint_every)
}

/// What a node is told at its start.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub cluster_name: String,
    pub node_id: NodeId,
    /// Every node with the address of its peer listener, this one included.
    pub nodes: Vec<(NodeId, String)>,
    /// Where clients reach this node.
    pub url: String,
    pub data_dir: PathBuf,
    pub coordinators: u32,
    pub log: CommitLogConfig,
    pub host: HostConfig,
    pub queue_limits: QueueLimits,
    pub checkpoint_every: u64,
    pub broker: BrokerConfig,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    broker: Arc<Broker>,
    host: Arc<RaftHost>,
    log: CommitLog,
    run: Arc<Run>,
    stop: CancellationToken,
    fatal: mpsc::UnboundedReceiver<String>,
    _lock: Option<File>,
}

impl Node {
    /// Recovers what the disk holds and joins the others. Returns before the cluster is ready.
    ///
    /// # Errors
    /// When the data directory cannot be used; the message says what to do.
    pub async fn start(
        config: NodeConfig,
        peers: TcpListener,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let environment = Environment::of_this_machine(&config.data_dir, peers)?;
        Self::start_in(environment, config, metrics).await
    }

    /// The same on a machine of the caller's choice.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_in(
        environment: Environment,
        config: NodeConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let (dir, vfs) = (&config.data_dir, environment.vfs.clone());
        vfs.create_dir_all(dir)?;
        let run = Arc::new(Run::begin(vfs.clone(), dir, &environment.boot_id)?);
        let (node, cluster) = (config.node_id, &config.cluster_name);
        let identity = Arc::new(Identity::open_in(vfs.clone(), dir, node, cluster)?);
        let quarantine = Quarantine::open(vfs.clone(), dir, config.node_id)?;
        let quarantine = Arc::new(quarantine);
        let log = open_log(&config, &environment, &identity, &quarantine)?;
        tracing::info!(recovery = ?log.recovery(), "commit log recovered");
        let snapshots = Arc::new(SnapshotStore::open(vfs.clone(), &dir.join("snapshots"))?);
        let derived = (environment.open_derived)()?;
        let (fatal_tx, fatal) = mpsc::unbounded_channel();
        let (damage_tx, damage) = mpsc::unbounded_channel();
        log.on_damage(Box::new({
            let (damage, quarantine) = (damage_tx.clone(), quarantine.clone());
            move |group, error| {
                if quarantine.note(group) {
                    damage.send((group, error.to_string())).ok();
                }
            }
        }));
        log.on_poison(Box::new({
            let fatal = fatal_tx.clone();
            move |error| drop(fatal.send(error.to_string()))
        }));
        let service = Arc::new(BrokerService::default());
        let mut host_config = config.host.clone();
        host_config.tails_suspect = run.tails_suspect();
        let storage = HostStorage {
            log: log.clone(),
            snapshots,
            identity: identity.clone(),
        };
        let network = environment.network;
        let host = RaftHost::start(host_config, storage, network, service.clone()).await?;
        let (published, catalog) = watch::channel(Arc::new(CatalogState::default()));
        open_catalog(&config, &host, &quarantine, &published).await?;
        let locals = Arc::new(LocalGroups::default());
        metrics.collect_commit_log(log.clone());
        metrics.collect_disk(dir.clone());
        metrics.collect_raft(&host);
        metrics.collect_held(&locals);
        metrics.collect_damage(config.node_id, catalog.clone());
        let scrubbed: Arc<Scrubbed> = Arc::default();
        metrics.collect_scrub(scrubbed.clone());
        metrics.collect_transactions(locals.clone());
        let broker = Broker::new(BrokerParts {
            host: host.clone(),
            log: log.clone(),
            catalog: catalog.clone(),
            local: locals.clone(),
            config: config.broker.clone(),
            metrics,
        });
        service.connect(&broker);
        let stop = CancellationToken::new();
        let reconcile: Arc<Notify> = Arc::default();
        watch_failures(&host, quarantine.clone(), fatal_tx.clone());
        let replicas = Replicas {
            config: config.clone(),
            vfs,
            host: host.clone(),
            log: log.clone(),
            derived,
            locals: locals.clone(),
            quarantine: quarantine.clone(),
            damage: damage_tx,
            repair: Arc::clone(&reconcile),
        };
        let mender = Mender {
            config: config.clone(),
            host: host.clone(),
            broker: broker.clone(),
            locals,
            quarantine,
            published,
            repair: reconcile,
        };
        tokio::spawn(mender.run(damage, stop.clone(), fatal_tx.clone()));
        tokio::spawn(replicas.follow(catalog.clone(), stop.clone(), fatal_tx.clone()));
        let clean_every = environment.clean_every;
        let clean_every = clean_every.map(|pause| pause.min(config.broker.retention_check));
        let register = register(config, broker.clone(), identity, catalog, fatal_tx);
        tokio::spawn(stop.clone().run_until_cancelled_owned(register));
        if let Some(pause) = clean_every {
            tokio::spawn(clean(log.clone(), pause, stop.clone()));
            tokio::spawn(scrub::run(log.clone(), scrubbed, stop.clone()));
        }
        let (broker_here, stopped) = (broker.clone(), stop.clone());
        tokio::spawn(stopped.run_until_cancelled_owned(async move {
            broker_here.announce_lost_tails().await;
        }));
        let forward = broker.clone().forward_exchanges();
        tokio::spawn(stop.clone().run_until_cancelled_owned(forward));
        let index_keys = broker.clone().index_keys();
        tokio::spawn(stop.clone().run_until_cancelled_owned(index_keys));
        let retention = broker.clone().enforce_retention();
        tokio::spawn(stop.clone().run_until_cancelled_owned(retention));
        let settle = settle_tails(run.clone(), broker.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(settle));
        Ok(Self {
            broker,
            host,
            log,
            run,
            stop,
            fatal,
            _lock: environment.lock,
        })
    }

    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    pub fn host(&self) -> &Arc<RaftHost> {
        &self.host
    }

    pub fn log(&self) -> &CommitLog {
        &self.log
    }

    /// Waits for something this node must not go on after, and says what.
    pub async fn fatal(&mut self) -> String {
        match self.fatal.recv().await {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Hands leaderships over, stops the groups, and leaves a log that needs no repair.
    pub async fn shutdown(self, patience: Duration) -> Result<()> {
        self.stop.cancel();
        self.host.shutdown(patience).await;
        self.log.close()?;
        self.run.end()?;
        Ok(())
    }
}

/// Recovers the log. A damaged one is given up where others can fill this node again.
fn open_log(
    config: &NodeConfig,
    environment: &Environment,
    identity: &Identity,
    quarantine: &Quarantine,
) -> Result<CommitLog> {
    let dir = config.data_dir.join("log");
    if !quarantine.log_is_new() {
        refuse_lost_log(identity, &*environment.vfs, &dir)?;
    }
    let open = || (environment.open_log)(environment.vfs.clone(), &dir, config.log.clone());
    match open() {
        Err(damage @ StorageError::Damaged { .. }) if config.nodes.len() > 2 => {
            quarantine.give_up_log(damage.to_string())?;
            Ok(open()?)
        }
        opened => Ok(opened?),
    }
}

/// Opens this node's replica of the catalog, unless it is lost: see [`Mender`].
async fn open_catalog(
    config: &NodeConfig,
    host: &Arc<RaftHost>,
    quarantine: &Quarantine,
    published: &watch::Sender<Arc<CatalogState>>,
) -> Result<()> {
    if quarantine.lost_catalog().is_some() {
        return Ok(());
    }
    let own = quarantine.catalog_replica();
    let mut replicas = founders(config);
    for replica in replicas.iter_mut().filter(|r| r.node == config.node_id) {
        replica.replica = own;
    }
    let machine = Box::new(CatalogMachine::new(published.clone()));
    let opened = host.open_group(catalog_spec(config, &replicas), machine);
    match opened.await {
        Err(OpenGroupError::Storage(damage @ StorageError::Damaged { .. }))
            if config.nodes.len() > 2 =>
        {
            quarantine.give_up(CATALOG_GROUP, own, &damage.to_string())?;
            Ok(())
        }
        // Its first reads found damage, and told of it.
        Err(_) if quarantine.is_noted(CATALOG_GROUP) => Ok(()),
        opened => opened.map(drop).context("cannot open the catalog"),
    }
}

/// A node that belongs to a cluster and has forgotten its votes and entries would break promises.
fn refuse_lost_log(identity: &Identity, vfs: &dyn Vfs, log_dir: &Path) -> Result<()> {
    let is_empty = vfs.list(log_dir).map_or(true, |files| files.is_empty());
    if identity.cluster_id().is_some() && is_empty {
        bail!(
            "{} is missing or empty, but this node has been part of a cluster: mount or restore it, or let the node come back with an empty data directory under a new node id",
            log_dir.display()
        );
    }
    Ok(())
}

fn watch_failures(
    host: &Arc<RaftHost>,
    quarantine: Arc<Quarantine>,
    fatal: mpsc::UnboundedSender<String>,
) {
    let mut events = host.events();
    let host = Arc::downgrade(host);
    tokio::spawn(async move {
        loop {
            let failed = match events.recv().await {
                Ok(RaftEvent::Refused { node, reason }) => {
                    let reason = format!("node {node} refuses this node: {reason}");
                    fatal.send(reason).ok();
                    continue;
                }
                Ok(RaftEvent::Failed { group, reason }) => vec![(group, reason)],
                Ok(_) => continue,
                // A failure is told once, and may be among the events that were missed.
                Err(broadcast::error::RecvError::Lagged(_)) => match host.upgrade() {
                    Some(host) => host.failures(),
                    None => return,
                },
                Err(broadcast::error::RecvError::Closed) => return,
            };
            for (group, reason) in failed {
                // A read found damage: that replica is given up, and not the node.
                if !quarantine.is_noted(group) {
                    let reason = format!("the replica of {group} failed: {reason}");
                    fatal.send(reason).ok();
                }
            }
        }
    });
}

/// Ends the suspicion that a machine's crash left, once there is no more reason for it.
async fn settle_tails(run: Arc<Run>, broker: Arc<Broker>) {
    while !run.is_settled() {
        tokio::time::sleep(SETTLE_EVERY).await;
        if broker.tails_are_settled()
            && let Err(error) = run.settle()
        {
            tracing::warn!(%error, "the mark of a crashed machine stays");
        }
    }
}

async fn clean(log: CommitLog, pause: Duration, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(pause);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let log = log.clone();
        match quorate_raft::blocking::on_pool(move || log.clean()).await {
            Ok(Ok(report)) => tracing::debug!(?report, "commit log cleaned"),
            Ok(Err(error)) => tracing::warn!(%error, "cleaning the commit log failed"),
            Err(_) => return,
        }
    }
}

/// The first replicas of the catalog have their nodes' ids.
fn founders(config: &NodeConfig) -> Vec<Replica> {
    let replica = |(node, _): &(NodeId, String)| Replica {
        replica: *node,
        node: *node,
    };
    config.nodes.iter().map(replica).collect()
}

fn catalog_spec(config: &NodeConfig, replicas: &[Replica]) -> GroupSpec {
    let nodes = config.nodes.iter().map(|(node, _)| *node);
    GroupSpec {
        group: CATALOG_GROUP,
        founders: founders(config),
        replicas: replicas.to_vec(),
        preferred: nodes.min().unwrap_or(config.node_id),
        flush: Flush::Sync,
        retention: LogRetention::StateOnly,
        checkpoint_every: state_checkpoint_every(config),
    }
}

/// Tells the catalog who this node is, and makes the cluster if nobody has yet.
async fn register(
    config: NodeConfig,
    broker: Arc<Broker>,
    identity: Arc<Identity>,
    mut catalog: watch::Receiver<Arc<CatalogState>>,
    fatal: mpsc::UnboundedSender<String>,
) {
    let bootstrap = CatalogCommand::Bootstrap {
        cluster_id: uuid::Uuid::new_v4().to_string(),
        nodes: config.nodes.clone(),
        coordinators: config.coordinators,
        limits: config.queue_limits,
    };
    let own_address = config
        .nodes
        .iter()
        .find(|(node, _)| *node == config.node_id);
    let register = CatalogCommand::RegisterNode {
        node: config.node_id,
        url: config.url.clone(),
        peer_addr: own_address
            .map(|(_, peer)| peer.clone())
            .unwrap_or_default(),
        uuid: identity.uuid().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut command = &register;
    loop {
        match broker.change_catalog(command).await {
            Ok(CatalogReply::NotReady) => {
                command = &bootstrap;
                continue;
            }
            Ok(CatalogReply::OtherDisk { known }) => {
                let reason = format!(
                    "node {} is known with another data directory (uuid {known}); a node whose data was lost must come back under a new id",
                    config.node_id
                );
                fatal.send(reason).ok();
                return;
            }
            Ok(_) if std::ptr::eq(command, &bootstrap) => {
                command = &register;
                continue;
            }
            Ok(CatalogReply::Invalid(reason)) => {
                fatal
                    .send(format!("the catalog refuses this node: {reason}"))
                    .ok();
                return;
            }
            Ok(_) => break,
            Err(error) => tracing::debug!(%error, "the catalog is not ready for this node yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
    let known = catalog.wait_for(|state| state.cluster_id.is_some()).await;
    let id = known
        .ok()
        .and_then(|state| state.cluster_id.as_ref()?.parse().ok());
    if let Some(id) = id
        && let Err(error) = identity.set_cluster_id(id)
    {
        fatal.send(error.to_string()).ok();
    }
}
