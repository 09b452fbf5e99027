//! How far the slowest consumer group is in each queue: what a bounded backlog is measured against.

use std::collections::BTreeMap;

use quorate_storage::StorageError;
use quorate_storage::derived::KeyReader;

use super::command::QueueOffset;
use super::records::CoordinatorView;
use crate::catalog::TopicId;

/// Records looked at in one go.
const PAGE: usize = 1024;

impl CoordinatorView {
    /// The lowest committed offset of any of this coordinator's consumer groups in each queue of
    /// these topics. A queue for which none has committed is left out.
    pub fn lowest_offsets(&self, topics: &[TopicId]) -> Result<Vec<QueueOffset>, StorageError> {
        let mut lowest: BTreeMap<(TopicId, u32), u64> = BTreeMap::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.records.scan_page(b"o", after.as_deref(), PAGE)?;
            for (key, value) in &page {
                let Some((topic, queue)) = place(key) else {
                    continue;
                };
                let Ok(offset) = value[..].try_into().map(u64::from_be_bytes) else {
                    continue;
                };
                if topics.contains(&topic) {
                    let known = lowest.entry((topic, queue)).or_insert(offset);
                    *known = offset.min(*known);
                }
            }
            if page.len() < PAGE {
                break;
            }
            after = page.last().map(|(key, _)| key.to_vec());
        }
        let each = lowest.into_iter();
        let offsets = each.map(|((topic, queue), offset)| QueueOffset {
            topic,
            queue,
            offset,
        });
        Ok(offsets.collect())
    }
}

/// The queue that a committed offset is for.
fn place(key: &[u8]) -> Option<(TopicId, u32)> {
    let mut fields = KeyReader::new(key);
    fields.u8()?;
    fields.bytes()?;
    Some((fields.u64()?, fields.u32()?))
}

#[cfg(test)]
mod tests {
    use quorate_storage::derived::DerivedStore;
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
        for n in 0..2 * PAGE as u64 {
            commit(&format!("many-{n}"), 9, 0, 4000 - n);
        }
        records.commit(LogId::new(1, 1)).unwrap();
        let found = records.view().lowest_offsets(&[7, 9]).unwrap();
        let found: Vec<_> = found.iter().map(|o| (o.topic, o.queue, o.offset)).collect();
        assert_eq!(
            found,
            [(7, 0, 3), (7, 1, 9), (9, 0, 4001 - 2 * PAGE as u64)]
        );
    }
}
