//! Transactions over real nodes, stopped between any two of their steps: whatever the node did not
//! live to do, the records make good when it is back, or another node does.

use std::sync::Arc;

use tokio::time::Instant;

use super::begin::{Offsets, Prepare};
use super::*;
use crate::broker::path_tests::{fetch, message, put, single, texts};
use crate::broker::testing::{PATIENCE, TestCluster, eventually, topic};
use crate::broker::{OffsetCommit, StartAt};
use crate::coordinator::owner_of_name;
use crate::coordinator::transactions::{
    Decision, NewTransaction, PreparedParts, TransactionFilter, new_transaction_id,
};

const TIMING: Timing = Timing {
    timeout_ms: 600_000,
    check_interval_ms: 600_000,
    max_checks: 3,
};
/// Longer than any of the steps, so that only what was left undone is rolled back.
const PREPARE_MS: u64 = 4_000;

fn messages() -> Vec<TransactionMessage> {
    let to = |queue, text: &str| TransactionMessage {
        topic: "t".to_owned(),
        message: message(text, queue),
    };
    vec![to(0, "a"), to(1, "b"), to(0, "c")]
}

fn offset() -> TransactionOffset {
    TransactionOffset {
        group: "g".to_owned(),
        topic: "in".to_owned(),
        queue: 0,
        offset: 2,
        from: None,
        member: None,
    }
}

fn new_id(broker: &Broker) -> TransactionId {
    let coordinator = owner_of_name("p", broker.catalog().coordinators.len());
    new_transaction_id(coordinator, rand::random()).unwrap()
}

/// A transaction that is carried out step by step.
struct Manual {
    id: TransactionId,
    batches: Vec<(u32, Prepare)>,
    offsets: Option<Offsets>,
    decision: Decision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Step {
    Nothing,
    Begun,
    OnePrepared,
    AllPrepared,
    Opened,
    Decided,
    OneSettled,
    AllSettled,
    Done,
}

impl Manual {
    async fn new(broker: &Broker, decision: Decision) -> Self {
        let batches = broker.encode_messages(messages()).await.unwrap();
        let mut offsets = broker.check_offsets(vec![offset()]).await.unwrap();
        Self {
            id: new_id(broker),
            batches: (0..).zip(batches).collect(),
            offsets: offsets.pop(),
            decision,
        }
    }

    async fn run(mut self, broker: &Broker, until: Step) {
        let id = self.id;
        let queues: Vec<u64> = self
            .batches
            .iter()
            .map(|(_, b)| b.part.queue_group)
            .collect();
        let commit = self.decision.is_commit();
        let mut places = Vec::new();
        for step in [
            Step::Begun,
            Step::OnePrepared,
            Step::AllPrepared,
            Step::Opened,
            Step::Decided,
            Step::OneSettled,
            Step::AllSettled,
            Step::Done,
        ] {
            if step > until {
                return;
            }
            match step {
                Step::Nothing => {}
                Step::Begun => {
                    let parts = self.batches.iter().map(|(_, b)| b.part.clone());
                    let new = NewTransaction {
                        producer_group: "p".to_owned(),
                        timing: TIMING,
                        check_url: None,
                        parts: parts.collect(),
                        offset_groups: vec!["g".to_owned()],
                        prepare_ms: PREPARE_MS,
                    };
                    let begin = TransactionCommand::Begin { id, new };
                    broker.transact(&id, begin).await.unwrap();
                }
                Step::OnePrepared => {
                    let (number, batch) = self.batches.remove(0);
                    broker.prepare_part(&id, number, batch).await.unwrap();
                }
                Step::AllPrepared => {
                    for (number, batch) in self.batches.drain(..) {
                        broker.prepare_part(&id, number, batch).await.unwrap();
                    }
                    let offsets = self.offsets.take().unwrap();
                    broker.hold_offsets(&id, offsets, u64::MAX).await.unwrap();
                }
                Step::Opened => {
                    let parts = PreparedParts {
                        first: 0,
                        count: 2,
                        offsets: true,
                    };
                    let prepared = TransactionCommand::Prepared { id, parts };
                    broker.transact(&id, prepared).await.unwrap();
                }
                Step::Decided => {
                    let decision = self.decision;
                    let decide = TransactionCommand::Decide { id, decision };
                    broker.transact(&id, decide).await.unwrap();
                }
                Step::OneSettled => {
                    let settled = broker.settle_queue(&id, queues[0], commit, &[]).await;
                    places.push((queues[0], settled.unwrap()));
                }
                Step::AllSettled => {
                    let settled = broker.settle_queue(&id, queues[1], commit, &[]).await;
                    places.push((queues[1], settled.unwrap()));
                    broker.settle_offsets(&id, "g", commit).await.unwrap();
                }
                Step::Done => {
                    let settled = TransactionCommand::Settled {
                        id,
                        queues: std::mem::take(&mut places),
                        offset_groups: vec!["g".to_owned()],
                    };
                    broker.transact(&id, settled).await.unwrap();
                }
            }
        }
    }
}

async fn values(broker: &Broker, queue: u32) -> Vec<String> {
    let found = broker.fetch(fetch("t", queue, StartAt::Earliest)).await;
    texts(&found.unwrap())
}

async fn offset_of_group(broker: &Broker) -> Option<u64> {
    let found = broker.group_offsets("g", Some("in")).await.unwrap();
    found[0].offset
}

async fn until_state(broker: &Broker, id: &TransactionId, wanted: TransactionState) {
    eventually(wanted.as_str(), || async {
        broker
            .transaction(id)
            .await
            .is_ok_and(|t| t.state() == wanted)
    })
    .await;
}

/// Everything of the transaction is to be seen, once.
async fn check_committed(broker: &Broker) {
    assert_eq!(values(broker, 0).await, ["a", "c"]);
    assert_eq!(values(broker, 1).await, ["b"]);
    assert_eq!(offset_of_group(broker).await, Some(2));
}

/// Nothing of it is, and nothing is kept from others.
async fn check_rolled_back(broker: &Broker) {
    assert_eq!(values(broker, 0).await, [""; 0]);
    assert_eq!(values(broker, 1).await, [""; 0]);
    assert_eq!(offset_of_group(broker).await, None);
    let commit = crate::broker::CommitRequest {
        group: "g".to_owned(),
        offsets: vec![OffsetCommit {
            topic: "in".to_owned(),
            queue: 0,
            offset: 1,
        }],
        member: None,
        allow_rewind: false,
    };
    let committed = broker.commit_offsets(commit).await.unwrap();
    assert!(committed[0].is_ok(), "{committed:?}");
}

async fn stopped_after(step: Step, decision: Decision) {
    let (mut cluster, node) = single().await;
    node.broker.create_topic("t", topic(2, 1)).await.unwrap();
    node.broker.create_topic("in", topic(1, 1)).await.unwrap();
    put(&node.broker, "in", &["1", "2", "3"]).await;
    let manual = Manual::new(&node.broker, decision).await;
    let id = manual.id;
    manual.run(&node.broker, step).await;
    node.stop().await;
    let node = cluster.start(1).await;
    node.ready().await;
    let broker = &node.broker;
    match step {
        Step::Nothing => {
            let none = broker.transaction(&id).await;
            assert!(matches!(none, Err(BrokerError::TransactionNotFound { .. })));
            check_rolled_back(broker).await;
        }
        // Nobody comes back to finish it.
        Step::Begun | Step::OnePrepared | Step::AllPrepared => {
            until_state(broker, &id, TransactionState::RolledBack).await;
            let late = Manual::new(broker, decision).await.batches.remove(0);
            let late = broker.prepare_part(&id, late.0, late.1).await;
            assert!(
                matches!(late, Err(BrokerError::TransactionEnded { .. })),
                "{late:?}"
            );
            check_rolled_back(broker).await;
        }
        Step::Opened => {
            assert_eq!(values(broker, 0).await, [""; 0]);
            let ended = broker.end_transaction(&id, decision).await.unwrap();
            assert!(ended.done_ms.is_some(), "{ended:?}");
            check(broker, decision).await;
        }
        // What was decided is done without anyone asking.
        Step::Decided | Step::OneSettled | Step::AllSettled | Step::Done => {
            let end = match decision.is_commit() {
                true => TransactionState::Committed,
                false => TransactionState::RolledBack,
            };
            until_state(broker, &id, end).await;
            let again = broker.end_transaction(&id, decision).await.unwrap();
            let places = transaction_results(&again).into_iter();
            let places: Vec<_> = places
                .filter_map(|r| Some((r.queue, r.stored?.0)))
                .collect();
            match decision.is_commit() {
                true => assert_eq!(places, [(0, 0), (1, 0), (0, 1)]),
                false => assert_eq!(places, []),
            }
            check(broker, decision).await;
        }
    }
    node.stop().await;
}

async fn check(broker: &Broker, decision: Decision) {
    match decision.is_commit() {
        true => check_committed(broker).await,
        false => check_rolled_back(broker).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_stops_anywhere_ends_right() {
    for step in [
        Step::Nothing,
        Step::Begun,
        Step::OnePrepared,
        Step::AllPrepared,
        Step::Opened,
        Step::Decided,
        Step::OneSettled,
        Step::AllSettled,
        Step::Done,
    ] {
        stopped_after(step, Decision::Commit).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_that_stops_anywhere_ends_right() {
    for step in [
        Step::Opened,
        Step::Decided,
        Step::OneSettled,
        Step::AllSettled,
    ] {
        stopped_after(step, Decision::Rollback).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_finishes_what_the_coordinators_leader_had_decided() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let broker = nodes[0].broker.clone();
    broker.create_topic("t", topic(2, 3)).await.unwrap();
    broker.create_topic("in", topic(1, 3)).await.unwrap();
    put(&broker, "in", &["1", "2", "3"]).await;
    let manual = Manual::new(&broker, Decision::Commit).await;
    let id = manual.id;
    manual.run(&broker, Step::Decided).await;
    let coordinator = owner_of_transaction(&id);
    let leader = broker
        .local
        .coordinator(coordinator)
        .unwrap()
        .group
        .leader();
    let leader = leader.expect("it has just decided");
    nodes.remove(leader as usize - 1).stop().await;
    let broker = &nodes[0].broker;
    until_state(broker, &id, TransactionState::Committed).await;
    for node in &nodes {
        check_committed(&node.broker).await;
    }
    let again = tokio::time::timeout(PATIENCE, broker.end_transaction(&id, Decision::Commit));
    let again = again.await.unwrap().unwrap();
    assert!(
        transaction_results(&again)
            .iter()
            .all(|r| r.stored.is_some())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_waits_for_messages_that_are_being_added() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(2, 1)).await.unwrap();
    let begin = BeginTransaction {
        producer_group: "p".to_owned(),
        timing: TIMING,
        check_url: None,
        messages: Vec::new(),
        offsets: Vec::new(),
    };
    let id = broker.begin_transaction(begin).await.unwrap().id;
    let mut batches = broker.encode_messages(messages()).await.unwrap();
    let parts: Vec<_> = batches.iter().map(|b| b.part.clone()).collect();
    let extend = TransactionCommand::Extend {
        id,
        parts,
        prepare_ms: 60_000,
    };
    broker.transact(&id, extend).await.unwrap();
    let first = batches.remove(0);
    broker.prepare_part(&id, 0, first).await.unwrap();
    let ending = broker.clone();
    let commit = tokio::spawn(async move { ending.end_transaction(&id, Decision::Commit).await });
    broker
        .prepare_part(&id, 1, batches.remove(0))
        .await
        .unwrap();
    assert_eq!(values(broker, 0).await, [""; 0]);
    let parts = PreparedParts {
        first: 0,
        count: 2,
        offsets: false,
    };
    let prepared = TransactionCommand::Prepared { id, parts };
    broker.transact(&id, prepared).await.unwrap();
    let committed = commit.await.unwrap().unwrap();
    assert_eq!(committed.state(), TransactionState::Committed);
    assert_eq!(values(broker, 0).await, ["a", "c"]);
    assert_eq!(values(broker, 1).await, ["b"]);
}

/// Commits, once nothing that was begun is still being stored.
async fn commit(broker: &Arc<Broker>, id: &TransactionId) -> BrokerResult<Transaction> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match broker.end_transaction(id, Decision::Commit).await {
            Err(BrokerError::TransactionBusy { .. }) if Instant::now() < deadline => {}
            ended => return ended,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_told_to_be_open_outlives_an_extension_that_nobody_finished() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(2, 1)).await.unwrap();
    let begin = BeginTransaction {
        producer_group: "p".to_owned(),
        timing: TIMING,
        check_url: None,
        messages: messages(),
        offsets: Vec::new(),
    };
    let id = broker.begin_transaction(begin).await.unwrap().id;
    // A node dies after it has recorded two parts and stored one of them.
    let mut batches = broker.encode_messages(messages()).await.unwrap();
    let extend = TransactionCommand::Extend {
        id,
        parts: batches.iter().map(|b| b.part.clone()).collect(),
        prepare_ms: 1_000,
    };
    broker.transact(&id, extend).await.unwrap();
    broker
        .prepare_part(&id, 2, batches.remove(0))
        .await
        .unwrap();
    // The client asks another one, which stores all of it.
    let extended = broker.extend_transaction(&id, messages()).await.unwrap();
    assert_eq!(extended.state(), TransactionState::Open);
    let committed = commit(broker, &id).await.unwrap();
    assert_eq!(committed.state(), TransactionState::Committed);
    assert_eq!(transaction_results(&committed).len(), 6);
    assert_eq!(values(broker, 0).await, ["a", "c", "a", "c"]);
    assert_eq!(values(broker, 1).await, ["b", "b"]);
    let late = broker.prepare_part(&id, 3, batches.remove(0)).await;
    assert!(
        matches!(late, Err(BrokerError::TransactionEnded { .. })),
        "{late:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_topic_does_not_keep_a_transaction_from_ending() {
    let (_cluster, node) = single().await;
    let broker = &node.broker;
    broker.create_topic("t", topic(2, 1)).await.unwrap();
    broker.create_topic("u", topic(1, 1)).await.unwrap();
    let mut messages = messages();
    messages.push(TransactionMessage {
        topic: "u".to_owned(),
        message: message("d", 0),
    });
    let begin = BeginTransaction {
        producer_group: "p".to_owned(),
        timing: TIMING,
        check_url: None,
        messages,
        offsets: Vec::new(),
    };
    let id = broker.begin_transaction(begin).await.unwrap().id;
    broker.delete_topic("u").await.unwrap();
    let committed = broker.end_transaction(&id, Decision::Commit).await.unwrap();
    assert_eq!(committed.state(), TransactionState::Committed);
    let stored: Vec<bool> = transaction_results(&committed)
        .iter()
        .map(|r| r.stored.is_some())
        .collect();
    assert_eq!(stored, [true, true, true, false]);
    assert_eq!(values(broker, 1).await, ["b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_lists_and_waits() {
    let mut cluster = TestCluster::new(3);
    let nodes = cluster.start_all().await;
    let broker = &nodes[0].broker;
    broker.create_topic("t", topic(2, 3)).await.unwrap();
    let filter = |producer_group: Option<&str>| TransactionFilter {
        producer_group: producer_group.map(str::to_owned),
        state: Some(TransactionState::NeedsCheck),
        limit: 10,
    };
    let waiting: Vec<_> = nodes
        .iter()
        .flat_map(|node| [Some("p"), None].map(|group| (Arc::clone(&node.broker), filter(group))))
        .map(|(broker, filter)| {
            tokio::spawn(async move { broker.transactions(filter, 60_000).await })
        })
        .collect();
    let begin = BeginTransaction {
        producer_group: "p".to_owned(),
        timing: Timing {
            timeout_ms: 200,
            ..TIMING
        },
        check_url: None,
        messages: messages(),
        offsets: Vec::new(),
    };
    let begun = Instant::now();
    let id = nodes[1].broker.begin_transaction(begin).await.unwrap().id;
    for waiting in waiting {
        let found = waiting.await.unwrap().unwrap();
        assert_eq!(found.iter().map(|t| t.id).collect::<Vec<_>>(), [id]);
    }
    assert!(begun.elapsed() < PATIENCE, "woken, not timed out");
    let ended = nodes[2]
        .broker
        .end_transaction(&id, Decision::Rollback)
        .await;
    assert_eq!(ended.unwrap().state(), TransactionState::RolledBack);
    for node in &nodes {
        let found = node
            .broker
            .transactions(filter(Some("p")), 0)
            .await
            .unwrap();
        assert!(found.is_empty());
    }
}

#[test]
fn ids_come_back_from_their_text() {
    let id = new_transaction_id(3, [0xa5; 16]).unwrap();
    let text = transaction_text(&id);
    assert_eq!(parse_transaction_id(&text), Some(id));
    for text in [
        "",
        "0",
        &text.to_uppercase(),
        &text[1..],
        &format!("{text}0"),
    ] {
        assert_eq!(parse_transaction_id(text), None, "{text}");
    }
}
