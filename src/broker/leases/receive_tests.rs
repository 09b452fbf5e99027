//! Receiving, where who asked may be gone.

use std::time::Duration;

use super::ReceiveRequest;
use crate::broker::path_tests::{message, request};
use crate::broker::testing::{TestCluster, topic};
use crate::broker::{BrokerError, Selection, StartAt};
use crate::peer::PeerError;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_waits_for_is_not_leased() {
    let mut cluster = TestCluster::new(1);
    let nodes = cluster.start_all().await;
    let broker = &nodes[0].broker;
    broker.create_topic("t", topic(1, 1)).await.unwrap();
    let stored = broker.produce(request("t", vec![message("0", 0)])).await;
    stored.unwrap();
    let asked = ReceiveRequest {
        group: "g".to_owned(),
        topics: vec!["t".to_owned()],
        max_messages: 1,
        max_bytes: 1 << 20,
        wait_ms: 0,
        lease_ms: 60_000,
        ordered: false,
        selection: Selection::default(),
        start: StartAt::Earliest,
        consumer: None,
        held: Vec::new(),
    };
    let (number, _) = broker.lease_coordinator("g").unwrap();
    let late = broker.receive_here(number, &asked, Duration::ZERO).await;
    assert!(
        matches!(late, Err(PeerError::Broker(BrokerError::NoLeader { .. }))),
        "{late:?}"
    );
    let found = broker.receive(asked).await.unwrap();
    let counts: Vec<_> = found.messages.iter().map(|m| m.delivery_count).collect();
    assert_eq!(counts, [1]);
}
