//! Tests of the snapshot store.

use std::fs;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::testing::TestVfs;

const GROUP: RaftGroupId = RaftGroupId(17);

fn store() -> (tempfile::TempDir, TestVfs, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let vfs = TestVfs::default();
    let store = SnapshotStore::open(Arc::new(vfs.clone()), &dir.path().join("snapshots")).unwrap();
    (dir, vfs, store)
}

fn header(term: u64, index: u64) -> SnapshotHeader {
    SnapshotHeader {
        last: LogId::new(term, index),
        membership: Bytes::from_static(b"1,2,3"),
        kind: SnapshotKind::Checkpoint,
    }
}

fn is_damaged<T>(result: &Result<T, StorageError>) -> bool {
    matches!(result, Err(StorageError::Damaged { .. }))
}

#[test]
fn what_was_written_is_read_back_and_listed_in_order() {
    let (dir, _, store) = store();
    let boundary = SnapshotHeader {
        membership: Bytes::new(),
        kind: SnapshotKind::Boundary,
        ..header(3, 9)
    };
    // Ascending by index, also where the term is higher at a lower index.
    store.write(GROUP, &header(2, 100), b"newer").unwrap();
    store.write(GROUP, &boundary, b"").unwrap();
    store
        .write(RaftGroupId(5), &header(1, 1), b"other")
        .unwrap();
    assert_eq!(
        store.list(GROUP).unwrap(),
        [LogId::new(3, 9), LogId::new(2, 100)]
    );
    let reopened = SnapshotStore::open(Arc::new(TestVfs::default()), &store.dir).unwrap();
    assert_eq!(reopened.groups().unwrap(), [RaftGroupId(5), GROUP]);
    let read = reopened.read(GROUP, LogId::new(2, 100)).unwrap();
    assert_eq!(read, (header(2, 100), Bytes::from_static(b"newer")));
    assert_eq!(
        reopened.read(GROUP, LogId::new(3, 9)).unwrap(),
        (boundary, Bytes::new())
    );
    assert_eq!(
        reopened.read_newest(GROUP).unwrap().unwrap().0.last.index,
        100
    );
    assert!(reopened.read_newest(RaftGroupId(99)).unwrap().is_none());
    let name = "snapshots/00000000000000000017/00000000000000000100-00000000000000000002.snap";
    assert!(dir.path().join(name).exists());
}

#[test]
fn writing_again_replaces() {
    let (_dir, _, store) = store();
    store.write(GROUP, &header(1, 5), b"old").unwrap();
    let promoted = SnapshotHeader {
        kind: SnapshotKind::Boundary,
        ..header(1, 5)
    };
    store.write(GROUP, &promoted, b"new").unwrap();
    let read = store.read(GROUP, LogId::new(1, 5)).unwrap();
    assert_eq!(read, (promoted, Bytes::from_static(b"new")));
    assert_eq!(store.list(GROUP).unwrap().len(), 1);
}

#[test]
fn every_flipped_byte_and_every_truncation_is_noticed_and_set_aside() {
    let (_dir, _, store) = store();
    let last = LogId::new(1, 5);
    store.write(GROUP, &header(1, 5), b"some state").unwrap();
    let path = store.path(GROUP, last);
    let good = fs::read(&path).unwrap();
    let aside = files::with_suffix(&path, DAMAGED_SUFFIX);
    let flipped = (0..good.len()).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        bytes
    });
    let shorter = (0..good.len()).map(|len| good[..len].to_vec());
    let longer = [[&good[..], b"x"].concat()];
    for bytes in flipped.chain(shorter).chain(longer) {
        fs::write(&path, &bytes).unwrap();
        assert!(is_damaged(&store.read(GROUP, last)));
        assert_eq!(
            fs::read(&aside).unwrap(),
            bytes,
            "kept for a person to look at"
        );
        assert!(!path.exists());
        assert_eq!(store.list(GROUP).unwrap(), []);
        assert!(matches!(
            store.read(GROUP, last),
            Err(StorageError::Io { .. })
        ));
    }
    fs::write(&path, &good).unwrap();
    store.read(GROUP, last).unwrap();
}

#[test]
fn a_snapshot_under_a_wrong_name_is_not_served() {
    let (_dir, _, store) = store();
    store.write(GROUP, &header(1, 5), b"state").unwrap();
    let other = RaftGroupId(18);
    store.write(other, &header(1, 6), b"state").unwrap();
    let good = fs::read(store.path(GROUP, LogId::new(1, 5))).unwrap();
    for (group, last) in [
        (GROUP, LogId::new(1, 7)),
        (GROUP, LogId::new(2, 5)),
        (other, LogId::new(1, 5)),
    ] {
        fs::write(store.path(group, last), &good).unwrap();
        assert!(is_damaged(&store.read(group, last)));
    }
}

#[test]
fn the_newest_sound_one_is_found_behind_damaged_ones() {
    let (_dir, _, store) = store();
    for index in [5, 6, 7] {
        store.write(GROUP, &header(1, index), b"state").unwrap();
    }
    for index in [6, 7] {
        fs::write(store.path(GROUP, LogId::new(1, index)), b"junk").unwrap();
    }
    assert_eq!(store.read_newest(GROUP).unwrap().unwrap().0, header(1, 5));
}

#[test]
fn removal_and_keeping_the_newest() {
    let (_dir, _, store) = store();
    for index in 1..=6 {
        store.write(GROUP, &header(1, index), b"state").unwrap();
    }
    store.remove(GROUP, LogId::new(1, 6)).unwrap();
    store.remove(GROUP, LogId::new(1, 6)).unwrap();
    store.remove(RaftGroupId(99), LogId::new(1, 6)).unwrap();
    let boundary = LogId::new(1, 2);
    let removed = store.keep_newest(GROUP, 2, Some(boundary)).unwrap();
    assert_eq!(removed, [LogId::new(1, 1), LogId::new(1, 3)]);
    let left: Vec<u64> = store
        .list(GROUP)
        .unwrap()
        .iter()
        .map(|id| id.index)
        .collect();
    assert_eq!(left, [2, 4, 5]);
    assert_eq!(store.keep_newest(GROUP, 9, None).unwrap(), []);
    store.remove_group(GROUP).unwrap();
    assert_eq!(store.list(GROUP).unwrap(), []);
    assert_eq!(fs::read_dir(store.dir_of(GROUP)).unwrap().count(), 0);
}

#[test]
fn leftovers_are_removed_on_open_and_strangers_left_alone() {
    let (_dir, vfs, store) = store();
    store.write(GROUP, &header(1, 5), b"state").unwrap();
    let dir = store.dir_of(GROUP);
    let temp = dir.join("00000000000000000009-00000000000000000001.snap.3.tmp");
    fs::write(&temp, b"half").unwrap();
    fs::write(dir.join("notes.txt"), b"mine").unwrap();
    fs::write(dir.join("7-1.snap"), b"mine").unwrap();
    let store = SnapshotStore::open(Arc::new(vfs), &store.dir).unwrap();
    assert!(!temp.exists());
    assert!(dir.join("notes.txt").exists());
    assert_eq!(store.list(GROUP).unwrap(), [LogId::new(1, 5)]);
}

#[test]
fn a_failure_at_any_step_leaves_the_old_snapshot_and_no_leftover() {
    let (_dir, vfs, store) = store();
    store.write(GROUP, &header(1, 5), b"old").unwrap();
    let s = &vfs.0;
    for switch in [&s.fail_create, &s.fail_write, &s.fail_sync, &s.fail_rename] {
        switch.store(true, SeqCst);
        assert!(store.write(GROUP, &header(1, 5), b"new").is_err());
        assert!(store.write(GROUP, &header(1, 6), b"new").is_err());
        switch.store(false, SeqCst);
        assert_eq!(&store.read(GROUP, LogId::new(1, 5)).unwrap().1[..], b"old");
        assert_eq!(fs::read_dir(store.dir_of(GROUP)).unwrap().count(), 1);
    }
    s.fail_sync_dir.store(true, SeqCst);
    assert!(store.write(GROUP, &header(1, 6), b"new").is_err());
}

#[test]
fn a_new_group_costs_fsyncs_of_the_directories_above_too() {
    let (_dir, vfs, store) = store();
    let before = vfs.0.dir_syncs.load(SeqCst);
    store.write(GROUP, &header(1, 5), b"state").unwrap();
    // The store's own entry, the group's directory, and the snapshot's name in it.
    assert_eq!(vfs.0.dir_syncs.load(SeqCst) - before, 3);
    assert_eq!(vfs.0.syncs.load(SeqCst), 1);
}
