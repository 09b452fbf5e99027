//! Pairs in memory, for as long as the store is open.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;

use super::DerivedWrite;
use super::engine::{Engine, Tree};
use crate::StorageError;

type Pairs = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
pub(super) struct Memory {
    pairs: Mutex<Pairs>,
    clearing: Mutex<Pairs>,
}

impl Memory {
    fn tree(&self, tree: Tree) -> &Mutex<Pairs> {
        match tree {
            Tree::Pairs => &self.pairs,
            Tree::Clearing => &self.clearing,
        }
    }
}

impl Engine for Memory {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        let pairs = self.tree(tree).lock();
        Ok(pairs.get(key).map(|value| Bytes::copy_from_slice(value)))
    }

    fn visit(
        &self,
        tree: Tree,
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StorageError> {
        let pairs = self.tree(tree).lock();
        let mut pairs = pairs.range(from.to_vec()..);
        while pairs.next().is_some_and(|(key, value)| visit(key, value)) {}
        Ok(())
    }

    fn apply(&self, tree: Tree, batch: Vec<DerivedWrite>) -> Result<(), StorageError> {
        let mut pairs = self.tree(tree).lock();
        for (key, value) in batch {
            match value {
                Some(value) => drop(pairs.insert(key, value)),
                None => drop(pairs.remove(&key)),
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }
}
