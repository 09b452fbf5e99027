//! One node, assembled: disk, links, Raft groups, and the broker over them.
//!
//! The node follows the catalog: whenever it changes, the groups that have a replica here are
//! opened and those of deleted topics are removed, files and all.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use quorate_raft::{
    Flush, GroupSpec, HostConfig, HostStorage, Identity, LogRetention, NodeId, RaftEvent, RaftHost,
    Replica, Run, StateMachine,
};
use quorate_storage::RaftGroupId;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::queue_index::QueueIndex;
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;
use rustix::fs::{FlockOperation, flock};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::broker::local::{LocalCoordinator, LocalGroups, LocalQueue};
use crate::broker::queue::{QueueLimits, QueueMachine, QueueShared};
use crate::broker::{Broker, BrokerConfig, BrokerParts, FlushMode};
use crate::catalog::{
    CATALOG_GROUP, CatalogCommand, CatalogMachine, CatalogReply, CatalogState, GroupPlacement,
};
use crate::coordinator::CoordinatorMachine;
use crate::metrics::Metrics;
use crate::peer::BrokerService;

/// Between two attempts to be entered in the catalog.
const RETRY: Duration = Duration::from_millis(50);
/// Between two looks for segments that nothing needs any more.
const CLEAN_EVERY: Duration = Duration::from_secs(30);
/// The catalog and the coordinators are small: their logs are cut often.
const STATE_CHECKPOINT_EVERY: u64 = 2_000;

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
    run: Run,
    stop: CancellationToken,
    fatal: mpsc::UnboundedReceiver<String>,
    _lock: File,
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
        let dir = &config.data_dir;
        fs::create_dir_all(dir)
            .with_context(|| format!("cannot create the data directory {}", dir.display()))?;
        let lock = lock_directory(dir)?;
        let vfs: Arc<dyn Vfs> = Arc::new(OsVfs);
        let run = Run::begin(vfs.clone(), dir)?;
        let identity = Arc::new(Identity::open(dir, config.node_id, &config.cluster_name)?);
        let log = CommitLog::open(vfs.clone(), &dir.join("log"), config.log.clone())?;
        tracing::info!(recovery = ?log.recovery(), "commit log recovered");
        let snapshots = Arc::new(SnapshotStore::open(vfs.clone(), &dir.join("snapshots"))?);
        let (fatal_tx, fatal) = mpsc::unbounded_channel();
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
        let host = RaftHost::start(host_config, storage, peers, service.clone()).await?;
        watch_refusals(host.events(), fatal_tx.clone());

        let (published, catalog) = watch::channel(Arc::new(CatalogState::default()));
        host.open_group(
            catalog_spec(&config),
            Box::new(CatalogMachine::new(published)),
        )
        .await?;
        let locals = Arc::new(LocalGroups::default());
        metrics.collect_commit_log(log.clone());
        metrics.collect_disk(dir.clone());
        metrics.collect_raft(&host);
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
        let opener = Opener {
            config: config.clone(),
            vfs,
            host: host.clone(),
            log: log.clone(),
            locals,
        };
        tokio::spawn(opener.follow(catalog.clone(), stop.clone(), fatal_tx.clone()));
        let register = register(config, broker.clone(), identity, catalog, fatal_tx);
        tokio::spawn(stop.clone().run_until_cancelled_owned(register));
        tokio::spawn(clean(log.clone(), stop.clone()));
        Ok(Self {
            broker,
            host,
            log,
            run,
            stop,
            fatal,
            _lock: lock,
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

/// Two processes on one directory would destroy it.
fn lock_directory(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "the data directory {} is in use by another process; stop it, or give this node a directory of its own",
            dir.display()
        );
    }
    Ok(file)
}

fn watch_refusals(
    mut events: broadcast::Receiver<RaftEvent>,
    fatal: mpsc::UnboundedSender<String>,
) {
    tokio::spawn(async move {
        loop {
            match events.recv().await {
                Ok(RaftEvent::Refused { node, reason }) => {
                    fatal
                        .send(format!("node {node} refuses this node: {reason}"))
                        .ok();
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
}

async fn clean(log: CommitLog, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(CLEAN_EVERY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let log = log.clone();
        match tokio::task::spawn_blocking(move || log.clean()).await {
            Ok(Ok(report)) => tracing::debug!(?report, "commit log cleaned"),
            Ok(Err(error)) => tracing::warn!(%error, "cleaning the commit log failed"),
            Err(_) => return,
        }
    }
}

fn catalog_spec(config: &NodeConfig) -> GroupSpec {
    let replica = |(node, _): &(NodeId, String)| Replica {
        replica: *node,
        node: *node,
    };
    GroupSpec {
        group: CATALOG_GROUP,
        replicas: config.nodes.iter().map(replica).collect(),
        preferred: config
            .nodes
            .iter()
            .map(|(node, _)| *node)
            .min()
            .unwrap_or(config.node_id),
        flush: Flush::Sync,
        retention: LogRetention::StateOnly,
        checkpoint_every: STATE_CHECKPOINT_EVERY,
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

/// Opens and removes groups as the catalog says.
struct Opener {
    config: NodeConfig,
    vfs: Arc<dyn Vfs>,
    host: Arc<RaftHost>,
    log: CommitLog,
    locals: Arc<LocalGroups>,
}

impl Opener {
    async fn follow(
        self,
        mut catalog: watch::Receiver<Arc<CatalogState>>,
        stop: CancellationToken,
        fatal: mpsc::UnboundedSender<String>,
    ) {
        loop {
            let state = catalog.borrow_and_update().clone();
            if let Err(error) = self.reconcile(&state).await
                && !stop.is_cancelled()
            {
                fatal.send(format!("{error:#}")).ok();
                return;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = catalog.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn reconcile(&self, catalog: &CatalogState) -> Result<()> {
        for (number, placement) in (0..).zip(&catalog.coordinators) {
            if placement.on(self.config.node_id) && self.host.group(placement.id()).is_none() {
                self.open_coordinator(number, placement).await?;
            }
        }
        let mut wanted = BTreeSet::new();
        for topic in catalog.topics.values() {
            for placement in &topic.queues {
                if placement.on(self.config.node_id) {
                    wanted.insert(placement.group);
                    if self.locals.queue(placement.group).is_none() {
                        self.open_queue(placement, topic.config.flush, catalog.limits)
                            .await?;
                    }
                }
            }
        }
        for queue in self.locals.queues() {
            let group = queue.group.id();
            if !wanted.contains(&group.0) {
                self.remove_queue(group).await;
            }
        }
        Ok(())
    }

    fn spec(&self, placement: &GroupPlacement, flush: Flush, retention: LogRetention) -> GroupSpec {
        let replica = |r: &crate::catalog::ReplicaPlace| Replica {
            replica: r.replica,
            node: r.node,
        };
        GroupSpec {
            group: placement.id(),
            replicas: placement.replicas.iter().map(replica).collect(),
            preferred: placement.preferred,
            flush,
            retention,
            checkpoint_every: match retention {
                LogRetention::Messages => self.config.checkpoint_every,
                LogRetention::StateOnly => STATE_CHECKPOINT_EVERY,
            },
        }
    }

    async fn open(
        &self,
        spec: GroupSpec,
        machine: Box<dyn StateMachine>,
    ) -> Result<quorate_raft::Group> {
        let group = spec.group;
        let opened = self.host.open_group(spec, machine).await;
        opened.with_context(|| format!("cannot open the replica of {group}"))
    }

    async fn open_coordinator(&self, number: u32, placement: &GroupPlacement) -> Result<()> {
        let machine = CoordinatorMachine::new(number);
        let view = machine.view();
        let spec = self.spec(placement, Flush::Sync, LogRetention::StateOnly);
        let recovered_index = self.recovered_index(placement.id());
        let group = self.open(spec, Box::new(machine)).await?;
        self.locals.insert_coordinator(
            number,
            Arc::new(LocalCoordinator {
                group,
                view,
                recovered_index,
            }),
        );
        Ok(())
    }

    async fn open_queue(
        &self,
        placement: &GroupPlacement,
        flush: FlushMode,
        limits: QueueLimits,
    ) -> Result<()> {
        let path = self.index_path(placement.id());
        let dir = path.parent().unwrap_or(&self.config.data_dir);
        self.vfs
            .create_dir_all(dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let index = Arc::new(QueueIndex::open(self.vfs.clone(), path)?);
        let shared = QueueShared::new(index.clone());
        let machine = QueueMachine::new(index, shared.clone(), limits);
        let flush = match flush {
            FlushMode::Sync => Flush::Sync,
            FlushMode::Async => Flush::Async,
        };
        let spec = self.spec(placement, flush, LogRetention::Messages);
        let recovered_index = self.recovered_index(placement.id());
        let group = self.open(spec, Box::new(machine)).await?;
        self.locals
            .insert_queue(LocalQueue::new(group, shared, recovered_index));
        Ok(())
    }

    fn recovered_index(&self, group: RaftGroupId) -> Option<u64> {
        self.log.group(group).state().last.map(|last| last.index)
    }

    fn index_path(&self, group: RaftGroupId) -> PathBuf {
        self.config
            .data_dir
            .join("queues")
            .join(format!("{:020}.index", group.0))
    }

    async fn remove_queue(&self, group: RaftGroupId) {
        self.locals.remove_queue(group.0);
        self.host.close_group(group, true).await;
        let path = self.index_path(group);
        if let Err(error) = self.vfs.remove(&path) {
            tracing::warn!(%group, %error, "a removed queue's index is still on disk");
        }
    }
}
