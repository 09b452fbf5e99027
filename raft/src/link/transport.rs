//! The seam to the network: real sockets, or those of a simulation.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

pub type ReadHalf = Box<dyn AsyncRead + Send + Unpin>;
pub type WriteHalf = Box<dyn AsyncWrite + Send + Unpin>;

/// One connection. Dropping the halves closes it.
pub struct Socket {
    read: ReadHalf,
    write: WriteHalf,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Socket")
    }
}

impl Socket {
    pub fn new(
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        Self {
            read: Box::new(read),
            write: Box::new(write),
        }
    }

    pub(crate) fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_shutdown(cx)
    }
}

/// Where a node listens for its peers.
pub trait Listener: Send + 'static {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Socket>>;
}

/// How a node reaches its peers.
pub trait Dialer: Send + Sync + 'static {
    fn connect(&self, addr: String) -> BoxFuture<'static, io::Result<Socket>>;
}

/// Both ends of a node's network. A bound TCP listener turns into one by itself.
pub struct Network {
    pub listener: Box<dyn Listener>,
    pub dialer: Box<dyn Dialer>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

impl From<TcpListener> for Network {
    fn from(listener: TcpListener) -> Self {
        Self {
            listener: Box::new(listener),
            dialer: Box::new(Tcp),
        }
    }
}

impl Listener for TcpListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Socket>> {
        Box::pin(async {
            let (stream, _) = TcpListener::accept(self).await?;
            Ok(stream.into())
        })
    }
}

struct Tcp;

impl Dialer for Tcp {
    fn connect(&self, addr: String) -> BoxFuture<'static, io::Result<Socket>> {
        Box::pin(async move { Ok(TcpStream::connect(addr).await?.into()) })
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        // Without it small frames wait for acknowledgements; nothing breaks.
        let _ = stream.set_nodelay(true);
        let (read, write) = stream.into_split();
        Self::new(read, write)
    }
}
