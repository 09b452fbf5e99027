//! Damage where it would matter most: on the one node that holds what was acknowledged beside the
//! leader, and on a majority.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;

use super::files::{At, Spoil, segments, spoil};
use super::matrix::{CONFIG, topic};
use super::support::client::Client;
use super::support::{Cluster, eventually};

/// Nodes without a sound majority answer, and acknowledge nothing.
async fn take_nothing(client: &Client) -> Result<()> {
    let body = json!({"messages": [{"value": "never", "queue": 0}]});
    let (status, answer) = eventually("a node answers", || {
        client.request(Method::POST, "/v1/topics/t/messages", Some(&body))
    })
    .await?;
    println!("refused: {answer}");
    ensure!(matches!(status.as_u16(), 503 | 504), "{status} {answer}");
    Ok(())
}

async fn put_all(client: &Client, from: usize, to: usize) -> Result<()> {
    for n in from..to {
        let body = json!({"messages": [{"value": format!("m{n}"), "queue": 0}]});
        let places = client.store("t", &body).await?;
        ensure!(places == [(0, n as u64)], "{places:?}");
    }
    Ok(())
}

fn damage_log(data: &Path) -> Result<()> {
    let segments = segments(data)?;
    spoil(
        &segments[segments.len() - 1],
        At::MiddleFrame,
        Spoil::FlipBit,
        None,
    )
}

async fn holds_all(cluster: &Cluster, count: usize) -> Result<()> {
    let client = cluster.client();
    for url in cluster.urls() {
        eventually("every replica holds everything", || async {
            let read = client.read_stale(&url, "t", 0).await?;
            let expected = (0..count).map(|n| (n as u64, format!("m{n}")));
            ensure!(read.iter().cloned().eq(expected), "{} messages", read.len());
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_replica_neither_votes_nor_leads() -> Result<()> {
    let mut cluster = Cluster::start_small_segments(3, CONFIG).await?;
    let client = cluster.client();
    client.create_topic_with(topic(1)).await?;
    put_all(&client, 0, 20).await?;
    // Node 3 misses what 1 and 2 acknowledge, then 2 is damaged, and 1 is away: with the vote of
    // node 2, node 3 would lead and have lost messages.
    cluster.node(3).kill();
    let pair = Client::new(cluster.urls()[..2].to_vec());
    put_all(&pair, 20, 60).await?;
    cluster.node(1).kill();
    cluster.node(2).kill();
    damage_log(&cluster.data_dir(2))?;
    cluster.node(3).spawn()?;
    cluster.node(2).spawn()?;
    let two = Client::new(cluster.urls()[1..].to_vec());
    let log = cluster.node(2).log_path().to_owned();
    eventually("the damage is noticed", || async {
        let said = fs::read_to_string(&log)?;
        ensure!(
            said.contains("this node's log is damaged") && said.contains("waits for a majority")
        );
        Ok(())
    })
    .await?;
    take_nothing(&two).await?;
    cluster.node(1).spawn()?;
    cluster.wait_ready().await?;
    holds_all(&cluster, 60).await?;
    put_all(&client, 60, 70).await?;
    holds_all(&cluster, 70).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_majority_waits_until_its_files_are_back() -> Result<()> {
    let mut cluster = Cluster::start_small_segments(3, CONFIG).await?;
    let client = cluster.client();
    client.create_topic_with(topic(1)).await?;
    put_all(&client, 0, 40).await?;
    let mut backups = Vec::new();
    for id in [1, 2, 3] {
        cluster.node(id).kill();
    }
    for id in [1, 2] {
        let segment = segments(&cluster.data_dir(id))?
            .pop()
            .expect("one at least");
        backups.push((id, segment.clone(), fs::read(&segment)?));
        damage_log(&cluster.data_dir(id))?;
    }
    for id in [1, 2, 3] {
        cluster.node(id).spawn()?;
    }
    for id in [1, 2] {
        let log = cluster.node(id).log_path().to_owned();
        eventually("the node waits and says what to do", || async {
            let said = fs::read_to_string(&log)?;
            ensure!(said.contains("waits for a majority") && said.contains("restore the files"));
            Ok(())
        })
        .await?;
    }
    take_nothing(&client).await?;
    // The operator's way back, as docs/operations.md has it.
    for (id, segment, bytes) in backups {
        cluster.node(id).kill();
        let data = cluster.data_dir(id);
        let aside = fs::read_dir(data.join("damaged"))?
            .next()
            .expect("set aside")?
            .path();
        for entry in fs::read_dir(&aside)? {
            let entry = entry?;
            let to = data.join(entry.file_name());
            fs::remove_dir_all(&to).ok();
            fs::rename(entry.path(), to)?;
        }
        fs::remove_file(data.join("quarantine.json"))?;
        fs::write(segment, bytes)?;
        cluster.node(id).spawn()?;
    }
    cluster.wait_ready().await?;
    holds_all(&cluster, 40).await?;
    put_all(&client, 40, 45).await
}
