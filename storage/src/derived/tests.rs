//! Tests of the derived store.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::LogId;

const G: RaftGroupId = RaftGroupId(7);

struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("derived")
    }

    fn open(&self) -> DerivedStore {
        DerivedStore::open(&self.path()).unwrap()
    }
}

fn put(key: &str, value: &str) -> DerivedWrite {
    (key.into(), Some(value.into()))
}

fn at(index: u64) -> LogId {
    LogId::new(1, index)
}

fn keys(group: &DerivedGroup, prefix: &str) -> Vec<String> {
    let pairs = group.scan(prefix.as_bytes()).unwrap();
    let text = |key: &[u8]| String::from_utf8(key.to_vec()).unwrap();
    pairs.iter().map(|(key, _)| text(key)).collect()
}

#[test]
fn state_and_applied_log_id_come_back_together() {
    let setup = Setup::new();
    let store = setup.open();
    let group = store.group(G);
    assert_eq!(group.applied().unwrap(), None);
    group
        .write(
            vec![put("a/1", "x"), put("a/2", ""), put("b/1", "z")],
            at(5),
        )
        .unwrap();
    group
        .write(vec![("a/1".into(), None), put("a/3", "w")], at(6))
        .unwrap();
    group.write(vec![], at(9)).unwrap();
    drop((group, store));
    let store = setup.open();
    assert_eq!(store.reset_report(), None);
    let group = store.group(G);
    assert_eq!(group.applied().unwrap(), Some(at(9)));
    assert_eq!(keys(&group, "a/"), ["a/2", "a/3"]);
    assert_eq!(keys(&group, ""), ["a/2", "a/3", "b/1"]);
    assert_eq!(group.get(b"a/2").unwrap(), Some(Bytes::new()));
    assert_eq!(group.get(b"a/1").unwrap(), None);
    assert!(matches!(
        group.write(vec![], at(8)),
        Err(StorageError::InvalidArgument(_))
    ));
    assert_eq!(group.applied().unwrap(), Some(at(9)));
}

#[test]
fn rewinding_undoes_what_is_younger_and_goes_on_from_there() {
    let setup = Setup::new();
    let store = setup.open();
    let group = store.group(G);
    group.write(vec![put("a", "old")], at(5)).unwrap();
    group
        .write(vec![put("a", "new"), put("b", "x")], at(9))
        .unwrap();
    group
        .rewind(vec![put("a", "old"), ("b".into(), None)], at(5))
        .unwrap();
    assert_eq!(group.applied().unwrap(), Some(at(5)));
    group.write(vec![put("c", "y")], at(6)).unwrap();
    group.flush().unwrap();
    drop((group, store));
    let store = setup.open();
    assert_eq!(store.reset_report(), None, "the fingerprint went along");
    assert_eq!(keys(&store.group(G), ""), ["a", "c"]);
    assert!(!store.is_damaged());
}

#[test]
fn groups_do_not_see_each_other() {
    let setup = Setup::new();
    let store = setup.open();
    let ids = [0, 1, 2, 256, u64::MAX].map(RaftGroupId);
    for id in ids {
        store
            .group(id)
            .write(vec![put("k", &id.to_string())], at(id.0 % 9 + 1))
            .unwrap();
    }
    assert_eq!(store.groups().unwrap(), ids);
    store.group(RaftGroupId(1)).clear().unwrap();
    for id in ids {
        let group = store.group(id);
        let left = if id.0 == 1 {
            None
        } else {
            Some(Bytes::from(id.to_string()))
        };
        assert_eq!(group.get(b"k").unwrap(), left);
        assert_eq!(group.applied().unwrap().is_some(), left.is_some());
        assert_eq!(group.scan(b"").unwrap().len(), usize::from(left.is_some()));
    }
    assert_eq!(store.groups().unwrap().len(), 4);
}

#[test]
fn pages_go_on_after_the_last_key() {
    let setup = Setup::new();
    let group = setup.open().group(G);
    let batch = ["a", "p", "p\0", "p1", "p11", "q"].map(|key| put(key, "v"));
    group.write(batch.into(), at(1)).unwrap();
    let mut seen = Vec::new();
    let mut after: Option<Bytes> = None;
    loop {
        let page = group.scan_page(b"p", after.as_deref(), 2).unwrap();
        let Some((last, _)) = page.last() else { break };
        after = Some(last.clone());
        seen.extend(page.into_iter().map(|(key, _)| key));
    }
    assert_eq!(seen, ["p", "p\0", "p1", "p11"]);
    assert_eq!(group.scan_page(b"p", Some(b"a"), 1).unwrap()[0].0, "p");
}

#[test]
fn clearing_takes_more_than_one_batch_and_the_group_starts_again() {
    let setup = Setup::new();
    let store = setup.open();
    let group = store.group(G);
    let batch = (0..2500).map(|n| put(&format!("{n}"), "v")).collect();
    group.write(batch, at(50)).unwrap();
    group.clear().unwrap();
    assert_eq!(group.applied().unwrap(), None);
    assert!(group.scan(b"").unwrap().is_empty());
    group.write(vec![put("a", "b")], at(3)).unwrap();
    drop((group, store));
    let group = setup.open().group(G);
    assert_eq!(group.applied().unwrap(), Some(at(3)));
    assert_eq!(keys(&group, ""), ["a"]);
}

#[test]
fn an_interrupted_clearing_is_finished_on_opening() {
    let setup = Setup::new();
    let store = setup.open();
    store
        .group(G)
        .write(vec![put("a", "b"), put("c", "d")], at(3))
        .unwrap();
    drop(store);
    let db = open_sled(&setup.path());
    db.open_tree("clearing")
        .unwrap()
        .insert(G.0.to_be_bytes(), &[])
        .unwrap();
    db.remove(database::meta_key(G)).unwrap();
    drop(db);
    let store = setup.open();
    assert_eq!(store.reset_report(), None);
    assert!(store.groups().unwrap().is_empty());
    assert!(store.group(G).scan(b"").unwrap().is_empty());
}

/// sled gives its lock back some time after the last handle is dropped.
fn open_sled(path: &Path) -> sled::Db {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match sled::open(path) {
            Err(sled::Error::Io(error)) if Instant::now() < deadline => {
                assert!(error.to_string().contains("lock"), "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return opened.unwrap(),
        }
    }
}

#[test]
fn state_that_does_not_match_its_fingerprint_is_given_up() {
    let data = |key: &[u8]| [&database::data_prefix(G)[..], key].concat();
    type Harm = Box<dyn Fn(&sled::Db)>;
    let harms: [Harm; 5] = [
        Box::new(move |db| drop(db.remove(data(b"c")).unwrap())),
        Box::new(move |db| drop(db.insert(data(b"a"), "B").unwrap())),
        Box::new(move |db| drop(db.insert(data(b"x"), "").unwrap())),
        Box::new(|db| drop(db.remove(database::meta_key(G)).unwrap())),
        Box::new(|db| drop(db.insert(database::meta_key(G), "short").unwrap())),
    ];
    for (number, harm) in harms.iter().enumerate() {
        let setup = Setup::new();
        let store = setup.open();
        store
            .group(G)
            .write(vec![put("a", "b"), put("c", "d")], at(3))
            .unwrap();
        drop(store);
        let db = open_sled(&setup.path());
        harm(&db);
        drop(db);
        let store = setup.open();
        let report = store
            .reset_report()
            .unwrap_or_else(|| panic!("harm {number}"));
        assert!(report.moved_to.join("db").exists());
        assert!(store.groups().unwrap().is_empty());
        store.group(G).write(vec![put("a", "b")], at(1)).unwrap();
    }
}

#[test]
fn a_reset_refuses_old_handles() {
    let setup = Setup::new();
    let store = setup.open();
    let old = store.group(G);
    old.write(vec![put("a", "b")], at(3)).unwrap();
    store.reset("a test").unwrap();
    store.reset("again").unwrap();
    assert!(matches!(old.applied(), Err(StorageError::Damaged { .. })));
    assert!(matches!(
        old.write(vec![], at(4)),
        Err(StorageError::Damaged { .. })
    ));
    let new = store.group(G);
    assert_eq!(new.applied().unwrap(), None);
    new.write(vec![put("a", "c")], at(1)).unwrap();
    assert_eq!(store.reset_report().unwrap().reason, "again");
}

#[test]
fn a_database_in_use_is_not_taken_for_damaged() {
    let setup = Setup::new();
    let store = setup.open();
    store.group(G).write(vec![put("a", "b")], at(3)).unwrap();
    assert!(matches!(
        DerivedStore::open(&setup.path()),
        Err(StorageError::Io { .. })
    ));
    assert_eq!(store.group(G).applied().unwrap(), Some(at(3)));
    assert_eq!(fs::read_dir(setup.dir.path()).unwrap().count(), 1);
}

/// Writes 250 versions of a counter in many keys; at log index n all of them are n.
fn write_versions(store: &DerivedStore) {
    let group = store.group(G);
    for index in 1..=250 {
        let batch = (0..60).map(|n| put(&format!("{n:03}"), &format!("{index:0100}")));
        group.write(batch.collect(), at(index)).unwrap();
    }
}

/// Either empty, or a state that existed: all keys at the version of the applied index.
fn assert_consistent(store: &DerivedStore, context: &str) {
    let group = store.group(G);
    let pairs = group.scan(b"").unwrap();
    match group.applied().unwrap() {
        None => assert!(pairs.is_empty(), "{context}"),
        Some(applied) => {
            assert_eq!(pairs.len(), 60, "{context}");
            let wanted = format!("{:0100}", applied.index);
            assert!(pairs.iter().all(|(_, value)| value == &wanted), "{context}");
        }
    }
    group.clear().unwrap();
    group.write(vec![put("a", "b")], at(1)).unwrap();
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn whatever_happens_to_the_files_the_state_is_one_that_existed_or_empty() {
    let setup = Setup::new();
    write_versions(&setup.open());
    let good = setup.dir.path().join("good");
    fs::rename(setup.path(), &good).unwrap();
    let len = fs::metadata(good.join("db")).unwrap().len();
    let at_end = at(250);
    let mut changed = 0;
    for n in 0..24u64 {
        let path = setup.dir.path().join(format!("harmed-{n}"));
        copy_dir(&good, &path);
        let at = len * n / 24;
        let mut bytes = fs::read(path.join("db")).unwrap();
        match n % 3 {
            0 => bytes[at as usize..]
                .iter_mut()
                .take(3000)
                .for_each(|b| *b = !*b),
            1 => bytes.truncate(at as usize),
            _ => bytes[at as usize..]
                .iter_mut()
                .take(70_000)
                .for_each(|b| *b = 0),
        }
        fs::write(path.join("db"), bytes).unwrap();
        let context = format!("harm {n} at {at} of {len}");
        let store = DerivedStore::open(&path).unwrap_or_else(|e| panic!("{context}: {e}"));
        let applied = store.group(G).applied().unwrap();
        changed += u32::from(applied != Some(at_end));
        assert_consistent(&store, &context);
    }
    assert!(changed > 4, "little was harmed: {changed}");
}

#[test]
fn a_killed_process_leaves_a_state_that_existed() {
    let setup = Setup::new();
    let store = setup.open();
    let group = store.group(G);
    for index in 1..=60 {
        let batch = (0..60).map(|n| put(&format!("{n:03}"), &format!("{index:0100}")));
        group.write(batch.collect(), at(index)).unwrap();
        if index == 30 {
            store.flush().unwrap();
        }
        if index % 12 == 0 {
            // What the operating system has is what a new process finds.
            let killed = setup.dir.path().join(format!("killed-{index}"));
            copy_dir(&setup.path(), &killed);
            let found = DerivedStore::open(&killed).unwrap();
            assert_eq!(found.reset_report(), None);
            let applied = found.group(G).applied().unwrap();
            assert!(
                index < 30 || applied >= Some(at(30)),
                "flush did nothing: {applied:?}"
            );
            assert_consistent(&found, &format!("killed at {index}"));
        }
    }
}

#[test]
fn other_files_may_be_harmed_too() {
    let setup = Setup::new();
    write_versions(&setup.open());
    let good = setup.dir.path().join("good");
    fs::rename(setup.path(), &good).unwrap();
    let others: Vec<_> = fs::read_dir(&good)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && !path.ends_with("db"))
        .collect();
    assert!(!others.is_empty());
    for (n, file) in others.iter().enumerate() {
        for (m, harm) in [&b""[..], &[0xff; 90]].iter().enumerate() {
            let path = setup.dir.path().join(format!("harmed-{n}-{m}"));
            copy_dir(&good, &path);
            fs::write(path.join(file.file_name().unwrap()), harm).unwrap();
            let context = format!("{} {m}", file.display());
            let store = DerivedStore::open(&path).unwrap_or_else(|e| panic!("{context}: {e}"));
            assert_consistent(&store, &context);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_map(
        batches in proptest::collection::vec(
            (proptest::collection::vec((0u8..20, proptest::option::of(any::<u16>())), 0..9), any::<bool>()),
            1..12,
        ),
    ) {
        let setup = Setup::new();
        let mut store = setup.open();
        let mut model = BTreeMap::new();
        for (index, (batch, reopen)) in batches.into_iter().enumerate() {
            let mut writes = Vec::new();
            for (key, value) in batch {
                let value = value.map(|v| v.to_be_bytes().to_vec());
                match &value {
                    Some(value) => drop(model.insert(vec![key], value.clone())),
                    None => drop(model.remove(&vec![key])),
                }
                writes.push((vec![key], value));
            }
            store.group(G).write(writes, at(index as u64)).unwrap();
            if reopen {
                drop(store);
                store = setup.open();
                prop_assert_eq!(store.reset_report(), None);
            }
            let group = store.group(G);
            let got: BTreeMap<Vec<u8>, Vec<u8>> = group.scan(b"").unwrap().into_iter()
                .map(|(key, value)| (key.to_vec(), value.to_vec()))
                .collect();
            prop_assert_eq!(&got, &model);
            prop_assert_eq!(group.applied().unwrap(), Some(at(index as u64)));
        }
    }
}
