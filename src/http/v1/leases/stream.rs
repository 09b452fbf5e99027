//! Leased messages pushed as server-sent events.
//!
//! The stream remembers what it has handed out; whoever leads the coordinator says what of that is
//! still leased, and gives as many more as the stream may hold. A client that goes away leaves its
//! leases to end by themselves.

use std::collections::VecDeque;
use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use tokio::time::Instant;

use super::super::consume::query::Encoding;
use super::{LeasedOut, json_bytes};
use crate::broker::BrokerError;
use crate::broker::leases::{ReceiveAnswer, ReceiveRequest};
use crate::http::HttpState;
use crate::http::error::ApiError;
use crate::http::sse;

/// Pause before a stream that lost its leader asks again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

struct Push {
    state: HttpState,
    request: ReceiveRequest,
    encoding: Encoding,
    ready: VecDeque<Bytes>,
    last_sign: Instant,
    ended: bool,
}

/// Begins a stream. What is wrong from the start is still an ordinary error with its status.
pub async fn response(
    state: HttpState,
    request: ReceiveRequest,
    encoding: Encoding,
) -> Result<Response, ApiError> {
    let first = state.broker.receive(request.clone()).await?;
    let mut push = Push {
        last_sign: Instant::now(),
        state,
        request,
        encoding,
        ready: VecDeque::new(),
        ended: false,
    };
    push.take(first);
    push.request.wait_ms = u64::try_from(push.state.ping_interval.as_millis()).unwrap_or(15_000);
    let events = stream::unfold(push, |mut push| async move {
        let piece = push.next().await?;
        Some((piece, push))
    });
    Ok(sse::response(events))
}

impl Push {
    fn take(&mut self, answer: ReceiveAnswer) {
        let new = answer.messages.iter().map(|leased| leased.receipt);
        self.request.held = answer.held;
        self.request.held.extend(new);
        if answer.messages.is_empty() {
            return;
        }
        let mut events = Vec::with_capacity(json_bytes(&answer.messages));
        for leased in &answer.messages {
            let out = LeasedOut::new(&self.request.group, leased, self.encoding);
            sse::write_event(&mut events, None, None, &out);
        }
        self.ready.push_back(events.into());
    }

    /// The next piece to send; None when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            if let Some(piece) = self.ready.pop_front() {
                self.last_sign = Instant::now();
                return Some(piece);
            }
            let ping_at = self.last_sign + self.state.ping_interval;
            let mut request = self.request.clone();
            let left = ping_at.saturating_duration_since(Instant::now());
            request.wait_ms = request.wait_ms.min(left.as_millis() as u64);
            let shutdown = self.state.shutdown.clone();
            // A receive under way is not dropped for a ping: what it leases would be lost.
            let answer = tokio::select! {
                () = shutdown.cancelled() => {
                    self.ended = true;
                    continue;
                }
                answer = self.state.broker.receive(request) => answer,
            };
            match answer {
                Ok(answer) => self.take(answer),
                // Between two leaders: the stream waits, pings go on.
                Err(error) if error.retryable() && error != BrokerError::ShuttingDown => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                Err(error) => {
                    self.ended = true;
                    return Some(sse::error_event(&error.into()));
                }
            }
            if Instant::now() >= ping_at && self.ready.is_empty() {
                self.ready.push_back(Bytes::from_static(sse::PING));
            }
        }
        None
    }
}
