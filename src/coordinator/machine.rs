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
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::{LogId, StorageError};
use tokio::sync::Notify;
use xxhash_rust::xxh3::xxh3_64;

use super::command::{CommitVerdict, CoordinatorCommand, CoordinatorReply, QueueOffset};
use super::records::{
    Content, CoordinatorView, NamedProducer, PRODUCER_NUMBER_KEY, Records, offset_key,
    producer_id_key, producer_key,
};
use crate::names::MAX_NAME_CHARS;
use crate::soundness::Soundness;

/// A producer id is: coordinator number, one bit for "has a name", the coordinator's own count.
const COORDINATOR_SHIFT: u32 = 40;
const NAMED_BIT: i64 = 1 << 39;

/// The coordinator that gave a producer id.
pub fn owner_of_producer(id: i64) -> u32 {
    // 23 bits are left above the shift in a positive i64.
    (id >> COORDINATOR_SHIFT) as u32
}

/// Whether a producer can be registered again, and therefore be fenced.
pub fn is_named(id: i64) -> bool {
    id & NAMED_BIT != 0
}

/// One replica's state of one coordinator.
#[derive(Debug)]
pub struct CoordinatorMachine {
    number: u32,
    records: Records,
    soundness: Arc<Soundness>,
}

impl CoordinatorMachine {
    /// `repair` is told when the store fails.
    pub fn new(number: u32, store: DerivedGroup, repair: Arc<Notify>) -> Self {
        Self {
            number,
            records: Records::new(store),
            soundness: Arc::new(Soundness::new(repair)),
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
                let fenced = member.is_some() && !mutation::on(Mutation::NoMemberCheck);
                let each = offsets.iter();
                let verdicts = each.map(|offset| match fenced {
                    // There are no members to be one of, yet.
                    true => Ok(CommitVerdict::Fenced),
                    false => self.commit(&group, *offset, allow_rewind),
                });
                CoordinatorReply::Committed(verdicts.collect::<Result<_, _>>()?)
            }
            CoordinatorCommand::RegisterProducer { name: None } => CoordinatorReply::Producer {
                id: self.next_producer(false)?,
                epoch: 0,
                fence: Vec::new(),
            },
            CoordinatorCommand::RegisterProducer { name: Some(name) } => self.register(&name)?,
            CoordinatorCommand::AttachProducer {
                id,
                epoch,
                queue_group,
            } => self.attach(id, epoch, queue_group)?,
        })
    }

    fn commit(
        &mut self,
        group: &str,
        offset: QueueOffset,
        allow_rewind: bool,
    ) -> Result<CommitVerdict, StorageError> {
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

    fn next_producer(&mut self, named: bool) -> Result<i64, StorageError> {
        let last = self.records.get(PRODUCER_NUMBER_KEY)?;
        let last = last.and_then(|v| Some(i64::from_be_bytes(v.try_into().ok()?)));
        let number = last.unwrap_or(0) + 1;
        let value = number.to_be_bytes().to_vec();
        self.records.put(PRODUCER_NUMBER_KEY.to_vec(), value);
        let named = if named { NAMED_BIT } else { 0 };
        Ok(i64::from(self.number) << COORDINATOR_SHIFT | named | number)
    }

    fn register(&mut self, name: &str) -> Result<CoordinatorReply, StorageError> {
        let producer = match self.named(name)? {
            None => NamedProducer {
                id: self.next_producer(true)?,
                epoch: 0,
                queues: Default::default(),
            },
            Some(known) if known.epoch == i16::MAX => {
                return Ok(CoordinatorReply::Invalid(format!(
                    "producer {name:?} was registered {} times; choose another name",
                    i16::MAX
                )));
            }
            Some(known) => NamedProducer {
                epoch: known.epoch + 1,
                ..known
            },
        };
        let id_key = producer_id_key(producer.id);
        self.records.put(id_key, name.as_bytes().to_vec());
        self.store(name, &producer);
        Ok(CoordinatorReply::Producer {
            id: producer.id,
            epoch: producer.epoch,
            fence: producer.queues.into_iter().collect(),
        })
    }

    fn attach(
        &mut self,
        id: i64,
        epoch: i16,
        queue_group: u64,
    ) -> Result<CoordinatorReply, StorageError> {
        let name = self.records.get(&producer_id_key(id))?;
        let Some(name) = name.and_then(|n| String::from_utf8(n).ok()) else {
            return Ok(CoordinatorReply::UnknownProducer);
        };
        let Some(mut producer) = self.named(&name)? else {
            return Ok(CoordinatorReply::UnknownProducer);
        };
        if epoch < producer.epoch {
            return Ok(CoordinatorReply::Fenced {
                current: producer.epoch,
            });
        }
        if epoch > producer.epoch {
            return Ok(CoordinatorReply::UnknownProducer);
        }
        if producer.queues.insert(queue_group) {
            self.store(&name, &producer);
        }
        Ok(CoordinatorReply::Attached)
    }

    fn named(&self, name: &str) -> Result<Option<NamedProducer>, StorageError> {
        let stored = self.records.get(&producer_key(name))?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }

    fn store(&mut self, name: &str, producer: &NamedProducer) {
        let value = postcard::to_stdvec(producer).unwrap_or_default();
        self.records.put(producer_key(name), value);
    }

    fn load(&mut self, log_id: Option<LogId>, state: &[u8]) -> Result<(), StorageError> {
        let content: Content = postcard::from_bytes(state).map_err(|e| {
            let number = self.number;
            StorageError::InvalidArgument(format!("coordinator {number}'s state: {e}"))
        })?;
        self.records.replace(content, log_id)
    }

    fn try_apply(&mut self, log_id: LogId, body: &Bytes) -> Result<Bytes, StorageError> {
        if let Some(cause) = self.soundness.broken() {
            return Err(cause);
        }
        let reply = match postcard::from_bytes(body) {
            Ok(command) => self.execute(command)?,
            Err(error) => {
                tracing::error!(%log_id, %error, "a coordinator command that cannot be read");
                CoordinatorReply::Invalid("the command cannot be read".to_owned())
            }
        };
        self.records.commit(log_id)?;
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
