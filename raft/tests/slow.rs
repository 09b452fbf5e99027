//! Groups between nodes that are all slow: what one says takes long to be heard, and nobody is dead.

mod support;

use std::time::Duration;

use bytes::Bytes;
use support::{GROUP, PATIENCE, TestCluster, TestNode, leader, propose};
use tokio::time::{Instant, sleep, timeout};

/// Longer than the promises that followers give to a leader.
const QUIET: Duration = Duration::from_millis(3300);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

async fn stop_all(cluster: &TestCluster, nodes: Vec<TestNode>) {
    cluster.delay.set(Duration::ZERO);
    for node in nodes {
        node.stop().await;
    }
}

/// Whoever leads, has this committed.
async fn propose_anywhere(
    nodes: impl IntoIterator<Item = &TestNode> + Clone,
    command: &'static str,
) {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let leaders = nodes.clone().into_iter();
        for node in leaders.filter(|node| node.group.is_leader()) {
            let write = node.group.propose(Bytes::from_static(command.as_bytes()));
            if let Ok(Ok(_)) = timeout(PATIENCE, write).await {
                return;
            }
        }
        let terms = nodes.clone().into_iter().map(|node| node.group.term());
        let terms: Vec<_> = terms.collect();
        assert!(Instant::now() < deadline, "nobody leads; terms {terms:?}");
        sleep(ms(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn candidates_that_hear_each_other_late_come_to_a_leader() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    cluster.delay.set(ms(400));
    first.host.close_group(GROUP, false).await.unwrap();
    let others: Vec<_> = nodes.iter().filter(|node| node.id != first.id).collect();
    for node in &others {
        let group = node.group.clone();
        tokio::spawn(async move { group.check_leader().await });
    }
    propose_anywhere(others.iter().copied(), "after").await;
    stop_all(&cluster, nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_quiet_writes_again_although_proofs_take_long() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    cluster.delay.set(ms(300));
    sleep(QUIET).await;
    propose_anywhere(&nodes, "after").await;
    stop_all(&cluster, nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_committed_although_each_answer_is_late() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    // In steps: nobody is to be silent for long.
    cluster.delay.set(ms(300));
    propose_anywhere(&nodes, "between").await;
    cluster.delay.set(ms(700));
    propose_anywhere(&nodes, "after").await;
    stop_all(&cluster, nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_prove_their_reads_although_proofs_take_long() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    let follower = nodes.iter().find(|node| node.id != first.id).unwrap();
    cluster.delay.set(ms(300));
    follower.group.read_barrier(PATIENCE).await.unwrap();
    stop_all(&cluster, nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_late_deposes_nobody() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    let term = first.group.term();
    cluster.delay.set(ms(150));
    sleep(QUIET).await;
    let follower = nodes.iter().find(|node| node.id != first.id).unwrap();
    follower.group.check_leader().await;
    assert_eq!(follower.group.leader(), Some(first.id));
    propose(first, "after").await;
    assert_eq!(first.group.term(), term);
    stop_all(&cluster, nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_stays_where_it_is_while_moving_it_would_take_long() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = Vec::new();
    for id in 1..=3 {
        let eager = cluster.start(id, |config| config.rebalance_after = ms(200));
        nodes.push(eager.await);
    }
    support::eventually("it is where it should be", || nodes[0].group.is_leader()).await;
    cluster.delay.set(ms(150));
    // Whether it is over in time is the machine's affair.
    nodes[0].group.transfer_leader(2).await.ok();
    support::eventually("it is moved", || nodes[1].group.is_leader()).await;
    let term = nodes[1].group.term();
    for i in 0..8 {
        propose(&nodes[1], &format!("c{i}")).await;
    }
    assert_eq!(nodes[1].group.term(), term);
    cluster.delay.set(Duration::ZERO);
    support::eventually("it moves once that is quick", || nodes[0].group.is_leader()).await;
    stop_all(&cluster, nodes).await;
}
