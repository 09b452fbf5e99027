//! What the leader of a coordinator answers about consumer groups.
//!
//! Each answer stands on a read barrier: a node that leads no more answers nobody, and one that has
//! just begun to lead knows everything that was committed before. The barrier costs no write, and
//! all who wait share one. A member is heard when it knocks, not when the barrier is through: how
//! long that takes is not its fault.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::GROUPS_PER_PAGE;
use super::describe::GroupState;
use crate::broker::local::LocalCoordinator;
use crate::broker::{Broker, BrokerError};
use crate::coordinator::{
    CoordinatorCommand, CoordinatorReply, CoordinatorView, Delivery, GroupStart, GroupSummary,
    Membership, Newcomer, NotAMember, QueueId,
};
use crate::peer::{PeerError, PeerResult};
use quorate_storage::StorageError;

/// How long a leader tries to prove that it is one, before another node is asked.
pub(super) const PROOF: Duration = Duration::from_secs(1);

/// What only the leader of a coordinator can answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GroupQuestion {
    Join {
        group: String,
        newcomer: Newcomer,
    },
    Heartbeat {
        group: String,
        member: String,
        epoch: u64,
        owned: Option<Vec<QueueId>>,
    },
    Describe {
        group: String,
    },
    List {
        after: Option<String>,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GroupAnswer {
    Seat(Seat),
    State(Box<GroupState>),
    Groups(Vec<GroupSummary>),
}

/// A member's place in its group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Seat {
    pub member_id: String,
    pub epoch: u64,
    pub session_timeout_ms: u64,
    pub start: GroupStart,
    pub tag: Option<String>,
    pub filter: Option<String>,
    /// Set in a broadcast group: offsets are its own.
    pub instance: Option<String>,
    /// With what is committed there.
    pub queues: Vec<(QueueId, Option<u64>)>,
}

impl Broker {
    /// Answers as the coordinator's leader.
    pub(crate) async fn group_here(
        &self,
        coordinator: u32,
        question: GroupQuestion,
        timeout: Duration,
    ) -> PeerResult<GroupAnswer> {
        let deadline = Instant::now() + timeout;
        if let GroupQuestion::Heartbeat {
            group,
            member,
            epoch,
            ..
        } = &question
        {
            self.sessions.hear(coordinator, group, member, *epoch);
        }
        let patience = timeout.min(PROOF);
        let local = match self.proved_coordinator(coordinator, patience).await {
            Ok(local) => local,
            Err(error) => {
                // Those that could not even knock have waited in vain as well.
                if patience == PROOF && matches!(error, PeerError::NotLeader { leader: None }) {
                    self.sessions.renew(Some(coordinator));
                }
                return Err(error);
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        match question {
            GroupQuestion::Join { group, newcomer } => {
                self.join_here(coordinator, &local, group, newcomer, left)
                    .await
            }
            GroupQuestion::Heartbeat {
                group,
                member,
                epoch,
                owned,
            } => {
                let beat = Beat {
                    group,
                    member,
                    epoch,
                    owned,
                };
                self.heartbeat_here(coordinator, &local, beat, left).await
            }
            GroupQuestion::Describe { group } => {
                let ages = self.sessions.ages(coordinator, &group);
                let state = read(&local, |view| GroupState::read(view, &group, ages))?;
                let state = state.ok_or(BrokerError::ConsumerGroupNotFound { group });
                Ok(GroupAnswer::State(Box::new(
                    state.map_err(PeerError::Broker)?,
                )))
            }
            GroupQuestion::List { after } => {
                let groups = read(&local, |view| {
                    view.groups(after.as_deref(), GROUPS_PER_PAGE)
                })?;
                Ok(GroupAnswer::Groups(groups))
            }
        }
    }

    /// This node's replica of a coordinator, which proves to lead and has applied everything.
    pub(super) async fn proved_coordinator(
        &self,
        coordinator: u32,
        patience: Duration,
    ) -> PeerResult<Arc<LocalCoordinator>> {
        let local = self.led_coordinator(coordinator)?;
        let proof = local.group.read_barrier(patience).await;
        if proof.is_err() || !local.group.is_leader() {
            let leader = local.group.leader().filter(|n| *n != self.node_id());
            return Err(PeerError::NotLeader { leader });
        }
        Ok(local)
    }

    async fn join_here(
        &self,
        coordinator: u32,
        local: &LocalCoordinator,
        group: String,
        newcomer: Newcomer,
        timeout: Duration,
    ) -> PeerResult<GroupAnswer> {
        let command = CoordinatorCommand::Join {
            group: group.clone(),
            topics: self.topic_shapes(&newcomer.topics).await,
            newcomer,
        };
        match self.propose_group(local, &command, timeout).await? {
            CoordinatorReply::Joined(id) => self.seat(coordinator, local, &group, &id),
            CoordinatorReply::GroupFull => {
                Err(PeerError::Broker(BrokerError::QuotaExceeded(format!(
                    "consumer group {group:?} has {} members, which is the most; let some leave or use another group",
                    crate::coordinator::MAX_MEMBERS
                ))))
            }
            CoordinatorReply::OtherDelivery(other) => {
                Err(PeerError::Broker(BrokerError::GroupDeliveryConflict {
                    group,
                    broadcast: other == Delivery::Broadcast,
                }))
            }
            CoordinatorReply::OtherMode(_) => {
                let leased = true;
                Err(PeerError::Broker(BrokerError::GroupModeConflict {
                    group,
                    leased,
                }))
            }
            other => Err(PeerError::Broker(refused(other))),
        }
    }

    async fn heartbeat_here(
        &self,
        coordinator: u32,
        local: &LocalCoordinator,
        beat: Beat,
        timeout: Duration,
    ) -> PeerResult<GroupAnswer> {
        let membership = read(local, |view| view.membership(&beat.group))?;
        let Some(membership) = membership else {
            return Err(PeerError::Broker(BrokerError::ConsumerGroupNotFound {
                group: beat.group,
            }));
        };
        let known = membership.check(&beat.member, beat.epoch);
        known.map_err(|why| not_a_member(why, &beat))?;
        let owned = beat.owned.as_deref();
        let released = membership.released(&beat.member, beat.epoch, owned);
        if !released.is_empty() {
            let command = CoordinatorCommand::Heartbeat {
                group: beat.group.clone(),
                member: beat.member.clone(),
                epoch: beat.epoch,
                owned: beat.owned.clone(),
            };
            match self.propose_group(local, &command, timeout).await? {
                CoordinatorReply::MembersChanged => {}
                CoordinatorReply::NotAMember(why) => return Err(not_a_member(why, &beat)),
                other => return Err(PeerError::Broker(refused(other))),
            }
        }
        self.seat(coordinator, local, &beat.group, &beat.member)
    }

    /// Proposes on this node, which leads.
    pub(super) async fn propose_group(
        &self,
        local: &LocalCoordinator,
        command: &CoordinatorCommand,
        timeout: Duration,
    ) -> PeerResult<CoordinatorReply> {
        // Plain data into memory: there is no way to fail.
        let body = postcard::to_stdvec(command).unwrap_or_default();
        let group = local.group.id().0;
        let reply = self.propose_here(group, body.into(), timeout).await?;
        if reply.is_empty() {
            // Committed, but this leader's own copy of the state broke while it was applied.
            return Err(PeerError::Broker(super::UNKNOWN));
        }
        let reply = postcard::from_bytes(&reply);
        reply.map_err(|e| PeerError::Broker(BrokerError::Internal(e.to_string())))
    }

    /// Where a member sits now that it was heard of.
    fn seat(
        &self,
        coordinator: u32,
        local: &LocalCoordinator,
        group: &str,
        id: &str,
    ) -> PeerResult<GroupAnswer> {
        let membership = read(local, |view| view.membership(group))?.unwrap_or_default();
        self.sessions.see(
            coordinator,
            local.group.term(),
            group,
            &membership,
            Some(id),
        );
        let Some(member) = membership.members.get(id) else {
            return Err(PeerError::Broker(BrokerError::MemberNotFound {
                group: group.to_owned(),
                member: id.to_owned(),
            }));
        };
        let own = member.instance_id.as_deref();
        let instance = own.filter(|_| membership.delivery == Delivery::Broadcast);
        let committed = read(local, |view| match instance {
            Some(instance) => view.instance_offsets(group, instance),
            None => view.offsets(group),
        })?;
        let committed = |queue: &QueueId| {
            let place =
                committed.binary_search_by_key(&(queue.topic, queue.queue), |o| (o.topic, o.queue));
            place.ok().map(|place| committed[place].offset)
        };
        let queues = membership.assignment(id).into_iter();
        Ok(GroupAnswer::Seat(Seat {
            member_id: id.to_owned(),
            epoch: member.epoch,
            session_timeout_ms: member.session_timeout_ms,
            start: member.start,
            tag: member.tag.clone(),
            filter: member.filter.clone(),
            instance: instance.map(str::to_owned),
            queues: queues.map(|queue| (queue, committed(&queue))).collect(),
        }))
    }
}

struct Beat {
    group: String,
    member: String,
    epoch: u64,
    owned: Option<Vec<QueueId>>,
}

/// Reads the applied state; a replica whose store fails answers nothing.
pub(super) fn read<T: DeserializeOwned>(
    local: &LocalCoordinator,
    read: impl FnOnce(&CoordinatorView) -> Result<T, StorageError>,
) -> PeerResult<T> {
    read(&local.view).map_err(|cause| {
        local.soundness.set_broken(cause);
        PeerError::NotHere
    })
}

/// The members of a group as applied here.
pub(super) fn membership(local: &LocalCoordinator, group: &str) -> PeerResult<Membership> {
    Ok(read(local, |view| view.membership(group))?.unwrap_or_default())
}

fn not_a_member(why: NotAMember, beat: &Beat) -> PeerError {
    let (group, member) = (beat.group.clone(), beat.member.clone());
    PeerError::Broker(match why {
        NotAMember::Unknown => BrokerError::MemberNotFound { group, member },
        NotAMember::Fenced { .. } => BrokerError::FencedMember { group, member },
    })
}

fn refused(reply: CoordinatorReply) -> BrokerError {
    match reply {
        CoordinatorReply::Invalid(text) => BrokerError::InvalidRequest(text),
        other => super::unexpected(&other),
    }
}
