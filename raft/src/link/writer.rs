//! The writer task of a connection: gathers what is queued and writes it in few calls.
//!
//! It takes frames as long as some are queued and fewer than [`BATCH_BYTES`] are gathered, then
//! writes; it never waits for more. Small bodies are copied behind their headers into one buffer,
//! large ones are written from where they are.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::connection::{Connection, Hold};
use super::error::DisconnectReason;
use super::wire::{self, Body, FrameNumber, Header};

/// Gathered bytes at which the writer stops looking for more.
const BATCH_BYTES: usize = 256 << 10;
/// Bodies up to this are copied: cheaper than an entry of the kernel's vector.
const COPY_BYTES: usize = 2 << 10;
/// Entries of one vectored write; Linux allows 1024.
const SLICES_MAX: usize = 256;

/// A frame in the writer's queue.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub header: Header,
    pub body: Body,
    /// Asked right before the frame is encoded; see [`Ticket`].
    pub ticket: Option<Arc<Ticket>>,
    /// Dropped when the frame was written.
    pub hold: Hold,
}

/// The two queues to the writer; the urgent one goes first.
#[derive(Debug)]
pub(crate) struct Queues {
    pub urgent: mpsc::UnboundedSender<Outgoing>,
    pub ordinary: mpsc::UnboundedSender<Outgoing>,
}

const QUEUED: u8 = 0;
const TAKEN: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Settles between caller and writer whether any byte of a frame may have left: either the writer
/// takes it or the caller withdraws it, never both.
#[derive(Debug, Default)]
pub(crate) struct Ticket {
    state: AtomicU8,
    /// Cleared when the frame is taken.
    clears: Option<Arc<AtomicBool>>,
}

impl Ticket {
    pub(crate) fn clearing(flag: Arc<AtomicBool>) -> Ticket {
        Ticket {
            clears: Some(flag),
            ..Ticket::default()
        }
    }

    /// Whether the frame was still queued, and now will never be sent.
    pub(crate) fn withdraw(&self) -> bool {
        let settled = self.settle(WITHDRAWN);
        settled.is_ok() || settled == Err(WITHDRAWN)
    }

    fn take(&self) -> bool {
        if let Some(flag) = &self.clears {
            flag.store(false, Ordering::Release);
        }
        self.settle(TAKEN).is_ok()
    }

    fn settle(&self, state: u8) -> Result<u8, u8> {
        self.state
            .compare_exchange(QUEUED, state, Ordering::AcqRel, Ordering::Acquire)
    }
}

/// Runs until the connection closes; closes it when writing fails.
pub(crate) async fn run(
    connection: Arc<Connection>,
    mut socket: impl AsyncWrite + Unpin,
    mut urgent: mpsc::UnboundedReceiver<Outgoing>,
    mut ordinary: mpsc::UnboundedReceiver<Outgoing>,
) {
    let mut batch = Batch::default();
    loop {
        let first = tokio::select! {
            biased;
            () = connection.closed.cancelled() => break,
            Some(frame) = urgent.recv() => frame,
            Some(frame) = ordinary.recv() => frame,
        };
        batch.push(first);
        while batch.bytes < BATCH_BYTES {
            match urgent.try_recv().or_else(|_| ordinary.try_recv()) {
                Ok(frame) => batch.push(frame),
                Err(_) => break,
            }
        }
        let written = tokio::select! {
            biased;
            () = connection.closed.cancelled() => break,
            written = batch.write(&mut socket) => written,
        };
        let stats = &connection.stats;
        match written {
            Ok(written) => {
                stats
                    .frames_sent
                    .fetch_add(written.frames, Ordering::Relaxed);
                stats.writes.fetch_add(written.writes, Ordering::Relaxed);
                stats.bytes_sent.fetch_add(written.bytes, Ordering::Relaxed);
            }
            Err(error) => {
                connection.close(DisconnectReason::Io(error.kind()));
                break;
            }
        }
    }
    // The peer may be beyond hearing.
    let _ = socket.shutdown().await;
}

/// Frames gathered for one go.
struct Batch {
    /// Of the next frame.
    number: FrameNumber,
    /// Complete pieces, in order; `tail` comes behind them.
    pieces: std::collections::VecDeque<Bytes>,
    tail: BytesMut,
    bytes: usize,
    frames: u64,
    holds: Vec<Hold>,
}

struct Written {
    frames: u64,
    writes: u64,
    bytes: u64,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            number: FrameNumber::FIRST,
            pieces: std::collections::VecDeque::new(),
            tail: BytesMut::new(),
            bytes: 0,
            frames: 0,
            holds: Vec::new(),
        }
    }
}

impl Batch {
    fn push(&mut self, frame: Outgoing) {
        if frame.ticket.is_some_and(|ticket| !ticket.take()) {
            return;
        }
        let parts = frame.body.parts();
        wire::encode_header(&frame.header, parts, self.number, &mut self.tail);
        self.number = self.number.next();
        self.bytes += wire::HEADER_BYTES + frame.body.len();
        self.frames += 1;
        for part in frame.body.parts() {
            if part.len() <= COPY_BYTES {
                self.tail.put_slice(part);
            } else {
                self.pieces.push_back(self.tail.split().freeze());
                self.pieces.push_back(part.clone());
            }
        }
        if !matches!(frame.hold, Hold::None) {
            self.holds.push(frame.hold);
        }
    }

    /// Writes everything and is empty again.
    async fn write(&mut self, socket: &mut (impl AsyncWrite + Unpin)) -> io::Result<Written> {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        let (frames, bytes) = (self.frames, self.bytes as u64);
        let mut writes = 0;
        while let Some(front) = self.pieces.front() {
            if front.is_empty() {
                self.pieces.pop_front();
                continue;
            }
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            let written = socket.write_vectored(&slices[..count]).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            writes += 1;
            self.advance(written);
        }
        self.bytes = 0;
        self.frames = 0;
        self.holds.clear();
        // Room for the next batch, from the same allocation when the pieces have gone.
        self.tail.reserve(16 << 10);
        Ok(Written {
            frames,
            writes,
            bytes,
        })
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(front) = self.pieces.front_mut() {
            if written < front.len() {
                front.advance(written);
                return;
            }
            written -= front.len();
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::wire::Kind;

    fn frame(parts: Vec<Bytes>) -> Outgoing {
        let (header, body) = (Header::of(Kind::StreamData), Body::Parts(parts));
        Outgoing {
            header,
            body,
            ticket: None,
            hold: Hold::None,
        }
    }

    #[tokio::test]
    async fn a_batch_is_the_concatenation_of_its_frames() {
        let mut batch = Batch::default();
        let bodies = [0, 1, COPY_BYTES, COPY_BYTES + 1, 3 * BATCH_BYTES];
        for (fill, bytes) in bodies.into_iter().enumerate() {
            let part = Bytes::from(vec![fill as u8; bytes]);
            batch.push(frame(vec![part.clone(), Bytes::new(), part]));
        }
        let mut written = Vec::new();
        batch.write(&mut written).await.expect("a vector takes all");
        let mut stream = BytesMut::from(&written[..]);
        let mut number = FrameNumber::FIRST;
        for (fill, bytes) in bodies.into_iter().enumerate() {
            let frame = wire::decode(&mut stream, 4 << 20, number)
                .expect("valid")
                .expect("complete");
            number = number.next();
            assert_eq!(frame.body, vec![fill as u8; 2 * bytes]);
        }
        assert!(stream.is_empty());
    }

    #[tokio::test]
    async fn a_withdrawn_frame_is_not_written() {
        let ticket = Arc::new(Ticket::default());
        assert!(ticket.withdraw());
        let mut batch = Batch::default();
        batch.push(Outgoing {
            ticket: Some(ticket),
            ..frame(vec![])
        });
        let mut written = Vec::new();
        batch.write(&mut written).await.expect("nothing to write");
        assert!(written.is_empty());
    }

    #[test]
    fn a_ticket_is_taken_or_withdrawn_never_both() {
        let ticket = Ticket::default();
        assert!(ticket.take());
        assert!(!ticket.withdraw());
        assert!(!ticket.take());
    }
}
