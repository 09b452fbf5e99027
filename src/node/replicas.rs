//! The replicas on this node, as the catalog wants them: whenever it changes, the groups that have a
//! replica here are opened and those of deleted topics are removed, files and all. A replica whose
//! derived files broke is closed, and opened again with new ones.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use quorate_raft::{
    Flush, Group, GroupSpec, LogRetention, NodeId, OpenGroupError, RaftHost, Replica, ReplicaId,
    StateMachine,
};
use quorate_storage::commit_log::{CommitLog, GroupState};
use quorate_storage::derived::DerivedStore;
use quorate_storage::key_index::KeyIndex;
use quorate_storage::queue_index::QueueIndex;
use quorate_storage::vfs::Vfs;
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::mend::{Damage, replicas_of};
use super::quarantine::Quarantine;
use super::{NodeConfig, state_checkpoint_every};
use crate::broker::FlushMode;
use crate::broker::local::{LocalCoordinator, LocalGroups, LocalQueue};
use crate::broker::queue::{QueueLimits, QueueMachine, QueueShared};
use crate::catalog::{
    CATALOG_GROUP, CatalogState, FIRST_QUEUE_GROUP, GroupPlacement, ReplicaState,
};
use crate::coordinator::CoordinatorMachine;

/// A replica whose files break again and again is not rebuilt more often than this.
const REPAIR_PAUSE: Duration = Duration::from_secs(1);
/// How long one attempt to prove the catalog current may take.
const PROOF_PATIENCE: Duration = Duration::from_secs(5);

/// Opens and removes groups as the catalog says.
pub(super) struct Replicas {
    pub config: NodeConfig,
    pub vfs: Arc<dyn Vfs>,
    pub host: Arc<RaftHost>,
    pub log: CommitLog,
    pub derived: DerivedStore,
    pub locals: Arc<LocalGroups>,
    pub quarantine: Arc<Quarantine>,
    /// Takes the groups that can't be opened because their files are damaged.
    pub damage: mpsc::UnboundedSender<Damage>,
    /// Told when something that a replica derived from its log can't be used any more.
    pub repair: Arc<Notify>,
}

impl Replicas {
    pub(super) async fn follow(
        self,
        mut catalog: watch::Receiver<Arc<CatalogState>>,
        stop: CancellationToken,
        fatal: mpsc::UnboundedSender<String>,
    ) {
        let mut is_current = pin!(self.catalog_is_current());
        let mut known_current = false;
        loop {
            let state = catalog.borrow_and_update().clone();
            if let Err(error) = self.reconcile(&state, known_current).await
                && !stop.is_cancelled()
            {
                fatal.send(format!("{error:#}")).ok();
                return;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = catalog.changed() => if changed.is_err() { return },
                () = self.repair.notified() => tokio::time::sleep(REPAIR_PAUSE).await,
                () = &mut is_current, if !known_current => {
                    known_current = true;
                    let state = catalog.borrow().clone();
                    self.remove_orphans(&state).await;
                }
            }
        }
    }

    /// Ends once this node's catalog holds all that was committed when the node started.
    async fn catalog_is_current(&self) {
        loop {
            if let Some(catalog) = self.host.group(CATALOG_GROUP)
                && catalog.read_barrier(PROOF_PATIENCE).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(REPAIR_PAUSE).await;
        }
    }

    /// Removes what is left of queues that were deleted while this node was away.
    async fn remove_orphans(&self, catalog: &CatalogState) {
        for group in self.log.groups() {
            if group.0 >= FIRST_QUEUE_GROUP && catalog.owner(group).is_none() {
                tracing::info!(%group, "removing what is left of a deleted queue");
                self.remove_queue(group).await;
                if let Err(error) = self.quarantine.forget_group(group) {
                    tracing::warn!(%group, %error, "a deleted queue stays in the quarantine file");
                }
            }
        }
    }

    async fn reconcile(&self, catalog: &CatalogState, known_current: bool) -> Result<()> {
        // Nothing is known yet, or it still names replicas that this node gave up.
        if catalog.cluster_id.is_none() || !self.quarantine.is_known_to(catalog) {
            return Ok(());
        }
        if let Some(group) = self.host.group(CATALOG_GROUP)
            && !catalog.catalog.replicas.is_empty()
        {
            group.set_replicas(&replicas_of(&catalog.catalog));
        }
        self.remove_lost(catalog).await?;
        let coordinators = self.locals.coordinators();
        if let Some(cause) = coordinators.iter().find_map(|(_, c)| c.soundness.broken()) {
            self.reset_derived(&cause.to_string()).await?;
        } else if self.derived.is_damaged() {
            self.reset_derived("a queue has met bad data").await?;
        }
        for (number, placement) in (0..).zip(&catalog.coordinators) {
            if self.should_open(placement).await {
                self.open_coordinator(number, placement).await?;
            }
        }
        let wanted: BTreeSet<u64> = catalog
            .topics
            .values()
            .flat_map(|topic| &topic.queues)
            .filter(|placement| placement.on(self.config.node_id))
            .map(|placement| placement.group)
            .collect();
        for queue in self.locals.queues() {
            let group = queue.group.id();
            if !wanted.contains(&group.0) {
                self.remove_queue(group).await;
            } else if let Some(cause) = queue.shared.soundness().broken() {
                self.drop_index(group, &cause).await;
            }
        }
        for topic in catalog.topics.values() {
            for placement in &topic.queues {
                // Of a queue that was deleted nothing is left, not even this replica's votes: begun
                // anew before the deletion is applied here again, it would vote twice in a term.
                let may_open = known_current || self.has_begun(placement.id());
                if may_open && self.should_open(placement).await {
                    self.open_queue(placement, topic.config.flush, catalog.limits)
                        .await?;
                }
            }
        }
        Ok(())
    }

    /// Whether this node's replica of a group is to be opened now. One that is open is told of the
    /// others, and closed when another has taken its place.
    async fn should_open(&self, placement: &GroupPlacement) -> bool {
        let Some(place) = placement.replica_on(self.config.node_id) else {
            return false;
        };
        let id = placement.id();
        if let Some(open) = self.host.group(id) {
            if open.replica() >= place.replica {
                open.set_replicas(&replicas_of(placement));
                return false;
            }
            self.locals.remove(placement.group);
            self.host.close_group(id, false).await.ok();
        }
        place.state != ReplicaState::Lost && !self.quarantine.is_lost(id, place.replica)
    }

    /// Removes what is left of lost replicas that have a successor here.
    async fn remove_lost(&self, catalog: &CatalogState) -> Result<()> {
        for lost in self.quarantine.to_remove(catalog) {
            let group = RaftGroupId(lost.group);
            self.locals.remove(lost.group);
            self.host.close_group(group, true).await?;
            self.remove_index(group);
            self.quarantine.removed(&lost)?;
            self.quarantine.begin_anew(group);
        }
        Ok(())
    }

    fn spec(&self, placement: &GroupPlacement, flush: Flush, retention: LogRetention) -> GroupSpec {
        let founder = |(replica, node): &(ReplicaId, NodeId)| Replica {
            replica: *replica,
            node: *node,
        };
        GroupSpec {
            group: placement.id(),
            founders: placement.founders.iter().map(founder).collect(),
            replicas: replicas_of(placement),
            preferred: placement.preferred,
            flush,
            retention,
            checkpoint_every: match retention {
                LogRetention::Messages => self.config.checkpoint_every,
                LogRetention::StateOnly => state_checkpoint_every(&self.config),
            },
        }
    }

    async fn open(&self, spec: GroupSpec, machine: Box<dyn StateMachine>) -> Result<Option<Group>> {
        let group = spec.group;
        match self.host.open_group(spec, machine).await {
            // Its log and its snapshots may be sound: it is opened again once the store was reset.
            Err(OpenGroupError::Storage(damage @ StorageError::Damaged { .. }))
                if self.derived.is_damaged() =>
            {
                tracing::warn!(%group, %damage, "a replica waits for a new derived store");
                self.repair.notify_one();
                Ok(None)
            }
            // Nothing of it can be used, so the others have to fill it again.
            Err(OpenGroupError::Storage(damage @ StorageError::Damaged { .. })) => {
                if self.quarantine.note(group) {
                    self.damage.send((group, damage.to_string())).ok();
                }
                Ok(None)
            }
            // Its first reads found damage, and told of it.
            Err(_) if self.quarantine.is_noted(group) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot open the replica of {group}")),
            // Given up in the meantime.
            Ok(opened) if self.quarantine.is_lost(group, opened.replica()) => {
                self.host.close_group(group, false).await.ok();
                Ok(None)
            }
            Ok(opened) => Ok(Some(opened)),
        }
    }

    async fn open_coordinator(&self, number: u32, placement: &GroupPlacement) -> Result<()> {
        let store = self.derived.group(placement.id());
        let machine = CoordinatorMachine::new(number, store, self.repair.clone());
        let (view, soundness) = (machine.view(), machine.soundness());
        let spec = self.spec(placement, Flush::Sync, LogRetention::StateOnly);
        let recovered_index = self.recovered_index(placement.id());
        let Some(group) = self.open(spec, Box::new(machine)).await? else {
            return Ok(());
        };
        self.locals.insert_coordinator(
            number,
            Arc::new(LocalCoordinator {
                group,
                view,
                soundness,
                recovered_index,
            }),
        );
        Ok(())
    }

    /// Gives the derived store up, and with it the replicas that stand on it. Opened again,
    /// coordinators begin with their newest snapshots, and queues apply their logs from their
    /// boundaries on.
    async fn reset_derived(&self, cause: &str) -> Result<()> {
        for (number, coordinator) in self.locals.coordinators() {
            self.locals.remove_coordinator(number);
            self.host
                .close_group(coordinator.group.id(), false)
                .await
                .ok();
        }
        // Those too that hold nothing: all of them have handles that are refused from now on.
        for queue in self.locals.queues() {
            let group = queue.group.id();
            self.locals.remove_queue(group.0);
            self.host.close_group(group, false).await.ok();
        }
        self.derived
            .reset(cause)
            .context("the derived store is unusable and cannot be replaced")
    }

    async fn open_queue(
        &self,
        placement: &GroupPlacement,
        flush: FlushMode,
        limits: QueueLimits,
    ) -> Result<()> {
        let path = self.index_path(placement.id());
        let dir = path.parent().unwrap_or(&self.config.data_dir);
        self.vfs
            .create_dir_all(dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let index = match QueueIndex::open(self.vfs.clone(), path.clone()) {
            Err(error @ StorageError::Damaged { .. }) => {
                tracing::warn!(%error, "rebuilding a queue's index from the log");
                QueueIndex::create_at(self.vfs.clone(), path, 0)
            }
            opened => opened,
        };
        let index = Arc::new(index?);
        let keys = self.open_keys(placement.id())?;
        let shared = QueueShared::new(index.clone(), self.repair.clone());
        let held = self.derived.group(placement.id());
        let machine = QueueMachine::new(index, shared.clone(), held, limits);
        let flush = match flush {
            FlushMode::Sync => Flush::Sync,
            FlushMode::Async => Flush::Async,
        };
        let spec = self.spec(placement, flush, LogRetention::Messages);
        let recovered_index = self.recovered_index(placement.id());
        let Some(group) = self.open(spec, Box::new(machine)).await? else {
            return Ok(());
        };
        self.locals
            .insert_queue(LocalQueue::new(group, shared, keys, recovered_index));
        Ok(())
    }

    /// What was built over entries that the log still has, or had purged, is true.
    fn open_keys(&self, group: RaftGroupId) -> Result<KeyIndex> {
        let log = self.log.group(group);
        let purged = log.state().purged.map_or(0, |id| id.index);
        let is_held = |id: LogId| log.log_id_at(id.index).is_ok_and(|found| found == Some(id));
        let keys = KeyIndex::open(self.vfs.clone(), self.keys_path(group), |id| {
            id.index <= purged || is_held(id)
        });
        keys.with_context(|| format!("cannot look at the key index of {group}"))
    }

    fn recovered_index(&self, group: RaftGroupId) -> Option<u64> {
        self.log.group(group).state().last.map(|last| last.index)
    }

    /// Whether the log holds anything of it.
    fn has_begun(&self, group: RaftGroupId) -> bool {
        self.log.group(group).state() != GroupState::default()
    }

    fn index_path(&self, group: RaftGroupId) -> PathBuf {
        self.config
            .data_dir
            .join("queues")
            .join(format!("{:020}.index", group.0))
    }

    fn keys_path(&self, group: RaftGroupId) -> PathBuf {
        let keys = self.config.data_dir.join("keys");
        keys.join(format!("{:020}", group.0))
    }

    async fn remove_queue(&self, group: RaftGroupId) {
        self.locals.remove(group.0);
        if let Err(error) = self.host.close_group(group, true).await {
            tracing::warn!(%group, %error, "a removed queue is still on disk");
        }
        self.remove_index(group);
    }

    /// Removes what was derived of a queue: its index, and the records of its held batches.
    fn remove_index(&self, group: RaftGroupId) {
        if let Err(error) = self.derived.group(group).clear() {
            tracing::debug!(%group, %error, "records of a removed queue were not removed");
        }
        let path = self.index_path(group);
        if let Err(error) = self.vfs.remove(&path) {
            tracing::debug!(%group, %error, "a removed queue's index was not removed");
        }
        if let Err(error) = KeyIndex::remove(&*self.vfs, &self.keys_path(group)) {
            tracing::debug!(%group, %error, "a removed queue's key index was not removed");
        }
    }

    /// Closes a replica and drops its index. Opened again, it applies its log from the oldest state
    /// on and so makes the index anew.
    async fn drop_index(&self, group: RaftGroupId, cause: &StorageError) {
        tracing::warn!(%group, %cause, "rebuilding a queue's index from the log");
        self.locals.remove_queue(group.0);
        self.host.close_group(group, false).await.ok();
        let path = self.index_path(group);
        // An index that stays is found damaged when it is opened or read again.
        if let Err(error) = self.vfs.remove(&path) {
            tracing::warn!(%group, %error, "a broken index is still on disk");
        }
    }
}
