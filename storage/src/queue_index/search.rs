//! Finding a place in the file by offset or time: interpolation between known places, a few
//! small reads, bisection as the bound when the keys are spread unevenly.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::IndexRecord;
use super::file::read_records;
use super::sample::{Point, Sample};
use crate::StorageError;
use crate::vfs::VfsFile;

/// Records read by one probe: just below 4 KiB.
const WINDOW: u64 = 96;

/// What is searched for: the first record whose key is not below the bound.
#[derive(Debug, Clone, Copy)]
pub(super) enum Goal {
    BaseOffsetAtLeast(u64),
    TimestampAtLeast(u64),
}

impl Goal {
    fn bound(self) -> u64 {
        match self {
            Self::BaseOffsetAtLeast(bound) | Self::TimestampAtLeast(bound) => bound,
        }
    }

    fn key(self, record: &IndexRecord) -> u64 {
        match self {
            Self::BaseOffsetAtLeast(_) => record.base_offset,
            Self::TimestampAtLeast(_) => record.timestamp_ms,
        }
    }

    fn point_key(self, point: &Point) -> u64 {
        match self {
            Self::BaseOffsetAtLeast(_) => point.offset,
            Self::TimestampAtLeast(_) => point.timestamp_ms,
        }
    }
}

/// The file as it was when a search began. Records before `written` never change within an
/// epoch; the searcher checks the epoch again before it believes an answer or an error.
#[derive(Debug, Clone)]
pub(super) struct FileView {
    pub file: Arc<dyn VfsFile>,
    pub epoch: u64,
    pub from: u64,
    pub written: u64,
    /// Keys that the first record after `written` has, or would have at least.
    pub end: Point,
}

/// Where the goal is, and the records of the last probe, which are mostly wanted next.
#[derive(Debug)]
pub(super) struct Hit {
    pub ordinal: u64,
    window_start: u64,
    window: Vec<IndexRecord>,
}

impl Hit {
    /// Record `ordinal`, if the last probe happened to read it.
    pub(super) fn record(&self, ordinal: u64) -> Option<IndexRecord> {
        let place = ordinal.checked_sub(self.window_start)?;
        self.window.get(usize::try_from(place).ok()?).copied()
    }
}

/// Finds the goal in records `view.from..view.written`; `view.written` if all are below it.
pub(super) fn search(
    view: &FileView,
    path: &Path,
    sample: &Mutex<Sample>,
    goal: Goal,
) -> Result<Hit, StorageError> {
    let bound = goal.bound();
    let (below, above) = sample
        .lock()
        .around(view.epoch, bound, |point| goal.point_key(point));
    // All records before `lo` are below the bound, all from `hi` on are not.
    let (mut lo, mut lo_key) = (view.from, None);
    let (mut hi, mut hi_key) = (view.written, goal.point_key(&view.end));
    if let Some(point) = below.filter(|point| point.ordinal >= view.from) {
        (lo, lo_key) = (point.ordinal.min(hi), Some(goal.point_key(&point)));
    }
    if let Some(point) = above.filter(|point| (lo..hi).contains(&point.ordinal)) {
        (hi, hi_key) = (point.ordinal, goal.point_key(&point));
    }
    let (mut window_start, mut window) = (lo, Vec::new());
    let mut probes = 0;
    while lo < hi {
        let count = WINDOW.min(hi - lo);
        let guess = match lo_key {
            // Nothing is known of the front yet.
            None => lo,
            Some(_) if probes > 2 && probes % 2 == 1 => lo + (hi - lo) / 2,
            Some(lo_key) => interpolate(lo, hi, lo_key, hi_key, bound),
        };
        let start = guess.saturating_sub(count / 2).clamp(lo, hi - count);
        window = read_records(&*view.file, path, start, count as usize)?;
        window_start = start;
        sample.lock().learn(view.epoch, start, &window[0]);
        let below = window.partition_point(|record| goal.key(record) < bound);
        if below == window.len() {
            lo = start + count;
            lo_key = window.last().map(|record| goal.key(record));
        } else if below == 0 {
            hi = start;
            hi_key = goal.key(&window[0]);
        } else {
            (lo, hi) = (start + below as u64, start + below as u64);
        }
        probes += 1;
    }
    Ok(Hit {
        ordinal: lo,
        window_start,
        window,
    })
}

fn interpolate(lo: u64, hi: u64, lo_key: u64, hi_key: u64, bound: u64) -> u64 {
    let span = u128::from(hi_key.saturating_sub(lo_key)).max(1);
    let part = u128::from(bound.saturating_sub(lo_key)).min(span);
    // At most hi - lo, so it fits.
    lo + (u128::from(hi - lo) * part / span) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpolation_stays_inside_and_is_exact_for_even_keys() {
        assert_eq!(interpolate(0, 1000, 0, 5000, 2500), 500);
        assert_eq!(interpolate(10, 20, 7, 7, 9), 20);
        assert_eq!(interpolate(10, 20, 7, 3, 1), 10);
        assert_eq!(interpolate(0, u64::MAX, 0, u64::MAX, u64::MAX), u64::MAX);
    }
}
