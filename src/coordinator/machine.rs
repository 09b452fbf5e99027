//! A coordinator's state machine. Fencing and rewinding are judged here, in apply, and nowhere else.

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::{LogId, StorageError};
use xxhash_rust::xxh3::xxh3_64;

use super::command::{CommitVerdict, CoordinatorCommand, CoordinatorReply, QueueOffset};
use super::records::{
    Content, CoordinatorView, NamedProducer, PRODUCER_NUMBER_KEY, Records, offset_key,
    producer_id_key, producer_key,
};
use crate::names::MAX_NAME_CHARS;

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
}

impl CoordinatorMachine {
    pub fn new(number: u32) -> Self {
        Self {
            number,
            records: Records::default(),
        }
    }

    /// The applied state, for readers.
    pub fn view(&self) -> CoordinatorView {
        self.records.view()
    }

    fn execute(&mut self, command: CoordinatorCommand) -> CoordinatorReply {
        match command {
            CoordinatorCommand::Commit { group, .. } if group.len() > MAX_NAME_CHARS => {
                CoordinatorReply::Invalid("the consumer group's name is too long".to_owned())
            }
            CoordinatorCommand::Commit {
                group,
                offsets,
                allow_rewind,
                member,
            } => {
                let fenced = member.is_some();
                let each = offsets.iter();
                let verdicts = each.map(|offset| match fenced {
                    // There are no members to be one of, yet.
                    true => CommitVerdict::Fenced,
                    false => self.commit(&group, *offset, allow_rewind),
                });
                CoordinatorReply::Committed(verdicts.collect())
            }
            CoordinatorCommand::RegisterProducer { name: None } => CoordinatorReply::Producer {
                id: self.next_producer(false),
                epoch: 0,
                fence: Vec::new(),
            },
            CoordinatorCommand::RegisterProducer { name: Some(name) } => self.register(&name),
            CoordinatorCommand::AttachProducer {
                id,
                epoch,
                queue_group,
            } => self.attach(id, epoch, queue_group),
        }
    }

    fn commit(&self, group: &str, offset: QueueOffset, allow_rewind: bool) -> CommitVerdict {
        let key = offset_key(group, offset.topic, offset.queue);
        let known = self.records.get(&key);
        let known = known.and_then(|v| Some(u64::from_be_bytes(v.try_into().ok()?)));
        if let Some(committed) = known
            && offset.offset < committed
            && !allow_rewind
        {
            return CommitVerdict::Conflict { committed };
        }
        if known != Some(offset.offset) {
            self.records.put(key, offset.offset.to_be_bytes().to_vec());
        }
        CommitVerdict::Done
    }

    fn next_producer(&self, named: bool) -> i64 {
        let last = self.records.get(PRODUCER_NUMBER_KEY);
        let last = last.and_then(|v| Some(i64::from_be_bytes(v.try_into().ok()?)));
        let number = last.unwrap_or(0) + 1;
        let value = number.to_be_bytes().to_vec();
        self.records.put(PRODUCER_NUMBER_KEY.to_vec(), value);
        let named = if named { NAMED_BIT } else { 0 };
        i64::from(self.number) << COORDINATOR_SHIFT | named | number
    }

    fn register(&self, name: &str) -> CoordinatorReply {
        let producer = match self.named(name) {
            None => NamedProducer {
                id: self.next_producer(true),
                epoch: 0,
                queues: Default::default(),
            },
            Some(known) if known.epoch == i16::MAX => {
                return CoordinatorReply::Invalid(format!(
                    "producer {name:?} was registered {} times; choose another name",
                    i16::MAX
                ));
            }
            Some(known) => NamedProducer {
                epoch: known.epoch + 1,
                ..known
            },
        };
        let id_key = producer_id_key(producer.id);
        self.records.put(id_key, name.as_bytes().to_vec());
        self.store(name, &producer);
        CoordinatorReply::Producer {
            id: producer.id,
            epoch: producer.epoch,
            fence: producer.queues.into_iter().collect(),
        }
    }

    fn attach(&self, id: i64, epoch: i16, queue_group: u64) -> CoordinatorReply {
        let name = self.records.get(&producer_id_key(id));
        let name = name.and_then(|n| String::from_utf8(n).ok());
        let Some((name, mut producer)) = name.and_then(|n| Some((n.clone(), self.named(&n)?)))
        else {
            return CoordinatorReply::UnknownProducer;
        };
        if epoch < producer.epoch {
            return CoordinatorReply::Fenced {
                current: producer.epoch,
            };
        }
        if epoch > producer.epoch {
            return CoordinatorReply::UnknownProducer;
        }
        if producer.queues.insert(queue_group) {
            self.store(&name, &producer);
        }
        CoordinatorReply::Attached
    }

    fn named(&self, name: &str) -> Option<NamedProducer> {
        postcard::from_bytes(&self.records.get(&producer_key(name))?).ok()
    }

    fn store(&self, name: &str, producer: &NamedProducer) {
        let value = postcard::to_stdvec(producer).unwrap_or_default();
        self.records.put(producer_key(name), value);
    }

    fn load(&self, state: &[u8]) -> Result<(), StorageError> {
        let content: Content = postcard::from_bytes(state).map_err(|e| {
            let number = self.number;
            StorageError::InvalidArgument(format!("coordinator {number}'s state: {e}"))
        })?;
        self.records.replace(content);
        Ok(())
    }
}

impl StateMachine for CoordinatorMachine {
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes {
        let reply = match postcard::from_bytes(body) {
            Ok(command) => self.execute(command),
            Err(error) => {
                tracing::error!(%log_id, %error, "a coordinator command that cannot be read");
                CoordinatorReply::Invalid("the command cannot be read".to_owned())
            }
        };
        postcard::to_stdvec(&reply).unwrap_or_default().into()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        Ok(self.records.encode())
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        match state {
            Some(state) => self.load(state),
            None => {
                self.records.replace(Content::new());
                Ok(())
            }
        }
    }

    fn install(&mut self, _last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.load(state)
    }

    fn state_hash(&self) -> u64 {
        xxh3_64(&self.records.encode())
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
