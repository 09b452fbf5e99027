//! A network on which everything arrives later, by as much as the test says at that moment.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use quorate_raft::link::{Dialer, Listener, Network, Socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// What a test turns to slow down all wires, one way.
#[derive(Debug, Clone, Default)]
pub struct Delay(Arc<AtomicU64>);

impl Delay {
    pub fn set(&self, delay: Duration) {
        self.0.store(delay.as_millis() as u64, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    pub fn network(&self, listener: TcpListener) -> Network {
        Network {
            listener: Box::new(SlowListener(listener, self.clone())),
            dialer: Box::new(SlowDialer(self.clone())),
        }
    }

    /// Each end delays what it sends.
    fn socket(&self, stream: TcpStream) -> Socket {
        stream.set_nodelay(true).ok();
        let (read, mut write) = stream.into_split();
        let (outgoing, mut sent) = tokio::io::duplex(1 << 20);
        let (later, mut due) = mpsc::unbounded_channel();
        let delay = self.clone();
        tokio::spawn(async move {
            let mut bytes = BytesMut::new();
            while sent.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
                let arrives = Instant::now() + delay.get();
                later.send((arrives, bytes.split())).ok();
            }
        });
        tokio::spawn(async move {
            while let Some((arrives, bytes)) = due.recv().await {
                sleep_until(arrives).await;
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        Socket::new(read, outgoing)
    }
}

struct SlowListener(TcpListener, Delay);

impl Listener for SlowListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Socket>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            Ok(self.1.socket(stream))
        })
    }
}

struct SlowDialer(Delay);

impl Dialer for SlowDialer {
    fn connect(&self, addr: String) -> BoxFuture<'static, io::Result<Socket>> {
        let delay = self.0.clone();
        Box::pin(async move { Ok(delay.socket(TcpStream::connect(addr).await?)) })
    }
}
