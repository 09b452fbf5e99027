//! Whole brokers in one process, over real disks and links, for tests of the paths.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quorate_raft::link::ReservedPort;
use quorate_raft::{
    Flush, GroupSpec, HostConfig, HostStorage, Identity, LogRetention, NodeId, RaftHost, Replica,
};
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::derived::DerivedStore;
use quorate_storage::key_index::KeyIndex;
use quorate_storage::queue_index::QueueIndex;
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::local::{LocalCoordinator, LocalGroups, LocalQueue};
use super::queue::{QueueLimits, QueueMachine, QueueShared};
use super::{Broker, BrokerConfig, BrokerParts, TopicConfig};
use crate::catalog::{
    CATALOG_GROUP, CatalogCommand, CatalogMachine, CatalogReply, CatalogState, GroupOwner,
    GroupPlacement,
};
use crate::coordinator::CoordinatorMachine;
use crate::metrics::Metrics;
use crate::peer::BrokerService;

pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct TestNode {
    pub broker: Arc<Broker>,
    host: Arc<RaftHost>,
    log: CommitLog,
}

/// What outlives its nodes: disks and ports.
pub(super) struct TestCluster {
    dirs: Vec<TempDir>,
    ports: Vec<ReservedPort>,
    /// Of the nodes that are started from now on.
    pub config: BrokerConfig,
}

impl TestCluster {
    pub fn new(count: usize) -> Self {
        Self {
            dirs: (0..count).map(|_| tempfile::tempdir().unwrap()).collect(),
            ports: (0..count).map(|_| ReservedPort::new().unwrap()).collect(),
            config: BrokerConfig::default(),
        }
    }

    /// Starts a node. It is ready when the others that it needs are there.
    pub async fn start(&mut self, id: NodeId) -> TestNode {
        let place = id as usize - 1;
        let listener = self.ports[place].listen().await.unwrap();
        let dir = self.dirs[place].path();
        start(id, dir, self.addresses(), listener, self.config.clone()).await
    }

    fn addresses(&self) -> Vec<(NodeId, String)> {
        let addresses = self.ports.iter().map(|port| port.address().to_string());
        (1..).zip(addresses).collect()
    }

    pub async fn start_all(&mut self) -> Vec<TestNode> {
        let mut nodes = Vec::new();
        for id in 1..=self.ports.len() as u64 {
            nodes.push(self.start(id).await);
        }
        for node in &nodes {
            node.ready().await;
        }
        nodes
    }
}

impl TestNode {
    pub async fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(reason) = self.broker.not_ready() {
            assert!(Instant::now() < deadline, "not ready: {reason}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn stop(self) {
        self.host.shutdown(Duration::from_secs(2)).await;
        self.log.close().unwrap();
    }
}

async fn start(
    id: NodeId,
    dir: &Path,
    addresses: Vec<(NodeId, String)>,
    listener: TcpListener,
    broker_config: BrokerConfig,
) -> TestNode {
    let vfs: Arc<dyn Vfs> = Arc::new(OsVfs);
    let log_config = CommitLogConfig {
        segment_bytes: 32 << 20,
        reserve_bytes: 1 << 20,
        ..CommitLogConfig::default()
    };
    let log = CommitLog::open(vfs.clone(), &dir.join("log"), log_config).unwrap();
    let storage = HostStorage {
        log: log.clone(),
        snapshots: Arc::new(SnapshotStore::open(vfs.clone(), &dir.join("snapshots")).unwrap()),
        identity: Arc::new(Identity::open(dir, id, "test").unwrap()),
    };
    let service = Arc::new(BrokerService::default());
    let config = HostConfig::new("test", id, addresses.clone());
    let host = RaftHost::start(config, storage, listener, service.clone())
        .await
        .unwrap();
    let (published, catalog) = watch::channel(Arc::new(CatalogState::default()));
    let replicas = addresses.iter().map(|(node, _)| Replica {
        replica: *node,
        node: *node,
    });
    let replicas: Vec<Replica> = replicas.collect();
    let spec = GroupSpec {
        group: CATALOG_GROUP,
        founders: replicas.clone(),
        replicas,
        preferred: 1,
        flush: Flush::Sync,
        retention: LogRetention::StateOnly,
        checkpoint_every: 100,
    };
    let machine = Box::new(CatalogMachine::new(published));
    host.open_group(spec, machine).await.unwrap();
    let local = Arc::new(LocalGroups::default());
    let broker = Broker::new(BrokerParts {
        host: host.clone(),
        log: log.clone(),
        catalog: catalog.clone(),
        local: local.clone(),
        config: broker_config,
        metrics: Arc::new(Metrics::new()),
    });
    service.connect(&broker);
    let opener = Opener {
        id,
        vfs,
        dir: dir.to_owned(),
        derived: DerivedStore::open(&dir.join("derived")).unwrap(),
        host: host.clone(),
        log: log.clone(),
        local,
    };
    tokio::spawn(opener.follow(catalog));
    if id == 1 {
        tokio::spawn(bootstrap(broker.clone(), addresses));
    }
    TestNode { broker, host, log }
}

async fn bootstrap(broker: Arc<Broker>, nodes: Vec<(NodeId, String)>) {
    let command = CatalogCommand::Bootstrap {
        cluster_id: "c0ffee".to_owned(),
        nodes,
        coordinators: 4,
        limits: QueueLimits::default(),
    };
    while !matches!(
        broker.change_catalog(&command).await,
        Ok(CatalogReply::Done)
    ) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

struct Opener {
    id: NodeId,
    vfs: Arc<dyn Vfs>,
    dir: std::path::PathBuf,
    host: Arc<RaftHost>,
    log: CommitLog,
    derived: DerivedStore,
    local: Arc<LocalGroups>,
}

impl Opener {
    async fn follow(self, mut catalog: watch::Receiver<Arc<CatalogState>>) {
        loop {
            let state = catalog.borrow_and_update().clone();
            for placement in state.placements().filter(|p| p.on(self.id)) {
                if !self.local.has(placement.group) {
                    self.open(&state, placement).await;
                }
            }
            for group in self.local.queue_ids() {
                if !state.queue_groups.contains_key(&group) {
                    self.local.remove_queue(group);
                    self.host
                        .close_group(quorate_storage::RaftGroupId(group), true)
                        .await
                        .ok();
                }
            }
            if catalog.changed().await.is_err() {
                return;
            }
        }
    }

    async fn open(&self, state: &CatalogState, placement: &GroupPlacement) {
        let recovered = self
            .log
            .group(placement.id())
            .state()
            .last
            .map(|id| id.index);
        let replicas: Vec<Replica> = placement
            .replicas
            .iter()
            .map(|r| Replica {
                replica: r.replica,
                node: r.node,
            })
            .collect();
        let spec = |retention| GroupSpec {
            group: placement.id(),
            founders: replicas.clone(),
            replicas: replicas.clone(),
            preferred: placement.preferred,
            flush: Flush::Sync,
            retention,
            checkpoint_every: 16,
        };
        match state.owner(placement.id()) {
            Some(GroupOwner::Coordinator(number)) => {
                let store = self.derived.group(placement.id());
                let machine = CoordinatorMachine::new(number, store, Arc::default());
                let (view, soundness) = (machine.view(), machine.soundness());
                let spec = spec(LogRetention::StateOnly);
                let Ok(group) = self.host.open_group(spec, Box::new(machine)).await else {
                    return;
                };
                let coordinator = LocalCoordinator {
                    group,
                    view,
                    soundness,
                    recovered_index: recovered,
                };
                self.local.insert_coordinator(number, Arc::new(coordinator));
            }
            Some(GroupOwner::Queue { .. }) => {
                let path = self.dir.join(format!("{}.index", placement.group));
                let index = Arc::new(QueueIndex::open(self.vfs.clone(), path).unwrap());
                let shared = QueueShared::new(index.clone(), Arc::default());
                let keys = self.dir.join(format!("{}.keys", placement.group));
                let keys = KeyIndex::open(self.vfs.clone(), keys, |_| true).unwrap();
                let held = self.derived.group(placement.id());
                let machine = QueueMachine::new(index, shared.clone(), held, state.limits);
                let spec = spec(LogRetention::Messages);
                let Ok(group) = self.host.open_group(spec, Box::new(machine)).await else {
                    return;
                };
                self.local
                    .insert_queue(LocalQueue::new(group, shared, keys, recovered));
            }
            Some(GroupOwner::Catalog) | None => {}
        }
    }
}

pub(super) fn topic(queues: u32, replicas: u32) -> TopicConfig {
    TopicConfig {
        queues,
        replicas,
        hash_queues: 0,
        ..TopicConfig::default()
    }
}

/// Tries again until it is true.
pub(super) async fn eventually<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match timeout_at(deadline, check()).await {
            Ok(true) => return,
            Ok(false) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(_) => panic!("never came true: {what}"),
        }
        assert!(Instant::now() < deadline, "never came true: {what}");
    }
}
