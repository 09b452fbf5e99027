//! What the catalog, the coordinators and the disk keep, through one real node.

use std::time::Duration;

use tokio::time::Instant;

use super::path_tests::{fetch, message, put, request, single};
use super::testing::{PATIENCE, topic};
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_groups_commit_lag_and_reset() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(2, 0)).await.unwrap();
    put(broker, "t", &["a", "b", "c", "d"]).await;
    let commit = |queue, offset, allow_rewind| CommitRequest {
        group: "g".to_owned(),
        offsets: vec![OffsetCommit {
            topic: "t".to_owned(),
            queue,
            offset,
        }],
        member: None,
        allow_rewind,
    };
    let unknown = broker.group_offsets("g", None).await;
    assert!(matches!(
        unknown,
        Err(BrokerError::ConsumerGroupNotFound { .. })
    ));
    assert!(broker.commit_offsets(commit(0, 3, false)).await.unwrap()[0].is_ok());
    let back = broker.commit_offsets(commit(0, 1, false)).await.unwrap();
    let conflict = BrokerError::OffsetConflict {
        offset: 1,
        committed: 3,
    };
    assert_eq!(back[0], Err(conflict));
    let beyond = broker.commit_offsets(commit(0, 5, false)).await.unwrap();
    assert!(matches!(
        beyond[0],
        Err(BrokerError::OffsetOutOfRange { end_offset: 4, .. })
    ));
    let nowhere = broker.commit_offsets(commit(7, 0, false)).await.unwrap();
    assert!(matches!(nowhere[0], Err(BrokerError::QueueNotFound { .. })));
    let rows = broker.group_offsets("g", Some("t")).await.unwrap();
    let seen: Vec<_> = rows
        .iter()
        .map(|r| (r.queue, r.offset, r.behind.map(|b| (b.end_offset, b.lag))))
        .collect();
    assert_eq!(seen, [(0, Some(3), Some((4, 1))), (1, None, Some((0, 0)))]);
    assert_eq!(broker.group_offsets("g", None).await.unwrap().len(), 1);

    let reset = |to, dry_run| ResetRequest {
        group: "g".to_owned(),
        topic: "t".to_owned(),
        queue: Some(0),
        to,
        dry_run,
        force: false,
    };
    let dry = broker
        .reset_offsets(reset(ResetTo::ShiftBy(-2), true))
        .await
        .unwrap();
    assert_eq!((dry[0].previous, dry[0].offset), (Some(3), 1));
    let rows = broker.group_offsets("g", Some("t")).await.unwrap();
    assert_eq!(rows[0].offset, Some(3), "a dry run changes nothing");
    broker
        .reset_offsets(reset(ResetTo::Earliest, false))
        .await
        .unwrap();
    let rows = broker.group_offsets("g", Some("t")).await.unwrap();
    let lag = rows[0].behind.map(|behind| behind.lag);
    assert_eq!((rows[0].offset, lag), (Some(0), Some(4)));
    let stamp = broker
        .fetch(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap()
        .messages[0]
        .timestamp_ms;
    assert_eq!(broker.offset_at("t", 0, stamp).await.unwrap(), 0);
    assert_eq!(broker.offset_at("t", 0, u64::MAX).await.unwrap(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_in_a_deleted_topic_is_forgotten() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    for name in ["kept", "gone"] {
        broker.create_topic(name, topic(1, 0)).await.unwrap();
        let commit = CommitRequest {
            group: "g".to_owned(),
            offsets: vec![OffsetCommit {
                topic: name.to_owned(),
                queue: 0,
                offset: 0,
            }],
            member: None,
            allow_rewind: false,
        };
        assert!(broker.commit_offsets(commit).await.unwrap()[0].is_ok());
    }
    let kept = broker.find_topic("kept").await.unwrap().id;
    broker.delete_topic("gone").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let committed = broker.committed("g").await.unwrap();
        let topics: Vec<_> = committed.iter().map(|offset| offset.topic).collect();
        if topics == [kept] {
            return;
        }
        assert!(Instant::now() < deadline, "{topics:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_grow_and_go() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    put(broker, "t", &["a"]).await;
    let grow = TopicPatch {
        queues: Some(3),
        ..TopicPatch::default()
    };
    let grown = broker.update_topic("t", grow).await.unwrap();
    assert!(grown.queues.iter().all(|q| q.leader == Some(1)));
    assert_eq!((grown.config.queues, grown.config.hash_queues), (3, 1));
    broker.delete_topic("t").await.unwrap();
    let gone = broker.produce(request("t", vec![message("b", 0)])).await;
    assert!(matches!(gone, Err(BrokerError::TopicNotFound { .. })));
    let (again, created) = broker.create_topic("t", topic(1, 0)).await.unwrap();
    assert!(created);
    assert_eq!(again.queues[0].end_offset, 0, "another topic of that name");
    let many = broker.create_topic("u", topic(1, 3)).await;
    assert!(matches!(
        many,
        Err(BrokerError::NotEnoughReplicas {
            available: 1,
            required: 3
        })
    ));
    let named = broker.create_topic("_x", topic(1, 1)).await;
    assert!(matches!(named, Err(BrokerError::InvalidName(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_messages_offsets_and_dedupe() {
    let (mut cluster, node) = single().await;
    node.broker.create_topic("t", topic(1, 0)).await.unwrap();
    let numbered = |sequence| ProduceRequest {
        producer: Some(ProducerMark {
            id: (1u64 << 40 | 1).to_string(),
            epoch: 0,
            sequence,
        }),
        ..request("t", vec![message("x", 0)])
    };
    let mut first = Vec::new();
    // More entries than lie between two checkpoints.
    for sequence in 0..40 {
        first = node
            .broker
            .produce(numbered(sequence))
            .await
            .unwrap()
            .results;
    }
    let commit = CommitRequest {
        group: "g".to_owned(),
        offsets: vec![OffsetCommit {
            topic: "t".to_owned(),
            queue: 0,
            offset: 7,
        }],
        member: None,
        allow_rewind: false,
    };
    node.broker.commit_offsets(commit).await.unwrap();
    node.stop().await;
    let node = cluster.start(1).await;
    node.ready().await;
    let again = node.broker.produce(numbered(39)).await.unwrap().results;
    assert_eq!(first, again);
    let found = node
        .broker
        .fetch(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap();
    assert_eq!(found.messages.len(), 40);
    let rows = node.broker.group_offsets("g", Some("t")).await.unwrap();
    assert_eq!(rows[0].offset, Some(7));
}
