//! Replacing the replicas of a group: by learners that catch up first and vote afterwards.
//!
//! Which replicas a group should have is decided elsewhere and does not change until they are
//! there, so every step here may be done again, by this leader or by the next one: the group's own
//! membership says how far it has come. One change runs at a time.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use tokio::time::timeout;

use super::Group;
use crate::config::Replica;
use crate::types::{ReplicaId, ReplicaNode, TypeConfig};

/// A learner this many entries behind is made a voter: what is left is sent in a moment.
const CAUGHT_UP_LAG: u64 = 256;
/// How long one step may wait for a majority. Its entry may be committed later all the same.
const STEP_PATIENCE: Duration = Duration::from_secs(5);

/// How far a change of replicas has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// The wanted replicas, and no others, are the voters.
    Yes,
    /// New replicas receive the log.
    CatchingUp,
    /// Another node leads, or none.
    NotLeader,
    /// The wanted replicas are of an older life than those the group has: there is newer word.
    Outdated,
    /// A step did not get through; the next call goes on from what is there.
    Failed(String),
}

/// The replicas that a group's log names.
#[derive(Debug, Default)]
pub(super) struct Members {
    pub voters: BTreeSet<ReplicaId>,
    /// Voters and learners.
    pub all: Vec<Replica>,
    /// Between two sets of voters.
    pub joint: bool,
    /// No later leader can go back behind it.
    pub committed: bool,
}

impl Group {
    pub(super) fn members(&self) -> Members {
        let metrics = self.inner.metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let replica = |(id, node): (&ReplicaId, &ReplicaNode)| Replica {
            replica: *id,
            node: node.node,
        };
        Members {
            voters: membership.voter_ids().collect(),
            all: membership.nodes().map(replica).collect(),
            joint: membership.get_joint_config().len() > 1,
            committed: *metrics.membership_config.log_id() <= metrics.local_committed,
        }
    }

    /// Whether this replica could lead: not before it votes, nor while its tail is in doubt.
    pub(crate) fn may_stand(&self) -> bool {
        let voters = self.members().voters;
        let votes = voters.is_empty() || voters.contains(&self.replica());
        votes && !self.tail().is_suspect()
    }

    /// The replicas whose votes count now.
    pub(crate) fn voters(&self) -> Vec<Replica> {
        let members = self.members();
        if members.voters.is_empty() {
            return self.replicas().to_vec();
        }
        let votes = |r: &Replica| members.voters.contains(&r.replica);
        members.all.into_iter().filter(votes).collect()
    }

    /// Does the next step towards having exactly `wanted` as voters. Call it again until it is
    /// [`Settled::Yes`]; whatever happens in between, no acknowledged entry is at risk: every step
    /// is committed by a majority of the voters before it.
    pub async fn settle_members(&self, wanted: &[Replica]) -> Settled {
        // Two at once could leave the group between two sets of voters.
        let Ok(_alone) = self.inner.settling.try_lock() else {
            return Settled::CatchingUp;
        };
        if !self.is_leader() || !self.prove_leadership().await {
            return Settled::NotLeader;
        }
        let members = self.members();
        if is_outdated(wanted, &members.all) {
            return Settled::Outdated;
        }
        let ids: BTreeSet<ReplicaId> = wanted.iter().map(|r| r.replica).collect();
        let known = |id: &ReplicaId| members.all.iter().any(|r| r.replica == *id);
        if members.voters == ids && !members.joint {
            if !members.committed {
                return Settled::CatchingUp;
            }
            return match members.all.len() == ids.len() {
                true => Settled::Yes,
                false => self.forget_learners(&members, &ids).await,
            };
        }
        for new in wanted.iter().filter(|r| !known(&r.replica)) {
            let node = ReplicaNode { node: new.node };
            let step = self.inner.raft.add_learner(new.replica, node, false);
            if let Err(failed) = finish(step).await {
                return failed;
            }
        }
        let behind: Vec<ReplicaId> = ids
            .difference(&members.voters)
            .copied()
            .filter(|id| !self.holds_nearly_all(*id))
            .collect();
        if !behind.is_empty() {
            // It may have been opened a moment ago, while its leader waits out a backoff.
            let trigger = self.inner.raft.trigger();
            trigger.reset_backoff(behind).await.ok();
            return Settled::CatchingUp;
        }
        tracing::info!(group = %self.id(), voters = ?ids, "replicas replaced");
        match finish(self.inner.raft.change_membership(ids, false)).await {
            Ok(()) => Settled::CatchingUp,
            Err(failed) => failed,
        }
    }

    /// Learners that nobody wants any more: of a replacement that was itself replaced.
    async fn forget_learners(&self, members: &Members, wanted: &BTreeSet<ReplicaId>) -> Settled {
        let extra = members.all.iter().map(|r| r.replica);
        let extra: BTreeSet<ReplicaId> = extra.filter(|id| !wanted.contains(id)).collect();
        let change = openraft::ChangeMembers::RemoveNodes(extra);
        match finish(self.inner.raft.change_membership(change, false)).await {
            Ok(()) => Settled::CatchingUp,
            Err(failed) => failed,
        }
    }

    /// Whether this leader knows a replica to hold all but the newest entries.
    fn holds_nearly_all(&self, replica: ReplicaId) -> bool {
        let metrics = self.inner.metrics.borrow_watched();
        let last = metrics.last_log_index.unwrap_or(0);
        let replication = metrics.replication.iter().flatten();
        replication
            .filter(|(id, _)| **id == replica)
            .any(|(_, matched)| {
                matched
                    .as_ref()
                    .is_some_and(|at| at.index + CAUGHT_UP_LAG >= last)
            })
    }
}

/// Replica ids only grow, so a wanted one below the one its node already has is old news.
fn is_outdated(wanted: &[Replica], members: &[Replica]) -> bool {
    let newest = members.iter().map(|r| r.replica).max();
    let known = |id: ReplicaId| members.iter().any(|r| r.replica == id);
    wanted
        .iter()
        .any(|w| !known(w.replica) && newest.is_some_and(|newest| w.replica < newest))
}

async fn finish<T>(
    step: impl Future<Output = Result<T, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>>,
) -> Result<(), Settled> {
    match timeout(STEP_PATIENCE, step).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => {
            Err(Settled::NotLeader)
        }
        Ok(Err(error)) => Err(Settled::Failed(error.to_string())),
        Err(_) => Err(Settled::Failed("no majority answered in time".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(ids: &[u64]) -> Vec<Replica> {
        let nodes = 1..;
        ids.iter()
            .zip(nodes)
            .map(|(replica, node)| Replica {
                replica: *replica,
                node,
            })
            .collect()
    }

    #[test]
    fn replicas_of_an_older_life_are_not_brought_back() {
        assert!(!is_outdated(&replicas(&[1, 2, 7]), &replicas(&[1, 2, 3])));
        assert!(!is_outdated(&replicas(&[1, 2, 7]), &replicas(&[1, 2, 7])));
        assert!(is_outdated(&replicas(&[1, 2, 3]), &replicas(&[1, 2, 7])));
        assert!(is_outdated(&replicas(&[1, 2, 7]), &replicas(&[1, 2, 9])));
    }
}
