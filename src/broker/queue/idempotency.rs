//! Which idempotency keys were used lately, and what they got. Time is the log's.
//!
//! Bounded in count by refusing new keys: forgetting one early would store its retry twice.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::Place;
use super::entry::KeyHash;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyVerdict {
    New,
    Seen(Place),
    /// Used for a request with other content.
    Reused,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RememberedKey {
    stamp_ms: u64,
    key: KeyHash,
    fingerprint: u64,
    place: Place,
}

/// The keys of one queue. `by_age` is in log order, and the only thing that is ever iterated.
#[derive(Debug, Clone, Default)]
pub(super) struct KeyTable {
    by_key: HashMap<KeyHash, RememberedKey>,
    by_age: VecDeque<(u64, KeyHash)>,
}

impl KeyTable {
    pub(super) fn judge(&self, key: &KeyHash, fingerprint: u64, max_keys: usize) -> KeyVerdict {
        match self.by_key.get(key) {
            Some(known) if known.fingerprint == fingerprint => KeyVerdict::Seen(known.place),
            Some(_) => KeyVerdict::Reused,
            None if self.by_key.len() >= max_keys => KeyVerdict::Full,
            None => KeyVerdict::New,
        }
    }

    /// Remembers a key that [`Self::judge`] called new. Stamps never go back.
    pub(super) fn record(&mut self, key: KeyHash, fingerprint: u64, place: Place, stamp_ms: u64) {
        self.by_age.push_back((stamp_ms, key));
        let remembered = RememberedKey {
            stamp_ms,
            key,
            fingerprint,
            place,
        };
        self.by_key.insert(key, remembered);
    }

    /// Forgets what was used before `before_ms`.
    pub(super) fn expire(&mut self, before_ms: u64) {
        while let Some((stamp_ms, key)) = self.by_age.front() {
            if *stamp_ms >= before_ms {
                break;
            }
            self.by_key.remove(key);
            self.by_age.pop_front();
        }
    }

    pub(super) fn content(&self) -> Vec<RememberedKey> {
        let of = |(_, key): &(u64, KeyHash)| self.by_key.get(key).copied();
        self.by_age.iter().filter_map(of).collect()
    }

    pub(super) fn from_content(content: Vec<RememberedKey>) -> Self {
        Self {
            by_age: content.iter().map(|k| (k.stamp_ms, k.key)).collect(),
            by_key: content.into_iter().map(|k| (k.key, k)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(base_offset: u64) -> Place {
        Place {
            base_offset,
            count: 1,
            term: 1,
            index: 1,
            batch: 0,
        }
    }

    #[test]
    fn a_key_answers_with_its_first_place_until_it_expires() {
        let mut table = KeyTable::default();
        assert_eq!(table.judge(&[1; 16], 5, 10), KeyVerdict::New);
        table.record([1; 16], 5, place(3), 1_000);
        assert_eq!(table.judge(&[1; 16], 5, 10), KeyVerdict::Seen(place(3)));
        assert_eq!(table.judge(&[1; 16], 6, 10), KeyVerdict::Reused);
        table.expire(1_000);
        assert_eq!(table.judge(&[1; 16], 5, 10), KeyVerdict::Seen(place(3)));
        table.expire(1_001);
        assert_eq!(table.judge(&[1; 16], 5, 10), KeyVerdict::New);
    }

    #[test]
    fn a_full_table_refuses_new_keys_and_keeps_old_ones() {
        let mut table = KeyTable::default();
        table.record([1; 16], 5, place(0), 1_000);
        assert_eq!(table.judge(&[2; 16], 5, 1), KeyVerdict::Full);
        assert_eq!(table.judge(&[1; 16], 5, 1), KeyVerdict::Seen(place(0)));
    }

    #[test]
    fn content_keeps_log_order() {
        let mut table = KeyTable::default();
        for n in (0..50u8).rev() {
            table.record([n; 16], 5, place(u64::from(n)), 1_000);
        }
        let again = KeyTable::from_content(table.content());
        assert_eq!(again.content(), table.content());
        assert_eq!(again.by_age, table.by_age);
    }
}
