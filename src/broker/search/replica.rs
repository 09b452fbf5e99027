//! Searching one replica of a queue: by the key index where that is built, else message by message.

use std::sync::Arc;

use quorate_storage::batch::{BatchView, RecordView};
use quorate_storage::key_index::{BLOCK_OFFSETS, block_of};
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::queue_index::IndexRecord;
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

    /// Time and offset of a message. Of one that was trimmed just now, those of the place before the
    /// first that is left; none if none is.
    fn place(&self, offset: u64) -> BrokerResult<Option<(u64, u64)>> {
        let found = self.queue.shared.index().find_from(offset, 1);
        let found = found.map_err(|error| unreadable(self.queue, error))?;
        let place = |record: &IndexRecord| {
            let before = record.base_offset.saturating_sub(1);
            (record.timestamp_ms, offset.max(before))
        };
        Ok(found.first().map(place))
    }

    /// Looks at the messages that the key index names, as many as there is time for and at least one.
    /// Gives how far it came; none when the answer is full.
    fn take_listed(&mut self, listed: &[u64], from: u64, until: u64) -> BrokerResult<Option<u64>> {
        let mut done = from;
        for offset in listed.iter().filter(|o| (from..until).contains(o)) {
            // Its batch had another one before it.
            if *offset < done {
                continue;
            }
            let Some(batches) = self.read(*offset, 1, 1)? else {
                continue;
            };
            done = offset + 1;
            for batch in &batches {
                if self.take(batch, *offset, until)? == Next::Full {
                    return Ok(None);
                }
                done = done.max(batch.place.base_offset + u64::from(batch.place.count));
            }
            if Instant::now() >= self.until {
                return Ok(Some(done.min(until)));
            }
        }
        Ok(Some(until))
    }

    /// Looks at one piece of messages after the other, as many as there is time for and at least one;
    /// gives how far it came.
    fn take_from(&mut self, mut offset: u64, until: u64) -> BrokerResult<Option<u64>> {
        while offset < until {
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
            if Instant::now() >= self.until {
                break;
            }
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

#[cfg(test)]
mod tests {
    use quorate_storage::key_index::KeyEntry;

    use super::*;
    use crate::broker::queue::entry;
    use crate::broker::testing::{TestCluster, TestNode, topic};
    use crate::broker::{NewMessage, ProduceRequest};

    /// A node with a topic of one queue that has five messages with the key "k", each in a batch of
    /// its own.
    async fn five() -> (TestCluster, TestNode, Arc<LocalQueue>) {
        let mut cluster = TestCluster::new(1);
        let node = cluster.start_all().await.remove(0);
        let broker = &node.broker;
        broker.create_topic("t", topic(1, 0)).await.unwrap();
        for _ in 0..5 {
            let message = NewMessage {
                key: Some("k".to_owned()),
                ..NewMessage::default()
            };
            let request = ProduceRequest {
                topic: "t".to_owned(),
                messages: vec![message],
                producer: None,
                idempotency_key: None,
            };
            broker.produce(request).await.unwrap().results[0]
                .as_ref()
                .unwrap();
        }
        let queue = broker.local.queues().remove(0);
        (cluster, node, queue)
    }

    fn request(queue: &LocalQueue, start: u64) -> SearchRequest {
        SearchRequest {
            group: queue.group.id().0,
            queue: 0,
            key: Some("k".to_owned()),
            selection: Default::default(),
            start: StartAt::Offset(start),
            to_timestamp_ms: None,
            max_messages: 10,
            max_bytes: 1 << 20,
            ttl_ms: None,
        }
    }

    fn offsets(found: &Found) -> Vec<u64> {
        found
            .messages
            .iter()
            .map(|message| message.offset)
            .collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_search_without_time_goes_on_later_and_leaves_nothing_out() {
        let (_cluster, _node, queue) = five().await;
        let out_of_time = |request: &SearchRequest| {
            let mut search = Search::new(&queue, request);
            search.until = Instant::now();
            search.run().unwrap()
        };
        let all = request(&queue, 0);
        // Message by message: one piece is looked at, which is all there is.
        let found = out_of_time(&all);
        assert_eq!(
            (offsets(&found), found.reached),
            (vec![0, 1, 2, 3, 4], None)
        );
        let hash = hash_of_key(b"k");
        let entries = (0..5).map(|offset| KeyEntry { hash, offset });
        let applied = queue.group.applied().unwrap();
        queue.keys.build(0, applied, entries.collect()).unwrap();
        let mut seen = Vec::new();
        let mut next = Some(0);
        while let Some(start) = next {
            let found = out_of_time(&request(&queue, start));
            assert_eq!(offsets(&found), [start], "one at least, and not all");
            seen.extend(offsets(&found));
            next = found.reached.map(|(_, offset)| offset + 1);
        }
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_place_of_what_was_trimmed_leads_to_what_is_left() {
        let (_cluster, node, queue) = five().await;
        let request = request(&queue, 0);
        let search = Search::new(&queue, &request);
        let (time, _) = search.place(3).unwrap().unwrap();
        let trim = |to| entry::trim(now_ms(), to);
        let (group, timeout) = (request.group, node.broker.config.write_timeout);
        let trimmed = node.broker.propose_here(group, trim(3), timeout);
        trimmed.await.unwrap();
        assert_eq!(search.place(0).unwrap(), Some((time, 2)));
        assert_eq!(search.place(3).unwrap(), Some((time, 3)));
        let trimmed = node.broker.propose_here(group, trim(5), timeout);
        trimmed.await.unwrap();
        assert_eq!(search.place(0).unwrap(), None);
    }
}
