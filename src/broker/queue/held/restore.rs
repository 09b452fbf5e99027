//! Bringing the records back to a checkpoint, and carrying them to a replica that has none.

use quorate_storage::{LogId, StorageError};
use serde::{Deserialize, Serialize};

use super::garbage::Floor;
use super::records::{HeldBatch, SettledRecord, Until, keys};
use super::{DueKey, Held, HeldSize, Summary, TransactionId, hash};

/// Records read or written at a time.
const PAGE: usize = 1000;
/// Where the store is while a snapshot is being installed: no checkpoint was ever taken there.
const UNFINISHED: LogId = LogId { term: 0, index: 0 };

/// All that a boundary snapshot has of the held batches: those that are pending there, and what is
/// remembered of cancelled ones and of transactions that ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::broker::queue) struct Content {
    batches: Vec<(u64, u16, HeldBatch)>,
    settled: Vec<(TransactionId, SettledRecord)>,
}

impl Content {
    /// The same in parts that are not large.
    pub(in crate::broker::queue) fn pages(&self) -> impl Iterator<Item = Self> {
        let batches = self.batches.chunks(PAGE).map(|chunk| Self {
            batches: chunk.to_vec(),
            settled: Vec::new(),
        });
        let settled = self.settled.chunks(PAGE).map(|chunk| Self {
            batches: Vec::new(),
            settled: chunk.to_vec(),
        });
        batches.chain(settled)
    }
}

impl Held {
    /// Back to nothing.
    pub(in crate::broker::queue) fn reset(&mut self) -> Result<(), StorageError> {
        self.changes.clear();
        // A clearing costs writes, and most queues never hold anything.
        if self.stored.applied()?.is_some() {
            self.stored.clear()?;
        }
        self.begin_empty(Summary::default());
        self.forget_checkpoints(0, 0);
        Ok(())
    }

    fn begin_empty(&mut self, summary: Summary) {
        self.summary = summary;
        (self.messages, self.bytes) = (0, 0);
        self.next_due_ms = None;
        self.remembered = 0;
        self.cancelled = 0;
        self.oldest = 0;
    }

    /// Back to a checkpoint at `last`, when the log's time was `stamp_ms`.
    ///
    /// # Errors
    /// [`StorageError::Damaged`] when the records are older than the checkpoint, when something it
    /// needs was removed, and when they are not what it says.
    pub(in crate::broker::queue) fn restore(
        &mut self,
        last: LogId,
        stamp_ms: u64,
        summary: Summary,
    ) -> Result<(), StorageError> {
        self.changes.clear();
        let applied = self.stored.applied()?;
        if applied == Some(UNFINISHED) {
            return Err(self.damaged("they were not all installed".to_owned()));
        }
        let have = applied.map_or(0, |id| id.index);
        if have < summary.changed_at {
            let wanted = summary.changed_at;
            return Err(self.damaged(format!("they end at {have}, the checkpoint at {wanted}")));
        }
        if let Some(floor) = self.read::<Floor>(keys::FLOOR)?
            && floor.index > last.index
        {
            let floor = floor.index;
            return Err(self.damaged(format!("{last} needs what was removed at {floor}")));
        }
        if let Some(applied) = applied
            && applied.index > last.index
        {
            self.undo(last, applied)?;
        }
        if summary.changed_at == 0 {
            // Nothing was ever held: there is nothing to look at.
            self.begin_empty(summary);
            self.forget_checkpoints(last.index, stamp_ms);
            return Ok(());
        }
        self.resume(last, stamp_ms, summary)
    }

    /// Takes back what entries after `last` did.
    fn undo(&mut self, last: LogId, applied: LogId) -> Result<(), StorageError> {
        while self.undo_settled(last.index)? {
            self.write_page(applied)?;
        }
        while self.undo_cancelled(last.index)? {
            self.write_page(applied)?;
        }
        while self.undo_held(last.index)? {
            self.write_page(applied)?;
        }
        self.stored.rewind(Vec::new(), last)
    }

    fn write_page(&mut self, applied: LogId) -> Result<(), StorageError> {
        let changes = std::mem::take(&mut self.changes);
        self.stored.rewind(changes.into_iter().collect(), applied)
    }

    /// Whether there was anything to undo.
    fn undo_settled(&mut self, last: u64) -> Result<bool, StorageError> {
        let after = keys::up_to(keys::SETTLED_AT, last);
        let page = self
            .stored
            .scan_page(&[keys::SETTLED_AT], Some(&after), PAGE)?;
        for (key, value) in &page {
            let at = keys::at(key).ok_or_else(|| self.unreadable(key))?;
            let id = self.decode(key, value)?;
            self.remove(keys::settled(&id, at));
            self.remove(keys::ended_at(at));
            self.remove(key.to_vec());
        }
        Ok(!page.is_empty())
    }

    fn undo_cancelled(&mut self, last: u64) -> Result<bool, StorageError> {
        let after = keys::up_to(keys::CANCELLED, last);
        let page = self
            .stored
            .scan_page(&[keys::CANCELLED], Some(&after), PAGE)?;
        for (key, value) in &page {
            let (index, ordinal) = self.decode(key, value)?;
            self.remove(key.to_vec());
            let found: Option<HeldBatch> = self.read(&keys::batch(index, ordinal))?;
            let mut batch = found.ok_or_else(|| self.unreadable(key))?;
            if let Until::Due { cancelled, .. } = &mut batch.until {
                *cancelled = None;
            }
            self.put(index, ordinal, &batch);
        }
        Ok(!page.is_empty())
    }

    fn undo_held(&mut self, last: u64) -> Result<bool, StorageError> {
        let after = keys::up_to(keys::BATCH, last);
        let page = self.stored.scan_page(&[keys::BATCH], Some(&after), PAGE)?;
        for (key, value) in &page {
            let (index, ordinal) = keys::spot(key).ok_or_else(|| self.unreadable(key))?;
            let batch: HeldBatch = self.decode(key, value)?;
            match batch.until {
                Until::Due { due_ms, .. } => self.remove(
                    DueKey {
                        due_ms,
                        index,
                        batch: ordinal,
                    }
                    .encode(),
                ),
                Until::End { id, part } => self.remove(keys::part_at(&id, part, index)),
            }
            self.remove(key.to_vec());
        }
        Ok(!page.is_empty())
    }

    /// Whether the records are what the summary says. Gives what is pending, and how many of them
    /// are cancelled.
    fn compare(&self) -> Result<(HeldSize, u64), StorageError> {
        let (mut pending, mut sum, mut cancelled) = (HeldSize::default(), 0u64, 0);
        self.visit(0, |index, ordinal, batch| {
            cancelled += u64::from(batch.cancelled().is_some());
            if self.is_pending(index, ordinal, batch)? {
                pending.batches += 1;
                pending.messages += u64::from(batch.count);
                pending.bytes += u64::from(batch.bytes);
                sum = sum.wrapping_add(hash(index, ordinal, batch));
            }
            Ok(true)
        })?;
        if (pending.batches, sum) != (self.summary.count, self.summary.sum) {
            let (found, wanted) = (pending.batches, self.summary.count);
            let reason = format!("{found} batches are pending, not the {wanted} of the checkpoint");
            return Err(self.damaged(reason));
        }
        Ok((pending, cancelled))
    }

    /// Shows every batch of the entries after `after` in the order of the log, until `visit` has
    /// enough.
    fn visit(
        &self,
        after: u64,
        mut visit: impl FnMut(u64, u16, &HeldBatch) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        let mut after = Some(keys::up_to(keys::BATCH, after));
        loop {
            let page = self
                .stored
                .scan_page(&[keys::BATCH], after.as_deref(), PAGE)?;
            for (key, value) in &page {
                let (index, ordinal) = keys::spot(key).ok_or_else(|| self.unreadable(key))?;
                if !visit(index, ordinal, &self.decode(key, value)?)? {
                    return Ok(());
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after = Some(last.to_vec()),
                _ => return Ok(()),
            }
        }
    }

    fn is_pending(
        &self,
        index: u64,
        ordinal: u16,
        batch: &HeldBatch,
    ) -> Result<bool, StorageError> {
        Ok(match &batch.until {
            Until::Due {
                cancelled: Some(_), ..
            } => false,
            Until::Due { due_ms, .. } => {
                let key = DueKey {
                    due_ms: *due_ms,
                    index,
                    batch: ordinal,
                };
                self.summary.delivered.is_none_or(|last| key > last)
            }
            Until::End { id, .. } => self.last_settled(id)?.is_none_or(|s| index > s.at),
        })
    }

    /// The smallest index of an entry with a pending batch.
    pub(in crate::broker::queue) fn oldest_index(&mut self) -> Result<Option<u64>, StorageError> {
        let mut oldest = None;
        if self.summary.count > 0 {
            self.visit(self.oldest.saturating_sub(1), |index, ordinal, batch| {
                let pending = self.is_pending(index, ordinal, batch)?;
                oldest = pending.then_some(index);
                Ok(!pending)
            })?;
        }
        // What is no longer pending never is again, and what is stored later comes behind.
        self.oldest = oldest.unwrap_or(self.oldest);
        Ok(oldest)
    }

    /// What another replica needs to go on from here. All of it is in memory then, some 60 bytes a
    /// record.
    pub(in crate::broker::queue) fn content(&self) -> Result<Content, StorageError> {
        let mut content = Content::default();
        self.visit(0, |index, ordinal, batch| {
            if batch.cancelled().is_some() || self.is_pending(index, ordinal, batch)? {
                content.batches.push((index, ordinal, batch.clone()));
            }
            Ok(true)
        })?;
        self.visit_settled(|id, at| {
            let record = self.read(&keys::settled(&id, at))?;
            let record = record.ok_or_else(|| self.unreadable(&keys::settled(&id, at)))?;
            content.settled.push((id, record));
            Ok(())
        })?;
        Ok(content)
    }

    fn visit_settled(
        &self,
        mut visit: impl FnMut(TransactionId, u64) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self
                .stored
                .scan_page(&[keys::SETTLED_AT], after.as_deref(), PAGE)?;
            for (key, value) in &page {
                let at = keys::at(key).ok_or_else(|| self.unreadable(key))?;
                visit(self.decode(key, value)?, at)?;
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after = Some(last.to_vec()),
                _ => return Ok(()),
            }
        }
    }

    /// Takes up at `last`, where the log's time was `stamp_ms`, with records that are in place.
    fn resume(&mut self, last: LogId, stamp_ms: u64, summary: Summary) -> Result<(), StorageError> {
        self.summary = summary;
        let (pending, cancelled) = self.compare()?;
        (self.messages, self.bytes) = (pending.messages, pending.bytes);
        self.cancelled = cancelled;
        self.oldest = 0;
        let mut remembered = 0;
        self.visit_settled(|_, _| {
            remembered += 1;
            Ok(())
        })?;
        self.remembered = remembered;
        self.dirty = true;
        self.forget_checkpoints(last.index, stamp_ms);
        self.find_next_due()
    }

    /// Becomes what another replica's records were at `last`.
    pub(in crate::broker::queue) fn install(
        &mut self,
        last: LogId,
        stamp_ms: u64,
        summary: Summary,
        content: Option<Content>,
    ) -> Result<(), StorageError> {
        self.reset()?;
        let Some(content) = content else {
            return match summary.changed_at {
                0 => Ok(()),
                _ => Err(self.damaged("the snapshot says nothing of them".to_owned())),
            };
        };
        for page in content.pages() {
            self.install_page(page)?;
        }
        // The state before this index is nowhere.
        self.store(keys::FLOOR.to_vec(), &Floor { index: last.index });
        self.write_page(last)?;
        self.resume(last, stamp_ms, summary)
    }

    /// Brings a part of what is to be installed, which counts for nothing before all of it is here.
    pub(in crate::broker::queue) fn install_page(
        &mut self,
        page: Content,
    ) -> Result<(), StorageError> {
        for (index, ordinal, batch) in &page.batches {
            self.put(*index, *ordinal, batch);
        }
        for (id, record) in &page.settled {
            self.store(keys::settled(id, record.at), record);
            self.store(keys::settled_at(record.at), id);
        }
        self.write_page(UNFINISHED)
    }

    /// Makes what is stored survive a killed process, as a checkpoint wants it.
    pub(in crate::broker::queue) fn sync(&mut self) -> Result<(), StorageError> {
        if std::mem::take(&mut self.dirty) {
            self.stored.flush()?;
        }
        Ok(())
    }
}
