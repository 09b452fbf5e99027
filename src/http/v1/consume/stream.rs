//! A live stream of one queue's messages as server-sent events: `id` is the offset, so that a
//! client that comes back with `Last-Event-ID` goes on where it was.
//!
//! The stream is pulled: a slow client makes fewer fetches, never a longer buffer. A fetch outlives the
//! pings: what a filter leaves out is scanned once, however long that takes.

use std::collections::VecDeque;
use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream;
use tokio::time::Instant;

use super::out_of_range;
use super::query::{Encoding, Fetch};
use super::render::{MessageOut, value_bytes};
use crate::broker::{BrokerError, BrokerResult, FetchAnswer, FetchRequest, StartAt};
use crate::http::HttpState;
use crate::http::error::ApiError;
use crate::http::limits::BudgetShare;
use crate::http::sse;

/// Pause before a stream that lost its leader asks again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

struct Live {
    state: HttpState,
    request: FetchRequest,
    /// The one under way.
    fetch: Option<BoxFuture<'static, BrokerResult<FetchAnswer>>>,
    /// What the stream began with: a topic that is made again is another one.
    group: u64,
    encoding: Encoding,
    on_out_of_range: Option<StartAt>,
    ready: VecDeque<Bytes>,
    last_sign: Instant,
    ended: bool,
}

/// Begins a stream. What is wrong from the start is still an ordinary error with its status.
pub async fn response(
    state: HttpState,
    fetch: Fetch,
    last_event_id: Option<u64>,
) -> Result<Response, ApiError> {
    let mut request = fetch.request;
    if let Some(last) = last_event_id {
        request.start = StartAt::Offset(last.saturating_add(1));
    }
    request.wait_ms = 0;
    let on_out_of_range = fetch.on_out_of_range;
    let ask = |request| state.broker.fetch(request);
    let first = out_of_range::fetch(request.clone(), on_out_of_range, ask).await?;
    let mut live = Live {
        last_sign: Instant::now(),
        state,
        request,
        fetch: None,
        group: first.group,
        encoding: fetch.encoding,
        on_out_of_range,
        ready: VecDeque::new(),
        ended: false,
    };
    if !live.take(&first) {
        return Err(ApiError::overloaded(
            "too many bytes of requests and answers are in memory",
        ));
    }
    // Long enough to cost little, short enough that a leader's end is noticed between two.
    live.request.wait_ms = u64::try_from(live.state.ping_interval.as_millis()).unwrap_or(15_000);
    let events = stream::unfold(live, |mut live| async move {
        let piece = live.next().await?;
        Some((piece, live))
    });
    Ok(sse::response(events))
}

impl Live {
    /// Turns an answer into events and moves on past it; false, and nothing done, while the memory
    /// for answers is used up.
    fn take(&mut self, answer: &FetchAnswer) -> bool {
        let bytes = value_bytes(&answer.messages);
        let capacity = bytes * 9 / 8 + answer.messages.len() * 224;
        let mut share = BudgetShare::default();
        if !self.state.budget.take(&mut share, capacity) {
            return false;
        }
        self.request.start = StartAt::Offset(answer.next_offset);
        if answer.messages.is_empty() {
            return true;
        }
        let metrics = &self.state.metrics;
        metrics.observe_fetch(None, answer.messages.len() as u64, bytes as u64);
        let mut events = Vec::with_capacity(capacity);
        for message in &answer.messages {
            let out = MessageOut {
                message,
                encoding: self.encoding,
            };
            sse::write_event(&mut events, Some(message.offset), None, &out);
        }
        self.ready.push_back(sse::charged(events, share));
        true
    }

    /// The next piece to send; None when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            if let Some(piece) = self.ready.pop_front() {
                self.last_sign = Instant::now();
                return Some(piece);
            }
            let ping_at = self.last_sign + self.state.ping_interval;
            let shutdown = self.state.shutdown.clone();
            let fetch = self.fetch.get_or_insert_with(|| {
                let (broker, request) = (self.state.broker.clone(), self.request.clone());
                async move { broker.fetch(request).await }.boxed()
            });
            let answer = tokio::select! {
                () = shutdown.cancelled() => {
                    self.ended = true;
                    continue;
                }
                () = tokio::time::sleep_until(ping_at) => {
                    self.ready.push_back(Bytes::from_static(sse::PING));
                    continue;
                }
                answer = fetch => answer,
            };
            self.fetch = None;
            match answer {
                Ok(answer) if answer.group != self.group => {
                    self.ended = true;
                    let topic = answer.topic;
                    return Some(sse::error_event(
                        &BrokerError::TopicNotFound { topic }.into(),
                    ));
                }
                Ok(answer) => {
                    if !self.take(&answer) {
                        pause_until(ping_at).await;
                    }
                }
                // A slow reader, and retention has overtaken it.
                Err(BrokerError::OffsetOutOfRange { .. })
                    if let Some(start) = self.on_out_of_range =>
                {
                    self.request.start = start;
                }
                // Between two leaders: the stream waits, pings go on.
                Err(error) if waits(&error) => pause_until(ping_at).await,
                Err(error) => {
                    self.ended = true;
                    return Some(sse::error_event(&error.into()));
                }
            }
        }
        None
    }
}

fn waits(error: &BrokerError) -> bool {
    error.retryable() && !matches!(error, BrokerError::ShuttingDown)
}

async fn pause_until(ping_at: Instant) {
    tokio::time::sleep_until(ping_at.min(Instant::now() + RETRY_PAUSE)).await;
}
