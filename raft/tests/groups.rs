//! Groups over real links and real disks, in one process.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_raft::{Flush, HostConfig, LogRetention, ProposeError, RaftEvent};
use support::{GROUP, PANIC, PATIENCE, SYNC, TestCluster, TestNode, eventually, leader, propose};

#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_one_leads_itself_and_comes_back() {
    let mut cluster = TestCluster::new(1);
    let node = cluster.start_all().await.remove(0);
    node.group.wait_leader(PATIENCE).await.unwrap();
    for i in 0..50 {
        propose(&node, &format!("c{i}")).await;
    }
    node.group.read_barrier(PATIENCE).await.unwrap();
    assert_eq!(node.recorder.0.lock().len(), 50);
    node.stop().await;
    let node = cluster.start(1, |_| {}).await;
    node.group.read_barrier(PATIENCE).await.unwrap();
    assert_eq!(node.recorder.0.lock().len(), 50);
    assert_eq!(&propose(&node, "after").await.1[..], b"51");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_applies_the_same() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    let proposals = (0..200).map(|i| {
        let group = first.group.clone();
        async move { group.propose(format!("c{i}").into()).await.unwrap() }
    });
    let ids = futures_util::future::join_all(proposals).await;
    let mut indexes: Vec<u64> = ids.iter().map(|(id, _)| id.index).collect();
    indexes.sort_unstable();
    indexes.dedup();
    assert_eq!(indexes.len(), 200, "every proposal has an index of its own");
    for node in &nodes {
        node.group.read_barrier(PATIENCE).await.unwrap();
        assert_eq!(node.recorder.0.lock().len(), 200, "node {}", node.id);
    }
    let expected = first.group.state_hash().await.unwrap();
    for node in &nodes {
        assert_eq!(
            node.group.state_hash().await.unwrap(),
            expected,
            "node {}",
            node.id
        );
    }
    let follower = nodes.iter().find(|n| n.id != first.id).unwrap();
    let refused = follower.group.propose("no".into()).await.unwrap_err();
    assert!(refused.nobody_took_it());
    assert!(matches!(refused, ProposeError::NotLeader { leader: Some(id) } if id == first.id));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_hands_over_when_it_stops_and_gets_it_back() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let first = leader(&nodes).await.id;
    propose(leader(&nodes).await, "before").await;
    let index = nodes.iter().position(|n| n.id == first).unwrap();
    nodes.remove(index).stop().await;
    let second = leader(&nodes).await;
    assert_ne!(second.id, first);
    propose(second, "without it").await;
    let back = cluster
        .start(first, |config| {
            config.rebalance_after = Duration::from_millis(200)
        })
        .await;
    back.group.read_barrier(PATIENCE).await.unwrap();
    assert_eq!(back.recorder.0.lock().len(), 2);
    for node in nodes {
        node.stop().await;
    }
    back.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_to_a_replica_that_does_not_take_it_leaves_nobody_stuck() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    // Its node lives, so nobody will find it dead; its replica is gone.
    let target = nodes.iter().find(|n| n.id != first.id).unwrap();
    target.host.close_group(GROUP, false).await.unwrap();
    first.group.transfer_leader(target.id).await.unwrap_err();
    let others: Vec<_> = nodes.iter().filter(|n| n.id != target.id).collect();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut done = false;
        for node in others.iter().filter(|n| n.group.is_leader()) {
            let write = node.group.propose(Bytes::from_static(b"after"));
            let write = tokio::time::timeout(Duration::from_secs(1), write).await;
            done |= matches!(write, Ok(Ok(_)));
        }
        if done {
            break;
        }
        assert!(Instant::now() < deadline, "nobody leads who can write");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_gone_from_a_living_node_is_replaced() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let first = leader(&nodes).await;
    propose(first, "before").await;
    first.host.close_group(GROUP, false).await.unwrap();
    let follower = nodes.iter().find(|n| n.id != first.id).unwrap();
    follower.group.read_barrier(PATIENCE).await.unwrap();
    assert_ne!(follower.group.leader(), Some(first.id));
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_ends_by_itself_is_told() {
    let mut cluster = TestCluster::new(1);
    let node = cluster.start_all().await.remove(0);
    node.group.wait_leader(PATIENCE).await.unwrap();
    let mut events = node.host.events();
    let group = node.group.clone();
    tokio::spawn(async move { group.propose(Bytes::from_static(PANIC.as_bytes())).await });
    let failed = async {
        loop {
            if let RaftEvent::Failed { group, .. } = events.recv().await.unwrap() {
                return group;
            }
        }
    };
    let failed = tokio::time::timeout(PATIENCE, failed).await.unwrap();
    assert_eq!(failed, GROUP);
    assert!(node.group.is_closed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_group_is_led_although_the_one_to_begin_is_gone() {
    let mut cluster = TestCluster::new(3);
    let second = cluster.start(2, |_| {}).await;
    let third = cluster.start(3, |_| {}).await;
    let nodes = vec![second, third];
    propose(leader(&nodes).await, "without the first").await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_behind_the_purge_gets_a_snapshot() {
    fill_by_snapshot(1000, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_several_pieces_arrives_whole() {
    fill_by_snapshot(800, 20_000).await;
}

/// The third replica is away while the others apply so many commands of this size, and purge.
async fn fill_by_snapshot(count: usize, bytes: usize) {
    let mut cluster = TestCluster::new(3);
    cluster.retention = LogRetention::StateOnly;
    cluster.checkpoint_every = 100;
    let mut nodes = Vec::new();
    for id in 1..=3 {
        // One leader is to take all commands: it is not handed to the preferred node meanwhile.
        let stay = |config: &mut HostConfig| config.rebalance_after = Duration::from_secs(3600);
        nodes.push(cluster.start(id, stay).await);
    }
    leader(&nodes).await;
    let third = nodes.remove(2);
    third.stop().await;
    let first = leader(&nodes).await;
    for i in 0..count {
        propose(first, &format!("{i:0>bytes$}")).await;
    }
    eventually("the log is purged", || {
        first.group.log().state().purged.is_some()
    })
    .await;
    let third = cluster.start(3, |_| {}).await;
    for node in [&third, &nodes[0]] {
        node.group.read_barrier(PATIENCE).await.unwrap();
    }
    assert_eq!(*third.recorder.0.lock(), *nodes[0].recorder.0.lock());
    assert_eq!(third.recorder.0.lock().len(), count);
    assert!(
        third.group.log().state().purged.is_some(),
        "it came by snapshot"
    );
    for node in nodes {
        node.stop().await;
    }
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspect_tails_do_not_vote_until_caught_up() {
    let mut cluster = TestCluster::new(3);
    cluster.flush = Flush::Async;
    let nodes = cluster.start_all().await;
    for i in 0..10 {
        propose(leader(&nodes).await, &format!("c{i}")).await;
    }
    for node in nodes {
        node.stop().await;
    }
    // One machine crashed: the two sound ones elect, and the suspect catches up.
    let suspect = cluster.start(1, |config| config.tails_suspect = true).await;
    let second = cluster.start(2, |_| {}).await;
    let third = cluster.start(3, |_| {}).await;
    let nodes = vec![suspect, second, third];
    let elected = leader(&nodes).await;
    assert_ne!(elected.id, 1);
    propose(elected, "more").await;
    nodes[0].group.read_barrier(PATIENCE).await.unwrap();
    assert_eq!(nodes[0].recorder.0.lock().len(), 11);
    assert!(nodes.iter().all(|n| !n.group.tail_lost()));
    for node in nodes {
        node.stop().await;
    }
    // All machines crashed: they go on, and say so.
    let mut nodes = Vec::new();
    for id in 1..=3 {
        nodes.push(
            cluster
                .start(id, |config| config.tails_suspect = true)
                .await,
        );
    }
    let elected = leader(&nodes).await;
    assert!(elected.group.tail_lost());
    propose(elected, "on").await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_fills_a_follower_that_lost_its_unsynced_tail() {
    followers_lose_their_tails(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_alone_fills_all_who_lost_their_unsynced_tails() {
    followers_lose_their_tails(2).await;
}

/// The machines of so many of two followers crash; the leader goes on in its term.
async fn followers_lose_their_tails(count: usize) {
    let mut cluster = TestCluster::new(3);
    cluster.flush = Flush::Async;
    let mut nodes = start_with_leader_first(&mut cluster).await;
    let crashed = nodes.drain(1..=count).collect();
    let back = crash(&mut cluster, &nodes[0], crashed).await;
    for node in &back {
        eventually("it is sound", || !node.group.tail_unsettled()).await;
        node.group.read_barrier(PATIENCE).await.unwrap();
        assert_eq!(node.recorder.0.lock().len(), 11, "node {}", node.id);
        assert!(node.damage.lock().is_empty(), "{:?}", node.damage.lock());
    }
    nodes.extend(back);
    propose(&nodes[0], "after").await;
    for node in &nodes {
        node.group.read_barrier(PATIENCE).await.unwrap();
        assert_eq!(node.recorder.0.lock().len(), 12, "node {}", node.id);
    }
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_applied_what_a_majority_lost_is_given_up() {
    let mut cluster = TestCluster::new(3);
    cluster.flush = Flush::Async;
    cluster.checkpoint_every = 4;
    let nodes = start_with_leader_first(&mut cluster).await;
    let ids: Vec<_> = nodes.iter().map(|n| n.id).collect();
    propose(&nodes[0], "kept").await;
    let mut disks = Vec::new();
    for node in &nodes[..2] {
        node.group.read_barrier(PATIENCE).await.unwrap();
        disks.push((node.id, cluster.keep_log(node.id)));
    }
    for i in 0..10 {
        propose(&nodes[0], &format!("lost{i}")).await;
    }
    nodes[2].group.read_barrier(PATIENCE).await.unwrap();
    // The third first: what the others vote for after that is forgotten with their tails.
    for node in nodes.into_iter().rev() {
        node.stop().await;
    }
    let mut nodes = Vec::new();
    for (id, disk) in disks {
        cluster.lose_tail(id, &disk);
        let start = cluster.start(id, |config| config.tails_suspect = true);
        nodes.push(start.await);
    }
    // The third, away for long, kept all of it.
    let elected = leader(&nodes).await;
    assert!(elected.group.tail_lost());
    propose(elected, "other").await;
    let third = cluster.start(ids[2], |_| {}).await;
    eventually("it is given up", || !third.damage.lock().is_empty()).await;
    let recorded = third.recorder.0.lock().clone();
    assert!(recorded.iter().all(|command| command != "other"));
    nodes.push(third);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_be_synced_is_synced_in_an_async_group_too() {
    let mut cluster = TestCluster::new(3);
    cluster.flush = Flush::Async;
    let nodes = cluster.start_all().await;
    let led = leader(&nodes).await;
    let fsyncs = || nodes.iter().map(|n| n.log.stats().fsyncs);
    for _ in 0..50 {
        let before: Vec<u64> = fsyncs().collect();
        propose(led, SYNC).await;
        let synced = fsyncs().zip(&before).filter(|(now, before)| now > before);
        assert!(synced.count() >= 2, "a majority");
    }
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synced_tail_that_is_gone_is_damage_whatever_became_of_the_machine() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = start_with_leader_first(&mut cluster).await;
    let crashed = vec![nodes.remove(1)];
    let back = crash(&mut cluster, &nodes[0], crashed).await.remove(0);
    propose(&nodes[0], "after").await;
    eventually("the damage is noticed", || !back.damage.lock().is_empty()).await;
    assert!(back.recorder.0.lock().len() <= 1, "nothing was sent again");
    nodes.push(back);
    for node in nodes {
        node.stop().await;
    }
}

async fn start_with_leader_first(cluster: &mut TestCluster) -> Vec<TestNode> {
    let mut nodes = cluster.start_all().await;
    let led = leader(&nodes).await.id;
    nodes.sort_by_key(|node| node.id != led);
    nodes
}

/// The leader's followers store eleven commands, of which the machines of these lose ten.
async fn crash(
    cluster: &mut TestCluster,
    leader: &TestNode,
    followers: Vec<TestNode>,
) -> Vec<TestNode> {
    propose(leader, "kept").await;
    let mut disks = Vec::new();
    for node in &followers {
        node.group.read_barrier(PATIENCE).await.unwrap();
        disks.push((node.id, cluster.keep_log(node.id)));
    }
    for i in 0..10 {
        propose(leader, &format!("c{i}")).await;
    }
    for node in &followers {
        node.group.read_barrier(PATIENCE).await.unwrap();
    }
    for node in followers {
        node.stop().await;
    }
    for (id, disk) in &disks {
        cluster.lose_tail(*id, disk);
    }
    let mut back = Vec::new();
    for (id, _) in disks {
        let start = cluster.start(id, |config| config.tails_suspect = true);
        back.push(start.await);
    }
    back
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_leader_tells_a_suspect_tail_that_it_is_whole() {
    let mut cluster = TestCluster::new(3);
    cluster.flush = Flush::Async;
    let mut nodes = start_with_leader_first(&mut cluster).await;
    propose(&nodes[0], "before").await;
    let follower = nodes.remove(1);
    follower.group.read_barrier(PATIENCE).await.unwrap();
    let id = follower.id;
    follower.stop().await;
    let start = cluster.start(id, |config| config.tails_suspect = true);
    nodes.push(start.await);
    eventually("it is sound", || !nodes[2].group.tail_unsettled()).await;
    for node in nodes {
        node.stop().await;
    }
}
