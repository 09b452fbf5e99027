//! Messages on their way to the topic of dead letters, and what they look like there.
//!
//! The coordinator numbers a group's dead letters as they die; the forwarder stores them in that
//! order under a mark made of the group's life and the number, and says so to the coordinator only
//! then. Whoever dies between two steps, the next forwarder begins at the oldest that is not said to
//! be stored, and the topic knows what it has.

use std::sync::Arc;

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, MAX_RECORD_HEADERS, MessageRecord};
use xxhash_rust::xxh3::xxh3_128;

use super::broken;
use crate::broker::fetch::unreadable;
use crate::broker::local::LocalCoordinator;
use crate::broker::queue::BatchOutcome;
use crate::broker::queue::entry::Mark;
use crate::broker::{
    Broker, BrokerError, BrokerResult, FlushMode, Retention, TopicConfig, message_id,
};
use crate::catalog::{MAX_MESSAGE_BYTES, Topic};
use crate::coordinator::leases::{DeadLetter, LeaseCommand, LeaseGroup};
use crate::names::dead_letter_topic;
use crate::peer::{NewBatch, PeerError, PeerResult};

/// Headers that say where a dead letter came from, and why.
pub(super) const HEADER_PREFIX: &str = "quorate.dlq.";
pub(super) const TOPIC_HEADER: &str = "quorate.dlq.topic";
const TTL_HEADER: &str = "quorate.dlq.ttl_ms";
pub(super) const QUEUE_HEADER: &str = "quorate.dlq.queue";

/// Of a record's headers, what is left beside the address, the tag and what may come.
const MAX_USER_HEADERS: usize = MAX_RECORD_HEADERS - 16;

/// Dead letters that are stored before their coordinator hears of it.
const AT_ONCE: usize = 64;

impl Broker {
    /// Brings a group's dead letters to their topic, oldest first, as long as there are some.
    pub(super) async fn forward_dead_letters(
        &self,
        local: &LocalCoordinator,
        group: &str,
    ) -> PeerResult<()> {
        loop {
            let fail = |cause| broken(local, cause);
            let before = local.view.lease_group(group).map_err(fail)?;
            let letters = local.view.dead_letters(group, AT_ONCE).map_err(fail)?;
            let state = local.view.lease_group(group).map_err(fail)?;
            let (Some((oldest, _)), Some(state)) = (letters.first(), state) else {
                return Ok(());
            };
            // Made anew meanwhile: the letters may be of the life before.
            if before.is_none_or(|before| before.life != state.life) {
                continue;
            }
            let mut next = *oldest;
            let mut failed = None;
            for (sequence, letter) in &letters {
                if let Err(error) = self.forward_one(group, &state, *sequence, letter).await {
                    failed = Some(error);
                    break;
                }
                next = sequence + 1;
            }
            if next > *oldest {
                let through = next - 1;
                let command = LeaseCommand::DeadLettered {
                    life: state.life,
                    through,
                };
                self.lease_command_here(local, group, command).await?;
            }
            if let Some(error) = failed {
                return Err(PeerError::Broker(error));
            }
        }
    }

    /// Stores one dead letter, unless its message is gone.
    async fn forward_one(
        &self,
        group: &str,
        state: &LeaseGroup,
        sequence: u64,
        letter: &DeadLetter,
    ) -> BrokerResult<()> {
        let catalog = self.catalog();
        let gone = |why: &str| {
            tracing::warn!(
                group,
                topic = letter.topic,
                queue = letter.queue,
                offset = letter.offset,
                why,
                "a dead letter is dropped"
            );
        };
        if catalog.was_deleted(letter.topic) {
            gone("its topic was deleted");
            return Ok(());
        }
        let topic = catalog.topics.get(&letter.topic);
        let topic = topic.ok_or(crate::broker::route::NO_LEADER)?;
        let Some(placement) = topic.queues.get(letter.queue as usize) else {
            return Err(crate::broker::route::NO_LEADER);
        };
        let found = self.read_record(placement.group, letter.offset).await?;
        let Some((stored, _, record, ordinal)) = found else {
            gone("retention was faster");
            return Ok(());
        };
        let mut record = MessageRecord::decode(&record).map_err(unreadable)?;
        let id = message_id(placement.group, &stored.place, ordinal);
        address(&mut record, &topic.name, letter, &id);
        let batch = NewBatch {
            mark: Mark::Forwarded {
                source: forwarder_of(state.life, group),
                sequence,
            },
            hold: None,
            batch: encode(&record)?,
        };
        let config = dead_letter_config(topic);
        let target = dead_letter_topic(group);
        let target = self.ensure_internal_topic(&target, config).await?;
        self.store_forwarded(&target, 0, batch).await?;
        self.trace_dead(group, letter);
        Ok(())
    }

    /// Stores one forwarded batch; that it was stored before is as good.
    pub(super) async fn store_forwarded(
        &self,
        topic: &Arc<Topic>,
        queue: u32,
        batch: NewBatch,
    ) -> BrokerResult<()> {
        let outcomes = self.store(topic, queue, vec![batch], &[]).await?;
        match outcomes.first() {
            Some(
                BatchOutcome::Stored(_)
                | BatchOutcome::Duplicate(_)
                | BatchOutcome::AlreadyForwarded,
            ) => Ok(()),
            other => Err(BrokerError::Overloaded(format!(
                "topic {:?} does not take the message now: {other:?}",
                topic.name
            ))),
        }
    }
}

/// The source under which a group's dead letters are known to their topic.
fn forwarder_of(life: u64, group: &str) -> [u8; 16] {
    let name = format!("dead letters {life:016x} {group}");
    xxh3_128(name.as_bytes()).to_be_bytes()
}

/// One queue, kept until someone decides otherwise, as safe as what came before.
fn dead_letter_config(source: &Topic) -> TopicConfig {
    TopicConfig {
        queues: 1,
        hash_queues: 1,
        replicas: source.config.replicas,
        flush: FlushMode::Sync,
        retention: Retention {
            max_age_ms: None,
            max_bytes: None,
        },
        max_message_bytes: MAX_MESSAGE_BYTES,
        ..TopicConfig::default()
    }
}

/// Writes on a message where it came from. What an earlier death wrote there goes.
fn address(record: &mut MessageRecord, topic: &str, letter: &DeadLetter, message_id: &str) {
    strip_address(record);
    if record.headers.len() > MAX_USER_HEADERS {
        let lost = record.headers.len() - MAX_USER_HEADERS;
        tracing::warn!(
            lost,
            message_id,
            "a dead letter has no room for all its headers"
        );
        record.headers.truncate(MAX_USER_HEADERS);
    }
    let mut address: Vec<(String, Bytes)> = Vec::new();
    let mut add = |name: &str, value: &str| {
        let value = Bytes::copy_from_slice(value.as_bytes());
        address.push((format!("{HEADER_PREFIX}{name}"), value));
    };
    add("topic", topic);
    add("queue", &letter.queue.to_string());
    add("offset", &letter.offset.to_string());
    add("message_id", message_id);
    add("reason", letter.reason.as_str());
    add("deliveries", &letter.deliveries.to_string());
    add("dead_at_ms", &letter.dead_at_ms.to_string());
    // The dead don't expire; who goes back lives as long as at first.
    if let Some(ttl_ms) = record.ttl_ms {
        add("ttl_ms", &ttl_ms.to_string());
    }
    record.headers.extend(address);
    record.ttl_ms = None;
}

/// The message as it was before it died.
pub(super) fn strip_address(record: &mut MessageRecord) {
    let ttl = record.headers.iter().find(|(name, _)| name == TTL_HEADER);
    if let Some((_, value)) = ttl {
        record.ttl_ms = std::str::from_utf8(value)
            .ok()
            .and_then(|ms| ms.parse().ok());
    }
    record
        .headers
        .retain(|(name, _)| !name.starts_with(HEADER_PREFIX));
}

pub(super) fn encode(record: &MessageRecord) -> BrokerResult<Bytes> {
    let mut builder = BatchBuilder::new();
    record
        .encode(&mut builder)
        .map_err(|e| BrokerError::Internal(format!("a dead letter cannot be written: {e}")))?;
    Ok(builder.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::leases::DeathReason;

    #[test]
    fn who_comes_back_is_as_before() {
        let before = MessageRecord {
            key: Some("k".to_owned()),
            value: Some(Bytes::from_static(b"v")),
            tag: Some("t".to_owned()),
            ttl_ms: Some(5_000),
            headers: vec![("a".to_owned(), Bytes::from_static(b"1"))],
        };
        let letter = DeadLetter {
            topic: 1,
            queue: 2,
            offset: 3,
            deliveries: 4,
            reason: DeathReason::Nacked,
            dead_at_ms: 5,
        };
        let mut record = before.clone();
        for _ in 0..2 {
            // A dead letter may die again.
            address(&mut record, "orders", &letter, "id");
        }
        assert_eq!((record.ttl_ms, record.headers.len()), (None, 9));
        assert!(encode(&record).is_ok());
        strip_address(&mut record);
        assert_eq!(record, before);
    }
}
