//! The message that an id names.

use quorate_storage::batch::BatchView;
use quorate_storage::commit_log::EntryKind;
use quorate_storage::queue_index::IndexRecord;
use tokio::time::Instant;

use super::SEARCH_FOR;
use crate::broker::batcher::now_ms;
use crate::broker::fetch;
use crate::broker::local::LocalQueue;
use crate::broker::queue::Place;
use crate::broker::queue::entry::{self, EntryBody, Hold};
use crate::broker::read::{fault_of, unreadable};
use crate::broker::ttl::is_expired;
use crate::broker::{Broker, BrokerError, BrokerResult, Message, MessagePlace, parse_message_id};
use crate::peer::{PeerRequest, PeerResult, StoredBatch};

/// Index records looked at a time.
const RECORDS_PER_LOOK: usize = 1024;

impl Broker {
    /// The message with this id, if it is visible.
    pub async fn message(&self, topic: &str, message_id: &str) -> BrokerResult<Message> {
        let found = self.find_topic(topic).await?;
        let not_found = || BrokerError::MessageNotFound {
            topic: topic.to_owned(),
            message_id: message_id.to_owned(),
        };
        // Ids are opaque: what is none is one that no message has.
        let place = parse_message_id(message_id).ok_or_else(not_found)?;
        let queue = (0..).zip(&found.queues);
        let queue = queue.clone().find(|(_, q)| q.group == place.group);
        let (queue, _) = queue.ok_or_else(not_found)?;
        let ttl_ms = found.config.ttl_ms;
        let here = || self.message_here(queue, place, ttl_ms);
        let request = PeerRequest::FindMessage {
            queue,
            place,
            ttl_ms,
        };
        let message: Option<Message> = self
            .here_or_elsewhere(topic, place.group, here, &request)
            .await?;
        message.ok_or_else(not_found)
    }

    /// The same of this node's replica.
    pub(crate) async fn message_here(
        &self,
        number: u32,
        place: MessagePlace,
        ttl_ms: Option<u64>,
    ) -> PeerResult<Option<Message>> {
        let queue = self.proved_replica(place.group).await?;
        let searched = quorate_raft::blocking::on_pool({
            let queue = queue.clone();
            move || find(&queue, number, place, ttl_ms)
        });
        let found = searched.await;
        let found = found.unwrap_or_else(|e| Err(BrokerError::Internal(e.to_string())));
        found.map_err(|error| fault_of(&queue, error))
    }
}

/// Reads the entry that the id names, and looks where it became visible.
fn find(
    queue: &LocalQueue,
    number: u32,
    place: MessagePlace,
    ttl_ms: Option<u64>,
) -> BrokerResult<Option<Message>> {
    let log = queue.group.log();
    let applied = queue.group.applied().map_or(0, |id| id.index);
    if place.index > applied {
        return Ok(None);
    }
    let stored = log.read(place.index, place.index.saturating_add(1), 1);
    let stored = stored.map_err(|error| unreadable(queue, error))?;
    let stored = stored.into_iter().find(|stored| {
        stored.log_id.index == place.index
            && stored.log_id.term == place.term
            && stored.kind == EntryKind::Command
    });
    let Some(Ok(decoded)) = stored.map(|stored| entry::decode(&stored.body)) else {
        return Ok(None);
    };
    let EntryBody::Append(batches) = decoded.body else {
        return Ok(None);
    };
    let Some(batch) = batches.get(usize::from(place.batch)) else {
        return Ok(None);
    };
    let not_before = match batch.hold {
        Some(Hold::Until { deliver_at_ms }) => deliver_at_ms.max(decoded.stamp_ms),
        _ => decoded.stamp_ms,
    };
    let Some(record) = visible_at(queue, place, not_before, batch.hold.is_some())? else {
        return Ok(None);
    };
    let found = StoredBatch {
        place: Place {
            base_offset: record.base_offset,
            count: record.count,
            term: place.term,
            index: place.index,
            batch: place.batch,
        },
        timestamp_ms: record.timestamp_ms,
        batch: batch.batch.clone(),
    };
    message_of(queue, number, place, ttl_ms, &found)
}

/// The index record of the batch. What was held becomes visible at any later time; what was not is
/// visible before everything that was stored after it.
fn visible_at(
    queue: &LocalQueue,
    place: MessagePlace,
    not_before_ms: u64,
    was_held: bool,
) -> BrokerResult<Option<IndexRecord>> {
    let index = queue.shared.index();
    let until = Instant::now() + SEARCH_FOR;
    let start = index.offset_at_time(not_before_ms);
    let Some(mut offset) = start.map_err(|error| unreadable(queue, error))? else {
        return Ok(None);
    };
    loop {
        let records = index.find_from(offset, RECORDS_PER_LOOK);
        let records = records.map_err(|error| unreadable(queue, error))?;
        for record in &records {
            if record.log_index == place.index && record.batch == place.batch {
                return Ok(Some(*record));
            }
            if record.log_index > place.index && !was_held {
                return Ok(None);
            }
        }
        let Some(last) = records.last() else {
            return Ok(None);
        };
        if Instant::now() >= until {
            let text = "looking for a message that was held took too long; look by key or time";
            return Err(BrokerError::Overloaded(text.to_owned()));
        }
        offset = last.end_offset();
    }
}

fn message_of(
    queue: &LocalQueue,
    number: u32,
    place: MessagePlace,
    ttl_ms: Option<u64>,
    stored: &StoredBatch,
) -> BrokerResult<Option<Message>> {
    let view = BatchView::parse_trusted(stored.batch.clone()).map_err(fetch::unreadable)?;
    let Some(record) = view.records().nth(place.record as usize) else {
        return Ok(None);
    };
    let record = record.map_err(fetch::unreadable)?;
    if is_expired(&record, stored.timestamp_ms, ttl_ms, now_ms()) {
        return Ok(None);
    }
    let message = fetch::message(place.group, number, stored, &view, &record, place.record)?;
    let is_trimmed = message.offset < queue.shared.bounds().earliest;
    Ok((!is_trimmed).then_some(message))
}
