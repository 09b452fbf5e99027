//! Producers: their ids, and the epochs of those that have a name.

use quorate_storage::StorageError;

use super::command::CoordinatorReply;
use super::machine::CoordinatorMachine;
use super::records::{NamedProducer, PRODUCER_NUMBER_KEY, producer_id_key, producer_key};

/// A producer id is: coordinator number, one bit for "has a name", the coordinator's own count.
const COORDINATOR_SHIFT: u32 = 40;
/// The last epoch that is given out; the one above it refuses them all.
const LAST_EPOCH: i16 = i16::MAX - 1;
pub(super) const NAMED_BIT: i64 = 1 << 39;

/// The coordinator that gave a producer id.
pub fn owner_of_producer(id: i64) -> u32 {
    // 23 bits are left above the shift in a positive i64.
    (id >> COORDINATOR_SHIFT) as u32
}

/// Whether a producer can be registered again, and therefore be fenced.
pub fn is_named(id: i64) -> bool {
    id & NAMED_BIT != 0
}

impl CoordinatorMachine {
    pub(super) fn next_producer(&mut self, named: bool) -> Result<i64, StorageError> {
        let last = self.records.get(PRODUCER_NUMBER_KEY)?;
        let last = last.and_then(|v| Some(i64::from_be_bytes(v.try_into().ok()?)));
        let number = last.unwrap_or(0) + 1;
        let value = number.to_be_bytes().to_vec();
        self.records.put(PRODUCER_NUMBER_KEY.to_vec(), value);
        let named = if named { NAMED_BIT } else { 0 };
        Ok(i64::from(self.number) << COORDINATOR_SHIFT | named | number)
    }

    pub(super) fn register(&mut self, name: &str) -> Result<CoordinatorReply, StorageError> {
        let producer = match self.named(name)? {
            None => NamedProducer {
                id: self.next_producer(true)?,
                epoch: 0,
                retired: None,
                queues: Default::default(),
            },
            // Its epochs are used up. It goes on under another id, and the old one is refused for
            // ever: here, and in every queue it wrote to.
            Some(known) if known.epoch >= LAST_EPOCH => NamedProducer {
                id: self.next_producer(true)?,
                epoch: 0,
                retired: Some(known.id),
                queues: known.queues,
            },
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
            retired: producer.retired,
            fence: producer.queues.into_iter().collect(),
        })
    }

    pub(super) fn attach(
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
        if id != producer.id {
            return Ok(CoordinatorReply::Fenced { current: i16::MAX });
        }
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
        self.records.read(&producer_key(name))
    }

    fn store(&mut self, name: &str, producer: &NamedProducer) {
        self.records.store(producer_key(name), producer);
    }
}
