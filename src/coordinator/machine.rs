//! A coordinator's state machine. Fencing and rewinding are judged here, in apply, and nowhere else.
//!
//! Its records are in the derived store, each command's changes together with the command's place in
//! the log. At a restart what is stored is used if it is the very state of the checkpoint, and else
//! replaced by it: commands must not be executed twice. When the store fails, the replica is broken
//! until whoever watches its [`Soundness`] has reset the store and opened the replica again.

use std::sync::Arc;

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::derived::DerivedGroup;
use quorate_storage::{LogId, StorageError};
use tokio::sync::Notify;
use xxhash_rust::xxh3::xxh3_64;

use super::command::{CoordinatorCommand, CoordinatorReply, GroupMode, unstamp};
use super::leases::News;
use super::records::{Content, CoordinatorView, Records, TIME_KEY};
use crate::names::MAX_NAME_CHARS;
use crate::soundness::Soundness;

/// One replica's state of one coordinator.
#[derive(Debug)]
pub struct CoordinatorMachine {
    pub(super) number: u32,
    pub(super) records: Records,
    /// What the command being applied has to tell.
    pub(super) news: News,
    soundness: Arc<Soundness>,
    /// By the command that is being applied, maybe.
    transactions_changed: bool,
    /// The place in the log of the command that is being applied: no other one has it.
    pub(super) log_index: u64,
}

impl CoordinatorMachine {
    /// `repair` is told when the store fails.
    pub fn new(number: u32, store: DerivedGroup, repair: Arc<Notify>) -> Self {
        Self {
            number,
            records: Records::new(store),
            news: News::default(),
            soundness: Arc::new(Soundness::new(repair)),
            transactions_changed: false,
            log_index: 0,
        }
    }

    /// Whether the store can be used.
    pub fn soundness(&self) -> Arc<Soundness> {
        self.soundness.clone()
    }

    /// The applied state, for readers.
    pub fn view(&self) -> CoordinatorView {
        self.records.view()
    }

    fn execute(&mut self, command: CoordinatorCommand) -> Result<CoordinatorReply, StorageError> {
        Ok(match command {
            CoordinatorCommand::Commit { group, .. } if group.len() > MAX_NAME_CHARS => {
                CoordinatorReply::Invalid("the consumer group's name is too long".to_owned())
            }
            CoordinatorCommand::Commit {
                group,
                offsets,
                allow_rewind,
                member,
            } => {
                if let Some(other) = self.claim_mode(&group, GroupMode::Offsets)? {
                    return Ok(CoordinatorReply::OtherMode(other));
                }
                let verdicts = self.commit_all(&group, &offsets, allow_rewind, member.as_ref())?;
                CoordinatorReply::Committed(verdicts)
            }
            CoordinatorCommand::RegisterProducer { name: None } => CoordinatorReply::Producer {
                id: self.next_producer(false)?,
                epoch: 0,
                retired: None,
                fence: Vec::new(),
            },
            CoordinatorCommand::RegisterProducer { name: Some(name) } => self.register(&name)?,
            CoordinatorCommand::AttachProducer {
                id,
                epoch,
                queue_group,
            } => self.attach(id, epoch, queue_group)?,
            CoordinatorCommand::Leases { group, command } => self.leases(&group, command)?,
            CoordinatorCommand::Transaction(command) => {
                self.transactions_changed = true;
                CoordinatorReply::Transaction(self.transact(command)?)
            }
            CoordinatorCommand::Join {
                group,
                newcomer,
                topics,
            } => self.join(&group, newcomer, &topics)?,
            CoordinatorCommand::Heartbeat {
                group,
                member,
                epoch,
                owned,
            } => self.heartbeat(&group, &member, epoch, owned.as_deref())?,
            CoordinatorCommand::RemoveMembers { group, members } => {
                self.change_members(&group, |membership| membership.remove(&members))?
            }
            CoordinatorCommand::SeeTopics { group, topics } => self.see_topics(&group, &topics)?,
            CoordinatorCommand::Reset {
                group,
                offsets,
                force,
            } => self.reset(&group, &offsets, force)?,
            CoordinatorCommand::Begin {
                group,
                instance,
                offsets,
            } => self.begin(&group, instance.as_deref(), &offsets)?,
            CoordinatorCommand::DeleteGroup { group } => self.delete_group(&group)?,
            CoordinatorCommand::ForgetTopics { group, topics } => {
                self.forget_topics(&group, &topics)?
            }
        })
    }

    /// The log's time: the largest stamp so far. Decisions that depend on time depend on this one.
    pub(super) fn now_ms(&self) -> Result<u64, StorageError> {
        let known = self.records.get(TIME_KEY)?;
        let known = known.and_then(|v| Some(u64::from_be_bytes(v.try_into().ok()?)));
        Ok(known.unwrap_or(0))
    }

    fn advance_time(&mut self, stamp_ms: u64) -> Result<(), StorageError> {
        if stamp_ms > self.now_ms()? {
            let value = stamp_ms.to_be_bytes().to_vec();
            self.records.put(TIME_KEY.to_vec(), value);
        }
        Ok(())
    }

    fn load(&mut self, log_id: Option<LogId>, state: &[u8]) -> Result<(), StorageError> {
        let content: Content = postcard::from_bytes(state).map_err(|e| {
            let number = self.number;
            StorageError::InvalidArgument(format!("coordinator {number}'s state: {e}"))
        })?;
        self.records.replace(content, log_id)?;
        self.records.tell_transactions();
        Ok(())
    }

    fn try_apply(&mut self, log_id: LogId, body: &Bytes) -> Result<Bytes, StorageError> {
        if let Some(cause) = self.soundness.broken() {
            return Err(cause);
        }
        self.log_index = log_id.index;
        let reply = match unstamp(body) {
            Some((stamp_ms, command)) => {
                self.advance_time(stamp_ms)?;
                self.execute(command)?
            }
            None => {
                tracing::error!(%log_id, "a coordinator command that cannot be read");
                CoordinatorReply::Invalid("the command cannot be read".to_owned())
            }
        };
        self.records.commit(log_id)?;
        if std::mem::take(&mut self.transactions_changed) {
            self.records.tell_transactions();
        }
        self.news.publish(&self.records.signals);
        Ok(postcard::to_stdvec(&reply).unwrap_or_default().into())
    }
}

impl StateMachine for CoordinatorMachine {
    /// An empty reply: the command could not be executed here.
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes {
        self.try_apply(log_id, body).unwrap_or_else(|cause| {
            self.soundness.set_broken(cause);
            Bytes::new()
        })
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        match self.soundness.broken() {
            Some(cause) => Err(cause),
            None => self.records.encode(),
        }
    }

    fn restore(&mut self, last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        if self.records.is_at(last)? {
            return Ok(());
        }
        match state {
            Some(state) => self.load(last, state),
            None => self.records.replace(Content::new(), None),
        }
    }

    fn install(&mut self, last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.load(Some(last), state)
    }

    fn state_hash(&self) -> u64 {
        self.records.encode().map_or(0, |content| xxh3_64(&content))
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
