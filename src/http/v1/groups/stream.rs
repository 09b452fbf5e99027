//! A member's messages as server-sent events.
//!
//! The stream sends the member's heartbeats itself, as long as the client takes what is sent: a
//! client that is gone or stuck stops the stream, and with it the heartbeats. The queues follow the
//! member's assignment. A queue that is taken away is sent no more at once, but counts as owned until
//! the next heartbeat: in the meantime the client can commit what it has done.
//!
//! Each queue that may send has one fetch under way, and keeps it until it is answered: what a filter
//! leaves out is scanned once, however long that takes and whatever happens meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{AbortHandle, Aborted, BoxFuture, FutureExt, abortable};
use futures_util::stream::{self, FuturesUnordered};
use serde::Serialize;
use tokio::time::Instant;

use super::super::consume::{Encoding, MessageOut, value_bytes};
use super::wire::{AssignedBody, assigned};
use crate::broker::groups::{AssignedQueue, MemberAnswer};
use crate::broker::{
    BrokerError, BrokerResult, Consistency, FetchAnswer, FetchRequest, Selection, StartAt,
};
use crate::http::HttpState;
use crate::http::error::ApiError;
use crate::http::limits::BudgetShare;
use crate::http::sse;

/// Messages of one queue sent at a time.
const AT_ONCE: u64 = 500;
const AT_ONCE_BYTES: usize = 1 << 20;
/// Between two looks at what was committed, while a queue is paused.
const LOOK_AT_COMMITS: Duration = Duration::from_millis(100);
/// Pause after something that may work in a moment.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

type QueueKey = (String, u32);

/// What became of a queue's fetch, unless it was given up.
type Fetched = Result<(QueueKey, BrokerResult<FetchAnswer>), Aborted>;

/// One queue of the stream.
#[derive(Debug, Default)]
struct Lane {
    /// The next offset to send.
    next: u64,
    /// Behind the last message that was sent: a client that has committed this has done everything.
    sent: u64,
    /// What the client has committed, as far as known here.
    committed: u64,
    /// The fetch from `next` that is under way.
    fetch: Option<Fetch>,
    /// After something that may work in a moment: nothing is fetched before.
    retry_at: Option<Instant>,
}

/// A fetch, which ends with this.
#[derive(Debug)]
struct Fetch(AbortHandle);

impl Drop for Fetch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Live {
    state: HttpState,
    group: String,
    member: String,
    prefetch: u64,
    epoch: u64,
    interval: Duration,
    selection: Selection,
    lanes: BTreeMap<QueueKey, Lane>,
    /// Of the lanes. Those that are answered are served in turn.
    fetches: FuturesUnordered<BoxFuture<'static, Fetched>>,
    ready: VecDeque<Bytes>,
    beat_at: Instant,
    look_at: Instant,
    last_sign: Instant,
    ended: bool,
}

#[derive(Serialize)]
struct AssignmentEvent {
    epoch: u64,
    assignment: Vec<AssignedBody>,
}

/// A message with where it is from.
#[derive(Serialize)]
struct MessageEvent<'a> {
    topic: &'a str,
    #[serde(flatten)]
    message: MessageOut<'a>,
}

/// Begins a stream. What is wrong from the start is still an ordinary error with its status.
pub async fn response(
    state: HttpState,
    group: String,
    member: String,
    epoch: u64,
    prefetch: u64,
) -> Result<Response, ApiError> {
    let answer = state.broker.heartbeat(&group, &member, epoch, None).await?;
    let now = Instant::now();
    let mut live = Live {
        state,
        group,
        member,
        prefetch,
        epoch: 0,
        interval: Duration::from_millis(answer.heartbeat_interval_ms()),
        selection: Selection::parse(answer.tag.as_deref(), answer.filter.as_deref())
            .map_err(BrokerError::from)?,
        lanes: BTreeMap::new(),
        fetches: FuturesUnordered::new(),
        ready: VecDeque::new(),
        beat_at: now,
        look_at: now,
        last_sign: now,
        ended: false,
    };
    live.follow(answer);
    let events = stream::unfold(live, |mut live| async move {
        let piece = live.next().await?;
        Some((piece, live))
    });
    Ok(sse::response(events))
}

enum Step {
    Beat,
    Look,
    Ping,
    Stop,
    /// Some lane may be fetched from again.
    Retry,
    Fetched(QueueKey, BrokerResult<FetchAnswer>),
}

impl Live {
    /// Takes over what a heartbeat answered.
    fn follow(&mut self, answer: MemberAnswer) {
        let now = Instant::now();
        self.beat_at = now + self.interval;
        let key = |queue: &AssignedQueue| (queue.topic.clone(), queue.queue);
        // A queue whose start had to be looked for comes later in the same epoch.
        let is_news = answer.epoch != self.epoch
            || answer.assignment.len() != self.lanes.len()
            || !answer
                .assignment
                .iter()
                .all(|q| self.lanes.contains_key(&key(q)));
        let mut lanes = BTreeMap::new();
        for queue in &answer.assignment {
            let key = key(queue);
            let known = self.lanes.remove(&key);
            let mut lane = known.unwrap_or_else(|| Lane::at(queue.offset));
            lane.saw_commit(queue.offset);
            lanes.insert(key, lane);
        }
        self.lanes = lanes;
        if is_news {
            self.epoch = answer.epoch;
            let event = AssignmentEvent {
                epoch: answer.epoch,
                assignment: assigned(&answer.assignment),
            };
            let mut text = Vec::new();
            sse::write_event(&mut text, None, Some("assignment"), &event);
            self.ready.push_back(text.into());
        }
    }

    /// The next piece to send; None when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                self.last_sign = Instant::now();
                return Some(piece);
            }
            if self.ended {
                return None;
            }
            match self.step().await {
                Step::Stop => self.ended = true,
                Step::Ping => self.ready.push_back(Bytes::from_static(sse::PING)),
                Step::Beat => self.beat().await,
                Step::Look => self.look_at_commits().await,
                Step::Retry => {}
                Step::Fetched(key, answer) => self.take(&key, answer),
            }
        }
    }

    /// Waits for whatever comes first.
    async fn step(&mut self) -> Step {
        self.fetch_what_is_open();
        let paused = self
            .lanes
            .values()
            .any(|lane| lane.room(self.prefetch) == 0);
        let retry_at = self.lanes.values().filter_map(|lane| lane.retry_at).min();
        let ping_at = self.last_sign + self.state.ping_interval;
        let fetches = &mut self.fetches;
        let answered = async {
            loop {
                match fetches.next().await {
                    Some(Ok(answered)) => return answered,
                    Some(Err(Aborted)) => {}
                    None => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            biased;
            () = self.state.shutdown.cancelled() => Step::Stop,
            () = tokio::time::sleep_until(self.beat_at) => Step::Beat,
            () = tokio::time::sleep_until(self.look_at), if paused => Step::Look,
            (key, answer) = answered => Step::Fetched(key, answer),
            () = tokio::time::sleep_until(retry_at.unwrap_or(ping_at)), if retry_at.is_some() => {
                Step::Retry
            }
            () = tokio::time::sleep_until(ping_at) => Step::Ping,
        }
    }

    /// Lets every lane that may send have its fetch.
    fn fetch_what_is_open(&mut self) {
        let now = Instant::now();
        for (key, lane) in &mut self.lanes {
            lane.retry_at = lane.retry_at.filter(|retry_at| *retry_at > now);
            let room = lane.room(self.prefetch);
            if lane.fetch.is_some() || lane.retry_at.is_some() || room == 0 {
                continue;
            }
            let request = FetchRequest {
                topic: key.0.clone(),
                queue: key.1,
                start: StartAt::Offset(lane.next),
                max_messages: room.min(AT_ONCE) as usize,
                max_bytes: AT_ONCE_BYTES,
                // Long enough to cost little, short enough that a leader's end is noticed between two.
                wait_ms: 5_000,
                selection: self.selection.clone(),
                consistency: Consistency::Linearizable,
            };
            let (key, broker) = (key.clone(), self.state.broker.clone());
            let fetch = async move { (key, broker.fetch(request).await) };
            let (fetch, abort) = abortable(fetch);
            lane.fetch = Some(Fetch(abort));
            self.fetches.push(fetch.boxed());
        }
    }

    async fn beat(&mut self) {
        let owned: Vec<QueueKey> = self.lanes.keys().cloned().collect();
        let broker = &self.state.broker;
        let beat = broker.heartbeat(&self.group, &self.member, self.epoch, Some(&owned));
        match beat.await {
            Ok(answer) => self.follow(answer),
            Err(error) if waits(&error) => {
                self.beat_at = Instant::now() + RETRY_PAUSE.min(self.interval);
            }
            Err(error) => self.end(error),
        }
    }

    async fn look_at_commits(&mut self) {
        let found = self.state.broker.member_offsets(&self.group, &self.member);
        // What can't be read now is looked at again soon.
        for (topic, queue, offset) in found.await.unwrap_or_default() {
            if let Some(lane) = self.lanes.get_mut(&(topic, queue)) {
                lane.saw_commit(offset);
            }
        }
        // However long that took, the others are served in between.
        self.look_at = Instant::now() + LOOK_AT_COMMITS;
    }

    fn take(&mut self, key: &QueueKey, answer: BrokerResult<FetchAnswer>) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        lane.fetch = None;
        let retry_at = Instant::now() + RETRY_PAUSE.min(self.interval);
        let answer = match answer {
            Ok(answer) => answer,
            // Retention went past it.
            Err(BrokerError::OffsetOutOfRange {
                earliest_offset, ..
            }) if earliest_offset > lane.next => {
                lane.next = earliest_offset;
                lane.saw_commit(earliest_offset);
                return;
            }
            // The heartbeat will tell that the queue is gone.
            Err(BrokerError::TopicNotFound { .. } | BrokerError::QueueNotFound { .. }) => {
                self.lanes.remove(key);
                return;
            }
            // The others go on.
            Err(error) if waits(&error) => {
                lane.retry_at = Some(retry_at);
                return;
            }
            Err(error) => return self.end(error),
        };
        let bytes = value_bytes(&answer.messages);
        let capacity = bytes * 9 / 8 + answer.messages.len() * 256;
        let mut share = BudgetShare::default();
        if !self.state.budget.take(&mut share, capacity) {
            lane.retry_at = Some(retry_at);
            return;
        }
        let last = answer.messages.last().map(|message| message.offset);
        lane.fetched(last, answer.next_offset);
        if answer.messages.is_empty() {
            return;
        }
        let metrics = &self.state.metrics;
        metrics.observe_fetch(None, answer.messages.len() as u64, bytes as u64);
        let mut events = Vec::with_capacity(capacity);
        for message in &answer.messages {
            let event = MessageEvent {
                topic: &key.0,
                message: MessageOut {
                    message,
                    encoding: Encoding::Auto,
                },
            };
            sse::write_event(&mut events, None, Some("message"), &event);
        }
        self.ready.push_back(sse::charged(events, share));
    }

    fn end(&mut self, error: BrokerError) {
        self.ready.push_back(sse::error_event(&error.into()));
        self.ended = true;
    }
}

impl Lane {
    fn at(offset: u64) -> Self {
        Self {
            next: offset,
            sent: offset,
            committed: offset,
            ..Self::default()
        }
    }

    fn saw_commit(&mut self, offset: u64) {
        self.committed = self.committed.max(offset);
        // Committed further than was sent, by whomever: that is done.
        if offset > self.next {
            self.next = offset;
            self.fetch = None;
        }
        self.pass_left_out();
    }

    /// Takes over that everything before `next` was looked at, and the `last` of it is sent.
    fn fetched(&mut self, last: Option<u64>, next: u64) {
        self.next = next;
        self.sent = last.map_or(self.sent, |last| last + 1);
        self.pass_left_out();
    }

    /// What the filter left out can't be committed by a client that never sees it.
    fn pass_left_out(&mut self) {
        if self.committed >= self.sent {
            self.committed = self.committed.max(self.next);
        }
    }

    /// How many more messages may be sent.
    fn room(&self, prefetch: u64) -> u64 {
        (self.committed + prefetch).saturating_sub(self.next)
    }
}

fn waits(error: &BrokerError) -> bool {
    error.retryable() && !matches!(error, BrokerError::ShuttingDown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_needs_no_commit_once_the_rest_is_done() {
        let mut lane = Lane::at(0);
        lane.fetched(None, 3);
        assert_eq!(lane.room(1), 1, "nothing was sent");
        lane.fetched(Some(3), 9);
        assert_eq!(lane.room(1), 0, "message 3 is not done");
        lane.saw_commit(3);
        assert_eq!(lane.room(1), 0, "nor is it now");
        lane.saw_commit(4);
        assert_eq!((lane.next, lane.room(1)), (9, 1));
        lane.saw_commit(20);
        assert_eq!((lane.next, lane.room(2)), (20, 2));
    }
}
