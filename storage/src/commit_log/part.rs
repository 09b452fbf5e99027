//! What one segment says about one Raft group: the unit in which the index is built, sealed into a
//! sidecar, and replayed.
//!
//! A part is a function of the group's frames in that segment alone, so a sidecar that is written at
//! seal time and one that is rebuilt by a scan are the same. [`Written`](super::index::Written) is the
//! fold of a group's parts in log order.

use std::collections::VecDeque;

use super::format::frame_bytes;
use super::frame::Content;
use super::segment::Segment;
use crate::{LogId, Vote};

/// Where an entry's frame is, inside the segment that the holder of this knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EntryRef {
    pub term: u64,
    /// Byte in the segment file.
    pub offset: u32,
    /// Bytes of the body.
    pub length: u32,
}

impl EntryRef {
    /// Whether the frame could be in the segment at all.
    pub fn is_within(&self, segment: &Segment) -> bool {
        u64::from(self.offset) + frame_bytes(self.length as usize) <= segment.capacity
    }
}

/// Entries with consecutive Raft indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EntryRun {
    pub first: u64,
    pub entries: VecDeque<EntryRef>,
}

impl EntryRun {
    /// The index behind the last one.
    fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    pub fn last(&self) -> Option<LogId> {
        let last = self.entries.back()?;
        Some(LogId::new(last.term, self.end() - 1))
    }

    fn cut(&mut self, from: u64) {
        let keep = usize::try_from(from.saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.entries.truncate(keep);
    }

    fn purge(&mut self, upto: u64) {
        let gone = usize::try_from((upto + 1).saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.entries.drain(..self.entries.len().min(gone));
        self.first = self.first.max(upto + 1);
    }
}

/// The effect of a segment on one group, entries included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GroupPart {
    /// The group was removed here; nothing of earlier segments counts.
    pub removed: bool,
    /// Entries of earlier segments at this index and above are gone. `u64::MAX`: none are.
    pub cut_from: u64,
    /// The newest vote and the position of its frame.
    pub vote: Option<(Vote, u64)>,
    /// The newest purge and the position of its frame.
    pub purged: Option<(LogId, u64)>,
    /// The group's last entry after this segment; outer none: the segment does not say.
    pub last: Option<Option<LogId>>,
    /// Raft index of the first of `entries`.
    pub first: u64,
    /// Entries written here and still valid at the end of the segment, one index each.
    pub entries: VecDeque<EntryRef>,
    /// Entries of earlier segments that the cleaner moved here, in the order of moving. All of them
    /// are below `entries`.
    pub relocated: Vec<EntryRun>,
}

impl Default for GroupPart {
    fn default() -> Self {
        Self {
            removed: false,
            cut_from: u64::MAX,
            vote: None,
            purged: None,
            last: None,
            first: 0,
            entries: VecDeque::new(),
            relocated: Vec::new(),
        }
    }
}

impl GroupPart {
    /// Takes in the group's next frame, at `position` (byte `offset` of the segment) with a body of
    /// `length` bytes. An error says why the frame can't follow the ones before it.
    pub fn apply(
        &mut self,
        content: &Content,
        position: u64,
        offset: u32,
        length: u32,
    ) -> Result<(), &'static str> {
        match *content {
            Content::Entry { log_id, .. } => {
                self.cut(log_id.index);
                if self.entries.is_empty() {
                    self.first = log_id.index;
                } else if self.first + self.entries.len() as u64 != log_id.index {
                    return Err("an entry leaves a hole behind the one before it");
                }
                self.entries.push_back(EntryRef {
                    term: log_id.term,
                    offset,
                    length,
                });
                self.last = Some(Some(log_id));
            }
            Content::Vote(vote) => self.vote = Some((vote, position)),
            Content::Truncate { from, kept } => {
                self.cut(from);
                self.last = Some(kept);
            }
            Content::Purge(upto) => {
                self.purged = Some((upto, position));
                let gone = (upto.index + 1).saturating_sub(self.first);
                self.entries.drain(..self.entries.len().min(gone as usize));
                self.first = self.first.max(upto.index + 1);
                self.relocated
                    .iter_mut()
                    .for_each(|run| run.purge(upto.index));
                self.relocated.retain(|run| !run.entries.is_empty());
                if let Some(last) = self.last
                    && last.is_none_or(|last| last.index < upto.index)
                {
                    self.last = Some(Some(upto));
                }
            }
            Content::Remove => {
                *self = Self {
                    removed: true,
                    last: Some(None),
                    ..Self::default()
                };
            }
            Content::Relocated { log_id, .. } => {
                let entry = EntryRef {
                    term: log_id.term,
                    offset,
                    length,
                };
                self.relocate(log_id.index, entry)?;
            }
            Content::Mark { .. } => {}
        }
        Ok(())
    }

    /// Only what lies in earlier segments is moved, so it is below what was appended here.
    fn relocate(&mut self, index: u64, entry: EntryRef) -> Result<(), &'static str> {
        let appended = !self.entries.is_empty() && index >= self.first;
        let mut runs = self.relocated.iter();
        if appended || index >= self.cut_from || runs.any(|r| (r.first..r.end()).contains(&index)) {
            return Err("an entry of this segment is moved into it again");
        }
        match self.relocated.last_mut() {
            Some(run) if run.end() == index => run.entries.push_back(entry),
            _ => self.relocated.push(EntryRun {
                first: index,
                entries: VecDeque::from([entry]),
            }),
        }
        Ok(())
    }

    /// How many runs there are: its own, which may be empty, and the relocated ones.
    pub fn runs(&self) -> usize {
        1 + self.relocated.len()
    }

    /// Run 0 is what was appended here, the others what was moved here.
    pub fn run(&self, number: usize) -> (u64, &VecDeque<EntryRef>) {
        match number.checked_sub(1).and_then(|at| self.relocated.get(at)) {
            Some(run) => (run.first, &run.entries),
            None => (self.first, &self.entries),
        }
    }

    fn cut(&mut self, from: u64) {
        self.relocated.iter_mut().for_each(|run| run.cut(from));
        self.relocated.retain(|run| !run.entries.is_empty());
        self.cut_from = self.cut_from.min(from);
        self.entries
            .truncate(from.saturating_sub(self.first) as usize);
    }
}
