//! The network between the machines.
//!
//! turmoil answers a dial over a cut wire as if nobody listened. A real one is not answered, and that
//! is the difference between a silent node and a dead process.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate_raft::NodeId;
use quorate_raft::link::{Dialer, Listener, Socket};
use turmoil::net::{TcpListener, TcpStream};

pub const PORT: u16 = 7000;

pub fn host_name(node: NodeId) -> String {
    format!("node-{node}")
}

pub fn address(node: NodeId) -> String {
    format!("{}:{PORT}", host_name(node))
}

/// Which wires are cut, in either direction.
#[derive(Debug, Default)]
pub struct Wires {
    cut: Mutex<BTreeSet<(String, String)>>,
}

impl Wires {
    pub fn cut(&self, a: NodeId, b: NodeId) {
        self.cut.lock().insert((address(a), address(b)));
    }

    pub fn mend(&self, a: NodeId, b: NodeId) {
        self.cut.lock().remove(&(address(a), address(b)));
    }

    fn is_cut(&self, a: &str, b: &str) -> bool {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let cut = self.cut.lock();
        cut.contains(&pair(a, b)) || cut.contains(&pair(b, a))
    }
}

pub struct SimulatedDialer {
    pub from: NodeId,
    pub wires: Arc<Wires>,
}

impl Dialer for SimulatedDialer {
    fn connect(&self, addr: String) -> BoxFuture<'static, io::Result<Socket>> {
        let (wires, own) = (self.wires.clone(), address(self.from));
        Box::pin(async move {
            match TcpStream::connect(addr.clone()).await {
                Ok(stream) => Ok(socket(stream)),
                // Whoever dials has its own patience.
                Err(_) if wires.is_cut(&own, &addr) => std::future::pending().await,
                Err(error) => Err(error),
            }
        })
    }
}

pub struct SimulatedListener(pub TcpListener);

impl Listener for SimulatedListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Socket>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            Ok(socket(stream))
        })
    }
}

fn socket(stream: TcpStream) -> Socket {
    let (read, write) = stream.into_split();
    Socket::new(read, write)
}
