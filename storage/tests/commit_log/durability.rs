//! What a callback promises, and what happens when the disk refuses.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use quorate_storage::commit_log::{Flush, Step};
use quorate_storage::vfs::fault::{FaultVfs, Operation};
use quorate_storage::{LogId, RaftGroupId, StorageError};

use crate::support::*;

#[test]
fn a_vote_comes_after_the_appends_before_it() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    let now = Instant::now();
    let one = group(&log, 1);
    let (appended, append_result) = done();
    let (voted, vote_result) = done();
    one.append(entries(1, 0, 3), Flush::Async, appended)
        .expect("append");
    one.save_vote(vote(5), voted).expect("vote");
    assert_eq!(one.state().vote, Some(vote(5)), "seen at once");
    assert!(
        vote_result.try_recv().is_err(),
        "not promised before it is written"
    );
    let syncs = vfs.count(Operation::Sync);
    driver.step(now);
    wait(&append_result).expect("append");
    wait(&vote_result).expect("vote");
    assert_eq!(vfs.count(Operation::Sync), syncs + 1, "one fsync for both");
    // Whatever else is lost, a promised vote stands on its appends.
    for seed in 0..50 {
        let log = open(&vfs.crash(seed), 1 << 16).expect("open");
        assert_eq!(group(&log, 1).state().vote, Some(vote(5)));
        assert_eq!(group(&log, 1).state().last, Some(LogId::new(1, 2)));
    }
}

#[test]
fn async_appends_are_answered_when_written_and_synced_in_time() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    let one = group(&log, 1);
    let mut now = Instant::now();
    while driver.step(now) == Step::Worked {}
    let syncs = vfs.count(Operation::Sync);
    let (written, result) = done();
    one.append(entries(1, 0, 3), Flush::Async, written)
        .expect("append");
    assert!(result.try_recv().is_err(), "not before it is written");
    assert_eq!(driver.step(now), Step::Worked);
    wait(&result).expect("written");
    assert_eq!(vfs.count(Operation::Sync), syncs, "no fsync yet");
    let log2 = open(&vfs.kill(), 1 << 16).expect("a killed process loses nothing");
    assert_eq!(group(&log2, 1).all(), entries(1, 0, 3));

    let due = now + Duration::from_millis(500);
    assert_eq!(driver.step(now), Step::Idle { wake_at: Some(due) });
    now += Duration::from_millis(300);
    one.append(entries(1, 3, 4), Flush::Async, ignore())
        .expect("append");
    driver.step(now);
    assert_eq!(
        driver.step(now),
        Step::Idle { wake_at: Some(due) },
        "the oldest byte counts"
    );
    now = due;
    driver.step(now);
    assert_eq!(vfs.count(Operation::Sync), syncs + 1);
    for seed in 0..20 {
        let log = open(&vfs.crash(seed), 1 << 16).expect("open");
        assert_eq!(group(&log, 1).all(), entries(1, 0, 4));
    }
}

#[test]
fn a_busy_stream_of_async_appends_is_synced_in_time_too() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    let start = Instant::now();
    let syncs = vfs.count(Operation::Sync);
    for step in 0..11 {
        let append = entries(1, step, step + 1);
        group(&log, 1)
            .append(append, Flush::Async, ignore())
            .expect("append");
        driver.step(start + Duration::from_millis(step * 100));
    }
    assert_eq!(vfs.count(Operation::Sync), syncs + 1);
}

#[test]
fn a_quiet_log_closes_with_one_mark() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    let mut now = Instant::now();
    group(&log, 1)
        .append(entries(1, 0, 1), Flush::Sync, ignore())
        .expect("append");
    driver.step(now);
    let end = log.stats().end;
    now += Duration::from_secs(1);
    assert_eq!(driver.step(now), Step::Worked);
    assert_eq!(log.stats().end, end + 48);
    assert_eq!(log.stats().durable_end, end + 48);
    now += Duration::from_secs(100);
    assert_eq!(
        driver.step(now),
        Step::Idle { wake_at: None },
        "one is enough"
    );
    assert_eq!(log.stats().end, end + 48);
}

#[test]
fn what_is_queued_together_shares_one_fsync() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 20));
    let syncs = vfs.count(Operation::Sync);
    let results: Vec<_> = (0..100)
        .map(|id| {
            let (done, result) = done();
            let append = group(&log, id).append(entries(1, 0, 1), Flush::Sync, done);
            append.expect("append");
            result
        })
        .collect();
    driver.step(Instant::now());
    for result in results {
        wait(&result).expect("durable");
    }
    assert_eq!(vfs.count(Operation::Sync), syncs + 1);
    assert_eq!((log.stats().writes, log.stats().entries), (1, 100));
}

fn poisoned(result: Result<(), StorageError>) {
    assert!(
        matches!(result, Err(StorageError::Poisoned { .. })),
        "{result:?}"
    );
}

#[test]
fn a_failed_fsync_or_write_poisons_the_log() {
    for operation in [Operation::Sync, Operation::Write] {
        let vfs = FaultVfs::new();
        let (log, mut driver) = open_driven(&vfs, config(1 << 16));
        let one = group(&log, 1);
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        log.on_poison(Box::new(move |error| {
            assert!(!error.retryable());
            count.fetch_add(1, Ordering::Relaxed);
        }));
        vfs.fail_nth(operation, 1, ErrorKind::Other);
        let (first, first_result) = done();
        let (second, second_result) = done();
        one.append(entries(1, 0, 1), Flush::Sync, first)
            .expect("append");
        one.save_vote(vote(1), second).expect("vote");
        let syncs = vfs.count(Operation::Sync);
        assert_eq!(driver.step(Instant::now()), Step::Stopped);
        poisoned(wait(&first_result));
        poisoned(wait(&second_result));
        assert_eq!(told.load(Ordering::Relaxed), 1);
        let tried = u64::from(operation == Operation::Sync);
        assert_eq!(vfs.count(Operation::Sync), syncs + tried);

        assert_eq!(driver.step(Instant::now()), Step::Stopped);
        assert_eq!(vfs.count(Operation::Sync), syncs + tried, "never again");
        poisoned(one.append(entries(1, 1, 2), Flush::Sync, ignore()));
        poisoned(one.save_vote(vote(2), ignore()));
        poisoned(one.purge(LogId::new(1, 0), ignore()));
        poisoned(one.truncate_after(None, ignore()));
        poisoned(one.read(0, 1, 100).map(drop));
        let (removed, result) = done();
        log.remove_group(RaftGroupId(1), removed);
        poisoned(wait(&result));
        poisoned(log.close());
        assert!(
            log.stats()
                .poisoned
                .is_some_and(|why| why.contains("made to fail"))
        );
        let count = told.clone();
        log.on_poison(Box::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        assert_eq!(
            told.load(Ordering::Relaxed),
            2,
            "a late hook is told at once"
        );
    }
}

#[test]
fn a_failed_fsync_is_not_healed_by_the_next_one() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(1 << 16));
    vfs.fail_nth(Operation::Sync, 1, ErrorKind::Other);
    let (done, result) = done();
    group(&log, 1)
        .append(entries(1, 0, 1), Flush::Sync, done)
        .expect("append");
    driver.step(Instant::now());
    poisoned(wait(&result));
    let log = open(&vfs.crash(1), 1 << 16).expect("open");
    assert_eq!(group(&log, 1).state().last, None, "the kernel dropped it");
}

#[test]
fn what_a_restart_finds_after_a_failed_fsync_is_made_durable_before_it_counts() {
    // The tail of the active segment, and a segment whose seal could not be synced.
    for entries_before in 0..60 {
        let vfs = FaultVfs::new();
        let (log, mut driver) = open_driven(&vfs, config(4096));
        let now = Instant::now();
        let one = group(&log, 1);
        for index in 0..entries_before {
            let append = entries(1, index, index + 1);
            one.append(append, Flush::Sync, ignore()).expect("append");
            driver.step(now);
        }
        vfs.fail_nth(Operation::Sync, 1, ErrorKind::Other);
        let append = entries(1, entries_before, entries_before + 1);
        one.append(append, Flush::Sync, ignore()).expect("append");
        driver.step(now);
        assert!(log.stats().poisoned.is_some());

        let restarted = vfs.kill();
        let (log, _driver) = open_driven(&restarted, config(4096));
        let found = group(&log, 1).state();
        for seed in 0..4 {
            let (log, _driver) = open_driven(&restarted.crash(seed), config(4096));
            assert_eq!(group(&log, 1).state(), found, "{entries_before}");
        }
    }
}

#[test]
fn a_panicking_callback_poisons_instead_of_hanging() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    let (told, told_result) = std::sync::mpsc::channel();
    log.on_poison(Box::new(move |error| drop(told.send(error.clone()))));
    let panics = Box::new(|_| panic!("a caller's mistake"));
    group(&log, 1)
        .append(entries(1, 0, 1), Flush::Sync, panics)
        .expect("append");
    let error = told_result
        .recv_timeout(Duration::from_secs(20))
        .expect("told");
    poisoned(Err(error));
    poisoned(group(&log, 1).save_vote(vote(1), ignore()));
}

#[test]
fn a_new_segment_is_in_its_directory_before_anything_in_it_is_promised() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    for index in 0..200 {
        let (done, result) = done();
        group(&log, 1)
            .append(entries(1, index, index + 1), Flush::Sync, done)
            .expect("append");
        while driver.step(now) == Step::Worked {}
        wait(&result).expect("durable");
        // Seeds that keep nothing, something and all of what was not synced.
        for seed in 0..6 {
            let (log, _driver) = open_driven(&vfs.crash(seed), config(4096));
            assert_eq!(group(&log, 1).state().last, Some(LogId::new(1, index)));
        }
    }
    assert!(log.stats().segments > 3);
}

#[test]
fn a_disk_below_its_reserve_is_noticed_within_a_second() {
    let vfs = FaultVfs::new();
    let mut config = config(4096);
    config.reserve_bytes = 1000;
    loop {
        vfs.set_free_space(1000);
        let begun = Instant::now();
        let (log, _driver) = open_driven(&vfs, config.clone());
        assert!(!log.disk_has_room());
        vfs.set_free_space(1001);
        let has_room = log.disk_has_room();
        if begun.elapsed() < Duration::from_secs(1) {
            assert!(!has_room, "measured once a second");
            break;
        }
    }
    let (log, _driver) = open_driven(&vfs, config);
    assert!(log.disk_has_room());
}

#[test]
fn the_queue_says_when_it_is_full() {
    let vfs = FaultVfs::new();
    let mut config = config(1 << 20);
    config.queue_bytes = 10_000;
    let (log, mut driver) = open_driven(&vfs, config);
    let mut index = 0;
    while log.has_room() {
        let append = vec![entry(1, index, vec![0; 1000])];
        group(&log, 1)
            .append(append, Flush::Sync, ignore())
            .expect("append");
        index += 1;
    }
    assert!((9..=10).contains(&index), "{index}");
    driver.step(Instant::now());
    assert!(log.has_room());
    assert_eq!(log.stats().queued_bytes, 0);
}
