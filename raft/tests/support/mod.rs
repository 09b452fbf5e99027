//! Hosts in one process, each with its own disk and its own listener.
#![allow(dead_code)] // each test binary uses its part

mod slow_wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate_raft::link::ReservedPort;
use quorate_raft::{
    Flush, Group, GroupSpec, HostConfig, HostStorage, Identity, LogRetention, NodeId, PeerService,
    RaftHost, Replica, StateMachine,
};
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::time::Instant;

use slow_wire::Delay;

pub const PATIENCE: Duration = Duration::from_secs(30);
pub const GROUP: RaftGroupId = RaftGroupId(1024);

/// The command that no replica survives.
pub const PANIC: &str = "panic";
/// The command that has to be synced whatever the group's flush.
pub const SYNC: &str = "sync";

/// Keeps every command it applied, for tests to look at.
#[derive(Debug, Clone, Default)]
pub struct Recorder(pub Arc<Mutex<Vec<Bytes>>>);

impl StateMachine for Recorder {
    fn apply(&mut self, _log_id: LogId, body: &Bytes) -> Bytes {
        assert_ne!(body, PANIC, "as the test wants it");
        let mut all = self.0.lock();
        all.push(body.clone());
        Bytes::from(all.len().to_string())
    }

    fn must_be_synced(&self) -> fn(&Bytes) -> bool {
        |body| body == SYNC
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        let mut state = Vec::new();
        for command in self.0.lock().iter() {
            state.extend_from_slice(&(command.len() as u32).to_le_bytes());
            state.extend_from_slice(command);
        }
        Ok(state)
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        let mut rest = state.unwrap_or_default();
        let mut all = Vec::new();
        while let Some((len, tail)) = rest.split_first_chunk::<4>() {
            let (command, tail) = tail.split_at(u32::from_le_bytes(*len) as usize);
            all.push(Bytes::copy_from_slice(command));
            rest = tail;
        }
        *self.0.lock() = all;
        Ok(())
    }

    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.restore(Some(last), Some(state))
    }

    fn state_hash(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.0.lock().hash(&mut hasher);
        hasher.finish()
    }
}

struct Echo;

impl PeerService for Echo {
    fn call(&self, _from: NodeId, body: Bytes) -> BoxFuture<'static, Bytes> {
        Box::pin(async move { body })
    }
}

/// One node of a test.
pub struct TestNode {
    pub id: NodeId,
    pub host: Arc<RaftHost>,
    pub log: CommitLog,
    pub recorder: Recorder,
    pub group: Group,
    /// Whatever was taken for damage of this node's disk.
    pub damage: Arc<Mutex<Vec<String>>>,
}

/// What of a test survives its nodes: disks and ports.
pub struct TestCluster {
    pub dirs: Vec<tempfile::TempDir>,
    ports: Vec<ReservedPort>,
    pub flush: Flush,
    pub retention: LogRetention,
    pub checkpoint_every: u64,
    /// Of all that the nodes say to each other.
    pub delay: Delay,
}

impl TestCluster {
    pub fn new(count: usize) -> Self {
        Self {
            dirs: (0..count).map(|_| tempfile::tempdir().unwrap()).collect(),
            ports: (0..count).map(|_| ReservedPort::new().unwrap()).collect(),
            flush: Flush::Sync,
            retention: LogRetention::Messages,
            checkpoint_every: 1_000_000,
            delay: Delay::default(),
        }
    }

    fn addresses(&self) -> Vec<(NodeId, String)> {
        let addresses = self.ports.iter().map(|port| port.address().to_string());
        (1..).zip(addresses).collect()
    }

    pub async fn start_all(&mut self) -> Vec<TestNode> {
        let mut nodes = Vec::new();
        for id in 1..=self.dirs.len() as u64 {
            nodes.push(self.start(id, |_| {}).await);
        }
        nodes
    }

    pub async fn start(&mut self, id: NodeId, change: impl FnOnce(&mut HostConfig)) -> TestNode {
        let index = id as usize - 1;
        let listener = self.ports[index].listen().await.unwrap();
        let dir = self.dirs[index].path();
        let vfs = Arc::new(OsVfs);
        let config = CommitLogConfig {
            segment_bytes: 4 << 20,
            ..CommitLogConfig::default()
        };
        let log = CommitLog::open(vfs.clone(), &dir.join("log"), config).unwrap();
        let damage = Arc::<Mutex<Vec<String>>>::default();
        let found = damage.clone();
        log.on_damage(Box::new(move |_, error| {
            found.lock().push(error.to_string())
        }));
        let storage = HostStorage {
            log: log.clone(),
            snapshots: Arc::new(SnapshotStore::open(vfs, &dir.join("snapshots")).unwrap()),
            identity: Arc::new(Identity::open(dir, id, "test").unwrap()),
        };
        let mut config = HostConfig::new("test", id, self.addresses());
        change(&mut config);
        let network = self.delay.network(listener);
        let host = RaftHost::start(config, storage, network, Arc::new(Echo))
            .await
            .unwrap();
        let recorder = Recorder::default();
        let spec = self.spec();
        let group = host
            .open_group(spec, Box::new(recorder.clone()))
            .await
            .unwrap();
        TestNode {
            id,
            host,
            log,
            recorder,
            group,
            damage,
        }
    }

    /// What a node's log is now, for [`TestCluster::lose_tail`].
    pub fn keep_log(&self, id: NodeId) -> tempfile::TempDir {
        let kept = tempfile::tempdir().unwrap();
        copy_files(&self.log_dir(id), kept.path());
        kept
    }

    /// The machine of a node that was stopped crashed: what was written since is gone.
    pub fn lose_tail(&self, id: NodeId, kept: &tempfile::TempDir) {
        std::fs::remove_dir_all(self.log_dir(id)).unwrap();
        std::fs::create_dir(self.log_dir(id)).unwrap();
        copy_files(kept.path(), &self.log_dir(id));
    }

    fn log_dir(&self, id: NodeId) -> PathBuf {
        self.dirs[id as usize - 1].path().join("log")
    }

    fn spec(&self) -> GroupSpec {
        let replicas: Vec<Replica> = (1..=self.ports.len() as u64)
            .map(|node| Replica {
                replica: node + 100,
                node,
            })
            .collect();
        GroupSpec {
            group: GROUP,
            founders: replicas.clone(),
            replicas,
            preferred: 1,
            flush: self.flush,
            retention: self.retention,
            checkpoint_every: self.checkpoint_every,
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

impl TestNode {
    /// Ends this node; its disk stays.
    pub async fn stop(self) {
        self.host.shutdown(PATIENCE).await;
        self.log.close().unwrap();
    }
}

/// The node that leads, once all agree on it.
pub async fn leader(nodes: &[TestNode]) -> &TestNode {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen: Vec<_> = nodes.iter().map(|n| n.group.leader()).collect();
        if let Some(Some(id)) = seen.first()
            && seen.iter().all(|other| *other == Some(*id))
            && let Some(node) = nodes.iter().find(|n| n.id == *id)
        {
            return node;
        }
        assert!(Instant::now() < deadline, "no common leader: {seen:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn propose(node: &TestNode, command: &str) -> (LogId, Bytes) {
    let proposed = node
        .group
        .propose(Bytes::copy_from_slice(command.as_bytes()));
    tokio::time::timeout(PATIENCE, proposed)
        .await
        .unwrap()
        .unwrap()
}
