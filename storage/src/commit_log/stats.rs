//! Counters of the log, kept with plain atomics and read as one snapshot.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the fsync histogram in nanoseconds; one more bucket holds what is slower.
pub const FSYNC_BUCKETS_NS: [u64; 14] = [
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
];

/// One reading of the log's counters.
#[derive(Debug, Clone, Default)]
pub struct CommitLogStats {
    pub writes: u64,
    pub fsyncs: u64,
    /// Bytes written into segments, frames and marks.
    pub written_bytes: u64,
    pub frames: u64,
    pub entries: u64,
    /// Bytes queued and not yet written.
    pub queued_bytes: u64,
    pub segments: u64,
    /// Space the segment files take.
    pub disk_bytes: u64,
    /// Bytes held by the tail cache.
    pub cached_bytes: u64,
    pub evicted_bytes: u64,
    /// Reads that went to disk, and their bytes.
    pub disk_reads: u64,
    pub disk_read_bytes: u64,
    /// Segments removed by cleaning.
    pub cleaned_segments: u64,
    pub fsync_last_ns: u64,
    pub fsync_max_ns: u64,
    pub fsync_sum_ns: u64,
    /// Counts per bucket of [`FSYNC_BUCKETS_NS`], not cumulated.
    pub fsync_buckets: [u64; FSYNC_BUCKETS_NS.len() + 1],
    /// Everything below this position of the log is on disk.
    pub durable_end: u64,
    /// Where the next frame goes.
    pub end: u64,
    /// Why the log stopped, if it did.
    pub poisoned: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct Stats {
    pub writes: AtomicU64,
    pub written_bytes: AtomicU64,
    pub frames: AtomicU64,
    pub entries: AtomicU64,
    pub cleaned_segments: AtomicU64,
    pub durable_end: AtomicU64,
    pub end: AtomicU64,
    disk_reads: AtomicU64,
    disk_read_bytes: AtomicU64,
    fsyncs: AtomicU64,
    fsync_last_ns: AtomicU64,
    fsync_max_ns: AtomicU64,
    fsync_sum_ns: AtomicU64,
    fsync_buckets: [AtomicU64; FSYNC_BUCKETS_NS.len() + 1],
}

impl Stats {
    pub fn fsynced(&self, took: Duration) {
        let ns = took.as_nanos() as u64;
        let bucket = FSYNC_BUCKETS_NS.partition_point(|bound| *bound < ns);
        self.fsync_buckets[bucket].fetch_add(1, Relaxed);
        self.fsyncs.fetch_add(1, Relaxed);
        self.fsync_sum_ns.fetch_add(ns, Relaxed);
        self.fsync_last_ns.store(ns, Relaxed);
        self.fsync_max_ns.fetch_max(ns, Relaxed);
    }

    pub fn disk_read(&self, bytes: usize) {
        self.disk_reads.fetch_add(1, Relaxed);
        self.disk_read_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// The counters kept here; the caller fills in the rest.
    pub fn read(&self) -> CommitLogStats {
        CommitLogStats {
            writes: self.writes.load(Relaxed),
            fsyncs: self.fsyncs.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            frames: self.frames.load(Relaxed),
            entries: self.entries.load(Relaxed),
            disk_reads: self.disk_reads.load(Relaxed),
            disk_read_bytes: self.disk_read_bytes.load(Relaxed),
            cleaned_segments: self.cleaned_segments.load(Relaxed),
            fsync_last_ns: self.fsync_last_ns.load(Relaxed),
            fsync_max_ns: self.fsync_max_ns.load(Relaxed),
            fsync_sum_ns: self.fsync_sum_ns.load(Relaxed),
            fsync_buckets: std::array::from_fn(|i| self.fsync_buckets[i].load(Relaxed)),
            durable_end: self.durable_end.load(Relaxed),
            end: self.end.load(Relaxed),
            ..CommitLogStats::default()
        }
    }
}
