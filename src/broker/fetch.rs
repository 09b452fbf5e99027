//! Fetching: stored batches become messages, filters are applied.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quorate_storage::batch::{self, BatchView, MessageRecord, RecordView};
use tokio::time::Instant;

use super::batcher::now_ms;
use super::selection::Seen;
use super::ttl::is_expired;
use super::{
    Broker, BrokerError, BrokerResult, Consistency, FetchAnswer, FetchRequest, Message,
    ProducerMark, RawFetchAnswer, StartAt, message_id,
};
use crate::peer::{PeerRequest, Proof, ReadRequest, Slice, StoredBatch};

/// A filtered fetch looks at this much at a time.
const SCAN_MESSAGES: u64 = 4096;
const SCAN_BYTES: u64 = 4 << 20;
/// A filtered fetch that was not asked to wait scans this long before it reports its progress.
const SCAN_AT_LEAST: Duration = Duration::from_secs(1);

impl Broker {
    pub async fn fetch(&self, request: FetchRequest) -> BrokerResult<FetchAnswer> {
        let (topic, group) = self.find_queue(&request.topic, request.queue).await?;
        self.fetch_from(group, topic.config.ttl_ms, request).await
    }

    async fn fetch_from(
        &self,
        group: u64,
        ttl_ms: Option<u64>,
        request: FetchRequest,
    ) -> BrokerResult<FetchAnswer> {
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(request.wait_ms);
        let scan_until = begun + Duration::from_millis(request.wait_ms).max(SCAN_AT_LEAST);
        let mut filtered = !request.selection.is_everything();
        let mut start = request.start;
        let mut is_first = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut read = read_request(group, &request, start, left);
            // What was acknowledged before the request came is proved to be here.
            if !is_first && read.proof == Proof::All {
                read.proof = Proof::End;
            }
            is_first = false;
            if filtered {
                read.max_messages = SCAN_MESSAGES;
                read.max_bytes = read.max_bytes.max(SCAN_BYTES);
            }
            let slice = self.read_of_topic(&request.topic, group, &read).await?;
            let (messages, next_offset) = messages_of(group, &slice, &request, ttl_ms)?;
            // All was filtered out or has expired: go on behind it, while there is time.
            let scanned = next_offset > slice.start;
            if messages.is_empty() && scanned && Instant::now() < scan_until {
                start = StartAt::Offset(next_offset);
                filtered = true;
                continue;
            }
            return Ok(FetchAnswer {
                group,
                topic: request.topic,
                queue: request.queue,
                messages,
                next_offset,
                earliest_offset: slice.earliest,
                end_offset: slice.end,
            });
        }
    }

    /// A topic may be deleted while its readers wait.
    async fn read_of_topic(
        &self,
        topic: &str,
        group: u64,
        request: &ReadRequest,
    ) -> BrokerResult<Slice> {
        self.read(group, request)
            .await
            .map_err(|error| match self.catalog_knows(group) {
                true => error,
                false => BrokerError::TopicNotFound {
                    topic: topic.to_owned(),
                },
            })
    }

    /// The stored batches as they are; the first may begin before the offset asked for.
    pub async fn fetch_raw(&self, request: FetchRequest) -> BrokerResult<RawFetchAnswer> {
        if !request.selection.is_everything() {
            let text = "stored batches can't be filtered; fetch messages instead";
            return Err(BrokerError::InvalidRequest(text.to_owned()));
        }
        let (_, group) = self.find_queue(&request.topic, request.queue).await?;
        let wait = Duration::from_millis(request.wait_ms);
        let read = read_request(group, &request, request.start, wait);
        let slice = self.read_of_topic(&request.topic, group, &read).await?;
        let last = slice.batches.last();
        let next_offset = last.map_or(slice.start, |b| {
            b.place.base_offset + u64::from(b.place.count)
        });
        Ok(RawFetchAnswer {
            batches: slice.batches.iter().flat_map(with_offset).collect(),
            next_offset,
            earliest_offset: slice.earliest,
            end_offset: slice.end,
        })
    }

    /// The offset of the first message at or after a time; the end if there is none.
    pub async fn offset_at(&self, topic: &str, queue: u32, timestamp_ms: u64) -> BrokerResult<u64> {
        let (_, group) = self.find_queue(topic, queue).await?;
        self.offset_at_time(group, timestamp_ms).await
    }

    pub(super) async fn offset_at_time(&self, group: u64, timestamp_ms: u64) -> BrokerResult<u64> {
        if let Ok(offset) = self.offset_at_here(group, timestamp_ms).await {
            return Ok(offset);
        }
        let request = PeerRequest::OffsetAt {
            group,
            timestamp_ms,
        };
        self.ask_replicas(group, &request, Duration::ZERO).await
    }
}

fn read_request(group: u64, request: &FetchRequest, start: StartAt, wait: Duration) -> ReadRequest {
    ReadRequest {
        group,
        start,
        max_messages: request.max_messages.max(1) as u64,
        max_bytes: request.max_bytes.max(1) as u64,
        wait_ms: wait.as_millis() as u64,
        proof: match request.consistency {
            Consistency::Linearizable => Proof::All,
            Consistency::Stale => Proof::None,
        },
    }
}

pub(super) fn size_of_message(message: &Message) -> usize {
    let text = |t: &Option<String>| t.as_ref().map_or(0, String::len);
    let headers = message.headers.iter().map(|(n, v)| n.len() + v.len());
    message.value.as_ref().map_or(0, Bytes::len)
        + text(&message.key)
        + text(&message.tag)
        + headers.sum::<usize>()
}

/// The messages of a slice that were asked for, and the offset behind the last one looked at.
fn messages_of(
    group: u64,
    slice: &Slice,
    request: &FetchRequest,
    ttl_ms: Option<u64>,
) -> BrokerResult<(Vec<Message>, u64)> {
    let now_ms = now_ms();
    let mut messages = Vec::new();
    let mut bytes = 0;
    let mut next_offset = slice.start;
    for stored in &slice.batches {
        let view = BatchView::parse_trusted(stored.batch.clone()).map_err(unreadable)?;
        for (record, ordinal) in view.records().zip(0u32..) {
            let record = record.map_err(unreadable)?;
            let offset = stored.place.base_offset + u64::from(ordinal);
            if offset < slice.start {
                continue;
            }
            let seen = Seen {
                offset,
                timestamp_ms: stored.timestamp_ms,
            };
            let over = is_expired(&record, stored.timestamp_ms, ttl_ms, now_ms);
            if over || !request.selection.takes(&record, seen) {
                next_offset = offset + 1;
                continue;
            }
            let message = message(group, request.queue, stored, &view, &record, ordinal)?;
            let size = size_of_message(&message);
            if messages.len() >= request.max_messages.max(1)
                || (!messages.is_empty() && bytes + size > request.max_bytes)
            {
                return Ok((messages, next_offset));
            }
            bytes += size;
            next_offset = offset + 1;
            messages.push(message);
        }
    }
    Ok((messages, next_offset))
}

pub(super) fn message(
    group: u64,
    queue: u32,
    stored: &StoredBatch,
    view: &BatchView,
    record: &RecordView,
    ordinal: u32,
) -> BrokerResult<Message> {
    let decoded = MessageRecord::decode(record).map_err(unreadable)?;
    let producer = view.producer().map(|stamp| ProducerMark {
        id: stamp.id.to_string(),
        // Validated batches have neither below zero.
        epoch: u32::from(stamp.epoch.unsigned_abs()),
        sequence: (i64::from(stamp.base_sequence) + i64::from(ordinal)) as u64 & 0x7fff_ffff,
    });
    let headers = decoded.headers.into_iter();
    let text = |value: Bytes| String::from_utf8_lossy(&value).into_owned();
    Ok(Message {
        queue,
        offset: stored.place.base_offset + u64::from(ordinal),
        message_id: message_id(group, &stored.place, ordinal),
        timestamp_ms: stored.timestamp_ms,
        key: decoded.key,
        tag: decoded.tag,
        headers: headers.map(|(name, value)| (name, text(value))).collect(),
        value: decoded.value,
        producer,
    })
}

pub(super) fn unreadable(error: batch::BatchError) -> BrokerError {
    tracing::error!(%error, "a stored batch cannot be read");
    BrokerError::Internal(format!("a stored batch cannot be read: {error}"))
}

/// The batch with its base offset, in pieces: only the eight bytes of the offset are made anew.
fn with_offset(stored: &StoredBatch) -> impl Iterator<Item = Bytes> {
    let mut bytes = stored.batch.clone();
    let stamped = BatchView::parse_trusted(bytes.clone()).map(|v| v.max_timestamp_ms());
    if stamped.is_ok_and(|ms| ms != stored.timestamp_ms) {
        // Its leader's clock was behind the log's time; readers are told the log's.
        let mut again = BytesMut::from(&bytes[..]);
        batch::stamp(&mut again, stored.timestamp_ms);
        bytes = again.freeze();
    }
    let offset = Bytes::copy_from_slice(&stored.place.base_offset.to_be_bytes());
    [offset, bytes.slice(8..)].into_iter()
}
