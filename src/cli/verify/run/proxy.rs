//! The network between the nodes, in this process: each node looks for each other one at a
//! listener of its own here, which passes the bytes on, or doesn't.
//!
//! Per direction the frames of the link are told apart, so that whole frames can be held back,
//! delayed, repeated and swapped. What is held back comes when the network heals, as TCP would
//! bring it, unless the nodes have given the connection up.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quorate_raft::link::frame_bytes;
use rand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

/// Frames on their way in one direction of one connection.
const FRAMES_MAX: usize = 1024;
/// Frames of the handshake, which pass as they are: the faults are for connections in use.
const HANDSHAKE_FRAMES: u64 = 2;
/// Larger than any frame of the nodes: what claims more is not one.
const FRAME_BYTES_MAX: usize = 128 << 20;
/// Of the frames that could be repeated or swapped, so many are.
const PART: f64 = 0.02;

/// What happens to what one node sends to another.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rules {
    pub cut: Option<Cut>,
    pub delay: Option<Duration>,
    pub duplicate: bool,
    pub reorder: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing arrives, and nobody is told.
    Silent,
    /// Connections are closed, and new ones at once.
    Closed,
}

/// What the network has done so far.
#[derive(Debug, Default)]
pub struct Counters {
    pub frames: AtomicU64,
    pub held: AtomicU64,
    pub closed: AtomicU64,
    pub delayed: AtomicU64,
    pub duplicated: AtomicU64,
    pub reordered: AtomicU64,
}

/// A reading of [`Counters`].
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Frames {
    pub passed: u64,
    pub held: u64,
    pub connections_closed: u64,
    pub delayed: u64,
    pub duplicated: u64,
    pub reordered: u64,
}

/// All directions between all nodes. Dropping it ends all connections.
#[derive(Debug)]
pub struct Network {
    directions: BTreeMap<(u64, u64), watch::Sender<Rules>>,
    /// Where `.0` looks for `.1`.
    addresses: BTreeMap<(u64, u64), String>,
    counters: Arc<Counters>,
    _listeners: JoinSet<()>,
}

impl Network {
    /// Listens for every ordered pair; `peer_ports` are the nodes' own, in the order of their ids.
    pub async fn start(peer_ports: &[u16]) -> io::Result<Self> {
        let ids = 1..=peer_ports.len() as u64;
        let pairs = ids.clone().flat_map(|a| ids.clone().map(move |b| (a, b)));
        let pairs: Vec<(u64, u64)> = pairs.filter(|(a, b)| a != b).collect();
        let rules = |pair: &(u64, u64)| (*pair, watch::Sender::new(Rules::default()));
        let directions: BTreeMap<_, _> = pairs.iter().map(rules).collect();
        let counters = Arc::new(Counters::default());
        let mut addresses = BTreeMap::new();
        let mut listeners = JoinSet::new();
        for (dialer, acceptor) in pairs {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            addresses.insert((dialer, acceptor), listener.local_addr()?.to_string());
            let wire = Wire {
                target: format!("127.0.0.1:{}", peer_ports[acceptor as usize - 1]),
                there: directions[&(dialer, acceptor)].subscribe(),
                back: directions[&(acceptor, dialer)].subscribe(),
                counters: counters.clone(),
            };
            listeners.spawn(accept(listener, wire));
        }
        Ok(Self {
            directions,
            addresses,
            counters,
            _listeners: listeners,
        })
    }

    pub fn address(&self, dialer: u64, acceptor: u64) -> String {
        self.addresses
            .get(&(dialer, acceptor))
            .cloned()
            .unwrap_or_default()
    }

    /// Changes the rules of every direction.
    pub fn change(&self, change: impl Fn(u64, u64, &mut Rules)) {
        for ((from, to), rules) in &self.directions {
            rules.send_if_modified(|rules| {
                let before = *rules;
                change(*from, *to, rules);
                *rules != before
            });
        }
    }

    pub fn heal(&self) {
        self.change(|_, _, rules| *rules = Rules::default());
    }

    pub fn frames(&self) -> Frames {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Frames {
            passed: get(&self.counters.frames),
            held: get(&self.counters.held),
            connections_closed: get(&self.counters.closed),
            delayed: get(&self.counters.delayed),
            duplicated: get(&self.counters.duplicated),
            reordered: get(&self.counters.reordered),
        }
    }
}

/// What connections of one dialer to one acceptor need.
#[derive(Clone)]
struct Wire {
    target: String,
    there: watch::Receiver<Rules>,
    back: watch::Receiver<Rules>,
    counters: Arc<Counters>,
}

async fn accept(listener: TcpListener, wire: Wire) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(carry(socket, wire.clone()));
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection until it ends.
async fn carry(dialer: TcpStream, mut wire: Wire) {
    // Who is cut off in either direction does not come to the other's ear.
    let cut = loop {
        let cuts = [
            wire.there.borrow_and_update().cut,
            wire.back.borrow_and_update().cut,
        ];
        match cuts {
            [Some(Cut::Closed), _] | [_, Some(Cut::Closed)] => break true,
            [None, None] => break false,
            _ => {}
        }
        tokio::select! {
            changed = wire.there.changed() => if changed.is_err() { return },
            changed = wire.back.changed() => if changed.is_err() { return },
        }
    };
    if cut {
        wire.counters.closed.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let Ok(acceptor) = TcpStream::connect(&wire.target).await else {
        return;
    };
    let _ = dialer.set_nodelay(true);
    let _ = acceptor.set_nodelay(true);
    let (from_dialer, to_dialer) = dialer.into_split();
    let (from_acceptor, to_acceptor) = acceptor.into_split();
    let counters = &wire.counters;
    let there = pump(from_dialer, to_acceptor, wire.there.clone(), counters);
    let back = pump(from_acceptor, to_dialer, wire.back.clone(), counters);
    tokio::pin!(there, back);
    // One end is the end of both: half of a link's connection is of no use.
    tokio::select! {
        () = &mut there => {}
        () = &mut back => {}
        () = closed(wire.there.clone()) => { counters.closed.fetch_add(1, Ordering::Relaxed); return; }
        () = closed(wire.back.clone()) => { counters.closed.fetch_add(1, Ordering::Relaxed); return; }
    }
    // An end is not heard through a cut either.
    for rules in [&mut wire.there, &mut wire.back] {
        let _ = rules.wait_for(|rules| rules.cut != Some(Cut::Silent)).await;
    }
}

async fn closed(mut rules: watch::Receiver<Rules>) {
    let closed = |rules: &Rules| rules.cut == Some(Cut::Closed);
    let gone = rules.wait_for(closed).await.is_err();
    if gone {
        std::future::pending::<()>().await;
    }
}

/// One direction: reads frames, and writes them when and as the rules say.
async fn pump(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    rules: watch::Receiver<Rules>,
    counters: &Counters,
) {
    let (sender, frames) = mpsc::channel(FRAMES_MAX);
    let reading = read(from, sender, rules.clone(), counters);
    let writing = write(to, frames, rules, counters);
    // The writer ends when it has written what was read before the end.
    let ((), ()) = tokio::join!(reading, writing);
}

struct Timed {
    due: Instant,
    frame: Bytes,
}

async fn read(
    mut from: OwnedReadHalf,
    sender: mpsc::Sender<Timed>,
    rules: watch::Receiver<Rules>,
    counters: &Counters,
) {
    let mut buffer = BytesMut::new();
    let mut due = Instant::now();
    loop {
        while let Some(length) = frame_bytes(&buffer) {
            if length > FRAME_BYTES_MAX {
                return;
            }
            if buffer.len() < length {
                break;
            }
            let frame = buffer.split_to(length).freeze();
            let delay = rules.borrow().delay;
            if let Some(most) = delay {
                counters.delayed.fetch_add(1, Ordering::Relaxed);
                // Order stays: nothing overtakes.
                due = due.max(Instant::now() + rand::rng().random_range(most / 4..=most));
            }
            if sender.send(Timed { due, frame }).await.is_err() {
                return;
            }
        }
        buffer.reserve(64 << 10);
        tokio::select! {
            read = from.read_buf(&mut buffer) => if !matches!(read, Ok(1..)) { return },
            () = sender.closed() => return,
        }
    }
}

async fn write(
    mut to: OwnedWriteHalf,
    mut frames: mpsc::Receiver<Timed>,
    mut rules: watch::Receiver<Rules>,
    counters: &Counters,
) {
    let mut number = 0;
    let mut swapped: Option<Bytes> = None;
    while let Some(Timed { due, frame }) = frames.recv().await {
        sleep_until(due).await;
        if rules.borrow().cut.is_some() {
            counters.held.fetch_add(1, Ordering::Relaxed);
            if rules.wait_for(|rules| rules.cut.is_none()).await.is_err() {
                return;
            }
        }
        number += 1;
        let Rules {
            duplicate, reorder, ..
        } = *rules.borrow();
        let hit = number > HANDSHAKE_FRAMES && rand::rng().random_bool(PART);
        let mut pieces = vec![frame];
        if let Some(earlier) = swapped.take() {
            counters.reordered.fetch_add(1, Ordering::Relaxed);
            pieces.push(earlier);
        } else if hit && reorder {
            swapped = pieces.pop();
            continue;
        } else if hit && duplicate {
            counters.duplicated.fetch_add(1, Ordering::Relaxed);
            pieces.push(pieces[0].clone());
        }
        for piece in pieces {
            if to.write_all(&piece).await.is_err() {
                return;
            }
            counters.frames.fetch_add(1, Ordering::Relaxed);
        }
    }
    // Whoever still listens learns of the end, but not through a cut.
    let _ = rules.wait_for(|rules| rules.cut.is_none()).await;
    let _ = to.shutdown().await;
}

#[cfg(test)]
#[path = "proxy_tests.rs"]
mod tests;
