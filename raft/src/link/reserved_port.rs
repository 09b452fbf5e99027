use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};

/// A port on 127.0.0.1 that is kept while whoever listens on it comes and goes.
///
/// A port that was free a moment ago may be somebody's when a node starts on it: connections that
/// others open take any free port, too. This one is bound, but nobody listens on it by that, and on
/// Linux a listener that also reuses addresses, as tokio's do, can be bound to the same. The
/// kernel gives it to none who ask for any port, and connections to it are refused until a listener
/// is there. On other systems only the first start is safe.
pub struct ReservedPort {
    address: SocketAddr,
    _bound: Option<TcpSocket>,
}

impl ReservedPort {
    /// Fails when there is no free port or no free file descriptor.
    pub fn new() -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = socket.local_addr()?;
        let bound = cfg!(target_os = "linux").then_some(socket);
        Ok(Self {
            address,
            _bound: bound,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Listens, in this process; one listener at a time.
    pub async fn listen(&self) -> io::Result<TcpListener> {
        TcpListener::bind(self.address).await
    }
}

impl fmt::Debug for ReservedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReservedPort").field(&self.address).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn listeners_come_and_go() {
        let port = ReservedPort::new().unwrap();
        for _ in 0..3 {
            TcpStream::connect(port.address()).await.unwrap_err();
            let listener = port.listen().await.unwrap();
            let (there, here) = tokio::join!(TcpStream::connect(port.address()), listener.accept());
            drop((there.unwrap(), here.unwrap(), listener));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn it_is_taken_while_nobody_listens() {
        let port = ReservedPort::new().unwrap();
        let other = TcpSocket::new_v4().unwrap();
        let refused = other.bind(port.address()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    }
}
