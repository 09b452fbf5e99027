//! A topic that was deleted leaves nothing behind, also on a node that was away.

mod support;

use std::fs;

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use support::client::{Client, Produced};
use support::{Cluster, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_away_removes_what_was_deleted() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("gone", 3).await?;
    client.create_topic("kept", 1).await?;
    for topic in ["gone", "kept"] {
        let message = json!({"messages": [{"value": "a", "queue": 0}]});
        client.store(topic, &message).await?;
    }
    let queues = cluster.data_dir(3).join("queues");
    let files = || -> Result<usize> { Ok(fs::read_dir(&queues)?.count()) };
    eventually("the third node has all queues", || async {
        ensure!(files()? == 4, "{} index files", files()?);
        Ok(())
    })
    .await?;
    cluster.node(3).kill();
    eventually("the topic is deleted", || async {
        let deleted = client.request(Method::DELETE, "/v1/topics/gone", None);
        let (status, answer) = deleted.await?;
        // An answer may have been lost.
        ensure!(status.is_success() || status == 404, "{status} {answer}");
        Ok(())
    })
    .await?;
    cluster.node(3).spawn()?;
    cluster.wait_ready().await?;
    eventually("nothing of the deleted topic is left", || async {
        ensure!(files()? == 1, "{} index files", files()?);
        Ok(())
    })
    .await?;
    let url = cluster.urls().remove(2);
    eventually("the other topic is there", || async {
        let read = client.read_stale(&url, "kept", 0).await?;
        ensure!(read == [(0, "a".to_owned())], "{read:?}");
        Ok(())
    })
    .await
}

/// A topic of the same name is another one, also for a node that slept while it was made: it neither
/// shows what the old one held, nor takes anything for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_slept_knows_the_topic_that_was_made_anew() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    for sleeper in 0..3 {
        let topic = format!("t{sleeper}");
        let path = format!("/v1/topics/{topic}");
        let message = |value: &str| json!({"messages": [{"value": value, "queue": 0}]});
        client.create_topic(&topic, 1).await?;
        for value in ["old 1", "old 2"] {
            let produced = client.produce(&topic, &message(value)).await;
            ensure!(matches!(produced, Produced::Acked(_)), "{produced:?}");
        }
        cluster.nodes[sleeper].pause()?;
        let awake = cluster.nodes.iter().filter(|n| n.id != sleeper as u64 + 1);
        let others = Client::new(awake.map(|n| n.url.clone()).collect());
        eventually("the topic is deleted", || async {
            let (status, answer) = others.request(Method::DELETE, &path, None).await?;
            ensure!(status == 204 || status == 404, "{status} {answer}");
            Ok(())
        })
        .await?;
        eventually("it is made anew", || others.create_topic(&topic, 1)).await?;
        eventually("the new one takes a message", || async {
            let produced = others.produce(&topic, &message("new")).await;
            ensure!(matches!(produced, Produced::Acked(_)), "{produced:?}");
            Ok(())
        })
        .await?;
        cluster.nodes[sleeper].resume()?;
        let woken = client.only(&cluster.nodes[sleeper].url);
        eventually("it answers", || async {
            let messages = format!("{path}/queues/0/messages?offset=0");
            let (status, answer) = woken.request(Method::GET, &messages, None).await?;
            let found = answer["messages"].as_array().into_iter().flatten();
            let old = found.clone().any(|m| m["value"] != "new");
            assert!(!old, "what the deleted topic held: {answer}");
            ensure!(status == 200 && found.count() >= 1, "{status} {answer}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}
