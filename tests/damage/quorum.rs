//! Damage where it would matter most: on the one node that holds what was acknowledged beside the
//! leader, and on a majority.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::files::{At, Spoil, segments, spoil};
use super::matrix::{CONFIG, topic};
use super::support::client::{Client, Produced};
use super::support::{Cluster, eventually};

async fn put(client: &Client, value: &str) -> Result<u64> {
    let body = json!({"messages": [{"value": value, "queue": 0}]});
    match client.produce("t", &body).await {
        Produced::Acked(places) => Ok(places[0].1),
        other => bail!("{other:?}"),
    }
}

async fn put_all(client: &Client, from: usize, to: usize) -> Result<()> {
    for n in from..to {
        eventually("a message is acknowledged", || async {
            ensure!(put(client, &format!("m{n}")).await? == n as u64);
            Ok(())
        })
        .await?;
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
    match put(&two, "never").await {
        Ok(offset) => bail!("acknowledged at {offset} without a sound majority"),
        Err(refused) => println!("refused: {refused:#}"),
    }
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
    if let Ok(offset) = put(&client, "never").await {
        bail!("acknowledged at {offset} without a sound majority");
    }
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
