//! A while of trading under kills, then the proof.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use crate::api::Api;
use crate::chaos::{Service, node, pause};
use crate::{PRODUCER_GROUP, Settings, TOPIC, now_ms, points, prove};

const QUEUES: usize = 4;
/// How long everything that is open may take to be settled once nothing is killed any more.
const SETTLE: Duration = Duration::from_secs(120);

pub fn run(settings: &Settings) -> Result<bool> {
    for name in ["orders.db", "points.db"] {
        if settings.home.join(name).exists() {
            bail!(
                "{} has the books of an earlier run; give another --home",
                settings.home.display()
            );
        }
    }
    let mut api = Api::new(&settings.urls);
    prepare(&mut api)?;
    // One creates each database before the others come.
    drop((crate::orders::open(settings)?, points::open(settings)?));
    let until_ms = now_ms() + settings.seconds * 1000;
    let mut services = vec![
        Service::new("orders", 1, settings, until_ms)?,
        Service::new("orders", 2, settings, until_ms)?,
        Service::new("points", 1, settings, until_ms)?,
    ];
    println!("trading for {} s, killing at random", settings.seconds);
    let kills = trade(settings, &mut services, until_ms)?;
    println!("trading is over after {kills}; settling what is open");
    for service in &mut services {
        service.ensure()?;
    }
    settle(settings, &mut api, &mut services)?;
    drop(services);
    prove::books(settings)
}

fn prepare(api: &mut Api) -> Result<()> {
    let topic = json!({"name": TOPIC, "queues": QUEUES});
    let deadline = Instant::now() + SETTLE;
    loop {
        match api.post("/v1/topics", &topic) {
            Ok(answer) if answer.is_done() => break,
            Ok(answer) => bail!("create {TOPIC}: {} {}", answer.status, answer.code()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => pause(200, 400),
        }
    }
    let topic = api.get(&format!("/v1/topics/{TOPIC}"))?.body;
    let mut queues = topic["queues"].as_array().into_iter().flatten();
    match queues.any(|queue| queue["end_offset"] != 0) {
        true => bail!("{TOPIC} has the orders of an earlier run; delete the topic first"),
        false => Ok(()),
    }
}

/// Kills what it finds until it is time, and says how often.
fn trade(settings: &Settings, services: &mut [Service], until_ms: u64) -> Result<String> {
    let (mut of_services, mut of_nodes) = (0, 0);
    while now_ms() < until_ms {
        for service in services.iter_mut() {
            service.ensure()?;
        }
        pause(500, 2000);
        match (&settings.cluster, fastrand::u8(..3)) {
            (Some(script), 0) => {
                // One at a time: the others are a majority.
                let victim = fastrand::usize(1..=settings.urls.len());
                println!("killing node {victim}");
                node(script, "kill", victim)?;
                of_nodes += 1;
                pause(500, 3000);
                node(script, "restart", victim)?;
            }
            _ => {
                let victim = fastrand::usize(..services.len());
                println!("killing {}", services[victim].name());
                services[victim].kill();
                of_services += 1;
                pause(50, 500);
            }
        }
    }
    Ok(format!(
        "{of_services} kills of services and {of_nodes} of nodes"
    ))
}

/// Waits until no transaction is open and every message is consumed.
fn settle(settings: &Settings, api: &mut Api, services: &mut [Service]) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        for service in services.iter_mut() {
            service.ensure()?;
        }
        let left = match left(settings, api) {
            Ok(None) => return Ok(()),
            Ok(Some(left)) => left,
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() > deadline {
            bail!("not settled after {} s: {left}", SETTLE.as_secs());
        }
        pause(300, 500);
    }
}

/// What is not settled yet.
fn left(settings: &Settings, api: &mut Api) -> Result<Option<String>> {
    // Also those that are decided: their messages become visible a moment later.
    for state in [
        "preparing",
        "open",
        "needs_check",
        "committing",
        "rolling_back",
    ] {
        let path = format!("/v1/transactions?producer_group={PRODUCER_GROUP}&state={state}");
        let answer = api.get(&path)?;
        let Some(open) = answer.body["transactions"].as_array() else {
            bail!("{path}: {} {}", answer.status, answer.body);
        };
        if !open.is_empty() {
            return Ok(Some(format!("{} transactions are {state}", open.len())));
        }
    }
    let db = points::open(settings)?;
    let topic = api.get(&format!("/v1/topics/{TOPIC}"))?.body;
    for queue in 0..QUEUES {
        let end = topic["queues"][queue]["end_offset"].as_u64();
        let next = points::next_offset(&db, queue)?;
        if end != Some(next) {
            return Ok(Some(format!(
                "queue {queue} is consumed to {next} of {end:?}"
            )));
        }
    }
    Ok(None)
}
