//! A coordinator's state: records in the node's derived store, read by the broker beside apply.
//!
//! | key | value |
//! |---|---|
//! | `o`, consumer group, topic u64, queue u32 | committed offset u64 |
//! | `p`, name | id, epoch and queues of a named producer |
//! | `i`, producer id i64 | its name |
//! | `n` | the last producer number given |
//!
//! Keys are made of the store's ordered fields, numbers in values are big-endian.

use std::collections::BTreeMap;

use quorate_storage::derived::{DerivedGroup, KeyBuilder, KeyReader};
use quorate_storage::{LogId, StorageError};
use serde::{Deserialize, Serialize};

use super::QueueOffset;

pub(super) type Content = BTreeMap<Vec<u8>, Vec<u8>>;

/// A named producer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamedProducer {
    pub id: i64,
    pub epoch: i16,
    /// Groups of the queues it has announced to write to, ever.
    pub queues: std::collections::BTreeSet<u64>,
}

/// The records, and what the command being applied changes of them.
#[derive(Debug)]
pub(super) struct Records {
    stored: DerivedGroup,
    changes: Content,
}

impl Records {
    pub(super) fn new(stored: DerivedGroup) -> Self {
        Self {
            stored,
            changes: Content::new(),
        }
    }

    pub(super) fn view(&self) -> CoordinatorView {
        CoordinatorView {
            records: self.stored.clone(),
        }
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        if let Some(value) = self.changes.get(key) {
            return Ok(Some(value.clone()));
        }
        Ok(self.stored.get(key)?.map(|value| value.to_vec()))
    }

    pub(super) fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changes.insert(key, value);
    }

    /// Stores what the command of `log_id` changed, together with its place in the log.
    pub(super) fn commit(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let changes = std::mem::take(&mut self.changes);
        let writes = changes.into_iter().map(|(key, value)| (key, Some(value)));
        self.stored.write(writes.collect(), log_id)
    }

    /// Whether what is stored is the state of `log_id`.
    pub(super) fn is_at(&self, log_id: Option<LogId>) -> Result<bool, StorageError> {
        Ok(self.stored.applied()? == log_id)
    }

    pub(super) fn replace(
        &mut self,
        content: Content,
        log_id: Option<LogId>,
    ) -> Result<(), StorageError> {
        self.stored.clear()?;
        self.changes = content;
        log_id.map_or(Ok(()), |log_id| self.commit(log_id))
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StorageError> {
        let all = self.stored.scan(b"")?.into_iter();
        let content: Content = all.map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
        // A map of bytes into memory: there is no way to fail.
        Ok(postcard::to_stdvec(&content).unwrap_or_default())
    }
}

/// What the broker reads of a coordinator's applied state.
#[derive(Debug, Clone)]
pub struct CoordinatorView {
    records: DerivedGroup,
}

impl CoordinatorView {
    /// All that a consumer group has committed, in order of topic and queue.
    pub fn offsets(&self, group: &str) -> Result<Vec<QueueOffset>, StorageError> {
        let prefix = group_prefix(group).build();
        let found = self.records.scan(&prefix)?.into_iter();
        let offsets = found.filter_map(|(key, value)| {
            let mut fields = KeyReader::new(&key[prefix.len()..]);
            Some(QueueOffset {
                topic: fields.u64()?,
                queue: fields.u32()?,
                offset: u64::from_be_bytes(value[..].try_into().ok()?),
            })
        });
        Ok(offsets.collect())
    }
}

fn group_prefix(group: &str) -> KeyBuilder {
    KeyBuilder::new().u8(b'o').text(group)
}

pub(super) fn offset_key(group: &str, topic: u64, queue: u32) -> Vec<u8> {
    group_prefix(group).u64(topic).u32(queue).build()
}

pub(super) fn producer_key(name: &str) -> Vec<u8> {
    KeyBuilder::new().u8(b'p').text(name).build()
}

pub(super) fn producer_id_key(id: i64) -> Vec<u8> {
    KeyBuilder::new().u8(b'i').i64(id).build()
}

pub(super) const PRODUCER_NUMBER_KEY: &[u8] = b"n";
