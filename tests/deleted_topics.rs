//! A topic that was deleted leaves nothing behind, also on a node that was away.

mod support;

use std::fs;

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use support::client::Produced;
use support::{Cluster, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_away_removes_what_was_deleted() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("gone", 3).await?;
    client.create_topic("kept", 1).await?;
    for topic in ["gone", "kept"] {
        let message = json!({"messages": [{"value": "a", "queue": 0}]});
        let produced = client.produce(topic, &message).await;
        ensure!(matches!(produced, Produced::Acked(_)), "{produced:?}");
    }
    let queues = cluster.data_dir(3).join("queues");
    let files = || -> Result<usize> { Ok(fs::read_dir(&queues)?.count()) };
    ensure!(files()? == 4, "{} index files", files()?);
    cluster.node(3).kill();
    let (status, answer) = eventually("the topic is deleted", || {
        client.request(Method::DELETE, "/v1/topics/gone", None)
    })
    .await?;
    ensure!(status.is_success(), "{status} {answer}");
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
