//! A piece of an exchange's queue, made ready for the topics it goes to.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, BatchError, BatchView, MessageRecord, RecordView};

use super::super::routes::{self, MESSAGE_ID_HEADER, ROUTES_HEADER, Route};
use crate::broker::queue::entry::Mark;
use crate::broker::{Broker, BrokerError, BrokerResult, StartAt, message_id};
use crate::catalog::TopicId;
use crate::peer::{NewBatch, PeerError, ReadRequest, StoredBatch};

/// Of one chunk; one message is always taken, however large.
const CHUNK_MESSAGES: u64 = 512;
const CHUNK_BYTES: u64 = 1 << 20;

/// The messages `start..next` of one queue.
#[derive(Debug)]
pub(super) struct Chunk {
    pub start: u64,
    pub next: u64,
    /// Messages that can't be read, and won't ever be.
    pub unreadable: u64,
    messages: Vec<Outgoing>,
}

/// One message as every topic gets it.
#[derive(Debug)]
struct Outgoing {
    offset: u64,
    routes: Vec<Route>,
    batch: Bytes,
}

impl Chunk {
    /// Reads this node's replica from an offset on, or from the earliest behind it. None: there is
    /// nothing yet.
    pub async fn read(broker: &Broker, group: u64, start: u64) -> BrokerResult<Option<Self>> {
        let request = |start| ReadRequest {
            group,
            start,
            max_messages: CHUNK_MESSAGES,
            max_bytes: CHUNK_BYTES,
            wait_ms: 0,
            // What is committed here is enough; what is not yet wakes the forwarder when it is.
            stale: true,
        };
        let mut read = broker.read_here(&request(StartAt::Offset(start))).await;
        if let Err(PeerError::Broker(BrokerError::OffsetOutOfRange {
            earliest_offset, ..
        })) = read
            && earliest_offset > start
        {
            let from = StartAt::Offset(earliest_offset);
            read = broker.read_here(&request(from)).await;
        }
        let slice = read.map_err(|error| match error {
            PeerError::Broker(error) => error,
            PeerError::NotLeader { .. } | PeerError::NotHere => super::super::NO_LEADER,
        })?;
        let mut chunk = Self {
            start,
            next: slice.start,
            unreadable: 0,
            messages: Vec::new(),
        };
        for stored in &slice.batches {
            chunk.take(group, stored, slice.start);
        }
        Ok((chunk.next > start).then_some(chunk))
    }

    fn take(&mut self, group: u64, stored: &StoredBatch, from: u64) {
        let base = stored.place.base_offset;
        self.next = base + u64::from(stored.place.count);
        let view = match BatchView::parse_trusted(stored.batch.clone()) {
            Ok(view) => view,
            Err(error) => return self.cannot_read(base, u64::from(stored.place.count), &error),
        };
        for (ordinal, record) in (0..).zip(view.records()) {
            let offset = base + u64::from(ordinal);
            if offset < from {
                continue;
            }
            let id = message_id(group, &stored.place, ordinal);
            match record.and_then(|record| ready(&record, id)) {
                Ok((routes, batch)) => self.messages.push(Outgoing {
                    offset,
                    routes,
                    batch,
                }),
                Err(error) => self.cannot_read(offset, 1, &error),
            }
        }
    }

    fn cannot_read(&mut self, offset: u64, messages: u64, error: &BatchError) {
        tracing::error!(offset, messages, %error, "a published message cannot be read and is left out");
        self.unreadable += messages;
    }

    pub fn covers(&self, offset: u64) -> bool {
        (self.start..self.next).contains(&offset)
    }

    /// The topics that get something of it.
    pub fn topics(&self) -> BTreeSet<TopicId> {
        let routes = self.messages.iter().flat_map(|m| &m.routes);
        routes.map(|route| route.topic).collect()
    }

    /// What one topic gets of it from an offset on, by queue. Each message is a batch of its own,
    /// known by its place in this queue: whoever brings it again may cut its chunks otherwise.
    pub fn for_topic(
        &self,
        topic: TopicId,
        from: u64,
        source: [u8; 16],
    ) -> BTreeMap<u32, Vec<NewBatch>> {
        let mut queues: BTreeMap<u32, Vec<NewBatch>> = BTreeMap::new();
        for message in self.messages.iter().filter(|m| m.offset >= from) {
            for route in message.routes.iter().filter(|route| route.topic == topic) {
                queues.entry(route.queue).or_default().push(NewBatch {
                    mark: Mark::Forwarded {
                        source,
                        sequence: message.offset + 1,
                    },
                    hold: None,
                    batch: message.batch.clone(),
                });
            }
        }
        queues
    }
}

/// A stored message's routes, and the batch that its topics get.
fn ready(record: &RecordView, id: String) -> Result<(Vec<Route>, Bytes), BatchError> {
    let mut message = MessageRecord::decode(record)?;
    let mut routes = Vec::new();
    message.headers.retain(|(name, value)| {
        let is_routes = name == ROUTES_HEADER;
        if is_routes {
            routes = routes::read(value).unwrap_or_default();
        }
        !is_routes
    });
    let id = (MESSAGE_ID_HEADER.to_owned(), Bytes::from(id));
    message.headers.push(id);
    let mut builder = BatchBuilder::new();
    message.encode(&mut builder)?;
    Ok((routes, builder.finish()))
}
