//! Dead letters go back to where they came from.
//!
//! Each is stored under a mark made of its place among the dead letters, so once, whatever happens
//! before the group's redrive cursor has passed it.

use std::sync::Arc;
use std::time::Duration;

use quorate_storage::batch::MessageRecord;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128;

use super::dead_letters::{QUEUE_HEADER, TOPIC_HEADER, encode, strip_address};
use super::{broken, not_leased};
use crate::broker::fetch::unreadable;
use crate::broker::offsets::check_group_name;
use crate::broker::queue::entry::Mark;
use crate::broker::{Broker, BrokerError, BrokerResult};
use crate::catalog::Topic;
use crate::coordinator::leases::LeaseCommand;
use crate::names::dead_letter_topic;
use crate::peer::{NewBatch, PeerError, PeerRequest, PeerResult};

/// What became of dead letters that were to go back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redriven {
    pub redriven: u64,
    pub skipped: Vec<Skipped>,
}

/// A dead letter that stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Among the dead letters.
    pub offset: u64,
    pub reason: String,
}

/// Asked for at once at most takes this long; the answer says how far it went.
const PATIENCE: Duration = Duration::from_secs(20);

impl Broker {
    /// Puts up to `max_messages` dead letters of a group back, oldest first, each once.
    pub async fn redrive(&self, group: &str, max_messages: usize) -> BrokerResult<Redriven> {
        check_group_name(group)?;
        let (coordinator, raft_group) = self.lease_coordinator(group)?;
        let timeout = PATIENCE + self.config.write_timeout;
        let here = |_| async move {
            let done = self.redrive_here(coordinator, group, max_messages).await;
            Ok(done?)
        };
        let there = |_| PeerRequest::Redrive {
            coordinator,
            consumer_group: group.to_owned(),
            max_messages: max_messages as u64,
        };
        self.write(raft_group, timeout, here, there).await
    }

    /// The same where this node leads the coordinator.
    pub(crate) async fn redrive_here(
        &self,
        coordinator: u32,
        group: &str,
        max_messages: usize,
    ) -> PeerResult<Redriven> {
        let local = self.led_coordinator(coordinator)?;
        let turn = self.redrive_turns.of(group);
        let _turn = turn.lock().await;
        let deadline = Instant::now() + PATIENCE;
        let proof = self.barrier(&local.group, deadline).await;
        proof.map_err(PeerError::Broker)?;
        let state = local.view.lease_group(group);
        let Some(state) = state.map_err(|cause| broken(&local, cause))? else {
            return Err(not_leased(&local, group));
        };
        let topic = match self.find_topic(&dead_letter_topic(group)).await {
            Ok(topic) => topic,
            Err(BrokerError::TopicNotFound { .. }) => return Ok(Redriven::default()),
            Err(error) => return Err(PeerError::Broker(error)),
        };
        let Some(queue) = topic.queues.first().map(|q| q.group) else {
            return Ok(Redriven::default());
        };
        let bounds = self.proved_bounds(queue).await.map_err(PeerError::Broker)?;
        let of_this_topic = state.redriven.filter(|(id, _)| *id == topic.id);
        let begin = of_this_topic
            .map_or(0, |(_, next)| next)
            .max(bounds.earliest);
        let end = bounds.end.min(begin.saturating_add(max_messages as u64));
        let mut done = Redriven::default();
        let mut next = begin;
        let mut failed = None;
        while next < end && Instant::now() < deadline {
            match self.redrive_one(queue, next).await {
                Ok(None) => done.redriven += 1,
                Ok(Some(reason)) => done.skipped.push(Skipped {
                    offset: next,
                    reason,
                }),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
            next += 1;
        }
        if next > begin {
            let command = LeaseCommand::Redriven {
                life: state.life,
                topic: topic.id,
                next,
            };
            self.lease_command_here(&local, group, command).await?;
        }
        match failed {
            Some(error) if next == begin => Err(PeerError::Broker(error)),
            _ => Ok(done),
        }
    }

    /// Why the dead letter stays, if it does.
    async fn redrive_one(&self, group: u64, offset: u64) -> BrokerResult<Option<String>> {
        let Some((_, _, record, _)) = self.read_record(group, offset).await? else {
            return Ok(Some("retention was faster".to_owned()));
        };
        let mut record = MessageRecord::decode(&record).map_err(unreadable)?;
        let Some((name, queue)) = origin(&record) else {
            return Ok(Some("it does not say where it came from".to_owned()));
        };
        let topic: Arc<Topic> = match self.find_queue(&name, queue).await {
            Ok((topic, _)) => topic,
            Err(BrokerError::TopicNotFound { .. }) => {
                return Ok(Some(format!("topic {name:?} was deleted")));
            }
            Err(BrokerError::QueueNotFound { .. }) => {
                return Ok(Some(format!("topic {name:?} has no queue {queue}")));
            }
            Err(error) => return Err(error),
        };
        strip_address(&mut record);
        let batch = NewBatch {
            mark: Mark::Forwarded {
                source: xxh3_128(format!("redrive {group}").as_bytes()).to_be_bytes(),
                sequence: offset,
            },
            hold: None,
            batch: encode(&record)?,
        };
        self.store_forwarded(&topic, queue, batch).await?;
        Ok(None)
    }
}

fn origin(record: &MessageRecord) -> Option<(String, u32)> {
    let header = |wanted: &str| {
        let found = record.headers.iter().find(|(name, _)| name == wanted);
        found.and_then(|(_, value)| std::str::from_utf8(value).ok())
    };
    let queue = header(QUEUE_HEADER)?.parse().ok()?;
    Some((header(TOPIC_HEADER)?.to_owned(), queue))
}
