//! How many bytes of a queue are not consumed.
//!
//! The queue index knows no sizes, so the batches are read once each, in order, when they are about
//! to be judged: mostly from the tail cache, as they were stored a moment ago. A new leader reads
//! what is in its backlog, up to the bound. Neighbours are added up in chunks of a thousandth of the
//! bound; of a batch or chunk that is partly consumed all bytes count.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::local::LocalQueue;
use super::super::read::{collect, unreadable};
use super::super::{BrokerError, BrokerResult};
use crate::peer::StoredBatch;

/// Messages read at a time.
const STEP_MESSAGES: usize = 4096;
const STEP_BYTES: usize = 4 << 20;
const CHUNKS: u64 = 1024;

#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// Measured are the batches from `from` on, up to `until`.
    from: u64,
    until: u64,
    /// (end offset, bytes) in order.
    chunks: VecDeque<(u64, u64)>,
    bytes: u64,
}

impl Sizes {
    /// Forgets what is consumed; begins anew if more counts than before.
    fn begin_at(&mut self, from: u64) {
        if from < self.from || from > self.until {
            *self = Self {
                from,
                until: from,
                ..Self::default()
            };
        }
        self.from = from;
        while let Some((end, bytes)) = self.chunks.front().copied()
            && end <= from
        {
            self.chunks.pop_front();
            self.bytes -= bytes;
        }
    }

    fn extend(&mut self, batches: &[StoredBatch], max_bytes: u64) {
        for batch in batches {
            let end = batch.place.base_offset + u64::from(batch.place.count);
            if end <= self.until {
                continue;
            }
            let bytes = batch.batch.len() as u64;
            self.until = end;
            self.bytes += bytes;
            match self.chunks.back_mut() {
                Some((last, sum)) if *sum + bytes <= max_bytes / CHUNKS => {
                    (*last, *sum) = (end, *sum + bytes);
                }
                _ => self.chunks.push_back((end, bytes)),
            }
        }
    }

    /// The bytes of `from..end`, or as many as are too many. An end never lies before one that was
    /// measured earlier.
    pub(super) fn measure(
        &mut self,
        queue: &LocalQueue,
        from: u64,
        end: u64,
        max_bytes: u64,
    ) -> BrokerResult<u64> {
        self.begin_at(from);
        while self.until < end && self.bytes <= max_bytes {
            let read = collect(queue, self.until, STEP_MESSAGES, STEP_BYTES);
            let batches = read.map_err(|error| unreadable(queue, error))?;
            if batches.is_empty() {
                break;
            }
            // More may have become visible behind the end meanwhile.
            let within = batches.partition_point(|b| b.place.base_offset < end);
            // Trimmed up to the end and beyond it meanwhile: nothing of it counts.
            if within == 0 {
                break;
            }
            self.extend(&batches[..within], max_bytes);
        }
        Ok(self.bytes)
    }
}

/// Measures what lies far behind the end, off the runtime's threads.
pub(super) async fn catch_up(
    queue: &Arc<LocalQueue>,
    from: u64,
    max_bytes: u64,
) -> BrokerResult<()> {
    loop {
        let until = {
            let mut state = queue.backlog.state.lock();
            state.sizes.begin_at(from);
            if state.sizes.bytes > max_bytes {
                return Ok(());
            }
            state.sizes.until
        };
        if queue.shared.bounds().end.saturating_sub(until) <= STEP_MESSAGES as u64 {
            return Ok(());
        }
        let far = queue.clone();
        let read = move || collect(&far, until, STEP_MESSAGES, STEP_BYTES);
        let joined = quorate_raft::blocking::on_pool(read).await;
        let read = joined.map_err(|e| BrokerError::Internal(e.to_string()))?;
        let batches = read.map_err(|error| unreadable(queue, error))?;
        let mut state = queue.backlog.state.lock();
        // Somebody else may have come this far, too.
        if state.sizes.until == until {
            state.sizes.extend(&batches, max_bytes);
        }
        if batches.is_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::broker::batcher::now_ms;
    use crate::broker::queue::{Place, entry};
    use crate::broker::testing::{TestCluster, topic};
    use crate::broker::{NewMessage, ProduceRequest};

    fn stored(base_offset: u64, count: u32, bytes: usize) -> StoredBatch {
        StoredBatch {
            place: Place {
                base_offset,
                count,
                term: 1,
                index: 1,
                batch: 0,
            },
            timestamp_ms: 0,
            batch: vec![0; bytes].into(),
        }
    }

    #[test]
    fn what_is_consumed_no_longer_counts() {
        let mut sizes = Sizes::default();
        let batches: Vec<_> = (0..5).map(|n| stored(n * 2, 2, 100)).collect();
        sizes.extend(&batches, 1000);
        assert_eq!((sizes.bytes, sizes.until), (500, 10));
        sizes.begin_at(3);
        assert_eq!(
            sizes.bytes, 400,
            "a batch counts until all of it is consumed"
        );
        sizes.begin_at(4);
        assert_eq!(sizes.bytes, 300);
        // Read again by somebody else, or rewound.
        sizes.extend(&batches, 1000);
        assert_eq!(sizes.bytes, 300);
        sizes.begin_at(0);
        assert_eq!((sizes.bytes, sizes.until), (0, 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_trimmed_beyond_the_end_counts_for_nothing() {
        let mut cluster = TestCluster::new(1);
        let node = cluster.start_all().await.remove(0);
        let broker = &node.broker;
        broker.create_topic("t", topic(1, 0)).await.unwrap();
        for _ in 0..5 {
            let request = ProduceRequest {
                topic: "t".to_owned(),
                messages: vec![NewMessage::default()],
                producer: None,
                idempotency_key: None,
            };
            broker.produce(request).await.unwrap();
        }
        let queue = broker.local.queues().remove(0);
        let (group, timeout) = (queue.group.id().0, broker.config.write_timeout);
        let trimmed = broker.propose_here(group, entry::trim(now_ms(), 4), timeout);
        trimmed.await.unwrap();
        // As read before the trim.
        let (measured, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let bytes = Sizes::default().measure(&queue, 0, 3, 1 << 20);
            measured.send(bytes).ok();
        });
        let bytes = told.recv_timeout(Duration::from_secs(20));
        assert_eq!(bytes.expect("it ends").unwrap(), 0);
    }

    #[test]
    fn many_small_batches_take_little_memory() {
        let mut sizes = Sizes::default();
        let max_bytes = 1 << 20;
        let batches: Vec<_> = (0..10_000).map(|n| stored(n, 1, 100)).collect();
        sizes.extend(&batches, max_bytes);
        assert_eq!(sizes.bytes, 1_000_000);
        assert!(
            sizes.chunks.len() <= CHUNKS as usize * 2,
            "{}",
            sizes.chunks.len()
        );
        sizes.begin_at(5_000);
        let exact = 500_000;
        let more = sizes.bytes - exact;
        assert!(more <= max_bytes / CHUNKS, "{more}");
    }
}
