//! A few remembered places in the file, so that a search starts near its goal.

use super::IndexRecord;

/// Points kept: 24 of 24 bytes. Few suffice, because the search interpolates between them.
const MOST_POINTS: usize = 24;

/// The keys of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Point {
    pub ordinal: u64,
    pub offset: u64,
    pub timestamp_ms: u64,
}

/// Points in file order, about evenly spread. They belong to one epoch of the file; those of
/// another are refused, so that a slow reader can't add places that no longer exist.
#[derive(Debug, Default)]
pub(super) struct Sample {
    epoch: u64,
    points: Vec<Point>,
}

impl Sample {
    pub(super) fn reset(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.points = Vec::new();
    }

    pub(super) fn learn(&mut self, epoch: u64, ordinal: u64, record: &IndexRecord) {
        if epoch != self.epoch {
            return;
        }
        let Err(place) = self.points.binary_search_by_key(&ordinal, |p| p.ordinal) else {
            return;
        };
        let point = Point {
            ordinal,
            offset: record.base_offset,
            timestamp_ms: record.timestamp_ms,
        };
        self.points.insert(place, point);
        if self.points.len() > MOST_POINTS {
            self.forget_most_crowded();
        }
    }

    /// The nearest points on both sides of where `key` passes `bound`: the last one below it and
    /// the first one not below.
    pub(super) fn around(
        &self,
        epoch: u64,
        bound: u64,
        key: impl Fn(&Point) -> u64,
    ) -> (Option<Point>, Option<Point>) {
        if epoch != self.epoch {
            return (None, None);
        }
        let place = self.points.partition_point(|point| key(point) < bound);
        let below = place.checked_sub(1).map(|before| self.points[before]);
        (below, self.points.get(place).copied())
    }

    fn forget_most_crowded(&mut self) {
        let crowded = self
            .points
            .windows(3)
            .enumerate()
            .min_by_key(|(_, three)| three[2].ordinal - three[0].ordinal)
            .map(|(before, _)| before + 1);
        if let Some(place) = crowded {
            self.points.remove(place);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.points.len()
    }
}
