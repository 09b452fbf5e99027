//! Searching one replica of a queue: by the key index where that is built, else message by message.

use std::sync::Arc;

use quorate_storage::batch::{BatchView, RecordView};
use quorate_storage::key_index::{BLOCK_OFFSETS, block_of};
use quorate_storage::mutation::{self, Mutation};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::{Found, SEARCH_FOR, SearchRequest};
use crate::broker::batcher::now_ms;
use crate::broker::fetch::{self, size_of_message};
use crate::broker::local::LocalQueue;
use crate::broker::read::{collect, fault_of, unreadable};
use crate::broker::selection::Seen;
use crate::broker::ttl::is_expired;
use crate::broker::{Broker, BrokerError, BrokerResult, StartAt};
use crate::peer::{PeerError, PeerResult, StoredBatch};

/// Of messages that are looked at one after the other.
const LOOK_MESSAGES: usize = 4096;
const LOOK_BYTES: usize = 1 << 20;

/// The hash by which the key index knows a key.
pub(super) fn hash_of_key(key: &[u8]) -> u64 {
    xxh3_64(key)
}

impl Broker {
    /// Searches this node's replica, which first makes sure that it has seen everything.
    pub(crate) async fn search_here(&self, request: &SearchRequest) -> PeerResult<Found> {
        let queue = self.proved_replica(request.group).await?;
        let request = request.clone();
        let searched = quorate_raft::blocking::on_pool({
            let queue = queue.clone();
            move || Search::new(&queue, &request).run()
        });
        let found = searched.await;
        let found = found.unwrap_or_else(|e| Err(BrokerError::Internal(e.to_string())));
        found.map_err(|error| fault_of(&queue, error))
    }

    /// This node's replica of a queue, with all that was committed before.
    pub(super) async fn proved_replica(&self, group: u64) -> PeerResult<Arc<LocalQueue>> {
        let queue = self.local.queue(group).ok_or(PeerError::NotHere)?;
        if queue.shared.soundness().broken().is_some() {
            return Err(PeerError::NotHere);
        }
        let deadline = Instant::now() + self.config.read_timeout;
        let proof = self.barrier(&queue.group, deadline).await;
        proof.map_err(PeerError::Broker)?;
        Ok(queue)
    }
}

struct Search<'a> {
    queue: &'a LocalQueue,
    request: &'a SearchRequest,
    until: Instant,
    found: Found,
    bytes: usize,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    GoOn,
    /// The answer is full with the message at hand.
    Full,
}

impl<'a> Search<'a> {
    fn new(queue: &'a LocalQueue, request: &'a SearchRequest) -> Self {
        Self {
            queue,
            request,
            until: Instant::now() + SEARCH_FOR,
            found: Found::default(),
            bytes: 0,
        }
    }

    fn run(mut self) -> BrokerResult<Found> {
        let (mut offset, end) = self.range()?;
        let hash = self.request.key.as_ref().map(|k| hash_of_key(k.as_bytes()));
        while offset < end {
            let block = block_of(offset);
            let until = end.min(block.saturating_add(1).saturating_mul(BLOCK_OFFSETS));
            let listed = hash.and_then(|hash| self.queue.keys.find(block, hash));
            let looked_at = match listed {
                Some(offsets) => self.take_listed(&offsets, offset, until)?,
                None => self.take_from(offset, until)?,
            };
            let Some(next) = looked_at else {
                return Ok(self.found);
            };
            offset = next.max(offset + 1);
            if offset < end && Instant::now() >= self.until {
                self.found.reached = self.place(offset - 1)?;
                return Ok(self.found);
            }
        }
        Ok(self.found)
    }

    /// The offsets to search.
    fn range(&self) -> BrokerResult<(u64, u64)> {
        let index = self.queue.shared.index();
        let bounds = self.queue.shared.bounds();
        let first_at = |ms| {
            let found = index.offset_at_time(ms);
            let found = found.map_err(|error| unreadable(self.queue, error))?;
            BrokerResult::Ok(found.unwrap_or(bounds.end))
        };
        let start = match self.request.start {
            StartAt::Offset(offset) => offset,
            StartAt::Earliest => bounds.earliest,
            StartAt::Latest => bounds.end,
            StartAt::Timestamp(ms) => first_at(ms)?,
        };
        let end = match self.request.to_timestamp_ms.map(|ms| ms.checked_add(1)) {
            Some(Some(after)) => first_at(after)?,
            Some(None) | None => bounds.end,
        };
        Ok((start.max(bounds.earliest), end.min(bounds.end)))
    }

    /// Time and offset of a message; none if it was trimmed just now.
    fn place(&self, offset: u64) -> BrokerResult<Option<(u64, u64)>> {
        let time = self.queue.shared.index().timestamp_of(offset);
        let time = time.map_err(|error| unreadable(self.queue, error))?;
        Ok(time.map(|ms| (ms, offset)))
    }

    /// Looks at the messages that the key index names. Gives `until`; none when the answer is full.
    fn take_listed(&mut self, listed: &[u64], from: u64, until: u64) -> BrokerResult<Option<u64>> {
        for offset in listed.iter().filter(|o| (from..until).contains(o)) {
            let Some(batches) = self.read(*offset, 1, 1)? else {
                continue;
            };
            for batch in &batches {
                if self.take(batch, *offset, *offset + 1)? == Next::Full {
                    return Ok(None);
                }
            }
        }
        Ok(Some(until))
    }

    /// Looks at one piece of messages after the other; gives how far it came.
    fn take_from(&mut self, mut offset: u64, until: u64) -> BrokerResult<Option<u64>> {
        while offset < until && Instant::now() < self.until {
            let Some(batches) = self.read(offset, LOOK_MESSAGES, LOOK_BYTES)? else {
                offset = self.queue.shared.bounds().earliest;
                continue;
            };
            let Some(last) = batches.last() else { break };
            let next = last.place.base_offset + u64::from(last.place.count);
            for batch in &batches {
                if self.take(batch, offset, until)? == Next::Full {
                    return Ok(None);
                }
            }
            offset = next;
        }
        Ok(Some(offset.min(until)))
    }

    /// Stored batches from the one with `offset` on; none if it was trimmed meanwhile.
    fn read(
        &self,
        offset: u64,
        max_messages: usize,
        max_bytes: usize,
    ) -> BrokerResult<Option<Vec<StoredBatch>>> {
        let read = collect(self.queue, offset, max_messages, max_bytes);
        let is_trimmed = offset < self.queue.shared.bounds().earliest;
        match read {
            _ if is_trimmed => Ok(None),
            Ok(batches) => Ok(Some(batches)),
            Err(error) => Err(unreadable(self.queue, error)),
        }
    }

    /// Adds the messages of a batch that are wanted, of the offsets `from..until`.
    fn take(&mut self, stored: &StoredBatch, from: u64, until: u64) -> BrokerResult<Next> {
        let view = BatchView::parse_trusted(stored.batch.clone()).map_err(fetch::unreadable)?;
        for (record, ordinal) in view.records().zip(0u32..) {
            let record = record.map_err(fetch::unreadable)?;
            let offset = stored.place.base_offset + u64::from(ordinal);
            let seen = Seen {
                offset,
                timestamp_ms: stored.timestamp_ms,
            };
            if !(from..until).contains(&offset) || !self.wants(&record, seen) {
                continue;
            }
            let (group, queue) = (self.request.group, self.request.queue);
            let message = fetch::message(group, queue, stored, &view, &record, ordinal)?;
            self.bytes += size_of_message(&message);
            self.found.messages.push(message);
            let count = self.found.messages.len() as u64;
            if count >= self.request.max_messages || self.bytes as u64 >= self.request.max_bytes {
                self.found.reached = Some((seen.timestamp_ms, offset));
                return Ok(Next::Full);
            }
        }
        Ok(Next::GoOn)
    }

    fn wants(&self, record: &RecordView, seen: Seen) -> bool {
        let wanted = self.request.key.as_ref();
        let now_ms = now_ms();
        if is_expired(record, seen.timestamp_ms, self.request.ttl_ms, now_ms) {
            return false;
        }
        let has_key = |key: &String| record.key.as_ref().is_some_and(|k| k == key.as_bytes());
        let is_believed =
            mutation::on(Mutation::BelieveKeyIndex) && self.queue.keys.has(block_of(seen.offset));
        (is_believed || wanted.is_none_or(has_key)) && self.request.selection.takes(record, seen)
    }
}
