use futures_util::future::join_all;

use super::*;

/// Opens a stream from node 1 to node 2 and waits for its other end.
async fn pair(nodes: &[Node], group: u64) -> (LinkStream, LinkStream) {
    let opened = nodes[0]
        .table
        .open_stream(2, group, Bytes::from_static(b"hello"));
    let opened = opened.expect("connected");
    let incoming = nodes[1].incoming().await;
    assert_eq!(
        (incoming.from, incoming.group, &incoming.hello[..]),
        (1, group, &b"hello"[..])
    );
    assert_eq!(
        (opened.group(), opened.peer(), incoming.stream.peer()),
        (group, 2, 1)
    );
    (opened, incoming.stream)
}

async fn send_numbers(stream: &LinkStream, count: u32) {
    for number in 0..count {
        let padding = body(0, (number as usize * 37) % 5000);
        let parts = vec![Bytes::from(number.to_le_bytes().to_vec()), padding];
        stream.send_parts(parts).await.expect("open");
    }
}

async fn expect_numbers(stream: &LinkStream, count: u32) {
    for number in 0..count {
        let frame = within(stream.recv()).await.expect("open");
        assert_eq!(frame[..4], number.to_le_bytes());
        assert_eq!(frame.len(), 4 + (number as usize * 37) % 5000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_keep_their_order_in_both_directions_of_many_streams() {
    // The window is small, so that senders wait for credit again and again.
    let nodes = cluster(2, |config| config.stream_window_bytes = 16 << 10).await;
    let mut pairs = Vec::new();
    for group in 0..20 {
        pairs.push(pair(&nodes, group).await);
    }
    let traffic = pairs.iter().map(|(here, there)| async move {
        tokio::join!(
            send_numbers(here, 300),
            expect_numbers(there, 300),
            send_numbers(there, 300),
            expect_numbers(here, 300),
        );
    });
    within(join_all(traffic)).await;
}

#[tokio::test]
async fn either_side_may_open() {
    let nodes = cluster(2, |_| {}).await;
    let stream = nodes[1]
        .table
        .open_stream(1, 3, Bytes::new())
        .expect("connected");
    stream.send(body(1, 1)).await.expect("open");
    let incoming = nodes[0].incoming().await;
    assert_eq!(within(incoming.stream.recv()).await, Some(body(1, 1)));
}

#[tokio::test]
async fn dropping_one_end_ends_the_other_after_what_was_sent() {
    let nodes = cluster(2, |_| {}).await;
    let (here, there) = pair(&nodes, 1).await;
    for fill in 0..10 {
        here.send(body(fill, 100)).await.expect("open");
    }
    drop(here);
    for fill in 0..10 {
        assert_eq!(within(there.recv()).await, Some(body(fill, 100)));
    }
    assert_eq!(within(there.recv()).await, None);
    assert_eq!(there.end(), Some(StreamEnd::Dropped));
    assert_eq!(
        there.send(body(0, 1)).await,
        Err(StreamError::Closed(StreamEnd::Dropped))
    );
}

#[tokio::test]
async fn a_slow_reader_stops_its_own_sender_and_nobody_else() {
    let window = 64 << 10;
    let nodes = cluster(2, |config| config.stream_window_bytes = window).await;
    let (slow, unread) = pair(&nodes, 1).await;
    let mut sent = 0;
    // The sender is stopped once the window is full: far below what it would like to send.
    let stopped = |stream| async move {
        tokio::time::timeout(
            Duration::from_millis(50),
            LinkStream::send(stream, body(9, 1000)),
        )
        .await
    };
    while let Ok(result) = stopped(&slow).await {
        result.expect("open");
        sent += 1;
        assert!(
            sent * 1000 <= window,
            "the window does not bound the sender"
        );
    }
    let (fast, read) = pair(&nodes, 2).await;
    within(async { tokio::join!(send_numbers(&fast, 500), expect_numbers(&read, 500)) }).await;
    assert_eq!(nodes[0].echo(2, body(1, 1)).await, Ok(body(1, 1)));
    // Nothing of the slow stream is lost, and reading sets its sender free.
    for _ in 0..sent {
        assert_eq!(within(unread.recv()).await, Some(body(9, 1000)));
    }
    within(slow.send(body(8, 8))).await.expect("open");
    assert_eq!(within(unread.recv()).await, Some(body(8, 8)));
}

#[tokio::test]
async fn a_frame_larger_than_the_window_passes() {
    let nodes = cluster(2, |config| config.stream_window_bytes = 4096).await;
    let (here, there) = pair(&nodes, 1).await;
    let traffic = async {
        let send = async {
            for fill in 0..10 {
                here.send(body(fill, 1 << 20)).await.expect("open");
            }
        };
        let receive = async {
            for fill in 0..10 {
                assert_eq!(there.recv().await, Some(body(fill, 1 << 20)));
            }
        };
        tokio::join!(send, receive)
    };
    within(traffic).await;
}

#[tokio::test]
async fn streams_beyond_the_bound_end_at_once() {
    let nodes = cluster(2, |config| {
        config.max_streams = if config.node_id == 1 { 10 } else { 1 };
    })
    .await;
    let (first, _there) = pair(&nodes, 1).await;
    let second = nodes[0]
        .table
        .open_stream(2, 2, Bytes::new())
        .expect("room here");
    assert_eq!(within(second.recv()).await, None);
    assert_eq!(second.end(), Some(StreamEnd::TooMany));
    first.send(body(0, 1)).await.expect("still open");
}

#[tokio::test]
async fn a_lost_connection_ends_streams_after_what_had_arrived() {
    let nodes = cluster(2, |_| {}).await;
    let (here, there) = pair(&nodes, 1).await;
    here.send(body(1, 1)).await.expect("open");
    assert_eq!(
        nodes[0].echo(2, body(1, 1)).await,
        Ok(body(1, 1)),
        "the frame before arrived too"
    );
    nodes[0].table.shutdown().await;
    assert_eq!(within(there.recv()).await, Some(body(1, 1)));
    assert_eq!(within(there.recv()).await, None);
    assert_eq!(there.end(), Some(StreamEnd::ConnectionLost));
    assert_eq!(within(here.recv()).await, None);
}
