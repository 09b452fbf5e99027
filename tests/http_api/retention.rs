//! Retention: what a topic keeps no longer goes, on every replica, and nobody is told anything else.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::support::client::Client;
use crate::support::{Cluster, eventually};

/// Looks often, and has checkpoints to purge up to.
const EAGER: &str =
    "[log]\nsegment_bytes = 33554432\nretention_check_ms = 50\n\n[raft]\ncheckpoint_every = 10\n";
const MESSAGES: &str = "/v1/topics/t/queues/0/messages";

async fn keep(api: &Api, retention: &Value) {
    let patch = json!({ "retention": retention });
    let topic = api.call(Method::PATCH, "/v1/topics/t", &patch).await;
    assert_eq!(&topic.expect(200)["config"]["retention"], retention);
}

async fn earliest(api: &Api) -> u64 {
    let topic = api.get("/v1/topics/t").await.expect(200);
    topic["queues"][0]["earliest_offset"].as_u64().unwrap()
}

async fn until_earliest(api: &Api, at_least: u64) -> u64 {
    eventually("the queue is trimmed", || async {
        let now = earliest(api).await;
        ensure!(now >= at_least, "it begins at {now}");
        Ok(now)
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn by_age_messages_go_and_readers_are_told_where_to_go_on() {
    let mut api = Api::start_with(EAGER).await.unwrap();
    let body = json!({"name": "t", "queues": 1,
        "retention": {"max_age_ms": null, "max_bytes": null}});
    api.post("/v1/topics", &body).await.expect(201);
    api.store("t", 0, &["a", "b", "c"]).await;
    let commit = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 1}]});
    api.call(Method::PUT, "/v1/groups/slow/offsets", &commit)
        .await
        .expect(200);
    keep(&api, &json!({"max_age_ms": 1, "max_bytes": null})).await;
    assert_eq!(until_earliest(&api, 3).await, 3);
    keep(&api, &json!({"max_age_ms": null, "max_bytes": null})).await;

    let gone = api.get(&format!("{MESSAGES}?offset=1")).await;
    let gone = gone.problem(416, "offset_out_of_range");
    assert_eq!(gone["earliest_offset"], 3);
    assert_eq!(gone["end_offset"], 3);
    api.store("t", 0, &["d", "e"]).await;
    let first = api.get(&format!("{MESSAGES}?offset=earliest")).await;
    let first = first.expect(200);
    assert_eq!(first["messages"][0]["value"], "d");
    assert_eq!(first["messages"][0]["offset"], 3);
    assert_eq!(first["earliest_offset"], 3);

    let on = |policy: &str| format!("{MESSAGES}?offset=1&on_out_of_range={policy}");
    api.get(&on("error"))
        .await
        .problem(416, "offset_out_of_range");
    let from = api.get(&on("earliest")).await.expect(200);
    assert_eq!(from["messages"][0]["value"], "d");
    let latest = api.get(&on("latest")).await.expect(200);
    assert_eq!(latest["messages"], json!([]));
    assert_eq!(latest["next_offset"], 5);
    api.get(&on("never")).await.problem(400, "invalid_request");
    let events = api
        .request(Method::GET, &on("earliest"))
        .header("accept", "text/event-stream");
    let mut events = events.send().await.unwrap();
    let piece = events.chunk().await.unwrap().unwrap();
    assert!(
        String::from_utf8_lossy(&piece).starts_with("id: 3"),
        "{piece:?}"
    );

    // A group that never committed has as much before it as there is.
    let offsets = api.get("/v1/groups/g/offsets?topic=t").await.expect(200);
    assert_eq!(offsets["offsets"][0]["lag"], 2);
    // One that had not come so far missed what is gone: that is lag, and no error.
    let lagging = api.get("/v1/groups/slow/offsets").await.expect(200);
    assert_eq!(lagging["offsets"][0]["lag"], 4);
    assert!(lagging["offsets"][0]["lag_ms"].as_u64().unwrap() < 600_000);
    assert_eq!(api.get("/v1/groups/slow").await.expect(200)["lag"], 4);

    api.cluster.node(1).kill();
    api.cluster.node(1).spawn().unwrap();
    api.cluster.wait_ready().await.unwrap();
    assert_eq!(earliest(&api).await, 3);
    let again = api.get(&format!("{MESSAGES}?offset=3")).await.expect(200);
    assert_eq!(again["messages"][1]["value"], "e");
    assert_eq!(api.store("t", 0, &["f"]).await, [5]);
}

#[tokio::test]
async fn by_bytes_the_newest_messages_stay() {
    let api = Api::start_with(EAGER).await.unwrap();
    let body = json!({"name": "t", "queues": 1,
        "retention": {"max_age_ms": null, "max_bytes": 1_000_000}});
    api.post("/v1/topics", &body).await.expect(201);
    let value = "x".repeat(10_000);
    for _ in 0..30 {
        api.store("t", 0, &[value.as_str(); 10]).await;
    }
    // Three megabytes came; what is kept is a megabyte, or a step less.
    let first = until_earliest(&api, 200).await;
    assert!(first < 225, "it begins at {first}");
    let oldest = format!("{MESSAGES}?offset=earliest&max_messages=1");
    let kept = api.get(&oldest).await.expect(200);
    assert_eq!(kept["messages"][0]["offset"], kept["earliest_offset"]);
    keep(&api, &json!({"max_age_ms": null, "max_bytes": 200_000})).await;
    until_earliest(&api, 280).await;
}

/// Bytes of the segments in a node's log.
fn log_bytes(cluster: &Cluster) -> Result<u64> {
    let mut bytes = 0;
    for file in std::fs::read_dir(cluster.data_dir(1).join("log"))? {
        let path = file?.path();
        if path.extension().is_some_and(|ending| ending == "log") {
            // It may have been removed meanwhile.
            bytes += std::fs::metadata(path).map_or(0, |file| file.len());
        }
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_gets_its_space_back_although_quiet_queues_keep_theirs() -> Result<()> {
    let small = EAGER.replace("33554432", "2097152");
    let small = format!("{small}\n[limits]\nmax_message_bytes = 65536\n");
    let mut cluster = Cluster::start_small_segments(1, &small).await?;
    let client = cluster.client();
    for name in ["quiet", "t"] {
        create(&client, name, 1).await?;
    }
    let told = json!({"messages": [{"value": "still here", "queue": 0}]});
    let (status, answer) = client
        .request(Method::POST, "/v1/topics/quiet/messages", Some(&told))
        .await?;
    ensure!(status == 200, "{answer}");
    let value = "x".repeat(50_000);
    let many = vec![json!({"value": value, "queue": 0}); 10];
    for _ in 0..40 {
        let body = json!({ "messages": many });
        client.store("t", &body).await?;
    }
    let full = log_bytes(&cluster)?;
    ensure!(full > 20_000_000, "{full} bytes");
    keep_bytes(&client, Some(1_000_000)).await?;
    let left = eventually("segments are removed", || async {
        let left = log_bytes(&cluster)?;
        ensure!(left <= 10_000_000, "{left} bytes");
        Ok(left)
    })
    .await?;
    ensure!(left > 0);
    let earliest = trimmed(&client, 300).await?;
    for round in ["before a restart", "after it"] {
        let quiet = client
            .get("/v1/topics/quiet/queues/0/messages?offset=0")
            .await?;
        ensure!(
            quiet["messages"][0]["value"] == "still here",
            "{round}: {quiet}"
        );
        let path = format!("{MESSAGES}?offset={earliest}&max_bytes=16000000");
        let kept = client.get(&path).await?;
        ensure!(
            kept["next_offset"] == 400,
            "{round}: {}",
            kept["next_offset"]
        );
        cluster.node(1).kill();
        cluster.node(1).spawn()?;
        cluster.wait_ready().await?;
    }
    Ok(())
}

/// Of every node: what it holds of the queue, equal and purged.
async fn replicas_agree(cluster: &Cluster, at_least: u64, end: u64) -> Result<Vec<u64>> {
    eventually("all replicas are the same and purged", || async {
        // A trim may have been under way when the policy was taken back.
        let earliest = trimmed(&cluster.client(), at_least).await?;
        let mut hashes = Vec::new();
        let mut ids = Vec::new();
        for url in cluster.urls() {
            let client = Client::new(vec![url]);
            let replica = client.get("/v1/topics/t/queues/0/replica").await?;
            let purged = replica["purged_index"].as_u64();
            ensure!(purged > Some(0), "not purged: {replica}");
            hashes.push((
                replica["applied_index"].clone(),
                replica["state_hash"].clone(),
            ));
            ids.push(replica["replica"].as_u64().context("a replica id")?);
            let read = format!("{MESSAGES}?offset={earliest}&consistency=stale&max_messages=10000");
            let found = client.get(&read).await?;
            ensure!(
                found["earliest_offset"] == earliest,
                "{}",
                found["earliest_offset"]
            );
            ensure!(found["end_offset"] == end, "{}", found["end_offset"]);
            let count = found["messages"].as_array().map_or(0, Vec::len) as u64;
            ensure!(count == end - earliest, "{count} messages");
        }
        ensure!(hashes.windows(2).all(|two| two[0] == two[1]), "{hashes:?}");
        Ok(ids)
    })
    .await
}

/// A topic of one queue that keeps everything for now.
async fn create(client: &Client, name: &str, replicas: u64) -> Result<()> {
    let topic = json!({"name": name, "queues": 1, "replicas": replicas, "max_message_bytes": 60_000,
        "retention": {"max_age_ms": null, "max_bytes": null}});
    let what = format!("topic {name} is made");
    eventually(&what, || client.create_topic_with(topic.clone())).await
}

async fn store(client: &Client, from: u64, count: u64) -> Result<()> {
    for number in from..from + count {
        let value = format!("{number:0>1000}");
        let body = json!({"messages": [{"value": value, "queue": 0}]});
        client.store("t", &body).await?;
    }
    Ok(())
}

async fn trimmed(client: &Client, at_least: u64) -> Result<u64> {
    eventually("the queue is trimmed", || async {
        let topic = client.topic("t").await?;
        let earliest = topic["queues"][0]["earliest_offset"].as_u64();
        let earliest = earliest.context("an offset")?;
        ensure!(earliest >= at_least, "it begins at {earliest}");
        Ok(earliest)
    })
    .await
}

async fn keep_bytes(client: &Client, max_bytes: Option<u64>) -> Result<()> {
    let patch = json!({"retention": {"max_age_ms": null, "max_bytes": max_bytes}});
    let (status, answer) = client
        .request(Method::PATCH, "/v1/topics/t", Some(&patch))
        .await?;
    ensure!(status == 200, "{answer}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_away_gets_the_boundary_and_every_retained_message() -> Result<()> {
    let mut cluster = Cluster::start_with(3, EAGER).await?;
    let client = cluster.client();
    create(&client, "t", 3).await?;
    store(&client, 0, 50).await?;
    let leader = client.leader("t", 0).await?;
    let away = if leader == 3 { 2 } else { 3 };
    cluster.node(away).kill();
    let leader_url = cluster.node(leader).url.clone();
    let client = client.only(&leader_url);
    store(&client, 50, 350).await?;
    keep_bytes(&client, Some(150_000)).await?;
    let earliest = trimmed(&client, 200).await?;
    keep_bytes(&client, None).await?;
    purged(&leader_url).await?;
    cluster.node(away).spawn()?;
    cluster.wait_ready().await?;
    let client = cluster.client();
    replicas_agree(&cluster, earliest, 400).await?;
    store(&client, 400, 5).await?;
    replicas_agree(&cluster, earliest, 405).await?;

    // All at once, and nothing comes back of what is gone.
    for id in 1..=3 {
        cluster.node(id).kill();
    }
    for id in 1..=3 {
        cluster.node(id).spawn()?;
    }
    cluster.wait_ready().await?;
    replicas_agree(&cluster, earliest, 405).await?;
    Ok(())
}

async fn purged(url: &str) -> Result<()> {
    eventually("the leader has purged its log", || async {
        let client = Client::new(vec![url.to_owned()]);
        let replica = client.get("/v1/topics/t/queues/0/replica").await?;
        ensure!(replica["purged_index"].as_u64() > Some(0), "{replica}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_without_its_boundary_is_filled_anew() -> Result<()> {
    let mut cluster = Cluster::start_with(3, EAGER).await?;
    let client = cluster.client();
    create(&client, "t", 3).await?;
    store(&client, 0, 400).await?;
    keep_bytes(&client, Some(150_000)).await?;
    let earliest = trimmed(&client, 200).await?;
    keep_bytes(&client, None).await?;
    let before = replicas_agree(&cluster, earliest, 400).await?;
    store(&client, 400, 20).await?;

    let damaged = 2;
    cluster.node(damaged).kill();
    let boundary = oldest_snapshot(&cluster.data_dir(damaged).join("snapshots"))?;
    let mut bytes = std::fs::read(&boundary)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&boundary, bytes)?;
    cluster.node(damaged).spawn()?;
    cluster.wait_ready().await?;
    eventually("a new replica took the damaged one's place", || async {
        let after = replicas_agree(&cluster, earliest, 420).await?;
        ensure!(after[1] != before[1], "{after:?}");
        Ok(())
    })
    .await
}

/// Of the queues' groups: they come after the catalog and the coordinators.
fn oldest_snapshot(dir: &Path) -> Result<std::path::PathBuf> {
    let mut found = Vec::new();
    for group in std::fs::read_dir(dir)? {
        let group = group?.path();
        let name = group.file_name().and_then(|name| name.to_str());
        let number: u64 = name.context("a name")?.parse()?;
        if number >= 1024 {
            for file in std::fs::read_dir(group)? {
                found.push(file?.path());
            }
        }
    }
    found.sort();
    found.into_iter().next().context("a snapshot of a queue")
}
