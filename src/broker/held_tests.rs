//! Held batches on the paths between nodes: three brokers in one process, over real links.

use std::time::Duration;

use super::batcher::now_ms;
use super::path_tests::{fetch, message, request, texts};
use super::queue::entry;
use super::queue::{BatchOutcome, decode_settled};
use super::testing::{TestCluster, eventually, topic};
use super::*;
use crate::peer::{NewBatch, NewHold};

fn delayed(text: &str, ms: u64) -> NewMessage {
    NewMessage {
        delay: Some(Delay::For(ms)),
        ..message(text, 0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leads_delivers_and_every_node_shows_it() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let broker = &nodes[0].broker;
    let (created, _) = broker.create_topic("t", topic(1, 3)).await.unwrap();
    let leader = created.queues[0].leader.unwrap();
    let begun = now_ms();
    let messages = vec![delayed("2", 1500), delayed("1", 1000), message("0", 0)];
    let answer = broker.produce(request("t", messages)).await.unwrap();
    let stored: Vec<Stored> = answer.results.into_iter().map(Result::unwrap).collect();
    assert_eq!(stored[0].offset, None);
    assert!(stored[0].deliver_at_ms >= Some(begun + 1500));
    // Nothing else wakes the queue, and another node leads it when the first is due.
    let other = (1..=3).find(|n| *n != leader).unwrap();
    broker.transfer_leader("t", 0, other).await.ok();
    for node in &nodes {
        let mut all = fetch("t", 0, StartAt::Earliest);
        all.consistency = Consistency::Stale;
        eventually("all are delivered", || async {
            texts(&node.broker.fetch(all.clone()).await.unwrap()) == ["0", "1", "2"]
        })
        .await;
        let found = node.broker.fetch(all).await.unwrap();
        for (message, stored) in found
            .messages
            .iter()
            .zip([&stored[2], &stored[1], &stored[0]])
        {
            assert_eq!(message.message_id, stored.message_id);
            assert!(Some(message.timestamp_ms) >= stored.deliver_at_ms);
        }
    }
    let id = &stored[1].message_id;
    let refused = nodes[1].broker.cancel_message("t", id).await;
    assert!(matches!(refused, Err(BrokerError::AlreadyDelivered { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancellation_finds_the_leader_from_any_node() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    nodes[0]
        .broker
        .create_topic("t", topic(1, 3))
        .await
        .unwrap();
    for node in &nodes {
        let answer = node
            .broker
            .produce(request("t", vec![delayed("x", 600_000)]));
        let stored = answer.await.unwrap().results.remove(0).unwrap();
        for other in &nodes {
            let cancelled = other.broker.cancel_message("t", &stored.message_id).await;
            assert_eq!(cancelled, Ok(()));
        }
    }
    let held = nodes[0].broker.local.queues();
    eventually("nothing is held", || async {
        held.iter().all(|queue| queue.shared.held().batches == 0)
    })
    .await;
}

/// What a transaction's coordinator does with a queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_transaction_are_shown_together_in_their_order() {
    let mut cluster = TestCluster::new(1);
    let node = cluster.start_all().await.remove(0);
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 1)).await.unwrap();
    let group = broker.catalog().topic("t").unwrap().queues[0].group;
    let id = [7; 16];
    let part = |part: u32| {
        let mut messages = request("t", vec![message(&part.to_string(), 0)]);
        messages.idempotency_key = None;
        let topic = broker.catalog().topic("t").unwrap().clone();
        let parts = encode::encode(&topic, &messages, None, 0, 1 << 20).unwrap();
        NewBatch {
            hold: Some(NewHold::Transaction { id, part }),
            ..parts.into_iter().next().unwrap().batch.unwrap()
        }
    };
    let patience = Duration::from_secs(5);
    let store = |parts: &[u32]| {
        let batches = parts.iter().map(|n| part(*n)).collect();
        broker.produce_here(group, batches, patience)
    };
    let held = store(&[1, 0]).await.unwrap();
    assert!(held.iter().all(|o| matches!(o, BatchOutcome::Held { .. })));
    let again = store(&[0]).await.unwrap();
    assert!(matches!(again[..], [BatchOutcome::Duplicate(_)]));
    let found = broker
        .fetch(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap();
    assert_eq!((found.messages.len(), found.end_offset), (0, 0));

    let settle = || async {
        let reply = broker
            .propose(group, entry::settle(now_ms(), &id, true, &[]))
            .await;
        decode_settled(&reply.unwrap()).unwrap()
    };
    let settled = settle().await;
    let offsets: Vec<_> = settled
        .parts
        .iter()
        .map(|(n, p)| (*n, p.offset()))
        .collect();
    assert_eq!(offsets, [(0, Some(0)), (1, Some(1))]);
    assert_eq!(settle().await, settled);
    let found = broker
        .fetch(fetch("t", 0, StartAt::Earliest))
        .await
        .unwrap();
    assert_eq!(texts(&found), ["0", "1"]);
    let late = store(&[2]).await.unwrap();
    assert_eq!(late, [BatchOutcome::TransactionEnded]);
}

/// A node with another clock must not move the time of a queue that it doesn't lead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queues_time_is_its_leaders_whoever_asks() {
    let mut cluster = TestCluster::new(1);
    let node = cluster.start_all().await.remove(0);
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 1)).await.unwrap();
    let group = broker.catalog().topic("t").unwrap().queues[0].group;
    let hour_ms = 3_600_000;
    for body in [
        entry::settle(now_ms() + hour_ms, &[7; 16], false, &[]),
        entry::fence(now_ms() + hour_ms, 1, 1),
        entry::fence(0, 1, 1),
    ] {
        broker.propose(group, body).await.unwrap();
        let stamp_ms = broker.local.queue(group).unwrap().shared.last_stamp_ms();
        let now_ms = now_ms();
        assert!(stamp_ms <= now_ms && stamp_ms + hour_ms > now_ms);
    }
}
