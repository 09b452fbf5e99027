//! Consumer groups with members: join, heartbeat, leave, and what is told of a group.
//!
//! Who is a member and who owns which queue is decided in the coordinator's apply. Its leader hears
//! the heartbeats (`leader`), remembers when (`sessions`), and expels who was silent for too
//! long (`duty`).

mod describe;
mod duty;
mod leader;
mod seat;
mod sessions;

pub use describe::{GroupDescription, GroupState, MemberDescription, QueueOwner};
pub(super) use duty::start;
pub use leader::{GroupAnswer, GroupQuestion, Seat};
pub use sessions::Sessions;

use super::offsets::check_group_name;
use super::producers::unexpected;
use super::route::{Attempt, NO_LEADER, UNKNOWN, once_begun};
use super::{Broker, BrokerError, BrokerResult};
use crate::coordinator::{
    AssignStrategy, CoordinatorCommand, CoordinatorReply, Delivery, GroupStart, GroupSummary,
    Newcomer,
};
use crate::peer::PeerRequest;

/// Heartbeats a member has for one session timeout.
const HEARTBEATS_PER_SESSION: u64 = 3;
/// Groups that one coordinator tells of at a time.
const GROUPS_PER_PAGE: usize = 1_000;

/// Somebody wants to become a member.
#[derive(Debug, Clone)]
pub struct JoinRequest {
    pub group: String,
    pub topics: Vec<String>,
    pub tag: Option<String>,
    pub filter: Option<String>,
    pub instance_id: Option<String>,
    pub delivery: Delivery,
    pub start: GroupStart,
    pub session_timeout_ms: u64,
    pub strategy: Option<AssignStrategy>,
}

/// A queue to consume, from this offset on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AssignedQueue {
    pub topic: String,
    pub queue: u32,
    pub offset: u64,
}

/// What a member is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberAnswer {
    pub member_id: String,
    pub epoch: u64,
    pub assignment: Vec<AssignedQueue>,
    pub session_timeout_ms: u64,
    pub tag: Option<String>,
    pub filter: Option<String>,
    /// Subscribed topics that don't exist; told to who joins.
    pub missing_topics: Vec<String>,
}

impl MemberAnswer {
    /// How often the member should be heard of.
    pub fn heartbeat_interval_ms(&self) -> u64 {
        self.session_timeout_ms / HEARTBEATS_PER_SESSION
    }
}

impl Broker {
    /// Makes somebody a member of a group, or the same member again.
    pub async fn join_group(&self, request: JoinRequest) -> BrokerResult<MemberAnswer> {
        check_group_name(&request.group)?;
        let mut topics = request.topics;
        topics.sort();
        topics.dedup();
        let newcomer = Newcomer {
            id: uuid::Uuid::new_v4().simple().to_string(),
            instance_id: request.instance_id,
            topics,
            tag: request.tag,
            filter: request.filter,
            delivery: request.delivery,
            start: request.start,
            session_timeout_ms: request.session_timeout_ms,
            strategy: request.strategy,
        };
        let group = request.group.clone();
        let topics = newcomer.topics.clone();
        let question = GroupQuestion::Join { group, newcomer };
        let seat = self.ask_for_seat(&request.group, question).await?;
        let answer = self.answer_member(&request.group, seat).await;
        let mut answer = answer.map_err(once_begun)?;
        let shapes = self.topic_shapes(&topics).await.into_iter();
        let missing = shapes.filter(|(_, shape)| shape.found.is_none());
        answer.missing_topics = missing.map(|(name, _)| name).collect();
        Ok(answer)
    }

    /// A member's sign of life. `owned`: the queues it still consumes.
    pub async fn heartbeat(
        &self,
        group: &str,
        member: &str,
        epoch: u64,
        owned: Option<&[(String, u32)]>,
    ) -> BrokerResult<MemberAnswer> {
        check_group_name(group)?;
        let owned = match owned {
            Some(owned) => Some(self.queue_ids(owned).await?),
            None => None,
        };
        let question = GroupQuestion::Heartbeat {
            group: group.to_owned(),
            member: member.to_owned(),
            epoch,
            owned,
        };
        let seat = self.ask_for_seat(group, question).await?;
        self.answer_member(group, seat).await
    }

    /// What was committed in a member's queues: by the group, or in a broadcast group by itself.
    pub async fn member_offsets(
        &self,
        group: &str,
        member: &str,
    ) -> BrokerResult<Vec<(String, u32, u64)>> {
        let state = self.group_state(group).await?;
        let known = state.membership.members.get(member);
        let instance = known.and_then(|m| m.instance_id.as_ref());
        let own = instance.and_then(|instance| state.instance_offsets.get(instance));
        let offsets = match state.membership.delivery {
            Delivery::Broadcast => own.map_or(&[][..], |own| own),
            Delivery::Cluster => &state.offsets,
        };
        let catalog = self.catalog();
        let named = offsets.iter().filter_map(|offset| {
            let topic = catalog.topics.get(&offset.topic)?;
            Some((topic.name.clone(), offset.queue, offset.offset))
        });
        Ok(named.collect())
    }

    /// Ends a membership at once. With an epoch: only if it is of the member's present life.
    pub async fn leave_group(
        &self,
        group: &str,
        member: &str,
        epoch: Option<u64>,
    ) -> BrokerResult<()> {
        check_group_name(group)?;
        let state = self.group_state(group).await?;
        let known = state.membership.members.get(member);
        let known = known.ok_or_else(|| BrokerError::MemberNotFound {
            group: group.to_owned(),
            member: member.to_owned(),
        })?;
        if epoch.is_some_and(|epoch| !(known.joined..=known.epoch).contains(&epoch)) {
            return Err(BrokerError::FencedMember {
                group: group.to_owned(),
                member: member.to_owned(),
            });
        }
        let command = CoordinatorCommand::RemoveMembers {
            group: group.to_owned(),
            members: vec![(member.to_owned(), known.joined)],
        };
        match self
            .coordinate(self.coordinator_of(group), &command)
            .await?
        {
            CoordinatorReply::MembersChanged => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Every consumer group that was used, by name. What begins with `_` is the server's own.
    pub async fn groups(&self) -> BrokerResult<Vec<GroupSummary>> {
        let mut all = Vec::new();
        for coordinator in (0u32..).take(self.catalog().coordinators.len()) {
            let mut after = None;
            loop {
                let question = GroupQuestion::List {
                    after: after.take(),
                };
                let GroupAnswer::Groups(page) = self.ask_coordinator(coordinator, question).await?
                else {
                    return Err(mismatch());
                };
                let full = page.len() == GROUPS_PER_PAGE;
                after = page.last().map(|group| group.name.clone());
                all.extend(
                    page.into_iter()
                        .filter(|group| !group.name.starts_with('_')),
                );
                if !full {
                    break;
                }
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes everything that is kept of a group without members.
    pub async fn delete_group(&self, group: &str) -> BrokerResult<()> {
        check_group_name(group)?;
        self.forget_group(group).await
    }

    /// The same, for the server's own groups too.
    pub(super) async fn forget_group(&self, group: &str) -> BrokerResult<()> {
        let coordinator = self.coordinator_of(group);
        let command = CoordinatorCommand::DeleteGroup {
            group: group.to_owned(),
        };
        let mut begun = false;
        loop {
            let group = group.to_owned();
            let step = self.coordinate(coordinator, &command).await;
            match step.map_err(|e| if begun { once_begun(e) } else { e })? {
                CoordinatorReply::GroupDeleted { more: true } => begun = true,
                CoordinatorReply::GroupDeleted { more: false } => return Ok(()),
                CoordinatorReply::UnknownGroup if begun => return Ok(()),
                CoordinatorReply::UnknownGroup => {
                    return Err(BrokerError::ConsumerGroupNotFound { group });
                }
                CoordinatorReply::GroupHasMembers(members) => {
                    return Err(BrokerError::GroupHasMembers { group, members });
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    async fn ask_for_seat(&self, group: &str, question: GroupQuestion) -> BrokerResult<Seat> {
        match self
            .ask_coordinator(self.coordinator_of(group), question)
            .await?
        {
            GroupAnswer::Seat(seat) => Ok(seat),
            _ => Err(mismatch()),
        }
    }

    async fn group_state(&self, group: &str) -> BrokerResult<GroupState> {
        let question = GroupQuestion::Describe {
            group: group.to_owned(),
        };
        match self
            .ask_coordinator(self.coordinator_of(group), question)
            .await?
        {
            GroupAnswer::State(state) => Ok(*state),
            _ => Err(mismatch()),
        }
    }

    /// Asks the leader of a coordinator, wherever it is.
    async fn ask_coordinator(
        &self,
        coordinator: u32,
        question: GroupQuestion,
    ) -> BrokerResult<GroupAnswer> {
        let catalog = self.catalog();
        let placement = catalog.coordinators.get(coordinator as usize);
        let placement = placement.ok_or(NO_LEADER)?;
        let here = |left| {
            let question = question.clone();
            async move {
                let answer = self.group_here(coordinator, question, left).await;
                answer.map_err(Attempt::from)
            }
        };
        let request = |timeout_ms| PeerRequest::Group {
            coordinator,
            question: question.clone(),
            timeout_ms,
        };
        self.write(placement.group, self.config.write_timeout, here, request)
            .await
    }
}

fn mismatch() -> BrokerError {
    BrokerError::Internal("a coordinator answered something else".to_owned())
}
