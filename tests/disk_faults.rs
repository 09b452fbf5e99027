//! One node of three on a disk that fails, stalls or fills up: it stops or refuses and says what to
//! do, and the others go on.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use quorate::broker::queue::QueueLimits;
use quorate::broker::{BrokerConfig, BrokerError, NewMessage, ProduceRequest, TopicConfig};
use quorate::metrics::Metrics;
use quorate::node::{Environment, Node, NodeConfig};
use quorate_raft::HostConfig;
use quorate_raft::link::ReservedPort;
use quorate_storage::RaftGroupId;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig};
use quorate_storage::derived::DerivedStore;
use quorate_storage::vfs::fault::{FaultVfs, Operation};
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(60);
const QUEUE: RaftGroupId = RaftGroupId(1024);
const ILL: usize = 1;

/// Three nodes in this process, over real sockets, each on a disk in memory.
struct Bed {
    disks: Vec<FaultVfs>,
    ports: Vec<ReservedPort>,
    nodes: Vec<Node>,
    sent: u64,
}

async fn start(disk: &FaultVfs, place: usize, ports: &[ReservedPort]) -> Result<Node> {
    let node_id = place as u64 + 1;
    let addresses = ports.iter().map(|port| port.address().to_string());
    let addresses: Vec<(u64, String)> = (1..).zip(addresses).collect();
    let listener = ports[place].listen().await?;
    let environment = Environment {
        vfs: Arc::new(disk.clone()),
        network: listener.into(),
        boot_id: "boot".to_owned(),
        open_log: Box::new(CommitLog::open),
        clean_every: None,
        open_derived: Box::new(|| Ok(DerivedStore::in_memory())),
        lock: None,
    };
    let config = NodeConfig {
        cluster_name: "test".to_owned(),
        node_id,
        nodes: addresses.clone(),
        url: format!("http://node-{node_id}"),
        data_dir: Path::new("/data").to_owned(),
        coordinators: 1,
        log: CommitLogConfig {
            segment_bytes: 1 << 20,
            reserve_bytes: 1 << 20,
            ..CommitLogConfig::default()
        },
        host: HostConfig::new("test", node_id, addresses),
        queue_limits: QueueLimits::default(),
        checkpoint_every: 1000,
        broker: BrokerConfig::default(),
    };
    Node::start_in(environment, config, Arc::new(Metrics::new())).await
}

impl Bed {
    async fn new() -> Result<Self> {
        let mut bed = Self {
            disks: (0..3).map(|_| FaultVfs::new()).collect(),
            ports: (0..3)
                .map(|_| ReservedPort::new())
                .collect::<io::Result<_>>()?,
            nodes: Vec::new(),
            sent: 0,
        };
        for place in 0..3 {
            let node = start(&bed.disks[place], place, &bed.ports).await?;
            bed.nodes.push(node);
        }
        for place in 0..3 {
            bed.ready(place).await?;
        }
        let config = TopicConfig {
            queues: 1,
            replicas: 3,
            hash_queues: 0,
            ..TopicConfig::default()
        };
        bed.nodes[0].broker().create_topic("t", config).await?;
        Ok(bed)
    }

    async fn ready(&self, place: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Some(reason) = self.nodes[place].broker().not_ready() {
            ensure!(Instant::now() < deadline, "never ready: {reason}");
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    async fn put(&self, place: usize, value: String) -> Result<u64, BrokerError> {
        let message = NewMessage {
            value: Some(value.into()),
            queue: Some(0),
            ..NewMessage::default()
        };
        let request = ProduceRequest {
            topic: "t".to_owned(),
            messages: vec![message],
            producer: None,
            idempotency_key: None,
        };
        let mut answer = self.nodes[place].broker().produce(request).await?;
        let stored = answer.results.remove(0)?;
        Ok(stored.offset.unwrap_or_default())
    }

    /// Through the two other nodes; what is not acknowledged is sent again as another message.
    async fn others_take(&mut self, count: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut taken = 0;
        while taken < count {
            self.sent += 1;
            let place = [0, 2][self.sent as usize % 2];
            match self.put(place, format!("m{}", self.sent)).await {
                Ok(_) => taken += 1,
                Err(error) if Instant::now() > deadline => bail!("never taken: {error}"),
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
        Ok(())
    }

    /// Makes the ill node write until its disk has failed, and gives what it says then.
    async fn fails(&mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told = timeout(Duration::from_millis(20), self.nodes[ILL].fatal()).await;
            if let Ok(reason) = told {
                return Ok(reason);
            }
            ensure!(
                Instant::now() < deadline,
                "the node goes on as if nothing were wrong"
            );
            self.others_take(1).await?;
        }
    }

    /// Ends the ill node as its process would end, and starts it on what it had written.
    async fn restart(&mut self) -> Result<()> {
        let old = self.nodes.remove(ILL);
        // The log is poisoned: it can't be closed any more.
        old.shutdown(Duration::from_secs(1)).await.ok();
        self.disks[ILL] = self.disks[ILL].kill();
        let node = start(&self.disks[ILL], ILL, &self.ports).await?;
        self.nodes.insert(ILL, node);
        self.ready(ILL).await
    }

    /// All replicas come to the same state.
    async fn agree(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut states = Vec::new();
            for node in &self.nodes {
                let group = node.host().group(QUEUE).context("no replica")?;
                states.push(group.state_hash().await?);
            }
            if states.iter().all(|state| *state == states[0]) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "replicas differ: {states:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn ends_and_comes_back(operation: Operation, kind: io::ErrorKind) -> Result<()> {
    let mut bed = Bed::new().await?;
    bed.others_take(20).await?;
    bed.disks[ILL].fail_nth(operation, 1, kind);
    let said = bed.fails().await?;
    ensure!(said.contains("/data/log/"), "it names the file: {said}");
    ensure!(
        said.contains("check the disk"),
        "it says what to do: {said}"
    );
    bed.others_take(20).await?;
    bed.restart().await?;
    bed.others_take(20).await?;
    bed.agree().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_fsync_fails_ends_and_the_others_go_on() -> Result<()> {
    ends_and_comes_back(Operation::Sync, io::ErrorKind::Other).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_write_fails_ends_and_the_others_go_on() -> Result<()> {
    ends_and_comes_back(Operation::Write, io::ErrorKind::StorageFull).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_stalls_for_seconds_holds_up_nobody_else() -> Result<()> {
    let mut bed = Bed::new().await?;
    bed.others_take(20).await?;
    let slow = Arc::new(AtomicBool::new(true));
    let stalls = slow.clone();
    bed.disks[ILL].before_sync(move || {
        if stalls.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(2));
        }
    });
    bed.others_take(100).await?;
    slow.store(false, Ordering::Relaxed);
    bed.others_take(20).await?;
    bed.agree().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_until_there_is_room_again() -> Result<()> {
    let mut bed = Bed::new().await?;
    bed.others_take(20).await?;
    for disk in &bed.disks {
        disk.set_free_space(0);
    }
    let deadline = Instant::now() + PATIENCE;
    let refused = loop {
        match bed.put(0, "no room".to_owned()).await {
            Err(error @ BrokerError::DiskFull { .. }) => break error,
            answer => ensure!(Instant::now() < deadline, "{answer:?}"),
        }
        sleep(Duration::from_millis(20)).await;
    };
    ensure!(refused.to_string().contains("add space"), "{refused}");
    for disk in &bed.disks {
        disk.set_free_space(u64::MAX);
    }
    bed.others_take(20).await?;
    bed.agree().await
}
