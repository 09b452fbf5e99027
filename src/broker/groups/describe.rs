//! What is told of a consumer group: members, who has which queue, and how far each is.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::broker::{Broker, BrokerResult, GroupOffset};
use crate::catalog::TopicId;
use crate::coordinator::{
    AssignStrategy, CoordinatorView, Delivery, GroupMode, Member, Membership, QueueId, QueueOffset,
};
use quorate_storage::StorageError;

/// What a coordinator knows of a group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GroupState {
    pub mode: GroupMode,
    pub membership: Membership,
    /// By member: how long ago it was heard of.
    pub heard_ms_ago: BTreeMap<String, u64>,
    pub offsets: Vec<QueueOffset>,
    /// Of a broadcast group, by instance.
    pub instance_offsets: BTreeMap<String, Vec<QueueOffset>>,
}

impl GroupState {
    /// None: the group was never used.
    pub(super) fn read(
        view: &CoordinatorView,
        group: &str,
        heard_ms_ago: BTreeMap<String, u64>,
    ) -> Result<Option<Self>, StorageError> {
        let Some(mode) = view.group_mode(group)? else {
            return Ok(None);
        };
        let membership = view.membership(group)?.unwrap_or_default();
        let mut instance_offsets = BTreeMap::new();
        if membership.delivery == Delivery::Broadcast {
            for member in membership.members.values() {
                if let Some(instance) = &member.instance_id {
                    let offsets = view.instance_offsets(group, instance)?;
                    instance_offsets.insert(instance.clone(), offsets);
                }
            }
        }
        Ok(Some(Self {
            mode,
            offsets: view.offsets(group)?,
            membership,
            heard_ms_ago,
            instance_offsets,
        }))
    }
}

/// A group as it is told.
#[derive(Debug, Clone)]
pub struct GroupDescription {
    pub mode: GroupMode,
    pub delivery: Delivery,
    pub strategy: AssignStrategy,
    pub epoch: u64,
    pub moving: bool,
    pub members: Vec<MemberDescription>,
    pub offsets: Vec<QueueOwner>,
}

#[derive(Debug, Clone)]
pub struct MemberDescription {
    pub id: String,
    pub member: Member,
    /// None: not since the coordinator's leader changed.
    pub heard_ms_ago: Option<u64>,
    /// Topic and queue.
    pub assignment: Vec<(String, u32)>,
    /// Queues it is asked to give up.
    pub revoking: Vec<(String, u32)>,
}

/// A queue of the group, or, in a broadcast group, of one instance.
#[derive(Debug, Clone)]
pub struct QueueOwner {
    pub offset: GroupOffset,
    pub member: Option<String>,
    pub instance: Option<String>,
}

/// What is known of one queue of a group, or of one instance.
#[derive(Default)]
struct Place {
    owner: Option<String>,
    offset: Option<u64>,
}

impl Broker {
    /// All that is known of a group.
    pub async fn describe_group(&self, group: &str) -> BrokerResult<GroupDescription> {
        super::check_group_name(group)?;
        let state = self.group_state(group).await?;
        let membership = &state.membership;
        let catalog = self.catalog();
        let name = |queue: &QueueId| {
            let topic = catalog.topics.get(&queue.topic)?;
            Some((topic.name.clone(), queue.queue))
        };
        let members = membership.members.iter().map(|(id, member)| {
            let moving = membership.queues.iter();
            let moving = moving.filter(|(_, t)| t.owner == *id && t.target != *id);
            MemberDescription {
                id: id.clone(),
                member: member.clone(),
                heard_ms_ago: state.heard_ms_ago.get(id).copied(),
                assignment: membership.assignment(id).iter().filter_map(name).collect(),
                revoking: moving.filter_map(|(queue, _)| name(queue)).collect(),
            }
        });
        let members = members.collect();
        let offsets = self.group_places(group, &state, true).await;
        Ok(GroupDescription {
            mode: state.mode,
            delivery: membership.delivery,
            strategy: membership.strategy,
            epoch: membership.epoch,
            moving: membership.is_moving(),
            members,
            offsets,
        })
    }

    /// Where a group is in every queue that it has committed in or has members for.
    pub(in crate::broker) async fn all_offsets(
        &self,
        group: &str,
    ) -> BrokerResult<Vec<GroupOffset>> {
        let state = self.group_state(group).await?;
        let places = self.group_places(group, &state, false).await.into_iter();
        let common = places.filter(|place| place.instance.is_none());
        Ok(common.map(|place| place.offset).collect())
    }

    /// Every queue in which the group has committed or has an owner, with the lag there; with
    /// `whole_topics` also the other queues of the same topics.
    async fn group_places(
        &self,
        group: &str,
        state: &GroupState,
        whole_topics: bool,
    ) -> Vec<QueueOwner> {
        let membership = &state.membership;
        let id = |o: &QueueOffset| QueueId {
            topic: o.topic,
            queue: o.queue,
        };
        let mut places: BTreeMap<(Option<String>, QueueId), Place> = BTreeMap::new();
        for (queue, turn) in &membership.queues {
            let place = places.entry((None, *queue)).or_default();
            place.owner = Some(turn.owner.clone());
        }
        for offset in &state.offsets {
            let place = places.entry((None, id(offset))).or_default();
            place.offset = Some(offset.offset);
        }
        if membership.delivery == Delivery::Broadcast {
            for (member, known) in &membership.members {
                for queue in membership.assignment(member) {
                    let place = places.entry((known.instance_id.clone(), queue));
                    place.or_default().owner = Some(member.clone());
                }
            }
            for (instance, offsets) in &state.instance_offsets {
                for offset in offsets {
                    let place = places.entry((Some(instance.clone()), id(offset)));
                    place.or_default().offset = Some(offset.offset);
                }
            }
        }
        let catalog = self.catalog();
        if whole_topics && membership.delivery == Delivery::Cluster {
            let topics: BTreeSet<TopicId> = places.keys().map(|(_, queue)| queue.topic).collect();
            for topic in topics.iter().filter_map(|id| catalog.topics.get(id)) {
                for (queue, _) in (0u32..).zip(&topic.queues) {
                    let topic = topic.id;
                    places.entry((None, QueueId { topic, queue })).or_default();
                }
            }
        }
        let known =
            places
                .into_iter()
                .filter_map(|((instance, queue), Place { owner, offset })| {
                    let topic = catalog.topics.get(&queue.topic)?;
                    let raft_group = topic.queues.get(queue.queue as usize)?.group;
                    let row = QueueOwner {
                        offset: GroupOffset {
                            topic: topic.name.clone(),
                            queue: queue.queue,
                            offset,
                            behind: None,
                        },
                        member: owner,
                        instance,
                    };
                    Some((raft_group, row))
                });
        let (raft_groups, mut rows): (Vec<u64>, Vec<QueueOwner>) = known.unzip();
        let offsets = rows.iter().map(|row| row.offset.offset);
        let asked = raft_groups.into_iter().zip(offsets).collect();
        let behind = self.behind(asked).await;
        for (row, behind) in rows.iter_mut().zip(behind) {
            row.offset.behind = behind;
        }
        rows.sort_by(|a, b| {
            let key = |o: &QueueOwner| (o.instance.clone(), o.offset.topic.clone(), o.offset.queue);
            key(a).cmp(&key(b))
        });
        let common = rows.iter().filter(|row| row.instance.is_none());
        self.show_lag(group, common.map(|row| &row.offset));
        rows
    }
}
