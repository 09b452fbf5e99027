//! Peers that break the protocol or fall silent, played by raw sockets.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::link::raw_peer::{Frames, frame, greet};
use crate::link::wire::{Header, Kind};

/// A real node 2 that is connected to a real node 3, and a raw socket that is node 1.
struct Stage {
    two: Node,
    three: Node,
    raw: Socket,
}

async fn stage(change: impl Fn(&mut LinkConfig)) -> (Stage, String) {
    let (bound_2, bound_3) = (listener().await, listener().await);
    let at = addr(&bound_2);
    let peers = vec![(1, "127.0.0.1:1".to_owned()), (3, addr(&bound_3))];
    let mut config_2 = config(2, peers);
    change(&mut config_2);
    let two = Node::start(config_2, bound_2);
    let three = Node::start(config(3, vec![(2, at.clone())]), bound_3);
    let raw = greet(&at, 1, 1, 2).await;
    two.connected_to(1).await;
    two.connected_to(3).await;
    (Stage { two, three, raw }, at)
}

impl Stage {
    /// The raw connection is closed by node 2, and the one to node 3 is not.
    async fn only_raw_is_closed(mut self, expected: &str) {
        let reason = self.two.event(|event| match event {
            PeerEvent::Disconnected { node: 1, reason } => Some(reason.clone()),
            PeerEvent::Disconnected { node, reason } => panic!("lost node {node}: {reason}"),
            _ => None,
        });
        let reason = reason.await.to_string();
        assert!(reason.contains(expected), "{reason}");
        let mut rest = Vec::new();
        // A reset is as good as an end.
        let _ = within(self.raw.read_to_end(&mut rest)).await;
        assert_eq!(self.two.echo(3, body(1, 1)).await, Ok(body(1, 1)));
        assert_eq!(self.three.echo(2, body(1, 1)).await, Ok(body(1, 1)));
        assert_eq!(self.two.table.stats(3).expect("a peer").connections, 1);
    }
}

#[tokio::test]
async fn garbage_closes_its_own_connection_only() {
    let (mut stage, _) = stage(|_| {}).await;
    let mut garbage = 64u32.to_le_bytes().to_vec();
    garbage.extend_from_slice(&[0xa5; 100]);
    stage.raw.write_all(&garbage).await.expect("open");
    stage.only_raw_is_closed("checksum").await;
}

#[tokio::test]
async fn an_oversize_length_closes_its_own_connection_only() {
    let (mut stage, _) = stage(|_| {}).await;
    stage
        .raw
        .write_all(&u32::MAX.to_le_bytes())
        .await
        .expect("open");
    stage.only_raw_is_closed("outside").await;
}

#[tokio::test]
async fn a_call_that_comes_twice_is_served_once_and_closes_its_own_connection_only() {
    let (mut stage, _) = stage(|_| {}).await;
    let header = Header {
        class: HELD,
        channel: 1,
        ..Header::of(Kind::Call)
    };
    let call = frame(header, b"once");
    let twice = [&call[..], &call[..]].concat();
    stage.raw.write_all(&twice).await.expect("open");
    let handler = stage.two.handler.clone();
    let reason = "frame number 1 where 2 was due";
    stage.only_raw_is_closed(reason).await;
    let served = || handler.held.load(Ordering::SeqCst) == 1;
    eventually("the first call is in service", served).await;
}

#[tokio::test]
async fn a_second_handshake_closes_its_own_connection_only() {
    let (mut stage, _) = stage(|_| {}).await;
    stage
        .raw
        .write_all(&frame(Header::of(Kind::Hello), b""))
        .await
        .expect("open");
    stage.only_raw_is_closed("handshake").await;
}

#[tokio::test]
async fn a_ping_of_another_incarnation_closes_its_own_connection_only() {
    let (mut stage, _) = stage(|_| {}).await;
    stage
        .raw
        .write_all(&frame(Header::of(Kind::Ping), &[7; 16]))
        .await
        .expect("open");
    stage.only_raw_is_closed("incarnation").await;
}

#[tokio::test]
async fn silence_closes_its_own_connection_only() {
    let (stage, _) = stage(|config| {
        config.ping_interval = Duration::from_millis(20);
        config.silence_timeout = Duration::from_millis(400);
        config.drop_silent_after = Duration::from_millis(400);
    })
    .await;
    stage.only_raw_is_closed("nothing was heard").await;
}

#[tokio::test]
async fn a_stream_beyond_its_window_ends_and_the_connection_stays() {
    let (mut stage, _) = stage(|config| config.stream_window_bytes = 4096).await;
    let header = |kind| Header {
        channel: 1,
        ..Header::of(kind)
    };
    let mut frames = Frames::default();
    let mut bytes = frames.next(header(Kind::StreamOpen), b"");
    for _ in 0..10 {
        bytes.extend_from_slice(&frames.next(header(Kind::StreamData), &[1; 960]));
    }
    stage.raw.write_all(&bytes).await.expect("open");
    let incoming = stage.two.incoming().await;
    eventually("the stream ends", || {
        incoming.stream.end() == Some(StreamEnd::Overflow)
    })
    .await;
    assert!(stage.two.table.connected(1));
    assert_eq!(stage.two.echo(3, body(1, 1)).await, Ok(body(1, 1)));
}

#[tokio::test]
async fn a_new_connection_replaces_the_old_one_and_fails_its_calls() {
    let (stage, at) = stage(|_| {}).await;
    let call = stage.two.table.call(1, ECHO, 0, body(1, 1), DEADLINE);
    let replace = async {
        // The call has left: the raw node has it.
        let sent = || {
            stage
                .two
                .table
                .stats(1)
                .is_some_and(|stats| stats.bytes_sent > 28)
        };
        eventually("the call is sent", sent).await;
        greet(&at, 1, 2, 2).await
    };
    let (call, raw) = within(async { tokio::join!(call, replace) }).await;
    assert_eq!(call, Err(CallError::ConnectionLost));
    let lost = stage.two.event(|event| match event {
        PeerEvent::Disconnected { node: 1, reason } => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(lost.await, DisconnectReason::Replaced);
    let incarnation = stage.two.event(|event| match event {
        PeerEvent::Connected {
            node: 1,
            incarnation,
            ..
        } => Some(*incarnation),
        _ => None,
    });
    assert_eq!(incarnation.await, 2);
    drop(raw);
}

#[tokio::test]
async fn calls_the_writer_never_took_are_reported_as_not_sent() {
    let (stage, at) = stage(|_| {}).await;
    // Nobody reads the raw socket: the first call fills its buffers, the second stays behind it.
    let stuck = stage
        .two
        .table
        .call(1, ECHO, 0, body(1, 32 << 20), DEADLINE);
    let behind = async {
        let timeout = Duration::from_millis(100);
        let late = stage.two.table.call(1, ECHO, 0, body(1, 1), timeout).await;
        assert_eq!(late, Err(CallError::NotSent(NotSent::QueueFull)));
        let queued = stage.two.table.call(1, ECHO, 0, body(1, 1), DEADLINE);
        let (queued, raw) = tokio::join!(queued, greet(&at, 1, 2, 2));
        assert_eq!(queued, Err(CallError::NotSent(NotSent::ConnectionLost)));
        raw
    };
    let (stuck, _raw) = within(async { tokio::join!(stuck, behind) }).await;
    assert_eq!(stuck, Err(CallError::ConnectionLost));
}

#[tokio::test]
async fn strangers_without_a_handshake_are_bounded_in_number_and_time() {
    let (stage, at) = stage(|config| {
        config.max_handshakes = 3;
        config.handshake_timeout = Duration::from_secs(2);
    })
    .await;
    let mut strangers = Vec::new();
    for _ in 0..10 {
        strangers.push(TcpStream::connect(&at).await.expect("listening"));
    }
    for mut stranger in strangers {
        let mut byte = [0];
        // All are closed: those beyond the bound at once, the others when their time is up.
        assert!(matches!(
            within(stranger.read(&mut byte)).await,
            Ok(0) | Err(_)
        ));
    }
    assert!(stage.two.table.connected(1) && stage.two.table.connected(3));
}
