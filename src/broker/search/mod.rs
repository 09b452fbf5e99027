//! Looking messages up over all queues of a topic: by key, by time, by id.
//!
//! What is found comes in the order (time, queue, offset). Log time never goes back along a queue,
//! so a place in that order says for every queue where to go on: a [`Cursor`].

mod by_id;
mod indexer;
mod replica;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use quorate_storage::RaftGroupId;
use serde::{Deserialize, Serialize};

use super::fetch::size_of_message;
use super::{Broker, BrokerError, BrokerResult, Message, Selection, StartAt};
use crate::peer::PeerRequest;

/// How long one replica searches before it says how far it came.
const SEARCH_FOR: Duration = Duration::from_secs(2);
/// Queues searched at the same time.
const AT_ONCE: usize = 8;
/// Of all messages in an answer, beyond its first.
const MAX_BYTES: usize = 16 << 20;
const MIN_BYTES_PER_QUEUE: usize = 64 << 10;

/// Which messages of a topic are looked for.
#[derive(Debug, Clone, Default)]
pub struct LookupRequest {
    pub topic: String,
    pub key: Option<String>,
    pub selection: Selection,
    /// Stored at or after it, and not after the other.
    pub from_timestamp_ms: Option<u64>,
    pub to_timestamp_ms: Option<u64>,
    pub after: Option<Cursor>,
    pub max_messages: usize,
}

#[derive(Debug, Clone)]
pub struct LookupAnswer {
    pub messages: Vec<Message>,
    /// Where to go on; none when everything was looked at.
    pub next: Option<Cursor>,
}

/// A place in the order of lookups. Written `time-queue-offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    pub timestamp_ms: u64,
    pub queue: u32,
    pub offset: u64,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.timestamp_ms, self.queue, self.offset)
    }
}

impl FromStr for Cursor {
    type Err = BrokerError;

    fn from_str(text: &str) -> Result<Self, BrokerError> {
        let mut parts = text.splitn(3, '-');
        let mut number = || parts.next()?.parse::<u64>().ok();
        let parsed = (|| {
            Some(Self {
                timestamp_ms: number()?,
                queue: number()?.try_into().ok()?,
                offset: number()?,
            })
        })();
        parsed.ok_or_else(|| {
            let text = "after is not a place that an earlier lookup gave as next";
            BrokerError::InvalidRequest(text.to_owned())
        })
    }
}

impl Cursor {
    fn of(message: &Message) -> Self {
        Self {
            timestamp_ms: message.timestamp_ms,
            queue: message.queue,
            offset: message.offset,
        }
    }

    /// Where a queue goes on behind this place.
    fn start_in(&self, queue: u32) -> StartAt {
        match queue.cmp(&self.queue) {
            std::cmp::Ordering::Less => StartAt::Timestamp(self.timestamp_ms.saturating_add(1)),
            std::cmp::Ordering::Equal => StartAt::Offset(self.offset.saturating_add(1)),
            std::cmp::Ordering::Greater => StartAt::Timestamp(self.timestamp_ms),
        }
    }
}

/// The part of a lookup that one queue answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchRequest {
    pub group: u64,
    pub queue: u32,
    pub key: Option<String>,
    pub selection: Selection,
    pub start: StartAt,
    pub to_timestamp_ms: Option<u64>,
    pub max_messages: u64,
    pub max_bytes: u64,
    /// Of the topic.
    pub ttl_ms: Option<u64>,
}

/// What one queue has, in its order.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Found {
    pub messages: Vec<Message>,
    /// Time and offset of the last message looked at, when there are more.
    pub reached: Option<(u64, u64)>,
}

impl Broker {
    /// Everything that a lookup asks for, or as much as fits; see [`LookupAnswer::next`].
    pub async fn lookup(&self, request: &LookupRequest) -> BrokerResult<LookupAnswer> {
        let topic = self.find_topic(&request.topic).await?;
        let share = (MAX_BYTES / topic.queues.len().max(1)).max(MIN_BYTES_PER_QUEUE);
        let searches = (0..).zip(&topic.queues).map(|(queue, placement)| {
            let from = request.from_timestamp_ms.map(StartAt::Timestamp);
            let start = request.after.map(|after| after.start_in(queue)).or(from);
            let search = SearchRequest {
                group: placement.group,
                queue,
                key: request.key.clone(),
                selection: request.selection.clone(),
                start: start.unwrap_or(StartAt::Earliest),
                to_timestamp_ms: request.to_timestamp_ms,
                // One more than is wanted tells whether there are more.
                max_messages: request.max_messages as u64 + 1,
                max_bytes: share as u64,
                ttl_ms: topic.config.ttl_ms,
            };
            async move {
                let found = self.search(&request.topic, search).await?;
                BrokerResult::Ok((queue, found))
            }
        });
        let searches: Vec<_> = searches.collect();
        let found = stream::iter(searches).buffered(AT_ONCE);
        let found: Vec<(u32, Found)> = found.try_collect().await?;
        Ok(merge(found, request.max_messages))
    }

    async fn search(&self, topic: &str, request: SearchRequest) -> BrokerResult<Found> {
        let group = request.group;
        let here = self.search_here(&request).await;
        let request = PeerRequest::Search(request);
        self.here_or_elsewhere(topic, group, here, &request).await
    }

    /// This replica's answer, or that of another if it has none.
    async fn here_or_elsewhere<T: serde::de::DeserializeOwned>(
        &self,
        topic: &str,
        group: u64,
        here: crate::peer::PeerResult<T>,
        request: &PeerRequest,
    ) -> BrokerResult<T> {
        use crate::peer::PeerError;
        let answer = match here {
            Ok(found) => Ok(found),
            Err(PeerError::Broker(error)) => Err(error),
            Err(PeerError::NotHere | PeerError::NotLeader { .. }) => {
                let catalog = self.catalog();
                let placement = catalog.placement(RaftGroupId(group));
                match placement.is_some_and(|placement| placement.is_beyond_repair()) {
                    true => Err(BrokerError::Quarantined),
                    false => self.ask_replicas(group, request, SEARCH_FOR).await,
                }
            }
        };
        answer.map_err(|error| match self.catalog_knows(group) {
            true => error,
            false => BrokerError::TopicNotFound {
                topic: topic.to_owned(),
            },
        })
    }
}

/// One order of what the queues found, as far as all of them have looked.
fn merge(found: Vec<(u32, Found)>, max_messages: usize) -> LookupAnswer {
    let reached = found.iter().filter_map(|(queue, found)| {
        let (timestamp_ms, offset) = found.reached?;
        Some(Cursor {
            timestamp_ms,
            queue: *queue,
            offset,
        })
    });
    let mut next = reached.min();
    let mut messages: Vec<Message> = found.into_iter().flat_map(|(_, f)| f.messages).collect();
    messages.sort_by_key(Cursor::of);
    if let Some(end) = next {
        messages.retain(|message| Cursor::of(message) <= end);
    }
    let mut bytes = 0;
    let fits = |message: &Message| {
        bytes += size_of_message(message);
        bytes <= MAX_BYTES
    };
    let within = messages.iter().map_while({
        let mut fits = fits;
        move |message| fits(message).then_some(())
    });
    let keep = within.count().max(1).min(max_messages);
    if messages.len() > keep {
        messages.truncate(keep);
        next = messages.last().map(Cursor::of);
    }
    LookupAnswer { messages, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(timestamp_ms: u64, queue: u32, offset: u64) -> Message {
        Message {
            queue,
            offset,
            message_id: String::new(),
            timestamp_ms,
            key: None,
            tag: None,
            headers: Default::default(),
            value: None,
            producer: None,
        }
    }

    fn found(queue: u32, messages: &[(u64, u64)], reached: Option<(u64, u64)>) -> (u32, Found) {
        let messages = messages.iter();
        let messages = messages.map(|(time, offset)| message(*time, queue, *offset));
        let messages = messages.collect();
        (queue, Found { messages, reached })
    }

    fn places(answer: &LookupAnswer) -> Vec<(u64, u32, u64)> {
        let messages = answer.messages.iter();
        messages
            .map(|m| (m.timestamp_ms, m.queue, m.offset))
            .collect()
    }

    #[test]
    fn one_order_over_all_queues() {
        let parts = vec![
            found(0, &[(1, 0), (5, 1)], None),
            found(1, &[(1, 0), (1, 1), (9, 2)], None),
        ];
        let answer = merge(parts.clone(), 10);
        assert_eq!(
            places(&answer),
            [(1, 0, 0), (1, 1, 0), (1, 1, 1), (5, 0, 1), (9, 1, 2)]
        );
        assert_eq!(answer.next, None);
        let some = merge(parts, 3);
        assert_eq!(places(&some), [(1, 0, 0), (1, 1, 0), (1, 1, 1)]);
        let next = some.next.unwrap();
        assert_eq!(next.to_string(), "1-1-1");
        assert_eq!(next.start_in(0), StartAt::Timestamp(2));
        assert_eq!(next.start_in(1), StartAt::Offset(2));
        assert_eq!(next.start_in(2), StartAt::Timestamp(1));
    }

    #[test]
    fn nothing_is_given_beyond_what_every_queue_has_looked_at() {
        let parts = vec![
            found(0, &[(1, 0), (8, 1)], None),
            found(1, &[(2, 0)], Some((4, 7))),
        ];
        let answer = merge(parts, 10);
        assert_eq!(places(&answer), [(1, 0, 0), (2, 1, 0)]);
        assert_eq!(answer.next.unwrap().to_string(), "4-1-7");
        let nothing = merge(vec![found(3, &[], Some((4, 7)))], 10);
        assert!(nothing.messages.is_empty());
        assert_eq!(nothing.next.unwrap().to_string(), "4-3-7");
    }

    #[test]
    fn cursors_are_read_back() {
        let cursor: Cursor = "17-2-5".parse().unwrap();
        assert_eq!(cursor.to_string(), "17-2-5");
        for text in ["", "1", "1-2", "1-2-3-4", "a-b-c", "1--2", "1-4294967296-1"] {
            assert!(text.parse::<Cursor>().is_err(), "{text}");
        }
    }
}
