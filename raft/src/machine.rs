//! The state machine as openraft sees it: applies, checkpoints and boundary snapshots.
//!
//! Checkpoints are written at the indexes that are multiples of [`GroupSpec::checkpoint_every`], and
//! after many bytes: at the same indexes on every replica. A group that keeps its messages in the
//! log never builds a snapshot of "now" while it has a checkpoint: what a newcomer installs is the
//! oldest one kept, and every retained entry after it reaches the newcomer by ordinary replication.

use std::collections::BTreeSet;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use quorate_storage::commit_log::GroupLog;
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::snapshot::{SnapshotHeader, SnapshotKind, SnapshotStore};
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::sync::watch;

use crate::blocking;
use crate::config::{GroupSpec, LogRetention};
use crate::state_machine::StateMachine;
use crate::types::{
    RaftLogId, RaftStoredMembership, Reply, Snapshot, SnapshotMeta, TypeConfig, decode_membership,
    encode_membership, from_raft_log_id, to_raft_log_id,
};

/// A checkpoint is also written once so many bytes of commands were applied since the last one:
/// large entries make a long way to apply again after a restart.
const CHECKPOINT_BYTES: u64 = 32 << 20;
/// How many checkpoints a group keeps beside its boundary, for a restart that finds the newest bad.
const CHECKPOINTS_KEPT: usize = 2;
/// Between the boundary and those: where the log can be purged up to as messages go.
const PURGE_POINTS: usize = 8;

/// What of its log a state machine asks for.
pub(crate) trait Log: Send + Sync + 'static {
    fn purged(&self) -> Option<LogId>;
    fn last(&self) -> Option<LogId>;
    /// This replica can't be used any more, and is to be filled again.
    fn report_damage(&self, reason: String);
}

impl Log for GroupLog {
    fn purged(&self) -> Option<LogId> {
        self.state().purged
    }

    fn last(&self) -> Option<LogId> {
        self.state().last
    }

    fn report_damage(&self, reason: String) {
        GroupLog::report_damage(self, reason);
    }
}

/// One replica's applied state and its snapshots.
pub(crate) struct Machine {
    group: RaftGroupId,
    inner: Box<dyn StateMachine>,
    snapshots: Arc<SnapshotStore>,
    log: Box<dyn Log>,
    retention: LogRetention,
    checkpoint_every: u64,
    /// Checkpoints that are good for a restart alone.
    partial: BTreeSet<LogId>,
    /// Bytes of commands applied since the last checkpoint.
    applied_bytes: u64,
    applied: Option<LogId>,
    membership: RaftStoredMembership,
    applied_tx: watch::Sender<Option<LogId>>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Machine({}, applied {:?})", self.group, self.applied)
    }
}

impl Machine {
    /// Restores the newest state that the disk can back: a checkpoint not newer than the log's
    /// recovered end, else an older one, else the boundary as if it had just been installed.
    pub(crate) fn open(
        spec: &GroupSpec,
        mut inner: Box<dyn StateMachine>,
        snapshots: Arc<SnapshotStore>,
        log: Box<dyn Log>,
        applied_tx: watch::Sender<Option<LogId>>,
    ) -> Result<Self, StorageError> {
        let (purged, last) = (log.purged(), log.last());
        if spec.retention == LogRetention::Messages
            && !mutation::on(Mutation::OpenWithoutBoundary)
            && let Some(purged) = purged
        {
            // Nothing else can produce the state there, so nobody could be filled from here, nor
            // this replica again after the next damage.
            require_boundary(&snapshots, spec.group, purged)?;
        }
        let mut candidates = snapshots.list(spec.group)?;
        candidates.retain(|id| Some(*id) >= purged);
        let mut restored = None;
        for id in candidates.iter().rev() {
            let (header, state) = match snapshots.read(spec.group, *id) {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(group = %spec.group, at = %id, %error, "skipping a bad checkpoint");
                    continue;
                }
            };
            let installed = header.kind == SnapshotKind::Boundary;
            let clamped = !mutation::on(Mutation::ApplyNotClamped);
            if clamped && !installed && last.is_none_or(|last| id.index > last.index) {
                // Written ahead of this replica's own fsync: the entries behind it are gone here.
                // Others may take their indexes, so it must not be found again.
                snapshots.remove(spec.group, *id)?;
                continue;
            }
            match inner.restore(Some(*id), Some(&state)) {
                Ok(()) => {
                    restored = Some((*id, decode_membership(&header.membership)?));
                    break;
                }
                Err(error) if installed => {
                    tracing::info!(group = %spec.group, at = %id, %error, "installing the boundary snapshot again");
                    inner.install(*id, &state)?;
                    restored = Some((*id, decode_membership(&header.membership)?));
                    break;
                }
                Err(error) => {
                    tracing::warn!(group = %spec.group, at = %id, %error, "checkpoint cannot be used, trying an older one");
                }
            }
        }
        if restored.is_none() {
            // The list anew: a damaged one was set aside when it was read.
            let mut sound = snapshots.list(spec.group)?;
            sound.retain(|id| Some(*id) >= purged);
            match (purged, sound.first()) {
                (None, _) => inner.restore(None, None)?,
                (Some(_), Some(oldest)) => {
                    let (header, state) = snapshots.read(spec.group, *oldest)?;
                    inner.install(*oldest, &state)?;
                    restored = Some((*oldest, decode_membership(&header.membership)?));
                }
                (Some(purged), None) => {
                    return Err(StorageError::Damaged {
                        path: snapshots.dir_of(spec.group),
                        position: 0,
                        reason: format!(
                            "the log of {} begins after {purged}, and no sound snapshot has the state there",
                            spec.group
                        ),
                    });
                }
            }
        }
        let (applied, membership) = match restored {
            Some((id, membership)) => (Some(id), membership),
            None => (None, RaftStoredMembership::default()),
        };
        applied_tx.send_replace(applied);
        Ok(Self {
            group: spec.group,
            inner,
            snapshots,
            log,
            retention: spec.retention,
            checkpoint_every: spec.checkpoint_every.max(1),
            partial: BTreeSet::new(),
            applied_bytes: 0,
            applied,
            membership,
            applied_tx,
        })
    }

    pub(crate) fn state_hash(&self) -> (Option<LogId>, u64) {
        (self.applied, self.inner.state_hash())
    }

    fn header(&self, last: LogId, kind: SnapshotKind) -> SnapshotHeader {
        SnapshotHeader {
            last,
            membership: encode_membership(&self.membership),
            kind,
        }
    }

    /// The same on every replica: each counts the same bytes from the same checkpoint on.
    fn is_checkpoint(&self, index: u64) -> bool {
        let multiple = index > 0 && index.is_multiple_of(self.checkpoint_every);
        multiple || self.applied_bytes >= CHECKPOINT_BYTES
    }

    fn write_checkpoint(&mut self, last: LogId) -> Result<(), StorageError> {
        self.applied_bytes = 0;
        let state = self.inner.checkpoint()?;
        let header = self.header(last, SnapshotKind::Checkpoint);
        self.snapshots.write(self.group, &header, &state)?;
        self.inner.checkpoint_written(last);
        if !self.inner.is_whole(&state) {
            self.partial.insert(last);
        }
        // The oldest is the boundary: nothing else can produce the state of that index.
        let mut all = self.snapshots.list(self.group)?;
        let newest = all.len().saturating_sub(CHECKPOINTS_KEPT);
        for id in all.get(1..newest).unwrap_or_default().to_vec() {
            if self.partial.remove(&id) {
                self.snapshots.remove(self.group, id)?;
                all.retain(|kept| *kept != id);
            }
        }
        while let Some(place) = most_crowded(&all) {
            self.snapshots.remove(self.group, all.remove(place))?;
        }
        Ok(())
    }

    /// Moves the boundary up to the newest checkpoint that lies before everything that is still
    /// needed. The log may be purged up to what is returned; none if there is nothing to purge.
    pub(crate) fn advance_boundary(&mut self) -> Result<Option<LogId>, StorageError> {
        if self.retention != LogRetention::Messages {
            return Ok(None);
        }
        let needed = self.inner.oldest_needed()?;
        let mut candidates = self.usable()?;
        candidates.retain(|id| id.index < needed && Some(*id) > self.log.purged());
        for id in candidates.into_iter().rev() {
            let (mut header, state) = match self.snapshots.read(self.group, id) {
                Ok(found) => found,
                Err(StorageError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            if header.kind != SnapshotKind::Boundary {
                if !self.inner.is_whole(&state) {
                    continue;
                }
                // What the state machine keeps in files must not come back to before the trim.
                self.inner.checkpoint()?;
                header.kind = SnapshotKind::Boundary;
                self.snapshots.write(self.group, &header, &state)?;
            }
            for older in self.snapshots.list(self.group)? {
                if older < id {
                    self.snapshots.remove(self.group, older)?;
                }
            }
            return Ok(Some(id));
        }
        Ok(None)
    }

    fn publish(&mut self) {
        if let Some(applied) = self.applied {
            self.inner.applied_batch(applied);
            self.applied_tx.send_replace(Some(applied));
        }
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, RaftStoredMembership)> {
        Ok((self.applied.map(to_raft_log_id), self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let log_id = from_raft_log_id(&entry.log_id);
            let reply = match entry.payload {
                EntryPayload::Normal(command) => {
                    self.applied_bytes += command.0.len() as u64;
                    let apply = AssertUnwindSafe(|| self.inner.apply(log_id, &command.0));
                    // openraft would go on without a state machine; an error ends the group.
                    catch_unwind(apply).map_err(|_| {
                        io::Error::other(format!("applying the entry at {log_id} panicked"))
                    })?
                }
                EntryPayload::Membership(membership) => {
                    self.membership = RaftStoredMembership::new(Some(entry.log_id), membership);
                    Bytes::new()
                }
                EntryPayload::Blank => Bytes::new(),
            };
            self.applied = Some(log_id);
            if let Some(responder) = responder {
                answers.push((responder, reply));
            }
            let wanted = self.inner.wants_checkpoint();
            if self.retention == LogRetention::Messages
                && (wanted || self.is_checkpoint(log_id.index))
                && let Err(error) = blocking::in_place(|| self.write_checkpoint(log_id))
            {
                // The log has everything: a restart applies more of it.
                tracing::error!(group = %self.group, at = %log_id, %error, "no checkpoint written");
            }
        }
        // Readers first: whoever is told of an acknowledgement must find the message.
        self.publish();
        for (responder, reply) in answers {
            responder.send(Reply(reply));
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let result = blocking::in_place(|| self.build());
        Builder(Some(result))
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, state: Bytes) -> io::Result<()> {
        let Some(last) = meta.last_log_id.as_ref().map(from_raft_log_id) else {
            return Ok(());
        };
        self.membership = meta.last_membership.clone();
        let older = self.snapshots.list(self.group)?;
        // The file first: a crash in between finds it and installs it again.
        let header = self.header(last, SnapshotKind::Boundary);
        self.snapshots.write(self.group, &header, &state)?;
        blocking::in_place(|| self.inner.install(last, &state))?;
        for id in older.into_iter().filter(|id| *id != last) {
            self.snapshots.remove(self.group, id)?;
        }
        self.applied = Some(last);
        self.applied_bytes = 0;
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        if self.retention == LogRetention::Messages {
            return Ok(self.boundary()?);
        }
        match self.usable()?.last() {
            None => Ok(None),
            Some(newest) => match self.read(*newest)? {
                Some(sound) => Ok(Some(sound)),
                // The state here is as new at least: it was restored from another one.
                None => self.build().map(Some),
            },
        }
    }
}

impl Machine {
    /// The snapshots that are not newer than the state, oldest first. At its start openraft installs
    /// one that is: here that is a checkpoint which could not be restored, and the log has
    /// everything since an older state.
    fn usable(&self) -> Result<Vec<LogId>, StorageError> {
        let mut all = self.snapshots.list(self.group)?;
        all.retain(|id| Some(*id) <= self.applied);
        Ok(all)
    }

    /// None for a damaged one: it was set aside when it was read.
    fn read(&self, id: LogId) -> Result<Option<Snapshot>, StorageError> {
        match self.snapshots.read(self.group, id) {
            Ok((header, state)) => snapshot(id, &header.membership, state).map(Some),
            Err(StorageError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What a newcomer begins with. None while the log has everything from its first entry on.
    ///
    /// # Errors
    /// When the log does not, and the state at its beginning is damaged: a later one would hide what
    /// lies between from the newcomer, so this replica has to be filled anew itself.
    fn boundary(&self) -> Result<Option<Snapshot>, StorageError> {
        let Some(purged) = self.log.purged() else {
            return self.oldest_boundary(None);
        };
        match self.oldest_boundary(Some(purged))? {
            Some(found) => Ok(Some(found)),
            None => {
                let lost = boundary_is_lost(&self.snapshots, self.group, purged);
                self.log.report_damage(lost.to_string());
                Err(lost)
            }
        }
    }

    fn oldest_boundary(&self, from: Option<LogId>) -> Result<Option<Snapshot>, StorageError> {
        for id in self.usable()?.into_iter().filter(|id| Some(*id) >= from) {
            match self.snapshots.read(self.group, id) {
                Ok((header, state)) if header.kind == SnapshotKind::Boundary => {
                    return snapshot(id, &header.membership, state).map(Some);
                }
                Ok(_) | Err(StorageError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn build(&mut self) -> io::Result<Snapshot> {
        // The empty state needs no file: a replica without any begins with it.
        let nothing = |state| Snapshot {
            meta: SnapshotMeta {
                last_log_id: None,
                last_membership: self.membership.clone(),
            },
            snapshot: state,
        };
        if self.retention == LogRetention::Messages {
            // openraft purges up to what it is given here.
            return Ok(self.boundary()?.unwrap_or_else(|| nothing(Bytes::new())));
        }
        let state = Bytes::from(self.inner.checkpoint()?);
        let Some(last) = self.applied else {
            return Ok(nothing(state));
        };
        let header = self.header(last, SnapshotKind::Checkpoint);
        self.snapshots.write(self.group, &header, &state)?;
        let all = self.snapshots.list(self.group)?;
        for id in &all[..all.len().saturating_sub(CHECKPOINTS_KEPT)] {
            self.snapshots.remove(self.group, *id)?;
        }
        Ok(snapshot(last, &header.membership, state)?)
    }
}

fn snapshot(last: LogId, membership: &[u8], state: Bytes) -> Result<Snapshot, StorageError> {
    Ok(Snapshot {
        meta: SnapshotMeta {
            last_log_id: Some(to_raft_log_id(last)),
            last_membership: decode_membership(membership)?,
        },
        snapshot: state,
    })
}

fn require_boundary(
    snapshots: &SnapshotStore,
    group: RaftGroupId,
    purged: LogId,
) -> Result<(), StorageError> {
    for id in snapshots
        .list(group)?
        .into_iter()
        .filter(|id| *id >= purged)
    {
        match snapshots.read(group, id) {
            Ok((header, _)) if header.kind == SnapshotKind::Boundary => return Ok(()),
            Ok(_) | Err(StorageError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Err(boundary_is_lost(snapshots, group, purged))
}

fn boundary_is_lost(snapshots: &SnapshotStore, group: RaftGroupId, purged: LogId) -> StorageError {
    StorageError::Damaged {
        path: snapshots.dir_of(group),
        position: 0,
        reason: format!("the log of {group} begins after {purged}, and the state there is damaged"),
    }
}

/// Which of the checkpoints, ascending, is missed least when there are too many: never the boundary,
/// nor one of the newest.
fn most_crowded(all: &[LogId]) -> Option<usize> {
    let removable = 1..all.len().saturating_sub(CHECKPOINTS_KEPT);
    if removable.len() <= PURGE_POINTS {
        return None;
    }
    removable.min_by_key(|place| all[place + 1].index - all[place - 1].index)
}

/// A snapshot taken when the builder was asked for.
#[derive(Debug)]
pub(crate) struct Builder(Option<io::Result<Snapshot>>);

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        self.0
            .take()
            .unwrap_or_else(|| Err(io::Error::other("a snapshot builder builds once")))
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
