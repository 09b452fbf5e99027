//! Retention: what a topic keeps no longer goes, from the front of each queue.
//!
//! A queue's leader decides by its clock and the topic's policy, and proposes a trim; applied, it
//! moves the queue's beginning on every replica. Then each replica purges its log up to a checkpoint
//! by itself, and the cleaner removes the segments that nothing needs any more.
//!
//! A look at a queue reads its index alone: no group is woken unless something can go.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use quorate_storage::StorageError;
use tokio::time::MissedTickBehavior;

use super::batcher::now_ms;
use super::local::LocalQueue;
use super::queue::{QueueBounds, SizeTable, entry};
use super::{Broker, Retention};

/// Trims and purges under way at the same time.
const AT_ONCE: usize = 16;

/// What was found at the last look, by Raft group.
type Known = HashMap<u64, Look>;

/// What of one queue need not be looked up again.
#[derive(Debug, Clone, Copy, Default)]
struct Look {
    /// The queue's beginning, and when the message there became visible.
    oldest: Option<(u64, u64)>,
    /// The beginning for which the log was last purged.
    purged_for: u64,
    /// What was applied when that was last tried.
    tried_at: Option<u64>,
}

impl Look {
    /// Whether something of the log may have become free. Where nothing is visible, that can be what
    /// was held and is cancelled or rolled back: the beginning does not move for it.
    fn wants_purge(&self, bounds: QueueBounds, applied: Option<u64>) -> bool {
        let is_empty = bounds.earliest == bounds.end;
        bounds.earliest != self.purged_for || (is_empty && applied != self.tried_at)
    }
}

/// Whether a message of that age is to go.
fn is_over(retention: &Retention, stored_ms: u64, now_ms: u64) -> bool {
    let age = now_ms.saturating_sub(stored_ms);
    retention.max_age_ms.is_some_and(|max| age > max)
}

/// The offset that a queue is to begin with for its size, if it is too large.
fn cut_for_bytes(retention: &Retention, sizes: &SizeTable, bounds: QueueBounds) -> Option<u64> {
    let max_bytes = retention.max_bytes?;
    let retained = sizes.retained(bounds.earliest, bounds.end);
    (retained > max_bytes)
        .then(|| sizes.first_within(max_bytes))
        .flatten()
}

/// Where a queue is to begin, if that is further on than where it does.
fn trim_to(bounds: QueueBounds, for_age: Option<u64>, for_bytes: Option<u64>) -> Option<u64> {
    let wanted = for_age.max(for_bytes)?.min(bounds.end);
    (wanted > bounds.earliest).then_some(wanted)
}

impl Broker {
    /// Has the queues here keep what their topics say, for as long as the node runs.
    pub async fn enforce_retention(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.config.retention_check);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = Known::new();
        loop {
            ticks.tick().await;
            let mut queues = self.local.queues();
            queues.sort_by_key(|queue| queue.group.id());
            known.retain(|group, _| self.local.queue(*group).is_some());
            self.trim_queues(&queues, &mut known).await;
            purge_queues(&queues, &mut known).await;
        }
    }

    async fn trim_queues(&self, queues: &[Arc<LocalQueue>], known: &mut Known) {
        let catalog = self.catalog();
        let placements = catalog.topics.values().flat_map(|topic| {
            let groups = topic.queues.iter().map(|placement| placement.group);
            groups.map(|group| (group, topic.config.retention))
        });
        let policies: HashMap<u64, Retention> = placements.collect();
        let mut trims = Vec::new();
        for queue in queues.iter().filter(|queue| queue.group.is_leader()) {
            let group = queue.group.id().0;
            let Some(policy) = policies.get(&group) else {
                continue;
            };
            match look(queue, policy, known.entry(group).or_default(), now_ms()) {
                Ok(Some(to)) => trims.push((group, to)),
                Ok(None) => {}
                // Whoever reads the queue finds the same, and has the index mended.
                Err(error) => tracing::warn!(group, %error, "retention cannot look at a queue"),
            }
        }
        let trim = |(group, to)| async move {
            let body = entry::trim(now_ms(), to);
            let timeout = self.config.write_timeout;
            match self.propose_here(group, body, timeout).await {
                Ok(_) => tracing::debug!(group, earliest_offset = to, "queue trimmed"),
                // The next look, here or at the new leader, finds it again.
                Err(error) => tracing::debug!(group, ?error, "queue not trimmed yet"),
            }
        };
        stream::iter(trims).for_each_concurrent(AT_ONCE, trim).await;
    }
}

/// Decides from the index alone whether something can go.
fn look(
    queue: &LocalQueue,
    policy: &Retention,
    look: &mut Look,
    now_ms: u64,
) -> Result<Option<u64>, StorageError> {
    let bounds = queue.shared.bounds();
    if bounds.earliest >= bounds.end || queue.shared.soundness().broken().is_some() {
        return Ok(None);
    }
    let index = queue.shared.index();
    let mut for_age = None;
    if let Some(max_age_ms) = policy.max_age_ms {
        if look
            .oldest
            .is_none_or(|(offset, _)| offset != bounds.earliest)
        {
            let stored_ms = index.timestamp_of(bounds.earliest)?;
            look.oldest = stored_ms.map(|ms| (bounds.earliest, ms));
        }
        let over = |(_, stored_ms)| is_over(policy, stored_ms, now_ms);
        if look.oldest.is_some_and(over) {
            let kept_from = index.offset_at_time(now_ms.saturating_sub(max_age_ms))?;
            for_age = Some(kept_from.unwrap_or(bounds.end));
        }
    }
    let for_bytes = match policy.max_bytes {
        Some(_) => cut_for_bytes(policy, &queue.shared.sizes(), bounds),
        None => None,
    };
    Ok(trim_to(bounds, for_age, for_bytes))
}

/// Purges the logs of queues that were trimmed since the last time, or before this node started, and
/// of those that show nothing.
async fn purge_queues(queues: &[Arc<LocalQueue>], known: &mut Known) {
    let wanted = queues.iter().filter_map(|queue| {
        let bounds = queue.shared.bounds();
        let applied = queue.group.applied().map(|id| id.index);
        let look = known.entry(queue.group.id().0).or_default();
        let wanted = look.wants_purge(bounds, applied);
        wanted.then_some((queue, bounds.earliest, applied))
    });
    let purges = wanted.map(|(queue, earliest, applied)| async move {
        let group = queue.group.id().0;
        match queue.group.purge().await {
            // What is held keeps the log, and goes without the beginning moving.
            Ok(_) if queue.shared.held().batches > 0 => Some((group, None, applied)),
            Ok(_) => Some((group, Some(earliest), applied)),
            Err(StorageError::Closed) => None,
            Err(error) => {
                tracing::warn!(group, %error, "a queue's log is not purged");
                None
            }
        }
    });
    let purges: Vec<_> = purges.collect();
    let mut done = stream::iter(purges).buffer_unordered(AT_ONCE);
    while let Some(purged) = done.next().await {
        if let Some((group, earliest, applied)) = purged {
            let look = known.entry(group).or_default();
            look.purged_for = earliest.unwrap_or(look.purged_for);
            look.tried_at = applied;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: QueueBounds = QueueBounds {
        earliest: 10,
        end: 20,
    };

    #[test]
    fn age_counts_from_the_time_of_storing_and_null_is_for_ever() {
        let keep = |max_age_ms| Retention {
            max_age_ms,
            max_bytes: None,
        };
        assert!(!is_over(&keep(Some(100)), 1_000, 1_100));
        assert!(is_over(&keep(Some(100)), 1_000, 1_101));
        assert!(!is_over(&keep(Some(100)), 1_000, 0), "a clock behind");
        assert!(!is_over(&keep(None), 0, u64::MAX));
    }

    #[test]
    fn a_purge_is_tried_after_each_trim_and_of_what_shows_nothing_after_each_entry() {
        let tried = Look {
            purged_for: 10,
            tried_at: Some(7),
            ..Look::default()
        };
        assert!(!tried.wants_purge(BOUNDS, Some(8)));
        let trimmed = QueueBounds {
            earliest: 11,
            ..BOUNDS
        };
        assert!(tried.wants_purge(trimmed, Some(8)));
        let empty = QueueBounds {
            earliest: 10,
            end: 10,
        };
        assert!(tried.wants_purge(empty, Some(8)), "cancelled meanwhile");
        assert!(!tried.wants_purge(empty, Some(7)), "nothing happened");
    }

    #[test]
    fn the_stricter_rule_counts_and_nothing_goes_back_or_beyond_the_end() {
        assert_eq!(trim_to(BOUNDS, None, None), None);
        assert_eq!(trim_to(BOUNDS, Some(12), Some(15)), Some(15));
        assert_eq!(trim_to(BOUNDS, Some(12), None), Some(12));
        assert_eq!(trim_to(BOUNDS, Some(10), Some(3)), None);
        assert_eq!(trim_to(BOUNDS, Some(99), None), Some(20));
    }
}
