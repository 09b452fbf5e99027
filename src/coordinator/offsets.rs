//! Committed offsets: judged here, in apply.

use quorate_storage::StorageError;

use super::command::{CommitVerdict, QueueOffset};
use super::machine::CoordinatorMachine;
use super::records::offset_key;

impl CoordinatorMachine {
    pub(super) fn commit(
        &mut self,
        group: &str,
        offset: QueueOffset,
        allow_rewind: bool,
    ) -> Result<CommitVerdict, StorageError> {
        if self.holder_of(group, offset.topic, offset.queue)?.is_some() {
            return Ok(CommitVerdict::Held);
        }
        let key = offset_key(group, offset.topic, offset.queue);
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
