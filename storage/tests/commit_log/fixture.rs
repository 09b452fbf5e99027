//! The released format, byte for byte: what was written once must open for ever, and the same calls
//! must still write the same bytes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use quorate_storage::commit_log::{Entry, EntryKind, Flush};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, Vote};

use crate::support::*;

const FILES: [(u64, &str); 3] = [(0, "log"), (0, "idx"), (4096, "log")];

fn fixture(base: u64, extension: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/commit_log/v1");
    dir.join(format!("{base:020}.{extension}"))
}

fn long(index: u64) -> Entry {
    Entry {
        log_id: LogId::new(3, index),
        kind: EntryKind::Blank,
        body: vec![b'a' + index as u8; 700].into(),
    }
}

/// Every kind of frame this version writes, over a segment's border, and a closing mark.
fn write() -> FaultVfs {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    let one = group(&log, 1);
    let mut step = || while driver.step(now) == quorate_storage::commit_log::Step::Worked {};
    one.append(entries(1, 0, 5), Flush::Sync, ignore())
        .expect("append");
    step();
    one.truncate_after(Some(3), ignore()).expect("truncate");
    one.save_vote(vote(7), ignore()).expect("vote");
    one.purge(LogId::new(1, 1), ignore()).expect("purge");
    group(&log, 2)
        .append(entries(9, 0, 2), Flush::Async, ignore())
        .expect("append");
    log.remove_group(RaftGroupId(2), ignore());
    group(&log, 3)
        .save_vote(
            Vote {
                term: 1 << 40,
                voted_for: None,
                committed: false,
            },
            ignore(),
        )
        .expect("vote");
    step();
    for index in 4..10 {
        one.append(vec![long(index)], Flush::Sync, ignore())
            .expect("append");
        step();
    }
    log.close().expect("close");
    step();
    while driver.step_background() {}
    vfs
}

#[test]
fn the_first_format_is_written_as_ever() {
    let vfs = write();
    for (base, extension) in FILES {
        let path = fixture(base, extension);
        let bytes = vfs.bytes(&file(base, extension)).expect("written");
        if std::env::var_os("WRITE_FIXTURES").is_some() {
            std::fs::write(&path, &bytes).expect("write the fixture");
        }
        let expected = std::fs::read(&path).expect("read the fixture");
        assert!(bytes == expected, "{} changed", path.display());
    }
}

#[test]
fn the_first_format_still_opens() {
    let vfs = FaultVfs::new();
    for (base, extension) in FILES {
        let bytes = std::fs::read(fixture(base, extension)).expect("read the fixture");
        let file = vfs.create(&file(base, extension)).expect("create");
        file.write_all_at(&bytes, 0).expect("write");
    }
    let log = open(&vfs, 4096).expect("open");
    assert_eq!(log.recovery().sidecars_used, 1);
    assert_eq!(log.recovery().truncated_tail, None);
    assert_eq!(log.groups(), vec![RaftGroupId(1), RaftGroupId(3)]);
    let state = group(&log, 1).state();
    assert_eq!(state.vote, Some(vote(7)));
    assert_eq!(state.purged, Some(LogId::new(1, 1)));
    let mut expected = entries(1, 2, 4);
    expected.extend((4..10).map(long));
    assert_eq!(group(&log, 1).all(), expected);
    let vote = group(&log, 3).state().vote.expect("vote");
    assert_eq!((vote.term, vote.voted_for), (1 << 40, None));
}
