//! Snapshot files that are not what was written.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::{LogId, RaftGroupId, StorageError};

use crate::bounded::BoundedVfs;
use crate::mutate::{Input, corpus, fuzz};

const DIR: &str = "/snapshots";
pub const GROUP: RaftGroupId = RaftGroupId(17);
pub const LAST: LogId = LogId { term: 3, index: 9 };

fn store_with(bytes: &[u8]) -> (BoundedVfs, SnapshotStore) {
    let vfs = BoundedVfs::default();
    let store = SnapshotStore::open(Arc::new(vfs.clone()), Path::new(DIR)).expect("open");
    let name = format!("{:020}-{:020}.snap", LAST.index, LAST.term);
    vfs.put(&store.dir_of(GROUP).join(name), bytes);
    (vfs, store)
}

#[test]
fn snapshots_that_lie() {
    let good: BTreeSet<Vec<u8>> = corpus("snapshot").into_iter().map(|(_, b)| b).collect();
    fuzz("snapshot", 1500, |Input { bytes, seal }| {
        let mut bytes = bytes.clone();
        if *seal && let Some(end) = bytes.len().checked_sub(4) {
            let crc = crc32c::crc32c(&bytes[..end]);
            bytes[end..].copy_from_slice(&crc.to_le_bytes());
        }
        let (_vfs, store) = store_with(&bytes);
        match store.read(GROUP, LAST) {
            Ok((header, body)) => {
                assert!(*seal || good.contains(&bytes), "a snapshot nobody wrote");
                assert_eq!(header.last, LAST);
                // Written again, it reads the same.
                store.write(GROUP, &header, &body).expect("write");
                assert_eq!(store.read(GROUP, LAST).expect("read"), (header, body));
            }
            Err(StorageError::Damaged { .. }) => {
                assert_eq!(store.list(GROUP).expect("list"), [], "set aside");
                assert!(store.read_newest(GROUP).expect("read").is_none());
            }
            Err(other) => panic!("{other}"),
        }
    });
}
