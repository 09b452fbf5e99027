//! What the coordinator's leader reads of leases, beside apply. Apply looks again.

use std::collections::BTreeSet;

use quorate_storage::StorageError;
use quorate_storage::derived::DerivedGroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::command::Receipt;
use super::records::{
    DeadLetter, Delivery, DeliveryState, LeaseGroup, Place, QueueLeases, dead_letter_key, last,
    last_two, lease_group_key, leases_of_key, of_group,
};
use crate::catalog::TopicId;
use crate::coordinator::CoordinatorView;
use crate::coordinator::records::offset_key;

/// A message that can be leased again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DueDelivery {
    pub due_ms: u64,
    pub offset: u64,
    pub deliveries: u32,
}

/// What of one queue a group has in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseCounts {
    pub topic: TopicId,
    pub queue: u32,
    /// The lowest offset that is not done.
    pub offset: u64,
    /// The first offset never looked at.
    pub next: u64,
    /// With consumers.
    pub leased: u32,
    /// To be delivered: nacked, their leases over, or behind another message of their key.
    pub waiting: u32,
    /// On their way to the topic of dead letters.
    pub dead: u32,
}

fn read<T: DeserializeOwned>(
    records: &DerivedGroup,
    key: &[u8],
) -> Result<Option<T>, StorageError> {
    let stored = records.get(key)?;
    Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
}

impl CoordinatorView {
    pub fn lease_group(&self, group: &str) -> Result<Option<LeaseGroup>, StorageError> {
        read(&self.records, &lease_group_key(group))
    }

    pub fn queue_leases(
        &self,
        group: &str,
        topic: TopicId,
        queue: u32,
    ) -> Result<Option<QueueLeases>, StorageError> {
        let place = Place {
            group,
            topic,
            queue,
        };
        read(&self.records, &place.leases())
    }

    /// What can be leased again at `now_ms`, in the order in which it became so, behind `after`.
    pub fn due(
        &self,
        group: &str,
        topic: TopicId,
        queue: u32,
        now_ms: u64,
        after: Option<DueDelivery>,
        limit: usize,
    ) -> Result<Vec<DueDelivery>, StorageError> {
        let place = Place {
            group,
            topic,
            queue,
        };
        let after = after.map(|last| place.alarm(last.due_ms, last.offset));
        let alarms = self
            .records
            .scan_page(&place.alarms(), after.as_deref(), limit)?;
        let mut due = Vec::new();
        for (key, _) in alarms {
            let Some((due_ms, offset)) = last_two(&key).filter(|(due_ms, _)| *due_ms <= now_ms)
            else {
                break;
            };
            if let Some(delivery) = read::<Delivery>(&self.records, &place.delivery(offset))? {
                due.push(DueDelivery {
                    due_ms,
                    offset,
                    deliveries: delivery.deliveries,
                });
            }
        }
        Ok(due)
    }

    /// When the queue's next message in flight can be leased again, after `now_ms`.
    pub fn next_due_ms(
        &self,
        group: &str,
        topic: TopicId,
        queue: u32,
        now_ms: u64,
    ) -> Result<Option<u64>, StorageError> {
        self.first_alarm(group, topic, queue, Some((now_ms, u64::MAX)))
    }

    fn first_alarm(
        &self,
        group: &str,
        topic: TopicId,
        queue: u32,
        after: Option<(u64, u64)>,
    ) -> Result<Option<u64>, StorageError> {
        let place = Place {
            group,
            topic,
            queue,
        };
        let after = after.map(|(due_ms, offset)| place.alarm(due_ms, offset));
        let first = self
            .records
            .scan_page(&place.alarms(), after.as_deref(), 1)?;
        let due = first.first().and_then(|(key, _)| last_two(key));
        Ok(due.map(|(due_ms, _)| due_ms))
    }

    /// Whether a message of this key is in flight.
    pub fn is_key_busy(
        &self,
        group: &str,
        topic: TopicId,
        queue: u32,
        key: u64,
    ) -> Result<bool, StorageError> {
        let place = Place {
            group,
            topic,
            queue,
        };
        let found = self
            .records
            .scan_page(&place.of_message_key(key), None, 1)?;
        Ok(!found.is_empty())
    }

    /// Whether the lease that this receipt is of lasts.
    pub fn is_held(
        &self,
        group: &str,
        receipt: &Receipt,
        now_ms: u64,
    ) -> Result<bool, StorageError> {
        let place = Place {
            group,
            topic: receipt.topic,
            queue: receipt.queue,
        };
        let delivery = read::<Delivery>(&self.records, &place.delivery(receipt.offset))?;
        Ok(delivery.is_some_and(|delivery| {
            delivery.token == receipt.token
                && matches!(delivery.state, DeliveryState::Leased { until_ms } if until_ms > now_ms)
        }))
    }

    /// Every queue that some group leases from.
    pub fn leased_queues(&self) -> Result<Vec<(String, TopicId, u32)>, StorageError> {
        let found = self.records.scan(b"l")?.into_iter();
        Ok(found.filter_map(|(key, _)| leases_of_key(&key)).collect())
    }

    /// The groups that have something to look at by `now_ms`, and when the next one has.
    pub fn overdue_groups(
        &self,
        now_ms: u64,
    ) -> Result<(BTreeSet<String>, Option<u64>), StorageError> {
        let (mut overdue, mut next) = (BTreeSet::new(), None::<u64>);
        for (group, topic, queue) in self.leased_queues()? {
            // What was looked at before has no time any more.
            let looked_at = Some((0, u64::MAX));
            match self.first_alarm(&group, topic, queue, looked_at)? {
                Some(due_ms) if due_ms <= now_ms => drop(overdue.insert(group)),
                Some(due_ms) => next = Some(next.map_or(due_ms, |known| known.min(due_ms))),
                None => {}
            }
        }
        Ok((overdue, next))
    }

    /// The groups with dead letters that are not in their topic yet.
    pub fn groups_with_dead_letters(&self) -> Result<Vec<String>, StorageError> {
        let mut groups = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let found = self.records.scan_page(b"x", after.as_deref(), 1)?;
            let Some((key, _)) = found.first() else {
                return Ok(groups);
            };
            let mut fields = quorate_storage::derived::KeyReader::new(&key[1..]);
            let Some(group) = fields.text() else {
                return Ok(groups);
            };
            after = Some(dead_letter_key(&group, u64::MAX));
            groups.push(group);
        }
    }

    /// A group's oldest dead letters, with their numbers.
    pub fn dead_letters(
        &self,
        group: &str,
        limit: usize,
    ) -> Result<Vec<(u64, DeadLetter)>, StorageError> {
        let found = self
            .records
            .scan_page(&of_group(b'x', group), None, limit)?;
        let letters = found.iter().filter_map(|(key, value)| {
            let letter = postcard::from_bytes(value).ok()?;
            Some((last(key)?, letter))
        });
        Ok(letters.collect())
    }

    /// What a group that leases has in flight, by queue.
    pub fn lease_counts(&self, group: &str) -> Result<Vec<LeaseCounts>, StorageError> {
        let mut counts = Vec::new();
        for (key, value) in self.records.scan(&of_group(b'l', group))? {
            let place = leases_of_key(&key);
            let leases = postcard::from_bytes::<QueueLeases>(&value).ok();
            let (Some((_, topic, queue)), Some(leases)) = (place, leases) else {
                continue;
            };
            let place = Place {
                group,
                topic,
                queue,
            };
            let committed = self.records.get(&offset_key(group, topic, queue))?;
            let committed = committed.and_then(|value| value[..].try_into().ok());
            let mut count = LeaseCounts {
                topic,
                queue,
                offset: committed.map_or(leases.next, u64::from_be_bytes),
                next: leases.next,
                leased: 0,
                waiting: 0,
                dead: 0,
            };
            for (_, value) in self.records.scan(&place.deliveries())? {
                match postcard::from_bytes::<Delivery>(&value).map(|d| d.state) {
                    Ok(DeliveryState::Leased { .. }) => count.leased += 1,
                    Ok(DeliveryState::Dead { .. }) => count.dead += 1,
                    Ok(_) => count.waiting += 1,
                    Err(_) => {}
                }
            }
            counts.push(count);
        }
        Ok(counts)
    }
}
