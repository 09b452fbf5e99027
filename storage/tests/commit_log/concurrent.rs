//! Many threads at once, and the bound of the tail cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_storage::commit_log::Flush;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, StorageError};

use crate::support::*;

#[test]
fn sixteen_groups_from_sixteen_threads() {
    const ENTRIES: u64 = 300;
    let vfs = FaultVfs::new();
    let mut settings = config(32 << 10);
    settings.tail_cache_bytes = 20_000;
    let log = open_with(&vfs, settings).expect("open");
    thread::scope(|scope| {
        for id in 0..16 {
            let one = group(&log, id);
            scope.spawn(move || {
                let (sender, receiver) = mpsc::channel();
                for index in 0..ENTRIES {
                    let sender = sender.clone();
                    let done = Box::new(move |result: Result<(), StorageError>| {
                        drop(sender.send((index, result)));
                    });
                    let append = entries(id + 1, index, index + 1);
                    one.append(append, Flush::Sync, done).expect("append");
                }
                for index in 0..ENTRIES {
                    let (at, result) = receiver
                        .recv_timeout(Duration::from_secs(20))
                        .expect("done was not called");
                    assert_eq!(at, index, "callbacks in order");
                    result.expect("durable");
                }
            });
        }
    });
    let stats = log.stats();
    assert_eq!(stats.entries, 16 * ENTRIES);
    assert!(stats.segments > 3);
    for id in 0..16 {
        assert_eq!(group(&log, id).all(), entries(id + 1, 0, ENTRIES));
    }
    drop(log);
    let log = open(&vfs, 32 << 10).expect("reopen");
    for id in 0..16 {
        assert_eq!(group(&log, id).all(), entries(id + 1, 0, ENTRIES));
    }
}

#[test]
fn readers_see_a_consistent_log_while_it_is_written_and_truncated() {
    let vfs = FaultVfs::new();
    let mut settings = config(8 << 10);
    settings.tail_cache_bytes = 3000;
    let log = open_with(&vfs, settings).expect("open");
    let one = group(&log, 1);
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (one, stop, reads) = (one.clone(), stop.clone(), reads.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Some(last) = one.state().last else {
                        continue;
                    };
                    let start = last
                        .index
                        .saturating_sub(reads.load(Ordering::Relaxed) % 60);
                    let found = one.read(start, last.index + 1, 2000).expect("read");
                    for pair in found.windows(2) {
                        assert_eq!(pair[0].log_id.index + 1, pair[1].log_id.index);
                        assert!(
                            pair[0].log_id.term <= pair[1].log_id.term,
                            "mixed histories"
                        );
                    }
                    for entry in &found {
                        let LogId { term, index } = entry.log_id;
                        assert_eq!(vec![entry.clone()], entries(term, index, index + 1));
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut next = 0;
    for term in 1..60 {
        one.append_sync(entries(term, next, next + 20));
        next += 20;
        if term % 3 == 0 {
            one.truncate_sync(Some(next - 15));
            next -= 14;
        }
        if term % 10 == 0 {
            let upto = one.log_id_at(next - 10).expect("read").expect("known");
            one.purge_sync(upto);
        }
    }
    let until = Instant::now() + Duration::from_secs(20);
    while reads.load(Ordering::Relaxed) < 50 && Instant::now() < until {
        thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().expect("a reader failed");
    }
    assert!(reads.load(Ordering::Relaxed) >= 50);
}

#[test]
fn the_tail_cache_is_bounded_and_serves_without_copies() {
    let vfs = FaultVfs::new();
    let mut settings = config(1 << 20);
    settings.tail_cache_bytes = 50_000;
    let (log, mut driver) = open_driven(&vfs, settings);
    let now = Instant::now();
    let bodies: Vec<Bytes> = (0..200).map(|n| Bytes::from(vec![n as u8; 1000])).collect();
    let one = group(&log, 9);
    for (index, body) in (0..).zip(&bodies) {
        let append = vec![entry(1, index, body.clone())];
        one.append(append, Flush::Sync, ignore()).expect("append");
    }
    assert!(
        log.stats().cached_bytes > 200_000,
        "what is not written stays"
    );
    run(&mut driver, now);
    let stats = log.stats();
    assert!(stats.cached_bytes <= 50_000, "{}", stats.cached_bytes);
    assert!(stats.cached_bytes > 40_000, "{}", stats.cached_bytes);
    let newest = one.read(199, 200, 1).expect("read");
    assert_eq!(
        newest[0].body.as_ptr(),
        bodies[199].as_ptr(),
        "the same memory"
    );
    assert_eq!(log.stats().disk_reads, 0);
    let oldest = one.read(0, 1, 1).expect("read");
    assert_eq!(oldest[0].body, bodies[0]);
    assert_eq!(log.stats().disk_reads, 1);

    one.truncate_after(None, ignore()).expect("truncate");
    run(&mut driver, now);
    assert_eq!(
        log.stats().cached_bytes,
        0,
        "nothing is counted twice or forgotten"
    );
}

#[test]
fn reads_respect_their_limits() {
    let vfs = FaultVfs::new();
    let mut settings = config(1 << 16);
    // Half in the cache, half on disk.
    settings.tail_cache_bytes = 5 * 1096;
    let log = open_with(&vfs, settings).expect("open");
    let one = group(&log, 1);
    for index in 0..10 {
        one.append_sync(vec![entry(1, index, vec![index as u8; 1000])]);
    }
    for start in 0..10 {
        let count = |end, bytes| one.read(start, end, bytes).expect("read").len() as u64;
        assert_eq!(count(100, 0), 1, "at least one");
        assert_eq!(count(100, 2000), 2.min(10 - start));
        assert_eq!(count(100, 2999), 2.min(10 - start));
        assert_eq!(count(start + 3, 1 << 20), 3.min(10 - start));
        assert_eq!(count(100, 1 << 20), 10 - start);
        assert_eq!(count(start, 1 << 20), 0);
    }
    assert_eq!(one.read(10, 20, 100).expect("read"), vec![]);
}
