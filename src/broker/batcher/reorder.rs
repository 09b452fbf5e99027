//! Requests of an idempotent producer that overtook each other on their way.
//!
//! A producer may have five requests under way, as in Kafka. One whose sequence is ahead of what the
//! queue expects is held for a moment, until those before it have come; then they go in order.
//! Apply alone decides what is in order: what is known here are its last answers and what has been
//! proposed since. That can be wrong, and then costs an entry or a moment, never a message.

use std::collections::{BTreeMap, HashMap};

use quorate_storage::batch::ProducerStamp;
use tokio::time::Instant;

use crate::broker::queue::advance;

/// Requests of one producer that wait for the one before them: with that one, five.
const HELD_PER_PRODUCER: usize = 4;
/// Producers whose next sequence is known; with more, all are forgotten and learned again.
const MAX_KNOWN: usize = 10_000;

type Producer = (i64, i16);

/// Whether `sequence` comes after `expected`, as far as that can be told on a circle.
fn is_ahead(sequence: i32, expected: i32) -> bool {
    let distance = (i64::from(sequence) - i64::from(expected)) & i64::from(i32::MAX);
    (1..1 << 30).contains(&distance)
}

#[derive(Debug)]
struct Held<T> {
    item: T,
    bytes: usize,
    until: Instant,
}

/// Of one queue, on its leader.
#[derive(Debug)]
pub(super) struct Reorder<T> {
    /// The sequence that follows what was proposed last.
    next: HashMap<Producer, i32>,
    held: BTreeMap<(Producer, i32), Held<T>>,
    bytes: usize,
    max_bytes: usize,
}

impl<T> Reorder<T> {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            next: HashMap::new(),
            held: BTreeMap::new(),
            bytes: 0,
            max_bytes,
        }
    }

    /// Whether something of this producer should come before `stamp`, as far as is known.
    pub(super) fn is_early(&self, stamp: ProducerStamp) -> bool {
        let next = self.next.get(&(stamp.id, stamp.epoch));
        next.is_some_and(|next| is_ahead(stamp.base_sequence, *next))
    }

    /// Keeps an item until what comes before it has come, or gives it back for want of room.
    pub(super) fn hold(
        &mut self,
        stamp: ProducerStamp,
        item: T,
        bytes: usize,
        until: Instant,
    ) -> Result<(), T> {
        let producer = (stamp.id, stamp.epoch);
        let own = self
            .held
            .range((producer, 0)..=(producer, i32::MAX))
            .count();
        let place = (producer, stamp.base_sequence);
        let fits = own < HELD_PER_PRODUCER && self.bytes + bytes <= self.max_bytes;
        if !fits || self.held.contains_key(&place) {
            return Err(item);
        }
        self.bytes += bytes;
        self.held.insert(place, Held { item, bytes, until });
        Ok(())
    }

    /// A batch is about to be proposed. Gives the one that may follow it at once.
    pub(super) fn proposing(&mut self, stamp: ProducerStamp, count: u32) -> Option<T> {
        if self.next.len() >= MAX_KNOWN {
            self.next.clear();
        }
        let producer = (stamp.id, stamp.epoch);
        let next = self.next.entry(producer).or_insert(stamp.base_sequence);
        if *next != stamp.base_sequence {
            return None;
        }
        *next = advance(stamp.base_sequence, count);
        let next = *next;
        self.take((producer, next))
    }

    /// Apply has taken a batch. Gives the one that may follow.
    pub(super) fn stored(&mut self, stamp: ProducerStamp, count: u32) -> Option<T> {
        let producer = (stamp.id, stamp.epoch);
        let end = advance(stamp.base_sequence, count);
        let next = self.next.entry(producer).or_insert(end);
        if is_ahead(end, *next) {
            *next = end;
        }
        let next = *next;
        self.take((producer, next))
    }

    /// Apply expects another sequence. True if the batch with `stamp` may come into order yet.
    pub(super) fn out_of_order(&mut self, stamp: ProducerStamp, expected: i32) -> bool {
        self.next.insert((stamp.id, stamp.epoch), expected);
        is_ahead(stamp.base_sequence, expected)
    }

    /// What is known of this producer is wrong. Gives all that was held for it, in order.
    pub(super) fn forget(&mut self, stamp: ProducerStamp) -> Vec<T> {
        let producer = (stamp.id, stamp.epoch);
        self.next.remove(&producer);
        let range = (producer, 0)..=(producer, i32::MAX);
        let places: Vec<_> = self.held.range(range).map(|(place, _)| *place).collect();
        places.into_iter().filter_map(|p| self.take(p)).collect()
    }

    /// What has waited for long enough.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<T> {
        let late = self.held.iter().filter(|(_, held)| held.until <= now);
        let places: Vec<_> = late.map(|(place, _)| *place).collect();
        places.into_iter().filter_map(|p| self.take(p)).collect()
    }

    /// Everything that is held.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.bytes = 0;
        let all = std::mem::take(&mut self.held);
        all.into_values().map(|held| held.item).collect()
    }

    /// When something will be overdue.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.held.values().map(|held| held.until).min()
    }

    fn take(&mut self, place: (Producer, i32)) -> Option<T> {
        let held = self.held.remove(&place)?;
        self.bytes -= held.bytes;
        Some(held.item)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn stamp(id: i64, base_sequence: i32) -> ProducerStamp {
        ProducerStamp {
            id,
            epoch: 0,
            base_sequence,
        }
    }

    fn held(sequences: &[i32]) -> Reorder<i32> {
        let mut reorder = Reorder::new(1000);
        assert!(reorder.proposing(stamp(7, 0), 1).is_none());
        for sequence in sequences {
            assert!(reorder.is_early(stamp(7, *sequence)));
            let until = Instant::now() + Duration::from_secs(1);
            reorder
                .hold(stamp(7, *sequence), *sequence, 10, until)
                .unwrap();
        }
        reorder
    }

    #[test]
    fn what_overtook_follows_as_soon_as_the_gap_is_filled() {
        let mut reorder = held(&[3, 2, 4]);
        assert_eq!(reorder.stored(stamp(7, 0), 1), None);
        assert!(!reorder.is_early(stamp(7, 1)));
        assert_eq!(reorder.proposing(stamp(7, 1), 1), Some(2));
        assert_eq!(reorder.proposing(stamp(7, 2), 1), Some(3));
        assert_eq!(reorder.proposing(stamp(7, 3), 1), Some(4));
        assert_eq!(reorder.proposing(stamp(7, 4), 1), None);
        assert!(reorder.next_due().is_none() && reorder.bytes == 0);
    }

    #[test]
    fn apply_has_the_last_word() {
        // An entry was overtaken by a later one: the later is refused, the earlier then stored.
        let mut reorder: Reorder<i32> = Reorder::new(1000);
        assert!(reorder.proposing(stamp(7, 0), 1).is_none());
        assert!(reorder.proposing(stamp(7, 1), 1).is_none());
        assert!(reorder.out_of_order(stamp(7, 1), 0));
        reorder.hold(stamp(7, 1), 1, 10, Instant::now()).unwrap();
        assert_eq!(reorder.stored(stamp(7, 0), 1), Some(1));
        // A retry of something old comes too late to be held for.
        assert!(!reorder.out_of_order(stamp(7, 0), 9));
        assert!(reorder.is_early(stamp(7, 10)) && !reorder.is_early(stamp(7, 9)));
        // A retry that was stored before says nothing about what comes next.
        assert!(reorder.forget(stamp(7, 0)).is_empty());
        assert!(!reorder.is_early(stamp(7, 10)));
    }

    #[test]
    fn little_is_held_and_not_for_long() {
        let mut reorder = held(&[2, 3, 4, 5]);
        let until = Instant::now();
        assert_eq!(reorder.hold(stamp(7, 6), 6, 10, until), Err(6));
        assert_eq!(reorder.hold(stamp(8, 6), 6, 961, until), Err(6));
        assert_eq!(reorder.hold(stamp(8, 6), 6, 960, until), Ok(()));
        assert_eq!(reorder.next_due(), Some(until));
        assert_eq!(reorder.overdue(until), [6]);
        assert_eq!(
            reorder.hold(stamp(7, 2), 9, 10, until),
            Err(9),
            "it is there"
        );
        assert_eq!(reorder.forget(stamp(7, 0)), [2, 3, 4, 5]);
        assert!(reorder.hold(stamp(7, 2), 2, 10, until).is_ok());
        assert_eq!(reorder.drain(), [2]);
        assert_eq!(reorder.bytes, 0);
    }

    #[test]
    fn sequences_wrap() {
        assert_eq!(advance(i32::MAX, 1), 0);
        assert!(is_ahead(0, i32::MAX) && !is_ahead(i32::MAX, 0));
        let mut reorder: Reorder<i32> = Reorder::new(1000);
        assert!(reorder.proposing(stamp(7, i32::MAX - 1), 1).is_none());
        assert!(reorder.is_early(stamp(7, 1)));
        reorder.hold(stamp(7, 1), 1, 1, Instant::now()).unwrap();
        assert_eq!(reorder.proposing(stamp(7, i32::MAX), 2), Some(1));
    }
}
