//! What the queue has stored and does not show yet: delayed batches, and parts of transactions.
//!
//! There may be millions of them, so they are records in the node's derived store, and not in
//! memory; the queue's checkpoints only say how many there are and what they sum up to
//! ([`Summary`]). The records are what apply made of the log, and kept in a way that lets a restart
//! bring them back to any of the last checkpoints: what was taken out leaves a trace until no
//! checkpoint can need it ([`garbage`]), and `restore` takes back all that is younger than the
//! checkpoint, then compares with its sum.
//!
//! Delayed batches are delivered in the order (due time, index, batch). What is stored later is never
//! due before what was delivered, since a due time is not below the stamp of its entry; so what was
//! delivered is a prefix of that order, and one key tells it.
//!
//! How many messages and bytes are pending is no part of the summary: it follows from the records,
//! which the sum in the summary vouches for. So it is the same on every replica.

mod garbage;
mod records;
mod restore;

use std::collections::BTreeMap;

use quorate_storage::derived::DerivedGroup;
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::{LogId, StorageError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::entry::{Hold, TransactionId};
use super::reply::{CancelVerdict, Settled};
use super::{HeldSize, Place};
use garbage::Garbage;
use records::{Cancelled, SettledRecord, Until, keys};
pub(super) use records::{DueKey, HeldBatch, PartSpot};
pub(super) use restore::Content;

/// How long a cancelled batch is remembered, in log time.
pub(super) const REMEMBER_MS: u64 = 25 * 3_600_000;
/// How long a settled transaction is. Its prepares take seconds, and the coordinator tells its end
/// again seconds after the last time; clocks may differ by minutes.
pub(super) const END_KEPT_MS: u64 = 3_600_000;

/// What a checkpoint says of the held batches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    /// Batches that are pending.
    pub count: u64,
    /// Of their hashes, wrapping, in no order.
    sum: u64,
    /// The last delayed batch that was delivered.
    delivered: Option<DueKey>,
    /// Index of the last entry that made or changed a record; 0 if none ever did.
    changed_at: u64,
}

impl Summary {
    /// Nothing was ever held.
    pub(super) fn is_untouched(&self) -> bool {
        self.changed_at == 0
    }
}

/// The held batches of one replica of a queue.
#[derive(Debug)]
pub(super) struct Held {
    stored: DerivedGroup,
    /// What the entry being applied changes. None: removed.
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    summary: Summary,
    /// In the batches that are pending.
    messages: u64,
    bytes: u64,
    /// When the next delayed batch is due.
    next_due_ms: Option<u64>,
    /// Settled transactions that are still remembered, on this replica.
    remembered: u64,
    /// Cancelled batches that are still remembered, on this replica.
    cancelled: u64,
    /// No entry before this one has a pending batch: what is delivered long before it is collected
    /// must not be looked at again and again.
    oldest: u64,
    /// Whether something was written since the last flush.
    dirty: bool,
    garbage: Garbage,
}

impl Held {
    pub(super) fn new(stored: DerivedGroup) -> Self {
        Self {
            stored,
            changes: BTreeMap::new(),
            summary: Summary::default(),
            messages: 0,
            bytes: 0,
            next_due_ms: None,
            remembered: 0,
            cancelled: 0,
            oldest: 0,
            dirty: false,
            garbage: Garbage::default(),
        }
    }

    pub(super) fn summary(&self) -> &Summary {
        &self.summary
    }

    /// What is pending.
    pub(super) fn size(&self) -> HeldSize {
        HeldSize {
            batches: self.summary.count,
            messages: self.messages,
            bytes: self.bytes,
        }
    }

    pub(super) fn next_due_ms(&self) -> Option<u64> {
        self.next_due_ms
    }

    /// How the transaction ended here, if that is remembered at `now_ms`.
    pub(super) fn settled(
        &self,
        id: &TransactionId,
        now_ms: u64,
    ) -> Result<Option<Settled>, StorageError> {
        let last = self.last_settled(id)?;
        let remembered = last.filter(|s| s.stamp_ms.saturating_add(END_KEPT_MS) >= now_ms);
        Ok(remembered.map(|record| record.settled))
    }

    fn last_settled(&self, id: &TransactionId) -> Result<Option<SettledRecord>, StorageError> {
        let found = self.stored.scan(&keys::settlements(id))?;
        let last = found.last();
        last.map(|(key, value)| self.decode(key, value)).transpose()
    }

    /// Where a part of a transaction is held.
    pub(super) fn part(
        &self,
        id: &TransactionId,
        part: u32,
    ) -> Result<Option<Place>, StorageError> {
        let prefix = keys::part(id, part);
        let stored = self.stored.scan(&prefix)?;
        let mut last = match stored.last() {
            Some((key, value)) => Some(self.decode::<PartSpot>(key, value)?),
            None => None,
        };
        // The entry being applied may have brought it just now.
        let changed = self.changes.range(prefix.clone()..);
        let changed = changed.take_while(|(key, _)| key.starts_with(&prefix));
        for (key, value) in changed {
            if let Some(value) = value {
                last = Some(self.decode(key, value)?);
            }
        }
        let Some(spot) = last else {
            return Ok(None);
        };
        let ended = self.last_settled(id)?.is_some_and(|s| spot.index < s.at);
        Ok((!ended).then(|| spot.place(Place::UNSEEN)))
    }

    /// Adds a batch. One that is to be delivered before the log's time is due at once. Gives when a
    /// delayed one is due.
    pub(super) fn hold(
        &mut self,
        place: Place,
        bytes: u32,
        hold: &Hold,
        now_ms: u64,
    ) -> Option<u64> {
        let until = match *hold {
            Hold::Until { deliver_at_ms } => Until::Due {
                due_ms: deliver_at_ms.max(now_ms),
                cancelled: None,
            },
            Hold::Transaction { id, part } => Until::End { id, part },
        };
        let batch = HeldBatch {
            term: place.term,
            count: place.count,
            bytes,
            until,
        };
        self.put(place.index, place.batch, &batch);
        self.count_in(place.index, place.batch, &batch);
        self.summary.changed_at = place.index;
        match batch.until {
            Until::Due { due_ms, .. } => Some(due_ms),
            Until::End { .. } => None,
        }
    }

    /// The record of a batch, and what it is found by when it becomes visible.
    fn put(&mut self, index: u64, ordinal: u16, batch: &HeldBatch) {
        self.store(keys::batch(index, ordinal), batch);
        match &batch.until {
            Until::Due {
                cancelled: Some(cancelled),
                ..
            } => self.store(keys::cancelled(cancelled.at), &(index, ordinal)),
            Until::Due { due_ms, .. } => {
                let key = DueKey {
                    due_ms: *due_ms,
                    index,
                    batch: ordinal,
                };
                self.store(key.encode(), &(batch.term, batch.count, batch.bytes));
                let next = self.next_due_ms.map_or(*due_ms, |next| next.min(*due_ms));
                self.next_due_ms = Some(next);
            }
            Until::End { id, part } => {
                let spot = PartSpot {
                    index,
                    batch: ordinal,
                    term: batch.term,
                    count: batch.count,
                    bytes: batch.bytes,
                };
                self.store(keys::part_at(id, *part, index), &spot);
            }
        }
    }

    /// Takes out what is due at `by_ms`, the first `limit` at most, in order.
    pub(super) fn take_due(
        &mut self,
        by_ms: u64,
        limit: usize,
    ) -> Result<Vec<(DueKey, HeldBatch)>, StorageError> {
        let mut due = self.due_page(limit.saturating_add(1))?;
        let ready = due.iter().take(limit);
        let ready = ready.take_while(|(key, _)| key.due_ms <= by_ms).count();
        self.next_due_ms = due.get(ready).map(|(key, _)| key.due_ms);
        due.truncate(ready);
        for (key, batch) in &due {
            self.count_out(key.index, key.batch, batch);
            self.summary.delivered = Some(*key);
        }
        Ok(due)
    }

    /// The first delayed batches that are pending.
    fn due_page(&self, limit: usize) -> Result<Vec<(DueKey, HeldBatch)>, StorageError> {
        let after = self.summary.delivered.map(|key| key.encode());
        let stored = self
            .stored
            .scan_page(&[keys::DUE], after.as_deref(), limit)?;
        let each = stored.iter().map(|(key, value)| {
            let key = DueKey::decode(key).ok_or_else(|| self.unreadable(key))?;
            let (term, count, bytes) = self.decode(&key.encode(), value)?;
            let until = Until::Due {
                due_ms: key.due_ms,
                cancelled: None,
            };
            let batch = HeldBatch {
                term,
                count,
                bytes,
                until,
            };
            Ok((key, batch))
        });
        each.collect()
    }

    /// Takes a delayed batch back, if it is pending.
    pub(super) fn cancel(
        &mut self,
        log_id: LogId,
        stored: LogId,
        ordinal: u16,
        now_ms: u64,
    ) -> Result<CancelVerdict, StorageError> {
        let found: Option<HeldBatch> = self.read(&keys::batch(stored.index, ordinal))?;
        let Some(mut batch) = found.filter(|batch| batch.term == stored.term) else {
            return Ok(CancelVerdict::NotHeld);
        };
        let Until::Due { due_ms, cancelled } = batch.until else {
            return Ok(CancelVerdict::NotHeld);
        };
        if let Some(earlier) = cancelled {
            let remembered = earlier.stamp_ms.saturating_add(REMEMBER_MS) >= now_ms;
            return Ok(match remembered {
                true => CancelVerdict::Cancelled,
                false => CancelVerdict::NotHeld,
            });
        }
        let due = DueKey {
            due_ms,
            index: stored.index,
            batch: ordinal,
        };
        let is_delivered = self.summary.delivered.is_some_and(|last| due <= last);
        if is_delivered && !mutation::on(Mutation::CancelDelivered) {
            return Ok(CancelVerdict::NotHeld);
        }
        self.count_out(stored.index, ordinal, &batch);
        batch.until = Until::Due {
            due_ms,
            cancelled: Some(Cancelled {
                at: log_id.index,
                stamp_ms: now_ms,
            }),
        };
        self.put(stored.index, ordinal, &batch);
        if !mutation::on(Mutation::DeliverCancelled) {
            self.remove(due.encode());
        }
        self.cancelled += 1;
        self.summary.changed_at = log_id.index;
        Ok(CancelVerdict::Cancelled)
    }

    /// Takes out what is held for a transaction, in the order of its parts.
    pub(super) fn take_parts(
        &mut self,
        id: &TransactionId,
    ) -> Result<Vec<(u32, PartSpot)>, StorageError> {
        let mut parts = self.parts(id)?;
        // Of an end that is forgotten here there may still be something left.
        if let Some(last) = self.last_settled(id)? {
            parts.retain(|(_, spot)| spot.index > last.at);
        }
        for (part, spot) in &parts {
            let batch = spot.held(*id, *part);
            self.count_out(spot.index, spot.batch, &batch);
        }
        Ok(parts)
    }

    fn parts(&self, id: &TransactionId) -> Result<Vec<(u32, PartSpot)>, StorageError> {
        let prefix = keys::parts(id);
        let stored = self.stored.scan(&prefix)?;
        let each = stored.iter().map(|(key, value)| {
            let part = key[prefix.len()..].first_chunk();
            let part = part.ok_or_else(|| self.unreadable(key))?;
            Ok((u32::from_be_bytes(*part), self.decode(key, value)?))
        });
        each.collect()
    }

    /// Remembers how a transaction ended.
    pub(super) fn settle(
        &mut self,
        log_id: LogId,
        id: &TransactionId,
        settled: Settled,
        now_ms: u64,
    ) {
        let record = SettledRecord {
            at: log_id.index,
            stamp_ms: now_ms,
            settled,
        };
        self.store(keys::settled(id, log_id.index), &record);
        self.store(keys::settled_at(log_id.index), id);
        self.store(keys::ended_at(log_id.index), id);
        self.remembered += 1;
        self.summary.changed_at = log_id.index;
    }

    /// Stores what the entry of `log_id` changed, after it took `taken` batches out. To be called at
    /// the end of each that may have done something here, and of appends whatever they did: where
    /// nothing is held any more, they are what removes the traces.
    pub(super) fn commit(&mut self, log_id: LogId, taken: usize) -> Result<(), StorageError> {
        if !self.summary.is_untouched() {
            self.collect_garbage(taken)?;
        }
        if self.changes.is_empty() {
            return Ok(());
        }
        self.dirty = true;
        let changes = std::mem::take(&mut self.changes);
        self.stored.write(changes.into_iter().collect(), log_id)
    }

    /// How many records there are to carry to another replica, about.
    pub(super) fn records(&self) -> u64 {
        self.summary.count + self.remembered + self.cancelled
    }

    /// Looks up when the next delayed batch is due.
    pub(super) fn find_next_due(&mut self) -> Result<(), StorageError> {
        let next = self.due_page(1)?;
        self.next_due_ms = next.first().map(|(key, _)| key.due_ms);
        Ok(())
    }

    fn count_in(&mut self, index: u64, ordinal: u16, batch: &HeldBatch) {
        self.summary.count += 1;
        self.messages += u64::from(batch.count);
        self.bytes += u64::from(batch.bytes);
        self.summary.sum = self.summary.sum.wrapping_add(hash(index, ordinal, batch));
    }

    fn count_out(&mut self, index: u64, ordinal: u16, batch: &HeldBatch) {
        self.summary.count = self.summary.count.saturating_sub(1);
        self.messages = self.messages.saturating_sub(batch.count.into());
        self.bytes = self.bytes.saturating_sub(batch.bytes.into());
        self.summary.sum = self.summary.sum.wrapping_sub(hash(index, ordinal, batch));
    }

    fn read<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StorageError> {
        let value = match self.changes.get(key) {
            Some(changed) => changed.clone(),
            None => self.stored.get(key)?.map(|value| value.to_vec()),
        };
        value.map(|value| self.decode(key, &value)).transpose()
    }

    fn store<T: Serialize>(&mut self, key: Vec<u8>, value: &T) {
        // Plain data into memory: there is no way to fail.
        let value = postcard::to_stdvec(value).unwrap_or_default();
        self.changes.insert(key, Some(value));
    }

    fn remove(&mut self, key: Vec<u8>) {
        self.changes.insert(key, None);
    }

    fn decode<T: DeserializeOwned>(&self, key: &[u8], value: &[u8]) -> Result<T, StorageError> {
        postcard::from_bytes(value).map_err(|_| self.unreadable(key))
    }

    fn unreadable(&self, key: &[u8]) -> StorageError {
        self.damaged(format!("a record cannot be read: key {key:02x?}"))
    }

    fn damaged(&self, reason: String) -> StorageError {
        StorageError::Damaged {
            path: format!("held batches of {}", self.stored.id()).into(),
            position: 0,
            reason,
        }
    }
}

/// What one pending batch adds to [`Summary::sum`].
fn hash(index: u64, ordinal: u16, batch: &HeldBatch) -> u64 {
    xxh3_64(&postcard::to_stdvec(&(index, ordinal, batch)).unwrap_or_default())
}
