//! A peer played by a test: the handshake and frames over a raw socket.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::TcpStream;

use super::hello::{self, Greeting};
use super::tests::config;
use super::transport::Socket;
use super::wire::{self, FrameNumber, Header, Kind};
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

/// The frames of one direction behind the handshake.
pub(crate) struct Frames(FrameNumber);

impl Default for Frames {
    fn default() -> Self {
        Self(FrameNumber::FIRST)
    }
}

impl Frames {
    pub(crate) fn next(&mut self, header: Header, body: &[u8]) -> BytesMut {
        let mut bytes = BytesMut::new();
        let parts = [Bytes::copy_from_slice(body)];
        wire::encode_header(&header, &parts, self.0, &mut bytes);
        self.0 = self.0.next();
        bytes.put_slice(body);
        bytes
    }

    pub(crate) fn ping(&mut self, incarnation: u64) -> BytesMut {
        let mut body = incarnation.to_le_bytes().to_vec();
        body.extend_from_slice(&[0; 8]);
        self.next(Header::of(Kind::Ping), &body)
    }
}

/// The first frame behind the handshake.
pub(crate) fn frame(header: Header, body: &[u8]) -> BytesMut {
    Frames::default().next(header, body)
}
