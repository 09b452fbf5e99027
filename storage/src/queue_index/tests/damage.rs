//! Torn, short, stale and flipped bytes; failing disks.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use super::super::format::{RECORD_BYTES, record_position};
use super::*;

fn overwrite(setup: &Setup, position: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(&setup.path).unwrap();
    file.write_all_at(bytes, position).unwrap();
}

fn flip(setup: &Setup, position: u64) {
    let bytes = fs::read(&setup.path).unwrap();
    overwrite(setup, position, &[bytes[position as usize] ^ 0x10]);
}

fn is_damaged<T: std::fmt::Debug>(result: Result<T, StorageError>) -> bool {
    matches!(result, Err(StorageError::Damaged { .. }))
}

/// An index of 3000 records of which 1000 were durable at the last sync but one.
fn prepared(setup: &Setup) -> Vec<IndexRecord> {
    let index = setup.open();
    let mut records = fill(&index, 1000);
    index.sync().unwrap();
    records.extend(fill(&index, 1000));
    index.sync().unwrap();
    records.extend(fill(&index, 1000));
    index.flush().unwrap();
    records
}

#[test]
fn every_flipped_byte_of_a_durable_record_is_noticed_when_it_is_read() {
    let setup = Setup::new();
    let records = prepared(&setup);
    for byte in 0..RECORD_BYTES as u64 {
        let position = record_position(500) + byte;
        flip(&setup, position);
        let index = setup.open();
        assert!(
            is_damaged(index.find(records[500].base_offset)),
            "byte {byte}"
        );
        assert!(is_damaged(index.find_from(records[490].base_offset, 20)));
        assert_eq!(
            index.find(records[1500].base_offset).unwrap(),
            Some(records[1500])
        );
        let (sound_end, fault) = index.check().unwrap();
        assert_eq!(sound_end, records[499].end_offset());
        assert!(matches!(fault, Some(StorageError::Damaged { .. })));
        flip(&setup, position);
    }
}

#[test]
fn only_what_was_not_yet_durable_is_looked_at_on_opening() {
    let setup = Setup::new();
    prepared(&setup);
    let index = setup.open();
    assert_eq!(index.report().checked_records, 2001);
    assert_eq!(index.report().records, 3000);
}

#[test]
fn a_bad_record_in_the_doubtful_part_ends_the_sound_prefix() {
    for place in [1000u64, 1001, 1777, 2999] {
        let setup = Setup::new();
        let records = prepared(&setup);
        flip(&setup, record_position(place) + 3);
        let index = setup.open();
        let report = index.report();
        assert_eq!(report.records, place);
        assert_eq!(report.discarded_bytes, (3000 - place) * RECORD_BYTES as u64);
        assert!(report.fault.is_some() && !report.durable_loss);
        assert_eq!(index.end_offset(), records[place as usize].base_offset);
        // What came after must not come back.
        assert_eq!(
            fill(&index, 3000 - place as usize),
            records[place as usize..]
        );
        index.sync().unwrap();
        drop(index);
        assert_eq!(setup.open().find_from(0, 5000).unwrap(), records);
    }
}

#[test]
fn damage_to_the_last_durable_record_is_told_apart_from_a_crash() {
    let setup = Setup::new();
    let records = prepared(&setup);
    flip(&setup, record_position(999));
    let index = setup.open();
    assert!(index.report().durable_loss);
    assert_eq!(index.end_offset(), records[999].base_offset);
}

#[test]
fn torn_zeroed_and_garbage_ends_are_cut_off() {
    for (garbage, torn) in [(vec![0u8; 4096], 0), (vec![0xa5; 60], 0), (vec![], 13)] {
        let setup = Setup::new();
        let records = prepared(&setup);
        let len = fs::metadata(&setup.path).unwrap().len();
        let file = OpenOptions::new().write(true).open(&setup.path).unwrap();
        file.write_all_at(&garbage, len).unwrap();
        if torn > 0 {
            file.set_len(len - torn).unwrap();
        }
        let sound = if torn > 0 { 2999 } else { 3000 };
        let index = setup.open();
        assert_eq!(index.report().records, sound);
        assert!(index.report().discarded_bytes > 0);
        assert_eq!(index.find_from(0, 4000).unwrap(), records[..sound as usize]);
        assert_eq!(
            fs::metadata(&setup.path).unwrap().len(),
            record_position(sound)
        );
    }
}

#[test]
fn a_file_shorter_than_its_checkpoint_says_what_to_append_again() {
    let setup = Setup::new();
    let records = prepared(&setup);
    let file = OpenOptions::new().write(true).open(&setup.path).unwrap();
    file.set_len(record_position(700) + 9).unwrap();
    let index = setup.open();
    assert!(index.report().durable_loss);
    let end = index.truncate_to(records[2500].base_offset).unwrap();
    assert_eq!(end, records[700].base_offset);
    assert_eq!(fill(&index, 2300), records[700..]);
    drop(index);
    file.set_len(record_position(0)).unwrap();
    assert_eq!(setup.open().end_offset(), 0);
}

#[test]
fn a_sound_record_in_the_wrong_place_is_noticed() {
    let setup = Setup::new();
    let records = prepared(&setup);
    let bytes = fs::read(&setup.path).unwrap();
    let stale = record_position(400) as usize;
    overwrite(
        &setup,
        record_position(401),
        &bytes[stale..stale + RECORD_BYTES],
    );
    let index = setup.open();
    assert!(is_damaged(index.find(records[401].base_offset)));
}

#[test]
fn one_damaged_header_is_survived_and_two_are_reported() {
    let setup = Setup::new();
    let records = prepared(&setup);
    for byte in 0..64 {
        flip(&setup, byte);
        let index = setup.open();
        assert_eq!(index.find_from(0, 4000).unwrap(), records);
        drop(index);
        flip(&setup, byte);
    }
    flip(&setup, 9);
    flip(&setup, 512 + 9);
    assert!(is_damaged(QueueIndex::open(setup.vfs(), &setup.path)));
    let index = QueueIndex::create_at(setup.vfs(), &setup.path, 0).unwrap();
    assert_eq!(fill(&index, 3000), records);
}

#[test]
fn leftovers_of_an_unfinished_replacement_are_removed() {
    let setup = Setup::new();
    prepared(&setup);
    let temp = setup.path.with_extension("idx.tmp");
    fs::write(&temp, b"half").unwrap();
    setup.open();
    assert!(!temp.exists());
}

#[test]
fn after_a_failed_fsync_nothing_more_is_promised_until_made_anew() {
    let setup = Setup::new();
    let index = setup.open();
    fill(&index, 10);
    setup.vfs.0.fail_sync.store(true, Ordering::SeqCst);
    assert!(index.sync().is_err());
    setup.vfs.0.fail_sync.store(false, Ordering::SeqCst);
    assert!(index.sync().is_err());
    assert!(index.append(next_record(index.end_offset())).is_err());
    assert_eq!(index.find_from(0, 99).unwrap().len(), 10);
    index.reset_to(0).unwrap();
    fill(&index, 10);
    index.sync().unwrap();
}

#[test]
fn a_failed_write_loses_nothing_and_can_be_tried_again() {
    let setup = Setup::new();
    let index = setup.open();
    setup.vfs.0.fail_write.store(true, Ordering::SeqCst);
    let mut records = Vec::new();
    let refused = loop {
        let record = next_record(index.end_offset());
        if index.append(record).is_err() {
            break record;
        }
        records.push(record);
        assert!(records.len() < 200, "the buffer is not bounded");
    };
    assert_eq!(index.end_offset(), refused.base_offset);
    assert!(index.sync().is_err());
    setup.vfs.0.fail_write.store(false, Ordering::SeqCst);
    index.append(refused).unwrap();
    records.push(refused);
    index.sync().unwrap();
    drop(index);
    assert_eq!(setup.open().find_from(0, 999).unwrap(), records);
}

#[test]
fn reclaiming_may_fail_without_stopping_retention() {
    let setup = Setup::new();
    let index = setup.open();
    let records = fill(&index, 4000);
    setup.vfs.0.fail_create.store(true, Ordering::SeqCst);
    index.trim_front(records[3000].base_offset).unwrap();
    assert_eq!(index.find_from(0, 1).unwrap(), records[3000..3001]);
    setup.vfs.0.fail_create.store(false, Ordering::SeqCst);
    index.trim_front(records[3001].base_offset).unwrap();
    assert!(index.disk_bytes() < record_position(1000));
}

#[test]
fn a_replacement_that_may_or_may_not_have_happened_stops_the_index() {
    let setup = Setup::new();
    let index = setup.open();
    let records = fill(&index, 4000);
    setup.vfs.0.fail_sync_dir.store(true, Ordering::SeqCst);
    // create_dirs syncs a directory too; only the one after the rename is in doubt.
    assert!(index.trim_front(records[3000].base_offset).is_ok());
    setup.vfs.0.fail_sync_dir.store(false, Ordering::SeqCst);
    setup.vfs.0.fail_rename.store(true, Ordering::SeqCst);
    assert!(index.trim_front(records[3001].base_offset).is_err());
    setup.vfs.0.fail_rename.store(false, Ordering::SeqCst);
    assert!(index.append(next_record(index.end_offset())).is_err());
    drop(index);
    assert_eq!(setup.open().end_offset(), records[3999].end_offset());
}
