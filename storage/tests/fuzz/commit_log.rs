//! Opening a log whose files are not what was written: segments, sidecars, the `start` file.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use quorate_storage::commit_log::{
    CommitLog, CommitLogConfig, Driver, Entry, EntryKind, Flush, Step,
};
use quorate_storage::vfs::Vfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};

use crate::bounded::BoundedVfs;
use crate::frames::{self, Found, SEGMENT};
use crate::mutate::{Input, corpus, directory, fuzz};

const DIR: &str = "/log";

fn file(base: usize, extension: &str) -> PathBuf {
    Path::new(DIR).join(format!("{base:020}.{extension}"))
}

/// The input's bytes as the segments of a log.
fn segments(log: &[u8]) -> BoundedVfs {
    let vfs = BoundedVfs::default();
    for (number, bytes) in log.chunks(SEGMENT).enumerate() {
        vfs.put(&file(number * SEGMENT, "log"), bytes);
    }
    vfs
}

/// The log that the sidecar of the corpus belongs to.
fn sealed_log() -> Vec<u8> {
    fs::read(directory("segments").join("a-sealed-segment")).expect("corpus")
}

fn open(vfs: &BoundedVfs) -> Result<(CommitLog, Driver), StorageError> {
    let config = CommitLogConfig {
        segment_bytes: SEGMENT as u64,
        reserve_bytes: 0,
        ..CommitLogConfig::default()
    };
    CommitLog::open_driven(Arc::new(vfs.clone()), Path::new(DIR), config)
}

fn run(driver: &mut Driver) {
    let now = Instant::now();
    while driver.step(now) == Step::Worked {}
    while driver.step_background() {}
}

/// Every entry that a log serves.
fn served(log: &CommitLog) -> Vec<Found> {
    let mut out = Vec::new();
    for id in log.groups() {
        let group = log.group(id);
        let state = group.state();
        let Some(last) = state.last else { continue };
        let first = state.purged.map_or(0, |upto| upto.index.saturating_add(1));
        // A hostile last index may be far away; what there is lies at one end or the other.
        let near = [first, last.index.saturating_sub(200)];
        for mut next in near {
            for _ in 0..200 {
                let Ok(read) = group.read(next, last.index.saturating_add(1), 300) else {
                    next = next.saturating_add(1);
                    continue;
                };
                let Some(end) = read.last() else {
                    next = next.saturating_add(1);
                    continue;
                };
                next = end.log_id.index.saturating_add(1);
                out.extend(read.into_iter().map(|entry| found(id, entry)));
            }
        }
    }
    out
}

fn found(group: RaftGroupId, entry: Entry) -> Found {
    let LogId { term, index } = entry.log_id;
    (group.0, term, index, entry.kind as u8, entry.body.to_vec())
}

/// Opens, reads everything, writes, and opens again. What is served must be in `written`.
fn recover(vfs: &BoundedVfs, written: &BTreeSet<Found>) {
    let looked = CommitLog::inspect(vfs, Path::new(DIR));
    let Ok((log, mut driver)) = open(vfs) else {
        return;
    };
    let report = looked.expect("what opens can be inspected");
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
    let before = served(&log);
    for entry in &before {
        assert!(written.contains(entry), "never written: {entry:?}");
    }
    run(&mut driver);
    for id in log.groups() {
        let group = log.group(id);
        let last = group.state().last;
        if last.is_some_and(|last| last.index >= u64::MAX - 1) {
            continue;
        }
        let index = last.map_or(0, |last| last.index + 1);
        let entry = Entry {
            log_id: LogId::new(last.map_or(1, |last| last.term), index),
            kind: EntryKind::Command,
            body: vec![0xee; 9].into(),
        };
        group
            .append(vec![entry.clone()], Flush::Sync, Box::new(|_| {}))
            .expect("what follows is taken");
        run(&mut driver);
        assert_eq!(group.read(index, index + 1, 1000).expect("read"), [entry]);
    }
    let states: Vec<_> = log
        .groups()
        .iter()
        .map(|id| log.group(*id).state())
        .collect();
    let groups = log.groups();
    drop((log, driver));
    let (log, _driver) = open(vfs).expect("what was opened and closed opens again");
    assert_eq!(log.groups(), groups);
    for (id, state) in groups.iter().zip(states) {
        assert_eq!(log.group(*id).state(), state, "{id}");
    }
    let after: BTreeSet<Found> = served(&log).into_iter().collect();
    for entry in before {
        assert!(after.contains(&entry), "lost by opening it: {entry:?}");
    }
}

#[test]
fn segments_that_lie() {
    let logs = corpus("segments");
    let all: BTreeSet<Found> = logs
        .iter()
        .flat_map(|(_, log)| frames::entries(log))
        .collect();
    assert!(all.len() > 20, "the corpus holds entries");
    fuzz("segments", 1500, |input| {
        let mut log = input.bytes.clone();
        log.truncate(16 * SEGMENT);
        if input.seal {
            frames::seal(&mut log);
            recover(
                &segments(&log),
                &frames::entries(&log).into_iter().collect(),
            );
        } else {
            recover(&segments(&log), &all);
        }
    });
}

/// Puts the checksums of a sidecar right: its header's, that over the summaries, each record's.
fn seal_sidecar(bytes: &mut [u8]) {
    if bytes.len() < 64 {
        return;
    }
    let groups = bytes[40..]
        .first_chunk()
        .copied()
        .map_or(0, u32::from_le_bytes);
    let records = (64 + groups as usize * 128).min(bytes.len());
    for record in bytes[records..].as_chunks_mut::<32>().0 {
        let crc = crc32c::crc32c(&record[4..]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes[64..records]);
    bytes[48..52].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[12..64]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// A sealed sidecar that lies may name entries that are gone or hide some, and then the log does not
/// open or does not serve them; what it serves is checked against the segment all the same.
#[test]
fn sidecars_that_lie() {
    let log = sealed_log();
    let written: BTreeSet<Found> = frames::entries(&log).into_iter().collect();
    let honest: BTreeSet<Found> = {
        let (log, _driver) = open(&segments(&log)).expect("the first log is good");
        served(&log).into_iter().collect()
    };
    fuzz("sidecar", 1500, |Input { bytes, seal }| {
        let mut bytes = bytes.clone();
        if *seal {
            seal_sidecar(&mut bytes);
        }
        let vfs = segments(&log);
        vfs.put(&file(0, "idx"), &bytes);
        let Ok((log, mut driver)) = open(&vfs) else {
            assert!(seal, "a bad sidecar is made anew");
            return;
        };
        let now: BTreeSet<Found> = served(&log).into_iter().collect();
        assert!(now.is_subset(&written));
        assert!(*seal || now == honest, "a bad sidecar changes nothing");
        run(&mut driver);
    });
}

#[test]
fn a_start_file_that_lies() {
    let log = sealed_log();
    fuzz("start", 1500, |Input { bytes, seal }| {
        let mut bytes = bytes.clone();
        if *seal && bytes.len() >= 20 {
            let crc = format!(" {:08x}\n", crc32c::crc32c(&bytes[..20]));
            bytes.splice(20.., crc.into_bytes());
        }
        let vfs = segments(&log);
        vfs.put(&Path::new(DIR).join("start"), &bytes);
        // The log begins at 0, so any start that can be read is at or behind that.
        let report = CommitLog::inspect(&vfs, Path::new(DIR)).expect("inspect");
        let digits = bytes
            .get(..20)
            .and_then(|text| std::str::from_utf8(text).ok());
        let sound = digits
            .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
            .filter(|text| text.parse::<u64>().is_ok())
            .is_some_and(|text| {
                bytes[20..] == *format!(" {:08x}\n", crc32c::crc32c(text.as_bytes())).as_bytes()
            });
        assert_eq!(report.damaged.is_empty(), sound, "{bytes:?}");
        // A directory where every segment is gone says so.
        let vfs = BoundedVfs::default();
        vfs.put(&Path::new(DIR).join("start"), &bytes);
        assert!(open(&vfs).is_err());
        vfs.exists(&file(0, "log")).expect("nothing was made");
    });
}
