//! What becomes of leases: ack, nack, extend, expiry, death, and a group that goes elsewhere.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use quorate_storage::StorageError;
use quorate_storage::mutation::{self, Mutation};

use super::command::{DeathReason, LeaseReply, Receipt, ReceiptVerdict};
use super::records::{
    Delivery, DeliveryState, LeaseGroup, Place, QueueLeases, dead_letter_key, last, last_two,
    leases_of_key, of_group, of_topic,
};
use super::{EXPIRE_AT_ONCE, REMOVE_AT_ONCE};
use crate::catalog::TopicId;
use crate::coordinator::QueueOffset;
use crate::coordinator::machine::CoordinatorMachine;
use crate::coordinator::records::offset_key;

type Touched = BTreeMap<(TopicId, u32), QueueLeases>;

fn place_of<'a>(group: &'a str, receipt: &Receipt) -> Place<'a> {
    Place {
        group,
        topic: receipt.topic,
        queue: receipt.queue,
    }
}

impl CoordinatorMachine {
    /// The queue's place, from what this command has changed already or from the records.
    fn touch<'t>(
        &self,
        place: &Place<'_>,
        touched: &'t mut Touched,
    ) -> Result<Option<&'t mut QueueLeases>, StorageError> {
        Ok(match touched.entry((place.topic, place.queue)) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(new) => self.queue_leases(place)?.map(|queue| new.insert(queue)),
        })
    }

    fn settle_touched(&mut self, group: &str, touched: &Touched) -> Result<(), StorageError> {
        for ((topic, queue), leases) in touched {
            let place = Place {
                group,
                topic: *topic,
                queue: *queue,
            };
            self.settle_queue(&place, leases)?;
        }
        Ok(())
    }

    pub(super) fn ack(
        &mut self,
        group: &str,
        receipts: &[Receipt],
        through: Option<&Receipt>,
    ) -> Result<Vec<ReceiptVerdict>, StorageError> {
        let mut touched = Touched::new();
        let mut verdicts = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            verdicts.push(self.ack_one(&place_of(group, receipt), receipt, &mut touched)?);
        }
        if let Some(receipt) = through {
            let place = place_of(group, receipt);
            verdicts.push(self.ack_through(&place, receipt, &mut touched)?);
        }
        self.settle_touched(group, &touched)?;
        Ok(verdicts)
    }

    fn ack_one(
        &mut self,
        place: &Place<'_>,
        receipt: &Receipt,
        touched: &mut Touched,
    ) -> Result<ReceiptVerdict, StorageError> {
        let Some(queue) = self.touch(place, touched)? else {
            return Ok(ReceiptVerdict::Ended);
        };
        match self.delivery(place, receipt.offset)? {
            // It is done: most likely this receipt did it.
            None if receipt.offset < queue.next => Ok(ReceiptVerdict::Done),
            Some(delivery)
                if (delivery.token == receipt.token || mutation::on(Mutation::AckOfAnyLease))
                    && !matches!(delivery.state, DeliveryState::Dead { .. }) =>
            {
                if !mutation::on(Mutation::ForgetAcks) {
                    self.remove_delivery(place, receipt.offset, &delivery, queue)?;
                }
                Ok(ReceiptVerdict::Done)
            }
            _ => Ok(ReceiptVerdict::Ended),
        }
    }

    fn ack_through(
        &mut self,
        place: &Place<'_>,
        receipt: &Receipt,
        touched: &mut Touched,
    ) -> Result<ReceiptVerdict, StorageError> {
        // The last one itself, under the rules for a single one.
        let known = self.delivery(place, receipt.offset)?.is_some();
        let own = self.ack_one(place, receipt, touched)?;
        let Some(queue) = self.touch(place, touched)? else {
            return Ok(ReceiptVerdict::Ended);
        };
        let mut acked = u32::from(known && own == ReceiptVerdict::Done);
        let in_flight = self.records.scan(&place.deliveries(), None, usize::MAX)?;
        for (key, value) in in_flight {
            let Some(offset) = last(&key).filter(|offset| *offset < receipt.offset) else {
                break;
            };
            let Ok(delivery) = postcard::from_bytes::<Delivery>(&value) else {
                continue;
            };
            let held = matches!(
                delivery.state,
                DeliveryState::Leased { .. } | DeliveryState::Free
            );
            if held && delivery.token != 0 && delivery.consumer == receipt.consumer {
                self.remove_delivery(place, offset, &delivery, queue)?;
                acked += 1;
            }
        }
        match own {
            ReceiptVerdict::Ended if acked == 0 => Ok(ReceiptVerdict::Ended),
            _ => Ok(ReceiptVerdict::Acked(acked)),
        }
    }

    pub(super) fn nack(
        &mut self,
        group: &str,
        receipts: &[Receipt],
        delay_ms: Option<u64>,
        state: &mut LeaseGroup,
    ) -> Result<Vec<ReceiptVerdict>, StorageError> {
        let now_ms = self.now_ms()?;
        let mut verdicts = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            let place = place_of(group, receipt);
            let delivery = self.delivery(&place, receipt.offset)?;
            let Some(delivery) = delivery.filter(|d| d.token == receipt.token) else {
                verdicts.push(ReceiptVerdict::Ended);
                continue;
            };
            verdicts.push(ReceiptVerdict::Done);
            match delivery.state {
                // Nacked before.
                DeliveryState::Waiting { .. }
                | DeliveryState::Parked
                | DeliveryState::Dead { .. } => {}
                _ if delivery.deliveries >= state.policy.max_deliveries => {
                    let reason = DeathReason::Nacked;
                    self.bury(&place, receipt.offset, &delivery, reason, state)?;
                }
                _ => {
                    let backoff_ms = state.policy.backoff_ms(delivery.deliveries);
                    let wait_ms = delay_ms.unwrap_or(backoff_ms);
                    let due_ms = now_ms.saturating_add(wait_ms).max(1);
                    let waiting = Delivery {
                        state: DeliveryState::Waiting { due_ms },
                        ..delivery
                    };
                    self.put_delivery(&place, receipt.offset, Some(&delivery), waiting);
                    // Whoever waits must know the new time.
                    self.news.freed();
                }
            }
        }
        Ok(verdicts)
    }

    pub(super) fn extend(
        &mut self,
        group: &str,
        receipts: &[Receipt],
        lease_ms: u64,
    ) -> Result<Vec<ReceiptVerdict>, StorageError> {
        let until_ms = self.now_ms()?.saturating_add(lease_ms).max(1);
        let mut verdicts = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            let place = place_of(group, receipt);
            let held = self.delivery(&place, receipt.offset)?.filter(|delivery| {
                delivery.token == receipt.token
                    && matches!(
                        delivery.state,
                        DeliveryState::Leased { .. } | DeliveryState::Free
                    )
            });
            let Some(delivery) = held else {
                verdicts.push(ReceiptVerdict::Ended);
                continue;
            };
            let leased = Delivery {
                state: DeliveryState::Leased { until_ms },
                ..delivery
            };
            self.put_delivery(&place, receipt.offset, Some(&delivery), leased);
            // It may end earlier than before.
            self.news.freed();
            verdicts.push(ReceiptVerdict::Done);
        }
        Ok(verdicts)
    }

    /// What is overdue needs no time any more: it is free, or dead after its last delivery.
    pub(super) fn expire(
        &mut self,
        group: &str,
        state: &mut LeaseGroup,
    ) -> Result<LeaseReply, StorageError> {
        let now_ms = self.now_ms()?;
        let mut left = EXPIRE_AT_ONCE;
        let queues = self
            .records
            .scan(&of_group(b'l', group), None, usize::MAX)?;
        for (key, _) in queues {
            let Some((_, topic, queue)) = leases_of_key(&key) else {
                continue;
            };
            let place = Place {
                group,
                topic,
                queue,
            };
            let overdue = self.overdue(&place, now_ms, left)?;
            for (offset, delivery) in &overdue {
                let state_now = match delivery.state {
                    DeliveryState::Waiting { .. } => DeliveryState::Waiting { due_ms: 0 },
                    _ if delivery.deliveries >= state.policy.max_deliveries => {
                        let reason = DeathReason::LeaseExpired;
                        self.bury(&place, *offset, delivery, reason, state)?;
                        continue;
                    }
                    _ => DeliveryState::Free,
                };
                let free = Delivery {
                    state: state_now,
                    ..*delivery
                };
                self.put_delivery(&place, *offset, Some(delivery), free);
            }
            left -= overdue.len();
            if left == 0 {
                return Ok(LeaseReply::More);
            }
        }
        Ok(LeaseReply::Done)
    }

    fn overdue(
        &self,
        place: &Place<'_>,
        now_ms: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Delivery)>, StorageError> {
        let looked_at = place.alarm(0, u64::MAX);
        let alarms = self
            .records
            .scan(&place.alarms(), Some(&looked_at), limit)?;
        let mut overdue = Vec::new();
        for (key, _) in alarms {
            let Some((due_ms, offset)) = last_two(&key).filter(|(due_ms, _)| *due_ms <= now_ms)
            else {
                break;
            };
            match self.delivery(place, offset)? {
                Some(delivery) if delivery.due_ms() == Some(due_ms) => {
                    overdue.push((offset, delivery));
                }
                _ => {}
            }
        }
        Ok(overdue)
    }

    pub(super) fn dead_lettered(
        &mut self,
        group: &str,
        through: u64,
    ) -> Result<LeaseReply, StorageError> {
        let mut touched = Touched::new();
        // Their numbers have no gaps: the oldest one says how many there are.
        let oldest = self.records.scan(&of_group(b'x', group), None, 1)?;
        let Some(oldest) = oldest.first().and_then(|(key, _)| last(key)) else {
            return Ok(LeaseReply::Done);
        };
        let said = through.saturating_add(1).saturating_sub(oldest);
        let count = usize::try_from(said).map_or(EXPIRE_AT_ONCE, |said| said.min(EXPIRE_AT_ONCE));
        let letters = self.records.scan(&of_group(b'x', group), None, count)?;
        for (key, value) in letters {
            let Some(sequence) = last(&key).filter(|sequence| *sequence <= through) else {
                break;
            };
            self.records.remove(dead_letter_key(group, sequence));
            let Ok(letter) = postcard::from_bytes::<super::DeadLetter>(&value) else {
                continue;
            };
            let place = Place {
                group,
                topic: letter.topic,
                queue: letter.queue,
            };
            let dead = DeliveryState::Dead { sequence };
            if let Some(delivery) = self.delivery(&place, letter.offset)?
                && delivery.state == dead
                && let Some(queue) = self.touch(&place, &mut touched)?
            {
                self.remove_delivery(&place, letter.offset, &delivery, queue)?;
            }
        }
        self.settle_touched(group, &touched)?;
        Ok(match said > EXPIRE_AT_ONCE as u64 {
            true => LeaseReply::More,
            false => LeaseReply::Done,
        })
    }

    /// Removes what the group has of its queues until `limit` records are gone, and says how many are. A
    /// queue goes whole: keys and deliveries that outlive its cursor would stand in the way for ever.
    pub(in crate::coordinator) fn forget_leased_queues(
        &mut self,
        group: &str,
        limit: usize,
    ) -> Result<usize, StorageError> {
        let mut removed = 0;
        for (key, _) in self.records.scan(&of_group(b'l', group), None, limit)? {
            if removed >= limit {
                break;
            }
            let Some((_, topic, queue)) = leases_of_key(&key) else {
                continue;
            };
            let place = Place {
                group,
                topic,
                queue,
            };
            removed += self.remove_in_flight(&place)? + 2;
            self.records.remove(offset_key(group, topic, queue));
            self.records.remove(key);
        }
        Ok(removed)
    }

    /// Removes all deliveries of a queue with their order, and says how many records that were.
    fn remove_in_flight(&mut self, place: &Place<'_>) -> Result<usize, StorageError> {
        let deliveries = self.remove_some(&place.deliveries(), usize::MAX)?;
        Ok(deliveries + self.remove_some(&place.order(), usize::MAX)?)
    }

    /// Removes up to `limit` records, and says how many.
    fn remove_some(&mut self, prefix: &[u8], limit: usize) -> Result<usize, StorageError> {
        let found = self.records.scan(prefix, None, limit)?;
        let count = found.len();
        for (key, _) in found {
            self.records.remove(key);
        }
        Ok(count)
    }

    /// Dead letters stay: what is dead goes to its topic wherever the group goes on. A queue's
    /// deliveries go with its cursor, all at once; queues with many, one in each command.
    pub(super) fn seek(
        &mut self,
        group: &str,
        offsets: &[QueueOffset],
    ) -> Result<LeaseReply, StorageError> {
        let (mut removed, mut queues) = (0, 0);
        for to in offsets {
            if removed >= REMOVE_AT_ONCE {
                break;
            }
            queues += 1;
            let place = Place {
                group,
                topic: to.topic,
                queue: to.queue,
            };
            removed += self.remove_in_flight(&place)?;
            let queue = QueueLeases {
                next: to.offset,
                in_flight: 0,
            };
            self.settle_queue(&place, &queue)?;
        }
        self.news.freed();
        Ok(LeaseReply::Sought { queues })
    }

    /// The queues go last: as long as one is left, the topic is known as one to forget.
    pub(super) fn forget_topic(
        &mut self,
        group: &str,
        topic: TopicId,
    ) -> Result<LeaseReply, StorageError> {
        let mut left = REMOVE_AT_ONCE;
        for kind in *b"adol" {
            left -= self.remove_some(&of_topic(kind, group, topic), left)?;
            if left == 0 {
                return Ok(LeaseReply::More);
            }
        }
        Ok(LeaseReply::Done)
    }
}
