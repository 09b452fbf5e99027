//! Queue index files that are not what was written.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use quorate_storage::queue_index::{IndexRecord, QueueIndex};

use crate::bounded::BoundedVfs;
use crate::mutate::{Input, corpus, fuzz};

pub const PATH: &str = "/queues/7.idx";

fn open(vfs: &BoundedVfs) -> Option<QueueIndex> {
    QueueIndex::open(Arc::new(vfs.clone()), PATH).ok()
}

fn fields(record: &IndexRecord) -> (u64, u32, u16, u64, u64) {
    let IndexRecord {
        base_offset,
        count,
        batch,
        log_index,
        timestamp_ms,
    } = *record;
    (base_offset, count, batch, log_index, timestamp_ms)
}

/// Puts the checksums of both headers and of every record right.
fn seal(bytes: &mut [u8]) {
    for at in [0, 512] {
        if let Some(slot) = bytes.get_mut(at..at + 64) {
            let crc = crc32c::crc32c(&slot[..60]);
            slot[60..].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let records = bytes.get_mut(1024..).unwrap_or_default();
    for record in records.as_chunks_mut::<40>().0 {
        let crc = crc32c::crc32c(&record[..36]);
        record[36..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Asks everything that can be asked. Damage that is noticed is a good answer.
fn read(index: &QueueIndex) -> Vec<IndexRecord> {
    let (first, end) = (index.first_offset(), index.end_offset());
    assert!(first <= end, "{first}..{end}");
    for offset in [0, first, first.midpoint(end), end, u64::MAX] {
        if let Ok(Some(record)) = index.find(offset) {
            assert!((record.base_offset..record.end_offset()).contains(&offset));
        }
        let _ = index.timestamp_of(offset);
        let _ = index.offset_at_time(offset);
    }
    let _ = index.check();
    let records = index.find_from(first, 10_000).unwrap_or_default();
    for pair in records.windows(2) {
        assert_eq!(pair[0].end_offset(), pair[1].base_offset);
    }
    records
}

/// Goes on with an index as its owner would. Errors are good answers, panics are not.
fn go_on(index: &QueueIndex) {
    let end = index.end_offset();
    let record = IndexRecord {
        base_offset: end,
        count: 3,
        batch: 0,
        log_index: 1,
        timestamp_ms: u64::MAX,
    };
    if end < u64::MAX - 10 && index.append(record).is_ok() {
        assert_eq!(index.find(end).expect("in memory"), Some(record));
    }
    let _ = index.trim_front(index.first_offset().saturating_add(2));
    let _ = index.truncate_to(index.end_offset().saturating_sub(1));
    let _ = index.sync();
}

#[test]
fn indexes_that_lie() {
    let mut written = BTreeSet::new();
    for (_, bytes) in corpus("queue_index") {
        let vfs = BoundedVfs::default();
        vfs.put(Path::new(PATH), &bytes);
        let records = open(&vfs).map(|index| read(&index)).unwrap_or_default();
        written.extend(records.iter().map(fields));
    }
    assert!(written.len() > 20, "the corpus holds records");
    fuzz("queue_index", 1500, |input: &Input| {
        let mut bytes = input.bytes.clone();
        if input.seal {
            seal(&mut bytes);
        }
        let vfs = BoundedVfs::default();
        vfs.put(Path::new(PATH), &bytes);
        let Some(index) = open(&vfs) else { return };
        let records = read(&index);
        let known = |record: &IndexRecord| written.contains(&fields(record));
        assert!(input.seal || records.iter().all(known), "{records:?}");
        go_on(&index);
        let end = index.end_offset();
        let synced = index.sync().is_ok();
        drop(index);
        let again = open(&vfs).expect("what was opened opens again");
        read(&again);
        assert!(!synced || again.report().durable_loss || again.end_offset() == end);
    });
}
