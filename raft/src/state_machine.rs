//! What stands above a Raft group.

use bytes::Bytes;
use quorate_storage::{LogId, StorageError};

/// The state of one replica. Called on the group's own task, in log order, never concurrently.
///
/// `apply` must be deterministic: the same commands give the same state, the same replies and the
/// same [`StateMachine::state_hash`] on every replica, so it reads no clock and no random source.
pub trait StateMachine: Send + Sync + 'static {
    /// Applies one committed command; the reply goes to whoever proposed it on this node.
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes;

    /// Says of a command, by its bytes alone, whether a majority has to fsync it before it counts, also
    /// in a group with [`Flush::Async`](quorate_storage::commit_log::Flush::Async).
    fn must_be_synced(&self) -> fn(&Bytes) -> bool {
        |_| false
    }

    /// Called after a run of applies, with the last index applied (commands or not): wake whoever
    /// waits for new state.
    fn applied_batch(&mut self, _applied: LogId) {}

    /// Asked after each entry: whether a checkpoint is to be taken here, beside the regular ones. Part
    /// of the state, as deterministic as it.
    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    /// The lowest log index whose entry may still be read, of a group that keeps its messages in the
    /// log; `u64::MAX` when none of the applied ones is. It never goes back.
    fn oldest_needed(&mut self) -> Result<u64, StorageError> {
        Ok(0)
    }

    /// The state after the last applied entry. Whatever the state machine keeps in files of its
    /// own must be durable up to here when this returns.
    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError>;

    /// The last checkpoint is on the disk, as the state of `last`.
    fn checkpoint_written(&mut self, _last: LogId) {}

    /// Whether [`StateMachine::install`] could begin with this checkpoint. One that leaves out what is
    /// too much to write each time is good for a restart alone.
    fn is_whole(&self, _state: &[u8]) -> bool {
        true
    }

    /// Local restart: back to the state of this checkpoint, or to the empty state. What lies
    /// between it and the end of the log is applied again.
    ///
    /// # Errors
    /// [`StorageError::Damaged`] when the state machine's own files cannot back this checkpoint;
    /// an older one is tried then, and in the end `install` of the oldest or the empty state.
    fn restore(&mut self, last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError>;

    /// Becomes what another replica was at `last`; everything older is gone here.
    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError>;

    /// Equal on two replicas that have applied the same entries.
    fn state_hash(&self) -> u64;
}
