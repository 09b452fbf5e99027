//! Server-sent events: their text, and the response that carries them.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde::Serialize;

use super::error::{ApiError, Problem};
use super::limits::BudgetShare;

/// A comment, so that both sides and what is between them see that the stream lives.
pub const PING: &[u8] = b": ping\n\n";

/// Appends one event. JSON has no line breaks of its own, so one `data:` line holds it.
pub fn write_event(
    buffer: &mut Vec<u8>,
    id: Option<u64>,
    event: Option<&str>,
    data: &impl Serialize,
) {
    if let Some(id) = id {
        buffer.extend_from_slice(format!("id: {id}\n").as_bytes());
    }
    if let Some(event) = event {
        buffer.extend_from_slice(format!("event: {event}\n").as_bytes());
    }
    buffer.extend_from_slice(b"data: ");
    // A Vec takes everything and the types have string keys: this cannot fail.
    let _ = serde_json::to_writer(&mut *buffer, data);
    buffer.extend_from_slice(b"\n\n");
}

/// Events that count against the budget until they are sent.
struct Charged {
    events: Vec<u8>,
    _share: BudgetShare,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.events
    }
}

/// Written events, with their share of the budget.
pub fn charged(events: Vec<u8>, share: BudgetShare) -> Bytes {
    Bytes::from_owner(Charged {
        events,
        _share: share,
    })
}

/// The last event of a stream that can't go on: the problem, as the status would have said it.
pub fn error_event(error: &ApiError) -> Bytes {
    let mut buffer = Vec::new();
    write_event(
        &mut buffer,
        None,
        Some("error"),
        &Problem::new(error, false),
    );
    buffer.into()
}

/// A response that sends each item of `stream` as it comes.
pub fn response(stream: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let body = Body::from_stream(stream.map(Ok::<_, Infallible>));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Some proxies gather small pieces unless told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_lines_and_a_blank_one() {
        let mut buffer = Vec::new();
        write_event(&mut buffer, Some(7), Some("x"), &"a\nb");
        assert_eq!(buffer, b"id: 7\nevent: x\ndata: \"a\\nb\"\n\n");
    }
}
