//! The queue's state machine: gives offsets, refuses repetitions, extends the index.
//!
//! Invariant: apply depends on the entries alone. Its clock is their stamps (never going back),
//! and its tables are iterated in an order that is the same on every replica.

use std::sync::Arc;

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::batch::BatchView;
use quorate_storage::derived::DerivedGroup;
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::queue_index::{IndexRecord, QueueIndex};
use quorate_storage::{LogId, StorageError};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::dedupe::{Producer, ProducerTable, Verdict};
use super::entry::{self, EntryBatch, EntryBody, Hold, Mark};
use super::forwarded::SourceTable;
use super::held::{Content, Held, Summary};
use super::idempotency::{KeyTable, KeyVerdict, RememberedKey};
use super::late::LateTable;
use super::reply::{self, BatchOutcome, QueueReply};
use super::{Place, QueueBounds, QueueShared, SizeTable};

const CHECKPOINT_VERSION: u8 = 4;
/// So many batches are held between two checkpoints at most.
const HELD_PER_CHECKPOINT: u32 = 20_000;
/// Held batches are in a checkpoint where they are no more than this, so that the log may be purged
/// up to it.
const FEW_HELD_BYTES: u64 = 256 << 10;
/// Where they are more, they are in one for every so many times their bytes in the log.
const LOG_PER_HELD: u64 = 8;
/// About what one takes in a checkpoint.
const HELD_BYTES: u64 = 48;

/// Bounds of the tables. Apply decides by them, so they must be the same on every replica at every
/// time: the catalog records them when the cluster is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLimits {
    pub max_producers: u32,
    pub max_keys: u32,
    /// How long an idempotency key is remembered, in log time.
    pub key_window_ms: u64,
    /// Batches that are stored without being visible.
    pub max_held: u32,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            max_producers: 16 << 10,
            max_keys: 100_000,
            key_window_ms: 10 * 60_000,
            max_held: 2_000_000,
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub next_offset: u64,
    earliest_offset: u64,
    pub stamp_ms: u64,
    sizes: SizeTable,
    pub late: LateTable,
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
    sizes: SizeTable,
    producers: Vec<(i64, Producer)>,
    keys: Vec<RememberedKey>,
    sources: SourceTable,
    late: LateTable,
    held: Summary,
    /// The held batches themselves, if another replica can begin with this checkpoint.
    content: Option<Content>,
}

/// One replica's state of one queue.
#[derive(Debug)]
pub struct QueueMachine {
    pub(super) state: State,
    pub(super) held: Held,
    limits: QueueLimits,
    index: Arc<QueueIndex>,
    shared: Arc<QueueShared>,
    /// A trim was applied, and no checkpoint taken since.
    trimmed: bool,
    /// Batches held since a checkpoint was last wanted for them.
    held_since: u32,
    /// Whether the last checkpoint made has all that is held.
    has_content: bool,
    /// Bytes of entries applied since a checkpoint had all that is held.
    since_content: u64,
    /// What is held here was lost, so nothing more is applied: see [`QueueShared::soundness`].
    is_lost: bool,
}

impl QueueMachine {
    /// `held` is where batches are kept that are not visible yet.
    pub fn new(
        index: Arc<QueueIndex>,
        shared: Arc<QueueShared>,
        held: DerivedGroup,
        limits: QueueLimits,
    ) -> Self {
        Self {
            state: State::default(),
            held: Held::new(held),
            limits,
            index,
            shared,
            trimmed: false,
            held_since: 0,
            has_content: false,
            since_content: 0,
            is_lost: false,
        }
    }

    fn append(
        &mut self,
        log_id: LogId,
        batches: &[EntryBatch],
    ) -> Result<QueueReply, StorageError> {
        let each = batches.iter().enumerate();
        // `decode` bounds the count by MAX_BATCHES, which is below 2^16.
        let outcomes = each
            .map(|(ordinal, batch)| self.append_one(log_id, ordinal as u16, batch))
            .collect::<Result<_, _>>()?;
        self.held.commit(log_id, 0)?;
        Ok(QueueReply::Batches(outcomes))
    }

    fn append_one(
        &mut self,
        log_id: LogId,
        ordinal: u16,
        batch: &EntryBatch,
    ) -> Result<BatchOutcome, StorageError> {
        if let Some(refused) = self.refuse_mark(&batch.mark) {
            return Ok(refused);
        }
        if let Some(Hold::Transaction { id, part }) = &batch.hold {
            if self.held.settled(id, self.state.stamp_ms)?.is_some() {
                return Ok(BatchOutcome::TransactionEnded);
            }
            if let Some(place) = self.held.part(id, *part)? {
                return Ok(BatchOutcome::Duplicate(place));
            }
        }
        Ok(self.store(log_id, ordinal, batch))
    }

    /// What is known of a batch by its mark.
    fn refuse_mark(&self, mark: &Mark) -> Option<BatchOutcome> {
        match mark {
            Mark::None => None,
            Mark::Key { hash, fingerprint } => {
                let max_keys = self.limits.max_keys as usize;
                match self.state.keys.judge(hash, *fingerprint, max_keys) {
                    KeyVerdict::New => None,
                    KeyVerdict::Seen(place) => Some(BatchOutcome::Duplicate(place)),
                    KeyVerdict::Reused => Some(BatchOutcome::KeyReused),
                    KeyVerdict::Full => Some(BatchOutcome::KeysFull),
                }
            }
            Mark::Forwarded { source, sequence } => {
                let known = self.state.sources.has(source, *sequence)
                    && !mutation::on(Mutation::TakeForwardedAgain);
                known.then_some(BatchOutcome::AlreadyForwarded)
            }
        }
    }

    /// Takes a batch in, unless its producer's numbers forbid it.
    fn store(&mut self, log_id: LogId, ordinal: u16, batch: &EntryBatch) -> BatchOutcome {
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
        if batch.hold.is_some() && self.held.summary().count >= u64::from(self.limits.max_held) {
            return BatchOutcome::HeldFull;
        }
        let place = Place {
            base_offset: match batch.hold {
                None => self.state.next_offset,
                Some(_) => Place::UNSEEN,
            },
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
        // An entry's batches have lengths of 32 bits.
        let bytes = batch.batch.len() as u32;
        match &batch.hold {
            Some(hold) => {
                let due_ms = self.held.hold(place, bytes, hold, stamp_ms);
                self.held_since += 1;
                BatchOutcome::Held { place, due_ms }
            }
            None => {
                self.make_visible(place, bytes.into());
                BatchOutcome::Stored(place)
            }
        }
    }

    #[cfg(test)]
    pub(super) fn index(&self) -> &QueueIndex {
        &self.index
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &QueueShared {
        &self.shared
    }

    /// Adds a stored batch to the queue's end.
    pub(super) fn make_visible(&mut self, place: Place, bytes: u64) {
        self.extend_index(place);
        if self.state.sizes.add(place.base_offset, bytes) {
            self.shared.set_sizes(&self.state.sizes);
        }
        self.state.next_offset += u64::from(place.count);
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

    /// Lets go of the messages below `to`. The beginning never goes back, nor beyond the end.
    fn trim(&mut self, to: u64) {
        let to = match mutation::on(Mutation::TrimBeyondEnd) {
            false => to.min(self.state.next_offset),
            true => to,
        };
        if to <= self.state.earliest_offset {
            return;
        }
        self.state.earliest_offset = to;
        self.state.sizes.trim(to);
        self.state.late.trim(to);
        self.shared.set_sizes(&self.state.sizes);
        self.trimmed = true;
        // Readers first: one who finds the index trimmed must find out why.
        self.publish();
        if let Err(error) = self.index.trim_front(to) {
            tracing::error!(path = %self.index.path().display(), %error, "queue index failed");
            self.shared.soundness().set_broken(error);
        }
    }

    fn publish(&self) {
        let bounds = QueueBounds {
            earliest: self.state.earliest_offset.max(self.index.first_offset()),
            end: self.state.next_offset,
        };
        let held = self.held.size();
        self.shared.publish(bounds, held, self.state.stamp_ms);
        self.shared.publish_due(self.held.next_due_ms());
    }

    /// What is held, if this checkpoint should be one that a replica without any can begin with.
    fn content(&self) -> Result<Option<Content>, StorageError> {
        let bytes = self.held.records().saturating_mul(HELD_BYTES);
        if bytes > FEW_HELD_BYTES && self.since_content < bytes.saturating_mul(LOG_PER_HELD) {
            return Ok(None);
        }
        if mutation::on(Mutation::SkipHeldInSnapshots) {
            return Ok(Some(Content::default()));
        }
        self.held.content().map(Some)
    }

    fn encode(&self, content: Option<Content>) -> Vec<u8> {
        let checkpoint = Checkpoint {
            version: CHECKPOINT_VERSION,
            next_offset: self.state.next_offset,
            earliest_offset: self.state.earliest_offset,
            stamp_ms: self.state.stamp_ms,
            sizes: self.state.sizes.clone(),
            producers: match mutation::on(Mutation::SkipDedupeInSnapshots) {
                false => self.state.producers.content(),
                true => Vec::new(),
            },
            keys: self.state.keys.content(),
            sources: match mutation::on(Mutation::SkipDedupeInSnapshots) {
                false => self.state.sources.clone(),
                true => SourceTable::default(),
            },
            late: self.state.late.clone(),
            held: self.held.summary().clone(),
            content,
        };
        // Numbers and lists of known length into memory: there is no way to fail.
        postcard::to_stdvec(&checkpoint).unwrap_or_default()
    }

    fn decode(&self, state: &[u8]) -> Result<(State, Summary, Option<Content>), StorageError> {
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
        let state = State {
            next_offset: found.next_offset,
            earliest_offset: found.earliest_offset,
            stamp_ms: found.stamp_ms,
            sizes: found.sizes,
            late: found.late,
            producers: ProducerTable::from_content(found.producers),
            keys: KeyTable::from_content(found.keys),
            sources: found.sources,
        };
        Ok((state, found.held, found.content))
    }

    /// Shows what was restored or installed.
    fn begin(&mut self) {
        self.since_content = 0;
        self.is_lost = false;
        self.shared.set_sizes(&self.state.sizes);
        self.publish();
        self.shared.wake();
    }

    fn execute(&mut self, log_id: LogId, body: &Bytes) -> Result<QueueReply, StorageError> {
        let entry = match entry::decode(body) {
            Ok(entry) => entry,
            Err(error) => {
                tracing::error!(%log_id, %error, "an entry that no version of this program wrote");
                return Ok(QueueReply::Batches(vec![BatchOutcome::Malformed]));
            }
        };
        self.state.stamp_ms = self.state.stamp_ms.max(entry.stamp_ms);
        if mutation::on(Mutation::ApplyWithNodeClock) {
            self.state.stamp_ms = crate::broker::batcher::now_ms();
        }
        let stamp_ms = self.state.stamp_ms;
        self.state.producers.expire(stamp_ms);
        let forget_before = stamp_ms.saturating_sub(self.limits.key_window_ms);
        self.state.keys.expire(forget_before);
        match entry.body {
            EntryBody::Append(batches) => self.append(log_id, &batches),
            EntryBody::Fence { producer, epoch } => {
                self.state.producers.fence(producer, epoch, stamp_ms);
                Ok(QueueReply::Done)
            }
            EntryBody::Deliver { max_batches } => self.deliver(log_id, entry.stamp_ms, max_batches),
            EntryBody::Settle {
                id,
                commit,
                given_up,
            } => self.settle(log_id, &id, commit, &given_up),
            EntryBody::Cancel { term, index, batch } => {
                self.cancel(log_id, LogId::new(term, index), batch)
            }
            EntryBody::Trim { earliest_offset } => {
                self.trim(earliest_offset);
                Ok(QueueReply::Done)
            }
        }
    }
}

impl StateMachine for QueueMachine {
    /// An empty reply: the entry could not be applied here.
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes {
        if self.is_lost {
            return Bytes::new();
        }
        self.since_content += body.len() as u64;
        match self.execute(log_id, body) {
            Ok(reply) => {
                self.publish();
                reply::encode(&reply).into()
            }
            Err(error) => {
                // Offsets depend on what is held, so none is given any more.
                tracing::error!(%log_id, %error, "held batches cannot be used");
                self.is_lost = true;
                self.shared.soundness().set_broken(error);
                Bytes::new()
            }
        }
    }

    fn must_be_synced(&self) -> fn(&Bytes) -> bool {
        entry::is_remembered_elsewhere
    }

    fn applied_batch(&mut self, _applied: LogId) {
        self.shared.wake();
    }

    /// What a trim lets go of can be purged up to a checkpoint, and a quiet queue may never come to
    /// the next regular one. A few entries can hold many batches, each of which takes its time to
    /// apply again after a restart.
    fn wants_checkpoint(&mut self) -> bool {
        let held_much = self.held_since >= HELD_PER_CHECKPOINT;
        if held_much {
            self.held_since = 0;
        }
        std::mem::take(&mut self.trimmed) || held_much
    }

    fn oldest_needed(&mut self) -> Result<u64, StorageError> {
        let held = self.held.oldest_index()?;
        // Chunks of late ones may reach beyond the end: of an empty queue nothing visible counts.
        let (mut visible, mut late) = (None, None);
        if self.state.earliest_offset < self.state.next_offset {
            let first = self.index.find_from(self.state.earliest_offset, 1)?;
            // An index that was begun anew at a later offset still lacks what is to be applied again.
            visible = Some(first.first().map_or(0, |record| record.log_index));
            late = match mutation::on(Mutation::PurgeUnderLate) {
                false => self.state.late.oldest(),
                true => None,
            };
        }
        let all = [visible, late, held];
        Ok(all.into_iter().flatten().min().unwrap_or(u64::MAX))
    }

    fn is_whole(&self, state: &[u8]) -> bool {
        let decoded = self.decode(state);
        decoded.is_ok_and(|(_, held, content)| content.is_some() || held.is_untouched())
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        if let Some(error) = self.shared.soundness().broken() {
            return Err(error);
        }
        // A failed fsync may have lost records: only a new index can be trusted again.
        let synced = self.index.sync().and_then(|()| self.held.sync());
        synced.inspect_err(|error| self.shared.soundness().set_broken(error.clone()))?;
        // Without its records it would fail every checkpoint from now on.
        let content = self.content();
        let content =
            content.inspect_err(|error| self.shared.soundness().set_broken(error.clone()))?;
        self.has_content = content.is_some();
        Ok(self.encode(content))
    }

    fn checkpoint_written(&mut self, last: LogId) {
        self.held.note_checkpoint(last.index, self.state.stamp_ms);
        if self.has_content {
            self.since_content = 0;
        }
    }

    fn restore(&mut self, last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        match (last, state) {
            (Some(last), Some(state)) => {
                let (state, held, _) = self.decode(state)?;
                self.held.restore(last, state.stamp_ms, held)?;
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
            _ => {
                self.held.reset()?;
                self.index.reset_to(0)?;
                self.state = State::default();
            }
        }
        self.begin();
        Ok(())
    }

    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError> {
        let (state, held, content) = self.decode(state)?;
        self.held.install(last, state.stamp_ms, held, content)?;
        self.index.reset_to(state.next_offset)?;
        self.state = state;
        self.begin();
        Ok(())
    }

    fn state_hash(&self) -> u64 {
        xxh3_64(&self.encode(None))
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;
