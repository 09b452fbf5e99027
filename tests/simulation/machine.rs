//! One simulated machine: a disk that forgets what was not synced, and a boot id.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorate::node::Environment;
use quorate_raft::NodeId;
use quorate_raft::link::Network;
use quorate_storage::StorageError;
use quorate_storage::commit_log::{CommitLog, CommitLogConfig, Driver, Step};
use quorate_storage::derived::DerivedStore;
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::{FaultVfs, Operation};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::votes::DurableVotes;
use crate::wires::{PORT, SimulatedDialer, SimulatedListener, Wires};

/// Between two looks of the log's driver for segments that nothing needs any more.
const CLEAN_EVERY: Duration = Duration::from_secs(2);

/// What a machine's disk is like at the moment.
#[derive(Debug, Clone, Copy)]
pub struct DiskSpeed {
    /// Bounds of the time one round of write and fsync takes.
    pub sync_ms: (u64, u64),
}

impl DiskSpeed {
    pub const GOOD: Self = Self { sync_ms: (1, 3) };
}

#[derive(Debug)]
struct State {
    vfs: FaultVfs,
    boots: u64,
    speed: DiskSpeed,
    /// Until the next boot or process: something was made to fail, so the node may stop.
    excused: bool,
    lives: u64,
}

/// Survives its node's processes.
#[derive(Debug)]
pub struct Machine {
    pub node: NodeId,
    seed: u64,
    wires: Arc<Wires>,
    state: Mutex<State>,
    pub votes: Arc<DurableVotes>,
}

impl Machine {
    pub fn new(node: NodeId, seed: u64, wires: Arc<Wires>) -> Self {
        Self {
            node,
            seed,
            wires,
            state: Mutex::new(State {
                vfs: FaultVfs::new(),
                boots: 1,
                speed: DiskSpeed::GOOD,
                excused: false,
                lives: 0,
            }),
            votes: Arc::default(),
        }
    }

    pub fn set_speed(&self, speed: DiskSpeed) {
        self.state.lock().speed = speed;
    }

    /// A failure from here on, until the process ends, is of our own making.
    pub fn excuse(&self) {
        self.state.lock().excused = true;
    }

    pub fn is_excused(&self) -> bool {
        self.state.lock().excused
    }

    pub fn fail_nth_sync(&self, nth: u64) {
        let state = self.state.lock();
        state
            .vfs
            .fail_nth(Operation::Sync, nth, io::ErrorKind::Other);
    }

    /// The disk stops in the middle of what it is doing.
    pub fn halt_after(&self, changes: u64) {
        self.state.lock().vfs.halt_after(changes);
    }

    /// The power fails: unsynced bytes and names are lost or not, as the seed says.
    pub fn lose_power(&self, seed: u64) {
        let mut state = self.state.lock();
        state.vfs = state.vfs.crash(seed);
        state.boots += 1;
        state.excused = false;
    }

    /// The process is killed. What it had written is still there, though not on the medium.
    pub fn lose_process(&self) {
        let mut state = self.state.lock();
        state.vfs = state.vfs.kill();
        state.excused = false;
    }

    /// The node believes that its disk is damaged. Nothing here damages one.
    pub fn quarantine(&self) -> Option<String> {
        let bytes = self
            .state
            .lock()
            .vfs
            .bytes(Path::new("/data/quarantine.json"))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let is_empty = text.contains("\"whole\": null") && text.contains("\"replicas\": []");
        (!is_empty).then_some(text)
    }

    /// What the next process on this machine stands on.
    pub async fn environment(self: &Arc<Self>) -> io::Result<Environment> {
        let listener = turmoil::net::TcpListener::bind(("0.0.0.0", PORT)).await?;
        let mut state = self.state.lock();
        state.lives += 1;
        let machine = self.clone();
        let rng_seed = self.seed ^ (self.node << 32) ^ state.lives;
        Ok(Environment {
            vfs: Arc::new(state.vfs.clone()),
            network: Network {
                listener: Box::new(SimulatedListener(listener)),
                dialer: Box::new(SimulatedDialer {
                    from: self.node,
                    wires: self.wires.clone(),
                }),
            },
            boot_id: format!("boot {}", state.boots),
            open_log: Box::new(move |vfs, dir, config| {
                machine.open_log(vfs, dir, config, StdRng::seed_from_u64(rng_seed))
            }),
            clean_every: None,
            // sled's threads take random numbers and time when they like.
            open_derived: Box::new(|| Ok(DerivedStore::in_memory())),
            lock: None,
        })
    }

    fn open_log(
        self: &Arc<Self>,
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        config: CommitLogConfig,
        rng: StdRng,
    ) -> Result<CommitLog, StorageError> {
        let (log, driver) = CommitLog::open_driven(vfs, dir, config)?;
        self.votes.check_recovered(&log);
        tokio::spawn(drive(self.clone(), log.clone(), driver, rng));
        Ok(log)
    }
}

/// The writer's thread and the background's, as a task: every round takes the time of an fsync.
async fn drive(machine: Arc<Machine>, log: CommitLog, mut driver: Driver, mut rng: StdRng) {
    let votes = machine.votes.clone();
    let mut worked = true;
    let mut clean_at = tokio::time::Instant::now() + CLEAN_EVERY;
    loop {
        let (min, max) = machine.state.lock().speed.sync_ms;
        tokio::time::sleep(Duration::from_millis(rng.random_range(min..=max))).await;
        // What is queued may become durable even if the step fails.
        votes.forget_removed(&log);
        match driver.step(Instant::now()) {
            Step::Worked => worked = true,
            // Nothing is left in the queue.
            Step::Idle { .. } if worked => {
                worked = false;
                votes.are_durable(&log);
            }
            Step::Idle { .. } => {}
            Step::Stopped => return,
        }
        if rng.random_bool(0.2) {
            driver.step_background();
        }
        if tokio::time::Instant::now() >= clean_at {
            clean_at = tokio::time::Instant::now() + CLEAN_EVERY;
            if let Err(error) = driver.clean(Instant::now()) {
                tracing::warn!(%error, "cleaning failed");
            }
        }
    }
}
