//! Writes the corpus's first files, real ones: `cargo test -p quorate-storage --test fuzz -- --ignored`.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, RecordInput};
use quorate_storage::commit_log::{
    CommitLog, CommitLogConfig, Driver, Entry, EntryKind, Flush, Step,
};
use quorate_storage::queue_index::{IndexRecord, QueueIndex};
use quorate_storage::snapshot::{SnapshotHeader, SnapshotKind, SnapshotStore};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, Vote};

use crate::frames::SEGMENT;
use crate::mutate::directory;
use crate::queue_index::PATH;
use crate::snapshots::{GROUP, LAST};

fn keep(target: &str, name: &str, bytes: &[u8]) {
    let dir = directory(target);
    fs::create_dir_all(&dir).expect("directory");
    fs::write(dir.join(name), bytes).expect("write");
}

fn entry(term: u64, index: u64, size: usize) -> Entry {
    let kinds = [EntryKind::Command, EntryKind::Blank, EntryKind::Membership];
    let body = vec![b'a' + (index % 26) as u8; size];
    Entry {
        log_id: LogId::new(term, index),
        kind: kinds[index as usize % 3],
        body: body.into(),
    }
}

/// A log after `calls`, each synced by itself: its segments one behind the other, without the zeroes
/// at the end, and the sidecar of the first.
fn log(calls: &[&dyn Fn(&CommitLog)], close: bool) -> (Vec<u8>, Option<Vec<u8>>) {
    let vfs = FaultVfs::new();
    let config = CommitLogConfig {
        segment_bytes: SEGMENT as u64,
        reserve_bytes: 0,
        ..CommitLogConfig::default()
    };
    let dir = Path::new("/log");
    let (log, mut driver) =
        CommitLog::open_driven(Arc::new(vfs.clone()), dir, config).expect("open");
    let run = |driver: &mut Driver| {
        while driver.step(Instant::now()) == Step::Worked {}
        while driver.step_background() {}
    };
    for call in calls {
        call(&log);
        run(&mut driver);
    }
    if close {
        log.close().expect("close");
        run(&mut driver);
    }
    let mut bytes = Vec::new();
    while let Some(segment) = vfs.bytes(&dir.join(format!("{:020}.log", bytes.len()))) {
        bytes.extend(segment);
    }
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    bytes.truncate(end);
    (bytes, vfs.bytes(&dir.join(format!("{:020}.idx", 0))))
}

fn append(log: &CommitLog, group: u64, entries: Vec<Entry>) {
    let group = log.group(RaftGroupId(group));
    group
        .append(entries, Flush::Sync, Box::new(|_| {}))
        .expect("append");
}

fn segments() {
    let many = |log: &CommitLog| {
        let group = 1 + log.stats().writes % 2;
        let last = log.group(RaftGroupId(group)).state().last;
        let next = last.map_or(0, |last| last.index + 1);
        append(log, group, vec![entry(1, next, 90), entry(1, next + 1, 7)]);
    };
    let change = |log: &CommitLog| {
        let one = log.group(RaftGroupId(1));
        let ignore = || Box::new(|_| {});
        one.truncate_after(Some(3), ignore()).expect("truncate");
        append(log, 1, (4..9).map(|index| entry(2, index, 40)).collect());
        one.purge(LogId::new(1, 1), ignore()).expect("purge");
        for (group, committed) in [(1, true), (5, false)] {
            let vote = Vote {
                term: 3,
                voted_for: committed.then_some(8),
                committed,
            };
            log.group(RaftGroupId(group))
                .save_vote(vote, ignore())
                .expect("vote");
        }
        append(log, 6, vec![entry(1, 0, 10)]);
        log.remove_group(RaftGroupId(6), ignore());
    };
    let first = |log: &CommitLog| append(log, 1, (0..6).map(|index| entry(1, index, 30)).collect());
    let mut calls: Vec<&dyn Fn(&CommitLog)> = vec![&first, &change];
    calls.extend([&many as &dyn Fn(&CommitLog); 14]);
    let (sealed, sidecar) = log(&calls, true);
    keep("segments", "a-sealed-segment", &sealed);
    keep(
        "sidecar",
        "of-the-sealed-segment",
        &sidecar.expect("a sealed segment"),
    );
    keep("segments", "every-frame", &log(&[&first, &change], false).0);
    keep("segments", "one-call", &log(&[&first], false).0);
    let long: &dyn Fn(&CommitLog) = &|log| append(log, 2, vec![entry(1, 0, 3000)]);
    keep("segments", "a-long-entry", &log(&[long, &first], true).0);
    let digits = "00000000000000000000";
    let crc = crc32c::crc32c(digits.as_bytes());
    keep("start", "zero", format!("{digits} {crc:08x}\n").as_bytes());
    let digits = "00000000000000081920";
    let crc = crc32c::crc32c(digits.as_bytes());
    keep(
        "start",
        "cleaned",
        format!("{digits} {crc:08x}\n").as_bytes(),
    );
}

fn snapshots() {
    for (name, kind, membership, body) in [
        (
            "checkpoint",
            SnapshotKind::Checkpoint,
            &b"1,2,3"[..],
            &[7; 90][..],
        ),
        ("boundary", SnapshotKind::Boundary, b"", b"state"),
        ("empty", SnapshotKind::Checkpoint, b"", b""),
    ] {
        let vfs = FaultVfs::new();
        let store = SnapshotStore::open(Arc::new(vfs.clone()), Path::new("/s")).expect("open");
        let header = SnapshotHeader {
            last: LAST,
            membership: Bytes::from_static(membership),
            kind,
        };
        store.write(GROUP, &header, body).expect("write");
        let name_on_disk = format!("{:020}-{:020}.snap", LAST.index, LAST.term);
        let bytes = vfs.bytes(&store.dir_of(GROUP).join(name_on_disk));
        keep("snapshot", name, &bytes.expect("written"));
    }
}

fn queue_indexes() {
    for (name, count, trimmed) in [("empty", 0, 0), ("some", 30, 0), ("trimmed", 60, 90)] {
        let vfs = FaultVfs::new();
        let index = QueueIndex::open(Arc::new(vfs.clone()), PATH).expect("open");
        for number in 0..count {
            let record = IndexRecord {
                base_offset: index.end_offset(),
                count: 1 + (number % 5) as u32,
                batch: (number % 3) as u16,
                log_index: 1000 + number,
                timestamp_ms: 50_000 + number / 7 * 10,
            };
            index.append(record).expect("append");
            if number % 20 == 19 {
                index.sync().expect("sync");
            }
        }
        index.flush().expect("flush");
        if trimmed > 0 {
            index.trim_front(trimmed).expect("trim");
            index.sync().expect("sync");
        }
        keep(
            "queue_index",
            name,
            &vfs.bytes(Path::new(PATH)).expect("written"),
        );
    }
}

fn batches() {
    let mut plain = BatchBuilder::new();
    plain.push(RecordInput::default());
    plain.push(RecordInput {
        key: Some(b"order-17"),
        value: Some(b"{\"total\":12}"),
        headers: &[("trace", b"a1"), ("quorate.tag", b"t"), ("empty", b"")],
        timestamp_delta: -5,
    });
    let plain = plain.finish();
    let mut numbered = BatchBuilder::new().producer(5, 6, 7);
    for _ in 0..9 {
        numbered.push(RecordInput {
            value: Some(&[0x80; 70]),
            ..RecordInput::default()
        });
    }
    let numbered = numbered.finish();
    keep("batch", "plain", &plain);
    keep("batch", "numbered", &numbered);
    keep("batch", "two", &[&plain[..], &numbered[..]].concat());
    let mut packed = plain.to_vec();
    packed[22] |= 2;
    keep("batch", "compressed", &packed);
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    segments();
    snapshots();
    queue_indexes();
    batches();
}
