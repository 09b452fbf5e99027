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
        let key = group_mode_key(group);
        match self.records.read::<GroupMode>(&key)? {
            Some(known) => Ok((known != mode).then_some(known)),
            None => {
                self.records.store(key, &mode);
                Ok(None)
            }
        }
    }
}
