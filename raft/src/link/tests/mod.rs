//! Links between real sockets on loopback. Waiting is for conditions, with a deadline.

mod calls;
mod handshake;
mod hostile;
mod raw;
mod reconnect;
mod streams;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, broadcast, mpsc};
use uuid::Uuid;

use super::*;

/// No condition in these tests takes longer, even on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const ECHO: u8 = 1;
/// Answered when the test releases it.
pub(crate) const HELD: u8 = 2;
pub(crate) const PANIC: u8 = 3;
/// Echoed as well, and a class that `config` calls urgent.
pub(crate) const URGENT: u8 = 4;

pub(crate) struct IncomingStream {
    pub from: NodeId,
    pub group: u64,
    pub hello: Bytes,
    pub stream: LinkStream,
}

/// Answers calls by class and hands streams to the test.
pub(crate) struct TestHandler {
    streams: mpsc::UnboundedSender<IncomingStream>,
    pub release: Arc<Semaphore>,
    pub held: Arc<AtomicUsize>,
}

impl LinkHandler for TestHandler {
    fn call(&self, from: NodeId, class: u8, group: u64, body: Bytes) -> BoxFuture<'static, Bytes> {
        let (release, held) = (self.release.clone(), self.held.clone());
        async move {
            match class {
                ECHO | URGENT => body,
                HELD => {
                    held.fetch_add(1, Ordering::SeqCst);
                    release.acquire().await.expect("never closed").forget();
                    body
                }
                _ => panic!("call of class {class} group {group} from {from}, as asked"),
            }
        }
        .boxed()
    }

    fn stream(
        &self,
        from: NodeId,
        group: u64,
        hello: Bytes,
        stream: LinkStream,
    ) -> BoxFuture<'static, ()> {
        let _ = self.streams.send(IncomingStream {
            from,
            group,
            hello,
            stream,
        });
        async {}.boxed()
    }
}

/// A running link and what a test needs of it.
pub(crate) struct Node {
    pub table: Arc<LinkTable>,
    pub handler: Arc<TestHandler>,
    pub events: Mutex<broadcast::Receiver<PeerEvent>>,
    streams: Mutex<mpsc::UnboundedReceiver<IncomingStream>>,
}

impl Node {
    pub fn start(config: LinkConfig, listener: TcpListener) -> Node {
        config.validate().expect("valid");
        let (sender, streams) = mpsc::unbounded_channel();
        let handler = Arc::new(TestHandler {
            streams: sender,
            release: Arc::new(Semaphore::new(0)),
            held: Arc::default(),
        });
        let table = LinkTable::start(config, listener, handler.clone());
        let events = Mutex::new(table.events());
        Node {
            table,
            handler,
            events,
            streams: Mutex::new(streams),
        }
    }

    pub async fn incoming(&self) -> IncomingStream {
        let mut streams = self.streams.lock().await;
        within(streams.recv()).await.expect("the handler lives")
    }

    pub async fn connected_to(&self, node: NodeId) {
        let mut changes = self.table.changes();
        within(changes.wait_for(|_| self.table.connected(node)))
            .await
            .expect("the table lives");
    }

    /// The first event that `wanted` takes; the others are passed over.
    pub async fn event<T>(&self, wanted: impl Fn(&PeerEvent) -> Option<T>) -> T {
        let mut events = self.events.lock().await;
        loop {
            let event = within(events.recv()).await.expect("no event is lost");
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    }

    pub async fn echo(&self, node: NodeId, body: Bytes) -> Result<Bytes, CallError> {
        self.table.call(node, ECHO, 0, body, DEADLINE).await
    }
}

pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("before the deadline")
}

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain until {what}");
}

pub(crate) async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port")
}

pub(crate) fn addr(listener: &TcpListener) -> String {
    listener.local_addr().expect("bound").to_string()
}

pub(crate) fn config(node: NodeId, peers: Vec<(NodeId, String)>) -> LinkConfig {
    let mut config = LinkConfig::new("test", node, Uuid::from_u128(node.into()), peers);
    config.urgent_classes = &[URGENT];
    config
}

/// Nodes 1..=count, each knowing all the others, all connected.
pub(crate) async fn cluster(count: u64, change: impl Fn(&mut LinkConfig)) -> Vec<Node> {
    let mut listeners = Vec::new();
    for node in 1..=count {
        listeners.push((node, listener().await));
    }
    let peers: Vec<_> = listeners
        .iter()
        .map(|(node, bound)| (*node, addr(bound)))
        .collect();
    let nodes: Vec<_> = listeners
        .into_iter()
        .map(|(node, bound)| {
            let mut config = config(node, peers.clone());
            change(&mut config);
            Node::start(config, bound)
        })
        .collect();
    for node in &nodes {
        for peer in node.table.peers() {
            node.connected_to(peer).await;
        }
    }
    nodes
}

pub(crate) fn body(fill: u8, bytes: usize) -> Bytes {
    Bytes::from(vec![fill; bytes])
}
