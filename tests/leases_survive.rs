//! Leases, delivery counts, dead letters and their way back, while nodes are killed: one after the
//! other, so that whoever leads the group's coordinator is among them.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::client::{Client, Produced};
use support::{Cluster, eventually};

async fn post(client: &Client, path: &str, body: Value) -> Result<Value> {
    let (status, answer) = client.request(Method::POST, path, Some(&body)).await?;
    if status != StatusCode::OK {
        bail!("{path}: {status} {answer}");
    }
    Ok(answer)
}

async fn receive(client: &Client, more: Value) -> Result<Vec<Value>> {
    let mut body = json!({"topics": ["t"]});
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    let answer = post(client, "/v1/groups/g/receive", body).await?;
    Ok(answer["messages"].as_array().cloned().unwrap_or_default())
}

async fn policy(client: &Client, max_deliveries: u32) -> Result<()> {
    let policy = json!({"max_deliveries": max_deliveries, "backoff_ms": [0]});
    let path = "/v1/groups/g/retry_policy";
    let (status, answer) = client.request(Method::PUT, path, Some(&policy)).await?;
    ensure!(status == StatusCode::OK, "{status} {answer}");
    Ok(())
}

async fn produce(client: &Client, values: &[String]) -> Result<()> {
    for (place, value) in values.iter().enumerate() {
        let body = json!({"messages": [{"value": value, "key": value, "queue": place % 2}]});
        client.store("t", &body).await?;
    }
    Ok(())
}

/// Every value of a topic with how often it is there.
async fn stored(client: &Client, topic: &str, queues: u32) -> Result<BTreeMap<String, usize>> {
    let mut found = BTreeMap::new();
    for queue in 0..queues {
        let url = client.urls[0].clone();
        let read = client.read_with(&url, topic, queue, "linearizable").await?;
        for (_, value) in read {
            *found.entry(value).or_default() += 1;
        }
    }
    Ok(found)
}

/// Kills and restarts each node once, every time something has gone on before and after.
async fn roll(cluster: &mut Cluster, progress: &AtomicUsize) -> Result<()> {
    for id in 1..=3 {
        for killed in [false, true] {
            if killed {
                cluster.node(id).kill();
            }
            let seen = progress.load(Ordering::SeqCst);
            eventually("the work goes on", || async {
                ensure!(progress.load(Ordering::SeqCst) > seen);
                Ok(())
            })
            .await?;
        }
        cluster.node(id).spawn()?;
        cluster.wait_ready().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_outlives_every_leader() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 2).await?;
    policy(&client, 10).await?;
    produce(&client, &["a".to_owned(), "b".to_owned()]).await?;
    let held = receive(&client, json!({"lease_ms": 600_000})).await?;
    ensure!(held.len() == 2, "{held:?}");
    let back = json!({"receipts": [held[0]["receipt"]], "delay_ms": 0});
    post(&client, "/v1/groups/g/nack", back).await?;
    for id in 1..=3 {
        cluster.node(id).kill();
        let others: Vec<String> = cluster.urls();
        let others = others.into_iter().enumerate();
        let others = others.filter(|(n, _)| *n as u64 + 1 != id).map(|(_, u)| u);
        let survivors = Client::new(others.collect());
        // The one that was given back comes again, its count goes on; the other one is held.
        let again = eventually("the group has a leader again", || async {
            // Not for long: an answer may be lost, and then it has to come again.
            let found = receive(&survivors, json!({"lease_ms": 20_000, "wait_ms": 2_000})).await?;
            ensure!(!found.is_empty(), "nothing came");
            Ok(found)
        })
        .await?;
        ensure!(
            again.len() == 1 && again[0]["offset"] == held[0]["offset"],
            "{again:?}"
        );
        ensure!(again[0]["queue"] == held[0]["queue"], "{again:?}");
        let count = again[0]["delivery_count"].as_u64().unwrap_or_default();
        // A lost answer counts too.
        ensure!(count > id, "{count} deliveries after node {id}");
        let back = json!({"receipts": [again[0]["receipt"]], "delay_ms": 0});
        eventually("it is given back", || {
            post(&survivors, "/v1/groups/g/nack", back.clone())
        })
        .await?;
        cluster.node(id).spawn()?;
        cluster.wait_ready().await?;
    }
    let done = json!({"receipts": [held[1]["receipt"]]});
    eventually("it is done", || {
        post(&client, "/v1/groups/g/ack", done.clone())
    })
    .await?;
    Ok(())
}

/// Each queue has one replica, and one of the nodes dies: what the others have is received all the
/// same, and soon enough for a consumer that doesn't wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_a_replica_holds_up_no_other() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    let topic = json!({"name": "t", "queues": 3, "replicas": 1});
    client.create_topic_with(topic).await?;
    let messages = (0..3).map(|queue| json!({"value": "early", "queue": queue}));
    let messages: Vec<Value> = messages.collect();
    client.store("t", &json!({"messages": messages})).await?;
    // The group has a place in every queue.
    let early = parking_lot::Mutex::new(BTreeSet::new());
    eventually("all is received", || async {
        let received = receive(&client, json!({})).await?;
        let mut early = early.lock();
        early.extend(received.iter().map(|m| m["queue"].to_string()));
        ensure!(early.len() == 3, "{early:?}");
        Ok(())
    })
    .await?;
    let described = client.get("/v1/topics/t").await?;
    let on = |queue: usize| described["queues"][queue]["replicas"][0].as_u64();
    let (lost, dead) = (0, on(0).unwrap_or_default());
    cluster.node(dead).kill();
    let left = cluster.nodes.iter().filter(|node| node.id != dead);
    let client = Client::new(left.map(|node| node.url.clone()).collect());
    let alive: Vec<usize> = (0..3).filter(|queue| on(*queue) != Some(dead)).collect();
    ensure!(!alive.is_empty() && !alive.contains(&lost), "{described}");
    for wait_ms in [0, 1_000] {
        for queue in &alive {
            let body = json!({"messages": [{"value": "late", "queue": queue}]});
            client.store("t", &body).await?;
        }
        let found = parking_lot::Mutex::new(BTreeSet::new());
        eventually("the others' messages come", || async {
            let received = receive(&client, json!({"wait_ms": wait_ms})).await?;
            let mut found = found.lock();
            found.extend(received.iter().map(|m| m["queue"].to_string()));
            ensure!(found.len() == alive.len(), "{found:?} of {alive:?}");
            Ok(())
        })
        .await
        .with_context(|| format!("wait_ms {wait_ms}"))?;
    }
    Ok(())
}

/// Receives and acks what is good, gives back what is bad, until told to stop.
async fn consume(
    client: Client,
    acked: Arc<parking_lot::Mutex<BTreeSet<String>>>,
    progress: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::SeqCst) {
        let wanted = json!({"lease_ms": 4_000, "wait_ms": 500, "max_messages": 2});
        let Ok(messages) = receive(&client, wanted).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        for message in messages {
            let value = message["value"].as_str().unwrap_or_default().to_owned();
            let bad = value.starts_with("bad");
            let how = if bad { "nack" } else { "ack" };
            let body = json!({"receipts": [message["receipt"]]});
            // Once more is harmless, and a lost answer is no reason to leave it.
            for _ in 0..50 {
                let settled = post(&client, &format!("/v1/groups/g/{how}"), body.clone()).await;
                match settled {
                    Ok(_) if bad => {}
                    Ok(_) => drop(acked.lock().insert(value)),
                    Err(error) if error.to_string().contains("409") => {}
                    Err(_) => {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        continue;
                    }
                }
                break;
            }
            progress.fetch_add(1, Ordering::SeqCst);
            // So that there is work left for every kill.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Produces until told to stop; gives what was acknowledged, the good and the bad.
async fn feed(client: Client, stop: Arc<AtomicBool>) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut good, mut bad) = (BTreeSet::new(), BTreeSet::new());
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let is_bad = number % 5 == 0;
        let value = format!("{}-{number}", if is_bad { "bad" } else { "good" });
        let body = json!({"messages": [{"value": value, "key": value, "queue": number % 2}]});
        if let Produced::Acked(_) = client.produce("t", &body).await {
            let into = if is_bad { &mut bad } else { &mut good };
            into.insert(value);
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    (good, bad)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dead_are_buried_once_and_come_back_once_whoever_is_killed() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 2).await?;
    policy(&client, 6).await?;
    let acked = Arc::new(parking_lot::Mutex::new(BTreeSet::new()));
    let progress = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let consumers: Vec<_> = (0..2)
        .map(|_| {
            let (acked, progress, stop) = (acked.clone(), progress.clone(), stop.clone());
            tokio::spawn(consume(client.clone(), acked, progress, stop))
        })
        .collect();
    // Enough to begin with, then ever more.
    let begin = (0..80).map(|n| match n % 4 {
        0 => format!("bad-b{n}"),
        _ => format!("good-b{n}"),
    });
    let begin: Vec<String> = begin.collect();
    produce(&client, &begin).await?;
    let producing = tokio::spawn(feed(client.clone(), stop.clone()));
    roll(&mut cluster, &progress).await?;
    stop.store(true, Ordering::SeqCst);
    let (mut good, mut bad) = producing.await?;
    for value in begin {
        match value.starts_with("bad") {
            true => bad.insert(value),
            false => good.insert(value),
        };
    }
    for consumer in consumers {
        consumer.await?;
    }
    stop.store(false, Ordering::SeqCst);
    let last = consume(
        client.clone(),
        acked.clone(),
        progress.clone(),
        stop.clone(),
    );
    let last = tokio::spawn(last);
    let dead = eventually("all bad ones are dead and all good ones done", || async {
        let dead = stored(&client, "_dlq.g", 1).await?;
        ensure!(
            bad.iter().all(|value| dead.contains_key(value)),
            "{} dead",
            dead.len()
        );
        ensure!(acked.lock().is_superset(&good));
        Ok(dead)
    })
    .await?;
    stop.store(true, Ordering::SeqCst);
    last.await?;
    // Those whose storing was never acknowledged may be among them, once as well.
    let once = |(value, count): (&String, &usize)| *count == 1 && value.starts_with("bad");
    ensure!(dead.iter().all(once), "{dead:?}");

    let redrives = {
        let (client, progress) = (client.clone(), progress.clone());
        tokio::spawn(async move {
            let mut empty = 0;
            while empty < 3 {
                let asked = json!({"max_messages": 2});
                match post(&client, "/v1/groups/g/dlq/redrive", asked).await {
                    Ok(answer) if answer["redriven"] == 0 => empty += 1,
                    Ok(_) => {
                        progress.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    };
    cluster.node(2).kill();
    tokio::time::sleep(Duration::from_millis(700)).await;
    cluster.node(2).spawn()?;
    cluster.wait_ready().await?;
    cluster.node(3).kill();
    redrives.await?;
    cluster.node(3).spawn()?;
    cluster.wait_ready().await?;
    let all = stored(&client, "t", 2).await?;
    for value in &good {
        ensure!(all.get(value) == Some(&1), "{value}: {:?}", all.get(value));
    }
    for value in &bad {
        ensure!(all.get(value) == Some(&2), "{value}: {:?}", all.get(value));
    }
    cluster.replicas_agree()
}
