//! Old segments go when nothing in them counts, and not before.

use std::time::Instant;

use quorate_storage::commit_log::{CleanReport, Flush, GroupState};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId};

use crate::support::*;

fn logs(vfs: &FaultVfs) -> usize {
    let names = vfs.list(std::path::Path::new(DIR)).expect("list");
    names
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
        .count()
}

#[test]
fn purged_segments_go_and_votes_move_to_the_head() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 4096).expect("open");
    group(&log, 7).vote_sync(vote(3));
    group(&log, 8).purge_sync(LogId::new(2, 17));
    for index in 0..100 {
        group(&log, 1).append_sync(entries(1, index, index + 1));
    }
    assert_eq!(
        log.clean().expect("clean"),
        CleanReport::default(),
        "all is live"
    );
    let before = logs(&vfs);
    group(&log, 1).purge_sync(LogId::new(1, 89));
    let report = log.clean().expect("clean");
    assert!(report.removed_segments >= 2, "{report:?}");
    assert_eq!(report.carried_groups, 2);
    assert_eq!(logs(&vfs), before - report.removed_segments);
    assert_eq!(log.stats().cleaned_segments, report.removed_segments as u64);
    assert!(!vfs.exists(&file(0, "idx")).expect("exists"));

    for (what, vfs) in [("kill", vfs.kill()), ("crash", vfs.crash(0))] {
        let log = open(&vfs, 4096).expect("reopen");
        assert_eq!(group(&log, 7).state().vote, Some(vote(3)), "{what}");
        assert_eq!(
            group(&log, 8).state().purged,
            Some(LogId::new(2, 17)),
            "{what}"
        );
        assert_eq!(
            group(&log, 8).state().last,
            Some(LogId::new(2, 17)),
            "{what}"
        );
        assert_eq!(group(&log, 1).all(), entries(1, 90, 100), "{what}");
    }
}

#[test]
fn a_vote_that_is_queued_is_not_overtaken_by_the_one_that_is_moved() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    let one = group(&log, 1);
    one.save_vote(vote(3), ignore()).expect("vote");
    for index in 0..60 {
        one.append(entries(1, index, index + 1), Flush::Sync, ignore())
            .expect("append");
        run(&mut driver, now);
    }
    one.purge(LogId::new(1, 59), ignore()).expect("purge");
    run(&mut driver, now);
    one.save_vote(vote(9), ignore()).expect("vote");
    assert!(driver.clean(now).expect("clean").removed_segments > 0);
    let log = open(&vfs.kill(), 4096).expect("reopen");
    assert_eq!(group(&log, 1).state().vote, Some(vote(9)));
}

#[test]
fn a_removed_group_keeps_nothing_alive() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 4096).expect("open");
    group(&log, 1).vote_sync(vote(3));
    for index in 0..100 {
        group(&log, 1).append_sync(entries(1, index, index + 1));
    }
    let (done, result) = done();
    log.remove_group(RaftGroupId(1), done);
    wait(&result).expect("removed");
    let report = log.clean().expect("clean");
    assert!(report.removed_segments >= 3, "{report:?}");
    assert_eq!(report.carried_groups, 0);
    log.close().expect("close");
    let log = open(&vfs, 4096).expect("reopen");
    assert_eq!(log.groups(), vec![]);
    assert_eq!(group(&log, 1).state(), GroupState::default());
}

#[test]
fn entries_replaced_without_fsync_still_keep_their_segment() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    let one = group(&log, 1);
    for index in 0..60 {
        one.append(entries(1, index, index + 1), Flush::Sync, ignore())
            .expect("append");
        run(&mut driver, now);
    }
    // Written, not synced: after a crash the old entries may be all there is.
    one.append(entries(2, 0, 1), Flush::Async, ignore())
        .expect("append");
    run(&mut driver, now);
    assert!(driver.clean(now).expect("clean").removed_segments > 0);
    for seed in 0..20 {
        let log = open(&vfs.crash(seed), 4096).expect("reopen");
        assert_eq!(group(&log, 1).all(), entries(2, 0, 1));
    }
}

#[test]
fn a_reader_of_a_cleaned_segment_gets_no_wrong_answer() {
    let vfs = FaultVfs::new();
    let mut settings = config(4096);
    settings.tail_cache_bytes = 0;
    let log = open_with(&vfs, settings).expect("open");
    let one = group(&log, 1);
    for index in 0..100 {
        one.append_sync(entries(1, index, index + 1));
    }
    assert_eq!(one.read(0, 1, 1).expect("read"), entries(1, 0, 1));
    one.purge_sync(LogId::new(1, 89));
    log.clean().expect("clean");
    assert_eq!(one.read(0, 10, 1000).expect("read"), vec![]);
    assert_eq!(one.log_id_at(5).expect("read"), None);
    assert_eq!(one.all(), entries(1, 90, 100));
}
