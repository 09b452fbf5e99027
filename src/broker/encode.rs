//! From a produce request to one batch per queue.

use std::collections::BTreeMap;

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, MAX_RECORD_HEADERS, MessageRecord, ProducerStamp};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use super::batcher::now_ms;
use super::partition::queue_of_key;
use super::queue::entry::{KeyHash, Mark};
use super::queue::{REMEMBERED_BATCHES, advance};
use super::{BrokerError, BrokerResult, Delay, NewMessage, ProduceRequest, ProducerMark};
use crate::catalog::Topic;
use crate::coordinator::{is_named, owner_of_producer};
use crate::peer::{NewBatch, NewHold};

const NO_PRODUCER: &str = "producer.id is not one that POST /v1/producers gave";

/// Messages of one request for one queue that make one batch: those that are visible at once, or a
/// delayed one.
#[derive(Debug)]
pub(super) struct Part {
    pub queue: u32,
    /// Places of the messages in the request.
    pub places: Vec<usize>,
    /// Or why none of them can be stored.
    pub batch: BrokerResult<NewBatch>,
}

/// Checks the producer's mark and brings it into the form that batches carry.
pub(super) fn producer_stamp(
    mark: &ProducerMark,
    coordinators: usize,
) -> BrokerResult<ProducerStamp> {
    let invalid = |text: &str| Err(BrokerError::InvalidRequest(text.to_owned()));
    let id: i64 = match mark.id.parse() {
        // Written as it was given: another spelling would be another producer to its owner.
        Ok(id) if i64::to_string(&id) == mark.id => id,
        _ => return invalid(NO_PRODUCER),
    };
    let Ok(epoch) = i16::try_from(mark.epoch) else {
        return invalid("producer.epoch is not one that POST /v1/producers gave");
    };
    check_producer(id, epoch, coordinators)?;
    let Ok(base_sequence) = i32::try_from(mark.sequence) else {
        return invalid("producer.sequence goes from 0 to 2147483647, then begins again at 0");
    };
    Ok(ProducerStamp {
        id,
        epoch,
        base_sequence,
    })
}

/// Checks what a producer's batches carry, as far as that can be told here.
pub(super) fn check_producer(id: i64, epoch: i16, coordinators: usize) -> BrokerResult<()> {
    let invalid = |text: &str| Err(BrokerError::InvalidRequest(text.to_owned()));
    if id <= 0 || owner_of_producer(id) as usize >= coordinators {
        return invalid(NO_PRODUCER);
    }
    if epoch > 0 && !is_named(id) {
        return invalid("producer.epoch must be 0 for a producer without a name");
    }
    Ok(())
}

/// The hash under which an idempotency key is remembered. `part` tells apart several batches of one
/// request for the same queue.
pub(super) fn key_hash(key: &str, part: u32) -> KeyHash {
    let mut hasher = Xxh3::new();
    hasher.update(key.as_bytes());
    if part > 0 {
        hasher.update(&[0xff]);
        hasher.update(&part.to_le_bytes());
    }
    hasher.digest128().to_be_bytes()
}

/// Chooses queues and encodes what goes to each, queue by queue. `turn` is where round robin goes on.
pub(super) fn encode(
    topic: &Topic,
    request: &ProduceRequest,
    producer: Option<ProducerStamp>,
    turn: u32,
    max_batch_bytes: usize,
) -> BrokerResult<Vec<Part>> {
    if request.messages.is_empty() {
        let text = "messages must have at least one message".to_owned();
        return Err(BrokerError::InvalidRequest(text));
    }
    let now_ms = now_ms();
    for delay in request.messages.iter().filter_map(|m| m.delay) {
        delay.check(now_ms)?;
    }
    let queues = choose(topic, request, producer.is_some(), turn)?;
    let mut by_queue: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (place, queue) in queues.into_iter().enumerate() {
        by_queue.entry(queue).or_default().push(place);
    }
    let mut parts = Vec::new();
    for (queue, places) in by_queue {
        for places in divide(places, request, producer.is_some())? {
            let first = places.first().copied().unwrap_or(0);
            let producer = producer.map(|stamp| stamp_at(stamp, first));
            let batch = encode_batch(topic, queue, request, &places, producer, max_batch_bytes);
            let delay = request.messages.get(first).and_then(|m| m.delay);
            let delay = delay.filter(|delay| delay.stands_alone());
            parts.push(Part {
                queue,
                places,
                batch: batch.map(|batch| NewBatch {
                    mark: Mark::None,
                    hold: delay.map(NewHold::Delay),
                    batch,
                }),
            });
        }
    }
    if let Some(key) = &request.idempotency_key {
        mark_parts(&mut parts, request, key)?;
    }
    Ok(parts)
}

/// The producer's numbers of the message at `place`: all of a request go to one queue.
pub(super) fn stamp_at(stamp: ProducerStamp, place: usize) -> ProducerStamp {
    ProducerStamp {
        // A request has far fewer messages than 2^32.
        base_sequence: advance(stamp.base_sequence, place as u32),
        ..stamp
    }
}

/// Which of one queue's messages make a batch: those that are visible at once make one, each delayed
/// one is for itself. A producer's keep their order, since its numbers follow each other.
fn divide(
    places: Vec<usize>,
    request: &ProduceRequest,
    in_order: bool,
) -> BrokerResult<Vec<Vec<usize>>> {
    let delay = |place: usize| request.messages.get(place).and_then(|m| m.delay);
    let is_delayed = |place: usize| delay(place).is_some_and(Delay::stands_alone);
    let mut batches: Vec<Vec<usize>> = Vec::new();
    // The batch that takes the next message which is visible at once.
    let mut open: Option<usize> = None;
    for place in places {
        match open.and_then(|at| batches.get_mut(at)) {
            Some(batch) if !is_delayed(place) => batch.push(place),
            _ => {
                match is_delayed(place) {
                    false => open = Some(batches.len()),
                    true if in_order => open = None,
                    true => {}
                }
                batches.push(vec![place]);
            }
        }
    }
    if in_order && batches.len() > REMEMBERED_BATCHES {
        // Of more, a retry of the first ones would not be recognised.
        let text = format!(
            "with a producer a request makes at most {REMEMBERED_BATCHES} batches, and each \
             delayed message is one; send fewer of them at a time"
        );
        return Err(BrokerError::InvalidRequest(text));
    }
    Ok(batches)
}

/// Gives every part a hash of the key and the fingerprint of the whole request.
fn mark_parts(parts: &mut [Part], request: &ProduceRequest, key: &str) -> BrokerResult<()> {
    let mut whole = Xxh3::new();
    for part in parts.iter() {
        // A request under a key is taken or refused as a whole, so that a retry is the same one.
        let batch = part.batch.as_ref().map_err(Clone::clone)?;
        whole.update(&part.queue.to_le_bytes());
        whole.update(&xxh3_64(&batch.batch).to_le_bytes());
    }
    for (place, message) in (0u64..).zip(&request.messages) {
        if let Some(delay) = message.delay {
            whole.update(&place.to_le_bytes());
            whole.update(&delay.fingerprint());
        }
    }
    let fingerprint = whole.digest();
    let mut numbers: BTreeMap<u32, u32> = BTreeMap::new();
    for part in parts {
        let number = numbers.entry(part.queue).or_default();
        if let Ok(batch) = &mut part.batch {
            batch.mark = Mark::Key {
                hash: key_hash(key, *number),
                fingerprint,
            };
        }
        *number += 1;
    }
    Ok(())
}

fn choose(
    topic: &Topic,
    request: &ProduceRequest,
    one_queue: bool,
    turn: u32,
) -> BrokerResult<Vec<u32>> {
    let config = &topic.config;
    let named = |message: &NewMessage| match (&message.queue, &message.key) {
        (Some(queue), _) => Some(*queue),
        (None, Some(key)) => Some(queue_of_key(key.as_bytes(), config.hash_queues)),
        (None, None) => None,
    };
    if one_queue {
        let mut chosen = None;
        for queue in request.messages.iter().filter_map(named) {
            if *chosen.get_or_insert(queue) != queue {
                let text = "with a producer all messages of a request go to one queue, but these \
                            have keys or queues of several";
                return Err(BrokerError::InvalidRequest(text.to_owned()));
            }
        }
        // Without a hint the producer's own id keeps its sequence on one queue.
        let id = request.producer.as_ref().map_or("", |p| p.id.as_str());
        let queue = chosen.unwrap_or_else(|| queue_of_key(id.as_bytes(), config.hash_queues));
        return Ok(vec![queue; request.messages.len()]);
    }
    let by_key = request.idempotency_key.as_ref();
    let by_key = by_key.map(|key| queue_of_key(key.as_bytes(), config.hash_queues));
    let mut turn = turn;
    let each = request.messages.iter().map(|message| {
        named(message).or(by_key).unwrap_or_else(|| {
            turn = turn.wrapping_add(1);
            turn % config.queues.max(1)
        })
    });
    Ok(each.collect())
}

fn encode_batch(
    topic: &Topic,
    queue: u32,
    request: &ProduceRequest,
    places: &[usize],
    producer: Option<ProducerStamp>,
    max_batch_bytes: usize,
) -> BrokerResult<Bytes> {
    if queue >= topic.config.queues {
        return Err(BrokerError::QueueNotFound {
            topic: topic.name.clone(),
            queue,
            queues: topic.config.queues,
        });
    }
    let mut builder = BatchBuilder::new();
    if let Some(stamp) = producer {
        builder = builder.producer(stamp.id, stamp.epoch, stamp.base_sequence);
    }
    for place in places {
        let Some(message) = request.messages.get(*place) else {
            continue;
        };
        let bytes = message.size_bytes();
        let max_bytes = topic.config.max_message_bytes;
        if bytes > max_bytes {
            return Err(BrokerError::MessageTooLarge { bytes, max_bytes });
        }
        if builder.size_bytes() as u64 + bytes > max_batch_bytes as u64 {
            return Err(BrokerError::RequestTooLarge {
                max_bytes: max_batch_bytes as u64,
            });
        }
        // Two more for the tag and the time to live.
        if message.headers.len() > MAX_RECORD_HEADERS - 2 {
            let text = format!("a message has at most {} headers", MAX_RECORD_HEADERS - 2);
            return Err(BrokerError::InvalidRequest(text));
        }
        let record = record_of(message);
        let encoded = record.encode(&mut builder);
        encoded.map_err(|e| BrokerError::InvalidRequest(e.to_string()))?;
    }
    Ok(builder.finish())
}

/// The message as it is stored.
pub(super) fn record_of(message: &NewMessage) -> MessageRecord {
    let headers = message.headers.iter();
    MessageRecord {
        key: message.key.clone(),
        value: message.value.clone(),
        tag: message.tag.clone(),
        ttl_ms: message.ttl_ms,
        headers: headers
            .map(|(name, value)| (name.clone(), Bytes::copy_from_slice(value.as_bytes())))
            .collect(),
    }
}

/// The number of records that a batch says it has.
pub fn records_in(batch: &[u8]) -> u32 {
    let field = batch.get(57..61).and_then(|f| f.try_into().ok());
    field.map_or(0, u32::from_be_bytes)
}

/// The fingerprint of a request that is already in batches.
pub(super) fn fingerprint_of_batches(batches: &[u8]) -> u64 {
    (xxh3_128(batches) >> 64) as u64
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
