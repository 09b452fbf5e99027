//! Ordered streams inside a connection, each with a window of its own.
//!
//! The sender starts with the window the receiver named in its hello, spends it with every frame
//! and gets it back when the receiver has consumed. So a slow reader stops its own sender and
//! nobody else, and what a reader has not read is bounded. A sender that ignores its window loses
//! the stream.
//!
//! A frame is charged its body and [`FRAME_CHARGE_BYTES`], at most half of the window. The
//! receiver reports what was consumed once it is half of the window: so at least one permit more
//! than half is always on its way back, and no frame can wait for ever.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::connection::{Connection, Hold};
use super::error::{StreamEnd, StreamError};
use super::wire::{Body, Header, Kind};
use crate::NodeId;

/// What a frame costs beyond its body, so that empty frames are bounded too.
const FRAME_CHARGE_BYTES: usize = 64;

/// One end of an ordered stream of frames. Dropping it closes both directions; frames already
/// sent still arrive before the close.
///
/// Both methods take `&self`: one task may send while another receives. Frames sent one after the
/// other are received in that order.
#[derive(Debug)]
pub struct LinkStream {
    state: Arc<StreamState>,
    connection: Arc<Connection>,
}

impl LinkStream {
    pub(crate) fn new(state: Arc<StreamState>, connection: Arc<Connection>) -> LinkStream {
        LinkStream { state, connection }
    }

    /// The node at the other end.
    pub fn peer(&self) -> NodeId {
        self.connection.node()
    }

    /// The Raft group the stream was opened for.
    pub fn group(&self) -> u64 {
        self.state.group
    }

    /// Queues one frame, waiting while the receiver's window is full. `Ok` says nothing about
    /// arrival. Dropping the future before it is ready sends nothing.
    pub async fn send(&self, body: Bytes) -> Result<(), StreamError> {
        self.send_body(Body::One(body)).await
    }

    /// As [`send`](Self::send): one frame from many pieces, which are not copied together.
    pub async fn send_parts(&self, parts: Vec<Bytes>) -> Result<(), StreamError> {
        self.send_body(Body::Parts(parts)).await
    }

    async fn send_body(&self, body: Body) -> Result<(), StreamError> {
        let body_bytes = body.len();
        if !self.connection.fits(body_bytes) {
            return Err(StreamError::TooLarge);
        }
        let charge = charge(body_bytes, self.state.send_window_bytes);
        match self.state.credit.acquire_many(charge as u32).await {
            Ok(permit) => permit.forget(),
            Err(_) => return Err(StreamError::Closed(self.end_or_dropped())),
        }
        let header = Header {
            channel: self.state.id,
            ..Header::of(Kind::StreamData)
        };
        if self.connection.push(header, body, Hold::None) {
            Ok(())
        } else {
            Err(StreamError::Closed(StreamEnd::ConnectionLost))
        }
    }

    /// The next frame, or `None` when the stream is over and all that had arrived was taken.
    /// Dropping the future loses nothing.
    pub async fn recv(&self) -> Option<Bytes> {
        loop {
            let arrival = self.state.arrival.notified();
            match self.state.take(self.connection.recv_window_bytes()) {
                Taken::Frame { body, give_back } => {
                    if give_back > 0 {
                        self.give_back(give_back);
                    }
                    return Some(body);
                }
                Taken::Nothing => arrival.await,
                Taken::End => return None,
            }
        }
    }

    /// Why the stream is over, once it is.
    pub fn end(&self) -> Option<StreamEnd> {
        self.state.inbox.lock().end
    }

    fn end_or_dropped(&self) -> StreamEnd {
        self.end().unwrap_or(StreamEnd::Dropped)
    }

    fn give_back(&self, bytes: usize) {
        let header = Header {
            channel: self.state.id,
            group: bytes as u64,
            ..Header::of(Kind::StreamCredit)
        };
        self.connection.push(header, Body::EMPTY, Hold::None);
    }
}

impl Drop for LinkStream {
    fn drop(&mut self) {
        self.connection
            .close_stream(self.state.id, StreamEnd::Dropped);
    }
}

/// What the reader task and a [`LinkStream`] share.
#[derive(Debug)]
pub(crate) struct StreamState {
    id: u64,
    group: u64,
    send_window_bytes: usize,
    credit: Semaphore,
    inbox: Mutex<Inbox>,
    arrival: Notify,
}

#[derive(Debug, Default)]
struct Inbox {
    frames: VecDeque<Bytes>,
    /// Charges of frames that arrived and were not reported consumed.
    charged_bytes: usize,
    /// The part of `charged_bytes` that is consumed.
    consumed_bytes: usize,
    end: Option<StreamEnd>,
}

enum Taken {
    Frame { body: Bytes, give_back: usize },
    Nothing,
    End,
}

impl StreamState {
    pub(crate) fn new(id: u64, group: u64, send_window_bytes: usize) -> StreamState {
        StreamState {
            id,
            group,
            send_window_bytes,
            credit: Semaphore::new(send_window_bytes),
            inbox: Mutex::default(),
            arrival: Notify::new(),
        }
    }

    /// A frame has arrived. False when it is beyond the window: the stream must be closed.
    pub(crate) fn arrived(&self, body: Bytes, recv_window_bytes: usize) -> bool {
        let mut inbox = self.inbox.lock();
        if inbox.end.is_some() {
            return true;
        }
        inbox.charged_bytes += charge(body.len(), recv_window_bytes);
        if inbox.charged_bytes > recv_window_bytes {
            return false;
        }
        inbox.frames.push_back(body);
        drop(inbox);
        self.arrival.notify_one();
        true
    }

    /// The receiver has consumed so many bytes. False when it gives back more than was spent.
    pub(crate) fn credited(&self, bytes: u64) -> bool {
        let Ok(bytes) = usize::try_from(bytes) else {
            return false;
        };
        if bytes.saturating_add(self.credit.available_permits()) > self.send_window_bytes {
            return false;
        }
        self.credit.add_permits(bytes);
        true
    }

    /// The stream is over; the first reason stays.
    pub(crate) fn ended(&self, end: StreamEnd) {
        self.inbox.lock().end.get_or_insert(end);
        self.credit.close();
        self.arrival.notify_waiters();
        self.arrival.notify_one();
    }

    fn take(&self, recv_window_bytes: usize) -> Taken {
        let mut inbox = self.inbox.lock();
        let Some(body) = inbox.frames.pop_front() else {
            return if inbox.end.is_some() {
                Taken::End
            } else {
                Taken::Nothing
            };
        };
        inbox.consumed_bytes += charge(body.len(), recv_window_bytes);
        let mut give_back = 0;
        if inbox.consumed_bytes >= recv_window_bytes / 2 && inbox.end.is_none() {
            give_back = std::mem::take(&mut inbox.consumed_bytes);
            inbox.charged_bytes -= give_back;
        }
        Taken::Frame { body, give_back }
    }
}

/// What a frame costs of a window; the same on both sides.
fn charge(body_bytes: usize, window_bytes: usize) -> usize {
    (body_bytes + FRAME_CHARGE_BYTES).min(window_bytes / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumed_bytes_come_back_before_a_frame_of_any_size_can_starve() {
        let window = 4096;
        let sender = StreamState::new(1, 0, window);
        let receiver = StreamState::new(1, 0, window);
        // Small frames leave consumed bytes unreported; then a large one needs its share.
        for size in [0, 1, 1 << 20, 100, 1900, 1 << 20, 2000, 2048].repeat(100) {
            let cost = charge(size, window) as u32;
            let credit = sender.credit.try_acquire_many(cost);
            credit.expect("credit left").forget();
            assert!(receiver.arrived(Bytes::from(vec![0; size]), window));
            let Taken::Frame { give_back, .. } = receiver.take(window) else {
                panic!("nothing arrived")
            };
            assert!(sender.credited(give_back as u64));
        }
    }

    #[test]
    fn a_sender_beyond_its_window_is_noticed() {
        let receiver = StreamState::new(1, 0, 4096);
        let arrived = (0..).take_while(|_| receiver.arrived(Bytes::from(vec![0; 960]), 4096));
        assert_eq!(arrived.count(), 4);
    }

    #[test]
    fn credit_for_what_was_never_sent_is_noticed() {
        let sender = StreamState::new(1, 0, 4096);
        assert!(!sender.credited(1));
        assert!(!sender.credited(u64::MAX));
    }
}
