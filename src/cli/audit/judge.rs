//! What one queue's batches, read in order, say about its producers.
//!
//! Sequences count messages from 0 to 2147483647, then from 0 again; here they are positions that
//! only grow. A producer's first batch that is seen is its start, unless the queue was read from
//! offset 0. What is missing is a gap; a batch that fills one later was late, as delayed messages and
//! those of transactions are, and not lost.

use std::collections::{BTreeMap, HashMap};

use quorate_storage::batch::ProducerStamp;
use serde::Serialize;

/// Sequences in one round.
const ROUND: u64 = 1 << 31;
/// The queue forgets a producer that is silent for so long; it then begins again at 0.
const FORGOTTEN_AFTER_MS: u64 = 7 * 24 * 3_600_000;
/// Of one producer; beyond, gaps are counted and what fills them is not known any more.
const MAX_OPEN_GAPS: usize = 64;

/// Bounds of what is kept in memory.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub producers: usize,
    pub findings: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Offsets that no message has.
    OffsetHole,
    /// An offset that a message before it has.
    OffsetTwice,
    /// Sequences that no visible message has: lost, or held and not visible (yet).
    Gap,
    /// A sequence that a message before it has.
    Duplicate,
    /// A message that was stored after its producer's epoch was over.
    OldEpoch,
    /// Messages that were removed before the consumer group had consumed them.
    RemovedUnread,
    /// A committed offset beyond the end.
    CommittedBeyondEnd,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub queue: u32,
    pub kind: Kind,
    /// Where it was noticed.
    pub offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub producer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i16>,
    pub detail: String,
}

/// A message of an epoch that was over when it became visible: late, if it was stored before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doubt {
    pub offset: u64,
    pub count: u64,
    pub producer: i64,
    pub epoch: i16,
    /// The first message of the next epoch.
    pub next_epoch_at: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub messages: u64,
    /// Of idempotent producers.
    pub numbered: u64,
    /// Pairs of producer and epoch.
    pub producers: u64,
    pub gaps: u64,
    pub missing: u64,
    pub duplicates: u64,
    pub late: u64,
    pub old_epoch: u64,
    pub offset_faults: u64,
    /// Offsets that retention removed while they were read.
    pub removed_meanwhile: u64,
}

#[derive(Debug)]
struct Seen {
    epoch: i16,
    /// Offset of the epoch's first message.
    began_at: u64,
    first: u64,
    next: u64,
    /// From → to, of what is missing between `first` and `next`.
    gaps: BTreeMap<u64, u64>,
    last_offset: u64,
    last_ms: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    queue: u32,
    limits: Limits,
    /// Whether everything from offset 0 is seen, so that every producer begins at sequence 0.
    is_whole: bool,
    next_offset: Option<u64>,
    producers: HashMap<i64, Seen>,
    pub totals: Totals,
    pub findings: Vec<Finding>,
    pub doubts: Vec<Doubt>,
}

/// One batch as it was read.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    pub base_offset: u64,
    pub count: u32,
    pub timestamp_ms: u64,
    pub producer: Option<ProducerStamp>,
}

impl Judge {
    pub fn new(queue: u32, is_whole: bool, limits: Limits) -> Self {
        Self {
            queue,
            limits,
            is_whole,
            next_offset: None,
            producers: HashMap::new(),
            totals: Totals::default(),
            findings: Vec::new(),
            doubts: Vec::new(),
        }
    }

    pub fn batch(&mut self, batch: Batch) {
        self.totals.messages += u64::from(batch.count);
        self.offsets(&batch);
        if let Some(stamp) = batch.producer {
            self.totals.numbered += u64::from(batch.count);
            self.sequences(&batch, stamp);
        }
    }

    fn offsets(&mut self, batch: &Batch) {
        let end = batch.base_offset + u64::from(batch.count);
        if let Some(expected) = self.next_offset
            && expected != batch.base_offset
        {
            let (kind, detail) = match expected < batch.base_offset {
                true => {
                    let hole = format!("{expected} to {}", batch.base_offset - 1);
                    (
                        Kind::OffsetHole,
                        format!("no message has the offsets {hole}"),
                    )
                }
                false => (Kind::OffsetTwice, format!("{expected} was to come next")),
            };
            self.totals.offset_faults += 1;
            self.report(kind, batch.base_offset, None, detail);
        }
        self.next_offset = Some(self.next_offset.map_or(end, |next| next.max(end)));
    }

    fn sequences(&mut self, batch: &Batch, stamp: ProducerStamp) {
        let sequence = u64::from(stamp.base_sequence.unsigned_abs());
        let count = u64::from(batch.count);
        let Some(mut seen) = self.producers.remove(&stamp.id) else {
            self.make_room();
            let begin = if self.is_whole { 0 } else { sequence };
            let seen = self.begin(batch, stamp, begin);
            self.producers.insert(stamp.id, seen);
            return;
        };
        let silent_ms = batch.timestamp_ms.saturating_sub(seen.last_ms);
        let is_new_life = sequence == 0 && silent_ms >= FORGOTTEN_AFTER_MS;
        if stamp.epoch > seen.epoch || (stamp.epoch == seen.epoch && is_new_life) {
            self.close(stamp.id, &seen);
            seen = self.begin(batch, stamp, 0);
        } else if stamp.epoch < seen.epoch {
            let doubt = Doubt {
                offset: batch.base_offset,
                count,
                producer: stamp.id,
                epoch: stamp.epoch,
                next_epoch_at: seen.began_at,
            };
            match self.doubts.len() < self.limits.findings {
                true => self.doubts.push(doubt),
                false => self.totals.late += count,
            }
        } else {
            self.follow(&mut seen, batch, stamp, sequence);
            seen.last_offset = batch.base_offset;
            seen.last_ms = batch.timestamp_ms;
        }
        self.producers.insert(stamp.id, seen);
    }

    /// The state behind a producer's first batch in an epoch, which was to have sequence `begin`.
    fn begin(&mut self, batch: &Batch, stamp: ProducerStamp, begin: u64) -> Seen {
        self.totals.producers += 1;
        let mut seen = Seen {
            epoch: stamp.epoch,
            began_at: batch.base_offset,
            // A round above zero, so that what came before can be told.
            first: ROUND + begin,
            next: ROUND + begin,
            gaps: BTreeMap::new(),
            last_offset: batch.base_offset,
            last_ms: batch.timestamp_ms,
        };
        let sequence = u64::from(stamp.base_sequence.unsigned_abs());
        self.follow(&mut seen, batch, stamp, sequence);
        seen
    }

    /// A batch of the epoch that is known.
    fn follow(&mut self, seen: &mut Seen, batch: &Batch, stamp: ProducerStamp, sequence: u64) {
        let count = u64::from(batch.count);
        let ahead = (sequence + ROUND - seen.next % ROUND) % ROUND;
        if ahead < ROUND / 2 {
            let at = seen.next + ahead;
            if ahead > 0 {
                self.open_gap(seen, batch, stamp, at);
            }
            seen.next = at + count;
            return;
        }
        let from = (seen.next + ahead).saturating_sub(ROUND);
        let to = from + count;
        // Before the first one that was seen: the start is where reading began.
        let before = seen.first.min(to).saturating_sub(from.min(seen.first));
        let filled = fill(&mut seen.gaps, from, to);
        self.totals.late += before + filled;
        self.totals.missing = self.totals.missing.saturating_sub(filled);
        let beyond = to.saturating_sub(seen.next);
        let again = count.saturating_sub(before + filled + beyond);
        if again > 0 {
            self.totals.duplicates += again;
            let detail =
                format!("sequence {sequence}: {again} of {count} messages were there before");
            self.report(Kind::Duplicate, batch.base_offset, Some(stamp), detail);
        }
        seen.next = seen.next.max(to);
    }

    fn open_gap(&mut self, seen: &mut Seen, batch: &Batch, stamp: ProducerStamp, to: u64) {
        self.totals.missing += to - seen.next;
        if seen.gaps.len() == MAX_OPEN_GAPS
            && let Some((from, to)) = seen.gaps.pop_first()
        {
            self.report_gap(batch.base_offset, stamp.id, stamp.epoch, from, to);
        }
        seen.gaps.insert(seen.next, to);
    }

    /// Nothing more is to come of this epoch.
    fn close(&mut self, producer: i64, seen: &Seen) {
        for (from, to) in &seen.gaps {
            self.report_gap(seen.last_offset, producer, seen.epoch, *from, *to);
        }
    }

    fn report_gap(&mut self, offset: u64, producer: i64, epoch: i16, from: u64, to: u64) {
        self.totals.gaps += 1;
        let (first, last) = (from % ROUND, (to - 1) % ROUND);
        let stamp = ProducerStamp {
            id: producer,
            epoch,
            base_sequence: 0,
        };
        let detail = match to - from {
            1 => format!("sequence {first} is missing: lost, or held and not visible"),
            n => format!(
                "sequences {first} to {last} ({n}) are missing: lost, or held and not visible"
            ),
        };
        self.report(Kind::Gap, offset, Some(stamp), detail);
    }

    fn report(&mut self, kind: Kind, offset: u64, stamp: Option<ProducerStamp>, detail: String) {
        if self.findings.len() < self.limits.findings {
            self.findings.push(Finding {
                queue: self.queue,
                kind,
                offset,
                producer: stamp.map(|stamp| stamp.id.to_string()),
                epoch: stamp.map(|stamp| stamp.epoch),
                detail,
            });
        }
    }

    /// Forgets the producers that were silent for longest; they count as new when they come again.
    fn make_room(&mut self) {
        if self.producers.len() < self.limits.producers {
            return;
        }
        let mut last: Vec<u64> = self.producers.values().map(|p| p.last_offset).collect();
        let middle = last.len() / 2;
        let (_, median, _) = last.select_nth_unstable(middle);
        let median = *median;
        let old = self
            .producers
            .extract_if(|_, seen| seen.last_offset <= median);
        let old: Vec<_> = old.collect();
        self.is_whole = false;
        for (producer, seen) in old {
            self.close(producer, &seen);
        }
    }

    /// Retention removed what was to be read next: what follows is a new beginning.
    pub fn cut(&mut self, offset: u64) {
        if let Some(expected) = self.next_offset {
            self.totals.removed_meanwhile += offset.saturating_sub(expected);
        }
        self.next_offset = None;
        self.is_whole = false;
        self.close_all();
    }

    /// A doubt's answer: the message was stored before its epoch ended, or after.
    pub fn settle(&mut self, doubt: &Doubt, was_stored_before: bool) {
        if was_stored_before {
            self.totals.late += doubt.count;
            return;
        }
        self.totals.old_epoch += doubt.count;
        let stamp = ProducerStamp {
            id: doubt.producer,
            epoch: doubt.epoch,
            base_sequence: 0,
        };
        let detail = format!(
            "stored after the next epoch began at offset {}",
            doubt.next_epoch_at
        );
        self.report(Kind::OldEpoch, doubt.offset, Some(stamp), detail);
    }

    fn close_all(&mut self) {
        let producers = std::mem::take(&mut self.producers);
        let mut producers: Vec<_> = producers.into_iter().collect();
        producers.sort_unstable_by_key(|(id, _)| *id);
        for (producer, seen) in &producers {
            self.close(*producer, seen);
        }
    }

    /// Everything was read.
    pub fn finish(&mut self) {
        self.close_all();
        self.findings.sort_by_key(|finding| finding.offset);
    }
}

/// Takes `from..to` out of the gaps; how much of it was in them.
fn fill(gaps: &mut BTreeMap<u64, u64>, from: u64, to: u64) -> u64 {
    let touched: Vec<(u64, u64)> = gaps
        .range(..to)
        .rev()
        .take_while(|(_, gap_to)| **gap_to > from)
        .map(|(gap_from, gap_to)| (*gap_from, *gap_to))
        .collect();
    let mut filled = 0;
    for (gap_from, gap_to) in touched {
        gaps.remove(&gap_from);
        if gap_from < from {
            gaps.insert(gap_from, from);
        }
        if to < gap_to {
            gaps.insert(to, gap_to);
        }
        filled += gap_to.min(to) - gap_from.max(from);
    }
    filled
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
