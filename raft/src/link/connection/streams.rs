//! The open streams of a connection: opening, finding, closing. What a stream does is in
//! [`crate::link::stream`].

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::{Connection, Hold};
use crate::link::error::{CallError, NotSent, StreamEnd};
use crate::link::stream::{LinkStream, StreamState};
use crate::link::wire::{Body, Header, Kind};

pub(super) struct Streams {
    pub(super) open: HashMap<u64, Arc<StreamState>>,
    /// The dialing side takes odd ids, the accepting side even ones.
    pub(super) next: u64,
    pub(super) closed: bool,
}

impl Connection {
    pub(crate) fn open_stream(
        self: &Arc<Self>,
        group: u64,
        hello: Bytes,
    ) -> Result<LinkStream, CallError> {
        if !self.fits(hello.len()) {
            return Err(CallError::NotSent(NotSent::TooLarge));
        }
        let (id, state) = {
            let mut streams = self.streams.lock();
            if streams.closed {
                return Err(CallError::NotConnected);
            }
            if streams.open.len() >= self.max_streams {
                return Err(CallError::NotSent(NotSent::TooManyStreams));
            }
            let id = streams.next;
            streams.next += 2;
            let state = Arc::new(StreamState::new(id, group, self.send_window_bytes()));
            streams.open.insert(id, state.clone());
            (id, state)
        };
        let stream = LinkStream::new(state, self.clone());
        let header = Header {
            channel: id,
            group,
            ..Header::of(Kind::StreamOpen)
        };
        if !self.push(header, Body::One(hello), Hold::None) {
            return Err(CallError::NotConnected);
        }
        Ok(stream)
    }

    /// The peer opened a stream. `Err` says how it broke the protocol.
    pub(crate) fn stream_opened(
        self: &Arc<Self>,
        id: u64,
        group: u64,
    ) -> Result<Option<LinkStream>, &'static str> {
        let mut streams = self.streams.lock();
        if streams.closed {
            return Ok(None);
        }
        if id % 2 == streams.next % 2 {
            return Err("a stream id of this side");
        }
        if streams.open.contains_key(&id) {
            return Err("a stream id in use");
        }
        if streams.open.len() >= self.max_streams {
            drop(streams);
            self.push_stream_close(id, StreamEnd::TooMany);
            return Ok(None);
        }
        let state = Arc::new(StreamState::new(id, group, self.send_window_bytes()));
        streams.open.insert(id, state.clone());
        drop(streams);
        Ok(Some(LinkStream::new(state, self.clone())))
    }

    pub(crate) fn stream(&self, id: u64) -> Option<Arc<StreamState>> {
        self.streams.lock().open.get(&id).cloned()
    }

    /// This side ends the stream and says so, unless it is over already.
    pub(crate) fn close_stream(&self, id: u64, end: StreamEnd) {
        let removed = self.streams.lock().open.remove(&id);
        if let Some(stream) = removed {
            stream.ended(end);
            self.push_stream_close(id, end);
        }
    }

    /// The peer has ended the stream.
    pub(crate) fn stream_closed(&self, id: u64, end: StreamEnd) {
        let removed = self.streams.lock().open.remove(&id);
        if let Some(stream) = removed {
            stream.ended(end);
        }
    }

    fn push_stream_close(&self, id: u64, end: StreamEnd) {
        let header = Header {
            class: end as u8,
            channel: id,
            ..Header::of(Kind::StreamClose)
        };
        self.push(header, Body::EMPTY, Hold::None);
    }

    fn send_window_bytes(&self) -> usize {
        (self.peer.stream_window_bytes as usize).clamp(4096, 1 << 28)
    }
}
