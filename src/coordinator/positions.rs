//! How far the slowest consumer group is in each queue: what a bounded backlog is measured against.

use std::collections::BTreeMap;

use quorate_storage::StorageError;
use quorate_storage::derived::KeyReader;

use super::command::QueueOffset;
use super::membership::{Delivery, GroupStart, Membership};
use super::records::CoordinatorView;
use crate::catalog::TopicId;

/// Records looked at in one go.
const PAGE: usize = 1024;

impl CoordinatorView {
    /// How far the slowest of this coordinator's consumer groups is in each queue of these topics:
    /// what it has committed, or its oldest message that is leased or waits to be. Members that begin
    /// at the earliest message and have committed nothing are at 0. A queue that none has been to is
    /// left out.
    pub fn lowest_offsets(&self, topics: &[TopicId]) -> Result<Vec<QueueOffset>, StorageError> {
        let mut lowest = Lowest::new();
        self.each_of(b"o", topics, &mut lowest, |_, value| {
            Ok(value.try_into().map(u64::from_be_bytes).ok())
        })?;
        self.each_of(b"l", topics, &mut lowest, |key, value| {
            self.oldest_leased(key, value)
        })?;
        for (group, membership) in self.memberships()? {
            for (place, offset) in self.positions_of_members(&group, &membership, topics)? {
                let known = lowest.entry(place).or_insert(offset);
                *known = offset.min(*known);
            }
        }
        let each = lowest.into_iter();
        let offsets = each.map(|((topic, queue), offset)| QueueOffset {
            topic,
            queue,
            offset,
        });
        Ok(offsets.collect())
    }

    /// Where members are that the offsets of their group say nothing of: those of a group that has
    /// committed nothing yet, and those that have offsets of their own.
    fn positions_of_members(
        &self,
        group: &str,
        membership: &Membership,
        topics: &[TopicId],
    ) -> Result<Vec<(Place, u64)>, StorageError> {
        let committed = |offsets: Vec<QueueOffset>| -> Lowest {
            let each = offsets.into_iter();
            each.map(|o| ((o.topic, o.queue), o.offset)).collect()
        };
        let is_asked_for = |place: &Place| topics.contains(&place.0);
        let from_the_start = |starts: GroupStart| starts == GroupStart::Earliest;
        let mut found = Vec::new();
        match membership.delivery {
            Delivery::Cluster => {
                let queues = membership.queues.keys().map(|q| (q.topic, q.queue));
                let queues: Vec<Place> = queues.filter(is_asked_for).collect();
                let mut members = membership.members.values();
                if !queues.is_empty() && members.all(|member| from_the_start(member.start)) {
                    let known = committed(self.offsets(group)?);
                    let fresh = queues.into_iter().filter(|q| !known.contains_key(q));
                    found.extend(fresh.map(|place| (place, 0)));
                }
            }
            Delivery::Broadcast => {
                for member in membership.members.values() {
                    let each = member.topics.iter();
                    let each = each.filter_map(|name| membership.topics.get(name)?.found);
                    let queues =
                        each.flat_map(|(topic, queues)| (0..queues).map(move |q| (topic, q)));
                    let queues: Vec<Place> = queues.filter(is_asked_for).collect();
                    let Some(instance) = &member.instance_id else {
                        continue;
                    };
                    if queues.is_empty() {
                        continue;
                    }
                    let known = committed(self.instance_offsets(group, instance)?);
                    found.extend(queues.into_iter().filter_map(|place| {
                        let at = known.get(&place).copied();
                        let fresh = from_the_start(member.start).then_some(0);
                        Some((place, at.or(fresh)?))
                    }));
                }
            }
        }
        Ok(found)
    }

    /// Goes through the records of one kind that name a group, a topic and a queue.
    fn each_of(
        &self,
        kind: &[u8],
        topics: &[TopicId],
        lowest: &mut Lowest,
        offset: impl Fn(&[u8], &[u8]) -> Result<Option<u64>, StorageError>,
    ) -> Result<(), StorageError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.records.scan_page(kind, after.as_deref(), PAGE)?;
            for (key, value) in &page {
                let Some((topic, queue)) = place(key).filter(|(t, _)| topics.contains(t)) else {
                    continue;
                };
                if let Some(offset) = offset(key, value)? {
                    let known = lowest.entry((topic, queue)).or_insert(offset);
                    *known = offset.min(*known);
                }
            }
            if page.len() < PAGE {
                return Ok(());
            }
            after = page.last().map(|(key, _)| key.to_vec());
        }
    }

    /// Of a group that leases: below its cursor (the first field of the record) all is done but what
    /// has a record of its own, of kind `d`, under the same key and its offset.
    fn oldest_leased(&self, key: &[u8], value: &[u8]) -> Result<Option<u64>, StorageError> {
        let deliveries = [b"d", &key[1..]].concat();
        let first = self.records.scan_page(&deliveries, None, 1)?;
        let first = first.first().and_then(|(found, _)| {
            let offset = found.get(deliveries.len()..)?;
            KeyReader::new(offset).u64()
        });
        let cursor = postcard::take_from_bytes::<u64>(value).ok();
        let cursor = cursor.map(|(cursor, _)| cursor);
        Ok(first.into_iter().chain(cursor).min())
    }
}

/// Topic and queue.
type Place = (TopicId, u32);

/// The queue that a users' group committed an offset for. The server's own groups say by theirs
/// where forwarders are, in other queues.
type Lowest = BTreeMap<Place, u64>;

/// The queue that a record of a group is about.
fn place(key: &[u8]) -> Option<Place> {
    let mut fields = KeyReader::new(key);
    fields.u8()?;
    if fields.bytes()?.starts_with(b"_") {
        return None;
    }
    Some((fields.u64()?, fields.u32()?))
}

#[cfg(test)]
mod tests {
    use quorate_storage::derived::{DerivedStore, KeyBuilder};
    use quorate_storage::{LogId, RaftGroupId};

    use super::super::records::{Records, offset_key};
    use super::*;

    #[test]
    fn the_lowest_of_all_groups_counts_for_each_queue() {
        let store = DerivedStore::in_memory();
        let mut records = Records::new(store.group(RaftGroupId(1)));
        let mut commit = |group: &str, topic, queue, offset: u64| {
            let value = offset.to_be_bytes().to_vec();
            records.put(offset_key(group, topic, queue), value);
        };
        commit("a", 7, 0, 5);
        commit("a\0b", 7, 0, 3);
        commit("c", 7, 1, 9);
        commit("c", 8, 0, 1);
        commit("_exchange.1", 7, 0, 1);
        for n in 0..2 * PAGE as u64 {
            commit(&format!("many-{n}"), 9, 0, 4000 - n);
        }
        // Groups that lease: one with a message that is not done, one without.
        let leases = |kind: u8, group: &str, topic: u64| {
            KeyBuilder::new().u8(kind).text(group).u64(topic).u32(0)
        };
        for (group, topic, cursor) in [("l", 10, 300_u64), ("m", 11, 7)] {
            let value = postcard::to_stdvec(&(cursor, 1_u32)).unwrap();
            records.put(leases(b'l', group, topic).build(), value);
        }
        for offset in [290, 250, 299] {
            records.put(leases(b'd', "l", 10).u64(offset).build(), vec![1]);
        }
        records.commit(LogId::new(1, 1)).unwrap();
        let found = records.view().lowest_offsets(&[7, 9, 10, 11]).unwrap();
        let found: Vec<_> = found.iter().map(|o| (o.topic, o.queue, o.offset)).collect();
        let many = (9, 0, 4001 - 2 * PAGE as u64);
        assert_eq!(
            found,
            [(7, 0, 3), (7, 1, 9), many, (10, 0, 250), (11, 0, 7)]
        );
    }
}
