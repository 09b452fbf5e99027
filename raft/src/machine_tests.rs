//! Which checkpoint a replica begins with.

use std::sync::Arc;

use bytes::Bytes;
use quorate_storage::commit_log::Flush;
use quorate_storage::snapshot::{SnapshotHeader, SnapshotKind, SnapshotStore};
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::sync::watch;

use super::{Log, Machine, most_crowded};
use crate::config::{GroupSpec, LogRetention};
use crate::state_machine::StateMachine;
use crate::types::{RaftStoredMembership, encode_membership};

const GROUP: RaftGroupId = RaftGroupId(7);

/// Its state is one byte.
#[derive(Debug, Default)]
struct Byte(u8);

impl StateMachine for Byte {
    fn apply(&mut self, _log_id: LogId, _body: &Bytes) -> Bytes {
        Bytes::new()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        Ok(vec![self.0])
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        self.0 = state.map_or(0, |state| state[0]);
        Ok(())
    }

    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.restore(Some(last), Some(state))
    }

    fn state_hash(&self) -> u64 {
        u64::from(self.0)
    }
}

/// A store with a snapshot at each index, its state the index.
fn store(kind: SnapshotKind, indexes: &[u64]) -> Arc<SnapshotStore> {
    let vfs = Arc::new(FaultVfs::new());
    let store = SnapshotStore::open(vfs, std::path::Path::new("/snapshots")).expect("open");
    for index in indexes {
        let header = SnapshotHeader {
            last: LogId::new(1, *index),
            membership: encode_membership(&RaftStoredMembership::default()),
            kind,
        };
        let body = [*index as u8];
        store.write(GROUP, &header, &body).expect("write");
    }
    Arc::new(store)
}

#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    purged: Option<LogId>,
    last: Option<LogId>,
}

impl Log for Ends {
    fn purged(&self) -> Option<LogId> {
        self.purged
    }

    fn last(&self) -> Option<LogId> {
        self.last
    }

    fn report_damage(&self, _reason: String) {}
}

fn open(store: &Arc<SnapshotStore>, last: Option<LogId>) -> Machine {
    try_open(store, Ends { purged: None, last }).expect("open")
}

fn try_open(store: &Arc<SnapshotStore>, ends: Ends) -> Result<Machine, StorageError> {
    let spec = GroupSpec {
        group: GROUP,
        founders: Vec::new(),
        replicas: Vec::new(),
        preferred: 1,
        flush: Flush::Sync,
        retention: LogRetention::Messages,
        checkpoint_every: 4,
    };
    let (applied, _) = watch::channel(None);
    let inner = Box::<Byte>::default();
    Machine::open(&spec, inner, store.clone(), Box::new(ends), applied)
}

#[test]
fn a_checkpoint_beyond_the_end_of_the_log_is_not_begun_with_nor_found_again() {
    let store = store(SnapshotKind::Checkpoint, &[4, 8]);
    let machine = open(&store, Some(LogId::new(1, 6)));
    assert_eq!(machine.state_hash(), (Some(LogId::new(1, 4)), 4));
    // Others may fill the indexes up to it; then it would be the state of another log.
    let left = store.list(GROUP).expect("list");
    assert_eq!(left, [LogId::new(1, 4)]);
    let machine = open(&store, None);
    assert_eq!(
        machine.state_hash(),
        (None, 0),
        "nothing is left of the log"
    );
}

#[test]
fn an_installed_snapshot_beyond_the_end_of_the_log_is_the_state() {
    let store = store(SnapshotKind::Boundary, &[8]);
    let machine = open(&store, Some(LogId::new(1, 6)));
    assert_eq!(machine.state_hash(), (Some(LogId::new(1, 8)), 8));
}

#[test]
fn a_log_that_was_purged_is_not_opened_without_its_boundary() {
    let ends = Ends {
        purged: Some(LogId::new(1, 4)),
        last: Some(LogId::new(1, 20)),
    };
    // A later checkpoint is sound, but whoever began with it would lack messages.
    let store = store(SnapshotKind::Checkpoint, &[8, 16]);
    let opened = try_open(&store, ends);
    assert!(matches!(opened, Err(StorageError::Damaged { .. })));
    let header = SnapshotHeader {
        last: LogId::new(1, 4),
        membership: encode_membership(&RaftStoredMembership::default()),
        kind: SnapshotKind::Boundary,
    };
    store.write(GROUP, &header, &[4]).expect("write");
    let machine = try_open(&store, ends).expect("open");
    assert_eq!(machine.state_hash(), (Some(LogId::new(1, 16)), 16));
    let boundary = machine.boundary().expect("read").expect("a boundary");
    assert_eq!(boundary.meta.last_log_id.map(|id| id.index), Some(4));
}

#[test]
fn checkpoints_thin_out_evenly_between_the_boundary_and_the_newest() {
    let mut all = Vec::new();
    for index in 1..200 {
        all.push(LogId::new(1, index * 10));
        while let Some(place) = most_crowded(&all) {
            all.remove(place);
        }
    }
    assert_eq!(all[0].index, 10);
    assert_eq!(all.last().map(|id| id.index), Some(1990));
    assert_eq!(all.len(), 11);
    let gaps = all.windows(2).map(|two| two[1].index - two[0].index);
    assert!(gaps.max() <= Some(1000), "{all:?}");
}
