//! A coordinator's state: records by key, read by the broker beside apply.
//!
//! | key | value |
//! |---|---|
//! | `o`, length of the group's name (1), name, topic (8), queue (4) | committed offset (8) |
//! | `p`, name | id, epoch and queues of a named producer |
//! | `i`, producer id (8) | its name |
//! | `n` | the last producer number given |
//!
//! Numbers are big-endian, so that a scan gives them in order. Names have at most 120 bytes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;
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

/// The records, shared between the state machine (the only writer) and readers.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    content: Arc<RwLock<Content>>,
}

impl Records {
    pub(super) fn view(&self) -> CoordinatorView {
        CoordinatorView {
            records: self.clone(),
        }
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.content.read().get(key).cloned()
    }

    pub(super) fn put(&self, key: Vec<u8>, value: Vec<u8>) {
        self.content.write().insert(key, value);
    }

    pub(super) fn replace(&self, content: Content) {
        *self.content.write() = content;
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        // A map of bytes into memory: there is no way to fail.
        postcard::to_stdvec(&*self.content.read()).unwrap_or_default()
    }

    fn scan<T>(&self, prefix: &[u8], mut read: impl FnMut(&[u8], &[u8]) -> Option<T>) -> Vec<T> {
        let content = self.content.read();
        let from = (Bound::Included(prefix), Bound::Unbounded);
        content
            .range::<[u8], _>(from)
            .take_while(|(key, _)| key.starts_with(prefix))
            .filter_map(|(key, value)| read(&key[prefix.len()..], value))
            .collect()
    }
}

/// What the broker reads of a coordinator's applied state.
#[derive(Debug, Clone)]
pub struct CoordinatorView {
    records: Records,
}

impl CoordinatorView {
    /// All that a consumer group has committed, in order of topic and queue.
    pub fn offsets(&self, group: &str) -> Vec<QueueOffset> {
        self.records.scan(&group_prefix(group), |rest, value| {
            Some(QueueOffset {
                topic: u64::from_be_bytes(rest.get(..8)?.try_into().ok()?),
                queue: u32::from_be_bytes(rest.get(8..12)?.try_into().ok()?),
                offset: u64::from_be_bytes(value.try_into().ok()?),
            })
        })
    }
}

fn group_prefix(group: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(2 + group.len() + 12);
    key.push(b'o');
    // Names are at most 120 bytes long; see `crate::names`.
    key.push(group.len() as u8);
    key.extend_from_slice(group.as_bytes());
    key
}

pub(super) fn offset_key(group: &str, topic: u64, queue: u32) -> Vec<u8> {
    let mut key = group_prefix(group);
    key.extend_from_slice(&topic.to_be_bytes());
    key.extend_from_slice(&queue.to_be_bytes());
    key
}

pub(super) fn producer_key(name: &str) -> Vec<u8> {
    [b"p", name.as_bytes()].concat()
}

pub(super) fn producer_id_key(id: i64) -> Vec<u8> {
    [&b"i"[..], &id.to_be_bytes()].concat()
}

pub(super) const PRODUCER_NUMBER_KEY: &[u8] = b"n";
