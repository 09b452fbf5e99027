//! Deleting a consumer group, everything any part of the coordinator keeps of it, and forgetting what
//! it has committed in topics that are no more.

use std::collections::BTreeSet;

use quorate_storage::StorageError;

use super::command::{CoordinatorReply, GroupMode};
use super::machine::CoordinatorMachine;
use super::records::{COMMITTED_KINDS, committed_in, group_record_prefix};
use crate::catalog::TopicId;

/// Kinds of records that belong to a consumer group, each with a key of kind, group, and the rest,
/// beside the queues that it leases from. How the group works comes last: as long as anything else is
/// left, the group is known.
const KINDS: &[u8] = b"oMxrmg";
/// Records after which one command leaves the rest to the next: the log goes on between two, and the
/// next may never come. What is left by then must work.
const AT_ONCE: usize = 1_000;

impl CoordinatorMachine {
    pub(super) fn delete_group(&mut self, group: &str) -> Result<CoordinatorReply, StorageError> {
        let members = self.membership(group)?.members.len();
        if members > 0 {
            return Ok(CoordinatorReply::GroupHasMembers(members as u64));
        }
        let mut left = AT_ONCE - self.let_go_of_offsets(group, AT_ONCE)?;
        left = left.saturating_sub(self.forget_leased_queues(group, left)?);
        if left == 0 {
            return Ok(CoordinatorReply::GroupDeleted { more: true });
        }
        for kind in KINDS {
            let prefix = group_record_prefix(*kind, group);
            let found = self.records.scan(&prefix, None, left)?;
            left -= found.len();
            for (key, _) in found {
                self.records.remove(key);
            }
            if left == 0 {
                return Ok(CoordinatorReply::GroupDeleted { more: true });
            }
        }
        Ok(match left {
            AT_ONCE => CoordinatorReply::UnknownGroup,
            _ => CoordinatorReply::GroupDeleted { more: false },
        })
    }

    /// What a group leases from has its offset together with its deliveries, and goes with them.
    pub(super) fn forget_topics(
        &mut self,
        group: &str,
        topics: &BTreeSet<TopicId>,
    ) -> Result<CoordinatorReply, StorageError> {
        if let Some(other @ GroupMode::Leases) = self.mode_of(group)? {
            return Ok(CoordinatorReply::OtherMode(other));
        }
        for kind in COMMITTED_KINDS {
            let prefix = group_record_prefix(*kind, group);
            for (key, _) in self.records.scan(&prefix, None, usize::MAX)? {
                if committed_in(&key).is_some_and(|(_, topic)| topics.contains(&topic)) {
                    self.records.remove(key);
                }
            }
        }
        Ok(CoordinatorReply::TopicsForgotten)
    }
}
