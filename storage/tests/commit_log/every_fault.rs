//! Every single operation of a fixed life of a log fails once: what was promised is kept, nothing is
//! promised that was not done, and the error says where to look.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use quorate_storage::commit_log::{Flush, Step};
use quorate_storage::vfs::fault::{CutLimits, FaultVfs, Operation};
use quorate_storage::{LogId, StorageError};

use crate::model::*;
use crate::support::*;
use crate::workload::*;

const LIMITS: CutLimits = CutLimits {
    combined: 3,
    samples: 2,
    tears: 1,
    seed: 3,
};

#[derive(Debug, Default)]
struct Tally {
    faults: u64,
    /// Nobody was told: the log did without, or did it again.
    tolerated: u64,
    refused: u64,
    poisoned: u64,
    recovered: u64,
}

fn whole_life(variant: Variant) -> FaultVfs {
    let vfs = FaultVfs::new();
    let (_, lived) = live(vfs.clone(), variant);
    lived.expect("a life without a fault");
    vfs
}

/// Fails the `nth` operation of a kind.
fn fail_at(variant: Variant, operation: Operation, nth: u64, kind: ErrorKind, tally: &mut Tally) {
    let vfs = FaultVfs::new();
    vfs.fail_nth(operation, nth, kind);
    let (lived, ended) = live(vfs.clone(), variant);
    tally.faults += 1;
    let place = format!("{variant:?}, {operation:?} number {nth}, {kind}: {ended:?}");
    let Some(session) = lived else {
        says_where(&ended.expect_err("not opened"), &place);
        tally.refused += 1;
        return;
    };
    let promises = session.promises();
    match (session.log.stats().poisoned, &ended) {
        (Some(reason), Err(_)) => {
            assert!(reason.contains(DIR), "{place}: {reason}");
            let again = session.log.group(quorate_storage::RaftGroupId(0));
            let refused = again.save_vote(vote(99), ignore()).expect_err("poisoned");
            says_where(&refused, &place);
            assert!(refused.to_string().contains("restart the node"), "{place}");
            tally.poisoned += 1;
        }
        (Some(_), Ok(())) => panic!("{place}: poisoned and nobody was told"),
        (None, Err(error)) => {
            says_where(error, &place);
            assert_eq!(world_of(&session.log), session.world(), "{place}");
            tally.refused += 1;
        }
        (None, Ok(())) => tally.tolerated += 1,
    }
    // The process alone, or the machine.
    let killed = std::iter::once((vfs.kill(), promises.written));
    let cut = vfs.power_cuts(LIMITS).into_iter();
    let cut = cut.map(|state| (state, promises.durable));
    for (state, least) in killed.chain(cut) {
        let opened = Session::open(state.clone(), config(4096), World::new());
        let log = opened.unwrap_or_else(|error| panic!("{place}: {error}"));
        let found = world_of(&log.log);
        assert!(
            session.worlds(least).contains(&found),
            "{place}: at least {least} of {}, found {found:?}",
            session.changes()
        );
        drop(log);
        let again = Session::open(state.all_unsynced_lost(), config(4096), World::new());
        assert_eq!(world_of(&again.expect("open").log), found, "{place}: again");
        tally.recovered += 1;
    }
}

fn says_where(error: &StorageError, place: &str) {
    assert!(!error.retryable(), "{place}: {error}");
    // The directory that holds the log's is one of the places.
    assert!(error.to_string().contains(" /"), "{place}: {error}");
}

#[test]
fn every_failing_operation_is_survived_and_told() {
    let started = Instant::now();
    let mut tally = Tally::default();
    for variant in VARIANTS {
        let whole = whole_life(variant);
        for operation in [
            Operation::Open,
            Operation::Create,
            Operation::Read,
            Operation::Write,
            Operation::Sync,
            Operation::Resize,
            Operation::Rename,
            Operation::Remove,
            Operation::SyncDir,
        ] {
            for nth in 1..=whole.count(operation) {
                fail_at(variant, operation, nth, ErrorKind::Other, &mut tally);
                let grows = [Operation::Create, Operation::Write, Operation::Resize];
                if grows.contains(&operation) {
                    fail_at(variant, operation, nth, ErrorKind::StorageFull, &mut tally);
                }
            }
        }
    }
    println!("{tally:?} in {:.1?}", started.elapsed());
    assert!(tally.poisoned > 50 && tally.tolerated > 10, "{tally:?}");
}

#[test]
fn a_wrong_byte_is_never_served() {
    let (mut read, mut told) = (0, 0);
    for variant in VARIANTS {
        let reads = whole_life(variant).count(Operation::Read);
        for nth in 1..=reads {
            // In headers and bodies, a prime apart.
            for at in (0..4096).step_by(211) {
                let vfs = FaultVfs::new();
                vfs.flip_nth_read(nth, at);
                let (lived, ended) = live(vfs.clone(), variant);
                read += 1;
                let place = format!("{variant:?}, byte {at} of read {nth}: {ended:?}");
                match &ended {
                    Ok(()) => {}
                    Err(StorageError::Damaged { .. }) => told += 1,
                    Err(error) => panic!("{place}: {error}"),
                }
                let Some(session) = lived else { continue };
                let least = session.promises().written;
                let opened = Session::open(vfs.kill(), config(4096), World::new());
                let log = opened.unwrap_or_else(|error| panic!("{place}: {error}"));
                let found = world_of(&log.log);
                assert!(session.worlds(least).contains(&found), "{place}: {found:?}");
            }
        }
    }
    println!("{read} wrong bytes, {told} told");
    assert!(told > 20, "{told} of {read}");
}

#[test]
fn nothing_is_promised_while_the_disk_is_still_syncing() {
    let vfs = FaultVfs::new();
    let log = open(&vfs, 1 << 16).expect("open");
    let (entered, syncing) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let slow = Arc::new(AtomicBool::new(true));
    let is_slow = slow.clone();
    let may_go_on = parking_lot::Mutex::new(may_go_on);
    vfs.before_sync(move || {
        if is_slow.load(Ordering::SeqCst) {
            entered.send(()).expect("the test waits");
            may_go_on.lock().recv().expect("the test lets go");
        }
    });
    let one = group(&log, 1);
    let (appended, append_result) = done();
    let (voted, vote_result) = done();
    one.append(entries(1, 0, 2), Flush::Sync, appended)
        .expect("append");
    let patience = Duration::from_secs(20);
    syncing.recv_timeout(patience).expect("an fsync begins");
    // Queued behind the write that is being synced.
    one.save_vote(vote(3), voted).expect("vote");
    assert_eq!(one.all(), entries(1, 0, 2), "readable all the same");
    assert!(append_result.try_recv().is_err(), "not synced yet");
    assert!(vote_result.try_recv().is_err(), "not even written yet");
    go_on.send(()).expect("the log waits");
    wait(&append_result).expect("synced");
    syncing
        .recv_timeout(patience)
        .expect("another fsync begins");
    assert!(vote_result.try_recv().is_err(), "not synced yet");
    slow.store(false, Ordering::SeqCst);
    go_on.send(()).expect("the log waits");
    wait(&vote_result).expect("synced");
    log.close().expect("close");
}

#[test]
fn a_full_disk_stops_preparing_and_nothing_else_until_there_is_room_again() {
    let vfs = FaultVfs::new();
    let (log, mut driver) = open_driven(&vfs, config(4096));
    let now = Instant::now();
    let one = group(&log, 1);
    let mut next = 0;
    let mut append = |driver: &mut quorate_storage::commit_log::Driver| {
        let (done, result) = done();
        let entries = vec![entry(1, next, vec![7; 700])];
        next += 1;
        one.append(entries, Flush::Sync, done).expect("append");
        while driver.step(now) == Step::Worked {}
        wait(&result)
    };
    append(&mut driver).expect("an empty disk");
    vfs.set_full(true);
    // The space of the active segment is reserved: it can still be written to its end.
    for _ in 0..2 {
        append(&mut driver).expect("room in the active segment");
        assert!(driver.step_background(), "tries to make the next segment");
    }
    assert_eq!(log.stats().poisoned, None);
    vfs.set_full(false);
    append(&mut driver).expect("still the active segment");
    driver.step_background();
    for _ in 0..20 {
        append(&mut driver).expect("room again");
        while driver.step_background() {}
    }
    assert!(log.stats().segments > 4);
    // Full to the end: the log stops, and a restart on a disk with room finds all that was promised.
    vfs.set_full(true);
    let mut promised = 24;
    while append(&mut driver).is_ok() {
        promised += 1;
        driver.step_background();
    }
    let reason = log.stats().poisoned.expect("stopped");
    assert!(reason.contains("/log/"), "{reason}");
    vfs.set_full(false);
    let log = open(&vfs.all_unsynced_lost(), 4096).expect("open");
    let last = group(&log, 1).state().last.expect("entries");
    assert!(last >= LogId::new(1, promised - 1), "{last}, {promised}");
}
