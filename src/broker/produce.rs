//! Storing messages: encode, find the leader, wait for the majority, say where they are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use quorate_storage::batch::{
    BatchView, ProducerStamp, RecordView, TAG_HEADER, TTL_HEADER, parse_ttl, split,
};

use super::batcher::{SubmitError, submit};
use super::encode::{
    Part, check_producer, encode, fingerprint_of_batches, key_hash, producer_stamp, records_in,
    stamp_at,
};
use super::queue::entry::{MAX_BATCHES, Mark};
use super::queue::{BatchOutcome, REMEMBERED_BATCHES};
use super::route::{NO_LEADER, UNKNOWN};
use super::topics::check_own_name;
use super::{
    Broker, BrokerError, BrokerResult, Durability, FlushMode, MAX_TTL_MS, ProduceAnswer,
    ProduceRequest, Stored, message_id,
};
use crate::catalog::Topic;
use crate::names::{RESERVED_HEADER_PREFIX, check_tag};
use crate::peer::{NewBatch, PeerError, PeerRequest, PeerResult};

/// A client's has at most 255; what is made of it for a group of lines has more.
const MAX_KEY_BYTES: usize = 300;

/// What is stored, or isn't, of each message of a batch.
type Results = Vec<Result<Stored, BrokerError>>;

/// A request that was checked: one batch for each queue.
#[derive(Debug)]
pub(super) struct Prepared {
    topic: Arc<Topic>,
    pub parts: Vec<Part>,
    producer: Option<ProducerStamp>,
    pub count: usize,
}

impl Broker {
    /// Stores the messages, one batch for each queue they go to.
    pub async fn produce(&self, request: ProduceRequest) -> BrokerResult<ProduceAnswer> {
        let prepared = self.prepare(request).await?;
        Ok(self.store_prepared(prepared).await)
    }

    /// Whether such a request can be stored at all, and if not, why.
    pub async fn check_produce(&self, request: ProduceRequest) -> BrokerResult<()> {
        let prepared = self.prepare(request).await?;
        prepared
            .parts
            .into_iter()
            .try_for_each(|part| part.batch.map(drop))
    }

    /// Checks a request and makes it ready to be stored.
    pub(super) async fn prepare(&self, request: ProduceRequest) -> BrokerResult<Prepared> {
        check_key(request.idempotency_key.as_deref())?;
        check_own_name(&request.topic)?;
        let topic = self.find_topic(&request.topic).await?;
        let coordinators = self.catalog().coordinators.len();
        let producer = request.producer.as_ref();
        let producer = producer
            .map(|m| producer_stamp(m, coordinators))
            .transpose()?;
        let count = request.messages.len();
        let turn = self.round_robin.fetch_add(count as u32, Ordering::Relaxed);
        let parts = encode(
            &topic,
            &request,
            producer,
            turn,
            self.config.max_batch_bytes,
        )?;
        Ok(Prepared {
            topic,
            parts,
            producer,
            count,
        })
    }

    pub(super) async fn store_prepared(&self, prepared: Prepared) -> ProduceAnswer {
        let Prepared {
            topic,
            parts,
            producer,
            count,
        } = prepared;
        let mut results: Vec<Option<Result<Stored, BrokerError>>> = vec![None; count];
        // They come queue by queue.
        let mut by_queue: Vec<Vec<Part>> = Vec::new();
        for part in parts {
            match by_queue.last_mut() {
                Some(last) if last.last().is_some_and(|p| p.queue == part.queue) => last.push(part),
                _ => by_queue.push(vec![part]),
            }
        }
        let stored = by_queue
            .into_iter()
            .map(|parts| self.produce_parts(&topic, parts, producer));
        for (place, result) in join_all(stored).await.into_iter().flatten() {
            if let Some(slot) = results.get_mut(place) {
                *slot = Some(result);
            }
        }
        // Every message is in exactly one part, and a part has a result for each of its own.
        let lost = || {
            Err(BrokerError::Internal(
                "a message without a result".to_owned(),
            ))
        };
        let results = results
            .into_iter()
            .map(|r| r.unwrap_or_else(lost))
            .collect();
        answer(&topic, results)
    }

    /// Stores the batches of one queue, in order. What can't be encoded keeps the others out too.
    async fn produce_parts(
        &self,
        topic: &Topic,
        parts: Vec<Part>,
        producer: Option<ProducerStamp>,
    ) -> Vec<(usize, Result<Stored, BrokerError>)> {
        let mut batches = Vec::with_capacity(parts.len());
        let mut places = Vec::with_capacity(parts.len());
        let mut failed = None;
        let queue = parts.first().map_or(0, |part| part.queue);
        for part in parts {
            match part.batch {
                Ok(batch) => batches.push(batch),
                Err(error) => failed = failed.or(Some(error)),
            }
            places.push(part.places);
        }
        let mut results = Vec::new();
        let stamps = places.iter().map(|places| {
            let first = places.first().copied().unwrap_or(0);
            producer.map(|producer| stamp_at(producer, first))
        });
        let stamps: Vec<_> = stamps.collect();
        let group = topic.queues.get(queue as usize).map_or(0, |q| q.group);
        for (at, places) in (0..).step_by(MAX_BATCHES).zip(places.chunks(MAX_BATCHES)) {
            let range = at..at + places.len();
            let outcomes = match &failed {
                Some(error) => Err(error.clone()),
                None => {
                    let batches = batches[range.clone()].to_vec();
                    let stored = self.store(topic, queue, batches, &stamps[range.clone()]);
                    stored.await
                }
            };
            match outcomes {
                Ok(outcomes) => {
                    for (n, places) in range.zip(places) {
                        let outcome = outcomes.get(n - at).copied();
                        let each = match outcome {
                            Some(outcome) => {
                                let producer = stamps.get(n).copied().flatten();
                                explain(group, queue, outcome, places.len(), producer)
                            }
                            None => vec![Err(UNKNOWN); places.len()],
                        };
                        results.extend(places.iter().copied().zip(each));
                    }
                }
                Err(error) => {
                    let places = places.iter().flatten();
                    results.extend(places.map(|place| (*place, Err(error.clone()))));
                    failed = Some(error);
                }
            }
        }
        results
    }

    /// RecordBatch v2 bytes (one or more batches) for one queue, stored as they are.
    pub async fn produce_batches(
        &self,
        topic: &str,
        queue: u32,
        batches: Bytes,
        idempotency_key: Option<String>,
    ) -> BrokerResult<ProduceAnswer> {
        check_key(idempotency_key.as_deref())?;
        check_own_name(topic)?;
        let (topic, group) = self.find_queue(topic, queue).await?;
        let fingerprint = fingerprint_of_batches(&batches);
        let mut new = Vec::new();
        let mut views = Vec::new();
        for bytes in split(batches) {
            let view = self.check_batch(&topic, bytes)?;
            let mark = idempotency_key.as_deref().map(|key| Mark::Key {
                hash: key_hash(key, new.len() as u32),
                fingerprint,
            });
            new.push(NewBatch {
                mark: mark.unwrap_or_default(),
                hold: None,
                batch: view.bytes().clone(),
            });
            views.push(view);
        }
        if new.is_empty() || new.len() > MAX_BATCHES {
            let text = format!("the body must have 1 to {MAX_BATCHES} batches");
            return Err(BrokerError::InvalidRequest(text));
        }
        let producers: Vec<_> = views.iter().map(BatchView::producer).collect();
        self.check_producers(producers.iter().flatten())?;
        let outcomes = self.store(&topic, queue, new, &producers).await?;
        let each = outcomes.into_iter().zip(&views);
        let results = each
            .flat_map(|(outcome, view)| {
                let count = view.record_count() as usize;
                explain(group, queue, outcome, count, view.producer())
            })
            .collect();
        Ok(answer(&topic, results))
    }

    /// Checks the producers of a request's batches, one for each batch that has one.
    fn check_producers<'a>(
        &self,
        each: impl Iterator<Item = &'a ProducerStamp>,
    ) -> BrokerResult<()> {
        let coordinators = self.catalog().coordinators.len();
        let mut batches: BTreeMap<i64, usize> = BTreeMap::new();
        for producer in each {
            check_producer(producer.id, producer.epoch, coordinators)?;
            let own = batches.entry(producer.id).or_default();
            *own += 1;
            if *own > REMEMBERED_BATCHES {
                // Of more, a retry of the first ones would not be recognised.
                return Err(BrokerError::InvalidRequest(format!(
                    "a request may have at most {REMEMBERED_BATCHES} batches of one producer; send \
                     fewer at a time"
                )));
            }
        }
        Ok(())
    }

    fn check_batch(
        &self,
        topic: &Topic,
        bytes: Result<Bytes, quorate_storage::batch::BatchError>,
    ) -> BrokerResult<BatchView> {
        let invalid =
            |e: quorate_storage::batch::BatchError| BrokerError::InvalidRequest(e.to_string());
        let view = BatchView::parse(bytes.map_err(invalid)?).map_err(invalid)?;
        view.validate_client().map_err(invalid)?;
        if view.bytes().len() > self.config.max_batch_bytes {
            return Err(BrokerError::RequestTooLarge {
                max_bytes: self.config.max_batch_bytes as u64,
            });
        }
        let max_bytes = topic.config.max_message_bytes;
        for record in view.records() {
            let record = record.map_err(invalid)?;
            check_reserved(&record)?;
            let headers = record
                .headers
                .iter()
                .map(|h| h.key.len() + h.value.map_or(0, |v| v.len()));
            let bytes = record.key.as_ref().map_or(0, Bytes::len)
                + record.value.as_ref().map_or(0, Bytes::len)
                + headers.sum::<usize>();
            if bytes as u64 > max_bytes {
                let bytes = bytes as u64;
                return Err(BrokerError::MessageTooLarge { bytes, max_bytes });
            }
        }
        Ok(view)
    }

    /// Brings batches to the queue's leader, wherever it is. One outcome for each, or one error for
    /// all.
    pub(super) async fn store(
        &self,
        topic: &Topic,
        queue: u32,
        batches: Vec<NewBatch>,
        producers: &[Option<ProducerStamp>],
    ) -> BrokerResult<Vec<BatchOutcome>> {
        let Some(placement) = topic.queues.get(queue as usize) else {
            return Err(BrokerError::QueueNotFound {
                topic: topic.name.clone(),
                queue,
                queues: topic.config.queues,
            });
        };
        let group = placement.group;
        for producer in producers.iter().flatten() {
            self.attach_producer(*producer, group).await?;
        }
        let here = |left| {
            let batches = batches.clone();
            async move { Ok(self.produce_here(group, batches, left).await?) }
        };
        let request = |timeout_ms| PeerRequest::Produce {
            group,
            batches: batches.clone(),
            timeout_ms,
        };
        self.write(group, self.config.write_timeout, here, request)
            .await
    }

    /// Stores batches in a queue that this node leads.
    pub(crate) async fn produce_here(
        &self,
        group: u64,
        batches: Vec<NewBatch>,
        timeout: Duration,
    ) -> PeerResult<Vec<BatchOutcome>> {
        if batches.len() > MAX_BATCHES {
            // They go into one entry, which would leave the rest out.
            let text = format!("a queue takes at most {MAX_BATCHES} batches at a time; send fewer");
            return Err(PeerError::Broker(BrokerError::InvalidRequest(text)));
        }
        let Some(queue) = self.local.queue(group) else {
            return Err(PeerError::NotHere);
        };
        if !queue.group.is_leader() {
            let leader = queue.group.leader().filter(|n| *n != self.node_id());
            return Err(PeerError::NotLeader { leader });
        }
        self.refuse_without_room().map_err(PeerError::Broker)?;
        let Some((topic, number)) = self.queue_of(group) else {
            return Err(PeerError::NotHere);
        };
        let admitted = self.admit(&queue, &topic, number, &batches).await;
        let admitted = admitted.map_err(PeerError::Broker)?;
        if topic.config.quota.is_set() {
            let messages = batches.iter().map(|b| u64::from(records_in(&b.batch)));
            let bytes = batches.iter().map(|b| b.batch.len() as u64);
            self.take_quota(&topic, messages.sum(), bytes.sum())
                .map_err(PeerError::Broker)?;
        }
        let submitted = submit(
            &queue,
            &self.local,
            &self.config,
            &self.metrics,
            batches,
            admitted,
            timeout,
        );
        submitted.await.map_err(|error| match error {
            SubmitError::NotLeader { leader } => PeerError::NotLeader { leader },
            SubmitError::Overloaded => PeerError::Broker(BrokerError::Overloaded(
                "too much is waiting to be stored".to_owned(),
            )),
            SubmitError::NotTaken => PeerError::Broker(NO_LEADER),
            SubmitError::Unknown => PeerError::Broker(UNKNOWN),
        })
    }
}

/// What begins with the reserved prefix is ours, and of that a client may bring a tag and a time to
/// live.
fn check_reserved(record: &RecordView) -> BrokerResult<()> {
    for header in &record.headers {
        let refused = if header.key == TAG_HEADER.as_bytes() {
            let tag = header.value.as_deref();
            let tag = tag.and_then(|value| std::str::from_utf8(value).ok());
            check_tag(tag.unwrap_or_default()).err()
        } else if header.key == TTL_HEADER.as_bytes() {
            let ttl = header.value.as_deref().and_then(parse_ttl);
            let fits = ttl.is_some_and(|ms| ms <= MAX_TTL_MS);
            (!fits).then(|| format!("header {TTL_HEADER:?} must be 1 to {MAX_TTL_MS}, in digits"))
        } else if header.key.starts_with(RESERVED_HEADER_PREFIX.as_bytes()) {
            Some(format!(
                "headers that begin with {RESERVED_HEADER_PREFIX:?} are reserved"
            ))
        } else {
            None
        };
        if let Some(reason) = refused {
            return Err(BrokerError::InvalidRequest(reason));
        }
    }
    Ok(())
}

pub(super) fn check_key(key: Option<&str>) -> BrokerResult<()> {
    match key {
        Some(key) if key.is_empty() || key.len() > MAX_KEY_BYTES => {
            let text = format!("an idempotency key has 1 to {MAX_KEY_BYTES} bytes");
            Err(BrokerError::InvalidRequest(text))
        }
        _ => Ok(()),
    }
}

fn answer(topic: &Topic, results: Results) -> ProduceAnswer {
    let durability = match topic.config.flush {
        FlushMode::Sync => Durability::MajorityFsync,
        FlushMode::Async => Durability::MajorityWritten,
    };
    ProduceAnswer {
        results,
        durability,
    }
}

/// What apply's verdict on a batch means for each of its messages.
pub(super) fn explain(
    group: u64,
    queue: u32,
    outcome: BatchOutcome,
    count: usize,
    producer: Option<ProducerStamp>,
) -> Results {
    let (id, epoch, sequence) = producer.map_or((0, 0, 0), |p| (p.id, p.epoch, p.base_sequence));
    // Numbers that apply accepted into its tables are never negative.
    let unsigned = |n: i64| u64::try_from(n).unwrap_or(0);
    let error = match outcome {
        BatchOutcome::Stored(place)
        | BatchOutcome::Held { place, .. }
        | BatchOutcome::Duplicate(place) => {
            let stored = |record: u32| Stored {
                queue,
                offset: place.offset().map(|base| base + u64::from(record)),
                deliver_at_ms: match outcome {
                    BatchOutcome::Held { due_ms, .. } => due_ms,
                    _ => None,
                },
                message_id: message_id(group, &place, record),
            };
            return (0..count as u32).map(|record| Ok(stored(record))).collect();
        }
        BatchOutcome::OutOfOrder { expected } => BrokerError::OutOfOrderSequence {
            id: id.to_string(),
            sequence: unsigned(sequence.into()),
            expected: unsigned(expected.into()),
        },
        BatchOutcome::Fenced { current } => BrokerError::FencedProducer {
            id: id.to_string(),
            epoch: unsigned(epoch.into()) as u32,
            current: unsigned(current.into()) as u32,
        },
        BatchOutcome::AlreadyForwarded => {
            BrokerError::Internal("a request was taken for a forwarder's".to_owned())
        }
        BatchOutcome::KeyReused => BrokerError::InvalidRequest(
            "this idempotency key was used for a request with other messages; use a new key"
                .to_owned(),
        ),
        BatchOutcome::KeysFull => BrokerError::QuotaExceeded(
            "the queue remembers as many idempotency keys as it may; the oldest go after the window"
                .to_owned(),
        ),
        BatchOutcome::ProducersFull => BrokerError::QuotaExceeded(
            "the queue remembers as many producers as it may; use the ones there are".to_owned(),
        ),
        BatchOutcome::TransactionEnded => {
            BrokerError::Internal("a request was taken for a transaction's".to_owned())
        }
        BatchOutcome::HeldFull => BrokerError::BacklogFull(
            "the queue holds as many delayed messages and parts of transactions as it may; \
             try again when some of them were delivered"
                .to_owned(),
        ),
        BatchOutcome::Malformed => {
            BrokerError::Internal("the batch could not be read when it was applied".to_owned())
        }
    };
    vec![Err(error); count]
}
