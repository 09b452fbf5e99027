//! With `--duration`: load and faults for a while, every answer judged, every replica read.
//!
//! The run is its own client, its own network and, without `--url`, its own cluster. Nothing it
//! concludes rests on what the nodes say of themselves: only on what it sent and was answered.
//!
//! | module | part |
//! |---|---|
//! | `plan`, `schedule` | arguments; the seed made into faults |
//! | `cluster`, `proxy`, `faults` | child processes, the network between them, breaking both |
//! | `load` | producers and readers of the log |
//! | `model` | groups, leases, delays, transactions and exchanges, each with its own judge |
//! | `history`, `watch`, `judge`, `findings` | what was sent and seen, and what contradicts it |
//! | `settle`, `report` | the end: a whole cluster, all replicas read, the sum of it |

mod cluster;
mod faults;
mod findings;
mod history;
mod judge;
mod load;
mod model;
mod plan;
mod proxy;
mod report;
mod schedule;
mod settle;
mod stage;
#[cfg(test)]
mod testing;
mod watch;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::super::client::{Client, Repeat, Request};
use super::super::error::CliError;
use super::super::out::Output;
use cluster::{Cluster, Ports};
use faults::{Done, Faults};
use findings::Kind;
use judge::judge;
use load::Load;
use model::{Model, Shown};
use plan::Plan;
use proxy::{Frames, Network};
use report::Report;
use settle::Settle;
use stage::Stage;

pub use plan::RunArgs;

const CREATE_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs against `existing`, or against a cluster of its own.
pub async fn run(
    existing: Option<&Client>,
    out: Output,
    args: RunArgs,
    duration: Duration,
) -> Result<(), CliError> {
    let plan = Plan::new(args, duration, existing.is_none())?;
    if !out.is_json() {
        let url = existing.map(|client| client.urls().join(","));
        out.note(&format!(
            "seed {}: {}",
            plan.seed,
            plan.command(url.as_deref())
        ));
    }
    let interrupted = interrupted();
    // What the run owns is dropped on every way out, and its processes with it.
    tokio::select! {
        done = async {
            match existing {
                Some(client) => on_existing(client, out, &plan).await,
                None => on_own(out, &plan).await,
            }
        } => done,
        name = interrupted => {
            Err(CliError::Failed(format!("ended by {name}: nothing is proved")))
        }
    }
}

/// Listens from the call on: nobody is to be interrupted with nodes that nobody ends.
fn interrupted() -> impl Future<Output = &'static str> {
    let listen = |kind| signal(kind).ok();
    let mut int = listen(SignalKind::interrupt());
    let mut term = listen(SignalKind::terminate());
    let mut hup = listen(SignalKind::hangup());
    async move {
        tokio::select! {
            () = heard(&mut int) => "SIGINT",
            () = heard(&mut term) => "SIGTERM",
            () = heard(&mut hup) => "SIGHUP",
        }
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

async fn on_existing(client: &Client, out: Output, plan: &Plan) -> Result<(), CliError> {
    let described = client.cluster().await?;
    let nodes: Vec<(u64, String)> = described
        .nodes
        .into_iter()
        .map(|node| (node.id, node.url))
        .collect();
    let mut plan = plan.clone();
    plan.nodes = nodes.len() as u64;
    let stage = Stage::new(&plan, client, &nodes)?;
    create_topics(client, &stage, &plan).await?;
    let mut load = Load::start(&stage, &plan);
    let mut model = Model::start(&stage, &plan).await?;
    tokio::time::sleep(plan.duration).await;
    let (settle, shown) = finish(&mut load, &mut model, &stage, &plan).await;
    let totals = conclude(settle, &stage).await;
    let command = plan.command(Some(&client.urls().join(",")));
    let faults = (Done::default(), Frames::default());
    let totals = (totals, shown);
    let report = Report::new(&plan, &mut stage.history.lock(), totals, faults, command);
    report.print(out)?;
    if report.is_clean() {
        for topic in &stage.topics {
            let path = ["v1", "topics", topic.as_str()];
            let delete = Request::new(Method::DELETE, &path, Repeat::Always);
            if let Err(error) = client.call(delete).await {
                out.note(&format!("the topic {topic} is left behind: {error}"));
            }
        }
        if let Err(error) = model.remove().await {
            out.note(&format!("something is left behind: {error}"));
        }
    }
    verdict(&report)
}

async fn on_own(out: Output, plan: &Plan) -> Result<(), CliError> {
    let failed = |error| CliError::io("listen on loopback", error);
    let ports = (0..plan.nodes).map(|_| Ports::reserve());
    let ports = ports.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let peer_ports: Vec<u16> = ports.iter().map(Ports::peer).collect();
    let network = Network::start(&peer_ports).await.map_err(failed)?;
    let mut cluster = Cluster::prepare(plan, ports, |from, to| network.address(from, to))?;
    out.note(&format!("nodes in {}", cluster.home().display()));
    let nodes: Vec<(u64, String)> = cluster
        .nodes
        .iter()
        .map(|node| (node.id, node.url.clone()))
        .collect();
    let urls: Vec<String> = nodes.iter().map(|(_, url)| url.clone()).collect();
    let client = Client::new(&urls)?;
    cluster.start_all()?;
    cluster.wait_ready(&client).await?;
    let stage = Stage::new(plan, &client, &nodes)?;
    create_topics(&client, &stage, plan).await?;
    let mut load = Load::start(&stage, plan);
    let mut model = Model::start(&stage, plan).await?;
    let mut faults = Faults::new(cluster, network, stage.clone(), Client::new(&urls)?, out);
    let broke = faults.run(plan).await;
    faults.end(plan).await;
    if let Err(error) = &broke {
        // Judged all the same: what went before may say why.
        let mut history = stage.history.lock();
        history.findings.say(Kind::NotHealed, error.to_string());
    }
    let (settle, shown) = finish(&mut load, &mut model, &stage, plan).await;
    let totals = conclude(settle, &stage).await;
    faults.note_failures();
    for panic in faults.cluster.panics() {
        stage.history.lock().findings.say(Kind::NodeFailed, panic);
    }
    let done = (faults.done.clone(), faults.network.frames());
    let mut report = Report::new(
        plan,
        &mut stage.history.lock(),
        (totals, shown),
        done,
        plan.command(None),
    );
    if report.is_clean() && plan.dir.is_none() {
        faults.cluster.remove_at_end();
    } else {
        report.kept = Some(faults.cluster.home().display().to_string());
    }
    report.print(out)?;
    verdict(&report)
}

async fn create_topics(client: &Client, stage: &Stage, plan: &Plan) -> Result<(), CliError> {
    for topic in &stage.topics {
        let body = json!({
            "name": topic,
            "queues": plan.queues,
            "replicas": plan.replicas(),
            "max_message_bytes": 65536,
        });
        let request = Request::new(Method::POST, &["v1", "topics"], Repeat::Always);
        let request = request.timeout(CREATE_TIMEOUT).json(&body)?;
        client.call(request).await?;
    }
    Ok(())
}

/// The faults are over: lets everything come to its end.
async fn finish(
    load: &mut Load,
    model: &mut Model,
    stage: &Arc<Stage>,
    plan: &Plan,
) -> (Settle, Shown) {
    let settle = Settle::new(stage.clone(), &plan.run);
    settle.writes().await;
    load.stop_producers(stage).await;
    load.stop_readers(stage).await;
    let shown = model.finish().await;
    settle.went_well();
    (settle, shown)
}

async fn conclude(settle: Settle, stage: &Stage) -> judge::Totals {
    let replicas = settle.leaders().await;
    settle.same_state().await;
    let logs = settle.read_all(&replicas).await;
    judge(&mut stage.history.lock(), &logs)
}

fn verdict(report: &Report) -> Result<(), CliError> {
    match report.is_clean() {
        true => Ok(()),
        false => Err(CliError::Failed(
            "a promise was broken, or the run proves too little".into(),
        )),
    }
}
