//! One Raft group on this node.

mod barrier;
mod leadership;
mod membership;
mod reads;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, ForwardReason, ForwardToLeader, RaftError};
use parking_lot::RwLock;
use quorate_storage::commit_log::GroupLog;
use quorate_storage::{LogId, RaftGroupId, StorageError};
use tokio::sync::watch;

use self::barrier::Rounds;
pub use self::membership::Settled;
use crate::blocking;
use crate::config::{GroupSpec, Replica};
use crate::elections::ASK_PATIENCE;
use crate::error::ProposeError;
use crate::host::Peers;
use crate::machine::Machine;
use crate::network::Acknowledged;
use crate::pieces::Incoming;
use crate::tail_guard::{TailGuard, TailReport};
use crate::types::{Command, NodeId, ReplicaId, TypeConfig, from_raft_log_id};

pub(crate) type Raft = openraft::Raft<TypeConfig, Machine>;
type MetricsReceiver =
    openraft::alias::WatchReceiverOf<TypeConfig, openraft::RaftMetrics<TypeConfig>>;

/// Between two attempts at something only a leader can do.
const RETRY: Duration = Duration::from_millis(5);

/// A handle to one replica; cheap to clone.
#[derive(Debug, Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    spec: GroupSpec,
    replica: ReplicaId,
    /// Those the group should have now; the log's membership follows.
    replicas: RwLock<Arc<[Replica]>>,
    raft: Raft,
    metrics: MetricsReceiver,
    log: GroupLog,
    applied: watch::Receiver<Option<LogId>>,
    peers: Arc<Peers>,
    rounds: Rounds,
    tail: TailGuard,
    /// What the others have acknowledged while this replica leads.
    acknowledged: Arc<Acknowledged>,
    /// The last term whose leader a majority held to be dead. It may be back as a follower, and
    /// this replica's metrics name it until a new term begins.
    deposed_term: AtomicU64,
    /// The term this replica had stored when its process began, until its leader shows itself: the
    /// leader may have ended in the meantime.
    unheard_term: AtomicU64,
    /// The term in which this replica leads and has announced a transfer that failed: openraft lets
    /// it propose nothing more in that term.
    stuck_term: AtomicU64,
    /// A large snapshot on its way here.
    incoming: Incoming,
    /// Held while the believed leader is asked whether it leads.
    checking: tokio::sync::Mutex<()>,
    /// Held while a step of a change of replicas is done.
    settling: tokio::sync::Mutex<()>,
}

/// No term is this high.
const NO_TERM: u64 = u64::MAX;

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} replica {}", self.spec.group, self.replica)
    }
}

/// What is known here of a group.
#[derive(Debug, Clone, Default)]
pub struct GroupMetrics {
    pub leader: Option<NodeId>,
    pub term: u64,
    pub last_log_index: Option<u64>,
    pub applied: Option<LogId>,
    pub committed: Option<LogId>,
    /// On the leader: per node the last index its voting replica is known to hold on disk.
    pub matched: Vec<(NodeId, Option<u64>)>,
}

impl Group {
    pub(crate) fn new(
        spec: GroupSpec,
        raft: Raft,
        log: GroupLog,
        applied: watch::Receiver<Option<LogId>>,
        peers: Arc<Peers>,
        tail: TailGuard,
        acknowledged: Arc<Acknowledged>,
    ) -> Self {
        let metrics = raft.metrics();
        // Not from the metrics: they are empty until the core has run.
        let stored_term = log.state().vote.map_or(NO_TERM, |vote| vote.term);
        Self {
            inner: Arc::new(Inner {
                replicas: RwLock::new(spec.replicas.clone().into()),
                spec,
                replica: *raft.node_id(),
                raft,
                metrics,
                log,
                applied,
                peers,
                rounds: Rounds::default(),
                tail,
                acknowledged,
                deposed_term: AtomicU64::new(NO_TERM),
                unheard_term: AtomicU64::new(stored_term),
                stuck_term: AtomicU64::new(NO_TERM),
                incoming: Incoming::default(),
                checking: tokio::sync::Mutex::default(),
                settling: tokio::sync::Mutex::default(),
            }),
        }
    }

    pub fn id(&self) -> RaftGroupId {
        self.inner.spec.group
    }

    pub fn spec(&self) -> &GroupSpec {
        &self.inner.spec
    }

    /// Reads of the raw log: message bytes live there.
    pub fn log(&self) -> &GroupLog {
        &self.inner.log
    }

    /// This node's replica.
    pub fn replica(&self) -> ReplicaId {
        self.inner.replica
    }

    /// The replicas the group should have, as far as this node was told.
    pub fn replicas(&self) -> Arc<[Replica]> {
        self.inner.replicas.read().clone()
    }

    /// Replicas were replaced. The group's leader makes them members: [`Group::settle_members`].
    pub fn set_replicas(&self, replicas: &[Replica]) {
        let mut known = self.inner.replicas.write();
        if **known != *replicas {
            *known = replicas.into();
        }
    }

    pub(crate) fn incoming(&self) -> &Incoming {
        &self.inner.incoming
    }

    pub(crate) fn raft(&self) -> &Raft {
        &self.inner.raft
    }

    fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        let named = |replicas: &[Replica]| {
            let found = replicas.iter().find(|r| r.replica == replica);
            found.map(|r| r.node)
        };
        // The log names those that were replaced, and those this node was not told of yet.
        named(&self.replicas()).or_else(|| named(&self.members().all))
    }

    fn replica_of(&self, node: NodeId) -> Option<ReplicaId> {
        let replicas = self.replicas();
        let found = replicas.iter().find(|r| r.node == node);
        found.map(|r| r.replica)
    }

    /// Why this group ended by itself, if it did: a storage error or a panic.
    pub(crate) fn failure(&self) -> Option<String> {
        match &self.inner.metrics.borrow_watched().running_state {
            // A core that panics says nothing any more, but its state machine goes with it.
            Ok(()) if self.inner.applied.has_changed().is_err() => {
                Some("its core panicked".to_owned())
            }
            Ok(()) | Err(Fatal::Stopped) => None,
            Err(fatal) => Some(fatal.to_string()),
        }
    }

    /// Nothing happens here any more.
    pub fn is_closed(&self) -> bool {
        let told = self.inner.metrics.borrow_watched().running_state.is_err();
        told || self.inner.applied.has_changed().is_err()
    }

    pub fn term(&self) -> u64 {
        self.inner.metrics.borrow_watched().current_term
    }

    /// The last index applied here.
    pub fn applied(&self) -> Option<LogId> {
        *self.inner.applied.borrow()
    }

    pub fn metrics(&self) -> GroupMetrics {
        let leader = self.leader();
        let voters = self.members().voters;
        let (mut known, matched) = {
            let metrics = self.inner.metrics.borrow_watched();
            let matched = metrics.replication.iter().flatten();
            let matched: Vec<_> = matched
                .map(|(replica, at)| (*replica, at.as_ref().map(|id| id.index)))
                .collect();
            let known = GroupMetrics {
                leader,
                term: metrics.current_term,
                last_log_index: metrics.last_log_index,
                applied: *self.inner.applied.borrow(),
                committed: metrics.local_committed.as_ref().map(from_raft_log_id),
                matched: Vec::new(),
            };
            (known, matched)
        };
        let of_voters = matched.into_iter().filter(|(id, _)| voters.contains(id));
        known.matched = of_voters
            .filter_map(|(id, at)| Some((self.node_of(id)?, at)))
            .collect();
        known
    }

    /// Proposes on this replica, which must lead, and waits until it is applied here.
    ///
    /// Waits as long as no majority answers: bound it with a timeout, whose end means "unknown".
    ///
    /// # Errors
    /// [`ProposeError::nobody_took_it`] tells whether proposing again is safe.
    pub async fn propose(&self, body: Bytes) -> Result<(LogId, Bytes), ProposeError> {
        loop {
            let command = Command(body.clone());
            let error = match self.inner.raft.client_write(command).await {
                Ok(done) => return Ok((from_raft_log_id(&done.log_id), done.data.0)),
                Err(error) => error,
            };
            match error {
                RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
                    if to.reason != ForwardReason::LeaseExpired {
                        return Err(self.not_leader(&to));
                    }
                    // A leader that was quiet for long was refused for want of a fresh quorum;
                    // nobody took the command. One ReadIndex round renews the lease.
                    if !self.prove_leadership().await {
                        return Err(ProposeError::NotLeader { leader: None });
                    }
                }
                RaftError::APIError(error) => return Err(ProposeError::Unknown(error.to_string())),
                RaftError::Fatal(fatal) => return Err(ProposeError::Unknown(fatal.to_string())),
            }
        }
    }

    fn not_leader(&self, to: &ForwardToLeader<TypeConfig>) -> ProposeError {
        let leader = to.leader_id.filter(|id| *id != self.inner.replica);
        let leader = leader.and_then(|id| self.node_of(id));
        ProposeError::NotLeader {
            leader: leader.filter(|node| self.inner.peers.may_be_alive(*node)),
        }
    }

    /// The state's hash with the index it belongs to: equal on replicas at the same index.
    pub async fn state_hash(&self) -> Result<(Option<LogId>, u64), StorageError> {
        let read = self.inner.raft.with_state_machine(|machine: &mut Machine| {
            let hash = machine.state_hash();
            Box::pin(async move { hash })
        });
        read.await.map_err(|_| StorageError::Closed)
    }

    /// Purges what the state machine needs no more, up to a checkpoint, which becomes the boundary
    /// that newcomers begin with. True when there was something to purge. Where a follower is still
    /// being sent it, openraft purges a little later.
    ///
    /// # Errors
    /// When the boundary could not be written or found; nothing was purged then.
    pub async fn purge(&self) -> Result<bool, StorageError> {
        let moved = self.inner.raft.with_state_machine(|machine: &mut Machine| {
            let moved = blocking::in_place(|| machine.advance_boundary());
            Box::pin(async move { moved })
        });
        let Some(boundary) = moved.await.map_err(|_| StorageError::Closed)?? else {
            return Ok(false);
        };
        let trigger = self.inner.raft.trigger();
        let told = async {
            // It purges up to the new boundary, unless it knew that one before a restart.
            trigger.snapshot().await?;
            trigger.purge_log(boundary.index).await
        };
        told.await.map_err(|_| StorageError::Closed)?;
        tracing::debug!(group = %self.id(), %boundary, "log purged");
        Ok(true)
    }

    /// True when a majority may have lost acknowledged messages of this async-flush group since
    /// this process began; readers must be told.
    pub fn tail_lost(&self) -> bool {
        self.inner.tail.tail_lost()
    }

    /// True while this async-flush replica may lack what it had acknowledged, or readers were not
    /// told yet that it does.
    pub fn tail_unsettled(&self) -> bool {
        self.inner.tail.is_suspect() || self.inner.tail.tail_lost()
    }

    /// They have been told.
    pub fn tail_loss_told(&self) {
        self.inner.tail.caught_up();
    }

    pub(crate) fn tail(&self) -> &TailGuard {
        &self.inner.tail
    }

    pub(crate) fn tail_report(&self) -> TailReport {
        TailReport {
            suspect: self.inner.tail.is_suspect(),
            last: self.last_log().map(|id| (id.term, id.index)),
        }
    }

    /// Nothing was ever written here, not even the membership.
    pub(crate) fn is_pristine(&self) -> bool {
        let state = self.inner.log.state();
        state.last.is_none() && state.vote.is_none()
    }

    /// A leader says that this replica acknowledged `index` and lacks it now. Where that is no
    /// wonder, the leader is told so. Otherwise, if it is true, what the disk lost is noticed here as
    /// any other damage is.
    pub(crate) async fn check_acknowledged(&self, index: u64) {
        if self.inner.tail.began_suspect() {
            self.ask_who_leads(ASK_PATIENCE).await;
            return;
        }
        let last = self.last_log().map_or(0, |id| id.index);
        if last < index {
            self.inner.log.report_damage(format!(
                "{} acknowledged entry {index} and its log ends at {last}",
                self.id()
            ));
        }
    }

    /// The end of this replica's log, for choosing the likely winner of an election.
    pub(crate) fn last_log(&self) -> Option<LogId> {
        self.inner.log.state().last
    }

    /// Appends to a returned node are tried again at once.
    pub(crate) async fn reset_backoff(&self, node: NodeId) {
        if let Some(replica) = self.replica_of(node) {
            self.inner
                .raft
                .trigger()
                .reset_backoff([replica])
                .await
                .ok();
        }
    }

    pub(crate) async fn stop(&self) {
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(group = %self.id(), %error, "a group's core ended badly");
        }
    }
}
