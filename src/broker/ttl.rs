//! Time to live: a message that has been visible for longer is passed over by every reader.
//!
//! Expired messages keep their offsets and stay until retention takes them; readers skip them as
//! they skip what a filter leaves out. The reader's node decides by its own clock, so around the
//! moment of expiry two nodes may answer differently.

use quorate_storage::batch::RecordView;

/// Largest time to live, in ms: more than a hundred thousand years.
pub const MAX_TTL_MS: u64 = 1 << 52;

/// Whether a message that became visible at `visible_ms` (the stored batch's `timestamp_ms`) is
/// over at `now_ms`. The shorter of its own and its topic's time to live counts.
pub(crate) fn is_expired(
    record: &RecordView,
    visible_ms: u64,
    topic_ttl_ms: Option<u64>,
    now_ms: u64,
) -> bool {
    let own = record.ttl_ms();
    let ttl_ms = own.into_iter().chain(topic_ttl_ms).min();
    ttl_ms.is_some_and(|ttl_ms| visible_ms.saturating_add(ttl_ms) <= now_ms)
}

#[cfg(test)]
mod tests {
    use quorate_storage::batch::{BatchBuilder, BatchView, MessageRecord};

    use super::*;

    fn record(ttl_ms: Option<u64>) -> RecordView {
        let mut batch = BatchBuilder::new();
        let message = MessageRecord {
            ttl_ms,
            ..MessageRecord::default()
        };
        message.encode(&mut batch).unwrap();
        let view = BatchView::parse(batch.finish()).unwrap();
        view.records().next().unwrap().unwrap()
    }

    #[test]
    fn the_shorter_time_to_live_counts_to_the_millisecond() {
        for (own, topic, over_at) in [
            (None, None, None),
            (Some(5), None, Some(105)),
            (None, Some(7), Some(107)),
            (Some(5), Some(7), Some(105)),
            (Some(9), Some(7), Some(107)),
            (Some(u64::MAX), None, Some(u64::MAX)),
        ] {
            let record = record(own);
            assert_eq!(record.ttl_ms(), own);
            let is_over = |now| is_expired(&record, 100, topic, now);
            match over_at {
                None => assert!(!is_over(u64::MAX)),
                Some(at) => assert!(!is_over(at - 1) && is_over(at), "{own:?} {topic:?}"),
            }
        }
    }
}
