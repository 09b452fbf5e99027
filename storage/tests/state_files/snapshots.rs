//! A snapshot is there, whole, or it is not; and one that was promised is.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use quorate_storage::snapshot::{SnapshotHeader, SnapshotKind, SnapshotStore};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};

use crate::{FEW, OPERATIONS, Place, endings, limits};

const DIR: &str = "/data/snapshots";

/// Bodies by group and log id.
type Stored = BTreeMap<(u64, LogId), Vec<u8>>;

/// What there was before the step that did not end, and what there is after it.
#[derive(Debug, Default)]
struct Told {
    before: Stored,
    after: Stored,
}

#[derive(Debug)]
enum Step {
    Write(u64, LogId, Vec<u8>),
    Remove(u64, LogId),
    /// How many of the newest, and the boundary.
    Keep(u64, usize, LogId),
    RemoveGroup(u64),
    Reopen,
}

fn steps() -> Vec<Step> {
    let id = LogId::new;
    let body = |byte: u8, size: usize| vec![byte; size];
    vec![
        Step::Write(1, id(1, 5), body(1, 100)),
        Step::Write(1, id(1, 10), body(2, 1300)),
        Step::Write(2, id(1, 1), body(3, 0)),
        Step::Write(1, id(2, 20), body(4, 700)),
        Step::Reopen,
        // The boundary outlives newer ones.
        Step::Keep(1, 1, id(1, 5)),
        // Another state of the same log id takes the place of the first.
        Step::Write(1, id(2, 20), body(5, 600)),
        Step::Write(1, id(2, 30), body(6, 50)),
        Step::Keep(1, 1, id(1, 5)),
        Step::Remove(1, id(1, 5)),
        Step::RemoveGroup(2),
        Step::Write(2, id(4, 9), body(7, 20)),
        Step::Reopen,
    ]
}

fn open(vfs: &FaultVfs) -> Result<SnapshotStore, StorageError> {
    SnapshotStore::open(Arc::new(vfs.clone()), Path::new(DIR))
}

fn header(last: LogId) -> SnapshotHeader {
    SnapshotHeader {
        last,
        membership: Bytes::from_static(b"1,2,3"),
        kind: SnapshotKind::Checkpoint,
    }
}

fn keep(stored: &mut Stored, group: u64, newest: usize, boundary: LogId) {
    let mut ids: Vec<_> = stored.keys().filter(|key| key.0 == group).collect();
    ids.sort_by_key(|key| key.1.index);
    let old = ids.len().saturating_sub(newest);
    let gone: Vec<_> = ids[..old].iter().map(|key| **key).collect();
    for key in gone.into_iter().filter(|key| key.1 != boundary) {
        stored.remove(&key);
    }
}

fn take(step: &Step, store: &mut SnapshotStore, vfs: &FaultVfs) -> Result<(), StorageError> {
    match step {
        Step::Write(group, last, body) => store.write(RaftGroupId(*group), &header(*last), body),
        Step::Remove(group, last) => store.remove(RaftGroupId(*group), *last),
        Step::Keep(group, newest, boundary) => store
            .keep_newest(RaftGroupId(*group), *newest, Some(*boundary))
            .map(drop),
        Step::RemoveGroup(group) => store.remove_group(RaftGroupId(*group)),
        Step::Reopen => open(vfs).map(|reopened| *store = reopened),
    }
}

/// Takes all steps or those before the first failure. The step that failed succeeds when `again`.
fn live(vfs: &FaultVfs, again: bool) -> (Told, Result<(), StorageError>) {
    let mut told = Told::default();
    let mut failure = Ok(());
    let mut store = match open(vfs) {
        Ok(store) => store,
        Err(error) if again => {
            failure = Err(error);
            open(vfs).expect("a second attempt")
        }
        Err(error) => return (told, Err(error)),
    };
    for step in steps() {
        match &step {
            Step::Write(group, last, body) => {
                told.after.insert((*group, *last), body.clone());
            }
            Step::Remove(group, last) => drop(told.after.remove(&(*group, *last))),
            Step::Keep(group, newest, boundary) => {
                keep(&mut told.after, *group, *newest, *boundary);
            }
            Step::RemoveGroup(group) => told.after.retain(|key, _| key.0 != *group),
            Step::Reopen => {}
        }
        if let Err(error) = take(&step, &mut store, vfs) {
            if !again {
                return (told, Err(error));
            }
            failure = Err(error);
            take(&step, &mut store, vfs).expect("a second attempt");
        }
        told.before = told.after.clone();
    }
    (told, failure)
}

fn stored(store: &SnapshotStore) -> Stored {
    let mut found = Stored::new();
    for group in store.groups().expect("groups") {
        let ids = store.list(group).expect("list");
        for last in &ids {
            let (read, body) = store.read(group, *last).expect("read");
            assert_eq!(read, header(*last));
            found.insert((group.0, *last), body.to_vec());
        }
        let newest = store.read_newest(group).expect("read the newest");
        assert_eq!(newest.map(|(header, _)| header.last), ids.last().copied());
    }
    found
}

/// Whether each snapshot is as it was before the unfinished step or after it.
fn check(found: &Stored, told: &Told) {
    let keys = told.before.keys().chain(told.after.keys());
    for key in keys.chain(found.keys()) {
        let now = found.get(key);
        let legal = now == told.before.get(key) || now == told.after.get(key);
        assert!(legal, "{key:?} is {now:?}: {told:?}");
    }
}

fn recover(state: &FaultVfs, told: &Told) {
    let store = open(state).expect("open");
    let found = stored(&store);
    check(&found, told);
    for group in store.groups().expect("groups") {
        let dir = Path::new(DIR).join(format!("{:020}", group.0));
        let files = state.list(&dir).expect("list");
        let strange = files
            .iter()
            .find(|f| !f.to_string_lossy().ends_with(".snap"));
        assert_eq!(strange, None);
    }
    drop(store);
    // What was found may have been built upon.
    let again = state.all_unsynced_lost();
    let store = open(&again).expect("open again");
    assert_eq!(stored(&store), found, "after a second power cut");
    let new = header(LogId::new(9, 99));
    store.write(RaftGroupId(1), &new, b"new").expect("write");
    let store = open(&again.all_unsynced_lost()).expect("open once more");
    let (_, body) = store.read(RaftGroupId(1), new.last).expect("read");
    assert_eq!(&body[..], b"new");
}

#[test]
fn every_state_of_every_crash_is_recovered_from() {
    let started = Instant::now();
    let whole = FaultVfs::new();
    live(&whole, false).1.expect("a life without a fault");
    let mut states = 0;
    for point in 0..=whole.changes() {
        let vfs = FaultVfs::new();
        vfs.halt_after(point);
        let (told, _) = live(&vfs, false);
        for (number, state) in endings(&vfs, limits()).enumerate() {
            let _place = Place(format!("power lost after {point}, state {number}"));
            recover(&state, &told);
            states += 1;
        }
    }
    let points = whole.changes() + 1;
    println!(
        "snapshots: {points} points, {states} states in {:.1?}",
        started.elapsed()
    );
    assert!(states > 200);
}

#[test]
fn every_failing_operation_is_told_and_can_be_tried_again() {
    let whole = FaultVfs::new();
    live(&whole, false).1.expect("a life without a fault");
    let mut told_of = 0;
    for operation in OPERATIONS {
        for nth in 1..=whole.count(operation) {
            for kind in [ErrorKind::Other, ErrorKind::StorageFull] {
                let _place = Place(format!("{operation:?} number {nth}, {kind}"));
                let vfs = FaultVfs::new();
                vfs.fail_nth(operation, nth, kind);
                let (told, ended) = live(&vfs, false);
                if let Err(error) = ended {
                    assert!(matches!(error, StorageError::Io { .. }), "{error}");
                    assert!(error.to_string().contains(" /"), "{error}");
                    told_of += 1;
                }
                for state in endings(&vfs, FEW) {
                    recover(&state, &told);
                }
                let vfs = FaultVfs::new();
                vfs.fail_nth(operation, nth, kind);
                let (told, _) = live(&vfs, true);
                for state in endings(&vfs, FEW) {
                    recover(&state, &told);
                }
            }
        }
    }
    assert!(told_of > 50, "{told_of}");
}

#[test]
fn a_wrong_byte_is_never_served() {
    let vfs = FaultVfs::new();
    let (told, _) = live(&vfs, false);
    let reads = vfs.count(quorate_storage::vfs::fault::Operation::Read);
    assert_eq!(reads, 0, "nothing is read before it is asked for");
    for ((group, last), body) in &told.after {
        for at in 0..(body.len() + 64) {
            let disk = vfs.kill();
            let store = open(&disk).expect("open");
            disk.flip_nth_read(1, at);
            let error = store.read(RaftGroupId(*group), *last).expect_err("damage");
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(".snap"), "{error}");
        }
    }
}
