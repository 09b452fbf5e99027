//! A minimal HTTP/1.1 keep-alive client that talks to Quorate only.
//!
//! The load generator shares its processors with the servers it measures, so it sends bytes that
//! were prepared before and reads no more of an answer than its status and length. It has one
//! request in flight at a time and understands `Content-Length` only; anything else is an error.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Larger heads are not Quorate's.
const HEAD_BYTES_MAX: usize = 16 << 10;

#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer; the body lies in the connection's buffer until the next exchange.
#[derive(Debug)]
pub struct Reply<'a> {
    pub status: u16,
    pub body: &'a [u8],
    /// The server closes the connection after this answer.
    pub last: bool,
}

impl Connection {
    /// Connects to `host:port`.
    pub async fn open(address: &str, limit: Duration) -> io::Result<Self> {
        let stream = within(limit, TcpStream::connect(address)).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::with_capacity(4096),
        })
    }

    /// Sends one request and reads its whole answer. After an error the connection is of no use.
    pub async fn exchange(&mut self, request: &[u8], limit: Duration) -> io::Result<Reply<'_>> {
        self.buffer.clear();
        let (head, head_bytes) = within(limit, async {
            self.stream.write_all(request).await?;
            let (head, head_bytes) = loop {
                if let Some(found) = parse_head(&self.buffer)? {
                    break found;
                }
                self.read_more().await?;
            };
            while self.buffer.len() < head_bytes + head.body_bytes {
                self.read_more().await?;
            }
            Ok((head, head_bytes))
        })
        .await?;
        let body = &self.buffer[head_bytes..head_bytes + head.body_bytes];
        Ok(Reply {
            status: head.status,
            body,
            last: head.last,
        })
    }

    async fn read_more(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    status: u16,
    body_bytes: usize,
    last: bool,
}

/// The head and its length in bytes; None while it is not complete.
fn parse_head(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return match bytes.len() > HEAD_BYTES_MAX {
            true => Err(invalid("the answer's head is too long")),
            false => Ok(None),
        };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| invalid("the head is no text"))?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| invalid("this is not an HTTP/1.1 answer"))?;
    let mut body_bytes = (status == 204).then_some(0);
    let mut last = false;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            body_bytes = value.trim().parse().ok();
        } else if name.eq_ignore_ascii_case("connection") {
            last = value.trim().eq_ignore_ascii_case("close");
        }
    }
    let body_bytes = body_bytes.ok_or_else(|| invalid("the answer has no Content-Length"))?;
    let head = Head {
        status,
        body_bytes,
        last,
    };
    Ok(Some((head, end + 4)))
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Answers each read with the next of these pieces, then closes.
    async fn server(pieces: &'static [&'static [&'static str]]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            for answer in pieces {
                let _ = stream.read(&mut request).await.unwrap();
                for piece in *answer {
                    stream.write_all(piece.as_bytes()).await.unwrap();
                    stream.flush().await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn a_connection_is_used_again_whatever_pieces_come() {
        let address = server(&[
            &["HTTP/1.1 200 OK\r\nContent-Le", "ngth: 5\r\n\r\nab", "cde"],
            &["HTTP/1.1 503 No\r\ncontent-length: 2\r\nConnection: close\r\n\r\n{}"],
        ])
        .await;
        let mut connection = Connection::open(&address, LIMIT).await.unwrap();
        let reply = connection.exchange(b"x", LIMIT).await.unwrap();
        assert_eq!(
            (reply.status, reply.body, reply.last),
            (200, &b"abcde"[..], false)
        );
        let reply = connection.exchange(b"x", LIMIT).await.unwrap();
        assert_eq!(
            (reply.status, reply.body, reply.last),
            (503, &b"{}"[..], true)
        );
    }

    #[tokio::test]
    async fn an_answer_cut_short_is_an_error() {
        let address = server(&[&["HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"]]).await;
        let mut connection = Connection::open(&address, LIMIT).await.unwrap();
        let error = connection.exchange(b"x", LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(parse_head(b"SSH-2.0\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
        assert!(parse_head(&[b'a'; HEAD_BYTES_MAX + 1]).is_err());
        assert_eq!(parse_head(b"HTTP/1.1 200 OK\r\n").unwrap(), None);
    }
}
