//! The paths between nodes: three brokers in one process, over real links.

use std::time::Duration;

use super::path_tests::{fetch, message, put, request, texts};
use super::testing::{PATIENCE, TestCluster, eventually, topic};
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_answers_anything() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    // One replica each: at most one node has the queue that is asked for.
    let (created, _) = nodes[0]
        .broker
        .create_topic("t", topic(3, 1))
        .await
        .unwrap();
    let leaders: std::collections::BTreeSet<_> = created.queues.iter().map(|q| q.leader).collect();
    assert_eq!(leaders.len(), 3, "spread over the nodes");
    for (n, node) in nodes.iter().enumerate() {
        for queue in 0..3 {
            let text = format!("{n}");
            let answer = node
                .broker
                .produce(request("t", vec![message(&text, queue)]))
                .await;
            let stored = answer.unwrap().results.remove(0).unwrap();
            assert_eq!(stored.offset, Some(n as u64));
        }
    }
    for node in &nodes {
        for queue in 0..3 {
            let found = node
                .broker
                .fetch(fetch("t", queue, StartAt::Earliest))
                .await
                .unwrap();
            assert_eq!(texts(&found), ["0", "1", "2"]);
            let latest = node
                .broker
                .fetch(fetch("t", queue, StartAt::Latest))
                .await
                .unwrap();
            assert_eq!(latest.next_offset, 3);
            assert_eq!(node.broker.offset_at("t", queue, 0).await.unwrap(), 0);
        }
        let described = node.broker.topic("t").await.unwrap();
        assert!(
            described
                .queues
                .iter()
                .all(|q| q.end_offset == 3 && q.in_sync.len() == 1)
        );
        assert_eq!(node.broker.cluster().await.unwrap().queues_leaderless, 0);
    }
    nodes[1].broker.delete_topic("t").await.unwrap();
    for node in &nodes {
        let gone = node.broker.topic("t").await;
        assert!(matches!(gone, Err(BrokerError::TopicNotFound { .. })));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_message_is_seen_on_every_node_and_outlives_its_leader() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let (created, _) = nodes[0]
        .broker
        .create_topic("t", topic(1, 3))
        .await
        .unwrap();
    for n in 0..30 {
        let text = n.to_string();
        let stored = put(&nodes[n % 3].broker, "t", &[&text]).await;
        let offset = stored[0].offset.unwrap();
        let reader = &nodes[(n + 1) % 3].broker;
        let found = reader
            .fetch(fetch("t", 0, StartAt::Offset(offset)))
            .await
            .unwrap();
        assert_eq!(texts(&found), [text]);
    }
    let leader = created.queues[0].leader.unwrap();
    let other = nodes
        .iter()
        .map(|n| n.broker.node_id())
        .find(|n| *n != leader)
        .unwrap();
    // Whether it is over in time is the machine's affair.
    nodes[0].broker.transfer_leader("t", 0, other).await.ok();
    eventually("the leader moved", || async {
        nodes[0].broker.topic("t").await.unwrap().queues[0].leader == Some(other)
    })
    .await;
    nodes.remove(other as usize - 1).stop().await;
    let written = tokio::time::timeout(PATIENCE, async {
        loop {
            let answer = nodes[0]
                .broker
                .produce(request("t", vec![message("after", 0)]))
                .await;
            if let Ok(stored) = &answer.unwrap().results[0] {
                return stored.clone();
            }
        }
    });
    let stored = written.await.unwrap();
    assert!(stored.offset.unwrap() >= 30);
    for node in &nodes {
        let mut whole = fetch("t", 0, StartAt::Earliest);
        whole.max_messages = 30;
        let found = node.broker.fetch(whole).await.unwrap();
        let expected: Vec<_> = (0..30).map(|n| n.to_string()).collect();
        assert_eq!(texts(&found), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_follower_of_a_quiet_queue_applies_its_log_unasked() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let (created, _) = nodes[0]
        .broker
        .create_topic("t", topic(1, 3))
        .await
        .unwrap();
    put(&nodes[0].broker, "t", &["a", "b"]).await;
    let leader = created.queues[0].leader.unwrap();
    let follower = (2..=3).find(|n| *n != leader).unwrap();
    nodes.remove(follower as usize - 1).stop().await;
    eventually("the follower is known to be down", || async {
        let cluster = nodes[0].broker.cluster().await.unwrap();
        let states = cluster.nodes.iter();
        states
            .filter(|n| n.id == follower)
            .all(|n| n.state == crate::broker::NodeState::Down)
    })
    .await;
    let refused = nodes[0].broker.transfer_leader("t", 0, follower).await;
    assert!(
        matches!(refused, Err(BrokerError::CannotLead { node, .. }) if node == follower),
        "{refused:?}"
    );
    // Nothing is written from here on, so nothing but itself brings the follower up to date.
    let back = cluster.start(follower).await;
    back.ready().await;
    let mut stale = fetch("t", 0, StartAt::Earliest);
    stale.consistency = Consistency::Stale;
    eventually("the follower has applied its log", || async {
        texts(&back.broker.fetch(stale.clone()).await.unwrap()) == ["a", "b"]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_show_the_last_message_of_a_queue_gone_quiet() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    nodes[0]
        .broker
        .create_topic("t", topic(1, 3))
        .await
        .unwrap();
    put(&nodes[0].broker, "t", &["last"]).await;
    let mut stale = fetch("t", 0, StartAt::Earliest);
    stale.consistency = Consistency::Stale;
    for node in &nodes {
        eventually("the follower knows that it is committed", || async {
            texts(&node.broker.fetch(stale.clone()).await.unwrap()) == ["last"]
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_in_every_answer_on_every_node() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let topic = topic(1, 3);
    nodes[0].broker.create_topic("t", topic).await.unwrap();
    let mut stored = Vec::new();
    for n in 0..200 {
        let text = format!("{n}");
        put(&nodes[n % 3].broker, "t", &[&text]).await;
        stored.push(text);
        // From the beginning: there is something to answer with, even where the newest is not yet.
        let mut all = fetch("t", 0, StartAt::Earliest);
        all.max_messages = 1000;
        let found = nodes[(n + 1) % 3].broker.fetch(all).await.unwrap();
        assert_eq!(texts(&found), stored);
        assert_eq!(found.end_offset, stored.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_left_alone_shows_nothing_that_is_not_committed() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let (created, _) = nodes[0]
        .broker
        .create_topic("t", topic(1, 3))
        .await
        .unwrap();
    let leader = created.queues[0].leader.unwrap();
    let left = nodes.remove(leader as usize - 1);
    put(&left.broker, "t", &["committed"]).await;
    // At once: a leader that hears of nobody soon takes no more writes.
    futures_util::future::join_all(nodes.into_iter().map(|node| node.stop())).await;
    let broker = left.broker.clone();
    let alone = request("t", vec![message("alone", 0)]);
    let writing = tokio::spawn(async move { broker.produce(alone).await });
    while !writing.is_finished() {
        let mut end = fetch("t", 0, StartAt::Offset(1));
        end.consistency = Consistency::Stale;
        let found = left.broker.fetch(end).await.unwrap();
        assert_eq!(texts(&found), Vec::<String>::new());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answer = writing.await.unwrap().unwrap();
    assert!(answer.results[0].is_err(), "{answer:?}");
}
