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
    // What was moved may have needed a new one.
    let left = logs(&vfs) + report.removed_segments;
    assert!((before..=before + 1).contains(&left), "{left} of {before}");
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

/// Group 2 has a few entries in the first segment, and group 1 fills many and purges them.
fn pinned() -> (FaultVfs, quorate_storage::commit_log::CommitLog) {
    let vfs = FaultVfs::new();
    let mut settings = config(4096);
    settings.tail_cache_bytes = 0;
    let log = open_with(&vfs, settings).expect("open");
    group(&log, 2).append_sync(entries(1, 5, 8));
    for index in 0..100 {
        group(&log, 1).append_sync(entries(1, index, index + 1));
    }
    group(&log, 1).purge_sync(LogId::new(1, 89));
    (vfs, log)
}

#[test]
fn a_quiet_group_is_moved_out_of_the_way_and_stays_what_it_was() {
    let (vfs, log) = pinned();
    let report = log.clean().expect("clean");
    assert!(report.removed_segments >= 2, "{report:?}");
    assert_eq!(report.moved_entries, 3);
    assert!(!vfs.exists(&file(0, "log")).expect("exists"));
    let check = |log: &quorate_storage::commit_log::CommitLog, what: &str| {
        let two = group(log, 2);
        assert_eq!(two.all(), entries(1, 5, 8), "{what}");
        assert_eq!(two.state().last, Some(LogId::new(1, 7)), "{what}");
        assert_eq!(two.log_id_at(6).expect("read"), Some(LogId::new(1, 6)));
        assert_eq!(group(log, 1).all(), entries(1, 90, 100), "{what}");
    };
    check(&log, "moved");
    check(&open(&vfs.kill(), 4096).expect("open"), "killed");
    let cut = vfs.all_unsynced_lost();
    check(&open(&cut, 4096).expect("open"), "power lost");
    // The segment it was moved to is sealed, and read from its sidecar or without it.
    for index in 100..160 {
        group(&log, 1).append_sync(entries(1, index, index + 1));
    }
    log.close().expect("close");
    drop(log);
    let sealed = open(&vfs, 4096).expect("open");
    assert!(sealed.recovery().sidecars_used > 0);
    assert_eq!(group(&sealed, 2).all(), entries(1, 5, 8));
    sealed.close().expect("close");
    drop(sealed);
    for path in vfs.list(std::path::Path::new(DIR)).expect("list") {
        if path.extension().is_some_and(|e| e == "idx") {
            vfs.remove(&path).expect("remove");
        }
    }
    let scanned = open(&vfs, 4096).expect("open");
    assert!(scanned.recovery().sidecars_rebuilt > 0);
    assert_eq!(group(&scanned, 2).all(), entries(1, 5, 8));
    // And it goes on: cut and appended to like any other.
    group(&scanned, 2).append_sync(entries(2, 7, 9));
    let mut expected = entries(1, 5, 7);
    expected.extend(entries(2, 7, 9));
    assert_eq!(group(&scanned, 2).all(), expected);
    assert_eq!(
        group(&open(&vfs.kill(), 4096).expect("open"), 2).all(),
        expected
    );
}

#[test]
fn what_is_cut_while_it_is_moved_does_not_come_back() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    let (one, two, three) = (group(&log, 1), group(&log, 2), group(&log, 3));
    for quiet in [&two, &three] {
        quiet
            .append(entries(1, 0, 4), Flush::Sync, ignore())
            .expect("append");
    }
    for index in 0..60 {
        one.append(entries(1, index, index + 1), Flush::Sync, ignore())
            .expect("append");
        run(&mut driver, now);
    }
    one.purge(LogId::new(1, 59), ignore()).expect("purge");
    run(&mut driver, now);
    // Queued, and written only when cleaning has read what it is going to move.
    two.truncate_after(Some(1), ignore()).expect("truncate");
    three.purge(LogId::new(1, 1), ignore()).expect("purge");
    let report = driver.clean(now).expect("clean");
    assert!(report.removed_segments > 0, "{report:?}");
    assert_eq!(two.all(), entries(1, 0, 2));
    assert_eq!(three.all(), entries(1, 2, 4));
    let again = open(&vfs.all_unsynced_lost(), 4096).expect("reopen");
    assert_eq!(group(&again, 2).all(), entries(1, 0, 2));
    assert_eq!(group(&again, 3).all(), entries(1, 2, 4));
}

#[test]
fn readers_do_not_notice_that_entries_are_moved() {
    let (_vfs, log) = pinned();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(group(&log, 2).all(), entries(1, 5, 8));
                }
            });
        }
        let mut moved = 0;
        for from in (100..1600).step_by(50) {
            for index in from..from + 50 {
                group(&log, 1).append_sync(entries(1, index, index + 1));
            }
            group(&log, 1).purge_sync(LogId::new(1, from + 49));
            moved += log.clean().expect("clean").moved_entries;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(moved > 30, "{moved}");
    });
}

#[test]
fn a_full_disk_is_not_made_fuller_by_moving() {
    let (vfs, log) = pinned();
    vfs.set_free_space(4096);
    assert_eq!(log.clean().expect("clean"), CleanReport::default());
    vfs.set_free_space(u64::MAX);
    assert!(log.clean().expect("clean").removed_segments > 0);
}
