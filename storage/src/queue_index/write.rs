//! Everything that changes an index. One caller at a time; readers go on meanwhile.

use std::sync::Arc;

use super::file::{READ_CHUNK, build, publish, read_records, write_records};
use super::format::Header;
use super::search::{Goal, search};
use super::{IndexRecord, QueueIndex, State};
use crate::StorageError;
use crate::files;
use crate::mutation::{self, Mutation};

/// Records kept in memory before they are written in one go: just below 4 KiB on disk.
const TAIL_RECORDS: usize = 102;
/// Dead records that are worth a rewrite once they are more than half: 64 KiB.
const RECLAIM_MIN_RECORDS: u64 = 64 * 1024 / 40;

impl QueueIndex {
    /// Adds the next batch. Readers see it when this returns; it is durable after a
    /// [`QueueIndex::sync`].
    ///
    /// Refuses a record that does not begin at [`QueueIndex::end_offset`], is empty, or is older
    /// than the one before it. After an I/O error the record was not added and the same call may
    /// be tried again.
    pub fn append(&self, record: IndexRecord) -> Result<(), StorageError> {
        let writer = self.writer.lock();
        let full = {
            let state = self.state.read();
            check_next(&state, &record)?;
            state.tail.len() >= TAIL_RECORDS
        };
        if full {
            self.write_tail()?;
        }
        let mut state = self.state.write();
        state.end_offset = record.end_offset();
        state.last_timestamp_ms = record.timestamp_ms;
        state.dirty = true;
        state.tail.push(record);
        drop(state);
        drop(writer);
        Ok(())
    }

    /// Writes what is buffered, without making it durable, and gives the buffer's memory back.
    pub fn flush(&self) -> Result<(), StorageError> {
        let _writer = self.writer.lock();
        self.flush_locked()
    }

    /// Makes everything durable: appended records, truncation, trimming. Costs nothing when
    /// there is nothing new.
    ///
    /// After a failed fsync every further call fails: the kernel may have dropped the bytes, so
    /// the index has to be made anew ([`QueueIndex::reset_to`], [`QueueIndex::create_at`]).
    pub fn sync(&self) -> Result<(), StorageError> {
        let _writer = self.writer.lock();
        self.flush_locked()?;
        if !self.state.read().dirty {
            return Ok(());
        }
        // The header counts as durable only what an earlier fsync covered: of this one, the
        // header may reach the disk before the records do.
        self.write_header_and_sync()?;
        let mut state = self.state.write();
        state.durable = state.written;
        state.dirty = false;
        Ok(())
    }

    /// Forgets every record that reaches beyond `end_offset`, durably, and gives the end that is
    /// left: lower than asked for when a batch straddled it or the index is shorter. The caller
    /// appends again from there.
    ///
    /// If trimming has already dropped everything up to `end_offset`, the index becomes empty and
    /// begins there; what is between its owner's first offset and `end_offset` had been trimmed
    /// by an entry that the owner is about to apply again.
    pub fn truncate_to(&self, end_offset: u64) -> Result<u64, StorageError> {
        let _writer = self.writer.lock();
        let (start_offset, written_end, end) = {
            let state = self.state.read();
            let tail_start = state.tail.first().map(|record| record.base_offset);
            let written_end = tail_start.unwrap_or(state.end_offset);
            (state.start_offset, written_end, state.end_offset)
        };
        if end_offset >= end {
            return Ok(end);
        }
        if end_offset < start_offset {
            self.reset_locked(end_offset)?;
            return Ok(end_offset);
        }
        self.check_usable()?;
        if end_offset < written_end {
            return self.truncate_file(end_offset);
        }
        let mut state = self.state.write();
        let keep = state
            .tail
            .partition_point(|record| record.end_offset() <= end_offset);
        state.end_offset = state.tail[keep].base_offset;
        state.tail.truncate(keep);
        let last = state.tail.last().copied();
        let written = state.written;
        drop(state);
        let last = match last {
            Some(record) => Some(record),
            None => self.written_record(written.checked_sub(1))?,
        };
        let mut state = self.state.write();
        state.last_timestamp_ms = last.map_or(0, |record| record.timestamp_ms);
        state.first_offset = state.first_offset.min(state.end_offset);
        state.epoch += 1;
        self.sample.lock().reset(state.epoch);
        Ok(state.end_offset)
    }

    /// Forgets all records and begins anew at `first_offset`, durably. Readers that share this
    /// index see the new one. Also mends an index that stopped after a failed fsync.
    pub fn reset_to(&self, first_offset: u64) -> Result<(), StorageError> {
        let _writer = self.writer.lock();
        self.reset_locked(first_offset)
    }

    /// Retention: offsets below `offset` are gone for readers. Reclaims space once more than half
    /// of the file is dead, which copies the other half; readers don't wait for that. Lower than
    /// the first offset is fine and does nothing. Durable with the next sync.
    pub fn trim_front(&self, offset: u64) -> Result<(), StorageError> {
        let _writer = self.writer.lock();
        self.check_usable()?;
        {
            let state = self.state.read();
            if offset <= state.first_offset {
                return Ok(());
            }
            if offset > state.end_offset {
                return Err(StorageError::InvalidArgument(format!(
                    "cannot trim to offset {offset}: the queue ends at {}",
                    state.end_offset
                )));
            }
        }
        self.write_tail()?;
        let live_from = self.ordinal_holding(offset)?;
        {
            let mut state = self.state.write();
            state.first_offset = offset;
            state.live_from = live_from;
            state.dirty = true;
            if live_from < RECLAIM_MIN_RECORDS || live_from * 2 <= state.written {
                return Ok(());
            }
        }
        match self.rewrite() {
            // The trimming itself is done; space is tried again with the next one. A full disk
            // must not keep retention from going on.
            Err(error @ StorageError::Io { .. }) if self.check_usable().is_ok() => {
                tracing::warn!(path = %self.path.display(), %error, "the queue index keeps its dead part for now");
                Ok(())
            }
            result => result,
        }
    }

    fn flush_locked(&self) -> Result<(), StorageError> {
        self.check_usable()?;
        self.write_tail()?;
        self.state.write().tail = Vec::new();
        Ok(())
    }

    fn check_usable(&self) -> Result<(), StorageError> {
        self.state.read().failed.clone().map_or(Ok(()), Err)
    }

    /// Writes the tail. A failure changes nothing: the next attempt writes the same bytes to the
    /// same place.
    fn write_tail(&self) -> Result<(), StorageError> {
        let (file, tail, written) = {
            let state = self.state.read();
            (Arc::clone(&state.file), state.tail.clone(), state.written)
        };
        if tail.is_empty() {
            return Ok(());
        }
        write_records(&*file, &tail, written)
            .map_err(|e| StorageError::io("write", &self.path, e))?;
        let mut state = self.state.write();
        state.written += tail.len() as u64;
        state.tail.clear();
        let epoch = state.epoch;
        drop(state);
        self.sample.lock().learn(epoch, written, &tail[0]);
        Ok(())
    }

    /// What was found on opening may never have reached the disk: a killed process leaves what it did
    /// not sync, and after a failed fsync the system takes that for clean. The name may be undone by a
    /// power cut, too. Before the first promise, all this is done again.
    fn write_found_again(&self) -> Result<(), StorageError> {
        let (file, mut next, written) = {
            let state = self.state.read();
            if !state.found {
                return Ok(());
            }
            (Arc::clone(&state.file), state.durable, state.written)
        };
        while next < written {
            let count = READ_CHUNK.min(written - next);
            let records = read_records(&*file, &self.path, next, count as usize)?;
            write_records(&*file, &records, next)
                .map_err(|e| StorageError::io("write", &self.path, e))?;
            next += count;
        }
        files::sync_dir(&*self.vfs, &files::parent(&self.path))?;
        self.state.write().found = false;
        Ok(())
    }

    fn write_header_and_sync(&self) -> Result<(), StorageError> {
        self.write_found_again()?;
        let (file, header) = {
            let state = self.state.read();
            let header = Header {
                sequence: state.header_sequence + 1,
                start_offset: state.start_offset,
                first_offset: state.first_offset,
                live_from: state.live_from,
                durable: state.durable,
            };
            (Arc::clone(&state.file), header)
        };
        file.write_all_at(&header.encode(), header.position())
            .map_err(|e| StorageError::io("write", &self.path, e))?;
        self.sync_file(&*file)?;
        // Not earlier: another attempt has to go to the same slot, not to the good one.
        self.state.write().header_sequence = header.sequence;
        Ok(())
    }

    fn sync_file(&self, file: &dyn crate::vfs::VfsFile) -> Result<(), StorageError> {
        if mutation::on(Mutation::IndexNotSynced) {
            return Ok(());
        }
        file.sync_data().map_err(|e| {
            let error = StorageError::io("fsync", &self.path, e);
            self.state.write().failed = Some(error.clone());
            error
        })
    }

    fn truncate_file(&self, end_offset: u64) -> Result<u64, StorageError> {
        let view = self.state.read().view(0);
        let goal = Goal::BaseOffsetAtLeast(end_offset);
        let mut keep = search(&view, &self.path, &self.sample, goal)?.ordinal;
        let mut last = self.written_record(keep.checked_sub(1))?;
        if last.is_some_and(|record| record.end_offset() > end_offset) {
            keep -= 1;
            last = self.written_record(keep.checked_sub(1))?;
        }
        {
            let mut state = self.state.write();
            state.tail = Vec::new();
            state.written = keep;
            state.durable = state.durable.min(keep);
            state.live_from = state.live_from.min(keep);
            state.end_offset = last.map_or(state.start_offset, |record| record.end_offset());
            state.first_offset = state.first_offset.min(state.end_offset);
            state.last_timestamp_ms = last.map_or(0, |record| record.timestamp_ms);
            state.epoch += 1;
            self.sample.lock().reset(state.epoch);
        }
        self.cut_file()?;
        Ok(self.end_offset())
    }

    /// Shortens the file to the written records, durably. The header goes first: a file shorter
    /// than what its header calls durable would look like damage.
    pub(super) fn cut_file(&self) -> Result<(), StorageError> {
        self.write_header_and_sync()?;
        let (file, len) = {
            let state = self.state.read();
            (Arc::clone(&state.file), state.len_bytes())
        };
        file.set_len(len)
            .map_err(|e| StorageError::io("truncate", &self.path, e))?;
        self.sync_file(&*file)?;
        let mut state = self.state.write();
        state.durable = state.written;
        state.dirty = false;
        Ok(())
    }

    fn written_record(&self, ordinal: Option<u64>) -> Result<Option<IndexRecord>, StorageError> {
        let Some(ordinal) = ordinal else {
            return Ok(None);
        };
        let file = Arc::clone(&self.state.read().file);
        Ok(read_records(&*file, &self.path, ordinal, 1)?.pop())
    }

    /// Ordinal of the written record that holds `offset`, or of the end.
    fn ordinal_holding(&self, offset: u64) -> Result<u64, StorageError> {
        let view = {
            let state = self.state.read();
            if offset >= state.end_offset {
                return Ok(state.written);
            }
            state.view(state.live_from)
        };
        let goal = Goal::BaseOffsetAtLeast(offset + 1);
        let after = search(&view, &self.path, &self.sample, goal)?.ordinal;
        Ok(after.saturating_sub(1).max(view.from))
    }

    fn reset_locked(&self, first_offset: u64) -> Result<(), StorageError> {
        let header = Header::new(first_offset, first_offset, 0);
        let file = build(&*self.vfs, &self.path, header, || Ok(Vec::new()))?;
        self.publish_or_stop()?;
        let mut state = self.state.write();
        *state = state.replaced(file, &header, first_offset, 0);
        self.sample.lock().reset(state.epoch);
        Ok(())
    }

    /// Puts the new file in place. If that fails, nobody knows which file the name stands for,
    /// and what is written to the old one might be written to no name at all: so nothing is.
    fn publish_or_stop(&self) -> Result<(), StorageError> {
        publish(&*self.vfs, &self.path).inspect_err(|error| {
            self.state.write().failed = Some(error.clone());
        })
    }

    /// Copies the live records into a new file. The tail has been written.
    fn rewrite(&self) -> Result<(), StorageError> {
        let (file, from, written, first_offset, end_offset, last_timestamp_ms) = {
            let s = self.state.read();
            let file = Arc::clone(&s.file);
            (
                file,
                s.live_from,
                s.written,
                s.first_offset,
                s.end_offset,
                s.last_timestamp_ms,
            )
        };
        let first = if from < written {
            self.written_record(Some(from))?
        } else {
            None
        };
        let start_offset = first.map_or(end_offset, |record| record.base_offset);
        let header = Header::new(start_offset, first_offset, written - from);
        let mut next = from;
        let copy = || {
            let count = READ_CHUNK.min(written - next);
            let chunk = read_records(&*file, &self.path, next, count as usize)?;
            next += count;
            Ok(chunk)
        };
        let file = build(&*self.vfs, &self.path, header, copy)?;
        self.publish_or_stop()?;
        let mut state = self.state.write();
        *state = state.replaced(file, &header, end_offset, last_timestamp_ms);
        self.sample.lock().reset(state.epoch);
        Ok(())
    }
}

fn check_next(state: &State, record: &IndexRecord) -> Result<(), StorageError> {
    if let Some(error) = &state.failed {
        return Err(error.clone());
    }
    let refuse = |why: String| Err(StorageError::InvalidArgument(why));
    if record.base_offset != state.end_offset {
        return refuse(format!(
            "a batch at offset {} cannot follow the end {} of its queue's index",
            record.base_offset, state.end_offset
        ));
    }
    if record.count == 0
        || record
            .base_offset
            .checked_add(u64::from(record.count))
            .is_none()
    {
        return refuse(format!(
            "a batch of {} messages at offset {} is impossible",
            record.count, record.base_offset
        ));
    }
    if record.timestamp_ms < state.last_timestamp_ms {
        return refuse(format!(
            "the time of the batch at offset {} is {} ms, before its predecessor's {} ms",
            record.base_offset, record.timestamp_ms, state.last_timestamp_ms
        ));
    }
    Ok(())
}
