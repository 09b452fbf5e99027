//! A piece of an exchange's queue, made ready for the topics it goes to.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, BatchError, BatchView, MessageRecord, RecordView};

use super::super::super::batcher::now_ms;
use super::super::routes::{self, MESSAGE_ID_HEADER, ROUTES_HEADER, Route};
use crate::broker::queue::entry::Mark;
use crate::broker::{Broker, BrokerError, BrokerResult, StartAt, message_id};
use crate::catalog::TopicId;
use crate::peer::{NewBatch, PeerError, Proof, ReadRequest, StoredBatch};

/// Of one chunk; one message is always taken, however large.
const CHUNK_MESSAGES: u64 = 512;
const CHUNK_BYTES: u64 = 1 << 20;

/// The messages `start..next` of one queue.
#[derive(Debug)]
pub(super) struct Chunk {
    pub start: u64,
    pub next: u64,
    /// Messages whose time to live is over, or that can't be read and won't ever be.
    pub skipped: u64,
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
            proof: Proof::None,
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
            skipped: 0,
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
            let age_ms = now_ms().saturating_sub(stored.timestamp_ms);
            match record.and_then(|record| ready(&record, id, age_ms)) {
                Ok(Some((routes, batch))) => self.messages.push(Outgoing {
                    offset,
                    routes,
                    batch,
                }),
                Ok(None) => self.skipped += 1,
                Err(error) => self.cannot_read(offset, 1, &error),
            }
        }
    }

    fn cannot_read(&mut self, offset: u64, messages: u64, error: &BatchError) {
        tracing::error!(offset, messages, %error, "a published message cannot be read and is left out");
        self.skipped += messages;
    }

    pub fn covers(&self, offset: u64) -> bool {
        (self.start..self.next).contains(&offset)
    }

    /// The topics that get something of it.
    pub fn topics(&self) -> BTreeSet<TopicId> {
        let routes = self.messages.iter().flat_map(|m| &m.routes);
        routes.map(|route| route.topic).collect()
    }

    /// What one topic gets of it from an offset on, by queue, but for what a queue has `reached`. Each message is a batch of its own,
    /// known by its place in this queue: whoever brings it again may cut its chunks otherwise.
    pub fn for_topic(
        &self,
        topic: TopicId,
        from: u64,
        reached: &BTreeMap<u32, u64>,
        source: [u8; 16],
    ) -> BTreeMap<u32, Vec<NewBatch>> {
        let mut queues: BTreeMap<u32, Vec<NewBatch>> = BTreeMap::new();
        for message in self.messages.iter().filter(|m| m.offset >= from) {
            for route in message.routes.iter().filter(|route| route.topic == topic) {
                let has = reached.get(&route.queue);
                if has.is_some_and(|next| message.offset < *next) {
                    continue;
                }
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

/// A stored message's routes, and the batch that its topics get: it lives there for what is left of
/// its time. None: nothing is left.
fn ready(
    record: &RecordView,
    id: String,
    age_ms: u64,
) -> Result<Option<(Vec<Route>, Bytes)>, BatchError> {
    let mut message = MessageRecord::decode(record)?;
    if let Some(ttl_ms) = &mut message.ttl_ms {
        *ttl_ms = ttl_ms.saturating_sub(age_ms);
        if *ttl_ms == 0 {
            return Ok(None);
        }
    }
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
    Ok(Some((routes, builder.finish())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_lives_on_for_what_is_left_of_its_time() {
        let mut builder = BatchBuilder::new();
        let routed = |ttl_ms| MessageRecord {
            ttl_ms,
            headers: vec![(ROUTES_HEADER.to_owned(), Bytes::from_static(b"7:1,8:0"))],
            ..MessageRecord::default()
        };
        routed(Some(100)).encode(&mut builder).unwrap();
        routed(None).encode(&mut builder).unwrap();
        let view = BatchView::parse(builder.finish()).unwrap();
        let records: Vec<_> = view.records().map(Result::unwrap).collect();
        let left = |record, age_ms| {
            let (routes, batch) = ready(record, "id".to_owned(), age_ms).unwrap()?;
            assert_eq!(routes.len(), 2);
            let view = BatchView::parse(batch).unwrap();
            let record = view.records().next().unwrap().unwrap();
            let message = MessageRecord::decode(&record).unwrap();
            assert_eq!(message.headers.len(), 1, "the id, and no routes");
            Some(message.ttl_ms)
        };
        assert_eq!(left(&records[0], 0), Some(Some(100)));
        assert_eq!(left(&records[0], 99), Some(Some(1)));
        assert_eq!(left(&records[0], 100), None);
        assert_eq!(left(&records[1], u64::MAX), Some(None));
    }
}
