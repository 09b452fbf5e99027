//! Writing a chunk's messages to one topic.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;
use quorate_storage::mutation::{self, Mutation};

use super::super::NO_LEADER;
use super::chunk::Chunk;
use crate::broker::queue::BatchOutcome;
use crate::broker::queue::entry::{MAX_BATCHES, Mark};
use crate::broker::{Broker, BrokerError, BrokerResult};
use crate::catalog::Topic;
use crate::peer::NewBatch;

/// Where a queue does not take so many messages, the next attempt is with this part of them.
const FEWER: usize = 8;
/// So many messages in a row that are dropped one by one stand for the rest of their run.
const MOST_IN_VAIN: u32 = 4;

/// By this a queue knows what comes from the one of this Raft group.
fn mark_of(group: u64) -> [u8; 16] {
    let mut source = *b"exchange\0\0\0\0\0\0\0\0";
    source[8..].copy_from_slice(&group.to_be_bytes());
    source
}

/// Brings one topic what it gets of one chunk, and says where the next one begins.
pub(super) async fn bring(
    broker: &Broker,
    group: u64,
    shared: Option<Arc<Chunk>>,
    topic: &Topic,
    at: u64,
    reached: &mut BTreeMap<u32, u64>,
) -> BrokerResult<u64> {
    let chunk = match shared {
        Some(chunk) => chunk,
        None => match Chunk::read(broker, group, at).await? {
            Some(chunk) => Arc::new(chunk),
            None => return Err(NO_LEADER),
        },
    };
    let queues = chunk.for_topic(topic.id, at, reached, mark_of(group));
    let stored = queues.into_iter().map(|(queue, batches)| async move {
        let mut next = None;
        let result = bring_to_queue(broker, topic, queue, &batches, &mut next).await;
        (queue, next, result)
    });
    // All are waited for: none of this chunk is under way when the next one leaves.
    let mut first_error = Ok(());
    for (queue, next, result) in join_all(stored).await {
        if let Some(next) = next {
            reached.insert(queue, next);
        }
        first_error = first_error.and(result);
    }
    if mutation::on(Mutation::SkipRefused) {
        return Ok(chunk.next);
    }
    first_error.map(|()| chunk.next)
}

/// Brings batches in order; where all of them are too many, as many as are taken. `next` is the
/// offset behind the last one that the queue has.
async fn bring_to_queue(
    broker: &Broker,
    topic: &Topic,
    queue: u32,
    mut batches: &[NewBatch],
    next: &mut Option<u64>,
) -> BrokerResult<()> {
    let mut at_once = MAX_BATCHES;
    let mut in_vain = 0;
    while !batches.is_empty() {
        let (mut now, mut later) = batches.split_at(at_once.min(batches.len()));
        match broker.store(topic, queue, now.to_vec(), &[]).await {
            Ok(outcomes) => {
                for outcome in outcomes {
                    accepted(outcome)?;
                }
                broker.metrics.count_forwarded(now.len() as u64);
                at_once = MAX_BATCHES.min(now.len() * 2);
                in_vain = 0;
            }
            Err(error) if now.len() > 1 && is_about_size(&error) => {
                at_once = (now.len() / FEWER).max(1);
                continue;
            }
            // What the topic's owner wants of a full one.
            Err(BrokerError::Dropped { .. }) => {
                in_vain += 1;
                // That there is no room is proved anew for each one, which takes its time.
                if in_vain == MOST_IN_VAIN {
                    (now, later) = (batches, &[]);
                }
                broker.metrics.count_forward_skipped(now.len() as u64);
            }
            // Larger than what the topic may ever hold, since its owner made that smaller.
            Err(BrokerError::InvalidRequest(reason)) => {
                let topic = &topic.name;
                tracing::warn!(%topic, queue, %reason, "a published message is left out of a topic");
                broker.metrics.count_forward_skipped(1);
            }
            Err(error) => return Err(error),
        }
        if let Some(Mark::Forwarded { sequence, .. }) = now.last().map(|batch| batch.mark) {
            // The sequence of an offset is one more.
            *next = Some(sequence);
        }
        batches = later;
    }
    Ok(())
}

/// Whether fewer messages at a time may be taken.
fn is_about_size(error: &BrokerError) -> bool {
    matches!(
        error,
        BrokerError::BacklogFull(_)
            | BrokerError::Dropped { .. }
            | BrokerError::InvalidRequest(_)
            | BrokerError::RateExceeded { .. }
            | BrokerError::RequestTooLarge { .. }
    )
}

fn accepted(outcome: BatchOutcome) -> BrokerResult<()> {
    match outcome {
        BatchOutcome::Stored(_) | BatchOutcome::Duplicate(_) | BatchOutcome::AlreadyForwarded => {
            Ok(())
        }
        other => {
            tracing::warn!(?other, "a queue refuses what is brought to it");
            let text = format!("the queue refuses what is brought to it: {other:?}");
            Err(BrokerError::Internal(text))
        }
    }
}
