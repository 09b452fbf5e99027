//! Opening: what is cut, what is damage, what is rebuilt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use quorate_storage::commit_log::{CommitLog, Flush};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::vfs::{Vfs, VfsFile};
use quorate_storage::{LogId, StorageError};

use crate::support::*;

const SEGMENT: u64 = 1 << 16;
/// Segment header, begin mark: where the first frame of a log is.
const FIRST_FRAME: usize = 64 + 48;

fn open_file(vfs: &FaultVfs, path: PathBuf) -> Arc<dyn VfsFile> {
    vfs.open(&path).expect("open file")
}

/// A log with three synced calls of one entry each, killed without a closing mark.
fn three_calls() -> FaultVfs {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(SEGMENT));
    for index in 0..3 {
        let body = vec![index as u8 + 1; 100];
        group(&log, 1)
            .append(vec![entry(1, index, body)], Flush::Sync, ignore())
            .expect("append");
        driver.step(Instant::now());
    }
    vfs.kill()
}

/// Bytes of one call of [`three_calls`]: mark, header, body and padding.
const CALL: usize = 48 + 48 + 104;

#[test]
fn a_torn_tail_is_cut_and_overwritten() {
    let vfs = three_calls();
    // The last call: nothing later proves that it was synced.
    vfs.corrupt(&file(0, "log"), FIRST_FRAME + 2 * CALL + 60, 0x40);
    let log = open(&vfs, SEGMENT).expect("open");
    let cut = log.recovery().truncated_tail.clone().expect("a cut");
    assert_eq!(cut.position, (FIRST_FRAME + 2 * CALL) as u64);
    // The body's last byte; the padding behind it is zero.
    assert_eq!(cut.bytes, 148);
    assert_eq!(group(&log, 1).state().last, Some(LogId::new(1, 1)));
    let bytes = vfs.bytes(&file(0, "log")).expect("segment");
    assert!(bytes[FIRST_FRAME + 2 * CALL..].iter().all(|b| *b == 0));
    assert_eq!(bytes.len() as u64, SEGMENT);
    group(&log, 1).append_sync(entries(2, 2, 4));
    log.close().expect("close");

    let log = open(&vfs, SEGMENT).expect("reopen");
    assert_eq!(log.recovery().truncated_tail, None);
    assert_eq!(
        group(&log, 1).read(2, 9, 1000).expect("read"),
        entries(2, 2, 4)
    );
}

#[test]
fn bad_bytes_below_the_durable_end_are_damage() {
    for call in 0..2 {
        // A body, a header, a mark.
        for at in [60, 3, -40] {
            let vfs = three_calls();
            let place = (FIRST_FRAME + call * CALL) as i64 + at;
            vfs.corrupt(&file(0, "log"), place as usize, 0x01);
            let error = open(&vfs, SEGMENT).expect_err("damage");
            let StorageError::Damaged {
                path,
                position,
                reason,
            } = error
            else {
                panic!("{error}");
            };
            let frame = FIRST_FRAME + call * CALL - if at < 0 { 48 } else { 0 };
            assert_eq!(position, frame as u64, "call {call}, byte {at}");
            assert_eq!(path, file(0, "log"));
            assert!(reason.contains("restore"), "{reason}");
            let report = CommitLog::inspect(&vfs, std::path::Path::new(DIR)).expect("inspect");
            assert_eq!(report.damaged.len(), 1);
            assert!(report.damaged[0].good_again.is_some());
            assert_eq!(report.damaged[0].position, position);
        }
    }
}

#[test]
fn a_closing_mark_proves_what_is_before_it() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, SEGMENT).expect("open");
    group(&log, 1).append_sync(entries(1, 0, 1));
    log.close().expect("close");
    vfs.corrupt(&file(0, "log"), FIRST_FRAME + 50, 0x01);
    let error = open(&vfs, SEGMENT).expect_err("damage");
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
}

#[test]
fn zeroes_in_the_middle_are_damage_too() {
    let vfs = three_calls();
    let log = open_file(&vfs, file(0, "log"));
    log.write_all_at(&[0; CALL], (FIRST_FRAME - 48 + CALL) as u64)
        .expect("write");
    let error = open(&vfs, SEGMENT).expect_err("damage");
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
}

#[test]
fn a_stale_tail_is_never_revived() {
    let vfs = three_calls();
    let before = vfs.bytes(&file(0, "log")).expect("segment");
    let second = FIRST_FRAME - 48 + CALL;
    // The second call is torn and nothing proves it; the log goes on in its place.
    let file0 = open_file(&vfs, file(0, "log"));
    file0
        .write_all_at(&vec![0; 2 * CALL], second as u64)
        .expect("write");
    let log = open(&vfs, SEGMENT).expect("open");
    group(&log, 1).append_sync(vec![entry(2, 1, vec![9; 100])]);
    drop(log);
    // Now a disk that kept the old third call behind the new second one.
    let end = second + CALL;
    file0
        .write_all_at(&[0; 48], end as u64)
        .expect("no closing mark");
    file0
        .write_all_at(&before[end..end + CALL], end as u64)
        .expect("write");
    let log = open(&vfs, SEGMENT).expect("open");
    assert_eq!(group(&log, 1).state().last, Some(LogId::new(2, 1)));
    assert!(log.recovery().truncated_tail.is_some());
}

/// A log of several sealed segments, closed.
fn many_segments() -> FaultVfs {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 4096).expect("open");
    for index in 0..100 {
        group(&log, index % 2).append_sync(entries(1, index / 2, index / 2 + 1));
    }
    group(&log, 5).vote_sync(vote(4));
    log.close().expect("close");
    vfs
}

fn check_many(vfs: &FaultVfs) -> CommitLog {
    let log = open(vfs, 4096).expect("open");
    assert_eq!(group(&log, 0).all(), entries(1, 0, 50));
    assert_eq!(group(&log, 1).all(), entries(1, 0, 50));
    assert_eq!(group(&log, 5).state().vote, Some(vote(4)));
    log
}

#[test]
fn missing_and_bad_sidecars_are_rebuilt_the_same() {
    let vfs = many_segments();
    let original = [4096, 8192].map(|base| vfs.bytes(&file(base, "idx")).expect("sidecar"));
    vfs.remove(&file(4096, "idx")).expect("remove");
    vfs.corrupt(&file(8192, "idx"), 70, 0x10);
    let log = check_many(&vfs);
    assert_eq!(log.recovery().sidecars_rebuilt, 2);
    log.close().expect("close");
    for (base, bytes) in [4096, 8192].into_iter().zip(original) {
        assert_eq!(vfs.bytes(&file(base, "idx")).expect("sidecar"), bytes);
    }
    assert_eq!(check_many(&vfs).recovery().sidecars_rebuilt, 0);
}

#[test]
fn a_bad_index_record_is_repaired_when_it_is_met() {
    let vfs = many_segments();
    let sidecar = vfs.bytes(&file(4096, "idx")).expect("sidecar");
    // Behind the header and two summaries.
    vfs.corrupt(&file(4096, "idx"), 64 + 2 * 128 + 20, 0x10);
    let log = check_many(&vfs);
    log.close().expect("close");
    assert_eq!(vfs.bytes(&file(4096, "idx")).expect("sidecar"), sidecar);
}

#[test]
fn bad_bytes_of_a_sealed_segment_are_damage_when_read() {
    let vfs = many_segments();
    vfs.corrupt(&file(4096, "log"), FIRST_FRAME + 50, 0x10);
    let log = open(&vfs, 4096).expect("its sidecar is good");
    let all: Vec<_> = (0..2)
        .flat_map(|id| {
            let one = group(&log, id);
            (0..50).map(move |at| one.read(at, at + 1, 100))
        })
        .collect();
    let bad: Vec<_> = all.iter().filter_map(|read| read.as_ref().err()).collect();
    assert_eq!(bad.len(), 1, "one frame is bad");
    let StorageError::Damaged { path, position, .. } = bad[0] else {
        panic!("{}", bad[0]);
    };
    assert_eq!((path, *position), (&file(4096, "log"), FIRST_FRAME as u64));
}

#[test]
fn a_frame_in_the_wrong_place_is_never_served() {
    let vfs = many_segments();
    let segment = vfs.bytes(&file(4096, "log")).expect("segment");
    // Another frame of the same size, checksum and all.
    let call = 48 + 48 + 24;
    let other = &segment[FIRST_FRAME + 2 * call..FIRST_FRAME + 2 * call + 72];
    open_file(&vfs, file(4096, "log"))
        .write_all_at(other, FIRST_FRAME as u64)
        .expect("write");
    let log = open(&vfs, 4096).expect("open");
    let reads = (0..2).flat_map(|id| {
        let one = group(&log, id);
        (0..50).map(move |at| (at, one.read(at, at + 1, 100)))
    });
    let mut damaged = 0;
    for (at, read) in reads {
        match read {
            Ok(found) => assert_eq!(found, entries(1, at, at + 1)),
            Err(StorageError::Damaged { .. }) => damaged += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(damaged, 1);
}

#[test]
fn a_missing_middle_segment_is_damage() {
    let vfs = many_segments();
    vfs.remove(&file(4096, "log")).expect("remove");
    let error = open(&vfs, 4096).expect_err("damage");
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn a_missing_last_segment_is_damage_if_its_sidecar_tells() {
    let vfs = many_segments();
    let names = vfs.list(std::path::Path::new(DIR)).expect("list");
    let logs: Vec<_> = names
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .collect();
    // The active one and the last sealed one.
    for path in &logs[logs.len() - 2..] {
        vfs.remove(path).expect("remove");
    }
    let error = open(&vfs, 4096).expect_err("damage");
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn half_created_and_empty_last_segments_are_legal() {
    for header in [false, true] {
        let vfs = many_segments();
        let names = vfs.list(std::path::Path::new(DIR)).expect("list");
        let last = names
            .iter()
            .filter(|p| p.extension().is_some_and(|e| e == "log"))
            .count() as u64;
        let made = vfs.create(&file(last * 4096, "log")).expect("create");
        made.set_len(4096).expect("set length");
        if header {
            // Any good header will do as a form; base and checksum are its own.
            let mut bytes = vfs.bytes(&file(0, "log")).expect("segment")[..64].to_vec();
            bytes[16..24].copy_from_slice(&(last * 4096).to_le_bytes());
            let crc = crc32c::crc32c(&bytes[12..]);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            made.write_all_at(&bytes, 0).expect("write");
        }
        let temporary = std::path::Path::new(DIR).join("00000000000000099999.log.tmp");
        vfs.create(&temporary).expect("create");
        let log = check_many(&vfs);
        assert!(!vfs.exists(&temporary).expect("exists"));
        assert_eq!(
            vfs.exists(&file(last * 4096, "log")).expect("exists"),
            header
        );
        // The log goes on behind its end, over the segment's border.
        for index in 50..110 {
            group(&log, 0).append_sync(entries(1, index, index + 1));
        }
        log.close().expect("close");
        let log = open(&vfs, 4096).expect("reopen");
        assert_eq!(group(&log, 0).all(), entries(1, 0, 110));
    }
}

#[test]
fn a_newer_format_is_refused_and_not_cut_away() {
    let vfs = three_calls();
    let file0 = open_file(&vfs, file(0, "log"));
    let mut frame =
        vfs.bytes(&file(0, "log")).expect("segment")[FIRST_FRAME + 2 * CALL..][..148].to_vec();
    frame[8] = 2;
    let crc = crc32c::crc32c(&frame[8..]);
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    file0
        .write_all_at(&frame, (FIRST_FRAME + 2 * CALL) as u64)
        .expect("write");
    let error = open(&vfs, SEGMENT).expect_err("refused");
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn another_segment_size_counts_from_the_next_segment_on() {
    let vfs = many_segments();
    let log = open(&vfs, 8192).expect("open");
    for index in 50..200 {
        group(&log, 0).append_sync(entries(1, index, index + 1));
    }
    log.close().expect("close");
    let log = open(&vfs, 4096).expect("reopen");
    assert_eq!(group(&log, 0).all(), entries(1, 0, 200));
}
