//! Deleting a consumer group: everything any part of the coordinator keeps of it.

use quorate_storage::StorageError;

use super::command::CoordinatorReply;
use super::machine::CoordinatorMachine;
use super::records::group_record_prefix;

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
}
