//! The broker's own settings.

use std::time::Duration;

/// Bounds of one node's broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerConfig {
    /// Until when a write must have its majority; after it the answer is "unknown", or
    /// "no leader" where nobody has taken the write.
    pub write_timeout: Duration,
    /// Until when a read must have found proof of leadership.
    pub read_timeout: Duration,
    /// How long creating a topic waits for its queues' leaders.
    pub create_timeout: Duration,
    /// Bytes of one batch: one request's messages for one queue.
    pub max_batch_bytes: usize,
    /// Batches stop joining an entry here; a single larger batch still makes an entry.
    pub max_entry_bytes: usize,
    /// While an entry of a queue is on its way, the next one waits until so much has gathered.
    pub pipeline_bytes: usize,
    /// Entries of one queue that are proposed and not yet applied.
    pub max_entries_in_flight: usize,
    /// Bytes waiting to be proposed, per queue and over all queues of this node.
    pub max_queued_bytes_per_queue: usize,
    pub max_queued_bytes: usize,
    /// A queue's batcher ends after this long without work.
    pub batcher_idle: Duration,
    /// Between two looks for messages that their topic keeps no longer.
    pub retention_check: Duration,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            write_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(5),
            create_timeout: Duration::from_secs(10),
            max_batch_bytes: 24 << 20,
            max_entry_bytes: 1 << 20,
            pipeline_bytes: 128 << 10,
            max_entries_in_flight: 16,
            max_queued_bytes_per_queue: 64 << 20,
            max_queued_bytes: 256 << 20,
            batcher_idle: Duration::from_secs(30),
            retention_check: Duration::from_secs(30),
        }
    }
}
