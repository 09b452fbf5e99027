//! A node that has forgotten what it promised does not take part again under its old id.

mod support;

use std::fs;

use anyhow::{Result, ensure};
use support::{Cluster, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_its_log_refuses_to_start() -> Result<()> {
    let mut cluster = Cluster::start(1).await?;
    cluster.client().create_topic("t", 1).await?;
    cluster.node(1).kill();
    fs::remove_dir_all(cluster.data_dir(1).join("log"))?;
    cluster.node(1).spawn()?;
    refuses(&mut cluster, 1, "is missing or empty").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_node_with_an_empty_directory_is_refused_by_the_others() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    cluster.node(2).kill();
    fs::remove_dir_all(cluster.data_dir(2))?;
    cluster.node(2).spawn()?;
    refuses(&mut cluster, 2, "refuses this node").await
}

async fn refuses(cluster: &mut Cluster, id: u64, why: &str) -> Result<()> {
    let node = std::sync::Mutex::new(cluster.node(id));
    eventually("the node ends and says why", || async {
        let mut node = node.lock().unwrap();
        ensure!(!node.is_running(), "it runs");
        let said = node.last_log_lines();
        ensure!(said.contains(why), "{said}");
        Ok(())
    })
    .await
}
