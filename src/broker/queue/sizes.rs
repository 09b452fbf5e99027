//! How many bytes a queue's messages take, with a few places to cut at.
//!
//! Replicated, like everything that apply decides by: the same points on every replica. A point is
//! made about every [`MIN_STEP`] bytes at first; when there are too many, every other one goes and the
//! steps double. So a cut is exact to a sixteenth of what is retained, or to a step where that is
//! more, whatever the queue's size, and the table stays below a kilobyte.

use serde::{Deserialize, Serialize};

/// The least bytes between two points.
const MIN_STEP: u64 = 64 << 10;
const MOST_POINTS: usize = 64;
/// With fewer, steps may be shorter again.
const FEW_POINTS: usize = 16;

/// All bytes stored before the batch that begins at `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Point {
    offset: u64,
    before: u64,
}

/// Bytes of batches as they are stored, compressed where they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeTable {
    /// Of all batches ever stored.
    total: u64,
    step: u64,
    /// By offset. The first one is at or before the earliest retained message.
    points: Vec<Point>,
}

impl Default for SizeTable {
    fn default() -> Self {
        Self {
            total: 0,
            step: MIN_STEP,
            points: Vec::new(),
        }
    }
}

impl SizeTable {
    /// Counts the batch that begins at `offset`. True when it made a point.
    pub(super) fn add(&mut self, offset: u64, bytes: u64) -> bool {
        let before = self.total;
        self.total = before.saturating_add(bytes);
        let last = self.points.last();
        if last.is_some_and(|last| before - last.before < self.step) {
            return false;
        }
        self.points.push(Point { offset, before });
        if self.points.len() > MOST_POINTS {
            let mut place = 0;
            self.points.retain(|_| {
                place += 1;
                place % 2 == 1
            });
            self.step = self.step.saturating_mul(2);
        }
        true
    }

    /// The messages below `earliest` are gone.
    pub(super) fn trim(&mut self, earliest: u64) {
        let after = self.points.partition_point(|p| p.offset <= earliest);
        self.points.drain(..after.saturating_sub(1));
        if self.points.len() < FEW_POINTS {
            self.step = (self.step / 2).max(MIN_STEP);
        }
    }

    /// Bytes stored in batches of the queue's whole life.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes retained from the last point at or before `earliest` on.
    pub fn retained(&self, earliest: u64, end: u64) -> u64 {
        if earliest >= end {
            return 0;
        }
        let after = self.points.partition_point(|p| p.offset <= earliest);
        let from = after.checked_sub(1).and_then(|at| self.points.get(at));
        self.total
            - from
                .or(self.points.first())
                .map_or(self.total, |p| p.before)
    }

    /// The lowest point from which on at most `max_bytes` are retained. The last point where none
    /// is: what is behind it is less than a step, or one batch. None while nothing was stored.
    pub fn first_within(&self, max_bytes: u64) -> Option<u64> {
        let over = |p: &Point| self.total - p.before > max_bytes;
        let place = self.points.partition_point(over);
        let point = self.points.get(place).or(self.points.last());
        point.map(|p| p.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_near_what_was_asked_for_whatever_the_size() {
        let mut table = SizeTable::default();
        for offset in 0..100_000u64 {
            table.add(offset, 1000);
        }
        assert!(table.points.len() <= MOST_POINTS);
        assert_eq!(table.total(), 100_000_000);
        for wanted in [50_000_000u64, 10_000_000, 99_000_000] {
            let cut = table.first_within(wanted).unwrap();
            let left = table.retained(cut, 100_000);
            assert!(left <= wanted, "{left} of {wanted}");
            assert!(left + table.step + 1000 >= wanted, "{left} of {wanted}");
            assert_eq!(left, (100_000 - cut) * 1000);
        }
        assert!(table.step <= 100_000_000 / 16);
    }

    #[test]
    fn trimming_forgets_and_steps_get_shorter_again() {
        let mut table = SizeTable::default();
        for offset in 0..100_000u64 {
            table.add(offset, 1000);
        }
        let coarse = table.step;
        for offset in 100_000..101_000u64 {
            table.add(offset, 1000);
            table.trim(offset - 500);
        }
        assert!(table.step < coarse);
        assert!(table.points[0].offset <= 100_499);
        assert_eq!(table.retained(101_000, 101_000), 0);
    }

    #[test]
    fn less_than_a_point_keeps_the_newest() {
        let mut table = SizeTable::default();
        assert_eq!(table.first_within(0), None);
        table.add(0, 10 << 20);
        assert_eq!(table.first_within(1), Some(0));
        table.add(1, 10 << 20);
        assert_eq!(table.first_within(1), Some(1));
    }
}
