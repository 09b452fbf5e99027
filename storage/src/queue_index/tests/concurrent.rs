//! Readers beside the writer: every answer is right for some moment, and what was seen stays.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;

use super::*;

/// Whether `record` is one that the deterministic stream of [`next_record`] contains.
fn genuine(record: &IndexRecord) -> bool {
    *record == next_record(record.base_offset)
}

fn read_on(index: &QueueIndex, seen_end: &mut u64, turn: u64) {
    let (first, end) = (index.first_offset(), index.end_offset());
    assert!(end >= *seen_end);
    *seen_end = end;
    if end == 0 {
        return;
    }
    let offset = first + (turn * 7919) % (end - first).max(1);
    match index.find(offset).unwrap() {
        Some(record) => {
            assert!(genuine(&record));
            assert!(record.base_offset <= offset && offset < record.end_offset());
        }
        None => assert!(index.first_offset() > offset || offset >= end),
    }
    let records = index.find_from(offset, 300).unwrap();
    assert!(records.iter().all(genuine));
    for pair in records.windows(2) {
        assert_eq!(pair[0].end_offset(), pair[1].base_offset);
    }
    if let Some(record) = records.first() {
        let at = index.offset_at_time(record.timestamp_ms).unwrap();
        // No later than the record itself, unless that was trimmed meanwhile.
        let bound = record.base_offset.max(index.first_offset());
        assert!(at.is_none_or(|at| at <= bound));
        assert!(at.is_some() || index.first_offset() >= record.end_offset());
    }
    let last = index.find(end - 1).unwrap();
    assert!(last.is_some_and(|record| genuine(&record)) || index.first_offset() >= end);
}

#[test]
fn readers_are_right_while_the_writer_appends_syncs_and_reclaims() {
    let setup = Setup::new();
    let index = setup.open();
    let done = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        // A reader that fails must fail the test, not make the writer wait for it for ever.
        let mut readers = Vec::new();
        for reader in 0..3 {
            let (index, done, reads) = (&index, &done, &reads);
            readers.push(scope.spawn(move || {
                let mut seen_end = 0;
                let mut turn = reader;
                while !done.load(Ordering::SeqCst) {
                    read_on(index, &mut seen_end, turn);
                    turn += 3;
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        for n in 0..30_000u64 {
            index.append(next_record(index.end_offset())).unwrap();
            match n % 5000 {
                1111 => index.flush().unwrap(),
                2222 => index.sync().unwrap(),
                4444 => {
                    let end = index.end_offset();
                    index
                        .trim_front(end - (end - index.first_offset()) / 4)
                        .unwrap();
                }
                _ => {}
            }
        }
        while reads.load(Ordering::SeqCst) < 50 && !readers.iter().any(|r| r.is_finished()) {
            thread::yield_now();
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(
        index.disk_bytes() < 1024 + 40 * 30_000 / 2,
        "nothing was reclaimed"
    );
}

#[test]
fn readers_survive_truncation_and_appending_again() {
    let setup = Setup::new();
    let index = setup.open();
    fill(&index, 2000);
    let done = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for _ in 0..2 {
            readers.push(scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let records = index.find_from(100, 1500).unwrap();
                    assert!(records.iter().all(genuine));
                    assert_eq!(records.first().map(|r| r.base_offset <= 100), Some(true));
                    reads.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        let mut turn = 0;
        let failed = || readers.iter().any(|reader| reader.is_finished());
        while (turn < 40 || reads.load(Ordering::SeqCst) < 40) && !failed() {
            let end = index.end_offset();
            index.truncate_to(end / 2).unwrap();
            while index.end_offset() < end {
                index.append(next_record(index.end_offset())).unwrap();
            }
            turn += 1;
        }
        done.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_rewrite_in_the_middle_of_a_read_does_not_mislead_it() {
    for max_records in [1, 10] {
        let setup = Setup::new();
        let index = Arc::new(setup.open());
        let records = fill(&index, 4000);
        index.flush().unwrap();
        let (writer, keep) = (Arc::clone(&index), records[3000].base_offset);
        setup
            .vfs
            .0
            .before_read
            .set(move || writer.trim_front(keep).unwrap());
        let found = index
            .find_from(records[3500].base_offset, max_records)
            .unwrap();
        assert_eq!(found, records[3500..3500 + max_records]);
        assert_eq!(index.first_offset(), keep, "the hook did not run");
    }
}

#[test]
fn a_truncation_in_the_middle_of_a_read_is_not_taken_for_damage() {
    let setup = Setup::new();
    let index = Arc::new(setup.open());
    let records = fill(&index, 2000);
    index.flush().unwrap();
    let (writer, end) = (Arc::clone(&index), records[500].base_offset);
    setup
        .vfs
        .0
        .before_read
        .set(move || assert_eq!(writer.truncate_to(end).unwrap(), end));
    let found = index.find_from(records[1500].base_offset, 10).unwrap();
    assert_eq!(found, []);
    assert_eq!(index.end_offset(), end, "the hook did not run");
}
