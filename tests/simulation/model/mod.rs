//! The message model under the same faults: delays, transactions, leases, members, an exchange.
//!
//! Each capability has topics and clients of its own, and a judge that knows only what those clients
//! sent and were answered.

mod actor;
mod delays;
mod exchange;
mod leases;
mod members;
mod transactions;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::workload::Stage;
use actor::{Actor, Scene, Troupe};

/// Longer than a node works on what nobody waits for any more.
const AFTERMATH: Duration = Duration::from_secs(6);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    Delays,
    Transactions,
    Leases,
    Members,
    Exchange,
}

const ALL: [Capability; 5] = [
    Capability::Delays,
    Capability::Transactions,
    Capability::Leases,
    Capability::Members,
    Capability::Exchange,
];

/// What a seed is about: one capability in turn, some with others.
pub fn cover(seed: u64) -> Vec<Capability> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x006d_6f64_656c);
    let turn = (seed % ALL.len() as u64) as usize;
    let places = (0..ALL.len()).filter(|place| *place == turn || rng.random_bool(0.15));
    places.map(|place| ALL[place]).collect()
}

/// The clients of one capability, and what they know.
trait Work: Send + Sync {
    fn start(self: Arc<Self>, troupe: &mut Troupe);

    /// What has not come to its end yet.
    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>>;

    /// Looks at what there is in the end.
    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()>;
}

pub struct Model {
    scene: Arc<Scene>,
    actor: Actor,
    works: Vec<Arc<dyn Work>>,
    tasks: Vec<JoinHandle<()>>,
    seed: u64,
}

impl Model {
    /// Makes what the clients work with.
    pub async fn new(stage: Arc<Stage>, cover: &[Capability], seed: u64) -> Self {
        let done = AtomicBool::new(false);
        let scene = Arc::new(Scene { stage, done });
        let seed = seed ^ 0x6163_746f_7273;
        let mut actor = Troupe::new(scene.clone(), seed).actor("judge");
        let mut works: Vec<Arc<dyn Work>> = Vec::new();
        for capability in cover {
            let scene = scene.clone();
            works.push(match capability {
                Capability::Delays => delays::Delays::prepare(scene, &mut actor).await,
                Capability::Transactions => {
                    transactions::Transactions::prepare(scene, &mut actor).await
                }
                Capability::Leases => leases::Leases::prepare(scene, &mut actor).await,
                Capability::Members => members::Members::prepare(scene, &mut actor).await,
                Capability::Exchange => exchange::Exchange::prepare(scene, &mut actor).await,
            });
        }
        Self {
            scene,
            actor,
            works,
            tasks: Vec::new(),
            seed,
        }
    }

    pub fn start(&mut self) {
        let mut troupe = Troupe::new(self.scene.clone(), self.seed.wrapping_add(1));
        for work in &self.works {
            work.clone().start(&mut troupe);
        }
        self.tasks = troupe.tasks;
    }

    /// The faults are over: waits until all work has come to its end.
    pub async fn settle(&mut self, waits_for: impl Fn(String)) -> turmoil::Result {
        if self.works.is_empty() {
            return Ok(());
        }
        sleep(AFTERMATH).await;
        for work in &self.works {
            while let Some(open) = work.open(&mut self.actor).await {
                waits_for(open);
                sleep(Duration::from_millis(200)).await;
            }
        }
        self.scene.done.store(true, Ordering::Relaxed);
        for (number, task) in self.tasks.drain(..).enumerate() {
            waits_for(format!("client {number} of the message model"));
            task.await?;
        }
        Ok(())
    }

    pub async fn judge(&mut self) {
        for work in &self.works {
            work.judge(&mut self.actor).await;
        }
    }
}
