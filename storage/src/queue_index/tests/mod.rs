//! Tests of the queue index.

mod concurrent;
mod damage;
mod model;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::testing::TestVfs;

pub(super) struct Setup {
    pub vfs: TestVfs,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Setup {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            vfs: TestVfs::default(),
            path: dir.path().join("queues").join("7.idx"),
            _dir: dir,
        }
    }

    pub(super) fn vfs(&self) -> Arc<dyn Vfs> {
        Arc::new(self.vfs.clone())
    }

    pub(super) fn open(&self) -> QueueIndex {
        QueueIndex::open(self.vfs(), &self.path).unwrap()
    }
}

/// The record that follows `end`: one that is a function of its offset, so that readers know it.
pub(super) fn next_record(end: u64) -> IndexRecord {
    IndexRecord {
        base_offset: end,
        count: 1 + (end % 5) as u32,
        batch: (end % 3) as u16,
        log_index: 1000 + end,
        timestamp_ms: 50_000 + end / 7 * 10,
    }
}

/// Appends `count` records.
pub(super) fn fill(index: &QueueIndex, count: usize) -> Vec<IndexRecord> {
    (0..count)
        .map(|_| {
            let record = next_record(index.end_offset());
            index.append(record).unwrap();
            record
        })
        .collect()
}

#[test]
fn appended_records_are_visible_at_once_and_survive_a_sync() {
    let setup = Setup::new();
    let index = setup.open();
    assert!(index.report().created);
    assert_eq!((index.first_offset(), index.end_offset()), (0, 0));
    assert_eq!(index.find(0).unwrap(), None);
    assert_eq!(index.offset_at_time(0).unwrap(), None);
    let records = fill(&index, 250);
    for record in &records {
        for offset in record.base_offset..record.end_offset() {
            assert_eq!(index.find(offset).unwrap(), Some(*record));
            assert_eq!(
                index.timestamp_of(offset).unwrap(),
                Some(record.timestamp_ms)
            );
        }
    }
    assert_eq!(index.find_from(0, usize::MAX).unwrap(), records);
    assert_eq!(index.find(index.end_offset()).unwrap(), None);
    index.sync().unwrap();
    drop(index);
    let index = setup.open();
    assert_eq!(
        *index.report(),
        OpenReport {
            records: 250,
            checked_records: 250,
            ..OpenReport::default()
        }
    );
    assert_eq!(index.find_from(0, 300).unwrap(), records);
}

#[test]
fn refuses_records_that_do_not_follow() {
    let setup = Setup::new();
    let index = setup.open();
    let good = next_record(0);
    index.append(good).unwrap();
    let next = next_record(good.end_offset());
    for wrong in [
        good,
        IndexRecord {
            base_offset: next.base_offset + 1,
            ..next
        },
        IndexRecord { count: 0, ..next },
        IndexRecord {
            timestamp_ms: good.timestamp_ms - 1,
            ..next
        },
    ] {
        let result = index.append(wrong);
        assert!(
            matches!(result, Err(StorageError::InvalidArgument(_))),
            "{wrong:?}"
        );
    }
    index.append(next).unwrap();
    let setup = Setup::new();
    let index = QueueIndex::create_at(setup.vfs(), &setup.path, u64::MAX - 1).unwrap();
    let past_the_end = IndexRecord {
        base_offset: u64::MAX - 1,
        count: 2,
        ..good
    };
    assert!(index.append(past_the_end).is_err());
}

#[test]
fn lookups_in_a_long_uneven_index_take_few_reads_and_little_memory() {
    let setup = Setup::new();
    let index = setup.open();
    let mut records = Vec::new();
    let mut time = 0;
    for n in 0u64..60_000 {
        // Long plateaus of time and of batch size, then jumps.
        time += if n % 5_000 == 0 {
            1_000_000
        } else {
            (n / 10_000) % 2
        };
        let count = if (n / 8_000) % 2 == 0 { 1 } else { 900 };
        let record = IndexRecord {
            base_offset: index.end_offset(),
            count,
            batch: 0,
            log_index: n,
            timestamp_ms: time,
        };
        index.append(record).unwrap();
        records.push(record);
    }
    index.sync().unwrap();
    drop(index);
    let index = setup.open();
    assert!(index.report().checked_records <= 60_000);
    let reads = || setup.vfs.0.reads.load(Ordering::SeqCst);
    let (before, mut lookups, mut worst) = (reads(), 0, 0);
    for n in (0..60_000).step_by(37).chain(59_990..60_000) {
        let record = records[n * 7919 % 60_000];
        let start = reads();
        let offset = record.base_offset + u64::from(record.count) / 2;
        assert_eq!(index.find(offset).unwrap(), Some(record));
        worst = worst.max(reads() - start);
        let first = records.partition_point(|r| r.timestamp_ms < record.timestamp_ms);
        let found = index.offset_at_time(record.timestamp_ms).unwrap();
        assert_eq!(found, Some(records[first].base_offset));
        lookups += 2;
    }
    let mean = (reads() - before) as f64 / f64::from(lookups);
    assert!(mean < 3.5, "mean {mean} reads per lookup");
    assert!(worst <= 20, "worst {worst}");
    assert!(index.sample.lock().len() <= 24);
}

#[test]
fn an_index_at_rest_is_small() {
    assert!(
        size_of::<QueueIndex>() <= 400,
        "{}",
        size_of::<QueueIndex>()
    );
    let setup = Setup::new();
    let index = setup.open();
    fill(&index, 1000);
    assert!(index.state.read().tail.capacity() <= 128);
    index.sync().unwrap();
    assert_eq!(index.state.read().tail.capacity(), 0);
}

#[test]
fn sync_without_news_costs_no_fsync() {
    let setup = Setup::new();
    let index = setup.open();
    fill(&index, 3);
    let syncs = || setup.vfs.0.syncs.load(Ordering::SeqCst);
    index.sync().unwrap();
    let before = syncs();
    index.sync().unwrap();
    assert_eq!(syncs(), before);
    // Sound records found on opening may be in the page cache only.
    drop(index);
    let index = setup.open();
    index.sync().unwrap();
    assert!(syncs() > before);
}

#[test]
fn trimming_hides_at_once_and_reclaims_when_half_is_dead() {
    let setup = Setup::new();
    let index = setup.open();
    let records = fill(&index, 4000);
    let full = {
        index.sync().unwrap();
        index.disk_bytes()
    };
    let quarter = records[1000].base_offset;
    index.trim_front(quarter).unwrap();
    assert_eq!(index.disk_bytes(), full);
    assert_eq!(index.first_offset(), quarter);
    assert_eq!(index.find(quarter - 1).unwrap(), None);
    assert_eq!(index.find_from(0, 2).unwrap(), records[1000..1002]);
    assert_eq!(index.offset_at_time(0).unwrap(), Some(quarter));
    // Into the middle of a batch.
    let batch = records.iter().skip(2500).find(|r| r.count > 2).unwrap();
    let middle = batch.base_offset + 1;
    index.trim_front(middle).unwrap();
    assert!(index.disk_bytes() < full / 2);
    assert_eq!(index.first_offset(), middle);
    assert_eq!(index.find(middle).unwrap(), Some(*batch));
    assert_eq!(index.find(batch.base_offset).unwrap(), None);
    assert_eq!(index.offset_at_time(0).unwrap(), Some(middle));
    assert!(index.trim_front(index.end_offset() + 1).is_err());
    drop(index);
    let index = setup.open();
    assert_eq!(index.first_offset(), middle);
    assert_eq!(
        index.find(index.end_offset() - 1).unwrap(),
        Some(records[3999])
    );
    index.trim_front(index.end_offset()).unwrap();
    assert_eq!(index.find_from(0, 9).unwrap(), []);
    let more = fill(&index, 3);
    assert_eq!(index.find_from(0, 9).unwrap(), more);
}

#[test]
fn truncation_below_what_was_trimmed_begins_anew_there() {
    let setup = Setup::new();
    let index = setup.open();
    let records = fill(&index, 4000);
    index.trim_front(records[3000].base_offset).unwrap();
    let checkpoint = records[100].base_offset;
    assert_eq!(index.truncate_to(checkpoint).unwrap(), checkpoint);
    assert_eq!(
        (index.first_offset(), index.end_offset()),
        (checkpoint, checkpoint)
    );
    drop(index);
    let index = setup.open();
    assert_eq!(index.end_offset(), checkpoint);
    assert_eq!(fill(&index, 50), records[100..150]);
}

#[test]
fn truncation_drops_a_batch_that_straddles_the_end() {
    for sync in [false, true] {
        let setup = Setup::new();
        let index = setup.open();
        let records = fill(&index, 50);
        if sync {
            index.sync().unwrap();
        }
        let straddled = records[20..].iter().find(|r| r.count > 1).unwrap();
        let end = index.truncate_to(straddled.base_offset + 1).unwrap();
        assert_eq!(end, straddled.base_offset);
        assert_eq!(index.end_offset(), end);
        assert_eq!(index.truncate_to(end + 1000).unwrap(), end);
        index.append(*straddled).unwrap();
    }
}

#[test]
fn a_created_index_begins_where_it_is_told_and_replaces_the_old_one() {
    let setup = Setup::new();
    let index = setup.open();
    fill(&index, 500);
    index.sync().unwrap();
    let new = QueueIndex::create_at(setup.vfs(), &setup.path, 4711).unwrap();
    assert_eq!((new.first_offset(), new.end_offset()), (4711, 4711));
    let records = fill(&new, 2);
    new.sync().unwrap();
    drop(new);
    let reopened = setup.open();
    assert_eq!(reopened.find_from(0, 9).unwrap(), records);
    reopened.reset_to(9000).unwrap();
    assert_eq!(reopened.find_from(0, 9).unwrap(), []);
    assert_eq!(setup.open().first_offset(), 9000);
}
