//! The reader task of a connection: decodes frames and hands each to whom it concerns.
//!
//! Invariant: handing out never waits. Calls run on tasks of their own or are refused; stream
//! frames go into bounded buffers.

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::FutureExt;
use parking_lot::RwLock;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::connection::Connection;
use super::error::{DisconnectReason, StreamEnd};
use super::wire::{self, AnswerStatus, Frame, FrameNumber, Kind};
use super::{LinkHandler, RESERVED_CLASSES};
use crate::NodeId;

/// Asked of the operating system in one read.
const READ_BYTES: usize = 128 << 10;
/// Below this much room a new buffer is taken.
const READ_BYTES_MIN: usize = 16 << 10;

/// Answers calls of one reserved class from memory, on the reader task.
pub(crate) type Responder = Arc<dyn Fn(NodeId, u64, Bytes) -> Bytes + Send + Sync>;

/// Who answers what comes in; shared by all connections.
pub(crate) struct Services {
    pub handler: Arc<dyn LinkHandler>,
    pub responders: RwLock<HashMap<u8, Responder>>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

/// Reads until the connection ends and says why it did. `buffer` holds what came in behind the
/// handshake.
pub(crate) async fn run(
    connection: &Arc<Connection>,
    services: &Arc<Services>,
    mut socket: impl AsyncRead + Unpin,
    mut buffer: BytesMut,
) -> DisconnectReason {
    let stats = &connection.stats;
    let mut due = FrameNumber::FIRST;
    loop {
        loop {
            match wire::decode(&mut buffer, connection.max_frame_bytes(), due) {
                Ok(Some(frame)) => {
                    due = due.next();
                    stats.frames_received.fetch_add(1, Ordering::Relaxed);
                    if let Err(broken) = dispatch(connection, services, frame) {
                        return DisconnectReason::Protocol(broken.to_owned());
                    }
                }
                Ok(None) => break,
                Err(error) => return DisconnectReason::Protocol(error.to_string()),
            }
        }
        if buffer.capacity() - buffer.len() < READ_BYTES_MIN {
            buffer.reserve(READ_BYTES);
        }
        let read = tokio::select! {
            biased;
            () = connection.closed.cancelled() => return DisconnectReason::Closed,
            read = socket.read_buf(&mut buffer) => read,
        };
        match read {
            Ok(0) => return DisconnectReason::Closed,
            Ok(bytes) => {
                connection.touch();
                stats
                    .bytes_received
                    .fetch_add(bytes as u64, Ordering::Relaxed);
            }
            Err(error) => return DisconnectReason::Io(error.kind()),
        }
    }
}

fn dispatch(
    connection: &Arc<Connection>,
    services: &Arc<Services>,
    Frame { header, body }: Frame,
) -> Result<(), &'static str> {
    let id = header.channel;
    match header.kind {
        Kind::Call if header.class >= RESERVED_CLASSES => {
            answer_reserved(connection, services, header.class, id, header.group, body);
        }
        Kind::Call => serve(connection, services, header.class, id, header.group, body),
        Kind::Answer => {
            let status = AnswerStatus::from_byte(header.class).ok_or("unknown answer status")?;
            connection.answered(id, status, body);
        }
        Kind::StreamOpen => {
            if let Some(stream) = connection.stream_opened(id, header.group)? {
                let (services, from) = (services.clone(), connection.node());
                tokio::spawn(async move {
                    services
                        .handler
                        .stream(from, header.group, body, stream)
                        .await;
                });
            }
        }
        Kind::StreamData => {
            // Frames of a stream this side has closed are on their way still.
            if let Some(stream) = connection.stream(id)
                && !stream.arrived(body, connection.recv_window_bytes())
            {
                connection.close_stream(id, StreamEnd::Overflow);
            }
        }
        Kind::StreamCredit => {
            if let Some(stream) = connection.stream(id)
                && !stream.credited(header.group)
            {
                return Err("credit for what was never sent");
            }
        }
        Kind::StreamClose => connection.stream_closed(id, StreamEnd::from_byte(header.class)),
        Kind::Ping => connection.pong(ping_clock(connection, &body)?),
        Kind::Pong => connection.ponged(ping_clock(connection, &body)?),
        Kind::Hello | Kind::Accept | Kind::Refuse | Kind::Knock => {
            return Err("a handshake in the middle of a connection");
        }
    }
    Ok(())
}

fn ping_clock(connection: &Connection, mut body: &[u8]) -> Result<u64, &'static str> {
    if body.len() != 16 {
        return Err("a ping of another size");
    }
    if body.get_u64_le() != connection.peer.incarnation {
        return Err("a ping of another incarnation");
    }
    Ok(body.get_u64_le())
}

fn answer_reserved(
    connection: &Arc<Connection>,
    services: &Services,
    class: u8,
    id: u64,
    group: u64,
    body: Bytes,
) {
    let responder = services.responders.read().get(&class).cloned();
    match responder {
        Some(respond) => {
            let body = respond(connection.node(), group, body);
            connection.answer_at_once(id, AnswerStatus::Done, body);
        }
        None => connection.answer_at_once(id, AnswerStatus::Refused, Bytes::new()),
    }
}

fn serve(
    connection: &Arc<Connection>,
    services: &Arc<Services>,
    class: u8,
    id: u64,
    group: u64,
    body: Bytes,
) {
    let Some(slot) = connection.in_service.admit(class, body.len()) else {
        connection
            .stats
            .calls_refused
            .fetch_add(1, Ordering::Relaxed);
        connection.answer_at_once(id, AnswerStatus::Refused, Bytes::new());
        return;
    };
    let (connection, services) = (connection.clone(), services.clone());
    tokio::spawn(async move {
        let from = connection.node();
        let served = async move { services.handler.call(from, class, group, body).await };
        let body = AssertUnwindSafe(served).catch_unwind().await.ok();
        connection.answer(id, body, slot);
    });
}
