//! Append, read, vote, truncate, purge, remove, and all of it again after reopening.

use std::sync::Arc;

use quorate_storage::commit_log::{CommitLog, Flush, GroupState};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};

use crate::support::*;

#[test]
fn entries_are_readable_when_append_returns_and_after_reopening() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    let one = group(&log, 1);
    one.append(entries(1, 0, 5), Flush::Sync, ignore())
        .expect("append");
    assert_eq!(one.all(), entries(1, 0, 5), "before anything was written");
    assert_eq!(one.log_id_at(3).expect("log id"), Some(LogId::new(1, 3)));
    assert_eq!(one.log_id_at(5).expect("log id"), None);
    run(&mut driver, std::time::Instant::now());
    log.close().expect("close");
    run(&mut driver, std::time::Instant::now());

    let log = open(&vfs, 1 << 16).expect("reopen");
    let one = group(&log, 1);
    assert_eq!(one.state().last, Some(LogId::new(1, 4)));
    assert_eq!(one.all(), entries(1, 0, 5));
    assert_eq!(one.log_id_at(3).expect("log id"), Some(LogId::new(1, 3)));
    assert_eq!(log.groups(), vec![RaftGroupId(1)]);
    assert_eq!(log.recovery().truncated_tail, None);
}

#[test]
fn it_works_on_a_real_disk() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let open = || CommitLog::open(Arc::new(OsVfs), dir.path(), config(1 << 16)).expect("open");
    let log = open();
    for index in 0..200 {
        let body = vec![index as u8; 1000];
        group(&log, index % 3).append_sync(vec![entry(1, index / 3, body)]);
    }
    group(&log, 7).vote_sync(vote(9));
    log.close().expect("close");
    let log = open();
    for id in 0..3 {
        let all = group(&log, id).all();
        assert_eq!(all.len() as u64, 200_u64.div_ceil(3) - u64::from(id == 2));
        for (at, entry) in all.iter().enumerate() {
            assert_eq!(entry.body[..], vec![(at as u64 * 3 + id) as u8; 1000][..]);
        }
    }
    assert_eq!(group(&log, 7).state().vote, Some(vote(9)));
    assert!(log.recovery().sidecars_used >= 2, "{:?}", log.recovery());
    assert!(log.disk_has_room());
}

#[test]
fn truncate_and_append_again_replace_what_was_there() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    let one = group(&log, 1);
    one.append_sync(entries(1, 0, 10));
    one.truncate_sync(Some(5));
    assert_eq!(one.state().last, Some(LogId::new(1, 5)));
    assert_eq!(one.read(6, 9, 1000).expect("read"), vec![]);
    one.append_sync(entries(2, 6, 8));
    one.append_sync(entries(3, 4, 6));
    let mut expected = entries(1, 0, 4);
    expected.extend(entries(3, 4, 6));
    assert_eq!(one.all(), expected);
    log.close().expect("close");
    let log = open(&vfs, 1 << 16).expect("reopen");
    assert_eq!(group(&log, 1).all(), expected);
    group(&log, 1).truncate_sync(None);
    assert_eq!(group(&log, 1).state(), GroupState::default());
    log.close().expect("close");
    let log = open(&vfs, 1 << 16).expect("reopen");
    assert_eq!(group(&log, 1).state(), GroupState::default());
}

#[test]
fn purge_moves_the_front_and_may_pass_the_end() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    let one = group(&log, 1);
    one.append_sync(entries(1, 0, 10));
    one.purge_sync(LogId::new(1, 3));
    assert_eq!(one.all(), entries(1, 4, 10));
    assert_eq!(one.log_id_at(3).expect("id"), Some(LogId::new(1, 3)));
    assert_eq!(one.log_id_at(2).expect("id"), None);
    assert_eq!(one.read(2, 10, 100).expect("read"), vec![]);
    log.close().expect("close");

    let log = open(&vfs, 1 << 16).expect("reopen");
    let one = group(&log, 1);
    assert_eq!(one.state().purged, Some(LogId::new(1, 3)));
    assert_eq!(one.all(), entries(1, 4, 10));
    one.purge_sync(LogId::new(2, 50));
    assert_eq!(one.state().last, Some(LogId::new(2, 50)));
    one.append_sync(entries(2, 51, 53));
    one.truncate_sync(None);
    assert_eq!(one.state().last, Some(LogId::new(2, 50)));
    one.append_sync(entries(3, 51, 52));
    log.close().expect("close");
    let log = open(&vfs, 1 << 16).expect("reopen");
    assert_eq!(group(&log, 1).all(), entries(3, 51, 52));
}

#[test]
fn what_breaks_the_order_of_a_group_is_refused() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    let one = group(&log, 1);
    one.append_sync(entries(1, 0, 4));
    one.purge_sync(LogId::new(1, 1));
    let refused = |result| assert!(matches!(result, Err(StorageError::InvalidArgument(_))));
    refused(one.append(entries(1, 5, 6), Flush::Sync, ignore()));
    refused(one.append(entries(1, 1, 2), Flush::Sync, ignore()));
    let mut gap = entries(1, 4, 5);
    gap.extend(entries(1, 6, 7));
    refused(one.append(gap, Flush::Sync, ignore()));
    refused(one.append(vec![entry(1, 4, vec![0; 1 << 16])], Flush::Sync, ignore()));
    refused(one.truncate_after(Some(0), ignore()));
    assert_eq!(one.all(), entries(1, 2, 4));
    one.append_sync(entries(1, 4, 5));
}

#[test]
fn a_removed_group_is_forgotten_and_others_are_not() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    for id in [1, 2] {
        group(&log, id).append_sync(entries(1, 0, 4));
        group(&log, id).vote_sync(vote(3));
    }
    let (done, result) = done();
    log.remove_group(RaftGroupId(1), done);
    wait(&result).expect("removed");
    assert_eq!(log.groups(), vec![RaftGroupId(2)]);
    log.close().expect("close");
    let log = open(&vfs, 1 << 16).expect("reopen");
    assert_eq!(log.groups(), vec![RaftGroupId(2)]);
    assert_eq!(group(&log, 1).state(), GroupState::default());
    group(&log, 1).append_sync(entries(5, 0, 2));
    log.close().expect("close");
    let log = open(&vfs, 1 << 16).expect("reopen");
    assert_eq!(group(&log, 1).all(), entries(5, 0, 2));
    assert_eq!(group(&log, 1).state().vote, None);
    assert_eq!(group(&log, 2).all(), entries(1, 0, 4));
}

#[test]
fn many_segments_reopen_from_their_sidecars_alone() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 4096).expect("open");
    for index in 0..300 {
        group(&log, index % 2).append_sync(entries(1, index / 2, index / 2 + 1));
    }
    group(&log, 0).truncate_sync(Some(99));
    log.close().expect("close");

    let log = open(&vfs, 4096).expect("reopen");
    let report = log.recovery();
    assert!(report.segments > 5, "{report:?}");
    assert_eq!(report.segments_scanned, 1, "{report:?}");
    assert_eq!(report.sidecars_used, report.segments - 1, "{report:?}");
    assert_eq!(report.sidecars_rebuilt, 0);
    assert_eq!(group(&log, 0).all(), entries(1, 0, 100));
    assert_eq!(group(&log, 1).all(), entries(1, 0, 150));
    for index in 0..150 {
        let id = group(&log, 1).log_id_at(index).expect("log id");
        assert_eq!(id, Some(LogId::new(1, index)));
    }
}

#[test]
fn calls_after_close_are_refused() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 4096).expect("open");
    let one = group(&log, 1);
    one.append_sync(entries(1, 0, 1));
    log.close().expect("close");
    log.close().expect("close again");
    let late = one.append(entries(1, 1, 2), Flush::Sync, ignore());
    assert!(matches!(late, Err(StorageError::Closed)));
    assert_eq!(one.all(), entries(1, 0, 1));
}
