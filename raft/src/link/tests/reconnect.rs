use super::*;

fn connected(event: &PeerEvent) -> Option<(NodeId, u64)> {
    match event {
        PeerEvent::Connected {
            node, incarnation, ..
        } => Some((*node, *incarnation)),
        _ => None,
    }
}

fn disconnected(event: &PeerEvent) -> Option<DisconnectReason> {
    match event {
        PeerEvent::Disconnected { reason, .. } => Some(reason.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn a_lost_connection_fails_sent_calls_as_unknown() {
    let nodes = cluster(2, |_| {}).await;
    let call = nodes[0].table.call(2, HELD, 0, body(1, 1), DEADLINE);
    let stop = async {
        eventually("served", || {
            nodes[1].handler.held.load(Ordering::SeqCst) == 1
        })
        .await;
        nodes[1].table.shutdown().await;
    };
    let (call, ()) = within(async { tokio::join!(call, stop) }).await;
    assert_eq!(call, Err(CallError::ConnectionLost));
    assert_eq!(nodes[0].event(disconnected).await, DisconnectReason::Closed);
    assert_eq!(
        nodes[0].echo(2, Bytes::new()).await,
        Err(CallError::NotConnected)
    );
}

#[tokio::test]
async fn a_restarted_peer_is_found_at_once_with_its_new_incarnation() {
    // Waiting out this backoff would run into the deadline: the knock has to cut it short.
    let slow = |config: &mut LinkConfig| {
        config.backoff_min = DEADLINE;
        config.backoff_max = DEADLINE;
    };
    for restarted in [1, 2] {
        let other = 3 - restarted;
        let (bound, bound_other) = (listener().await, listener().await);
        let (at, at_other) = (addr(&bound), addr(&bound_other));
        let mut config_other = config(other, vec![(restarted, at.clone())]);
        if other == 1 {
            slow(&mut config_other);
        }
        let stays = Node::start(config_other, bound_other);
        let first = Node::start(config(restarted, vec![(other, at_other.clone())]), bound);
        let old = stays.event(connected).await;
        assert_eq!(old, (restarted, first.table.config().incarnation));
        first.table.shutdown().await;
        drop(first);
        stays.event(disconnected).await;
        let bound = within(async {
            loop {
                match TcpListener::bind(&at).await {
                    Ok(bound) => return bound,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        });
        let second = Node::start(config(restarted, vec![(other, at_other)]), bound.await);
        let new = stays.event(connected).await;
        assert_eq!(new, (restarted, second.table.config().incarnation));
        assert_ne!(old, new);
        assert_eq!(stays.echo(restarted, body(1, 1)).await, Ok(body(1, 1)));
    }
}

#[tokio::test]
async fn a_closed_port_is_known_as_refusing_on_both_sides() {
    for gone in [1usize, 2] {
        let nodes = cluster(2, |_| {}).await;
        let stays = &nodes[2 - gone];
        nodes[gone - 1].table.shutdown().await;
        eventually("the port is seen closed", || {
            let (node, view) = stays.table.views()[0];
            node == gone as u64 && matches!(view, PeerView::Lost { refused: true, .. })
        })
        .await;
    }
}

#[tokio::test]
async fn a_removed_peer_stays_away_and_an_added_one_connects() {
    let nodes = cluster(2, |_| {}).await;
    nodes[1].table.remove_peer(1);
    assert_eq!(
        nodes[1].event(disconnected).await,
        DisconnectReason::Removed
    );
    let code = nodes[0].event(|event| match event {
        PeerEvent::Refused { code, .. } => Some(*code),
        _ => None,
    });
    assert_eq!(code.await, RefuseCode::UnknownNode);
    let bound = listener().await;
    let at_3 = addr(&bound);
    let three = Node::start(config(3, vec![]), bound);
    three.table.add_peer(1, "127.0.0.1:1".to_owned());
    nodes[0].table.add_peer(3, at_3);
    nodes[0].connected_to(3).await;
    assert_eq!(nodes[0].echo(3, body(1, 1)).await, Ok(body(1, 1)));
}

#[tokio::test]
async fn shutdown_ends_all_tasks_and_dropping_the_table_too() {
    let mut nodes = cluster(2, |_| {}).await;
    let two = nodes.pop().expect("two nodes");
    within(nodes[0].table.shutdown()).await;
    eventually("the peer notices", || !two.table.connected(1)).await;
    let at = two.table.config().clone();
    drop(two);
    assert_eq!(at.node_id, 2);
    let one = nodes.pop().expect("one node");
    assert_eq!(
        one.echo(2, Bytes::new()).await,
        Err(CallError::NotConnected)
    );
}
