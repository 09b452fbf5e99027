//! The members of one consumer group, and which of them owns which queue.
//!
//! Every change that a member can see raises the group's epoch and becomes that member's epoch. A
//! queue has one owner and one *target*, who is to own it. Where they differ the owner is asked to
//! stop; only when it has, has left or was expelled does the queue change hands, so no queue has two
//! owners in any epoch, and queues that don't move are never paused.

use std::collections::{BTreeMap, BTreeSet};

use quorate_storage::mutation::{self, Mutation};
use serde::{Deserialize, Serialize};

use super::assign::{AssignStrategy, TopicShare, assign};
use crate::broker::MemberMark;
use crate::catalog::TopicId;

/// Members one group may have.
pub const MAX_MEMBERS: usize = 500;
/// Queues that a group may share out when somebody joins; topics may grow beyond it later.
pub const MAX_GROUP_QUEUES: u64 = 10_000;

/// A queue of a topic's one life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QueueId {
    pub topic: TopicId,
    pub queue: u32,
}

/// Whom a group's messages are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Delivery {
    /// Each message for one member: queues are shared out.
    #[default]
    Cluster,
    /// Each message for every member: each has all queues, and offsets of its own.
    Broadcast,
}

/// Where a group begins in a queue for which it has committed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GroupStart {
    #[default]
    Earliest,
    Latest,
    Timestamp(u64),
}

/// What a subscribed topic was when the catalog had this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicShape {
    pub version: u64,
    /// Id and number of queues; None: there is no such topic.
    pub found: Option<(TopicId, u32)>,
}

/// What somebody who joins says of themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newcomer {
    /// The member's id, if it is a new one; chosen by whoever proposes, unique for ever.
    pub id: String,
    /// The same again is the same member.
    pub instance_id: Option<String>,
    /// Names, ascending, each once.
    pub topics: Vec<String>,
    pub tag: Option<String>,
    pub filter: Option<String>,
    pub delivery: Delivery,
    pub start: GroupStart,
    pub session_timeout_ms: u64,
    /// None: as the group has it.
    pub strategy: Option<AssignStrategy>,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub instance_id: Option<String>,
    pub topics: Vec<String>,
    pub tag: Option<String>,
    pub filter: Option<String>,
    pub start: GroupStart,
    pub session_timeout_ms: u64,
    /// The epoch in which it joined last: lower ones are of a former life, which is fenced.
    pub joined: u64,
    /// The epoch in which its assignment changed last.
    pub epoch: u64,
}

/// Who has a queue and who is to have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub target: String,
    pub owner: String,
    /// The epoch in which the owner got it.
    pub since: u64,
    /// The epoch in which what the owner is told of this queue changed last.
    pub told: u64,
}

/// All of it. A group whose members are gone keeps its epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub epoch: u64,
    pub delivery: Delivery,
    pub strategy: AssignStrategy,
    /// By name: every topic that somebody subscribes to.
    pub topics: BTreeMap<String, TopicShape>,
    pub members: BTreeMap<String, Member>,
    /// Of [`Delivery::Cluster`]: every queue that has subscribers.
    pub queues: BTreeMap<QueueId, Turn>,
}

/// Why a member is not heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotAMember {
    Unknown,
    /// It joined again since, or the epoch was never given to it.
    Fenced {
        current: u64,
    },
}

/// Why somebody can't join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinRefused {
    Full,
    /// The topics have too many queues together.
    TooManyQueues,
    /// The members that are there go through their messages in this other way.
    Delivery(Delivery),
}

impl Membership {
    /// Joins, or joins again. Gives the member's id.
    pub fn join(
        &mut self,
        newcomer: Newcomer,
        shapes: &BTreeMap<String, TopicShape>,
    ) -> Result<String, JoinRefused> {
        let named = |(_, m): &(&String, &Member)| {
            newcomer.instance_id.is_some() && m.instance_id == newcomer.instance_id
        };
        let known = self.members.iter().find(named).map(|(id, _)| id.clone());
        let others = self.members.len() - usize::from(known.is_some());
        if others > 0 && self.delivery != newcomer.delivery {
            return Err(JoinRefused::Delivery(self.delivery));
        }
        if others >= MAX_MEMBERS {
            return Err(JoinRefused::Full);
        }
        let id = known.unwrap_or(newcomer.id);
        let before = self.clone();
        self.delivery = newcomer.delivery;
        let strategy = match others {
            0 => AssignStrategy::default(),
            _ => self.strategy,
        };
        self.strategy = newcomer.strategy.unwrap_or(strategy);
        // Its former life owns nothing any more, so that nobody waits for it to stop.
        self.disown(|owner| owner == id);
        let member = Member {
            instance_id: newcomer.instance_id,
            topics: newcomer.topics,
            tag: newcomer.tag,
            filter: newcomer.filter,
            start: newcomer.start,
            session_timeout_ms: newcomer.session_timeout_ms,
            joined: self.epoch + 1,
            epoch: self.epoch + 1,
        };
        self.members.insert(id.clone(), member);
        self.learn(shapes);
        if self.width() > MAX_GROUP_QUEUES {
            *self = before;
            return Err(JoinRefused::TooManyQueues);
        }
        self.settle(&before);
        Ok(id)
    }

    /// Ends memberships. Lives that began after the epoch given go on. False: nothing changed.
    pub fn remove(&mut self, gone: &[(String, u64)]) -> bool {
        let before = self.clone();
        for (id, joined) in gone {
            if self.members.get(id).is_some_and(|m| m.joined <= *joined) {
                self.members.remove(id);
            }
        }
        if self.members.len() == before.members.len() {
            return false;
        }
        let left: BTreeSet<String> = self.members.keys().cloned().collect();
        self.disown(|owner| !left.contains(owner));
        self.settle(&before);
        true
    }

    /// Takes over what the catalog says of the subscribed topics. False: nothing changed.
    pub fn see_topics(&mut self, shapes: &BTreeMap<String, TopicShape>) -> bool {
        let before = self.clone();
        self.learn(shapes);
        if self.shapes_found() == before.shapes_found() {
            // Versions alone mean nothing to anybody.
            *self = before;
            return false;
        }
        self.settle(&before);
        true
    }

    /// The member, if this epoch is one of its present life.
    pub fn check(&self, id: &str, epoch: u64) -> Result<&Member, NotAMember> {
        let member = self.members.get(id).ok_or(NotAMember::Unknown)?;
        match (member.joined..=member.epoch).contains(&epoch) {
            true => Ok(member),
            false => Err(NotAMember::Fenced {
                current: member.epoch,
            }),
        }
    }

    /// The queues whose next owner waits for this member, and which it has stopped to own. It has
    /// if it was told to (it sends the epoch that did) and doesn't say that it still does.
    pub fn released(&self, id: &str, epoch: u64, owned: Option<&[QueueId]>) -> Vec<QueueId> {
        let moving = self.queues.iter();
        let moving = moving.filter(|(_, turn)| turn.owner == id && turn.target != id);
        let told = moving.filter(|(_, turn)| turn.told <= epoch);
        let stopped = told.filter(|(queue, _)| !owned.is_some_and(|owned| owned.contains(queue)));
        stopped.map(|(queue, _)| *queue).collect()
    }

    /// A member's word that it goes on, and what it owns. False: nothing changed.
    pub fn heartbeat(
        &mut self,
        id: &str,
        epoch: u64,
        owned: Option<&[QueueId]>,
    ) -> Result<bool, NotAMember> {
        self.check(id, epoch)?;
        let released = self.released(id, epoch, owned);
        if released.is_empty() {
            return Ok(false);
        }
        self.epoch += 1;
        for queue in released {
            if let Some(turn) = self.queues.get_mut(&queue) {
                turn.owner = turn.target.clone();
                turn.since = self.epoch;
                turn.told = self.epoch;
                if let Some(next) = self.members.get_mut(&turn.owner) {
                    next.epoch = self.epoch;
                }
            }
        }
        Ok(true)
    }

    /// Whether a member may commit in a queue: in the epoch it names it had the queue, and it has
    /// had it ever since.
    pub fn may_commit(&self, mark: &MemberMark, queue: QueueId) -> bool {
        let Ok(member) = self.check(&mark.id, mark.epoch) else {
            return false;
        };
        match self.delivery {
            Delivery::Broadcast => self.has_all_of(member).any(|q| q == queue),
            Delivery::Cluster => {
                let turn = self.queues.get(&queue);
                turn.is_some_and(|t| {
                    (t.owner == mark.id || mutation::on(Mutation::AnyMemberCommits))
                        && t.since <= mark.epoch
                })
            }
        }
    }

    /// The queues that a member is to consume.
    pub fn assignment(&self, id: &str) -> Vec<QueueId> {
        let Some(member) = self.members.get(id) else {
            return Vec::new();
        };
        match self.delivery {
            Delivery::Broadcast => self.has_all_of(member).collect(),
            Delivery::Cluster => {
                let own = self.queues.iter();
                let own = own.filter(|(_, turn)| turn.owner == id && turn.target == id);
                own.map(|(queue, _)| *queue).collect()
            }
        }
    }

    /// Every queue of a member's topics.
    fn has_all_of<'a>(&'a self, member: &'a Member) -> impl Iterator<Item = QueueId> + 'a {
        let found = member.topics.iter().filter_map(|name| {
            let (topic, queues) = self.topics.get(name)?.found?;
            Some((0..queues).map(move |queue| QueueId { topic, queue }))
        });
        found.flatten()
    }

    fn shapes_found(&self) -> Vec<Option<(TopicId, u32)>> {
        self.topics.values().map(|shape| shape.found).collect()
    }

    /// Whether any queue waits for its owner to stop.
    pub fn is_moving(&self) -> bool {
        self.queues.values().any(|turn| turn.owner != turn.target)
    }

    /// The queues of all topics together.
    fn width(&self) -> u64 {
        let found = self.topics.values().filter_map(|shape| shape.found);
        found.map(|(_, queues)| u64::from(queues)).sum()
    }

    /// Keeps the newest of what is known of each subscribed topic.
    fn learn(&mut self, shapes: &BTreeMap<String, TopicShape>) {
        let subscribed = self.members.values().flat_map(|m| &m.topics);
        let mut topics = BTreeMap::new();
        for name in subscribed {
            let known = self.topics.get(name).into_iter();
            let newest = known.chain(shapes.get(name)).max_by_key(|s| s.version);
            let newest = newest.copied().unwrap_or(TopicShape {
                version: 0,
                found: None,
            });
            topics.insert(name.clone(), newest);
        }
        self.topics = topics;
    }

    fn disown(&mut self, is_gone: impl Fn(&str) -> bool) {
        for turn in self.queues.values_mut().filter(|t| is_gone(&t.owner)) {
            turn.owner.clear();
        }
    }

    /// Shares the queues out anew after a change; `before` is what members have been told so far.
    fn settle(&mut self, before: &Self) {
        self.epoch += 1;
        let epoch = self.epoch;
        self.topics.retain(|name, _| {
            let mut topics = self.members.values().flat_map(|m| &m.topics);
            topics.any(|subscribed| subscribed == name)
        });
        let targets = match self.delivery {
            Delivery::Broadcast => BTreeMap::new(),
            Delivery::Cluster => self.targets(),
        };
        let mut queues = BTreeMap::new();
        for (queue, target) in targets {
            let old = self.queues.get(&queue).filter(|t| !t.owner.is_empty());
            let old = old.filter(|t| t.owner == target || !mutation::on(Mutation::HandOverAtOnce));
            let turn = match old {
                Some(old) => {
                    // Its owner is told whether it keeps the queue, not who is to have it else.
                    let is_news = (old.target == old.owner) != (target == old.owner);
                    Turn {
                        target,
                        told: if is_news { epoch } else { old.told },
                        ..old.clone()
                    }
                }
                None => Turn {
                    owner: target.clone(),
                    target,
                    since: epoch,
                    told: epoch,
                },
            };
            queues.insert(queue, turn);
        }
        self.queues = queues;
        let changed: Vec<String> = self
            .members
            .keys()
            .filter(|id| self.assignment(id) != before.assignment(id))
            .cloned()
            .collect();
        for id in changed {
            if let Some(member) = self.members.get_mut(&id) {
                member.epoch = epoch;
            }
        }
    }

    /// Who is to have which queue.
    fn targets(&self) -> BTreeMap<QueueId, String> {
        // Named instances first: their order outlives restarts.
        let mut members: Vec<(&String, &Member)> = self.members.iter().collect();
        members.sort_by_key(|(id, m)| (m.instance_id.is_none(), &m.instance_id, *id));
        let numbers: BTreeMap<&str, usize> = (0..)
            .zip(&members)
            .map(|(n, (id, _))| (id.as_str(), n))
            .collect();
        let mut found = Vec::new();
        let mut shares = Vec::new();
        for (name, shape) in &self.topics {
            let Some((topic, queues)) = shape.found else {
                continue;
            };
            let takes = |(n, (_, member)): (usize, &(&String, &Member))| {
                member.topics.contains(name).then_some(n)
            };
            let previous = |queue| {
                let turn = self.queues.get(&QueueId { topic, queue })?;
                let had = numbers.get(turn.target.as_str());
                had.or_else(|| numbers.get(turn.owner.as_str())).copied()
            };
            shares.push(TopicShare {
                subscribers: members.iter().enumerate().filter_map(takes).collect(),
                previous: (0..queues).map(previous).collect(),
            });
            found.push(topic);
        }
        let assigned = assign(self.strategy, members.len(), &shares);
        let mut targets = BTreeMap::new();
        for (topic, owners) in found.into_iter().zip(assigned) {
            for (queue, owner) in (0u32..).zip(owners) {
                if let Some((id, _)) = owner.and_then(|n| members.get(n)) {
                    targets.insert(QueueId { topic, queue }, (*id).clone());
                }
            }
        }
        targets
    }
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
