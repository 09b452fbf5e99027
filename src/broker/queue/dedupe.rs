//! Which batches of which idempotent producers are already in the queue.
//!
//! The rules are Kafka's (`ProducerStateManager`, `ProducerAppendInfo`): the last five batches per
//! producer are remembered; a retry of one of them gets its first offsets again; anything else must
//! follow without a gap; a producer that is not known, or comes with a new epoch, starts at 0.
//!
//! Time is the log's, so that every replica forgets the same producers at the same entry. A full
//! table refuses new producers instead of forgetting one: forgetting would let its retry in twice.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quorate_storage::batch::ProducerStamp;
use serde::{Deserialize, Serialize};

use super::Place;

/// Kafka's `NUM_BATCHES_TO_RETAIN`.
pub(in crate::broker) const REMEMBERED_BATCHES: usize = 5;
/// Kafka's default `transactional.id.expiration.ms`.
pub(super) const EXPIRE_AFTER_MS: u64 = 7 * 24 * 3_600_000;

/// What the table says to a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Duplicate(Place),
    OutOfOrder { expected: i32 },
    Fenced { current: i16 },
    Full,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    base_sequence: i32,
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Producer {
    epoch: i16,
    /// Of its last accepted batch or fence.
    stamp_ms: u64,
    next_sequence: i32,
    batches: VecDeque<Remembered>,
}

/// The dedupe table of one queue. Iteration is in id order: checkpoints are equal on all replicas.
#[derive(Debug, Clone, Default)]
pub(super) struct ProducerTable {
    producers: BTreeMap<i64, Producer>,
    by_age: BTreeSet<(u64, i64)>,
}

/// Sequences count from 0 to `i32::MAX` and begin again at 0.
pub(in crate::broker) fn advance(sequence: i32, count: u32) -> i32 {
    ((i64::from(sequence) + i64::from(count)) & i64::from(i32::MAX)) as i32
}

impl ProducerTable {
    pub(super) fn judge(&self, mark: ProducerStamp, count: u32, max_producers: usize) -> Verdict {
        let Some(known) = self.producers.get(&mark.id) else {
            return match mark.base_sequence {
                0 if self.producers.len() >= max_producers => Verdict::Full,
                0 => Verdict::Accept,
                _ => Verdict::OutOfOrder { expected: 0 },
            };
        };
        if mark.epoch < known.epoch {
            return Verdict::Fenced {
                current: known.epoch,
            };
        }
        if mark.epoch > known.epoch {
            return match mark.base_sequence {
                0 => Verdict::Accept,
                _ => Verdict::OutOfOrder { expected: 0 },
            };
        }
        let same =
            |b: &&Remembered| b.base_sequence == mark.base_sequence && b.place.count == count;
        if let Some(first) = known.batches.iter().find(same) {
            return Verdict::Duplicate(first.place);
        }
        if mark.base_sequence == known.next_sequence {
            Verdict::Accept
        } else {
            Verdict::OutOfOrder {
                expected: known.next_sequence,
            }
        }
    }

    /// Remembers a batch that was accepted.
    pub(super) fn record(&mut self, mark: ProducerStamp, place: Place, stamp_ms: u64) {
        let producer = self.touch(mark.id, mark.epoch, stamp_ms);
        producer.next_sequence = advance(mark.base_sequence, place.count);
        if producer.batches.len() == REMEMBERED_BATCHES {
            producer.batches.pop_front();
        }
        producer.batches.push_back(Remembered {
            base_sequence: mark.base_sequence,
            place,
        });
    }

    /// Refuses every epoch below `epoch` from here on. An older fence changes nothing.
    pub(super) fn fence(&mut self, id: i64, epoch: i16, stamp_ms: u64) {
        if self.producers.get(&id).is_some_and(|p| p.epoch >= epoch) {
            return;
        }
        self.touch(id, epoch, stamp_ms);
    }

    fn touch(&mut self, id: i64, epoch: i16, stamp_ms: u64) -> &mut Producer {
        let producer = self.producers.entry(id).or_insert(Producer {
            epoch,
            stamp_ms,
            next_sequence: 0,
            batches: VecDeque::new(),
        });
        if producer.epoch != epoch {
            producer.epoch = epoch;
            producer.next_sequence = 0;
            producer.batches.clear();
        }
        self.by_age.remove(&(producer.stamp_ms, id));
        producer.stamp_ms = stamp_ms;
        self.by_age.insert((stamp_ms, id));
        producer
    }

    /// Forgets the producers that wrote nothing for [`EXPIRE_AFTER_MS`] of log time.
    pub(super) fn expire(&mut self, now_ms: u64) {
        while let Some(&(stamp_ms, id)) = self.by_age.first() {
            if stamp_ms.saturating_add(EXPIRE_AFTER_MS) >= now_ms {
                break;
            }
            self.by_age.pop_first();
            self.producers.remove(&id);
        }
    }

    pub(super) fn content(&self) -> Vec<(i64, Producer)> {
        self.producers
            .iter()
            .map(|(id, p)| (*id, p.clone()))
            .collect()
    }

    pub(super) fn from_content(content: Vec<(i64, Producer)>) -> Self {
        let by_age = content.iter().map(|(id, p)| (p.stamp_ms, *id)).collect();
        Self {
            producers: content.into_iter().collect(),
            by_age,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(epoch: i16, base_sequence: i32) -> ProducerStamp {
        ProducerStamp {
            id: 7,
            epoch,
            base_sequence,
        }
    }

    fn place(base_offset: u64, count: u32) -> Place {
        Place {
            base_offset,
            count,
            term: 1,
            index: base_offset,
            batch: 0,
        }
    }

    fn table(batches: u64) -> ProducerTable {
        let mut table = ProducerTable::default();
        for n in 0..batches {
            assert_eq!(table.judge(mark(0, n as i32 * 2), 2, 10), Verdict::Accept);
            table.record(mark(0, n as i32 * 2), place(n * 2, 2), n);
        }
        table
    }

    #[test]
    fn a_retry_gets_the_first_place_again() {
        let table = table(5);
        for n in 0..5 {
            assert_eq!(
                table.judge(mark(0, n * 2), 2, 10),
                Verdict::Duplicate(place(n as u64 * 2, 2))
            );
        }
    }

    #[test]
    fn only_the_last_five_are_remembered() {
        let table = table(6);
        assert_eq!(
            table.judge(mark(0, 0), 2, 10),
            Verdict::OutOfOrder { expected: 12 }
        );
        assert!(matches!(
            table.judge(mark(0, 2), 2, 10),
            Verdict::Duplicate(_)
        ));
    }

    #[test]
    fn gaps_other_splits_and_strangers_are_out_of_order() {
        let table = table(1);
        let expected_2 = Verdict::OutOfOrder { expected: 2 };
        assert_eq!(table.judge(mark(0, 3), 1, 10), expected_2);
        assert_eq!(table.judge(mark(0, 0), 1, 10), expected_2);
        let stranger = ProducerStamp {
            id: 8,
            ..mark(0, 4)
        };
        assert_eq!(
            table.judge(stranger, 1, 10),
            Verdict::OutOfOrder { expected: 0 }
        );
    }

    #[test]
    fn a_newer_epoch_starts_at_zero_and_fences_the_older() {
        let mut table = table(2);
        assert_eq!(
            table.judge(mark(1, 4), 1, 10),
            Verdict::OutOfOrder { expected: 0 }
        );
        assert_eq!(table.judge(mark(1, 0), 1, 10), Verdict::Accept);
        table.record(mark(1, 0), place(4, 1), 9);
        assert_eq!(
            table.judge(mark(0, 4), 1, 10),
            Verdict::Fenced { current: 1 }
        );
        assert_eq!(table.judge(mark(1, 1), 1, 10), Verdict::Accept);
    }

    #[test]
    fn a_fence_refuses_before_the_new_epoch_has_written() {
        let mut table = table(2);
        table.fence(7, 1, 9);
        assert_eq!(
            table.judge(mark(0, 2), 2, 10),
            Verdict::Fenced { current: 1 }
        );
        assert_eq!(table.judge(mark(1, 0), 2, 10), Verdict::Accept);
        table.record(mark(1, 0), place(4, 2), 10);
        table.fence(7, 1, 11);
        assert_eq!(
            table.judge(mark(1, 2), 2, 10),
            Verdict::Accept,
            "an old fence"
        );
    }

    #[test]
    fn sequences_wrap_at_i32_max() {
        let mut table = ProducerTable::default();
        table.record(mark(0, i32::MAX - 1), place(0, 2), 0);
        assert_eq!(table.judge(mark(0, 0), 2, 10), Verdict::Accept);
        table.record(mark(0, 0), place(2, 3), 0);
        table.record(mark(0, i32::MAX), place(2, 3), 0);
        assert_eq!(table.judge(mark(0, 2), 2, 10), Verdict::Accept);
    }

    #[test]
    fn a_full_table_refuses_and_log_time_makes_room() {
        let mut table = table(1);
        let other = ProducerStamp {
            id: 8,
            ..mark(0, 0)
        };
        assert_eq!(table.judge(other, 1, 1), Verdict::Full);
        table.expire(EXPIRE_AFTER_MS);
        assert_eq!(table.judge(other, 1, 1), Verdict::Full);
        table.expire(EXPIRE_AFTER_MS + 1);
        assert_eq!(table.judge(other, 1, 1), Verdict::Accept);
    }

    #[test]
    fn writing_keeps_a_producer_from_expiring() {
        let mut table = table(1);
        table.record(mark(0, 2), place(2, 2), 1000);
        table.expire(EXPIRE_AFTER_MS + 1000);
        assert!(matches!(
            table.judge(mark(0, 2), 2, 10),
            Verdict::Duplicate(_)
        ));
        let again = ProducerTable::from_content(table.content());
        assert_eq!(again.content(), table.content());
        assert_eq!(again.by_age, table.by_age);
    }
}
