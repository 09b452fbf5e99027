//! An acknowledgement follows an fsync of a majority, and many of them share one.

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use support::Cluster;
use support::client::Client;
use tokio::task::JoinSet;

/// How often each node has fsynced its log.
async fn fsyncs(cluster: &Cluster) -> Result<Vec<u64>> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let mut counts = Vec::new();
    for url in cluster.urls() {
        let text = http.get(format!("{url}/metrics")).send().await?;
        let text = text.text().await?;
        let line = text
            .lines()
            .find(|line| line.starts_with("quorate_log_fsyncs_total "))
            .context("no fsync counter")?;
        counts.push(line.split(' ').nth(1).context("no value")?.parse()?);
    }
    Ok(counts)
}

async fn produce(client: &Client, value: &str) -> Result<()> {
    let body = json!({"messages": [{"value": value, "queue": 0}]});
    client.store("t", &body).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_follows_a_majoritys_fsync() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    for n in 0..50 {
        let before = fsyncs(&cluster).await?;
        produce(&client, &format!("{n}")).await?;
        let after = fsyncs(&cluster).await?;
        let synced = before.iter().zip(&after).filter(|(b, a)| a > b).count();
        ensure!(synced >= 2, "message {n}: {before:?} became {after:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn fsyncs_are_shared_under_load() -> Result<()> {
    const MESSAGES: u64 = 400;
    const CLIENTS: u64 = 50;
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    let total = async || -> Result<u64> { Ok(fsyncs(&cluster).await?.iter().sum()) };

    let begin = total().await?;
    for n in 0..MESSAGES {
        produce(&client, &format!("{n}")).await?;
    }
    let alone = total().await?;
    let mut clients = JoinSet::new();
    for id in 0..CLIENTS {
        let client = client.clone();
        clients.spawn(async move {
            for n in 0..MESSAGES / CLIENTS {
                produce(&client, &format!("{id}-{n}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    let together = total().await? - alone;
    let alone = alone - begin;
    let per_thousand = |fsyncs: u64| fsyncs * 1000 / MESSAGES;
    println!(
        "fsyncs of all nodes for 1000 messages: {} from one client, {} from {CLIENTS}",
        per_thousand(alone),
        per_thousand(together)
    );
    ensure!(
        together * 2 < alone,
        "{together} with load, {alone} without"
    );
    Ok(())
}
