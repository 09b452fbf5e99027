//! Commands about a consumer group's members, and what is refused before anything changes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use quorate_storage::StorageError;

use super::command::{CoordinatorReply, GroupMode};
use super::machine::CoordinatorMachine;
use super::membership::{JoinRefused, MAX_GROUP_QUEUES, Membership, Newcomer, QueueId, TopicShape};
use super::records::membership_key;
use crate::broker::MAX_FILTER_BYTES;
use crate::names::MAX_NAME_CHARS;

/// Topics one member may subscribe to.
pub const MAX_TOPICS: usize = 100;
/// Of all tags that a member wants, as it writes them.
pub const MAX_TAG_BYTES: usize = 8 << 10;
/// How long a member may be silent.
pub const SESSION_MS: RangeInclusive<u64> = 1_000..=300_000;
/// Queues of one topic that are shared out; more than any topic may have.
const MAX_QUEUES: u32 = 10_000;

impl CoordinatorMachine {
    /// A group's members; of one that never had any, none.
    pub(super) fn membership(&self, group: &str) -> Result<Membership, StorageError> {
        let known = self.records.read(&membership_key(group))?;
        Ok(known.unwrap_or_default())
    }

    pub(super) fn join(
        &mut self,
        group: &str,
        newcomer: Newcomer,
        topics: &BTreeMap<String, TopicShape>,
    ) -> Result<CoordinatorReply, StorageError> {
        if let Some(reason) = unfit(group, &newcomer, topics) {
            return Ok(CoordinatorReply::Invalid(reason));
        }
        if let Some(other) = self.claim_mode(group, GroupMode::Offsets)? {
            return Ok(CoordinatorReply::OtherMode(other));
        }
        let mut membership = self.membership(group)?;
        Ok(match membership.join(newcomer, topics) {
            Ok(id) => {
                self.records.store(membership_key(group), &membership);
                CoordinatorReply::Joined(id)
            }
            Err(JoinRefused::TooManyQueues) => CoordinatorReply::Invalid(format!(
                "the group's topics would have more than {MAX_GROUP_QUEUES} queues; subscribe to fewer topics in one group"
            )),
            Err(JoinRefused::Full) => CoordinatorReply::GroupFull,
            Err(JoinRefused::Delivery(other)) => CoordinatorReply::OtherDelivery(other),
        })
    }

    pub(super) fn heartbeat(
        &mut self,
        group: &str,
        member: &str,
        epoch: u64,
        owned: Option<&[QueueId]>,
    ) -> Result<CoordinatorReply, StorageError> {
        let mut membership = self.membership(group)?;
        Ok(match membership.heartbeat(member, epoch, owned) {
            Ok(changed) => {
                if changed {
                    self.records.store(membership_key(group), &membership);
                }
                CoordinatorReply::MembersChanged
            }
            Err(why) => CoordinatorReply::NotAMember(why),
        })
    }

    pub(super) fn see_topics(
        &mut self,
        group: &str,
        topics: &BTreeMap<String, TopicShape>,
    ) -> Result<CoordinatorReply, StorageError> {
        match topics.values().any(is_too_wide) {
            true => Ok(CoordinatorReply::Invalid("too many queues".to_owned())),
            false => self.change_members(group, |membership| membership.see_topics(topics)),
        }
    }

    pub(super) fn change_members(
        &mut self,
        group: &str,
        change: impl FnOnce(&mut Membership) -> bool,
    ) -> Result<CoordinatorReply, StorageError> {
        let key = membership_key(group);
        if let Some(mut membership) = self.records.read::<Membership>(&key)?
            && change(&mut membership)
        {
            self.records.store(key, &membership);
        }
        Ok(CoordinatorReply::MembersChanged)
    }
}

fn is_too_wide(shape: &TopicShape) -> bool {
    shape.found.is_some_and(|(_, queues)| queues > MAX_QUEUES)
}

/// Why this can't be a member; whoever proposes has checked it with better words.
fn unfit(
    group: &str,
    newcomer: &Newcomer,
    topics: &BTreeMap<String, TopicShape>,
) -> Option<String> {
    let long = |text: &str| text.len() > MAX_NAME_CHARS;
    let instance = newcomer.instance_id.as_deref().unwrap_or_default();
    let names = [group, newcomer.id.as_str(), instance];
    let mut names = names.into_iter().chain(topics.keys().map(String::as_str));
    if names.any(long) || newcomer.topics.iter().any(|topic| long(topic)) {
        return Some("a name is too long".to_owned());
    }
    if newcomer.id.is_empty() || !newcomer.topics.is_sorted_by(|a, b| a < b) {
        return Some("the member has no id, or topics in no order".to_owned());
    }
    if newcomer.topics.len() > MAX_TOPICS || topics.values().any(is_too_wide) {
        return Some("too many topics or queues".to_owned());
    }
    let wider = |text: &Option<String>, most| text.as_ref().is_some_and(|t| t.len() > most);
    if wider(&newcomer.tag, MAX_TAG_BYTES) || wider(&newcomer.filter, MAX_FILTER_BYTES) {
        return Some("the tag or the filter is too long".to_owned());
    }
    if !SESSION_MS.contains(&newcomer.session_timeout_ms) {
        return Some("the session timeout is out of its bounds".to_owned());
    }
    None
}
