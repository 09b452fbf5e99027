//! Moving a consumer group to another place, forwards or backwards.

use super::offsets::check_group_name;
use super::queue::QueueBounds;
use super::{Broker, BrokerError, BrokerResult, ResetRequest, ResetResult, ResetTo};
use crate::coordinator::{CommitVerdict, CoordinatorCommand, QueueOffset};

impl Broker {
    /// Sets a group's offsets in one queue or in all of a topic, within what the queues hold. With
    /// `dry_run` it only says what it would do.
    pub async fn reset_offsets(&self, request: ResetRequest) -> BrokerResult<Vec<ResetResult>> {
        check_group_name(&request.group)?;
        let topic = match request.queue {
            Some(queue) => self.find_queue(&request.topic, queue).await?.0,
            None => self.find_topic(&request.topic).await?,
        };
        let committed = self.committed(&request.group).await?;
        let mut results = Vec::new();
        for (queue, placement) in (0u32..).zip(&topic.queues) {
            if request.queue.is_some_and(|only| only != queue) {
                continue;
            }
            let known = |o: &&QueueOffset| o.topic == topic.id && o.queue == queue;
            let previous = committed.iter().find(known).map(|o| o.offset);
            let by_time = match request.to {
                ResetTo::Timestamp(ms) => Some(self.offset_at_time(placement.group, ms).await?),
                _ => None,
            };
            let bounds = self.proved_bounds(placement.group).await?;
            results.push(ResetResult {
                topic: topic.name.clone(),
                queue,
                previous,
                offset: target(request.to, by_time, previous, bounds)?,
            });
        }
        if request.dry_run {
            return Ok(results);
        }
        let offsets = results.iter().map(|result| QueueOffset {
            topic: topic.id,
            queue: result.queue,
            offset: result.offset,
        });
        let offsets: Vec<_> = offsets.collect();
        let seek = offsets.clone();
        let command = CoordinatorCommand::Reset {
            group: request.group.clone(),
            offsets,
            force: request.force,
        };
        let verdicts = match self.commit(&request.group, &command).await {
            // Its leases in these queues end, and it goes on at the new place.
            Err(BrokerError::GroupModeConflict { leased: true, .. }) => {
                self.seek_leases(&request.group, seek).await?;
                return Ok(results);
            }
            verdicts => verdicts?,
        };
        if verdicts.iter().all(|v| *v == CommitVerdict::Done) {
            return Ok(results);
        }
        let held = verdicts.iter().zip(&results);
        let held = held.into_iter().find(|(v, _)| **v == CommitVerdict::Held);
        Err(match held {
            Some((_, result)) => BrokerError::OffsetHeld {
                group: request.group,
                topic: result.topic.clone(),
                queue: result.queue,
            },
            None => BrokerError::Internal("a reset was refused".to_owned()),
        })
    }
}

/// The new offset, never outside of what the queue holds.
fn target(
    to: ResetTo,
    by_time: Option<u64>,
    previous: Option<u64>,
    bounds: QueueBounds,
) -> BrokerResult<u64> {
    let wanted = match to {
        ResetTo::Earliest => bounds.earliest,
        ResetTo::Latest => bounds.end,
        // Whoever names an offset means a message, and there is none.
        ResetTo::Offset(offset) if offset > bounds.end => {
            return Err(BrokerError::OffsetOutOfRange {
                offset,
                earliest_offset: bounds.earliest,
                end_offset: bounds.end,
            });
        }
        ResetTo::Offset(offset) => offset,
        ResetTo::Timestamp(_) => by_time.unwrap_or(bounds.end),
        ResetTo::ShiftBy(by) => previous
            .unwrap_or(bounds.earliest)
            .saturating_add_signed(by),
    };
    Ok(wanted.clamp(bounds.earliest, bounds.end.max(bounds.earliest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_within_the_queue() {
        let bounds = QueueBounds {
            earliest: 10,
            end: 20,
        };
        for (to, by_time, previous, expected) in [
            (ResetTo::Earliest, None, None, 10),
            (ResetTo::Latest, None, None, 20),
            (ResetTo::Offset(5), None, None, 10),
            (ResetTo::Offset(15), None, None, 15),
            (ResetTo::Offset(20), None, None, 20),
            (ResetTo::Timestamp(1), Some(17), None, 17),
            (ResetTo::ShiftBy(-3), None, Some(15), 12),
            (ResetTo::ShiftBy(-100), None, Some(15), 10),
            (ResetTo::ShiftBy(i64::MAX), None, Some(15), 20),
            (ResetTo::ShiftBy(2), None, None, 12),
        ] {
            let found = target(to, by_time, previous, bounds);
            assert_eq!(found, Ok(expected), "{to:?}");
        }
        let beyond = target(ResetTo::Offset(21), None, None, bounds);
        assert!(matches!(beyond, Err(BrokerError::OffsetOutOfRange { .. })));
    }
}
