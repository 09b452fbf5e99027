//! Tests of the key index.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::testing::TestVfs;
use crate::vfs::os::OsVfs;

const AT: LogId = LogId {
    term: 3,
    index: 70_000,
};

fn open(dir: &Path) -> KeyIndex {
    KeyIndex::open(Arc::new(OsVfs), dir.to_path_buf(), |_| true).unwrap()
}

/// Every second message has a key, one of `keys`.
fn entries(block: u64, keys: u64) -> Vec<KeyEntry> {
    let first = block * BLOCK_OFFSETS;
    let offsets = (first..first + BLOCK_OFFSETS).step_by(2);
    offsets
        .map(|offset| KeyEntry {
            hash: hash_of(offset / 2 % keys),
            offset,
        })
        .collect()
}

fn hash_of(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn naive(entries: &[KeyEntry], hash: u64) -> Vec<u64> {
    let same = entries.iter().filter(|entry| entry.hash == hash);
    same.map(|entry| entry.offset).collect()
}

#[test]
fn finds_what_was_built_after_opening_again_too() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("keys").join("7");
    for (block, keys) in [(0, 1), (1, 3), (2, 1000), (3, u64::MAX)] {
        let entries = entries(block, keys);
        open(&dir).build(block, AT, entries.clone()).unwrap();
        let index = open(&dir);
        let first = block * BLOCK_OFFSETS / 2;
        for key in [0, 1, 2, 999, first + 17, first + 32_767] {
            let found = index.find(block, hash_of(key));
            assert_eq!(
                found.unwrap(),
                naive(&entries, hash_of(key)),
                "{block} {key}"
            );
        }
        for hash in [1, u64::MAX] {
            assert_eq!(index.find(block, hash), Some(Vec::new()));
        }
    }
    let index = open(&dir);
    // 32,768 keys a block, 340 a page.
    assert_eq!(index.disk_bytes(), 4 * (1 + 97) * 4096);
    assert_eq!(index.find(4, 0), None, "it was not built");
}

#[test]
fn a_full_block_and_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    let all = (0..BLOCK_OFFSETS).map(|offset| KeyEntry {
        hash: offset,
        offset,
    });
    index.build(0, AT, all.collect()).unwrap();
    index.build(1, AT, Vec::new()).unwrap();
    assert_eq!(index.find(0, 0), Some(vec![0]));
    assert_eq!(
        index.find(0, BLOCK_OFFSETS - 1),
        Some(vec![BLOCK_OFFSETS - 1])
    );
    assert_eq!(index.find(1, 0), Some(Vec::new()));
    let stray = vec![KeyEntry { hash: 1, offset: 5 }];
    assert!(index.build(2, AT, stray).is_err());
}

#[test]
fn builds_full_blocks_once_and_trims_whole_ones() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    assert_eq!(index.next_to_build(0, BLOCK_OFFSETS - 1), None);
    assert_eq!(index.next_to_build(0, 3 * BLOCK_OFFSETS), Some(0));
    index.build(0, AT, entries(0, 5)).unwrap();
    index.build(2, AT, entries(2, 5)).unwrap();
    assert_eq!(index.next_to_build(0, 3 * BLOCK_OFFSETS), Some(1));
    index.build(1, AT, entries(1, 5)).unwrap();
    assert_eq!(index.next_to_build(0, 3 * BLOCK_OFFSETS + 9), None);
    index.trim(BLOCK_OFFSETS - 1).unwrap();
    assert!(index.has(0));
    index.trim(2 * BLOCK_OFFSETS).unwrap();
    assert_eq!((index.has(1), index.has(2)), (false, true));
    assert_eq!(
        index.next_to_build(2 * BLOCK_OFFSETS, 3 * BLOCK_OFFSETS),
        None
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    KeyIndex::remove(&OsVfs, dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_a_lost_tail_had_given_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    index.build(0, AT, entries(0, 5)).unwrap();
    index
        .build(
            1,
            LogId {
                index: 90_000,
                ..AT
            },
            entries(1, 5),
        )
        .unwrap();
    let vfs = Arc::new(OsVfs);
    let again = KeyIndex::open(vfs, dir.path().to_path_buf(), |id| id.index <= 70_000).unwrap();
    assert_eq!((again.has(0), again.has(1)), (true, false));
    assert_eq!(again.next_to_build(0, 2 * BLOCK_OFFSETS), Some(1));
}

#[test]
fn an_unfinished_file_means_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let vfs = TestVfs::default();
    let failing = |switch: &std::sync::atomic::AtomicBool, on| {
        switch.store(on, std::sync::atomic::Ordering::SeqCst);
    };
    for switch in [&vfs.0.fail_write, &vfs.0.fail_sync, &vfs.0.fail_rename] {
        let path = dir.path().to_path_buf();
        let index = KeyIndex::open(Arc::new(vfs.clone()), path, |_| true).unwrap();
        failing(switch, true);
        assert!(index.build(0, AT, entries(0, 5)).is_err());
        assert_eq!(index.find(0, hash_of(1)), None);
        failing(switch, false);
        let again = open(dir.path());
        assert_eq!(again.next_to_build(0, BLOCK_OFFSETS), Some(0));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    let index = open(dir.path());
    index.build(0, AT, entries(0, 5)).unwrap();
    assert!(index.find(0, hash_of(1)).is_some());
}

#[test]
fn a_file_that_went_away_is_built_again() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    index.build(0, AT, entries(0, 5)).unwrap();
    assert_eq!(index.next_to_build(0, BLOCK_OFFSETS), None);
    fs::remove_file(index.path(0)).unwrap();
    assert_eq!(index.find(0, hash_of(1)), None);
    assert_eq!(index.next_to_build(0, BLOCK_OFFSETS), Some(0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bad bytes are noticed when they are read, the file is given up, and nothing wrong is said.
    #[test]
    fn damage_is_never_obeyed(
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
        cut in any::<bool>(),
        seal in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        let sound = entries(0, 400);
        index.build(0, AT, sound.clone()).unwrap();
        let path = index.path(0);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if seal {
            // Somebody's checksum over other content: no panic, whatever it says.
            let page = &mut bytes[at / PAGE_BYTES * PAGE_BYTES..][..PAGE_BYTES];
            let crc = crc32c::crc32c(&page[..PAGE_BYTES - 4]);
            page[PAGE_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        if cut {
            bytes.truncate(at);
        }
        fs::write(&path, &bytes).unwrap();
        for index in [index, open(dir.path())] {
            for key in 0..400 {
                let found = index.find(0, hash_of(key));
                if !seal && let Some(found) = found {
                    prop_assert_eq!(found, naive(&sound, hash_of(key)));
                }
            }
            prop_assert!(seal || !index.has(0), "the damage was seen by one of the keys");
            let again = index.next_to_build(0, BLOCK_OFFSETS);
            prop_assert!(seal || again == Some(0));
        }
    }
}
