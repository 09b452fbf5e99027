//! Builds the key index of the replicas here, block by block, off the write path.

use std::sync::Arc;
use std::time::Duration;

use quorate_storage::StorageError;
use quorate_storage::batch::BatchView;
use quorate_storage::key_index::{BLOCK_OFFSETS, KeyEntry};
use tokio::time::Instant;

use super::replica::hash_of_key;
use crate::broker::Broker;
use crate::broker::local::LocalQueue;
use crate::broker::read::collect;

/// Between two looks for blocks that became full. A look compares two numbers a queue.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Read at a time; after each it rests as long as it took, so that the disk is left to others.
const PIECE_MESSAGES: usize = 4096;
const PIECE_BYTES: usize = 1 << 20;

impl Broker {
    /// Keeps the key indexes complete, for as long as the node runs.
    pub async fn index_keys(self: Arc<Self>) {
        loop {
            let begun = Instant::now();
            let mut built = false;
            for queue in self.local.queues() {
                if queue.shared.is_closed() || queue.shared.soundness().broken().is_some() {
                    continue;
                }
                match self.index_next_block(&queue).await {
                    Ok(done) => built |= done,
                    // Searches do without; the next look tries again.
                    Err(error) => {
                        tracing::warn!(group = %queue.group.id(), %error, "a block of keys was not built");
                    }
                }
            }
            if !built {
                tokio::time::sleep_until(begun + LOOK_EVERY).await;
            }
        }
    }

    /// One block of one queue; whether there was one to build.
    async fn index_next_block(&self, queue: &Arc<LocalQueue>) -> Result<bool, StorageError> {
        let bounds = queue.shared.bounds();
        queue.keys.trim(bounds.earliest)?;
        let Some(block) = queue.keys.next_to_build(bounds.earliest, bounds.end) else {
            return Ok(false);
        };
        if !self.log.disk_has_room() {
            return Ok(false);
        }
        let until = (block + 1) * BLOCK_OFFSETS;
        let mut offset = bounds.earliest.max(block * BLOCK_OFFSETS);
        let (mut entries, mut last_index) = (Vec::new(), 0);
        while offset < until {
            let begun = Instant::now();
            let reading = queue.clone();
            let piece = move || Piece::read(&reading, offset, until);
            let piece = quorate_raft::blocking::on_pool(piece).await;
            let Ok(piece) = piece.unwrap_or(Err(StorageError::Closed)) else {
                // Trimmed or closed while it was read; whatever else it is, readers tell of it.
                return Ok(false);
            };
            offset = piece.next_offset;
            last_index = last_index.max(piece.last_index);
            entries.extend(piece.entries);
            tokio::time::sleep(begun.elapsed()).await;
        }
        // What was applied when all of it was there.
        let Some(applied) = queue.group.applied().filter(|id| id.index >= last_index) else {
            return Ok(false);
        };
        let (keys, count) = (queue.clone(), entries.len());
        let build = move || keys.keys.build(block, applied, entries);
        let built = quorate_raft::blocking::on_pool(build).await;
        built.unwrap_or(Err(StorageError::Closed))?;
        tracing::debug!(group = %queue.group.id(), block, keys = count, "a block of keys was built");
        Ok(true)
    }
}

/// The keys of some messages in a row.
struct Piece {
    entries: Vec<KeyEntry>,
    next_offset: u64,
    last_index: u64,
}

impl Piece {
    fn read(queue: &LocalQueue, from: u64, until: u64) -> Result<Self, StorageError> {
        let batches = collect(queue, from, PIECE_MESSAGES, PIECE_BYTES)?;
        let mut piece = Self {
            entries: Vec::new(),
            next_offset: from,
            last_index: 0,
        };
        for stored in &batches {
            if stored.place.base_offset > piece.next_offset {
                return Err(StorageError::Closed);
            }
            piece.next_offset = stored.place.base_offset + u64::from(stored.place.count);
            piece.last_index = piece.last_index.max(stored.place.index);
            let Ok(view) = BatchView::parse_trusted(stored.batch.clone()) else {
                continue;
            };
            for (record, offset) in view.records().flatten().zip(stored.place.base_offset..) {
                if let Some(key) = &record.key
                    && (from..until).contains(&offset)
                {
                    let hash = hash_of_key(key);
                    piece.entries.push(KeyEntry { hash, offset });
                }
            }
        }
        match piece.next_offset > from {
            true => Ok(piece),
            false => Err(StorageError::Closed),
        }
    }
}
