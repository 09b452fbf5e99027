//! The index of one queue: offset → (Raft log index, batch in that entry), time → offset.
//!
//! ```text
//! file:  [headers][ trimmed | r r r r r r r r r ]   tail: [r r r]
//!                           ^ first_offset      ^ written      ^ end_offset
//! ```
//!
//! One record stands for one batch. Records name Raft indexes, not disk positions, so the
//! cleaner may move frames without touching an index. The newest records wait in a small bounded
//! tail in memory until a chunk of them is written; readers see them all the same, at once.
//!
//! One writer, many readers, all through `&self`. Readers take a lock only to copy a few numbers
//! and read the file without it. When positions change their meaning (truncation, rewriting) an
//! epoch moves and readers that were under way start over.
//!
//! The index is derived: whatever is missing or bad can be made again from the commit log. What
//! it owes is to notice. [`QueueIndex::sync`] is the only promise of durability; after a crash
//! the owner opens, calls [`QueueIndex::truncate_to`] with its checkpoint's end, and appends
//! again what the log holds after the end it is told. Each record is checked when it is read;
//! [`StorageError::Damaged`] from a read means: make the index anew.
//!
//! Memory: below 1 KiB for an index at rest, 8 KiB while appended to, whatever its length.

mod file;
mod format;
mod open;
mod sample;
mod search;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::StorageError;
use crate::vfs::{Vfs, VfsFile};
use file::{READ_CHUNK, read_records};
use sample::{Point, Sample};
use search::{FileView, Goal, search};

pub use open::OpenReport;

/// One batch that became visible: offsets `base_offset..base_offset + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexRecord {
    pub base_offset: u64,
    /// Messages in the batch, at least 1.
    pub count: u32,
    /// Ordinal of the batch in its Raft entry.
    pub batch: u16,
    /// Raft index of the entry that holds the batch.
    pub log_index: u64,
    /// When it became visible, in log time; never decreases along the queue.
    pub timestamp_ms: u64,
}

impl IndexRecord {
    /// The offset after the batch's last one.
    pub fn end_offset(&self) -> u64 {
        self.base_offset + u64::from(self.count)
    }
}

/// The index of one queue. Share it in an `Arc`; see the module's documentation.
#[derive(Debug)]
pub struct QueueIndex {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    report: OpenReport,
    /// Held by whoever changes the file.
    writer: Mutex<()>,
    state: RwLock<State>,
    sample: Mutex<Sample>,
}

#[derive(Debug)]
struct State {
    file: Arc<dyn VfsFile>,
    epoch: u64,
    header_sequence: u64,
    start_offset: u64,
    first_offset: u64,
    /// Ordinal of the record that holds the first offset.
    live_from: u64,
    /// Records in the file, and how many of them an fsync has covered.
    written: u64,
    durable: u64,
    end_offset: u64,
    last_timestamp_ms: u64,
    /// Records after the written ones.
    tail: Vec<IndexRecord>,
    /// Whether anything happened that `sync` has to make durable.
    dirty: bool,
    /// The file is one that was found, and not synced yet by this process.
    found: bool,
    /// A failed fsync: what it covered may be gone, so nothing more is promised of this file.
    failed: Option<StorageError>,
}

impl State {
    fn view(&self, from: u64) -> FileView {
        let end = match self.tail.first() {
            Some(record) => (record.base_offset, record.timestamp_ms),
            None => (self.end_offset, self.last_timestamp_ms),
        };
        FileView {
            file: Arc::clone(&self.file),
            epoch: self.epoch,
            from,
            written: self.written,
            end: Point {
                ordinal: self.written,
                offset: end.0,
                timestamp_ms: end.1,
            },
        }
    }
}

impl QueueIndex {
    /// The lowest offset that has not been trimmed; equal to the end while the queue is empty.
    pub fn first_offset(&self) -> u64 {
        self.state.read().first_offset
    }

    /// The offset that the next message gets.
    pub fn end_offset(&self) -> u64 {
        self.state.read().end_offset
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes on disk, dead ones included, buffered ones not.
    pub fn disk_bytes(&self) -> u64 {
        format::record_position(self.state.read().written)
    }

    /// The record of the batch that holds `offset`; none below the first and from the end on.
    pub fn find(&self, offset: u64) -> Result<Option<IndexRecord>, StorageError> {
        if offset < self.first_offset() {
            return Ok(None);
        }
        let found = self.find_from(offset, 1)?.into_iter().next();
        Ok(found.filter(|record| record.base_offset <= offset))
    }

    /// Up to `max_records` records in order, from the one that holds `offset`; from the first one
    /// there is when `offset` was trimmed; none from the end on.
    pub fn find_from(
        &self,
        offset: u64,
        max_records: usize,
    ) -> Result<Vec<IndexRecord>, StorageError> {
        self.undisturbed(|index| index.try_find_from(offset, max_records))
    }

    /// The first offset whose timestamp is at least `timestamp_ms`; none if all are older.
    pub fn offset_at_time(&self, timestamp_ms: u64) -> Result<Option<u64>, StorageError> {
        self.undisturbed(|index| index.try_offset_at_time(timestamp_ms))
    }

    /// When the message at `offset` became visible.
    pub fn timestamp_of(&self, offset: u64) -> Result<Option<u64>, StorageError> {
        Ok(self.find(offset)?.map(|record| record.timestamp_ms))
    }

    /// Repeats a read until positions kept their meaning all through it: then both its answer
    /// and its error can be believed.
    fn undisturbed<T>(
        &self,
        read: impl Fn(&Self) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        loop {
            let before = self.state.read().epoch;
            let result = read(self);
            if self.state.read().epoch == before {
                return result;
            }
        }
    }

    fn try_find_from(
        &self,
        offset: u64,
        max_records: usize,
    ) -> Result<Vec<IndexRecord>, StorageError> {
        let view = {
            let state = self.state.read();
            if offset >= state.end_offset || max_records == 0 {
                return Ok(Vec::new());
            }
            if let Some(first) = state.tail.first()
                && offset >= first.base_offset
            {
                let from = state.tail.partition_point(|r| r.end_offset() <= offset);
                let records = state.tail[from..].iter().take(max_records);
                return Ok(records.copied().collect());
            }
            state.view(state.live_from)
        };
        let goal = Goal::BaseOffsetAtLeast(offset.saturating_add(1));
        let hit = search(&view, &self.path, &self.sample, goal)?;
        // The one before the first that begins after `offset` holds it, unless it was trimmed.
        let ordinal = hit.ordinal.saturating_sub(1).max(view.from);
        if max_records == 1
            && let Some(record) = hit.record(ordinal)
        {
            return Ok(vec![record]);
        }
        self.collect(ordinal, max_records)
    }

    /// Records from `ordinal` on, first from the file and then from the tail.
    fn collect(&self, mut ordinal: u64, max: usize) -> Result<Vec<IndexRecord>, StorageError> {
        let mut records = Vec::new();
        while records.len() < max {
            let wanted = max - records.len();
            let (file, written) = {
                let state = self.state.read();
                if ordinal >= state.written {
                    let skip = (ordinal - state.written) as usize;
                    records.extend(state.tail.iter().skip(skip).take(wanted));
                    return Ok(records);
                }
                (Arc::clone(&state.file), state.written)
            };
            let count = READ_CHUNK.min(written - ordinal).min(wanted as u64);
            let chunk = read_records(&*file, &self.path, ordinal, count as usize)?;
            records.extend(chunk);
            ordinal += count;
        }
        Ok(records)
    }

    fn try_offset_at_time(&self, timestamp_ms: u64) -> Result<Option<u64>, StorageError> {
        let (view, first_offset, tail_first) = {
            let state = self.state.read();
            if state.first_offset == state.end_offset || timestamp_ms > state.last_timestamp_ms {
                return Ok(None);
            }
            if let Some(first) = state.tail.first()
                && timestamp_ms > first.timestamp_ms
            {
                let place = state
                    .tail
                    .partition_point(|record| record.timestamp_ms < timestamp_ms);
                return Ok(state
                    .tail
                    .get(place)
                    .map(|record| record.base_offset.max(state.first_offset)));
            }
            let tail_first = state.tail.first().map(|record| record.base_offset);
            (state.view(state.live_from), state.first_offset, tail_first)
        };
        let goal = Goal::TimestampAtLeast(timestamp_ms);
        let hit = search(&view, &self.path, &self.sample, goal)?;
        if hit.ordinal == view.written {
            return Ok(tail_first);
        }
        let record = match hit.record(hit.ordinal) {
            Some(record) => Some(record),
            None => self.collect(hit.ordinal, 1)?.into_iter().next(),
        };
        Ok(record.map(|record| record.base_offset.max(first_offset)))
    }
}

#[cfg(test)]
mod tests;
