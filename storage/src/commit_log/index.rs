//! Where a group's written entries are: Raft index to segment and byte.
//!
//! [`Written`] is the group as of the last frame encoded, in the order of the one stream of frames. It
//! lags behind what callers see by what is queued; everything newer is in the tail cache. Sealed
//! segments are spans that point into a sidecar file, so memory grows with segments, not with entries.

use std::collections::VecDeque;
use std::sync::Arc;

use super::frame::Content;
use super::part::{EntryRef, EntryRun, GroupPart};
use super::segment::Segment;
use super::sidecar::RECORD_BYTES;
use crate::{LogId, RaftGroupId, Vote};

/// A run of consecutive live entries in one sealed segment.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub segment: Arc<Segment>,
    pub first: u64,
    /// Inclusive.
    pub last: u64,
    pub records: Records,
}

/// Where the positions of a span's entries are.
#[derive(Debug, Clone)]
pub(super) enum Records {
    /// Until the sidecar is durable: a run of the part.
    Memory(Arc<GroupPart>, usize),
    /// Byte in the sidecar of the record of Raft index `first`.
    Sidecar { at: u64, first: u64 },
}

/// Entries next to each other, as found for a reader.
#[derive(Debug)]
pub(super) enum Run {
    Refs(Arc<Segment>, Vec<EntryRef>),
    /// `count` records from byte `at` of the segment's sidecar.
    Records {
        segment: Arc<Segment>,
        at: u64,
        count: usize,
    },
}

impl Run {
    pub fn segment(&self) -> &Segment {
        match self {
            Self::Refs(segment, _) | Self::Records { segment, .. } => segment,
        }
    }
}

/// One group as of the last frame encoded.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub vote: Option<(Vote, u64)>,
    pub purged: Option<(LogId, u64)>,
    pub last: Option<LogId>,
    spans: VecDeque<Span>,
    active: GroupPart,
    /// The segment `active` is about; none while the group has no frame in the active segment.
    active_segment: Option<Arc<Segment>>,
}

impl Written {
    /// Takes in the next frame of the group. True when it is the group's first one in `segment`.
    pub fn apply(
        &mut self,
        content: &Content,
        segment: &Arc<Segment>,
        position: u64,
        length: u32,
    ) -> Result<bool, &'static str> {
        let new = self.active_segment.is_none();
        if new {
            self.active_segment = Some(segment.clone());
        }
        let offset = (position - segment.base) as u32;
        self.active.apply(content, position, offset, length)?;
        match *content {
            Content::Entry { log_id, .. } => {
                self.cut_spans(log_id.index);
                self.last = Some(log_id);
            }
            Content::Vote(vote) => self.vote = Some((vote, position)),
            Content::Truncate { from, kept } => {
                self.cut_spans(from);
                self.last = kept;
            }
            Content::Purge(upto) => self.purge(upto, position),
            Content::Remove => {
                self.vote = None;
                self.purged = None;
                self.last = None;
                self.spans.clear();
            }
            Content::Relocated { log_id, .. } => self.take_out(log_id.index)?,
            Content::Mark { .. } => {}
        }
        Ok(new)
    }

    /// Takes in a whole segment's effect; used by recovery, segment by segment. The part's runs follow
    /// with [`Written::insert`].
    pub fn absorb(&mut self, part: &GroupPart) {
        if part.removed {
            *self = Self::default();
        }
        self.cut_spans(part.cut_from);
        if let Some(vote) = part.vote {
            self.vote = Some(vote);
        }
        if let Some(last) = part.last {
            self.last = last;
        }
        if let Some((upto, position)) = part.purged {
            self.purge(upto, position);
        }
        for run in &part.relocated {
            if let Some(last) = run.last() {
                self.raise_last(last);
            }
        }
    }

    /// Adds a run of entries. Where it has the same entries as an older one it is their new place.
    pub fn insert(&mut self, span: Span) {
        self.displace(span.first, span.last);
        let place = self.spans.partition_point(|s| s.first < span.first);
        self.spans.insert(place, span);
    }

    fn displace(&mut self, first: u64, last: u64) {
        let mut place = self.spans.partition_point(|span| span.last < first);
        while let Some(span) = self.spans.get_mut(place)
            && span.first <= last
        {
            let after = (span.last > last).then(|| Span {
                first: last + 1,
                ..span.clone()
            });
            if span.first < first {
                span.last = first - 1;
                place += 1;
            } else {
                self.spans.remove(place);
            }
            if let Some(after) = after {
                self.spans.insert(place, after);
                return;
            }
        }
    }

    /// The place of the first entry of its run does not count any more.
    fn take_out(&mut self, index: u64) -> Result<(), &'static str> {
        let after = self.spans.partition_point(|span| span.first <= index);
        let place = after.checked_sub(1);
        let span = place.and_then(|place| self.spans.get_mut(place));
        match (place, span) {
            (Some(_), Some(span)) if span.first == index && span.last > index => span.first += 1,
            (Some(place), Some(span)) if span.first == index => drop(self.spans.remove(place)),
            _ => return Err("an entry was moved that is not the first of its run"),
        }
        Ok(())
    }

    /// Whether the place that counts for an entry is in this sealed segment.
    pub fn has_in(&self, segment: &Segment, index: u64) -> bool {
        let after = self.spans.partition_point(|span| span.first <= index);
        let span = after.checked_sub(1).and_then(|place| self.spans.get(place));
        span.is_some_and(|span| index <= span.last && span.segment.base == segment.base)
    }

    /// Whether the entry is the first one left of a run in this segment.
    pub fn begins_run_in(&self, segment: &Segment, index: u64) -> bool {
        let place = self.spans.partition_point(|span| span.first < index);
        let span = self.spans.get(place);
        span.is_some_and(|span| span.first == index && span.segment.base == segment.base)
    }

    /// The live runs in a sealed segment, as first and last index.
    pub fn runs_in(&self, segment: &Segment) -> Vec<(u64, u64)> {
        let here = |span: &&Span| span.segment.base == segment.base;
        let here = self.spans.iter().filter(here);
        here.map(|span| (span.first, span.last)).collect()
    }

    /// The bases of the sealed segments with live entries, each once or more often.
    pub fn live_segments(&self) -> impl Iterator<Item = u64> {
        self.spans.iter().map(|span| span.segment.base)
    }

    /// A live entry was moved; what said that it is the last one may have gone with its segment.
    pub fn raise_last(&mut self, moved: LogId) {
        if self.last.is_none_or(|last| last.index < moved.index) {
            self.last = Some(moved);
        }
    }

    /// Takes in the part of the segment that will be written on.
    pub fn absorb_active(&mut self, part: GroupPart, segment: &Arc<Segment>) {
        self.absorb(&part);
        for (first, last) in part.relocated.iter().map(bounds) {
            self.displace(first, last);
        }
        self.active = part;
        self.active_segment = Some(segment.clone());
    }

    /// Raft index of the first live entry.
    pub fn first(&self) -> Option<u64> {
        let active = (!self.active.entries.is_empty()).then_some(self.active.first);
        let moved = self.active.relocated.iter().map(|run| run.first);
        let sealed = self.spans.front().map(|span| span.first);
        sealed.into_iter().chain(active).chain(moved).min()
    }

    /// Ends the active segment: its part becomes a span and is handed out for the sidecar.
    pub fn seal(&mut self) -> Option<Arc<GroupPart>> {
        let segment = self.active_segment.take()?;
        let part = Arc::new(std::mem::take(&mut self.active));
        for span in memory_spans(&segment, &part) {
            self.insert(span);
        }
        Some(part)
    }

    /// From now on the positions in `segment` are read from its sidecar. `places` says where in it
    /// each run begins.
    pub fn sidecar_is_durable(&mut self, segment: &Segment, places: &[u64]) {
        for span in &mut self.spans {
            if span.segment.base == segment.base
                && let Records::Memory(part, run) = &span.records
                && let Some(at) = places.get(*run)
            {
                let (first, _) = part.run(*run);
                span.records = Records::Sidecar { at: *at, first };
            }
        }
    }

    /// Finds `index` and up to `limit` entries behind it that are in the same place.
    pub fn find(&self, index: u64, limit: usize) -> Option<Run> {
        if let Some(segment) = &self.active_segment
            && !self.active.entries.is_empty()
            && index >= self.active.first
        {
            let refs = refs_from(self.active.run(0), index, u64::MAX, limit);
            return (!refs.is_empty()).then(|| Run::Refs(segment.clone(), refs));
        }
        if let Some(segment) = &self.active_segment {
            for run in 1..self.active.runs() {
                let refs = refs_from(self.active.run(run), index, u64::MAX, limit);
                if !refs.is_empty() {
                    return Some(Run::Refs(segment.clone(), refs));
                }
            }
        }
        let after = self.spans.partition_point(|span| span.first <= index);
        let span = self.spans.get(after.checked_sub(1)?)?;
        if index > span.last {
            return None;
        }
        match &span.records {
            Records::Memory(part, run) => Some(Run::Refs(
                span.segment.clone(),
                refs_from(part.run(*run), index, span.last, limit),
            )),
            Records::Sidecar { at, first } => Some(Run::Records {
                segment: span.segment.clone(),
                at: at + (index - first) * RECORD_BYTES,
                count: limit.min((span.last - index + 1) as usize),
            }),
        }
    }

    /// True when an entry, the vote or the purge of this group lies in the segment.
    pub fn lives_in(&self, segment: &Segment) -> Live {
        let inside = |position: u64| (segment.base..segment.end()).contains(&position);
        Live {
            entries: self
                .spans
                .iter()
                .any(|span| span.segment.base == segment.base),
            small: self.vote.is_some_and(|(_, at)| inside(at))
                || self.purged.is_some_and(|(_, at)| inside(at)),
        }
    }

    /// Whether the runs of entries are without holes up to `last`; what is wrong, if not.
    pub fn check(&self, group: RaftGroupId) -> Result<(), String> {
        let mut next = self.purged.map(|(upto, _)| upto.index + 1);
        let active = (!self.active.entries.is_empty()).then(|| {
            let first = self.active.first;
            (first, first + self.active.entries.len() as u64 - 1)
        });
        let sealed = self.spans.iter().map(|span| (span.first, span.last));
        let moved = self.active.relocated.iter().map(bounds);
        let mut runs: Vec<(u64, u64)> = sealed.chain(moved).chain(active).collect();
        runs.sort_unstable();
        for (first, last) in runs {
            if next.is_some_and(|next| next != first) {
                return Err(format!(
                    "entries of {group} before index {first} are missing"
                ));
            }
            next = Some(last + 1);
        }
        if next != self.last.map(|last| last.index + 1) {
            return Err(format!("the last entries of {group} are missing"));
        }
        Ok(())
    }

    fn purge(&mut self, upto: LogId, position: u64) {
        self.purged = Some((upto, position));
        while let Some(front) = self.spans.front_mut() {
            if front.last > upto.index {
                front.first = front.first.max(upto.index + 1);
                break;
            }
            self.spans.pop_front();
        }
        if self.last.is_none_or(|last| last.index < upto.index) {
            self.last = Some(upto);
        }
    }

    fn cut_spans(&mut self, from: u64) {
        while let Some(back) = self.spans.back_mut() {
            if back.first < from {
                back.last = back.last.min(from - 1);
                break;
            }
            self.spans.pop_back();
        }
    }
}

/// What of a group keeps a segment alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Live {
    pub entries: bool,
    /// Its vote or its purge: can be written again at the head.
    pub small: bool,
}

/// The spans of a part whose sidecar is not there yet; none of runs without entries.
pub(super) fn memory_spans(segment: &Arc<Segment>, part: &Arc<GroupPart>) -> Vec<Span> {
    let span = |run| {
        let (first, entries) = part.run(run);
        (!entries.is_empty()).then(|| Span {
            segment: segment.clone(),
            first,
            last: first + entries.len() as u64 - 1,
            records: Records::Memory(part.clone(), run),
        })
    };
    (0..part.runs()).filter_map(span).collect()
}

/// First and last index. Relocated runs are never empty.
fn bounds(run: &EntryRun) -> (u64, u64) {
    (run.first, run.first + run.entries.len() as u64 - 1)
}

fn refs_from(
    (first, entries): (u64, &VecDeque<EntryRef>),
    index: u64,
    last: u64,
    limit: usize,
) -> Vec<EntryRef> {
    let Some(skip) = index.checked_sub(first) else {
        return Vec::new();
    };
    let count = limit.min((last - index).saturating_add(1) as usize);
    let skip = entries.len().min(skip as usize);
    let end = entries.len().min(skip.saturating_add(count));
    entries.range(skip..end).copied().collect()
}
