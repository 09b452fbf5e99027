//! A coordinator's state: records in the node's derived store, read by the broker beside apply.
//!
//! | key | value |
//! |---|---|
//! | `o`, consumer group, topic u64, queue u32 | committed offset u64 |
//! | `g`, consumer group | how it works: [`GroupMode`](super::GroupMode) |
//! | `m`, consumer group | its members and who owns what: [`Membership`](super::Membership) |
//! | `M`, consumer group, instance, topic u64, queue u32 | offset that an instance of a broadcast group committed u64 |
//! | `p`, name | id, epoch and queues of a named producer |
//! | `i`, producer id i64 | its name |
//! | `n` | the last producer number given |
//! | `t` | the log's time, ms u64 |
//! | `l` `d` `x` `r` `a`, consumer group… | what it leases: see [`leases`](super::leases) |
//! | `T`, `U`, `w`, `h` | transactions: see `transactions/records.rs` |
//!
//! Keys are made of the store's ordered fields, numbers in values are big-endian.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use quorate_storage::derived::{DerivedGroup, KeyBuilder, KeyReader};
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::{LogId, StorageError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::leases::LeaseSignals;
use super::{GroupMode, Membership, QueueOffset};
use crate::catalog::TopicId;

pub(super) type Content = BTreeMap<Vec<u8>, Vec<u8>>;
/// A key and its value.
pub(super) type Record = (Vec<u8>, Vec<u8>);

/// A named producer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamedProducer {
    pub id: i64,
    pub epoch: i16,
    /// The id it had before its epochs ran out; to be refused wherever that one wrote.
    pub retired: Option<i64>,
    /// Groups of the queues it has announced to write to, ever.
    pub queues: std::collections::BTreeSet<u64>,
}

/// The records, and what the command being applied changes of them.
#[derive(Debug)]
pub(super) struct Records {
    stored: DerivedGroup,
    pub(super) signals: Arc<LeaseSignals>,
    /// None: removed.
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    transactions: watch::Sender<()>,
}

impl Records {
    pub(super) fn new(stored: DerivedGroup) -> Self {
        Self {
            stored,
            signals: Arc::default(),
            changes: BTreeMap::new(),
            transactions: watch::Sender::new(()),
        }
    }

    pub(super) fn view(&self) -> CoordinatorView {
        CoordinatorView {
            records: self.stored.clone(),
            signals: self.signals.clone(),
            transactions: self.transactions.subscribe(),
        }
    }

    /// Wakes who waits for a change of transactions.
    pub(super) fn tell_transactions(&self) {
        self.transactions.send_replace(());
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        if let Some(value) = self.changes.get(key) {
            return Ok(value.clone());
        }
        Ok(self.stored.get(key)?.map(|value| value.to_vec()))
    }

    pub(super) fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changes.insert(key, Some(value));
    }

    pub(super) fn remove(&mut self, key: Vec<u8>) {
        self.changes.insert(key, None);
    }

    /// Up to `limit` records whose key begins with `prefix` and comes after `after`, in order.
    pub(super) fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Record>, StorageError> {
        let from = after.map_or(Bound::Included(prefix), Bound::Excluded);
        let changed = self.changes.range::<[u8], _>((from, Bound::Unbounded));
        let changed = changed.take_while(|(key, _)| key.starts_with(prefix));
        let changed: BTreeMap<_, _> = changed.collect();
        // As many more as may have been removed since.
        let wanted = limit.saturating_add(changed.len());
        let stored = self.stored.scan_page(prefix, after, wanted)?;
        let complete = stored.len() < wanted;
        let last = stored.last().map(|(key, _)| key.clone());
        let mut found: BTreeMap<Vec<u8>, Vec<u8>> = stored
            .into_iter()
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .collect();
        for (key, value) in changed {
            match value {
                // Between the page and this key there may be more.
                Some(_) if !complete && last.as_ref().is_some_and(|last| key[..] > last[..]) => {}
                Some(value) => drop(found.insert(key.clone(), value.clone())),
                None => drop(found.remove(key)),
            }
        }
        Ok(found.into_iter().take(limit).collect())
    }

    /// A record that is postcard's form of `T`.
    pub(super) fn read<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StorageError> {
        let stored = self.get(key)?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }

    pub(super) fn store<T: Serialize>(&mut self, key: Vec<u8>, value: &T) {
        // Plain data into memory: there is no way to fail.
        self.put(key, postcard::to_stdvec(value).unwrap_or_default());
    }

    /// Stores what the command of `log_id` changed, together with its place in the log.
    pub(super) fn commit(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let changes = std::mem::take(&mut self.changes);
        self.stored.write(changes.into_iter().collect(), log_id)
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
        let content = content.into_iter();
        self.changes = content.map(|(key, value)| (key, Some(value))).collect();
        log_id.map_or(Ok(()), |log_id| self.commit(log_id))
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StorageError> {
        let all = self.stored.scan(b"")?.into_iter();
        let all = all.filter(|(key, _)| !is_skipped(key));
        let content: Content = all.map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
        // A map of bytes into memory: there is no way to fail.
        Ok(postcard::to_stdvec(&content).unwrap_or_default())
    }
}

/// Whether checkpoints and snapshots leave a record out: none is, but in a test of the tests.
fn is_skipped(key: &[u8]) -> bool {
    match key.first() {
        Some(b'm') => mutation::on(Mutation::SkipMembersInSnapshots),
        Some(b'l' | b'd' | b'x' | b'r' | b'a') => mutation::on(Mutation::SkipLeasesInSnapshots),
        Some(b'T' | b'U' | b'w' | b'h') => mutation::on(Mutation::SkipTransactionsInSnapshots),
        _ => false,
    }
}

/// What the broker reads of a coordinator's applied state.
#[derive(Debug, Clone)]
pub struct CoordinatorView {
    pub(super) records: DerivedGroup,
    signals: Arc<LeaseSignals>,
    transactions: watch::Receiver<()>,
}

impl CoordinatorView {
    /// What apply tells those who wait for leases.
    pub fn signals(&self) -> &LeaseSignals {
        &self.signals
    }

    /// The log's time, as far as this replica has applied it.
    pub fn log_time_ms(&self) -> Result<u64, StorageError> {
        let known = self.records.get(TIME_KEY)?;
        let known = known.and_then(|v| Some(u64::from_be_bytes(v[..].try_into().ok()?)));
        Ok(known.unwrap_or(0))
    }

    /// Changes whenever a transaction may have changed.
    pub fn watch_transactions(&self) -> watch::Receiver<()> {
        self.transactions.clone()
    }

    /// All that a consumer group has committed, in order of topic and queue.
    pub fn offsets(&self, group: &str) -> Result<Vec<QueueOffset>, StorageError> {
        self.offsets_in(group_prefix(group).build())
    }

    /// The same of one instance of a broadcast group.
    pub fn instance_offsets(
        &self,
        group: &str,
        instance: &str,
    ) -> Result<Vec<QueueOffset>, StorageError> {
        self.offsets_in(instance_prefix(group, instance).build())
    }

    fn offsets_in(&self, prefix: Vec<u8>) -> Result<Vec<QueueOffset>, StorageError> {
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

    /// Every topic in which a group that commits offsets, or an instance of it, has committed.
    pub fn committed_topics(&self) -> Result<BTreeSet<(String, TopicId)>, StorageError> {
        let mut topics = BTreeSet::new();
        for kind in COMMITTED_KINDS {
            let found = self.records.scan(&[*kind])?;
            topics.extend(found.iter().filter_map(|(key, _)| committed_in(key)));
        }
        let mut modes = BTreeMap::new();
        for (group, _) in &topics {
            if !modes.contains_key(group) {
                modes.insert(group.clone(), self.group_mode(group)?);
            }
        }
        topics.retain(|(group, _)| modes.get(group) != Some(&Some(GroupMode::Leases)));
        Ok(topics)
    }

    /// A group's members; none if it never had any.
    pub fn membership(&self, group: &str) -> Result<Option<Membership>, StorageError> {
        self.read(&membership_key(group))
    }

    /// How a group works; none if it was never used.
    pub fn group_mode(&self, group: &str) -> Result<Option<GroupMode>, StorageError> {
        self.read(&group_mode_key(group))
    }

    /// Every consumer group that was ever used and not deleted, up to `limit` after `after`, by
    /// name.
    pub fn groups(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<GroupSummary>, StorageError> {
        let after = after.map(group_mode_key);
        let found = self.records.scan_page(b"g", after.as_deref(), limit)?;
        let mut groups = Vec::new();
        for (key, value) in found {
            let name = KeyReader::new(&key[1..]).text();
            let (Some(name), Ok(mode)) = (name, postcard::from_bytes(&value)) else {
                continue;
            };
            let members = self.membership(&name)?.map_or(0, |m| m.members.len());
            groups.push(GroupSummary {
                name,
                mode,
                members: members as u64,
            });
        }
        Ok(groups)
    }

    /// The groups that have members.
    pub fn memberships(&self) -> Result<Vec<(String, Membership)>, StorageError> {
        let found = self.records.scan(b"m")?.into_iter();
        let groups = found.filter_map(|(key, value)| {
            let name = KeyReader::new(&key[1..]).text()?;
            let membership: Membership = postcard::from_bytes(&value).ok()?;
            (!membership.members.is_empty()).then_some((name, membership))
        });
        Ok(groups.collect())
    }

    fn read<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StorageError> {
        let stored = self.records.get(key)?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }
}

/// A consumer group in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSummary {
    pub name: String,
    pub mode: GroupMode,
    pub members: u64,
}

fn instance_prefix(group: &str, instance: &str) -> KeyBuilder {
    KeyBuilder::new().u8(b'M').text(group).text(instance)
}

pub(super) fn instance_offset_key(group: &str, instance: &str, topic: u64, queue: u32) -> Vec<u8> {
    instance_prefix(group, instance)
        .u64(topic)
        .u32(queue)
        .build()
}

pub(super) fn membership_key(group: &str) -> Vec<u8> {
    group_record_prefix(b'm', group)
}

/// Kinds of records that are committed offsets.
pub(super) const COMMITTED_KINDS: &[u8] = b"oM";

/// Whose offset the record of this key is, and in which topic.
pub(super) fn committed_in(key: &[u8]) -> Option<(String, TopicId)> {
    let mut fields = KeyReader::new(key);
    let kind = fields.u8()?;
    let group = fields.text()?;
    if kind == b'M' {
        // The instance.
        fields.text()?;
    }
    Some((group, fields.u64()?))
}

/// Every record of this kind that belongs to the group begins so.
pub(super) fn group_record_prefix(kind: u8, group: &str) -> Vec<u8> {
    KeyBuilder::new().u8(kind).text(group).build()
}

fn group_prefix(group: &str) -> KeyBuilder {
    KeyBuilder::new().u8(b'o').text(group)
}

pub(super) fn offset_key(group: &str, topic: u64, queue: u32) -> Vec<u8> {
    group_prefix(group).u64(topic).u32(queue).build()
}

pub(super) fn group_mode_key(group: &str) -> Vec<u8> {
    KeyBuilder::new().u8(b'g').text(group).build()
}

pub(super) fn producer_key(name: &str) -> Vec<u8> {
    KeyBuilder::new().u8(b'p').text(name).build()
}

pub(super) fn producer_id_key(id: i64) -> Vec<u8> {
    KeyBuilder::new().u8(b'i').i64(id).build()
}

pub(super) const TIME_KEY: &[u8] = b"t";
pub(super) const PRODUCER_NUMBER_KEY: &[u8] = b"n";

#[cfg(test)]
mod tests {
    use quorate_storage::RaftGroupId;
    use quorate_storage::derived::DerivedStore;

    use super::*;

    #[test]
    fn a_scan_sees_what_the_command_has_changed_so_far() {
        let store = DerivedStore::in_memory();
        let mut records = Records::new(store.group(RaftGroupId(1)));
        let key = |n: u8| vec![b'k', n];
        for n in 0..8 {
            records.put(key(n), vec![n]);
        }
        records.put(b"l".to_vec(), vec![]);
        records.commit(LogId::new(1, 1)).unwrap();
        for n in [0, 1, 3] {
            records.remove(key(n));
        }
        records.put(key(2), vec![22]);
        records.put(key(9), vec![9]);
        let seen = |after: Option<u8>, limit| -> Vec<u8> {
            let after = after.map(key);
            let found = records.scan(b"k", after.as_deref(), limit).unwrap();
            found.into_iter().map(|(_, value)| value[0]).collect()
        };
        assert_eq!(seen(None, 2), [22, 4]);
        assert_eq!(seen(None, 100), [22, 4, 5, 6, 7, 9]);
        assert_eq!(seen(Some(5), 100), [6, 7, 9]);
        assert_eq!(seen(Some(5), 2), [6, 7]);
        assert_eq!(seen(Some(9), 2), [0u8; 0]);
    }
}
