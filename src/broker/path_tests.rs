//! The paths through one real node: real log, real Raft groups, real link.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quorate_storage::LogId;
use quorate_storage::batch::{BatchBuilder, BatchView, RecordInput};
use quorate_storage::key_index::KeyEntry;
use xxhash_rust::xxh3::xxh3_64;

use super::testing::{TestCluster, TestNode, topic};
use super::*;

pub(super) async fn single() -> (TestCluster, TestNode) {
    let mut cluster = TestCluster::new(1);
    let node = cluster.start_all().await.remove(0);
    (cluster, node)
}

pub(super) fn message(text: &str, queue: u32) -> NewMessage {
    NewMessage {
        value: Some(Bytes::copy_from_slice(text.as_bytes())),
        queue: Some(queue),
        ..NewMessage::default()
    }
}

pub(super) fn request(topic: &str, messages: Vec<NewMessage>) -> ProduceRequest {
    ProduceRequest {
        topic: topic.to_owned(),
        messages,
        producer: None,
        idempotency_key: None,
    }
}

pub(super) fn fetch(topic: &str, queue: u32, start: StartAt) -> FetchRequest {
    FetchRequest {
        topic: topic.to_owned(),
        queue,
        start,
        max_messages: 100,
        max_bytes: 1 << 20,
        wait_ms: 0,
        selection: Selection::default(),
        consistency: Consistency::Linearizable,
    }
}

pub(super) async fn put(broker: &Broker, topic: &str, texts: &[&str]) -> Vec<Stored> {
    let messages = texts.iter().map(|t| message(t, 0)).collect();
    let answer = broker.produce(request(topic, messages)).await.unwrap();
    answer.results.into_iter().map(Result::unwrap).collect()
}

pub(super) fn texts(answer: &FetchAnswer) -> Vec<String> {
    let value = |m: &Message| String::from_utf8(m.value.clone().unwrap().to_vec()).unwrap();
    answer.messages.iter().map(value).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_fetched_in_order_with_its_id() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    let (described, created) = broker.create_topic("t", topic(2, 0)).await.unwrap();
    assert!(created);
    assert_eq!(described.queues.len(), 2);
    assert_eq!(described.queues[0].leader, Some(1));
    assert_eq!(described.queues[0].in_sync, [1]);
    let (_, created) = broker.create_topic("t", topic(2, 0)).await.unwrap();
    assert!(!created);
    let conflict = broker.create_topic("t", topic(3, 0)).await;
    assert!(matches!(conflict, Err(BrokerError::TopicExists { .. })));

    let first = put(broker, "t", &["a", "b"]).await;
    let second = put(broker, "t", &["c"]).await;
    let offsets: Vec<_> = first
        .iter()
        .chain(&second)
        .map(|s| s.offset.unwrap())
        .collect();
    assert_eq!(offsets, [0, 1, 2]);
    let found = broker
        .fetch(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap();
    assert_eq!(texts(&found), ["a", "b", "c"]);
    assert_eq!(
        (found.next_offset, found.earliest_offset, found.end_offset),
        (3, 0, 3)
    );
    let ids: Vec<_> = found
        .messages
        .iter()
        .map(|m| m.message_id.clone())
        .collect();
    let acked: Vec<_> = first
        .iter()
        .chain(&second)
        .map(|s| s.message_id.clone())
        .collect();
    assert_eq!(ids, acked);
    assert_eq!(broker.topic("t").await.unwrap().queues[0].end_offset, 3);

    // From the middle of a batch, bounded.
    let mut middle = fetch("t", 0, StartAt::Offset(1));
    middle.max_bytes = 1;
    let found = broker.fetch(middle).await.unwrap();
    assert_eq!(
        (texts(&found), found.next_offset),
        (vec!["b".to_owned()], 2)
    );
    let latest = broker.fetch(fetch("t", 0, StartAt::Latest)).await.unwrap();
    assert_eq!((latest.messages.len(), latest.next_offset), (0, 3));
    let beyond = broker.fetch(fetch("t", 0, StartAt::Offset(4))).await;
    assert_eq!(
        beyond.unwrap_err(),
        BrokerError::OffsetOutOfRange {
            offset: 4,
            earliest_offset: 0,
            end_offset: 3
        }
    );
    let mut stale = fetch("t", 0, StartAt::Offset(4));
    stale.consistency = Consistency::Stale;
    assert!(broker.fetch(stale).await.unwrap().messages.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_key_index_names_is_compared_with_the_key() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    let keyed = |key: &str| NewMessage {
        key: Some(key.to_owned()),
        ..message(key, 0)
    };
    let messages = vec![keyed("a"), keyed("b"), keyed("a")];
    broker.produce(request("t", messages)).await.unwrap();
    // As if the keys had the same hash.
    let queue = broker.local.queues().remove(0);
    let hash = xxh3_64(b"a");
    let entries = (0..3).map(|offset| KeyEntry { hash, offset });
    let applied = queue.group.applied().unwrap();
    queue.keys.build(0, applied, entries.collect()).unwrap();
    assert_eq!(queue.keys.find(0, hash), Some(vec![0, 1, 2]));
    let lookup = LookupRequest {
        topic: "t".to_owned(),
        key: Some("a".to_owned()),
        max_messages: 10,
        ..LookupRequest::default()
    };
    let found = broker.lookup(&lookup).await.unwrap();
    let offsets: Vec<_> = found.messages.iter().map(|m| m.offset).collect();
    assert_eq!(offsets, [0, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_concurrent_writers_get_dense_offsets() {
    let (_cluster, node) = single().await;
    node.broker.create_topic("t", topic(1, 0)).await.unwrap();
    let writers = (0..16).map(|writer| {
        let broker = node.broker.clone();
        tokio::spawn(async move {
            let mut offsets = Vec::new();
            for n in 0..20 {
                let text = format!("{writer}-{n}");
                offsets.push(put(&broker, "t", &[&text]).await[0].offset.unwrap());
            }
            assert!(offsets.is_sorted(), "in the order of acknowledgement");
            offsets
        })
    });
    let mut all = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        all.extend(writer.await.unwrap());
    }
    all.sort_unstable();
    assert_eq!(all, (0..320).collect::<Vec<_>>());
    let mut whole = fetch("t", 0, StartAt::Earliest);
    whole.max_messages = 1000;
    let found = node.broker.fetch(whole).await.unwrap();
    let offsets: Vec<_> = found.messages.iter().map(|m| m.offset).collect();
    assert_eq!(offsets, all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_are_stored_once_and_old_epochs_are_fenced_at_once() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    let one = broker.register_producer(Some("p")).await.unwrap();
    let numbered = |identity: &ProducerIdentity, sequence| ProduceRequest {
        producer: Some(ProducerMark {
            id: identity.id.clone(),
            epoch: identity.epoch,
            sequence,
        }),
        ..request("t", vec![message("x", 0)])
    };
    let first = broker.produce(numbered(&one, 0)).await.unwrap().results;
    let again = broker.produce(numbered(&one, 0)).await.unwrap().results;
    assert_eq!(first, again);
    let gap = broker.produce(numbered(&one, 2)).await.unwrap().results;
    assert!(matches!(
        gap[0],
        Err(BrokerError::OutOfOrderSequence { expected: 1, .. })
    ));
    let two = broker.register_producer(Some("p")).await.unwrap();
    assert_eq!((&two.id, two.epoch), (&one.id, 1));
    let fenced = broker.produce(numbered(&one, 1)).await.unwrap().results;
    assert!(matches!(
        fenced[0],
        Err(BrokerError::FencedProducer { current: 1, .. })
    ));
    let fresh = broker.produce(numbered(&two, 0)).await.unwrap().results;
    assert_eq!(fresh[0].as_ref().unwrap().offset, Some(1));
    let found = broker
        .fetch(fetch("t", 0, StartAt::Offset(1)))
        .await
        .unwrap();
    let mark = found.messages[0].producer.clone().unwrap();
    assert_eq!((mark.id, mark.epoch, mark.sequence), (two.id, 1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_answers_the_first_answer_again() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(4, 0)).await.unwrap();
    let keyed = |text: &str| ProduceRequest {
        idempotency_key: Some("k".to_owned()),
        ..request(
            "t",
            vec![NewMessage {
                queue: None,
                ..message(text, 0)
            }],
        )
    };
    let first = broker.produce(keyed("a")).await.unwrap().results;
    let again = broker.produce(keyed("a")).await.unwrap().results;
    assert_eq!(first, again);
    let other = broker.produce(keyed("b")).await.unwrap().results;
    assert!(matches!(other[0], Err(BrokerError::InvalidRequest(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_batches_go_in_and_come_out_as_they_are() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    put(broker, "t", &["a", "b"]).await;
    let raw = broker
        .fetch_raw(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap();
    assert_eq!(raw.next_offset, 2);
    let body: Bytes = raw.batches.concat().into();
    let stored = broker
        .produce_batches("t", 0, body, None)
        .await
        .unwrap()
        .results;
    let offsets: Vec<_> = stored.iter().map(|r| r.as_ref().unwrap().offset).collect();
    assert_eq!(offsets, [Some(2), Some(3)]);
    let raw = broker
        .fetch_raw(fetch("t", 0, StartAt::Offset(3)))
        .await
        .unwrap();
    let view = BatchView::parse(raw.batches.concat().into()).unwrap();
    assert_eq!((view.base_offset(), view.record_count()), (2, 2));
    let rubbish = broker
        .produce_batches("t", 0, Bytes::from_static(b"rubbish"), None)
        .await;
    assert!(matches!(rubbish, Err(BrokerError::InvalidRequest(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_batches_of_a_producer_keep_to_what_is_remembered() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    let id = broker.register_producer(None).await.unwrap().id;
    let id: i64 = id.parse().unwrap();
    let batches = |id: i64, sequences: std::ops::Range<i32>| -> Bytes {
        let each = sequences.map(|sequence| {
            let mut batch = BatchBuilder::new().producer(id, 0, sequence);
            batch.push(RecordInput::default());
            batch.finish()
        });
        each.collect::<Vec<_>>().concat().into()
    };
    let store = |body| broker.produce_batches("t", 0, body, None);
    let refused = store(batches(id, 0..6)).await;
    assert!(matches!(refused, Err(BrokerError::InvalidRequest(_))));
    let offsets = |answer: ProduceAnswer| -> Vec<_> {
        let each = answer.results.into_iter();
        each.map(|stored| stored.unwrap().offset.unwrap()).collect()
    };
    let first = store(batches(id, 0..5)).await.unwrap();
    assert_eq!(offsets(first), [0, 1, 2, 3, 4]);
    let again = store(batches(id, 0..5)).await.unwrap();
    assert_eq!(offsets(again), [0, 1, 2, 3, 4]);
    // No coordinator has such a number, so none can have given these.
    for id in [0, i64::MAX] {
        let refused = store(batches(id, 0..1)).await;
        assert!(
            matches!(refused, Err(BrokerError::InvalidRequest(_))),
            "{id}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_poll_is_answered_by_the_next_message_and_filters_move_on() {
    let (_cluster, node) = single().await;
    let broker = node.broker.clone();
    broker.create_topic("t", topic(1, 0)).await.unwrap();
    let mut waiting = fetch("t", 0, StartAt::Latest);
    waiting.wait_ms = 30_000;
    waiting.selection = Selection::parse(Some("wanted"), None).unwrap();
    let poll = tokio::spawn({
        let broker = broker.clone();
        async move { broker.fetch(waiting).await.unwrap() }
    });
    let tagged = |text: &str, tag: &str| NewMessage {
        tag: Some(tag.to_owned()),
        headers: BTreeMap::from([("h".to_owned(), "v".to_owned())]),
        ..message(text, 0)
    };
    // Latest may be any end from 0 on, so the one that is waited for comes until it is found.
    let found = loop {
        broker
            .produce(request("t", vec![tagged("no", "other")]))
            .await
            .unwrap();
        broker
            .produce(request("t", vec![tagged("yes", "wanted")]))
            .await
            .unwrap();
        if poll.is_finished() {
            break poll.await.unwrap();
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(texts(&found)[0], "yes");
    assert_eq!(found.messages[0].tag.as_deref(), Some("wanted"));
    assert_eq!(found.messages[0].headers["h"], "v");

    let mut nothing = fetch("t", 0, StartAt::Earliest);
    nothing.selection = Selection::parse(Some("absent"), None).unwrap();
    let skipped = broker.fetch(nothing).await.unwrap();
    assert!(skipped.messages.is_empty());
    assert_eq!(skipped.next_offset, skipped.end_offset);
    let mut idle = fetch("t", 0, StartAt::Latest);
    idle.wait_ms = 20;
    assert!(broker.fetch(idle).await.unwrap().messages.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_over_many_queues_waits_for_any_of_them() {
    let (_cluster, node) = single().await;
    let broker: Arc<Broker> = node.broker.clone();
    broker.create_topic("t", topic(2, 0)).await.unwrap();
    let from = |topic: &str, queue| QueueFetch {
        topic: topic.to_owned(),
        queue,
        start: StartAt::Offset(0),
        selection: Selection::default(),
    };
    let many = |wait_ms| MultiFetchRequest {
        queues: vec![from("t", 0), from("t", 1), from("no", 0)],
        max_messages: 10,
        max_bytes: 1 << 20,
        wait_ms,
        consistency: Consistency::Linearizable,
    };
    let with_error = broker.fetch_many(many(0)).await.unwrap();
    assert!(matches!(
        with_error[2],
        Err(BrokerError::TopicNotFound { .. })
    ));
    let mut two = many(30_000);
    two.queues.pop();
    let poll = tokio::spawn({
        let broker = broker.clone();
        async move { broker.fetch_many(two).await.unwrap() }
    });
    broker
        .produce(request("t", vec![message("x", 1)]))
        .await
        .unwrap();
    let found = tokio::time::timeout(Duration::from_secs(20), poll)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(found[0].as_ref().unwrap().messages.len(), 0);
    assert_eq!(texts(found[1].as_ref().unwrap()), ["x"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_over_many_queues_ends_when_it_is_full_and_says_where_the_others_stand() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    let queues = 20;
    broker.create_topic("t", topic(queues, 0)).await.unwrap();
    for queue in 0..queues {
        let three = vec![
            message("x", queue),
            message("x", queue),
            message("x", queue),
        ];
        broker.produce(request("t", three)).await.unwrap();
    }
    let from = |queue: u32| QueueFetch {
        topic: "t".to_owned(),
        queue,
        start: match queue {
            19 => StartAt::Latest,
            _ => StartAt::Earliest,
        },
        selection: Selection::default(),
    };
    let asked = MultiFetchRequest {
        queues: (0..queues).map(from).collect(),
        max_messages: 5,
        max_bytes: 1 << 20,
        wait_ms: 0,
        consistency: Consistency::Linearizable,
    };
    let found = broker.fetch_many(asked).await.unwrap();
    let found: Vec<_> = found.into_iter().map(Result::unwrap).collect();
    let counts: Vec<_> = found.iter().map(|a| a.messages.len()).collect();
    assert_eq!(counts[..3], [3, 2, 0]);
    assert_eq!(counts.iter().sum::<usize>(), 5);
    for (queue, answer) in (0..).zip(&found) {
        let goes_on = match queue {
            0 | 19 => 3,
            1 => 2,
            _ => 0,
        };
        assert_eq!(answer.next_offset, goes_on, "{queue}");
        assert_eq!((answer.queue, answer.end_offset), (queue, 3));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_over_many_queues_waits_for_what_its_filters_take() {
    let (_cluster, node) = single().await;
    let broker: Arc<Broker> = node.broker.clone();
    broker.create_topic("t", topic(2, 0)).await.unwrap();
    let from = |queue| QueueFetch {
        topic: "t".to_owned(),
        queue,
        start: StartAt::Latest,
        selection: Selection::parse(Some("wanted"), None).unwrap(),
    };
    let asked = MultiFetchRequest {
        queues: vec![from(0), from(1)],
        max_messages: 10,
        max_bytes: 1 << 20,
        wait_ms: 30_000,
        consistency: Consistency::Linearizable,
    };
    let poll = tokio::spawn({
        let broker = broker.clone();
        async move { broker.fetch_many(asked).await.unwrap() }
    });
    let tagged = |text: &str, tag: &str, queue| NewMessage {
        tag: Some(tag.to_owned()),
        ..message(text, queue)
    };
    // Whenever the waiting begins, something comes after it.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !poll.is_finished() {
        assert!(tokio::time::Instant::now() < deadline, "it never ends");
        for message in [tagged("no", "other", 0), tagged("yes", "wanted", 1)] {
            broker.produce(request("t", vec![message])).await.unwrap();
        }
    }
    let found = poll.await.unwrap();
    assert_eq!(found[0].as_ref().unwrap().messages.len(), 0);
    assert_eq!(texts(found[1].as_ref().unwrap())[0], "yes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_purged_before_its_trim_is_applied_here_breaks_no_replica() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 1)).await.unwrap();
    let stored = put(broker, "t", &["a", "b"]).await;
    let place = parse_message_id(&stored[1].message_id).unwrap();
    let queue = broker.local.queue(place.group).unwrap();
    let (done, purged) = tokio::sync::oneshot::channel();
    let upto = LogId::new(place.term, place.index);
    let tell = Box::new(|result| {
        done.send(result).ok();
    });
    queue.group.log().purge(upto, tell).unwrap();
    purged.await.unwrap().unwrap();
    // As on a replica that begins with the state before the trim.
    let refused = broker.fetch(fetch("t", 0, StartAt::Earliest)).await;
    assert!(refused.is_err_and(|error| error.retryable()));
    assert!(queue.shared.soundness().broken().is_none());
}
