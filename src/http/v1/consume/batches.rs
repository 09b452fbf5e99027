//! The binary form: the stored RecordBatch v2 bytes, one batch after the other, as they are.
//!
//! Where the queue stands is in headers: `Quorate-Next-Offset`, `Quorate-Earliest-Offset`,
//! `Quorate-End-Offset`. A fetch over many queues answers their batches in the order asked for;
//! `Quorate-Queues` says for each how many of the bytes are its own and where it goes on.

use std::convert::Infallible;
use std::fmt::Write as _;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::super::produce::BATCHES;
use crate::broker::{
    Broker, BrokerError, FetchRequest, MultiFetchRequest, QueueFetch, RawFetchAnswer, StartAt,
};
use crate::http::body::{charge, keep_until_sent};
use crate::http::error::ApiError;
use crate::http::limits::{BudgetShare, ByteBudget};

/// Queues of one binary fetch: what is said of each must fit into a header.
const MAX_QUEUES: usize = 64;

fn total_bytes(batches: &[Bytes]) -> usize {
    batches.iter().map(Bytes::len).sum()
}

fn respond(batches: Vec<Bytes>, budget: &ByteBudget) -> Result<Response, ApiError> {
    let bytes = total_bytes(&batches);
    let mut share = BudgetShare::default();
    charge(budget, &mut share, bytes)?;
    let body = Body::from_stream(futures_util::stream::iter(
        batches.into_iter().map(Ok::<_, Infallible>),
    ));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(BATCHES));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    Ok(keep_until_sent(response, share))
}

/// The answer to a binary fetch from one queue.
pub fn response(answer: RawFetchAnswer, budget: &ByteBudget) -> Result<Response, ApiError> {
    let mut response = respond(answer.batches, budget)?;
    let headers = response.headers_mut();
    headers.insert("quorate-next-offset", HeaderValue::from(answer.next_offset));
    headers.insert(
        "quorate-earliest-offset",
        HeaderValue::from(answer.earliest_offset),
    );
    headers.insert("quorate-end-offset", HeaderValue::from(answer.end_offset));
    Ok(response)
}

/// One queue's part of a fetch over many.
fn part(request: &MultiFetchRequest, i: usize, wait_ms: u64, left: usize) -> FetchRequest {
    let from = &request.queues[i];
    FetchRequest {
        topic: from.topic.clone(),
        queue: from.queue,
        start: from.start,
        max_messages: request.max_messages,
        max_bytes: left.max(1),
        wait_ms,
        selection: from.selection.clone(),
        consistency: request.consistency,
    }
}

type Found = Vec<(usize, RawFetchAnswer)>;

/// What the queues have now. Stops at `max_bytes`; a queue not reached is left out.
async fn gather(broker: &Broker, request: &MultiFetchRequest) -> Result<Found, BrokerError> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    for i in 0..request.queues.len() {
        let left = request.max_bytes.saturating_sub(bytes);
        if left == 0 {
            break;
        }
        let answer = broker.fetch_raw(part(request, i, 0, left)).await?;
        bytes += total_bytes(&answer.batches);
        found.push((i, answer));
    }
    Ok(found)
}

/// Waits until one of the queues has something, or one fails, or the time is over.
async fn wait_for_any(broker: &Broker, request: &MultiFetchRequest) {
    let mut waiting: FuturesUnordered<_> = (0..request.queues.len())
        .map(|i| broker.fetch_raw(part(request, i, request.wait_ms, 1)))
        .collect();
    while let Some(answer) = waiting.next().await {
        if !answer.is_ok_and(|answer| answer.batches.is_empty()) {
            return;
        }
    }
}

/// Binary fetch over many queues. An error of any of them is the answer's.
pub async fn fetch_many(broker: &Broker, request: &MultiFetchRequest) -> Result<Found, ApiError> {
    if request.queues.len() > MAX_QUEUES {
        return Err(ApiError::invalid(format!(
            "a fetch of stored batches takes at most {MAX_QUEUES} queues; ask for fewer or for JSON"
        )));
    }
    let found = gather(broker, request).await?;
    if request.wait_ms == 0 || found.iter().any(|(_, answer)| !answer.batches.is_empty()) {
        return Ok(found);
    }
    // From here on: the latest is not somewhere else by then.
    let mut request = request.clone();
    for (i, answer) in &found {
        request.queues[*i].start = StartAt::Offset(answer.next_offset);
    }
    wait_for_any(broker, &request).await;
    Ok(gather(broker, &request).await?)
}

/// The answer to a binary fetch over many queues.
pub fn many_response(
    request: &MultiFetchRequest,
    found: Found,
    budget: &ByteBudget,
) -> Result<Response, ApiError> {
    let described = describe(request, &found);
    let batches = found
        .into_iter()
        .flat_map(|(_, answer)| answer.batches)
        .collect();
    let mut response = respond(batches, budget)?;
    // Names are checked and numbers are digits: always a valid header.
    if let Ok(value) = HeaderValue::try_from(described) {
        response.headers_mut().insert("quorate-queues", value);
    }
    Ok(response)
}

/// `orders/0;bytes=120;next_offset=5;earliest_offset=0;end_offset=5, orders/1;…`
fn describe(request: &MultiFetchRequest, found: &Found) -> String {
    let mut text = String::new();
    for (i, answer) in found {
        let QueueFetch { topic, queue, .. } = &request.queues[*i];
        let separator = if text.is_empty() { "" } else { ", " };
        let bytes = total_bytes(&answer.batches);
        let RawFetchAnswer {
            next_offset,
            earliest_offset,
            end_offset,
            ..
        } = answer;
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{separator}{topic}/{queue};bytes={bytes};next_offset={next_offset};\
             earliest_offset={earliest_offset};end_offset={end_offset}"
        );
    }
    text
}
