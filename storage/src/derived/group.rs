//! One group's keys.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::Inner;
use super::database::{
    Database, Meta, PREFIX_BYTES, data_prefix, encode_meta, fingerprint, meta_key,
};
use super::engine::Tree;
use crate::{LogId, RaftGroupId, StorageError};

/// One change: a key with its new value, or `None` to remove it. The last one of a key counts.
pub type DerivedWrite = (Vec<u8>, Option<Vec<u8>>);

/// The derived state of one Raft group. Cheap to clone; one writer at a time.
///
/// After a [`super::DerivedStore::reset`] every call fails with `Damaged`; get a new handle and
/// rebuild the group.
#[derive(Debug, Clone)]
pub struct DerivedGroup {
    store: Arc<Inner>,
    id: RaftGroupId,
    generation: u64,
}

impl DerivedGroup {
    pub(super) fn new(store: Arc<Inner>, id: RaftGroupId, generation: u64) -> Self {
        Self {
            store,
            id,
            generation,
        }
    }

    pub fn id(&self) -> RaftGroupId {
        self.id
    }

    /// The log id up to which the group's state is here. None: the group is empty.
    pub fn applied(&self) -> Result<Option<LogId>, StorageError> {
        self.with(|database| Ok(database.meta(self.id)?.map(|meta| meta.applied)))
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.with(|database| self.stored(database, key))
    }

    /// All pairs whose key begins with `prefix`, in order. For state known to be small; else
    /// [`DerivedGroup::scan_page`].
    pub fn scan(&self, prefix: &[u8]) -> Result<Vec<(Bytes, Bytes)>, StorageError> {
        self.scan_page(prefix, None, usize::MAX)
    }

    /// Up to `limit` pairs whose key begins with `prefix` and comes after `after`, in order.
    pub fn scan_page(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Bytes, Bytes)>, StorageError> {
        let full_prefix = self.full_key(prefix);
        let mut start = full_prefix.clone();
        if let Some(after) = after {
            // The least key above `after` is `after` and a zero byte.
            let mut above = self.full_key(after);
            above.push(0);
            start = start.max(above);
        }
        let mut pairs = Vec::new();
        if limit > 0 {
            self.with(|database| {
                database.visit_prefix(&full_prefix, &start, &mut |key, value| {
                    let key = Bytes::copy_from_slice(&key[PREFIX_BYTES..]);
                    pairs.push((key, Bytes::copy_from_slice(value)));
                    pairs.len() < limit
                })
            })?;
        }
        Ok(pairs)
    }

    /// Makes the changes and moves the group to `applied`, all or nothing. Refuses to move
    /// backwards; [`DerivedGroup::clear`] first to start again from a snapshot, or undo what is
    /// younger with [`DerivedGroup::rewind`].
    pub fn write(&self, batch: Vec<DerivedWrite>, applied: LogId) -> Result<(), StorageError> {
        self.with(|database| {
            let before = database.meta(self.id)?;
            if let Some(before) = before
                && applied.index < before.applied.index
            {
                return Err(StorageError::InvalidArgument(format!(
                    "group {} is at {} and cannot go back to {applied}",
                    self.id, before.applied
                )));
            }
            self.change(database, before, batch, applied)
        })
    }

    /// Makes the last changes that bring the group back to its state at `applied`, all or nothing.
    pub fn rewind(&self, batch: Vec<DerivedWrite>, applied: LogId) -> Result<(), StorageError> {
        self.with(|database| self.change(database, database.meta(self.id)?, batch, applied))
    }

    fn change(
        &self,
        database: &Database,
        before: Option<Meta>,
        batch: Vec<DerivedWrite>,
        applied: LogId,
    ) -> Result<(), StorageError> {
        let mut sum = before.map_or(0, |meta| meta.fingerprint);
        let mut out = Vec::new();
        let changes: HashMap<Vec<u8>, Option<Vec<u8>>> = batch.into_iter().collect();
        for (key, value) in changes {
            sum = self.replaced(database, sum, &key, value.as_deref())?;
            out.push((self.full_key(&key), value));
        }
        let meta = Meta {
            applied,
            fingerprint: sum,
        };
        let meta = (meta_key(self.id).to_vec(), Some(encode_meta(meta).to_vec()));
        out.push(meta);
        database.run(|engine| engine.apply(Tree::Pairs, out))
    }

    /// [`DerivedStore::flush`](super::DerivedStore::flush), for who has no more than this handle.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.with(Database::flush)
    }

    /// Removes all of the group, its applied log id first. A crash in between is made good when
    /// the store is opened.
    pub fn clear(&self) -> Result<(), StorageError> {
        self.with(|database| database.clear(self.id))
    }

    /// The fingerprint `sum` after `key` got a new value or none.
    fn replaced(
        &self,
        database: &Database,
        mut sum: u64,
        key: &[u8],
        value: Option<&[u8]>,
    ) -> Result<u64, StorageError> {
        if let Some(old) = self.stored(database, key)? {
            sum = sum.wrapping_sub(fingerprint(key, &old));
        }
        if let Some(value) = value {
            sum = sum.wrapping_add(fingerprint(key, value));
        }
        Ok(sum)
    }

    fn stored(&self, database: &Database, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        database.run(|engine| engine.get(Tree::Pairs, &self.full_key(key)))
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [&data_prefix(self.id), key].concat()
    }

    fn with<T>(
        &self,
        call: impl FnOnce(&Database) -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        self.store.with(Some(self.generation), call)
    }
}
