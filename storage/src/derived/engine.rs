//! What keeps the pairs: sled on a disk, or memory alone.

use bytes::Bytes;

use super::DerivedWrite;
use crate::StorageError;

/// The two orders of pairs of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tree {
    /// The groups' own.
    Pairs,
    /// Groups that are being cleared.
    Clearing,
}

/// Pairs in the order of their keys.
pub(super) trait Engine: std::fmt::Debug + Send + Sync {
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Bytes>, StorageError>;

    /// Shows the pairs from `from` on, until `visit` says that it has enough by `false`.
    fn visit(
        &self,
        tree: Tree,
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StorageError>;

    /// All or nothing.
    fn apply(&self, tree: Tree, batch: Vec<DerivedWrite>) -> Result<(), StorageError>;

    /// Hands what is buffered to the operating system.
    fn flush(&self) -> Result<(), StorageError>;
}
