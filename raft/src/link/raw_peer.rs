//! A peer played by a test: the handshake and frames over a raw socket.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::TcpStream;

use super::hello::{self, Greeting};
use super::tests::config;
use super::transport::Socket;
use super::wire::{self, Header, Kind};
use crate::NodeId;

/// Connects to `at`, which is node `to`, and shakes hands as node `from`.
pub(crate) async fn greet(at: &str, from: NodeId, incarnation: u64, to: NodeId) -> Socket {
    let mut raw = Socket::from(TcpStream::connect(at).await.expect("listening"));
    let mut config = config(from, vec![]);
    config.incarnation = incarnation;
    let ours = Greeting::new(&config, None, to);
    hello::dial(&mut raw, &ours, &config.registry)
        .await
        .expect("accepted");
    raw
}

pub(crate) fn frame(header: Header, body: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    wire::encode_header(&header, &[Bytes::copy_from_slice(body)], &mut bytes);
    bytes.put_slice(body);
    bytes
}

pub(crate) fn ping(incarnation: u64) -> BytesMut {
    let mut body = incarnation.to_le_bytes().to_vec();
    body.extend_from_slice(&[0; 8]);
    frame(Header::of(Kind::Ping), &body)
}
