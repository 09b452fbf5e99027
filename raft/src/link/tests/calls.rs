use futures_util::future::join_all;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_both_directions_get_their_own_answers() {
    let nodes = cluster(3, |_| {}).await;
    let mut calls = Vec::new();
    for node in &nodes {
        for peer in node.table.peers() {
            for call in 0..200u64 {
                calls.push(async move {
                    let sent = Bytes::from(format!("{peer} {call}").repeat(call as usize * 7 + 1));
                    assert_eq!(node.echo(peer, sent.clone()).await, Ok(sent));
                });
            }
        }
    }
    within(join_all(calls)).await;
}

#[tokio::test]
async fn a_body_of_many_pieces_arrives_as_one() {
    let nodes = cluster(2, |_| {}).await;
    let parts = vec![body(1, 10), body(2, 1 << 20), Bytes::new(), body(3, 3000)];
    let answer = nodes[1]
        .table
        .call_parts(1, ECHO, 9, parts.clone(), DEADLINE)
        .await;
    assert_eq!(answer.expect("an answer"), parts.concat());
}

#[tokio::test]
async fn many_small_calls_share_few_writes() {
    let nodes = cluster(2, |_| {}).await;
    let before = nodes[0].table.stats(2).expect("a peer");
    let calls =
        (0..10_000u32).map(|call| nodes[0].echo(2, Bytes::from(call.to_le_bytes().to_vec())));
    let answers = within(join_all(calls)).await;
    assert!(
        answers
            .into_iter()
            .zip(0u32..)
            .all(|(got, call)| got.unwrap() == call.to_le_bytes()[..])
    );
    let after = nodes[0].table.stats(2).expect("a peer");
    let frames = after.frames_sent - before.frames_sent;
    let writes = after.writes - before.writes;
    assert!(frames >= 10_000, "{frames} frames");
    assert!(writes * 20 < frames, "{writes} writes for {frames} frames");
}

#[tokio::test]
async fn big_frames_do_not_starve_small_ones() {
    let nodes = cluster(2, |_| {}).await;
    let big = join_all((0..8).map(|fill| nodes[0].echo(2, body(fill, 8 << 20))));
    let small = join_all((0..500u32).map(|_| nodes[0].echo(2, body(7, 100))));
    let (big, small) = within(async { tokio::join!(big, small) }).await;
    assert!(
        big.iter()
            .zip(0..)
            .all(|(answer, fill)| *answer == Ok(body(fill, 8 << 20)))
    );
    assert!(small.iter().all(|answer| *answer == Ok(body(7, 100))));
}

#[tokio::test]
async fn an_urgent_call_and_its_answer_pass_all_that_waits() {
    const BULK: usize = 256 << 10;
    let nodes = cluster(2, |config| config.max_queued_call_bytes = 2 * BULK).await;
    let done = AtomicUsize::new(0);
    let bulk = join_all((0..64).map(|fill| {
        let echo = nodes[0].echo(2, body(fill, BULK));
        async {
            echo.await.expect("answered");
            done.fetch_add(1, Ordering::SeqCst);
        }
    }));
    let urgent = async {
        let answer = nodes[0].table.call(2, URGENT, 0, body(7, 100), DEADLINE);
        assert_eq!(answer.await, Ok(body(7, 100)));
        done.load(Ordering::SeqCst)
    };
    // The bulk is asked for first.
    let (_, done_before) = within(async { tokio::join!(biased; bulk, urgent) }).await;
    assert!(done_before < 32, "{done_before} of 64 were answered before");
}

#[tokio::test]
async fn an_unknown_or_absent_node_is_not_connected() {
    let bound = listener().await;
    let node = Node::start(config(1, vec![(2, "127.0.0.1:1".to_owned())]), bound);
    for peer in [2, 3] {
        assert_eq!(
            node.echo(peer, Bytes::new()).await,
            Err(CallError::NotConnected)
        );
    }
    let opened = node.table.open_stream(2, 0, Bytes::new());
    assert_eq!(opened.err(), Some(CallError::NotConnected));
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_not_sent() {
    let nodes = cluster(2, |config| config.max_frame_bytes = 4096).await;
    let too_large = nodes[0].echo(2, body(0, 4096 - 27)).await;
    assert_eq!(too_large, Err(CallError::NotSent(NotSent::TooLarge)));
    assert_eq!(
        nodes[0].echo(2, body(0, 4096 - 28)).await,
        Ok(body(0, 4096 - 28))
    );
}

#[tokio::test]
async fn an_overloaded_node_refuses_and_serves_other_classes() {
    let nodes = cluster(2, |config| config.max_calls_in_service = 2).await;
    let table = &nodes[0].table;
    let held = join_all((0..2).map(|_| table.call(2, HELD, 0, body(1, 1), DEADLINE)));
    let others = async {
        let in_service = || nodes[1].handler.held.load(Ordering::SeqCst) == 2;
        eventually("two calls are in service", in_service).await;
        let refused = table.call(2, HELD, 0, body(1, 1), DEADLINE).await;
        assert_eq!(refused, Err(CallError::Refused));
        assert!(CallError::Refused.nobody_took_it());
        assert_eq!(nodes[0].echo(2, body(2, 2)).await, Ok(body(2, 2)));
        nodes[1].handler.release.add_permits(3);
    };
    let (held, ()) = within(async { tokio::join!(held, others) }).await;
    assert!(held.iter().all(Result::is_ok));
    assert_eq!(nodes[1].table.stats(1).expect("a peer").calls_refused, 1);
    // The slots are free again.
    assert!(table.call(2, HELD, 0, body(1, 1), DEADLINE).await.is_ok());
}

#[tokio::test]
async fn a_call_in_service_times_out_as_unknown_and_its_late_answer_harms_nobody() {
    let nodes = cluster(2, |_| {}).await;
    let timeout = Duration::from_millis(30);
    let call = nodes[0].table.call(2, HELD, 0, body(1, 1), timeout).await;
    assert_eq!(call, Err(CallError::Timeout));
    assert!(!CallError::Timeout.nobody_took_it());
    nodes[1].handler.release.add_permits(1);
    assert_eq!(nodes[0].echo(2, body(2, 2)).await, Ok(body(2, 2)));
}

#[tokio::test]
async fn calls_to_a_node_found_dead_end_as_unknown_and_the_connection_stays() {
    let nodes = cluster(2, |_| {}).await;
    let held = nodes[0].table.call(2, HELD, 0, body(1, 1), DEADLINE);
    let give_up = async {
        // Answered, so the call before it was sent.
        assert_eq!(nodes[0].echo(2, body(2, 2)).await, Ok(body(2, 2)));
        nodes[0].table.give_up_calls(2);
    };
    let (call, ()) = tokio::join!(held, give_up);
    assert_eq!(call, Err(CallError::ConnectionLost));
    nodes[1].handler.release.add_permits(1);
    assert_eq!(nodes[0].echo(2, body(3, 2)).await, Ok(body(3, 2)));
}

#[tokio::test]
async fn a_panicking_handler_fails_its_call_only() {
    let nodes = cluster(2, |_| {}).await;
    let call = nodes[0]
        .table
        .call(2, PANIC, 0, Bytes::new(), DEADLINE)
        .await;
    assert_eq!(call, Err(CallError::PeerFailed));
    assert_eq!(nodes[0].echo(2, body(2, 2)).await, Ok(body(2, 2)));
}

#[tokio::test]
async fn reserved_classes_are_answered_from_memory_or_refused() {
    let nodes = cluster(2, |_| {}).await;
    let ask = || nodes[0].table.call(2, 250, 5, body(1, 3), DEADLINE);
    assert_eq!(ask().await, Err(CallError::Refused));
    nodes[1].table.answer_class(250, |from, group, asked| {
        Bytes::from(format!("{from} {group} {}", asked.len()))
    });
    assert_eq!(ask().await, Ok(Bytes::from_static(b"1 5 3")));
}
