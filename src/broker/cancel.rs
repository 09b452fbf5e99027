//! Taking a delayed message back before it is delivered.
//!
//! The queue decides: in its log either the cancellation comes first or the delivery. Only what it
//! does not hold is looked up, to say whether it is visible or never was.

use std::sync::Arc;
use std::time::Duration;

use quorate_storage::commit_log::EntryKind;
use quorate_storage::{LogId, StorageError};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};

use super::batcher::now_ms;
use super::local::LocalQueue;
use super::queue::entry::{self, EntryBody, Hold};
use super::queue::{CancelVerdict, decode_cancelled};
use super::read::unreadable;
use super::route::UNKNOWN;
use super::{Broker, BrokerError, BrokerResult, MessagePlace, parse_message_id};
use crate::peer::{PeerError, PeerRequest, PeerResult};
use quorate_raft::ProposeError;

/// Index records looked at in search of a message, and at a time.
const MOST_RECORDS: usize = 1 << 20;
const RECORDS_PER_LOOK: usize = 1024;

/// What became of a message that was to be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cancelled {
    /// It will never be delivered; asked again it is the same.
    Done,
    Delivered,
    NeverWas,
}

impl Broker {
    /// Takes a delayed message back.
    pub async fn cancel_message(&self, topic: &str, message_id: &str) -> BrokerResult<()> {
        let found = self.find_topic(topic).await?;
        let place = parse_message_id(message_id);
        let place = place.filter(|p| found.queues.iter().any(|queue| queue.group == p.group));
        let not_found = || BrokerError::MessageNotFound {
            topic: topic.to_owned(),
            message_id: message_id.to_owned(),
        };
        let place = place.ok_or_else(not_found)?;
        let here = |left| async move { Ok(self.cancel_here(place, left).await?) };
        let request = |timeout_ms| PeerRequest::Cancel { place, timeout_ms };
        let patience = self.config.write_timeout;
        match self.write(place.group, patience, here, request).await? {
            Cancelled::Done => Ok(()),
            Cancelled::Delivered => Err(BrokerError::AlreadyDelivered {
                message_id: message_id.to_owned(),
            }),
            Cancelled::NeverWas => Err(not_found()),
        }
    }

    /// Takes it back in a queue that this node leads.
    pub(crate) async fn cancel_here(
        &self,
        place: MessagePlace,
        patience: Duration,
    ) -> PeerResult<Cancelled> {
        let Some(queue) = self.local.queue(place.group) else {
            return Err(PeerError::NotHere);
        };
        // A delayed message is alone in its batch, and a cancellation takes back all of one.
        if place.record != 0 {
            let proof = self.barrier(&queue.group, Instant::now() + patience).await;
            proof.map_err(PeerError::Broker)?;
            return look_up(queue, place).await;
        }
        self.refuse_without_room().map_err(PeerError::Broker)?;
        let stored = LogId::new(place.term, place.index);
        let body = entry::cancel(now_ms(), stored, place.batch);
        let reply = match timeout(patience, queue.group.propose(body)).await {
            Ok(Ok((_, reply))) => reply,
            Ok(Err(ProposeError::NotLeader { leader })) => {
                return Err(PeerError::NotLeader { leader });
            }
            Ok(Err(ProposeError::Closed)) => return Err(PeerError::NotHere),
            Ok(Err(ProposeError::Unknown(_))) | Err(_) => return Err(PeerError::Broker(UNKNOWN)),
        };
        match decode_cancelled(&reply) {
            Some(CancelVerdict::Cancelled) => Ok(Cancelled::Done),
            Some(CancelVerdict::NotHeld) => look_up(queue, place).await,
            None => Err(PeerError::Broker(UNKNOWN)),
        }
    }
}

/// What there is to say of a message that is not held.
async fn look_up(queue: Arc<LocalQueue>, place: MessagePlace) -> PeerResult<Cancelled> {
    let look = move || offset_of(&queue, place);
    let found = quorate_raft::blocking::on_pool(look).await;
    let internal = |e: String| PeerError::Broker(BrokerError::Internal(e));
    let found = found.map_err(|e| internal(e.to_string()))?;
    Ok(match found.map_err(PeerError::Broker)? {
        Some(_) => Cancelled::Delivered,
        None => Cancelled::NeverWas,
    })
}

/// Where a message is visible on this node. One that was delayed is found by the time when it was due.
fn offset_of(queue: &LocalQueue, place: MessagePlace) -> BrokerResult<Option<u64>> {
    let failed = |error| unreadable(queue, error);
    let Some(visible_ms) = earliest_time_of(queue, place).map_err(failed)? else {
        return Ok(None);
    };
    let index = queue.shared.index();
    let Some(mut offset) = index.offset_at_time(visible_ms).map_err(failed)? else {
        return Ok(None);
    };
    for _ in 0..MOST_RECORDS / RECORDS_PER_LOOK {
        let records = index.find_from(offset, RECORDS_PER_LOOK).map_err(failed)?;
        let is_it = |r: &&_| {
            let r: &quorate_storage::queue_index::IndexRecord = r;
            (r.log_index, r.batch) == (place.index, place.batch)
        };
        if let Some(record) = records.iter().find(is_it) {
            let exists = place.record < record.count;
            return Ok(exists.then(|| record.base_offset + u64::from(place.record)));
        }
        match records.last() {
            Some(last) if records.len() == RECORDS_PER_LOOK => offset = last.end_offset(),
            _ => return Ok(None),
        }
    }
    let text = "too much became visible about when the message did; look for it by key or time";
    Err(BrokerError::Overloaded(text.to_owned()))
}

/// Before this time the message can't have become visible. None: the log has no such message.
fn earliest_time_of(queue: &LocalQueue, place: MessagePlace) -> Result<Option<u64>, StorageError> {
    let log = queue.group.log();
    let first = log.state().purged.map_or(0, |purged| purged.index + 1);
    if place.index < first || queue.group.applied().is_none_or(|a| a.index < place.index) {
        return Ok(None);
    }
    let entries = log.read(place.index, place.index + 1, 1)?;
    let stored = LogId::new(place.term, place.index);
    let Some(found) = entries.first().filter(|entry| entry.log_id == stored) else {
        return Ok(None);
    };
    let decoded = match found.kind {
        EntryKind::Command => entry::decode(&found.body).ok(),
        _ => None,
    };
    let Some((EntryBody::Append(batches), stamp_ms)) = decoded.map(|e| (e.body, e.stamp_ms)) else {
        return Ok(None);
    };
    let batch = batches.get(usize::from(place.batch));
    Ok(batch.map(|batch| match batch.hold {
        Some(Hold::Until { deliver_at_ms }) => deliver_at_ms.max(stamp_ms),
        _ => stamp_ms,
    }))
}
