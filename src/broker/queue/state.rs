//! The queue's state machine: gives offsets, refuses repetitions, extends the index.
//!
//! Invariant: apply depends on the entries alone. Its clock is their stamps (never going back),
//! and its tables are iterated in an order that is the same on every replica.

use std::sync::Arc;

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::batch::BatchView;
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::queue_index::{IndexRecord, QueueIndex};
use quorate_storage::{LogId, StorageError};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::dedupe::{Producer, ProducerTable, Verdict};
use super::entry::{self, EntryBatch, EntryBody, Mark};
use super::forwarded::SourceTable;
use super::idempotency::{KeyTable, KeyVerdict, RememberedKey};
use super::reply::{self, BatchOutcome, CancelVerdict, QueueReply, Settled};
use super::{Place, QueueBounds, QueueShared};

const CHECKPOINT_VERSION: u8 = 2;

/// Bounds of the tables. Apply decides by them, so they must be the same on every replica at every
/// time: the catalog records them when the cluster is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLimits {
    pub max_producers: u32,
    pub max_keys: u32,
    /// How long an idempotency key is remembered, in log time.
    pub key_window_ms: u64,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            max_producers: 16 << 10,
            max_keys: 100_000,
            key_window_ms: 10 * 60_000,
        }
    }
}

#[derive(Debug, Clone, Default)]
struct State {
    next_offset: u64,
    earliest_offset: u64,
    stamp_ms: u64,
    producers: ProducerTable,
    keys: KeyTable,
    sources: SourceTable,
}

#[derive(Serialize, Deserialize)]
struct Checkpoint {
    version: u8,
    next_offset: u64,
    earliest_offset: u64,
    stamp_ms: u64,
    producers: Vec<(i64, Producer)>,
    keys: Vec<RememberedKey>,
    sources: SourceTable,
}

/// One replica's state of one queue.
#[derive(Debug)]
pub struct QueueMachine {
    state: State,
    limits: QueueLimits,
    index: Arc<QueueIndex>,
    shared: Arc<QueueShared>,
}

impl QueueMachine {
    pub fn new(index: Arc<QueueIndex>, shared: Arc<QueueShared>, limits: QueueLimits) -> Self {
        Self {
            state: State::default(),
            limits,
            index,
            shared,
        }
    }

    fn append(&mut self, log_id: LogId, batches: &[EntryBatch]) -> Vec<BatchOutcome> {
        let each = batches.iter().enumerate();
        // `decode` bounds the count by MAX_BATCHES, which is below 2^16.
        each.map(|(ordinal, batch)| self.append_one(log_id, ordinal as u16, batch))
            .collect()
    }

    fn append_one(&mut self, log_id: LogId, ordinal: u16, batch: &EntryBatch) -> BatchOutcome {
        match &batch.mark {
            Mark::None => {}
            Mark::Key { hash, fingerprint } => {
                let max_keys = self.limits.max_keys as usize;
                match self.state.keys.judge(hash, *fingerprint, max_keys) {
                    KeyVerdict::New => {}
                    KeyVerdict::Seen(place) => return BatchOutcome::Duplicate(place),
                    KeyVerdict::Reused => return BatchOutcome::KeyReused,
                    KeyVerdict::Full => return BatchOutcome::KeysFull,
                }
            }
            Mark::Forwarded { source, sequence } => {
                if self.state.sources.has(source, *sequence) {
                    return BatchOutcome::AlreadyForwarded;
                }
            }
        }
        if batch.hold.is_some() {
            return BatchOutcome::Malformed;
        }
        let Ok(view) = BatchView::parse_trusted(batch.batch.clone()) else {
            return BatchOutcome::Malformed;
        };
        let count = view.record_count();
        if count == 0 {
            return BatchOutcome::Malformed;
        }
        let producer = view.producer();
        if let Some(mark) = producer {
            let max_producers = self.limits.max_producers as usize;
            match self.state.producers.judge(mark, count, max_producers) {
                Verdict::Accept => {}
                Verdict::Duplicate(place) => return BatchOutcome::Duplicate(place),
                Verdict::OutOfOrder { expected } => return BatchOutcome::OutOfOrder { expected },
                Verdict::Fenced { current } => return BatchOutcome::Fenced { current },
                Verdict::Full => return BatchOutcome::ProducersFull,
            }
        }
        let place = Place {
            base_offset: self.state.next_offset,
            count,
            term: log_id.term,
            index: log_id.index,
            batch: ordinal,
        };
        let stamp_ms = self.state.stamp_ms;
        if let Some(mark) = producer {
            self.state.producers.record(mark, place, stamp_ms);
        }
        match batch.mark {
            Mark::None => {}
            Mark::Key { hash, fingerprint } => {
                let keys = &mut self.state.keys;
                keys.record(hash, fingerprint, place, stamp_ms);
            }
            Mark::Forwarded { source, sequence } => self.state.sources.record(source, sequence),
        }
        self.extend_index(place);
        self.state.next_offset += u64::from(count);
        BatchOutcome::Stored(place)
    }

    fn extend_index(&self, place: Place) {
        let appended = self.index.append(IndexRecord {
            base_offset: place.base_offset,
            count: place.count,
            batch: place.batch,
            log_index: place.index,
            timestamp_ms: self.state.stamp_ms,
        });
        if let Err(error) = appended {
            // The commit log has the message; only this replica's index hasn't. It says so to
            // readers, and fails its next checkpoint, instead of serving a queue with a hole.
            tracing::error!(path = %self.index.path().display(), %error, "queue index failed");
            self.shared.soundness().set_broken(error);
        }
    }

    fn publish(&self) {
        let bounds = QueueBounds {
            earliest: self.state.earliest_offset.max(self.index.first_offset()),
            end: self.state.next_offset,
        };
        self.shared.publish(bounds, self.state.stamp_ms);
    }

    fn encode(&self) -> Vec<u8> {
        let checkpoint = Checkpoint {
            version: CHECKPOINT_VERSION,
            next_offset: self.state.next_offset,
            earliest_offset: self.state.earliest_offset,
            stamp_ms: self.state.stamp_ms,
            producers: match mutation::on(Mutation::SkipDedupeInSnapshots) {
                false => self.state.producers.content(),
                true => Vec::new(),
            },
            keys: self.state.keys.content(),
            sources: match mutation::on(Mutation::SkipDedupeInSnapshots) {
                false => self.state.sources.clone(),
                true => SourceTable::default(),
            },
        };
        // Numbers and lists of known length into memory: there is no way to fail.
        postcard::to_stdvec(&checkpoint).unwrap_or_default()
    }

    fn decode(&self, state: &[u8]) -> Result<State, StorageError> {
        let damaged = |reason: String| StorageError::Damaged {
            path: self.index.path().to_path_buf(),
            position: 0,
            reason,
        };
        let found: Checkpoint = postcard::from_bytes(state)
            .map_err(|e| damaged(format!("the queue's checkpoint cannot be read: {e}")))?;
        if found.version != CHECKPOINT_VERSION {
            let version = found.version;
            return Err(damaged(format!(
                "checkpoint version {version} is not known"
            )));
        }
        Ok(State {
            next_offset: found.next_offset,
            earliest_offset: found.earliest_offset,
            stamp_ms: found.stamp_ms,
            producers: ProducerTable::from_content(found.producers),
            keys: KeyTable::from_content(found.keys),
            sources: found.sources,
        })
    }
}

impl StateMachine for QueueMachine {
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes {
        let reply = match entry::decode(body) {
            Ok(entry) => {
                self.state.stamp_ms = self.state.stamp_ms.max(entry.stamp_ms);
                if mutation::on(Mutation::ApplyWithNodeClock) {
                    self.state.stamp_ms = crate::broker::batcher::now_ms();
                }
                self.state.producers.expire(self.state.stamp_ms);
                let forget_before = self
                    .state
                    .stamp_ms
                    .saturating_sub(self.limits.key_window_ms);
                self.state.keys.expire(forget_before);
                match entry.body {
                    EntryBody::Append(batches) => {
                        QueueReply::Batches(self.append(log_id, &batches))
                    }
                    EntryBody::Fence { producer, epoch } => {
                        let stamp_ms = self.state.stamp_ms;
                        self.state.producers.fence(producer, epoch, stamp_ms);
                        QueueReply::Done
                    }
                    EntryBody::Deliver { .. } => QueueReply::Done,
                    EntryBody::Settle { .. } => QueueReply::Settled(Settled::default()),
                    EntryBody::Cancel { .. } => QueueReply::Cancelled(CancelVerdict::NotHeld),
                }
            }
            Err(error) => {
                tracing::error!(%log_id, %error, "an entry that no version of this program wrote");
                QueueReply::Batches(vec![BatchOutcome::Malformed])
            }
        };
        self.publish();
        reply::encode(&reply).into()
    }

    fn applied_batch(&mut self, _applied: LogId) {
        self.shared.wake();
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        if let Some(error) = self.shared.soundness().broken() {
            return Err(error);
        }
        // A failed fsync may have lost records: only a new index can be trusted again.
        let synced = self.index.sync();
        synced.inspect_err(|error| self.shared.soundness().set_broken(error.clone()))?;
        Ok(self.encode())
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        match state {
            None => {
                self.index.reset_to(0)?;
                self.state = State::default();
            }
            Some(state) => {
                let state = self.decode(state)?;
                let left = self.index.truncate_to(state.next_offset)?;
                if left != state.next_offset {
                    return Err(StorageError::Damaged {
                        path: self.index.path().to_path_buf(),
                        position: 0,
                        reason: format!(
                            "the index ends at offset {left}, its checkpoint at {}",
                            state.next_offset
                        ),
                    });
                }
                self.state = state;
            }
        }
        self.publish();
        self.shared.wake();
        Ok(())
    }

    fn install(&mut self, _last: LogId, state: &[u8]) -> Result<(), StorageError> {
        let state = self.decode(state)?;
        self.index.reset_to(state.next_offset)?;
        self.state = state;
        self.publish();
        self.shared.wake();
        Ok(())
    }

    fn state_hash(&self) -> u64 {
        xxh3_64(&self.encode())
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
