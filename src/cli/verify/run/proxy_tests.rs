//! Frames through the network, as the link would send them.

use tokio::time::timeout;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// A frame by its length field; the body repeats one number.
fn frame(number: u8) -> Vec<u8> {
    let mut frame = 28u32.to_le_bytes().to_vec();
    frame.extend_from_slice(&[number; 28]);
    frame
}

/// Node 1 looks for node 2 through the network: both ends of their connection.
async fn connected() -> (Network, TcpStream, TcpStream, TcpListener) {
    let node = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let network = Network::start(&[port(&unused), port(&node)]).await.unwrap();
    let dialer = TcpStream::connect(network.address(1, 2)).await.unwrap();
    let (acceptor, _) = timeout(DEADLINE, node.accept()).await.unwrap().unwrap();
    (network, dialer, acceptor, node)
}

async fn receive(socket: &mut TcpStream) -> u8 {
    let mut bytes = [0; 32];
    let read = timeout(DEADLINE, socket.read_exact(&mut bytes)).await;
    read.expect("in time").expect("a frame");
    assert_eq!(bytes[..], frame(bytes[4])[..], "a whole frame");
    bytes[4]
}

async fn eventually(condition: impl Fn() -> bool) {
    let waited = timeout(DEADLINE, async {
        while !condition() {
            sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.expect("in time");
}

#[tokio::test]
async fn frames_pass_in_both_directions() {
    let (_network, mut one, mut two, _node) = connected().await;
    // In pieces, and two at once.
    let both = [frame(1), frame(2)].concat();
    one.write_all(&both[..10]).await.unwrap();
    one.write_all(&both[10..]).await.unwrap();
    assert_eq!((receive(&mut two).await, receive(&mut two).await), (1, 2));
    two.write_all(&frame(3)).await.unwrap();
    assert_eq!(receive(&mut one).await, 3);
}

#[tokio::test]
async fn a_silent_cut_holds_one_direction_until_it_heals() {
    let (network, mut one, mut two, _node) = connected().await;
    network.change(|from, _, rules| {
        rules.cut = (from == 1).then_some(Cut::Silent);
    });
    one.write_all(&frame(1)).await.unwrap();
    two.write_all(&frame(2)).await.unwrap();
    assert_eq!(receive(&mut one).await, 2);
    eventually(|| network.frames().held == 1).await;
    assert_eq!(network.frames().passed, 1);
    network.heal();
    assert_eq!(receive(&mut two).await, 1);
}

#[tokio::test]
async fn an_end_is_not_heard_through_a_silent_cut() {
    let (network, one, mut two, _node) = connected().await;
    network.change(|_, _, rules| rules.cut = Some(Cut::Silent));
    drop(one);
    let mut byte = [0];
    let heard = timeout(Duration::from_millis(200), two.read(&mut byte)).await;
    assert!(heard.is_err(), "{heard:?}");
    network.heal();
    let heard = timeout(DEADLINE, two.read(&mut byte))
        .await
        .expect("in time");
    assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
}

#[tokio::test]
async fn a_closing_cut_ends_connections_and_refuses_new_ones_until_it_heals() {
    let (network, mut one, mut two, node) = connected().await;
    network.change(|_, _, rules| rules.cut = Some(Cut::Closed));
    let mut byte = [0];
    for socket in [&mut one, &mut two] {
        let heard = timeout(DEADLINE, socket.read(&mut byte))
            .await
            .expect("in time");
        assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
    }
    let mut again = TcpStream::connect(network.address(1, 2)).await.unwrap();
    let heard = timeout(DEADLINE, again.read(&mut byte))
        .await
        .expect("in time");
    assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
    assert!(network.frames().connections_closed >= 2);
    network.heal();
    let _healed = TcpStream::connect(network.address(1, 2)).await.unwrap();
    timeout(DEADLINE, node.accept())
        .await
        .expect("in time")
        .unwrap();
}

/// Sends until the network has done it; gives what arrived behind the handshake's two frames.
async fn until(
    change: impl Fn(u64, u64, &mut Rules),
    done: impl Fn(Frames) -> u64,
) -> (Vec<u8>, u64) {
    let (network, mut one, mut two, _node) = connected().await;
    network.change(change);
    let mut arrived = Vec::new();
    let (mut sent, mut number) = (0u64, 0u8);
    while done(network.frames()) == 0 {
        assert!(sent < 100_000, "never happened");
        one.write_all(&frame(number)).await.unwrap();
        (sent, number) = (sent + 1, number.wrapping_add(1));
        let mut bytes = [0; 32];
        let quick = Duration::from_millis(20);
        while let Ok(Ok(_)) = timeout(quick, two.read_exact(&mut bytes)).await {
            arrived.push(bytes[4]);
            if arrived.len() as u64 >= sent {
                break;
            }
        }
    }
    network.heal();
    one.write_all(&frame(number)).await.unwrap();
    one.shutdown().await.unwrap();
    let mut bytes = [0; 32];
    while timeout(DEADLINE, two.read_exact(&mut bytes))
        .await
        .expect("in time")
        .is_ok()
    {
        arrived.push(bytes[4]);
    }
    (arrived, sent + 1)
}

#[tokio::test]
async fn a_repeated_frame_arrives_twice_in_a_row() {
    let (arrived, sent) = until(|_, _, rules| rules.duplicate = true, |f| f.duplicated).await;
    let twice = arrived.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert_eq!((twice, arrived.len() as u64), (1, sent + 1));
}

#[tokio::test]
async fn swapped_frames_change_places_and_none_is_missing() {
    let (arrived, sent) = until(|_, _, rules| rules.reorder = true, |f| f.reordered).await;
    assert_eq!(arrived.len() as u64, sent);
    let swaps: Vec<_> = arrived
        .windows(2)
        .filter(|pair| pair[1] == pair[0].wrapping_sub(1))
        .collect();
    assert_eq!(swaps.len(), 1, "{arrived:?}");
}

#[tokio::test]
async fn delayed_frames_come_later_in_their_order() {
    let (network, mut one, mut two, _node) = connected().await;
    network.change(|_, _, rules| rules.delay = Some(Duration::from_millis(40)));
    for number in 0..20 {
        one.write_all(&frame(number)).await.unwrap();
    }
    for number in 0..20 {
        assert_eq!(receive(&mut two).await, number);
    }
    assert_eq!(network.frames().delayed, 20);
}
