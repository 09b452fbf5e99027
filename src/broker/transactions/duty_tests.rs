//! What is due is done for every transaction, whatever holds up others.

use futures_util::StreamExt;
use futures_util::stream;
use tokio::net::TcpListener;

use super::*;
use crate::broker::path_tests::message;
use crate::broker::testing::{PATIENCE, TestCluster, eventually, topic};
use crate::coordinator::owner_of_name;
use crate::coordinator::transactions::{Decision, NewTransaction, new_transaction_id};

const PATIENT: Timing = Timing {
    timeout_ms: 600_000,
    check_interval_ms: 600_000,
    max_checks: 3,
};
/// Commands under way at the same time.
const AT_ONCE: usize = 64;

fn new_id(broker: &Broker) -> TransactionId {
    let coordinator = owner_of_name("p", broker.catalog().coordinators.len());
    new_transaction_id(coordinator, rand::random()).unwrap()
}

fn begin(timing: Timing, topics: &[&str]) -> BeginTransaction {
    let messages = topics.iter().map(|topic| TransactionMessage {
        topic: (*topic).to_owned(),
        message: message("x", 0),
    });
    BeginTransaction {
        producer_group: "p".to_owned(),
        timing,
        check_url: None,
        messages: messages.collect(),
        offsets: Vec::new(),
    }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_without_a_leader_holds_up_its_own_transactions_alone() {
    let mut cluster = TestCluster::new(3);
    let mut nodes = cluster.start_all().await;
    let broker = nodes[0].broker.clone();
    broker.create_topic("t", topic(1, 3)).await.unwrap();
    let (lost, _) = broker.create_topic("lost", topic(1, 1)).await.unwrap();
    let batches = broker.encode_messages(begin(PATIENT, &["lost"]).messages);
    let part = batches.await.unwrap().remove(0).part;
    let gone = lost.queues[0].leader.unwrap() as usize - 1;
    nodes.remove(gone).stop().await;
    let broker = nodes[0].broker.clone();
    eventually("the others have a leader", || async {
        let begun = broker.begin_transaction(begin(PATIENT, &["t"])).await;
        begun.is_ok()
    })
    .await;

    // As many begins have failed as wait for a queue that can't be told.
    let failed = stream::iter(0..600).map(|_| {
        let (broker, part) = (&broker, part.clone());
        async move {
            let id = new_id(broker);
            let new = NewTransaction {
                producer_group: "p".to_owned(),
                timing: PATIENT,
                check_url: None,
                parts: vec![part],
                offset_groups: Vec::new(),
                prepare_ms: 60_000,
            };
            let begin = TransactionCommand::Begin { id, new };
            broker.transact(&id, begin).await.unwrap();
            let decision = Decision::Rollback;
            let decide = TransactionCommand::Decide { id, decision };
            broker.transact(&id, decide).await.unwrap();
            id
        }
    });
    let failed: Vec<_> = failed.buffer_unordered(AT_ONCE).collect().await;

    let hasty = Timing {
        timeout_ms: 100,
        ..PATIENT
    };
    // Due behind all of them, and settled by nobody but the coordinator's leader.
    let checked = broker.begin_transaction(begin(hasty, &["t"])).await;
    let checked = checked.unwrap().id;
    let ended = broker.begin_transaction(begin(PATIENT, &["t"])).await;
    let ended = ended.unwrap().id;
    let decide = TransactionCommand::Decide {
        id: ended,
        decision: Decision::Commit,
    };
    broker.transact(&ended, decide).await.unwrap();
    until_state(&broker, &checked, TransactionState::NeedsCheck).await;
    until_state(&broker, &ended, TransactionState::Committed).await;

    // With the queue back all of them end.
    let back = cluster.start(gone as u64 + 1).await;
    back.ready().await;
    let deadline = tokio::time::Instant::now() + 4 * PATIENCE;
    for id in failed {
        while broker.transaction(&id).await.unwrap().done_ms.is_none() {
            assert!(tokio::time::Instant::now() < deadline, "not settled");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producers_that_do_not_answer_hold_up_no_transaction() {
    // Takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    let accepting = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((connection, _)) = silent.accept().await {
            taken.push(connection);
        }
    });
    let mut cluster = TestCluster::new(1);
    cluster.config.webhooks = WebhookPolicy {
        allow: vec![url.clone()],
        secret: "secret".to_owned(),
    };
    let node = cluster.start_all().await.remove(0);
    let broker = &node.broker;
    broker.create_topic("t", topic(1, 1)).await.unwrap();
    let asked = stream::iter(0..600).map(|_| {
        let mut asked = begin(PATIENT, &["t"]);
        asked.timing.timeout_ms = 1;
        asked.check_url = Some(url.clone());
        async move { broker.begin_transaction(asked).await.unwrap().id }
    });
    let asked: Vec<_> = asked.buffer_unordered(AT_ONCE).collect().await;
    for id in &asked {
        until_state(broker, id, TransactionState::NeedsCheck).await;
    }
    for id in &asked {
        let decision = Decision::Commit;
        let decide = TransactionCommand::Decide { id: *id, decision };
        broker.transact(id, decide).await.unwrap();
    }
    // The last one that was asked for first.
    for id in asked.iter().rev() {
        until_state(broker, id, TransactionState::Committed).await;
    }
    accepting.abort();
}
