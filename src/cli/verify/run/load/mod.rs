//! The load: producers and readers of every kind, each a task, until they are told to stop.

mod consumers;
mod producers;
mod stream;

pub use consumers::{Fetched, Wanted, fetch, proved_end};
pub use producers::outcome;

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::findings::Kind;
use super::plan::Plan;
use super::stage::{NodeClient, Stage};

/// After the last fault, so long may it take until everything sent is decided, everything
/// acknowledged is read and the cluster is whole.
pub const HEAL: Duration = Duration::from_secs(60);

/// The running load. Dropping it ends all its tasks at once.
#[derive(Debug)]
pub struct Load {
    producers: JoinSet<()>,
    readers: JoinSet<()>,
    stop_producers: CancellationToken,
    stop_readers: CancellationToken,
}

/// What each task has of its own.
pub struct Actor {
    pub stage: Arc<Stage>,
    pub rng: StdRng,
    pub stop: CancellationToken,
    pub run: String,
}

impl Actor {
    pub fn pick(&mut self) -> usize {
        self.rng.random_range(0..self.stage.nodes.len())
    }

    pub fn lane(&mut self) -> u16 {
        self.rng.random_range(0..self.stage.lanes())
    }

    /// Waits, but not beyond the stop; true while there is none.
    pub async fn pause(&self, time: Duration) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => false,
            () = tokio::time::sleep(time) => true,
        }
    }
}

impl Load {
    pub fn start(stage: &Arc<Stage>, plan: &Plan) -> Self {
        let mut load = Self {
            producers: JoinSet::new(),
            readers: JoinSet::new(),
            stop_producers: CancellationToken::new(),
            stop_readers: CancellationToken::new(),
        };
        let mut seeds = StdRng::seed_from_u64(plan.seed ^ 0x6c6f_6164);
        let mut actor = |stop: &CancellationToken| Actor {
            stage: stage.clone(),
            rng: StdRng::seed_from_u64(seeds.random()),
            stop: stop.clone(),
            run: plan.run.clone(),
        };
        let now_us = stage.now_us();
        for lane in &mut stage.history.lock().lanes {
            lane.last_ack_us = now_us;
        }
        producers::start(&mut load.producers, plan, || actor(&load.stop_producers));
        consumers::start(&mut load.readers, stage, || actor(&load.stop_readers));
        load
    }

    /// Lets the producers finish what they have begun.
    pub async fn stop_producers(&mut self, stage: &Stage) {
        self.stop_producers.cancel();
        let now_us = stage.now_us();
        for lane in &mut stage.history.lock().lanes {
            lane.end_gap(now_us);
        }
        join(&mut self.producers, stage, "a producer").await;
    }

    /// Lets the readers read to the end, and ends them.
    pub async fn stop_readers(&mut self, stage: &Stage) {
        self.stop_readers.cancel();
        join(&mut self.readers, stage, "a reader").await;
    }
}

async fn join(tasks: &mut JoinSet<()>, stage: &Stage, what: &str) {
    let joined = timeout(HEAL * 2, async {
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                let mut history = stage.history.lock();
                history
                    .findings
                    .say(Kind::ProvesNothing, format!("{what} failed: {error}"));
            }
        }
    });
    if joined.await.is_err() {
        let mut history = stage.history.lock();
        history
            .findings
            .say(Kind::ProvesNothing, format!("{what} did not end"));
    }
}

/// The node with this place in the list.
pub fn node(stage: &Stage, place: usize) -> &NodeClient {
    &stage.nodes[place % stage.nodes.len()]
}
