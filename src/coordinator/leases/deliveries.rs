//! The steps all changes of deliveries are made of. Each keeps what is due when, which keys are in
//! flight and the number of deliveries true.

use quorate_storage::StorageError;

use super::command::DeathReason;
use super::records::{
    DeadLetter, Delivery, DeliveryState, LeaseGroup, Place, QueueLeases, dead_letter_key, last,
    lease_group_key,
};
use crate::coordinator::machine::CoordinatorMachine;
use crate::coordinator::records::offset_key;

impl CoordinatorMachine {
    pub(super) fn lease_group(&self, group: &str) -> Result<Option<LeaseGroup>, StorageError> {
        self.records.read(&lease_group_key(group))
    }

    pub(super) fn store_lease_group(&mut self, group: &str, state: &LeaseGroup) {
        self.records.store(lease_group_key(group), state);
    }

    pub(super) fn queue_leases(
        &self,
        place: &Place<'_>,
    ) -> Result<Option<QueueLeases>, StorageError> {
        self.records.read(&place.leases())
    }

    pub(super) fn delivery(
        &self,
        place: &Place<'_>,
        offset: u64,
    ) -> Result<Option<Delivery>, StorageError> {
        self.records.read(&place.delivery(offset))
    }

    /// Stores a delivery in its new state; `before` is the one it had.
    pub(super) fn put_delivery(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        before: Option<&Delivery>,
        now: Delivery,
    ) {
        let (old_due, due) = (before.and_then(Delivery::due_ms), now.due_ms());
        if old_due != due {
            if let Some(due_ms) = old_due {
                self.records.remove(place.alarm(due_ms, offset));
            }
            if let Some(due_ms) = due {
                self.records.put(place.alarm(due_ms, offset), Vec::new());
            }
        }
        match due {
            Some(0) => self.news.freed(),
            Some(due_ms) => self.news.alarm(due_ms),
            None => {}
        }
        self.records.store(place.delivery(offset), &now);
    }

    /// A new delivery, known by its key if it has one.
    pub(super) fn add_delivery(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        delivery: Delivery,
        queue: &mut QueueLeases,
    ) {
        if delivery.key != 0 {
            let key = place.message_key(delivery.key, offset);
            self.records.put(key, Vec::new());
        }
        self.put_delivery(place, offset, None, delivery);
        queue.in_flight += 1;
    }

    /// The message is done.
    pub(super) fn remove_delivery(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        delivery: &Delivery,
        queue: &mut QueueLeases,
    ) -> Result<(), StorageError> {
        if let Some(due_ms) = delivery.due_ms() {
            self.records.remove(place.alarm(due_ms, offset));
        }
        self.records.remove(place.delivery(offset));
        queue.in_flight = queue.in_flight.saturating_sub(1);
        self.news.settled();
        // Room was made where there was none.
        if queue.in_flight + 1 >= super::MAX_IN_FLIGHT {
            self.news.freed();
        }
        if !matches!(delivery.state, DeliveryState::Dead { .. }) {
            self.release_key(place, offset, delivery.key)?;
        }
        Ok(())
    }

    /// The message stands no more in the way of later ones of its key.
    fn release_key(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        key: u64,
    ) -> Result<(), StorageError> {
        if key == 0 {
            return Ok(());
        }
        self.records.remove(place.message_key(key, offset));
        let Some(next) = self.first_of_key(place, key)? else {
            return Ok(());
        };
        if let Some(parked) = self.delivery(place, next)?
            && parked.state == DeliveryState::Parked
        {
            let free = Delivery {
                state: DeliveryState::Free,
                ..parked
            };
            self.put_delivery(place, next, Some(&parked), free);
        }
        Ok(())
    }

    /// The earliest message of a key that is in flight.
    pub(super) fn first_of_key(
        &self,
        place: &Place<'_>,
        key: u64,
    ) -> Result<Option<u64>, StorageError> {
        let found = self.records.scan(&place.of_message_key(key), None, 1)?;
        Ok(found.first().and_then(|(key, _)| last(key)))
    }

    /// The message is delivered no more: it goes to the dead letters, as the next of them.
    pub(super) fn bury(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        delivery: &Delivery,
        reason: DeathReason,
        state: &mut LeaseGroup,
    ) -> Result<(), StorageError> {
        let sequence = state.next_dead;
        state.next_dead += 1;
        let letter = DeadLetter {
            topic: place.topic,
            queue: place.queue,
            offset,
            deliveries: delivery.deliveries,
            reason,
            dead_at_ms: self.now_ms()?,
        };
        self.records
            .store(dead_letter_key(place.group, sequence), &letter);
        let dead = Delivery {
            state: DeliveryState::Dead { sequence },
            ..*delivery
        };
        self.put_delivery(place, offset, Some(delivery), dead);
        self.release_key(place, offset, delivery.key)?;
        self.news.settled();
        self.news.alarm(0);
        Ok(())
    }

    /// Stores the queue's place, and as its committed offset the lowest one that is not done.
    pub(super) fn settle_queue(
        &mut self,
        place: &Place<'_>,
        queue: &QueueLeases,
    ) -> Result<(), StorageError> {
        self.records.store(place.leases(), queue);
        let first = self.records.scan(&place.deliveries(), None, 1)?;
        let lowest = first.first().and_then(|(key, _)| last(key));
        let watermark = lowest.unwrap_or(queue.next).to_be_bytes().to_vec();
        let key = offset_key(place.group, place.topic, place.queue);
        if self.records.get(&key)?.as_ref() != Some(&watermark) {
            self.records.put(key, watermark);
        }
        Ok(())
    }
}
