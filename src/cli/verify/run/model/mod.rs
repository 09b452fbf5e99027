//! The message model under the same faults: groups, leases, delays, transactions and exchanges.
//!
//! Each has topics of its own, clients that use it the way a program would, and a judge that knows
//! only what those clients sent and were answered.

mod api;
mod delays;
mod exchanges;
mod groups;
mod leases;
mod numbered;
mod transactions;

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::findings::Kind;
use super::load::HEAL;
use super::plan::{Plan, Workload};
use super::stage::Stage;
use crate::cli::error::CliError;

/// What topics and consumer groups of all workloads are called, behind the run's own name.
const MADE: [&str; 11] = [
    "groups",
    "leases",
    "delays",
    "tx-1",
    "tx-2",
    "tx-derived",
    "tx-worker",
    "exchange",
    "exchange-any",
    "exchange-orders",
    "exchange-created",
];

/// What all workloads share.
#[derive(Debug)]
struct Scene {
    stage: Arc<Stage>,
    run: String,
    /// How late a delayed message may be once the cluster is whole.
    late: Duration,
    /// No new work from here on.
    writing: CancellationToken,
    /// Consumers end.
    reading: CancellationToken,
}

impl Scene {
    fn found(&self, kind: Kind, what: impl Into<String>) {
        self.stage.history.lock().findings.say(kind, what);
    }

    fn name(&self, of: &str) -> String {
        format!("verify-{}-{of}", self.run)
    }

    fn now_us(&self) -> u64 {
        self.stage.now_us()
    }

    /// Waits, but not beyond the end of writing; true while there is more to do.
    async fn pause_writing(&self, time: Duration) -> bool {
        tokio::select! {
            () = self.writing.cancelled() => false,
            () = tokio::time::sleep(time) => true,
        }
    }

    async fn pause_reading(&self, time: Duration) -> bool {
        tokio::select! {
            () = self.reading.cancelled() => false,
            () = tokio::time::sleep(time) => true,
        }
    }

    /// Looks again and again until `done` or the time to heal is over.
    async fn until(&self, mut done: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + HEAL;
        while !done() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        true
    }
}

/// A client's own chances and its turn among the nodes.
#[derive(Debug)]
struct Actor {
    scene: Arc<Scene>,
    rng: StdRng,
}

impl Actor {
    fn place(&mut self) -> usize {
        self.rng.random_range(0..self.scene.stage.nodes.len())
    }
}

/// What the workloads have shown.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Shown {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<groups::Totals>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leases: Option<leases::Totals>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delays: Option<delays::Totals>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transactions: Option<transactions::Totals>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exchanges: Option<exchanges::Totals>,
}

impl Shown {
    pub fn lines(&self) -> Vec<String> {
        let lines = [
            self.groups.as_ref().map(ToString::to_string),
            self.leases.as_ref().map(ToString::to_string),
            self.delays.as_ref().map(ToString::to_string),
            self.transactions.as_ref().map(ToString::to_string),
            self.exchanges.as_ref().map(ToString::to_string),
        ];
        lines.into_iter().flatten().collect()
    }
}

/// The running workloads. Dropping it ends all their tasks at once.
#[derive(Debug)]
pub struct Model {
    scene: Arc<Scene>,
    tasks: JoinSet<()>,
    groups: Option<Arc<groups::Groups>>,
    leases: Option<Arc<leases::Leases>>,
    delays: Option<Arc<delays::Delays>>,
    transactions: Option<Arc<transactions::Transactions>>,
    exchanges: Option<Arc<exchanges::Exchanges>>,
}

impl Model {
    /// Makes the topics of the workloads that the plan names, and starts their clients.
    pub async fn start(stage: &Arc<Stage>, plan: &Plan) -> Result<Self, CliError> {
        let scene = Arc::new(Scene {
            stage: stage.clone(),
            run: plan.run.clone(),
            late: plan.late,
            writing: CancellationToken::new(),
            reading: CancellationToken::new(),
        });
        let mut model = Self {
            scene: scene.clone(),
            tasks: JoinSet::new(),
            groups: None,
            leases: None,
            delays: None,
            transactions: None,
            exchanges: None,
        };
        let mut seeds = StdRng::seed_from_u64(plan.seed ^ 0x006d_6f64_656c);
        let mut actor = || Actor {
            scene: scene.clone(),
            rng: StdRng::seed_from_u64(seeds.random()),
        };
        let replicas = plan.replicas();
        let tasks = &mut model.tasks;
        for workload in &plan.cover {
            match workload {
                Workload::Groups => {
                    model.groups = Some(groups::start(tasks, replicas, &mut actor).await?);
                }
                Workload::Leases => {
                    model.leases = Some(leases::start(tasks, replicas, &mut actor).await?);
                }
                Workload::Delays => {
                    model.delays = Some(delays::start(tasks, replicas, &mut actor).await?);
                }
                Workload::Transactions => {
                    let started = transactions::start(tasks, replicas, &mut actor).await?;
                    model.transactions = Some(started);
                }
                Workload::Exchanges => {
                    model.exchanges = Some(exchanges::start(tasks, replicas, &mut actor).await?);
                }
            }
        }
        Ok(model)
    }

    /// Removes what the workloads have made, from a cluster that goes on.
    pub async fn remove(&self) -> Result<(), CliError> {
        let mut made = Vec::new();
        if let Some(exchanges) = &self.exchanges {
            made.push(("exchanges", exchanges.name().to_owned()));
        }
        for name in MADE {
            made.push(("groups", self.scene.name(name)));
            made.push(("topics", self.scene.name(name)));
        }
        made.push(("topics", format!("_dlq.{}", self.scene.name("leases"))));
        for (kind, name) in made {
            let path = ["v1", kind, &name];
            let call = (Method::DELETE, &path[..]);
            let deadline = Instant::now() + HEAL;
            loop {
                let call = (call.0.clone(), call.1);
                match api::until_done(&self.scene, 0, call, None, None).await {
                    Err(CliError::Problem(problem)) if problem.status == 404 => break,
                    // Members that ended without a word live until their session is over.
                    Err(error)
                        if api::code(&error) == Some("group_has_members")
                            && Instant::now() < deadline =>
                    {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                    done => break drop(done?),
                }
            }
        }
        Ok(())
    }

    /// The faults are over: lets every workload come to its end, and judges it.
    pub async fn finish(&mut self) -> Shown {
        self.scene.writing.cancel();
        let mut shown = Shown::default();
        if let Some(groups) = &self.groups {
            shown.groups = Some(groups.settle().await);
        }
        if let Some(leases) = &self.leases {
            shown.leases = Some(leases.settle().await);
        }
        if let Some(delays) = &self.delays {
            shown.delays = Some(delays.settle().await);
        }
        if let Some(transactions) = &self.transactions {
            shown.transactions = Some(transactions.settle().await);
        }
        if let Some(exchanges) = &self.exchanges {
            shown.exchanges = Some(exchanges.settle().await);
        }
        self.scene.reading.cancel();
        let joined = timeout(HEAL, async {
            while let Some(ended) = self.tasks.join_next().await {
                if let Err(error) = ended {
                    let text = format!("a client of the message model failed: {error}");
                    self.scene.found(Kind::ProvesNothing, text);
                }
            }
        });
        if joined.await.is_err() {
            let text = "a client of the message model did not end";
            self.scene.found(Kind::ProvesNothing, text);
        }
        shown
    }
}
