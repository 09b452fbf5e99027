//! A queue's index and the coordinators' records are derived from the log: whatever happens to
//! their files, nothing is lost and readers get what was acknowledged.

mod support;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::json;
use support::client::{Client, Produced};
use support::{Cluster, eventually};

const MESSAGES: usize = 300;

async fn fill(client: &Client) -> Result<Vec<(u64, String)>> {
    client.create_topic("t", 1).await?;
    let mut values = Vec::new();
    for n in 0..MESSAGES {
        let value = format!("message {n}");
        let body = json!({"messages": [{"value": value, "queue": 0}]});
        let places = match client.produce("t", &body).await {
            Produced::Acked(places) => places,
            other => anyhow::bail!("not acknowledged: {other:?}"),
        };
        ensure!(places == [(0, n as u64)]);
        values.push((n as u64, value));
    }
    Ok(values)
}

fn index_file(cluster: &Cluster) -> Result<PathBuf> {
    let mut files = fs::read_dir(cluster.data_dir(1).join("queues"))?;
    let file = files.next().context("there is no index file")??;
    Ok(file.path())
}

async fn reads_all(cluster: &Cluster, values: &[(u64, String)], what: &str) -> Result<()> {
    let client = cluster.client();
    let url = cluster.urls().remove(0);
    eventually(what, || async {
        let read = client.read_stale(&url, "t", 0).await?;
        ensure!(read == values, "{} messages instead", read.len());
        Ok(())
    })
    .await
    .with_context(|| cluster.nodes[0].last_log_lines())
}

/// Spoils the index of a node that was killed, starts it again, and reads everything.
async fn survives(what: &str, spoil: impl Fn(&PathBuf) -> Result<()>) -> Result<()> {
    // Small enough that checkpoints stand on the index which is spoiled.
    let mut cluster = Cluster::start_with(
        1,
        "[log]\nsegment_bytes = 33554432\n\n[raft]\ncheckpoint_every = 64\n",
    )
    .await?;
    let values = fill(&cluster.client()).await?;
    cluster.node(1).kill();
    let index = index_file(&cluster)?;
    spoil(&index)?;
    cluster.node(1).spawn()?;
    cluster.wait_ready().await?;
    reads_all(&cluster, &values, what).await?;
    // And again from what is on disk now.
    cluster.node(1).kill();
    cluster.node(1).spawn()?;
    cluster.wait_ready().await?;
    reads_all(&cluster, &values, what).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_was_deleted() -> Result<()> {
    survives("a deleted index is rebuilt", |index| {
        Ok(fs::remove_file(index)?)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_without_a_header() -> Result<()> {
    survives("an index without a header is rebuilt", |index| {
        let mut bytes = fs::read(index)?;
        bytes[..1024].fill(0xff);
        Ok(fs::write(index, bytes)?)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_with_a_damaged_record() -> Result<()> {
    survives("an index with a damaged record is rebuilt", |index| {
        let mut bytes = fs::read(index)?;
        // In the hundredth record: 1 KiB of headers, 40 bytes a record.
        let place = 1024 + 99 * 40 + 8;
        ensure!(bytes.len() > place, "only {} bytes", bytes.len());
        bytes[place] ^= 0xff;
        Ok(fs::write(index, bytes)?)
    })
    .await
}

/// Spoils the coordinators' records of a node that was killed, and asks for a committed offset.
async fn offsets_survive(spoil: impl Fn(&PathBuf) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    let client = cluster.client();
    fill(&client).await?;
    let path = "/v1/groups/g/offsets";
    for offset in [17, 42] {
        let commit = json!({"offsets": [{"topic": "t", "queue": 0, "offset": offset}]});
        let (status, answer) = client.request(Method::PUT, path, Some(&commit)).await?;
        ensure!(status.is_success(), "{status} {answer}");
    }
    cluster.node(1).kill();
    spoil(&cluster.data_dir(1).join("derived"))?;
    cluster.node(1).spawn()?;
    cluster.wait_ready().await?;
    let committed = client.get(&format!("{path}?topic=t")).await?;
    let text = committed.to_string();
    ensure!(text.contains(r#""offset":42"#), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_deleted() -> Result<()> {
    offsets_survive(|records| Ok(fs::remove_dir_all(records)?)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_overwritten() -> Result<()> {
    offsets_survive(|records| {
        for file in ["db", "conf"] {
            let file = records.join(file);
            let bytes = fs::read(&file)?;
            fs::write(&file, vec![0x5a; bytes.len()])?;
        }
        Ok(())
    })
    .await
}

/// Blocks of the key index have this many offsets.
const BLOCK: usize = 65_536;
const KEYS: usize = 1000;

/// One full block of messages with keys, and some more.
async fn fill_a_block(client: &Client) -> Result<()> {
    client.create_topic("t", 1).await?;
    for first in (0..BLOCK + 2000).step_by(4000) {
        let message = |n: usize| json!({"value": n.to_string(), "key": format!("k{}", n % KEYS)});
        let messages: Vec<_> = (first..first + 4000).map(message).collect();
        let places = client.store("t", &json!({"messages": messages})).await?;
        ensure!(places[0] == (0, first as u64));
    }
    Ok(())
}

async fn offsets_of_key(client: &Client, key: usize) -> Result<Vec<u64>> {
    let path = format!("/v1/topics/t/messages?key=k{key}&max_messages=1000");
    let found = client.get(&path).await?;
    ensure!(found["more"] == false, "{found}");
    let messages = found["messages"].as_array().context("messages")?;
    let offset = |message: &serde_json::Value| message["offset"].as_u64().context("offset");
    messages.iter().map(offset).collect()
}

/// The one file of the key index, once it is there.
async fn keys_file(cluster: &Cluster) -> Result<PathBuf> {
    let keys = cluster.data_dir(1).join("keys");
    eventually("a block of keys is built", || async {
        let queue = fs::read_dir(&keys)?.next().context("no queue")??;
        let mut files = fs::read_dir(queue.path())?.flatten();
        let built = files.find(|f| f.path().extension().is_some_and(|e| e == "keys"));
        Ok(built.context("no block")?.path())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_index_that_was_deleted_overwritten_or_damaged() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    let client = cluster.client();
    fill_a_block(&client).await?;
    let total = (BLOCK + 2000).next_multiple_of(4000);
    let of_key = |key: usize| (key as u64..total as u64).step_by(KEYS).collect::<Vec<_>>();
    ensure!(
        offsets_of_key(&client, 17).await? == of_key(17),
        "without an index"
    );
    let file = keys_file(&cluster).await?;
    let sound = fs::read(&file)?;
    // 12 bytes a key, in pages.
    ensure!(
        sound.len() == (1 + BLOCK.div_ceil(340)) * 4096,
        "{} bytes",
        sound.len()
    );
    ensure!(
        offsets_of_key(&client, 17).await? == of_key(17),
        "with an index"
    );
    // A running node notices when it reads, answers from the messages, and builds it again.
    let spoil: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.truncate(5000),
        |bytes| bytes[100] ^= 1,
        |bytes| bytes.iter_mut().skip(4096).for_each(|b| *b = !*b),
        |bytes| bytes.clear(),
    ];
    for (n, spoil) in spoil.iter().enumerate() {
        let mut bytes = sound.clone();
        spoil(&mut bytes);
        fs::write(&file, &bytes)?;
        ensure!(offsets_of_key(&client, n).await? == of_key(n), "spoilt {n}");
        eventually("the block is built again", || async {
            ensure!(fs::read(&file)?[4096..] == sound[4096..], "not yet");
            Ok(())
        })
        .await?;
        ensure!(
            offsets_of_key(&client, n).await? == of_key(n),
            "built again {n}"
        );
    }
    // And one that starts again on a spoilt one, or on none.
    for n in [1, 2] {
        cluster.node(1).kill();
        match n {
            1 => fs::write(&file, &sound[..sound.len() / 2])?,
            _ => fs::remove_file(&file)?,
        }
        cluster.node(1).spawn()?;
        cluster.wait_ready().await?;
        ensure!(
            offsets_of_key(&client, 999).await? == of_key(999),
            "restarted {n}"
        );
        keys_file(&cluster).await?;
        ensure!(
            offsets_of_key(&client, 999).await? == of_key(999),
            "and built {n}"
        );
    }
    // Nothing of it is left when the topic is deleted.
    client.request(Method::DELETE, "/v1/topics/t", None).await?;
    eventually("the key index is gone", || async {
        ensure!(!file.exists(), "still there");
        Ok(())
    })
    .await
}
