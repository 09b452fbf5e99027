//! What was published to an exchange is in every bound topic exactly once, whichever nodes die, and
//! a topic that can't take it holds up only itself.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::Method;
use serde_json::{Value, json};
use support::client::Client;
use support::{Cluster, eventually};

async fn put(client: &Client, path: &str, body: Value) -> Result<()> {
    let (status, answer) = client.request(Method::PUT, path, Some(&body)).await?;
    if !status.is_success() {
        bail!("PUT {path}: {status} {answer}");
    }
    Ok(())
}

async fn fanout(client: &Client, topics: &[&str]) -> Result<()> {
    put(client, "/v1/exchanges/x", json!({"kind": "fanout"})).await?;
    for topic in topics {
        put(
            client,
            &format!("/v1/exchanges/x/bindings/{topic}"),
            json!({}),
        )
        .await?;
    }
    Ok(())
}

/// True when it was acknowledged; else it may be stored or not.
async fn publish(client: &Client, value: &str, topics: usize) -> bool {
    let body = json!({"messages": [{"value": value, "key": &value[..3]}]});
    let path = "/v1/exchanges/x/messages";
    match client.request(Method::POST, path, Some(&body)).await {
        Ok((status, answer)) if status.is_success() => {
            let routed = answer["results"][0]["routed"].as_array();
            assert_eq!(routed.map(Vec::len), Some(topics), "{answer}");
            true
        }
        _ => false,
    }
}

/// How often each value is in a topic.
async fn counts(client: &Client, topic: &str) -> Result<BTreeMap<String, usize>> {
    let described = client.topic(topic).await?;
    let queues = described["queues"].as_array().context("queues")?.len();
    let mut counts = BTreeMap::new();
    for queue in 0..queues as u32 {
        let url = &client.urls[0];
        for (_, value) in client.read_with(url, topic, queue, "linearizable").await? {
            *counts.entry(value).or_default() += 1;
        }
    }
    Ok(counts)
}

async fn wait_for_all(client: &Client, topic: &str, acked: &BTreeSet<String>) -> Result<()> {
    eventually(&format!("{topic} has everything acknowledged"), || async {
        let counts = counts(client, topic).await?;
        let twice: Vec<_> = counts.iter().filter(|(_, count)| **count > 1).collect();
        assert!(
            twice.is_empty(),
            "{topic} has these more than once: {twice:?}"
        );
        let missing = acked.iter().filter(|value| !counts.contains_key(*value));
        match missing.count() {
            0 => Ok(()),
            count => bail!("{count} of {} are missing", acked.len()),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bound_topic_has_each_message_once_whichever_nodes_die() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("a", 2).await?;
    client.create_topic("b", 3).await?;
    fanout(&client, &["a", "b"]).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let publishers: Vec<_> = (0..3)
        .map(|publisher| {
            let (client, stop) = (client.clone(), stop.clone());
            tokio::spawn(async move {
                let mut acked = BTreeSet::new();
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let value = format!("p{publisher}{}-{n}", n % 5);
                    if publish(&client, &value, 2).await {
                        acked.insert(value);
                    }
                }
                acked
            })
        })
        .collect();
    for id in [1, 2, 3, 1] {
        // Some are published with all three, some with two.
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.node(id).kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.node(id).spawn()?;
        cluster.wait_ready().await?;
    }
    stop.store(true, Ordering::Relaxed);
    let mut acked = BTreeSet::new();
    for publisher in publishers {
        acked.extend(publisher.await?);
    }
    assert!(acked.len() > 50, "only {} were acknowledged", acked.len());
    for topic in ["a", "b"] {
        wait_for_all(&client, topic, &acked).await?;
    }
    // What was not acknowledged is in both topics or, soon, in neither.
    eventually("both topics have the same", || async {
        match counts(&client, "a").await? == counts(&client, "b").await? {
            true => Ok(()),
            false => bail!("they differ"),
        }
    })
    .await?;
    cluster.replicas_agree()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_without_a_leader_holds_up_only_itself() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("a", 2).await?;
    client
        .create_topic_with(json!({"name": "lonely", "queues": 1, "replicas": 1}))
        .await?;
    fanout(&client, &["a", "lonely"]).await?;
    let home = client.leader("lonely", 0).await?;
    let mut acked = BTreeSet::new();
    let send = async |client: &Client, acked: &mut BTreeSet<String>, from: u32| {
        for n in from..from + 50 {
            let value = format!("v{}-{n}", n % 7);
            if publish(client, &value, 2).await {
                acked.insert(value);
            }
        }
    };
    send(&client, &mut acked, 100).await;
    cluster.node(home).kill();
    let others: Vec<_> = (1..=3)
        .filter(|id| *id != home)
        .map(|id| cluster.nodes[id as usize - 1].url.clone())
        .collect();
    let rest = Client::new(others);
    send(&rest, &mut acked, 200).await;
    send(&rest, &mut acked, 300).await;
    assert!(acked.len() > 100, "only {} were acknowledged", acked.len());
    wait_for_all(&rest, "a", &acked).await?;
    cluster.node(home).spawn()?;
    cluster.wait_ready().await?;
    send(&client, &mut acked, 400).await;
    wait_for_all(&client, "lonely", &acked).await?;
    wait_for_all(&client, "a", &acked).await
}

/// A binding that was acknowledged counts for whoever publishes after that, also on a node that
/// slept meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_slept_publishes_by_the_bindings_there_are() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("a", 1).await?;
    client.create_topic("b", 1).await?;
    fanout(&client, &["a"]).await?;
    for sleeper in 0..3 {
        cluster.nodes[sleeper].pause()?;
        let awake = cluster.nodes.iter().filter(|n| n.id != sleeper as u64 + 1);
        let others = Client::new(awake.map(|n| n.url.clone()).collect());
        eventually("the other topic is bound", || {
            put(&others, "/v1/exchanges/x/bindings/b", json!({}))
        })
        .await?;
        // Longer than a node trusts what it knows of the catalog.
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.nodes[sleeper].resume()?;
        let woken = client.only(&cluster.nodes[sleeper].url);
        eventually("it publishes", || async {
            let body = json!({"messages": [{"value": "v", "routing_key": ""}]});
            let path = "/v1/exchanges/x/messages";
            let (status, answer) = woken.request(Method::POST, path, Some(&body)).await?;
            if status.is_success() {
                assert_eq!(answer["results"][0]["routed"], json!(["a", "b"]));
                return Ok(());
            }
            bail!("{status} {answer}")
        })
        .await?;
        let path = "/v1/exchanges/x/bindings/b";
        eventually("it is bound no more", || async {
            let (status, answer) = client.request(Method::DELETE, path, None).await?;
            match status.is_success() || status.as_u16() == 404 {
                true => Ok(()),
                false => bail!("{status} {answer}"),
            }
        })
        .await?;
    }
    Ok(())
}
