//! The one writer: everything queued by all groups becomes one write and one fdatasync.
//!
//! [`WriterCore::step`] does one round and never sleeps; a thread, or a simulation, calls it in a loop.
//! Invariants: `done` is called in the order of the calls; a segment is fsynced, seal included, before
//! the first byte of the next one is written; after a failed write or fsync nothing is written again.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::background::{SealTask, Wish};
use super::evictor::Evictor;
use super::format::{FRAME_HEADER, SEGMENT_HEADER, frame_bytes};
use super::frame::{self, Content, MarkKind};
use super::group::{Group, entry_cost};
use super::queue::{Action, Op};
use super::segment::Segment;
use super::shared::Shared;
use super::types::{Done, Entry, Flush};
use crate::mutation::{self, Mutation};
use crate::vfs::VfsFile;
use crate::{RaftGroupId, StorageError};

const MARK: u64 = FRAME_HEADER as u64;
/// The write buffer is given back to the system when one large batch left it bigger than this.
const BUFFER_KEPT: usize = 32 << 20;

/// What a round of the writer came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Something was written or synced; there may be more.
    Worked,
    /// Nothing to do until something is queued, or until the given time.
    Idle { wake_at: Option<Instant> },
    /// Closed or poisoned; nothing will happen any more.
    Stopped,
}

/// Where the writer goes on after recovery.
#[derive(Debug)]
pub(super) struct Start {
    pub segment: Arc<Segment>,
    /// Byte of the segment file where the next frame goes.
    pub offset: u64,
    pub epoch: u32,
    /// The groups that have frames in this segment already.
    pub touched: Vec<Arc<Group>>,
    /// False when the log does not end in a closing mark.
    pub closed: bool,
}

pub(super) struct WriterCore {
    shared: Arc<Shared>,
    segment: Arc<Segment>,
    file: Arc<dyn VfsFile>,
    epoch: u32,
    /// Position of the next write.
    cursor: u64,
    /// Everything below is on disk.
    durable_end: u64,
    buf: Vec<u8>,
    pending: VecDeque<Op>,
    finished: Vec<Done>,
    /// Groups with frames in the active segment.
    touched: Vec<Arc<Group>>,
    /// Relocated entries that are encoded and not yet written.
    moved: Vec<Moved>,
    evictor: Evictor,
    /// Since when there are bytes without fsync.
    dirty_since: Option<Instant>,
    /// The last write that no closing mark has followed.
    active_since: Option<Instant>,
    stopped: bool,
}

impl fmt::Debug for WriterCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriterCore")
            .field("cursor", &self.cursor)
            .field("durable_end", &self.durable_end)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}

/// What was encoded for one write.
#[derive(Debug, Default)]
struct Batch {
    sync: bool,
    /// The segment is full: seal it and go on in the next.
    full: bool,
    frames: u64,
    entries: u64,
    /// What the queue and the cache counted for the entries.
    cost: usize,
}

/// A relocated entry. No cache has it, so it is found at its old place until it is written.
struct Moved {
    group: Arc<Group>,
    from: Arc<Segment>,
    content: Content,
    index: u64,
    position: u64,
    length: u32,
}

/// How far an operation got.
enum Fit {
    Whole,
    /// The rest goes into the next segment.
    SegmentFull,
    /// The rest goes into the next write.
    BatchFull,
}

impl WriterCore {
    pub fn new(shared: Arc<Shared>, start: Start, now: Instant) -> Result<Self, StorageError> {
        let file = start.segment.log.get(&*shared.vfs)?;
        let cursor = start.segment.base + start.offset;
        shared.stats.durable_end.store(cursor, Relaxed);
        shared.stats.end.store(cursor, Relaxed);
        let evictor = Evictor::new(shared.config.tail_cache_bytes);
        Ok(Self {
            shared,
            segment: start.segment,
            file,
            epoch: start.epoch,
            cursor,
            durable_end: cursor,
            buf: Vec::new(),
            pending: VecDeque::new(),
            finished: Vec::new(),
            touched: start.touched,
            moved: Vec::new(),
            evictor,
            dirty_since: None,
            active_since: (!start.closed).then_some(now),
            stopped: false,
        })
    }

    /// Does what there is to do now. `now` must not go back.
    pub fn step(&mut self, now: Instant) -> Step {
        if self.stopped {
            return Step::Stopped;
        }
        match self.round(now) {
            Ok(step) => step,
            Err(error) => {
                self.poison(&error);
                Step::Stopped
            }
        }
    }

    fn round(&mut self, now: Instant) -> Result<Step, StorageError> {
        let closing = self.shared.queue.take(&mut self.pending);
        if !self.pending.is_empty() {
            self.write_batch(now)?;
            return Ok(Step::Worked);
        }
        let config = &self.shared.config;
        let flush_at = self.dirty_since.map(|at| at + config.async_flush_interval);
        let mark_at = self.active_since.map(|at| at + config.idle_mark_after);
        if closing {
            self.write_closing_mark()?;
            self.stopped = true;
            let late = self.shared.queue.refuse(&StorageError::Closed);
            fail(
                late.into_iter().filter_map(|op| op.done),
                &StorageError::Closed,
            );
            return Ok(Step::Stopped);
        }
        if mark_at.is_some_and(|at| at <= now) {
            self.write_closing_mark()?;
            return Ok(Step::Worked);
        }
        if flush_at.is_some_and(|at| at <= now) {
            self.sync()?;
            return Ok(Step::Worked);
        }
        let wake_at = [flush_at, mark_at].into_iter().flatten().min();
        Ok(Step::Idle { wake_at })
    }

    fn write_batch(&mut self, now: Instant) -> Result<(), StorageError> {
        let batch = self.encode_batch()?;
        if !self.buf.is_empty() {
            self.write()?;
            self.show_moved()?;
            self.dirty_since.get_or_insert(now);
            self.active_since = Some(now);
        }
        let stats = &self.shared.stats;
        stats.frames.fetch_add(batch.frames, Relaxed);
        stats.entries.fetch_add(batch.entries, Relaxed);
        self.shared.queue.written(batch.cost);
        let interval = self.shared.config.async_flush_interval;
        let overdue = self.dirty_since.is_some_and(|at| at + interval <= now);
        if mutation::on(Mutation::FsyncAfterAck) {
            self.finished.drain(..).for_each(|done| done(Ok(())));
        }
        let seals = batch.full && !mutation::on(Mutation::SealNotSynced);
        if batch.sync || seals || overdue {
            self.sync()?;
        }
        if mutation::on(Mutation::CallbacksOutOfOrder) {
            self.finished.reverse();
        }
        for done in self.finished.drain(..) {
            done(Ok(()));
        }
        self.evictor.shrink(&self.shared.cache);
        if batch.full {
            self.roll()?;
        } else if self.cursor - self.segment.base > self.segment.capacity / 4 {
            self.shared.background.want(Wish::behind(&self.segment));
        }
        Ok(())
    }

    /// Encodes as much of what is pending as one write takes.
    fn encode_batch(&mut self) -> Result<Batch, StorageError> {
        self.buf.clear();
        self.buf.shrink_to(BUFFER_KEPT);
        let mut batch = Batch::default();
        while let Some(mut op) = self.pending.pop_front() {
            match self.encode(&mut op, &mut batch)? {
                Fit::Whole => {
                    self.finished.extend(op.done);
                    continue;
                }
                Fit::BatchFull => {}
                Fit::SegmentFull => {
                    batch.full = true;
                    self.push_mark(MarkKind::Seal);
                }
            }
            self.pending.push_front(op);
            break;
        }
        Ok(batch)
    }

    fn encode(&mut self, op: &mut Op, batch: &mut Batch) -> Result<Fit, StorageError> {
        let (group, content) = match &mut op.action {
            Action::Append {
                group,
                seq,
                entries,
                next,
                flush,
            } => {
                batch.sync |= *flush == Flush::Sync;
                let group = group.clone();
                let fit = self.encode_entries(&group, entries, next, batch)?;
                if let Fit::Whole = fit {
                    self.evictor.written(group, *seq);
                }
                return Ok(fit);
            }
            Action::Vote(..) if mutation::on(Mutation::ForgetVote) => {
                batch.sync = true;
                return Ok(Fit::Whole);
            }
            Action::Vote(group, vote) => (group, Content::Vote(*vote)),
            Action::Truncate { group, from, kept } => {
                let (from, kept) = (*from, *kept);
                (group, Content::Truncate { from, kept })
            }
            Action::Purge(group, upto) => (group, Content::Purge(*upto)),
            Action::Remove(group) => (group, Content::Remove),
            Action::Carry(group, below) => {
                let (group, below) = (group.clone(), *below);
                return self.encode_carried(&group, below, batch);
            }
            Action::Relocate {
                group,
                segment,
                entries,
                next,
            } => {
                let (group, segment) = (group.clone(), segment.clone());
                return Ok(self.encode_relocated(&group, &segment, entries, next, batch));
            }
            Action::Barrier => {
                batch.sync = true;
                return Ok(Fit::Whole);
            }
        };
        let group = group.clone();
        self.encode_small(&group, &content, batch)
    }

    fn encode_entries(
        &mut self,
        group: &Arc<Group>,
        entries: &[Entry],
        next: &mut usize,
        batch: &mut Batch,
    ) -> Result<Fit, StorageError> {
        let from = *next;
        let mut positions = Vec::with_capacity(entries.len() - from);
        let mut fit = Fit::Whole;
        for entry in &entries[from..] {
            if self.buf.len() >= self.shared.config.write_batch_bytes {
                fit = Fit::BatchFull;
                break;
            }
            let content = entry_content(entry);
            let Some(position) = self.push(group.id, &content, &entry.body) else {
                fit = Fit::SegmentFull;
                break;
            };
            positions.push(position);
            batch.cost += entry_cost(entry);
        }
        *next += positions.len();
        batch.frames += positions.len() as u64;
        batch.entries += positions.len() as u64;
        let mut inner = group.inner.lock();
        for (entry, position) in entries[from..].iter().zip(positions) {
            let length = entry.body.len() as u32;
            let applied =
                inner
                    .written
                    .apply(&entry_content(entry), &self.segment, position, length);
            if applied.map_err(|why| self.impossible(group, why))? {
                self.touched.push(group.clone());
            }
        }
        Ok(fit)
    }

    fn encode_small(
        &mut self,
        group: &Arc<Group>,
        content: &Content,
        batch: &mut Batch,
    ) -> Result<Fit, StorageError> {
        let Some(position) = self.push(group.id, content, &[]) else {
            return Ok(Fit::SegmentFull);
        };
        batch.sync = true;
        batch.frames += 1;
        let mut inner = group.inner.lock();
        let applied = inner.written.apply(content, &self.segment, position, 0);
        if applied.map_err(|why| self.impossible(group, why))? {
            self.touched.push(group.clone());
        }
        Ok(Fit::Whole)
    }

    /// Only the writer knows which vote is the newest in the stream, so it is looked up here.
    fn encode_carried(
        &mut self,
        group: &Arc<Group>,
        below: u64,
        batch: &mut Batch,
    ) -> Result<Fit, StorageError> {
        batch.sync = true;
        let (vote, purged) = {
            let inner = group.inner.lock();
            (inner.written.vote, inner.written.purged)
        };
        let vote = vote.map(|(vote, at)| (Content::Vote(vote), at));
        let purged = purged.map(|(upto, at)| (Content::Purge(upto), at));
        for (content, at) in [vote, purged].into_iter().flatten() {
            if at < below
                && let Fit::SegmentFull = self.encode_small(group, &content, batch)?
            {
                return Ok(Fit::SegmentFull);
            }
        }
        Ok(Fit::Whole)
    }

    /// An entry may have been cut, purged or removed since it was read: only the writer knows whether
    /// its old place is the one that counts at this point of the stream.
    fn encode_relocated(
        &mut self,
        group: &Arc<Group>,
        from: &Arc<Segment>,
        entries: &[Entry],
        next: &mut usize,
        batch: &mut Batch,
    ) -> Fit {
        while let Some(entry) = entries.get(*next) {
            if self.buf.len() >= self.shared.config.write_batch_bytes {
                return Fit::BatchFull;
            }
            let index = entry.log_id.index;
            let counts = group.inner.lock().written.has_in(from, index);
            if counts || mutation::on(Mutation::MoveWhatWasCut) {
                let content = Content::Relocated {
                    log_id: entry.log_id,
                    kind: entry.kind,
                };
                let Some(position) = self.push(group.id, &content, &entry.body) else {
                    return Fit::SegmentFull;
                };
                batch.frames += 1;
                self.moved.push(Moved {
                    group: group.clone(),
                    from: from.clone(),
                    content,
                    index,
                    position,
                    length: entry.body.len() as u32,
                });
            }
            batch.cost += entry_cost(entry);
            *next += 1;
        }
        Fit::Whole
    }

    /// Readers find what was moved at its new place from here on, but for what a later frame of the
    /// same write has cut.
    fn show_moved(&mut self) -> Result<(), StorageError> {
        for moved in std::mem::take(&mut self.moved) {
            let group = &moved.group;
            let mut inner = group.inner.lock();
            if !inner.written.begins_run_in(&moved.from, moved.index) {
                continue;
            }
            // Whoever has looked up the old place may not find its file any more.
            inner.version += 1;
            let (position, length) = (moved.position, moved.length);
            let applied = inner
                .written
                .apply(&moved.content, &self.segment, position, length);
            if applied.map_err(|why| self.impossible(group, why))? {
                self.touched.push(group.clone());
            }
        }
        Ok(())
    }

    /// Encodes one frame, with the mark that begins a write before it. None: the segment is full.
    fn push(&mut self, group: RaftGroupId, content: &Content, body: &[u8]) -> Option<u64> {
        let mark = if self.buf.is_empty() { MARK } else { 0 };
        let end = self.position() + mark + frame_bytes(body.len());
        // The seal always finds room.
        if end + MARK > self.segment.end() {
            return None;
        }
        if mark > 0 {
            self.push_mark(MarkKind::Begin);
        }
        let position = self.position();
        frame::push(&mut self.buf, self.epoch, position, group, content, body);
        Some(position)
    }

    fn push_mark(&mut self, mark: MarkKind) {
        let content = Content::Mark {
            mark,
            durable_end: self.durable_end,
        };
        let position = self.position();
        frame::push(
            &mut self.buf,
            self.epoch,
            position,
            RaftGroupId(0),
            &content,
            &[],
        );
    }

    fn position(&self) -> u64 {
        self.cursor + self.buf.len() as u64
    }

    fn write(&mut self) -> Result<(), StorageError> {
        let offset = self.cursor - self.segment.base;
        self.file
            .write_all_at(&self.buf, offset)
            .map_err(|e| StorageError::io("write", self.segment.log.path(), e))?;
        self.cursor += self.buf.len() as u64;
        let stats = &self.shared.stats;
        stats.writes.fetch_add(1, Relaxed);
        stats
            .written_bytes
            .fetch_add(self.buf.len() as u64, Relaxed);
        stats.end.store(self.cursor, Relaxed);
        self.buf.clear();
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StorageError> {
        self.dirty_since = None;
        if self.durable_end == self.cursor {
            return Ok(());
        }
        let start = Instant::now();
        let mut synced = match mutation::on(Mutation::NoFsync) {
            false => self.file.sync_data(),
            true => Ok(()),
        };
        if synced.is_err() && mutation::on(Mutation::RetryFailedFsync) {
            synced = self.file.sync_data();
        }
        synced.map_err(|e| StorageError::io("fsync", self.segment.log.path(), e))?;
        self.shared.stats.fsynced(start.elapsed());
        self.durable_end = self.cursor;
        self.shared
            .stats
            .durable_end
            .store(self.durable_end, Relaxed);
        Ok(())
    }

    /// Says on disk that everything before is on disk. A full segment is sealed instead.
    fn write_closing_mark(&mut self) -> Result<(), StorageError> {
        if self.active_since.is_none() {
            return self.sync();
        }
        self.sync()?;
        self.buf.clear();
        let full = self.cursor + 2 * MARK > self.segment.end();
        self.push_mark(if full {
            MarkKind::Seal
        } else {
            MarkKind::Closing
        });
        self.write()?;
        self.sync()?;
        self.active_since = None;
        if full { self.roll() } else { Ok(()) }
    }

    /// Goes on in the next segment. The active one is sealed and durable.
    fn roll(&mut self) -> Result<(), StorageError> {
        let next = self
            .shared
            .background
            .take(&self.shared, Wish::behind(&self.segment))?;
        let file = next.log.get(&*self.shared.vfs)?;
        let sealed = std::mem::replace(&mut self.segment, next);
        self.file = file;
        let data_end = self.cursor;
        self.cursor = self.segment.base + SEGMENT_HEADER;
        self.durable_end = self.cursor;
        self.shared.stats.end.store(self.cursor, Relaxed);
        self.shared.stats.durable_end.store(self.cursor, Relaxed);
        self.shared
            .sealed
            .lock()
            .insert(sealed.base, sealed.clone());
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_by_key(|group| group.id);
        let parts = touched
            .iter()
            .filter_map(|group| Some((group.id, group.inner.lock().written.seal()?)))
            .collect();
        self.shared.background.seal(SealTask {
            segment: sealed,
            data_end,
            epoch: self.epoch,
            parts,
        });
        Ok(())
    }

    fn impossible(&self, group: &Group, why: &str) -> StorageError {
        StorageError::InvalidArgument(format!("the index of {} broke: {why}", group.id))
    }

    fn poison(&mut self, cause: &StorageError) {
        self.stopped = true;
        tracing::error!(%cause, "the commit log stops");
        let error = self.shared.poison.set(cause);
        let late = self.shared.queue.refuse(&error);
        let pending = std::mem::take(&mut self.pending);
        let waiting = pending.into_iter().chain(late).filter_map(|op| op.done);
        fail(self.finished.drain(..).chain(waiting), &error);
        self.shared.poison.tell(&error);
    }
}

impl Drop for WriterCore {
    /// A panic in a callback must not leave anybody waiting.
    fn drop(&mut self) {
        if std::thread::panicking() && !self.stopped {
            let cause = StorageError::InvalidArgument("the writer thread panicked".to_owned());
            self.poison(&cause);
        }
    }
}

fn entry_content(entry: &Entry) -> Content {
    Content::Entry {
        log_id: entry.log_id,
        kind: entry.kind,
    }
}

fn fail(waiting: impl Iterator<Item = Done>, error: &StorageError) {
    for done in waiting {
        done(Err(error.clone()));
    }
}
