//! Keeps the tail cache within its bound: what was written first is forgotten first.

use std::collections::VecDeque;
use std::sync::Arc;

use super::group::{CacheSize, Group};

/// Below this many remembered calls a sweep is not worth it.
const SWEEP_FLOOR: usize = 1024;

/// The written calls whose entries may still be cached, oldest first. Owned by the writer.
#[derive(Debug)]
pub(super) struct Evictor {
    limit: usize,
    calls: VecDeque<(Arc<Group>, u64)>,
    /// Length at which calls whose entries are gone anyway are swept out.
    sweep_at: usize,
}

impl Evictor {
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            calls: VecDeque::new(),
            sweep_at: SWEEP_FLOOR,
        }
    }

    /// The group's call `seq` is encoded; it may be evicted from the next `shrink` on.
    pub fn written(&mut self, group: Arc<Group>, seq: u64) {
        self.calls.push_back((group, seq));
    }

    /// Evicts until the cache is within its bound. Everything remembered must be written.
    pub fn shrink(&mut self, size: &CacheSize) {
        while size.bytes() > self.limit
            && let Some((group, seq)) = self.calls.pop_front()
        {
            size.evicted(group.evict(seq));
        }
        if self.calls.len() >= self.sweep_at {
            self.calls.retain(|(group, seq)| group.caches(*seq));
            self.sweep_at = (self.calls.len() * 2).max(SWEEP_FLOOR);
        }
    }
}
