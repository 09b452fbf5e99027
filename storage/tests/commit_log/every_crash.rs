//! The power goes at every operation of a fixed life of a log, and everything the disk may then hold is
//! recovered from.
//!
//! `CRASH_STATES=all` goes further: more mixtures of what survived, and recovery interrupted everywhere.

use std::time::Instant;

use quorate_storage::StorageError;
use quorate_storage::commit_log::{CommitLog, Flush};
use quorate_storage::vfs::fault::{CutLimits, FaultVfs};

use crate::model::*;
use crate::support::{DIR, config, vote};
use crate::workload::*;

/// How far to go.
struct Extent {
    limits: CutLimits,
    /// Of every so many states, one has its recovery interrupted at each operation.
    interrupt_every: usize,
}

impl Extent {
    fn asked() -> Self {
        let all = std::env::var("CRASH_STATES").is_ok_and(|asked| asked == "all");
        let limits = CutLimits {
            combined: 6,
            samples: if all { 64 } else { 6 },
            tears: if all { 24 } else { 4 },
            seed: 1,
        };
        let interrupt_every = if all { 4 } else { 40 };
        Self {
            limits,
            interrupt_every,
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    points: u64,
    states: usize,
    /// Recoveries that were interrupted, and what they may have left.
    interrupted: usize,
    left_by_recovery: usize,
}

/// Says where a failed check was.
struct Place(Variant, u64, usize);

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(variant, point, state) = self;
            eprintln!("{variant:?}, power lost after {point} operations, state {state}");
        }
    }
}

#[test]
fn every_state_of_every_crash_is_recovered_from() {
    let extent = Extent::asked();
    let started = Instant::now();
    let mut tally = Tally::default();
    for variant in VARIANTS {
        let vfs = FaultVfs::new();
        let (lived, whole) = live(vfs.clone(), variant);
        whole.expect("a life without a fault");
        let moved = lived.expect("a session").moved;
        assert!(moved > 4, "cleaning moved {moved} entries only");
        for point in 0..=vfs.changes() {
            crash_at(variant, point, &extent, &mut tally);
        }
    }
    println!("{tally:?} in {:.1?}", started.elapsed());
    assert!(tally.states > 1000 && tally.interrupted > 10, "{tally:?}");
}

fn crash_at(variant: Variant, point: u64, extent: &Extent, tally: &mut Tally) {
    let vfs = FaultVfs::new();
    vfs.halt_after(point);
    let (lived, _) = live(vfs.clone(), variant);
    tally.points += 1;
    let session = match lived {
        Some(session) => session,
        None => Session::open(FaultVfs::new(), config(4096), Session::nothing()).expect("open"),
    };
    let promises = session.promises();
    let cut = vfs.power_cuts(extent.limits);
    let cuts = cut.len();
    let cut = cut.into_iter().map(|state| (state, promises.durable));
    // A killed process leaves all it has written, and what it left may still be lost later.
    let killed = std::iter::once((vfs.kill(), promises.written));
    for (number, (state, least)) in cut.chain(killed).enumerate() {
        let _place = Place(variant, point, number);
        let untouched = state.kill();
        let found = recover(&state, &session, least);
        tally.states += 1;
        if number < cuts && tally.states.is_multiple_of(extent.interrupt_every) {
            interrupt(&untouched, &found, tally);
        }
    }
}

/// Recovers, checks what is there, and that it stays: through a power cut at once, new calls, another
/// power cut, and a restart in order.
fn recover(state: &FaultVfs, session: &Session, least: usize) -> World {
    let log = Session::open(state.clone(), config(4096), World::new()).expect("open");
    let found = world_of(&log.log);
    session.check(&found, least);
    drop(log);

    let again = state.all_unsynced_lost();
    let log = Session::open(again.clone(), config(4096), found.clone()).expect("open again");
    let mut log = log.count_bodies_from(session.bodies());
    assert_eq!(world_of(&log.log), found, "recovered twice");
    for id in 0..GROUPS {
        let last = log.model(id).last();
        let (term, next) = last.map_or((1, 0), |last| (last.term, last.index + 1));
        let entries = log.entries(term + 1, next, 2, 100);
        log.perform(Call::Append(id, entries, Flush::Sync))
            .expect("append");
    }
    log.perform(Call::Vote(1, vote(1000))).expect("vote");
    log.perform(Call::Settle).expect("write");
    assert_eq!(log.promises().durable, log.changes(), "all was promised");
    let expected = log.world();

    let last = again.all_unsynced_lost();
    let mut log = Session::open(last.clone(), config(4096), expected.clone()).expect("open");
    assert_eq!(world_of(&log.log), expected, "after new calls");
    log.close().expect("close");
    let log = Session::open(last, config(4096), expected.clone()).expect("open in order");
    assert_eq!(world_of(&log.log), expected, "after a restart in order");
    assert_eq!(log.log.recovery().truncated_tail, None);
    found
}

/// Recovery loses the power at each of its own operations; the next one finds the same.
fn interrupt(state: &FaultVfs, found: &World, tally: &mut Tally) {
    let limits = CutLimits {
        combined: 3,
        samples: 4,
        tears: 2,
        seed: 2,
    };
    for point in 0.. {
        let vfs = state.kill();
        vfs.halt_after(point);
        let opened = Session::open(vfs.clone(), config(4096), World::new());
        let whole = vfs.changes() <= point;
        match opened {
            Ok(_) => {}
            Err(StorageError::Io { .. }) if !whole => {}
            Err(error) => panic!("{error}"),
        }
        tally.interrupted += 1;
        for left in vfs.power_cuts(limits) {
            let damage = CommitLog::inspect(&left, std::path::Path::new(DIR)).expect("inspect");
            assert_eq!(damage.damaged, [], "after {point} operations of recovery");
            let log = Session::open(left, config(4096), World::new()).expect("open");
            assert_eq!(
                &world_of(&log.log),
                found,
                "after {point} operations of recovery"
            );
            tally.left_by_recovery += 1;
        }
        if whole {
            return;
        }
    }
}
