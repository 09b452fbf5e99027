//! openraft's own storage suite, against the real commit log on a real disk.
//!
//! It expects a snapshot to be of "now", so it runs with the group kind that snapshots so. Groups of
//! messages share all of it but that: theirs is the boundary.

use std::sync::Arc;

use bytes::Bytes;
use openraft::StorageError as RaftStorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use quorate_storage::commit_log::{CommitLog, CommitLogConfig, Flush};
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::sync::watch;

use crate::config::{GroupSpec, LogRetention};
use crate::log_store::LogStore;
use crate::machine::Machine;
use crate::state_machine::StateMachine;
use crate::types::TypeConfig;

/// Remembers how many commands it has seen.
#[derive(Debug, Default)]
struct Counter(u64);

impl StateMachine for Counter {
    fn apply(&mut self, _log_id: LogId, _body: &Bytes) -> Bytes {
        self.0 += 1;
        Bytes::new()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        Ok(self.0.to_le_bytes().to_vec())
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        self.0 = match state {
            None => 0,
            Some(state) => u64::from_le_bytes(
                state
                    .try_into()
                    .map_err(|_| StorageError::InvalidArgument("eight bytes".to_owned()))?,
            ),
        };
        Ok(())
    }

    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.restore(Some(last), Some(state))
    }

    fn state_hash(&self) -> u64 {
        self.0
    }
}

/// Keeps a store's directory for as long as the suite looks at it.
struct Guard {
    log: CommitLog,
    _dir: tempfile::TempDir,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.log.close().expect("an idle log closes");
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Machine, Guard> for Builder {
    async fn build(&self) -> Result<(Guard, LogStore, Machine), RaftStorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let vfs = Arc::new(OsVfs);
        let config = CommitLogConfig {
            segment_bytes: 1 << 20,
            ..CommitLogConfig::default()
        };
        let log = CommitLog::open(vfs.clone(), &dir.path().join("log"), config).map_err(|e| {
            RaftStorageError::from_io_error(
                openraft::ErrorSubject::Store,
                openraft::ErrorVerb::Read,
                e.into(),
            )
        })?;
        let snapshots = SnapshotStore::open(vfs, &dir.path().join("snapshots")).map_err(|e| {
            RaftStorageError::from_io_error(
                openraft::ErrorSubject::Store,
                openraft::ErrorVerb::Read,
                e.into(),
            )
        })?;
        let spec = GroupSpec {
            group: RaftGroupId(7),
            founders: Vec::new(),
            replicas: Vec::new(),
            preferred: 1,
            flush: Flush::Sync,
            retention: LogRetention::StateOnly,
            checkpoint_every: 4,
        };
        let (applied, _) = watch::channel(None);
        let group = log.group(spec.group);
        let machine = Machine::open(
            &spec,
            Box::<Counter>::default(),
            Arc::new(snapshots),
            Box::new(group.clone()),
            applied,
        )
        .map_err(|e| {
            RaftStorageError::from_io_error(
                openraft::ErrorSubject::Store,
                openraft::ErrorVerb::Read,
                e.into(),
            )
        })?;
        let store = LogStore::new(group, Flush::Sync, |_| false);
        Ok((Guard { log, _dir: dir }, store, machine))
    }
}

#[test]
fn openraft_accepts_the_store() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime
        .block_on(Suite::test_all(Builder))
        .expect("the suite passes");
}
