//! A consumer group commits offsets or leases messages: one of the two, from its first use on.

use quorate_storage::StorageError;

use super::command::GroupMode;
use super::machine::CoordinatorMachine;
use super::records::group_mode_key;

impl CoordinatorMachine {
    /// Settles how the group works if nothing has yet. The other way if it is settled so.
    pub(super) fn claim_mode(
        &mut self,
        group: &str,
        mode: GroupMode,
    ) -> Result<Option<GroupMode>, StorageError> {
        match self.mode_of(group)? {
            Some(known) => Ok((known != mode).then_some(known)),
            None => {
                self.records.store(group_mode_key(group), &mode);
                Ok(None)
            }
        }
    }

    /// How the group works, once that is settled.
    pub(super) fn mode_of(&self, group: &str) -> Result<Option<GroupMode>, StorageError> {
        self.records.read(&group_mode_key(group))
    }
}
