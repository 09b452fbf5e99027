//! What the tasks of one connection share: calls that wait for answers, open streams, calls in
//! service, the queues to the writer, and the one place where it all ends.
//!
//! Invariant: after [`Connection::close`] every pending call has been told what is known of its
//! fate, every stream has ended, and nothing can be added any more.

mod calls;
mod streams;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::error::{CallError, DisconnectReason, NotSent, StreamEnd};
use super::hello::Greeting;
use super::service::{InService, ServiceSlot};
use super::wire::{Body, HEADER_BYTES, Header, Kind};
use super::writer::{Outgoing, Queues, Ticket};
use super::{LinkConfig, PeerStats, RESERVED_CLASSES};
use crate::NodeId;
use calls::{Pending, PendingCall};
use streams::Streams;

/// Answers that may be dropped (refusals, reserved classes) never fill memory: beyond so many
/// queued ones they are dropped, and the caller runs into its timeout.
const DROPPABLE_QUEUED_MAX: usize = 1024;

/// Larger frames are bulk whatever they are about.
const URGENT_BYTES_MAX: usize = 1 << 10;

/// What is let go when the writer has handed a frame to the operating system.
#[derive(Debug)]
pub(crate) enum Hold {
    None,
    /// Bytes of the queue's budget.
    Budget {
        _permit: OwnedSemaphorePermit,
    },
    /// The call whose answer this is no longer counts as in service.
    Service {
        _slot: ServiceSlot,
    },
    /// A place among the droppable frames.
    Droppable {
        _slot: DroppableSlot,
    },
}

#[derive(Debug)]
pub(crate) struct DroppableSlot(Arc<AtomicUsize>);

impl Drop for DroppableSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(crate) struct Connection {
    pub(crate) peer: Greeting,
    /// Of this side, in every ping.
    incarnation: u64,
    /// Zero of the clocks in `heard_ns` and in pings.
    epoch: Instant,
    max_frame_bytes: usize,
    max_streams: usize,
    recv_window_bytes: usize,
    queued_call_bytes_max: usize,
    urgent_classes: &'static [u8],
    queues: Queues,
    call_budget: Arc<Semaphore>,
    droppable: Arc<AtomicUsize>,
    pending: Mutex<Pending>,
    streams: Mutex<Streams>,
    pub(crate) in_service: Arc<InService>,
    pub(crate) closed: CancellationToken,
    heard_ns: AtomicU64,
    pings: Pings,
    pub(crate) stats: Arc<PeerStats>,
}

#[derive(Default)]
struct Pings {
    ping_queued: Arc<AtomicBool>,
    pong_queued: Arc<AtomicBool>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("node", &self.peer.node)
            .field("incarnation", &self.peer.incarnation)
            .finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(
        config: &LinkConfig,
        peer: Greeting,
        epoch: Instant,
        stats: Arc<PeerStats>,
    ) -> (
        Arc<Connection>,
        mpsc::UnboundedReceiver<Outgoing>,
        mpsc::UnboundedReceiver<Outgoing>,
    ) {
        let (urgent, urgent_frames) = mpsc::unbounded_channel();
        let (ordinary, ordinary_frames) = mpsc::unbounded_channel();
        let we_dialed = config.node_id < peer.node;
        let connection = Connection {
            incarnation: config.incarnation,
            epoch,
            max_frame_bytes: config.max_frame_bytes,
            max_streams: config.max_streams,
            recv_window_bytes: config.stream_window_bytes,
            queued_call_bytes_max: config.max_queued_call_bytes,
            urgent_classes: config.urgent_classes,
            queues: Queues { urgent, ordinary },
            call_budget: Arc::new(Semaphore::new(config.max_queued_call_bytes)),
            droppable: Arc::default(),
            pending: Mutex::default(),
            streams: Mutex::new(Streams {
                open: HashMap::new(),
                next: if we_dialed { 1 } else { 2 },
                closed: false,
            }),
            in_service: Arc::new(InService::new(
                config.max_calls_in_service,
                config.max_call_bytes_in_service,
            )),
            closed: CancellationToken::new(),
            heard_ns: AtomicU64::new(epoch.elapsed().as_nanos() as u64),
            pings: Pings::default(),
            stats,
            peer,
        };
        (Arc::new(connection), urgent_frames, ordinary_frames)
    }

    pub(crate) fn node(&self) -> NodeId {
        self.peer.node
    }

    pub(crate) fn max_frame_bytes(&self) -> usize {
        self.max_frame_bytes
    }

    pub(crate) fn recv_window_bytes(&self) -> usize {
        self.recv_window_bytes
    }

    pub(crate) fn fits(&self, body_bytes: usize) -> bool {
        body_bytes <= self.max_frame_bytes - HEADER_BYTES
    }

    /// When the last byte came in.
    pub(crate) fn heard(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.heard_ns.load(Ordering::Relaxed))
    }

    /// A byte came in just now.
    pub(crate) fn touch(&self) {
        self.heard_ns
            .store(self.epoch.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Queues a frame behind the others; false when the connection is over.
    pub(crate) fn push(&self, header: Header, body: Body, hold: Hold) -> bool {
        let ticket = None;
        self.queue(false)
            .send(Outgoing {
                header,
                body,
                ticket,
                hold,
            })
            .is_ok()
    }

    fn queue(&self, urgent: bool) -> &mpsc::UnboundedSender<Outgoing> {
        match urgent {
            true => &self.queues.urgent,
            false => &self.queues.ordinary,
        }
    }

    /// Whether a call, or the answer to one, must not wait behind bulk.
    fn is_urgent(&self, class: u8, body_bytes: usize) -> bool {
        let urgent = self.urgent_classes.contains(&class) && body_bytes <= URGENT_BYTES_MAX;
        urgent || class >= RESERVED_CLASSES
    }

    /// Queues a frame ahead of the ordinary ones, unless too many such frames wait already.
    fn push_droppable(&self, header: Header, body: Body) {
        let queued = self.droppable.fetch_add(1, Ordering::Relaxed);
        let hold = Hold::Droppable {
            _slot: DroppableSlot(self.droppable.clone()),
        };
        if queued < DROPPABLE_QUEUED_MAX {
            // A closed connection has no use for the frame.
            let _ = self.queues.urgent.send(Outgoing {
                header,
                body,
                ticket: None,
                hold,
            });
        }
    }

    /// Ends the connection; only the first reason counts.
    pub(crate) fn close(&self, reason: DisconnectReason) {
        let calls = {
            let mut pending = self.pending.lock();
            if pending.reason.is_some() {
                return;
            }
            pending.reason = Some(reason);
            std::mem::take(&mut pending.calls)
        };
        self.closed.cancel();
        self.call_budget.close();
        calls.into_values().for_each(fail);
        let streams = {
            let mut streams = self.streams.lock();
            streams.closed = true;
            std::mem::take(&mut streams.open)
        };
        streams
            .values()
            .for_each(|stream| stream.ended(StreamEnd::ConnectionLost));
    }

    /// Ends every pending call as if the connection were lost: its peer was found dead, though a
    /// process that is stopped keeps its connections.
    pub(crate) fn give_up_calls(&self) {
        let calls = std::mem::take(&mut self.pending.lock().calls);
        calls.into_values().for_each(fail);
    }

    pub(crate) fn close_reason(&self) -> Option<DisconnectReason> {
        self.pending.lock().reason.clone()
    }

    /// At most one ping waits for the writer.
    pub(crate) fn ping(&self) {
        let clock_ns = self.epoch.elapsed().as_nanos() as u64;
        self.push_once(&self.pings.ping_queued, Kind::Ping, clock_ns);
    }

    /// At most one pong waits for the writer.
    pub(crate) fn pong(&self, ping_clock_ns: u64) {
        self.push_once(&self.pings.pong_queued, Kind::Pong, ping_clock_ns);
    }

    pub(crate) fn ponged(&self, ping_clock_ns: u64) {
        let now_ns = self.epoch.elapsed().as_nanos() as u64;
        if let Some(rtt_ns) = now_ns.checked_sub(ping_clock_ns) {
            self.stats.rtt_ns.store(rtt_ns, Ordering::Relaxed);
        }
    }

    fn push_once(&self, queued: &Arc<AtomicBool>, kind: Kind, clock_ns: u64) {
        if queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut body = BytesMut::with_capacity(16);
        body.put_u64_le(self.incarnation);
        body.put_u64_le(clock_ns);
        let ticket = Some(Arc::new(Ticket::clearing(queued.clone())));
        let body = Body::One(body.freeze());
        let outgoing = Outgoing {
            header: Header::of(kind),
            body,
            ticket,
            hold: Hold::None,
        };
        let _ = self.queues.urgent.send(outgoing);
    }
}

/// Tells a caller what is known of its call when no answer will come.
fn fail((ticket, answer): PendingCall) {
    let error = match ticket.withdraw() {
        true => CallError::NotSent(NotSent::ConnectionLost),
        false => CallError::ConnectionLost,
    };
    // A caller that gave up does not want to know.
    let _ = answer.send(Err(error));
}
