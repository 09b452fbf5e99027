//! Committed offsets: judged here, in apply.

use quorate_storage::StorageError;
use quorate_storage::mutation::{self, Mutation};

use super::command::{CommitVerdict, CoordinatorReply, GroupMode, QueueOffset};
use super::machine::CoordinatorMachine;
use super::membership::{Delivery, Membership, QueueId};
use super::records::{instance_offset_key, offset_key};
use crate::broker::MemberMark;

/// Whose offsets they are.
enum Account<'a> {
    Group,
    /// Of a broadcast group.
    Instance(&'a str),
}

impl CoordinatorMachine {
    /// Commits offsets, each for itself. While the group has members, only for the member that has
    /// the queue.
    pub(super) fn commit_all(
        &mut self,
        group: &str,
        offsets: &[QueueOffset],
        allow_rewind: bool,
        member: Option<&MemberMark>,
    ) -> Result<Vec<CommitVerdict>, StorageError> {
        let membership = self.membership(group)?;
        let account = account_of(&membership, member);
        let mut verdicts = Vec::with_capacity(offsets.len());
        for offset in offsets {
            verdicts.push(match may_commit(&membership, member, *offset) {
                true => self.commit(group, &account, *offset, allow_rewind)?,
                false => CommitVerdict::Fenced,
            });
        }
        Ok(verdicts)
    }

    /// Sets offsets wherever they were: all of them, or none while a transaction holds one.
    pub(super) fn reset(
        &mut self,
        group: &str,
        offsets: &[QueueOffset],
        force: bool,
    ) -> Result<CoordinatorReply, StorageError> {
        if let Some(other) = self.claim_mode(group, GroupMode::Offsets)? {
            return Ok(CoordinatorReply::OtherMode(other));
        }
        let members = self.membership(group)?.members.len();
        if members > 0 && !force {
            return Ok(CoordinatorReply::GroupHasMembers(members as u64));
        }
        let mut verdicts = Vec::with_capacity(offsets.len());
        for offset in offsets {
            let held = self.hold_on(group, offset.topic, offset.queue)?.is_some();
            verdicts.push(match held {
                true => CommitVerdict::Held,
                false => CommitVerdict::Done,
            });
        }
        if verdicts.contains(&CommitVerdict::Held) {
            return Ok(CoordinatorReply::Committed(verdicts));
        }
        let each = offsets.iter();
        let verdicts = each.map(|offset| self.commit(group, &Account::Group, *offset, true));
        Ok(CoordinatorReply::Committed(
            verdicts.collect::<Result<_, _>>()?,
        ))
    }

    /// Commits where nothing is committed yet: so that a start at "latest" is the same for whoever
    /// gets the queue next. What a transaction holds it alone commits: nothing is stored there, and
    /// the start is not behind the hold's end, so whichever way it ends no message is left out.
    pub(super) fn begin(
        &mut self,
        group: &str,
        instance: Option<&str>,
        offsets: &[QueueOffset],
    ) -> Result<CoordinatorReply, StorageError> {
        if self.membership(group)?.members.is_empty() {
            return Ok(CoordinatorReply::UnknownGroup);
        }
        let account = instance.map_or(Account::Group, Account::Instance);
        let mut begun = Vec::with_capacity(offsets.len());
        for offset in offsets {
            let key = account.key(group, *offset);
            let known = self.records.get(&key)?;
            let known = known.and_then(|v| Some(u64::from_be_bytes(v.try_into().ok()?)));
            let hold = match account {
                Account::Group => self.hold_on(group, offset.topic, offset.queue)?,
                Account::Instance(_) => None,
            };
            begun.push(match (known, hold) {
                (Some(committed), _) => committed,
                (None, Some(hold)) => offset.offset.min(hold.offset),
                (None, None) => {
                    self.records.put(key, offset.offset.to_be_bytes().to_vec());
                    offset.offset
                }
            });
        }
        Ok(CoordinatorReply::Begun(begun))
    }

    fn commit(
        &mut self,
        group: &str,
        account: &Account<'_>,
        offset: QueueOffset,
        allow_rewind: bool,
    ) -> Result<CommitVerdict, StorageError> {
        let held = self.hold_on(group, offset.topic, offset.queue)?.is_some();
        if held && matches!(account, Account::Group) {
            return Ok(CommitVerdict::Held);
        }
        let key = account.key(group, offset);
        let known = self.records.get(&key)?;
        let known = known.and_then(|v| Some(u64::from_be_bytes(v.try_into().ok()?)));
        if let Some(committed) = known
            && offset.offset < committed
            && !allow_rewind
        {
            return Ok(CommitVerdict::Conflict { committed });
        }
        if known != Some(offset.offset) {
            self.records.put(key, offset.offset.to_be_bytes().to_vec());
        }
        Ok(CommitVerdict::Done)
    }
}

impl Account<'_> {
    fn key(&self, group: &str, offset: QueueOffset) -> Vec<u8> {
        match self {
            Self::Group => offset_key(group, offset.topic, offset.queue),
            Self::Instance(name) => instance_offset_key(group, name, offset.topic, offset.queue),
        }
    }
}

fn account_of<'a>(membership: &'a Membership, member: Option<&MemberMark>) -> Account<'a> {
    let member = member.and_then(|mark| membership.members.get(&mark.id));
    let instance = member.and_then(|member| member.instance_id.as_deref());
    match (membership.delivery, instance) {
        (Delivery::Broadcast, Some(instance)) => Account::Instance(instance),
        _ => Account::Group,
    }
}

/// Whether this commit is the group's own: of the member that has the queue, or of nobody in a group
/// without members.
pub(super) fn may_commit(
    membership: &Membership,
    member: Option<&MemberMark>,
    offset: QueueOffset,
) -> bool {
    if mutation::on(Mutation::NoMemberCheck) {
        return true;
    }
    let queue = QueueId {
        topic: offset.topic,
        queue: offset.queue,
    };
    match member {
        Some(mark) => membership.may_commit(mark, queue),
        None => membership.members.is_empty(),
    }
}
