//! Delayed messages through kills: of their queue's leader while they come due, and of every node.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::{Cluster, eventually};

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock after 1970").as_millis() as u64
}

/// Delayed messages of one queue with their times and ids, in the order of their times.
async fn produce(client: &Client, due: &[u64]) -> Result<Vec<(u64, String)>> {
    let each = due.iter();
    let messages: Vec<Value> = each
        .map(|due| json!({"value": due.to_string(), "deliver_at_ms": due, "queue": 0}))
        .collect();
    let body = json!({ "messages": messages });
    let path = "/v1/topics/t/messages";
    let (status, answer) = client.request(Method::POST, path, Some(&body)).await?;
    if status != StatusCode::OK {
        bail!("{status} {answer}");
    }
    let ids = answer["results"].as_array().context("results")?;
    let ids = ids.iter().filter_map(|r| r["message_id"].as_str());
    let mut all: Vec<_> = due.iter().copied().zip(ids.map(str::to_owned)).collect();
    all.sort();
    Ok(all)
}

/// Everything in the queue, once it has `count` messages.
async fn read(client: &Client, count: usize) -> Result<Vec<Value>> {
    eventually("all are delivered", || async {
        let path = "/v1/topics/t/queues/0/messages?offset=0&max_messages=1000";
        let page = client.get(path).await?;
        let messages = page["messages"].as_array().cloned().unwrap_or_default();
        if messages.len() < count {
            bail!("{} of {count}", messages.len());
        }
        Ok(messages)
    })
    .await
}

fn check(found: &[Value], expected: &[(u64, String)]) -> Result<u64> {
    let mut latest = 0;
    assert_eq!(found.len(), expected.len(), "each exactly once");
    for (message, (due, id)) in found.iter().zip(expected) {
        assert_eq!(message["value"], due.to_string(), "in the order of times");
        assert_eq!(message["message_id"], **id);
        let visible = message["timestamp_ms"].as_u64().context("a time")?;
        assert!(visible >= *due, "{visible} is before {due}");
        latest = latest.max(visible - due);
    }
    Ok(latest)
}

async fn leader(client: &Client) -> Result<u64> {
    eventually("the queue has a leader", || async {
        let topic = client.get("/v1/topics/t").await?;
        topic["queues"][0]["leader"].as_u64().context("none")
    })
    .await
}

#[tokio::test]
async fn they_outlive_their_leader_and_come_without_being_asked_for() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    cluster.client().create_topic("t", 1).await?;
    let dead = leader(&cluster.client()).await?;
    let begun = now_ms();
    let due: Vec<u64> = (0..40)
        .map(|n| begun + 3_000 + (n * 37 % 40) * 100)
        .collect();
    let expected = produce(&cluster.client(), &due).await?;
    // Some were delivered, some are due while nobody leads, some after that.
    let others: Vec<String> = cluster
        .nodes
        .iter()
        .filter(|n| n.id != dead)
        .map(|n| n.url.clone())
        .collect();
    let others = Client::new(others);
    read(&others, 3).await?;
    cluster.node(dead).kill();
    let latest = check(&read(&others, expected.len()).await?, &expected)?;
    // An election takes its time, on a busy machine more.
    assert!(latest < 20_000, "{latest} ms late");

    // The dead leader comes back and delivers nothing twice.
    cluster.node(dead).spawn()?;
    cluster.wait_ready().await?;
    let url = cluster.urls().remove(dead as usize - 1);
    eventually("its replica has all", || async {
        let found = cluster.client().read_stale(&url, "t", 0).await?;
        let values: Vec<_> = found.into_iter().map(|(_, value)| value).collect();
        let wanted: Vec<_> = expected.iter().map(|(due, _)| due.to_string()).collect();
        match values == wanted {
            true => Ok(()),
            false => bail!("{values:?}"),
        }
    })
    .await?;
    cluster.replicas_agree()
}

#[tokio::test]
async fn they_outlive_all_nodes_with_what_was_cancelled() -> Result<()> {
    let mut cluster = Cluster::start_with(3, "[raft]\ncheckpoint_every = 16\n").await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    leader(&client).await?;
    let mut expected = Vec::new();
    for round in 0..20 {
        // Far enough ahead that each is stored before any of them is due.
        let now = now_ms();
        let due = [now + 3_000, now + 10_000 + (round * 7 % 20) * 20];
        expected.extend(produce(&client, &due).await?);
    }
    expected.sort();
    // One that is still far off is taken back.
    let (_, cancelled) = expected.pop().context("the last")?;
    let path = format!("/v1/topics/t/messages/{cancelled}");
    let (status, answer) = client.request(Method::DELETE, &path, None).await?;
    assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
    read(&client, 10).await?;
    for node in 1..=3 {
        cluster.node(node).kill();
    }
    for node in 1..=3 {
        cluster.node(node).spawn()?;
    }
    cluster.wait_ready().await?;
    check(&read(&client, expected.len()).await?, &expected)?;
    let again = eventually("the queue says what became of it", || async {
        let (status, _) = client.request(Method::DELETE, &path, None).await?;
        match status {
            StatusCode::NO_CONTENT => Ok(()),
            other => bail!("{other}"),
        }
    });
    tokio::time::timeout(Duration::from_secs(30), again).await??;
    cluster.replicas_agree()
}
