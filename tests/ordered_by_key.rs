//! Promise 2 and 4 for keyed messages: one producer with several requests under way per queue, every
//! one repeated until it is acknowledged, while leaders are killed: of each key every message is
//! there once, in the order in which it was sent.
//!
//! `QUORATE_KILL_ROUNDS` sets the number of kills (default 3).

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use support::client::{Client, Produced};
use support::{Cluster, eventually};
use tokio::task::JoinHandle;
use tokio::time::sleep;

const QUEUES: u32 = 3;
const KEYS: usize = 9;
/// As many batches as a queue remembers of a producer.
const UNDER_WAY: usize = 5;

/// Repeats a request until it is acknowledged.
async fn insist(client: Client, body: Value) -> Result<()> {
    eventually("an acknowledgement", || async {
        match client.produce("keys", &body).await {
            Produced::Acked(_) => Ok(()),
            Produced::Refused(why) | Produced::Unknown(why) => {
                ensure!(!why.contains("fenced"), "{why}");
                sleep(Duration::from_millis(10)).await;
                bail!("{why}")
            }
        }
    })
    .await
}

/// Sends messages of these keys, which all go to one queue, and says how many of each.
async fn send(
    client: Client,
    id: String,
    keys: Vec<String>,
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
) -> Result<BTreeMap<String, u64>> {
    let mut sent = BTreeMap::new();
    let mut requests = VecDeque::new();
    let mut sequence = 0u64;
    while !stop.load(Ordering::Relaxed) {
        // The oldest has to be done: a queue would forget one that lags behind many others.
        if requests.len() == UNDER_WAY
            && let Some(oldest) = requests.pop_front()
        {
            let oldest: JoinHandle<Result<()>> = oldest;
            oldest.await??;
        }
        // One to three messages of different keys make a request.
        let count = 1 + sequence as usize % 3;
        let messages: Vec<Value> = (0..count)
            .map(|n| {
                let key = &keys[(sequence as usize + n) % keys.len()];
                let number = sent.entry(key.clone()).or_insert(0u64);
                let value = format!("{key}/{number}");
                *number += 1;
                json!({"key": key, "value": value})
            })
            .collect();
        let producer = json!({"id": id, "epoch": 0, "sequence": sequence});
        let body = json!({"messages": messages, "producer": producer});
        sequence += count as u64;
        let (client, progress) = (client.clone(), progress.clone());
        requests.push_back(tokio::spawn(async move {
            insist(client, body).await?;
            progress.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }));
    }
    for request in requests {
        request.await??;
    }
    Ok(sent)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_messages_of_a_key_stay_in_order_while_leaders_die() -> Result<()> {
    let rounds = std::env::var("QUORATE_KILL_ROUNDS").ok();
    let rounds: u64 = rounds.and_then(|n| n.parse().ok()).unwrap_or(3);
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("keys", QUEUES).await?;
    let body = json!({"name": "keyed"});
    let (_, made) = client
        .request(Method::POST, "/v1/producers", Some(&body))
        .await?;
    let id = made["id"].as_str().context("a producer")?.to_owned();
    let mut by_queue: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for n in 0..KEYS {
        let key = format!("key-{n}");
        let said = client
            .get(&format!("/v1/topics/keys/queue?key={key}"))
            .await?;
        let queue = said["queue"].as_u64().context("a queue")?;
        by_queue.entry(queue).or_default().push(key);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let progress = Arc::new(AtomicU64::new(0));
    let senders: Vec<_> = by_queue
        .values()
        .map(|keys| {
            let (client, id, keys) = (client.clone(), id.clone(), keys.clone());
            tokio::spawn(send(client, id, keys, stop.clone(), progress.clone()))
        })
        .collect();
    let further = |more: u64| {
        let (progress, wanted) = (&progress, progress.load(Ordering::Relaxed) + more);
        async move {
            eventually("writes go on", || async {
                ensure!(progress.load(Ordering::Relaxed) >= wanted);
                Ok(())
            })
            .await
        }
    };
    for round in 0..rounds {
        further(50).await?;
        let queue = (round % u64::from(QUEUES)) as u32;
        let victim = eventually("a leader", || client.leader("keys", queue)).await?;
        cluster.node(victim).kill();
        further(50).await?;
        cluster.node(victim).spawn()?;
        cluster.wait_ready().await?;
    }
    stop.store(true, Ordering::Relaxed);
    let mut sent = BTreeMap::new();
    for sender in senders {
        sent.extend(sender.await??);
    }
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    for queue in 0..QUEUES {
        let url = cluster.nodes[0].url.clone();
        let all = client
            .read_with(&url, "keys", queue, "linearizable")
            .await?;
        for (offset, value) in all {
            let (key, number) = value.split_once('/').context("a value of this test")?;
            let next = found.entry(key.to_owned()).or_insert(0);
            ensure!(
                number.parse() == Ok(*next),
                "queue {queue}, offset {offset}: {value} where {key}/{next} should be"
            );
            *next += 1;
        }
    }
    ensure!(found == sent, "found {found:?}, sent {sent:?}");
    println!(
        "{rounds} kills: {} messages in order",
        sent.values().sum::<u64>()
    );
    Ok(())
}
