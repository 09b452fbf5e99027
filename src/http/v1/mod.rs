//! The endpoints under `/v1` and those for operation, one file a section of the reference.

pub mod cancel;
pub mod cluster;
pub mod consume;
pub mod exchanges;
pub mod groups;
pub mod health;
pub mod leases;
pub mod lookup;
pub mod offsets;
pub mod produce;
pub mod replica;
pub mod topics;
pub mod trace;
pub mod transactions;

use serde::{Deserialize, Deserializer};

/// For `Option<Option<T>>`: a field that is there counts as given, even when it is null.
pub(super) fn given<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    T::deserialize(deserializer).map(Some)
}
