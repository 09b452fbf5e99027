//! Removing records that no restart can need.
//!
//! A restart begins with the newest checkpoint, or with the one before it. So what was taken out at or
//! before the older of them may go. How far that went is written beside the removals ([`Floor`]): a
//! still older checkpoint can't be restored from these records, and `restore` says so.
//!
//! This is no part of the replicated state: replicas may remove at different times.

use quorate_storage::StorageError;
use serde::{Deserialize, Serialize};

use super::records::{DueKey, SettledRecord, keys};
use super::{END_KEPT_MS, Held, HeldBatch, REMEMBER_MS};

/// Removals that ride on an entry, beside as many as it makes or takes out itself.
const PER_CHANGE: usize = 64;

/// What a checkpoint could still need.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    index: u64,
    stamp_ms: u64,
    delivered: Option<DueKey>,
}

#[derive(Debug, Default)]
pub(super) struct Garbage {
    newest: Option<Kept>,
    older: Option<Kept>,
    /// Whether the last look found all there was.
    clean: bool,
}

/// No checkpoint below this index can be restored.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Floor {
    pub index: u64,
}

impl Held {
    /// A checkpoint is being written at `index`.
    pub(in crate::broker::queue) fn note_checkpoint(&mut self, index: u64, stamp_ms: u64) {
        let kept = Kept {
            index,
            stamp_ms,
            delivered: self.summary.delivered,
        };
        if self.garbage.newest.is_some_and(|last| last.index == index) {
            return;
        }
        self.garbage.older = self.garbage.newest.replace(kept);
        self.garbage.clean = false;
    }

    /// A checkpoint was restored: the one before it may be needed too, and is not known.
    pub(super) fn forget_checkpoints(&mut self, index: u64, stamp_ms: u64) {
        self.garbage = Garbage::default();
        self.note_checkpoint(index, stamp_ms);
    }

    /// Adds removals to the changes of the entry being applied.
    pub(super) fn collect_garbage(&mut self, taken: usize) -> Result<(), StorageError> {
        let Some(kept) = self.garbage.older.filter(|_| !self.garbage.clean) else {
            return Ok(());
        };
        let limit = PER_CHANGE + self.changes.len() + taken;
        let delivered = self.drop_delivered(&kept, limit)?;
        let cancelled = self.drop_cancelled(&kept, limit)?;
        let ended = self.drop_parts(&kept, limit)?;
        let settled = self.drop_settled(&kept, limit)?;
        let dropped = [delivered, cancelled, ended, settled];
        self.garbage.clean = dropped.iter().all(|dropped| *dropped < limit);
        if dropped.iter().any(|dropped| *dropped > 0) {
            let floor = Floor { index: kept.index };
            self.store(keys::FLOOR.to_vec(), &floor);
        }
        Ok(())
    }

    fn drop_delivered(&mut self, kept: &Kept, limit: usize) -> Result<usize, StorageError> {
        let Some(last) = kept.delivered else {
            return Ok(0);
        };
        let mut dropped = 0;
        for (key, _) in self.stored.scan_page(&[keys::DUE], None, limit)? {
            let due = DueKey::decode(&key).ok_or_else(|| self.unreadable(&key))?;
            if due > last {
                break;
            }
            self.remove(keys::batch(due.index, due.batch));
            self.remove(key.to_vec());
            dropped += 1;
        }
        Ok(dropped)
    }

    fn drop_cancelled(&mut self, kept: &Kept, limit: usize) -> Result<usize, StorageError> {
        let mut dropped = 0;
        for (key, value) in self.stored.scan_page(&[keys::CANCELLED], None, limit)? {
            let at = keys::at(&key).ok_or_else(|| self.unreadable(&key))?;
            let (index, ordinal) = self.decode(&key, &value)?;
            let batch = keys::batch(index, ordinal);
            let found: Option<HeldBatch> = self.read(&batch)?;
            let stamp_ms = found.and_then(|b| b.cancelled()).map_or(0, |c| c.stamp_ms);
            if at > kept.index || stamp_ms.saturating_add(REMEMBER_MS) >= kept.stamp_ms {
                break;
            }
            self.remove(batch);
            self.cancelled = self.cancelled.saturating_sub(1);
            self.remove(key.to_vec());
            dropped += 1;
        }
        Ok(dropped)
    }

    /// The parts of transactions that have ended.
    fn drop_parts(&mut self, kept: &Kept, limit: usize) -> Result<usize, StorageError> {
        let mut dropped = 0;
        for (key, value) in self.stored.scan_page(&[keys::ENDED_AT], None, limit)? {
            let at = keys::at(&key).ok_or_else(|| self.unreadable(&key))?;
            if at > kept.index {
                break;
            }
            let id = self.decode(&key, &value)?;
            for (part, spot) in self.parts(&id)? {
                // Not what came after the end was forgotten.
                if spot.index < at {
                    self.remove(keys::part_at(&id, part, spot.index));
                    self.remove(keys::batch(spot.index, spot.batch));
                }
            }
            self.remove(key.to_vec());
            dropped += 1;
        }
        Ok(dropped)
    }

    /// The memory of transactions that ended long ago.
    fn drop_settled(&mut self, kept: &Kept, limit: usize) -> Result<usize, StorageError> {
        let mut dropped = 0;
        for (key, value) in self.stored.scan_page(&[keys::SETTLED_AT], None, limit)? {
            let at = keys::at(&key).ok_or_else(|| self.unreadable(&key))?;
            let id = self.decode(&key, &value)?;
            let settled = keys::settled(&id, at);
            let record: Option<SettledRecord> = self.read(&settled)?;
            let stamp_ms = record.map_or(0, |record| record.stamp_ms);
            if at > kept.index || stamp_ms.saturating_add(END_KEPT_MS) >= kept.stamp_ms {
                break;
            }
            self.remove(settled);
            self.remembered = self.remembered.saturating_sub(1);
            self.remove(key.to_vec());
            dropped += 1;
        }
        Ok(dropped)
    }
}
