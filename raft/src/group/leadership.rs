//! Who leads the group: what this node believes, how it finds out, and handing over.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use openraft::ReadPolicy;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{Fatal, LinearizableReadError, RaftError};
use openraft::raft::TransferLeaderRequest;
use quorate_storage::commit_log::Flush;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Group, NO_TERM, RETRY};
use crate::elections::ASK_PATIENCE;
use crate::error::TransferError;
use crate::link::CallError;
use crate::liveness::PeerState;
use crate::types::{NodeId, ReplicaId, TypeConfig};
use crate::wire::{Answer, ToReplica, WhoLeads, class, decode, encode};

type ReadIndexError = RaftError<TypeConfig, LinearizableReadError<TypeConfig>>;

/// Between two heartbeats of one proof.
const PROOF_RETRY: Duration = Duration::from_millis(250);

/// Who is more entries behind could not take over in time.
const TRANSFER_LAG_MAX: u64 = 10_000;

/// What came of asking a replica whether it leads.
enum LeadsAnswer {
    Leads { term: u64 },
    LeadsNot,
    Silence,
}

impl LeadsAnswer {
    fn term(self) -> Option<u64> {
        match self {
            Self::Leads { term } => Some(term),
            Self::LeadsNot | Self::Silence => None,
        }
    }
}

impl Group {
    /// The leader of this replica's term, dead or alive. A leader of an earlier life of this very
    /// process is none: openraft does not resume it.
    pub(crate) fn last_known_leader(&self) -> Option<NodeId> {
        let (replica, leads_here) = {
            let metrics = self.inner.metrics.borrow_watched();
            (metrics.current_leader?, metrics.state.is_leader())
        };
        if replica == self.inner.replica && !leads_here {
            return None;
        }
        self.node_of(replica)
    }

    /// The node that leads as far as this one knows; none while it is known to be dead.
    pub fn leader(&self) -> Option<NodeId> {
        if self.is_leader() {
            return Some(self.inner.peers.node());
        }
        let term = self.term();
        let over = [&self.inner.deposed_term, &self.inner.unheard_term];
        if over.iter().any(|over| over.load(Ordering::Relaxed) == term) {
            return None;
        }
        self.last_known_leader()
            .filter(|node| self.inner.peers.may_be_alive(*node))
    }

    pub fn is_leader(&self) -> bool {
        self.inner.metrics.borrow_watched().state.is_leader()
    }

    /// A leader of this term has shown itself.
    pub(crate) fn heard(&self, term: u64) {
        for over in [&self.inner.unheard_term, &self.inner.deposed_term] {
            over.compare_exchange(term, NO_TERM, Ordering::Relaxed, Ordering::Relaxed)
                .ok();
        }
    }

    /// Asks the other replicas which of them leads. The one that does also says what is committed,
    /// and sends what is missing here. Returns the highest term in which one does.
    pub(crate) async fn ask_who_leads(&self, patience: Duration) -> Option<u64> {
        let (own, replicas) = (self.inner.peers.node(), self.replicas());
        let others = replicas.iter().filter(|r| r.node != own);
        let answers = others.map(|r| self.ask_whether_leads(r.node, r.replica, patience));
        let terms = join_all(answers).await.into_iter();
        let term = terms.filter_map(LeadsAnswer::term).max()?;
        self.heard(term);
        Some(term)
    }

    async fn ask_whether_leads(
        &self,
        node: NodeId,
        target: ReplicaId,
        patience: Duration,
    ) -> LeadsAnswer {
        let body = WhoLeads {
            asker: self.inner.replica,
            may_lack_tail: self.inner.tail.began_suspect(),
        };
        let request = encode(&ToReplica { target, body });
        let link = self.inner.peers.link();
        let answer = link.call(node, class::LEADS, self.id().0, request, patience);
        match answer.await {
            Ok(answer) => match decode::<Answer<Option<u64>>>(&answer) {
                Ok(Ok(Some(term))) => LeadsAnswer::Leads { term },
                // It does not lead, or is not open there any more.
                Ok(Ok(None) | Err(_)) => LeadsAnswer::LeadsNot,
                Err(_) => LeadsAnswer::Silence,
            },
            Err(CallError::NotConnected) => LeadsAnswer::LeadsNot,
            Err(_) => LeadsAnswer::Silence,
        }
    }

    /// The other side of [`Group::ask_who_leads`]: the term in which this replica leads.
    pub(crate) async fn answer_who_leads(
        &self,
        WhoLeads {
            asker,
            may_lack_tail,
        }: WhoLeads,
    ) -> Result<Option<u64>, Fatal<TypeConfig>> {
        if !self.is_leader() || self.is_stuck() {
            return Ok(None);
        }
        let raft = self.inner.raft.clone();
        let trigger = raft.trigger();
        // Nothing that is synced before it is acknowledged may ever be missing.
        if may_lack_tail && self.inner.spec.flush == Flush::Async {
            let vote = self.inner.metrics.borrow_watched().vote;
            if trigger.allow_next_revert(&asker, true).await?.is_ok() {
                self.inner.acknowledged.excuse(asker, vote);
            }
        }
        // The one who asks has just opened its replica. Appends to it may be waiting out a long
        // backoff, and a quiet leader would not say what is committed.
        trigger.reset_backoff([asker]).await?;
        // A ReadIndex round tells all followers; openraft suppresses plain heartbeats.
        tokio::spawn(async move { raft.get_read_log_id(ReadPolicy::ReadIndex).await.ok() });
        Ok(Some(self.term()))
    }

    /// To be called when the believed leader did not act as one. If it cannot be reached or says that
    /// it does not lead, and nobody else says that it leads this replica's term, the group counts as
    /// leaderless, and the host's sweep elects. Silence says nothing: a leader that is slow is worth
    /// more than an election, and a dead one is noticed by the host.
    pub async fn check_leader(&self) {
        let term = self.term();
        let Some(node) = self.leader().filter(|_| !self.is_leader()) else {
            return;
        };
        // Many requests come to the same suspicion at once.
        let Ok(_alone) = self.inner.checking.try_lock() else {
            return;
        };
        let Some(believed) = self.inner.metrics.borrow_watched().current_leader else {
            return;
        };
        // An earlier replica of this very node leads no more.
        if node != self.inner.peers.node() {
            let patience = self.inner.peers.timeout();
            match self.ask_whether_leads(node, believed, patience).await {
                LeadsAnswer::Leads { term: led } if led >= term => return self.heard(led),
                LeadsAnswer::Silence => return,
                LeadsAnswer::Leads { .. } | LeadsAnswer::LeadsNot => {}
            }
        }
        let led = self.ask_who_leads(ASK_PATIENCE).await;
        if led.is_none_or(|led| led < term) && self.term() == term {
            self.inner.deposed_term.store(term, Ordering::Relaxed);
        }
    }

    /// Waits until a leader that may be alive is known here.
    pub async fn wait_leader(&self, patience: Duration) -> Option<NodeId> {
        let deadline = Instant::now() + patience;
        let mut metrics = self.inner.metrics.clone();
        loop {
            if let Some(leader) = self.leader() {
                return Some(leader);
            }
            // The leader's death is not in these metrics, so look again now and then.
            let wake = deadline.min(Instant::now() + RETRY);
            if let Ok(Err(_)) = timeout_at(wake, metrics.changed()).await {
                return None;
            }
            if Instant::now() >= deadline {
                return self.leader();
            }
        }
    }

    pub(super) async fn prove_leadership(&self) -> bool {
        self.read_index().await.is_ok()
    }

    /// ReadIndex on this replica: what is committed, with the proof that it still leads. openraft
    /// sends one heartbeat for it and waits; one that gets lost is followed by others here.
    pub(crate) async fn read_index(&self) -> Result<u64, ReadIndexError> {
        let raft = &self.inner.raft;
        let mut proof = pin!(raft.get_read_log_id(ReadPolicy::ReadIndex));
        loop {
            if let Ok(proved) = timeout(PROOF_RETRY, &mut proof).await {
                return proved.map(|(read, _)| read.index());
            }
            raft.trigger().heartbeat().await.ok();
        }
    }

    /// Hands over from this replica, which must lead.
    ///
    /// # Errors
    /// When the other node cannot take over, or did not in time.
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), TransferError> {
        if !self.is_leader() {
            return Err(TransferError::NotLeader {
                leader: self.leader(),
            });
        }
        let refused = |text: &str| TransferError::Refused(text.to_owned());
        let target = self
            .replica_of(to)
            .filter(|target| self.members().voters.contains(target))
            .ok_or_else(|| refused("it has no voting replica"))?;
        if self.inner.peers.liveness().state(to) != PeerState::Up {
            return Err(refused("it is not up"));
        }
        if self.lag_of(to).is_some_and(|lag| lag > TRANSFER_LAG_MAX) {
            return Err(refused("its replica is far behind"));
        }
        let term = self.term();
        if self.try_transfer(target, term).await? {
            return Ok(());
        }
        self.inner.stuck_term.store(term, Ordering::Relaxed);
        self.give_away().await;
        Err(TransferError::NotTaken(format!(
            "node {to} did not take over in time"
        )))
    }

    /// How many entries a node's replica is known to be behind this one, which leads.
    fn lag_of(&self, node: NodeId) -> Option<u64> {
        let metrics = self.metrics();
        let matched = metrics.matched.iter().find(|(n, _)| *n == node);
        let matched = matched.and_then(|(_, matched)| *matched)?;
        Some(metrics.last_log_index?.saturating_sub(matched))
    }

    /// Announces the transfer and waits for the next term's leader.
    async fn try_transfer(&self, target: ReplicaId, term: u64) -> Result<bool, TransferError> {
        let trigger = self.inner.raft.trigger();
        trigger
            .transfer_leader(target)
            .await
            .map_err(|e| TransferError::NotTaken(e.to_string()))?;
        let mut metrics = self.inner.metrics.clone();
        let own = self.inner.replica;
        let moved = metrics.wait_until(|m| {
            m.current_term > term && m.current_leader.is_some_and(|leader| leader != own)
        });
        let moved = timeout(self.inner.peers.lease(), moved).await;
        Ok(moved.is_ok_and(|r| r.is_ok()))
    }

    /// Leads, and can do nothing with it.
    pub(crate) fn is_stuck(&self) -> bool {
        self.is_leader() && self.inner.stuck_term.load(Ordering::Relaxed) == self.term()
    }

    /// After a failed transfer: hands over to whoever takes it.
    pub(crate) async fn give_away(&self) {
        let peers = &self.inner.peers;
        for other in self.replicas().iter() {
            let up =
                other.node != peers.node() && peers.liveness().state(other.node) == PeerState::Up;
            if up && self.is_stuck() {
                self.try_transfer(other.replica, self.term()).await.ok();
            }
        }
    }

    /// Ends the promise not to elect anyone else while `dead` leads: the whole cluster's majority
    /// has agreed that it is gone. Safe in any case: a vote still needs a majority and a log that
    /// is up to date, and nothing here reads by lease.
    pub(crate) async fn void_lease(&self, dead: NodeId) {
        let vote = self.inner.metrics.borrow_watched().vote;
        let leader = vote.leader_id().voted_for;
        if !vote.is_committed() || self.node_of(leader) != Some(dead) {
            return;
        }
        self.inner
            .deposed_term
            .store(vote.leader_id().term, Ordering::Relaxed);
        let request = TransferLeaderRequest::new(vote, leader, None);
        self.inner.raft.handle_transfer_leader(request).await.ok();
    }

    /// Stands for election, with a pre-vote. One attempt; look at the metrics for its result.
    pub(crate) async fn stand_for_election(&self) {
        self.inner.raft.trigger().elect(true).await.ok();
    }
}
