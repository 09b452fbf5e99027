//! Which old entries the visible messages still need.
//!
//! What became visible when it was stored lies along the log in the order of offsets, so the first
//! visible message tells the oldest entry. What was delivered later points back: of those the oldest
//! is kept for each [`CHUNK`] offsets, a few bytes where there are any.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

const CHUNK: u64 = 4096;

/// The oldest entry by chunk of offsets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LateTable(BTreeMap<u64, u64>);

impl LateTable {
    /// The message at `offset` is in the older entry `index`.
    pub(super) fn add(&mut self, offset: u64, index: u64) {
        let oldest = self.0.entry(offset / CHUNK).or_insert(index);
        *oldest = index.min(*oldest);
    }

    /// The messages below `earliest` are gone.
    pub(super) fn trim(&mut self, earliest: u64) {
        self.0 = self.0.split_off(&(earliest / CHUNK));
    }

    pub(super) fn oldest(&self) -> Option<u64> {
        self.0.values().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_entry_is_needed_until_its_chunk_is_gone() {
        let mut late = LateTable::default();
        assert_eq!(late.oldest(), None);
        late.add(10, 7);
        late.add(11, 5);
        late.add(CHUNK, 9);
        assert_eq!(late.oldest(), Some(5));
        late.trim(CHUNK - 1);
        assert_eq!(late.oldest(), Some(5));
        late.trim(CHUNK);
        assert_eq!(late.oldest(), Some(9));
        late.trim(5 * CHUNK);
        assert_eq!(late, LateTable::default());
    }
}
