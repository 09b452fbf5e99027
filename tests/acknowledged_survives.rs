//! Promise 1 and 4: what was acknowledged survives `kill -9` of any minority at any instant, and of
//! all nodes at once; what carries a producer sequence is stored exactly once.
//!
//! `QUORATE_KILL_ROUNDS` sets the number of kills (default 4; the long form is 20) and
//! `QUORATE_SEED` the seed. Values tell who sent them, so that every stored message can be traced.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use support::client::{Client, Produced};
use support::oracle::Oracle;
use support::{Cluster, PATIENCE, eventually};
use tokio::time::{Instant, sleep};

const QUEUES: u32 = 4;
const PRODUCERS: u64 = 8;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// Writes batches of 1 to 10 messages through all nodes until told to stop. An unknown answer is
/// never retried: its values are new each time.
async fn produce_plain(
    client: Client,
    id: u64,
    seed: u64,
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
) -> Result<Oracle> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut oracle = Oracle::default();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let queue = rng.random_range(0..QUEUES);
        let values: Vec<String> = (0..rng.random_range(1..=10))
            .map(|_| {
                n += 1;
                format!("p{id}-{n}")
            })
            .collect();
        for value in &values {
            oracle.sent(value);
        }
        let messages: Vec<_> = values
            .iter()
            .map(|v| json!({"value": v, "queue": queue}))
            .collect();
        match client
            .produce("kills", &json!({ "messages": messages }))
            .await
        {
            Produced::Acked(places) => {
                if places.len() != values.len() {
                    bail!("{} results for {} messages", places.len(), values.len());
                }
                for (place, value) in places.into_iter().zip(&values) {
                    oracle.acked(place, value)?;
                }
                progress.fetch_add(1, Ordering::Relaxed);
            }
            Produced::Refused(_) => {
                oracle.refused += values.len() as u64;
                sleep(Duration::from_millis(5)).await;
            }
            Produced::Unknown(_) => oracle.unknown.extend(values),
        }
    }
    Ok(oracle)
}

/// The same with a producer identity: every answer but an acknowledgement is retried with the same
/// sequence until it is acknowledged.
async fn produce_once(
    client: Client,
    id: u64,
    seed: u64,
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
) -> Result<Oracle> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut oracle = Oracle::default();
    let queue = (id % u64::from(QUEUES)) as u32;
    let identity = eventually("a producer id", || async {
        let body = json!({ "name": format!("once-{id}") });
        let (status, value) = client
            .request(reqwest::Method::POST, "/v1/producers", Some(&body))
            .await?;
        if !status.is_success() {
            bail!("{status} {value}");
        }
        Ok(value)
    })
    .await?;
    let mut sequence = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let count = rng.random_range(1..=10u64);
        let values: Vec<String> = (0..count)
            .map(|i| format!("p{id}-{}", sequence + i))
            .collect();
        let messages: Vec<_> = values
            .iter()
            .map(|v| json!({"value": v, "queue": queue}))
            .collect();
        let body = json!({
            "messages": messages,
            "producer": {"id": identity["id"], "epoch": identity["epoch"], "sequence": sequence},
        });
        for value in &values {
            oracle.sent(value);
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match client.produce("kills", &body).await {
                Produced::Acked(places) => {
                    for (place, value) in places.into_iter().zip(&values) {
                        oracle.acked(place, value)?;
                    }
                    break;
                }
                Produced::Refused(why) | Produced::Unknown(why) if Instant::now() > deadline => {
                    bail!("producer {id} is stuck at sequence {sequence}: {why}");
                }
                Produced::Refused(_) | Produced::Unknown(_) => {
                    sleep(Duration::from_millis(5)).await
                }
            }
        }
        sequence += count;
        progress.fetch_add(1, Ordering::Relaxed);
    }
    Ok(oracle)
}

/// Kills random nodes at random moments, then all at once, and compares every replica.
async fn survive_kills(exactly_once: bool) -> Result<()> {
    let rounds = setting("QUORATE_KILL_ROUNDS", 4);
    let seed = setting("QUORATE_SEED", 7);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("kills", QUEUES).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let progress = Arc::new(AtomicU64::new(0));
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|id| {
            let (client, stop, progress) = (client.clone(), stop.clone(), progress.clone());
            let seed = rng.random();
            tokio::spawn(async move {
                if exactly_once {
                    produce_once(client, id, seed, stop, progress).await
                } else {
                    produce_plain(client, id, seed, stop, progress).await
                }
            })
        })
        .collect();
    let more_than = |before: u64| {
        let progress = progress.clone();
        move || {
            let now = progress.load(Ordering::Relaxed);
            async move {
                if now <= before {
                    bail!("no progress since {before}")
                } else {
                    Ok(())
                }
            }
        }
    };
    for _ in 0..rounds {
        // A random moment: after a random number of further acknowledgements.
        let before = progress.load(Ordering::Relaxed) + rng.random_range(20..200);
        eventually("writes go on", more_than(before)).await?;
        let victim = rng.random_range(1..=3);
        cluster.node(victim).kill();
        let before = progress.load(Ordering::Relaxed) + rng.random_range(20..200);
        eventually("writes go on without one node", more_than(before)).await?;
        cluster.node(victim).spawn()?;
        cluster.wait_ready().await?;
    }
    for id in 1..=3 {
        cluster.node(id).kill();
    }
    stop.store(true, Ordering::Relaxed);
    for id in 1..=3 {
        cluster.node(id).spawn()?;
    }
    cluster.wait_ready().await?;
    let mut oracle = Oracle::default();
    for producer in producers {
        oracle.merge(producer.await??)?;
    }
    let verdict = oracle.check(&cluster, &client, "kills", QUEUES).await?;
    if exactly_once && verdict.stored != verdict.acked {
        bail!(
            "{} stored, {} acknowledged: every message was retried until acknowledged",
            verdict.stored,
            verdict.acked
        );
    }
    if verdict.acked == 0 {
        bail!("nothing was acknowledged, so nothing was tested");
    }
    println!(
        "seed {seed}, {rounds} kills and one of all nodes: {} acked, {} unknown ({} of them stored), {} refused, {} lost",
        verdict.acked, verdict.unknown, verdict.unknown_stored, oracle.refused, verdict.lost
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_messages_survive_kills() -> Result<()> {
    survive_kills(false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn retried_messages_are_stored_exactly_once() -> Result<()> {
    survive_kills(true).await
}
