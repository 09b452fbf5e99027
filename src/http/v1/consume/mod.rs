//! Consume: fetch with long poll, live stream, many queues at once, stored batches.

mod batches;
pub(super) mod query;
pub(super) mod render;
mod stream;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::{
    Broker, BrokerError, BrokerResult, FetchAnswer, FetchRequest, MultiFetchRequest, RawFetchAnswer,
};
use crate::http::HttpState;
use crate::http::body::{JsonBody, charge, keep_until_sent};
use crate::http::error::{ApiError, Problem};
use crate::http::limits::BudgetShare;
use crate::http::multi::{Nothing, Place, json, respond};
use crate::http::path::TopicQueue;
use crate::http::query::Params;
use query::{Fetch, FetchManyBody, Form};
use render::FetchOut;

/// Time for the last, waitless look when the node stops under a long poll.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// Asks with the wait; when the node begins to stop, answers at once with what is there.
pub(super) async fn until_shutdown<T, F>(
    state: &HttpState,
    wait_ms: u64,
    ask: impl Fn(Arc<Broker>, u64) -> F,
) -> BrokerResult<T>
where
    F: Future<Output = BrokerResult<T>>,
{
    let ask = |wait_ms| ask(Arc::clone(&state.broker), wait_ms);
    if wait_ms > 0 {
        tokio::select! {
            biased;
            answer = ask(wait_ms) => return answer,
            () = state.shutdown.cancelled() => {}
        }
    }
    if !state.shutdown.is_cancelled() {
        return ask(0).await;
    }
    let looked = tokio::time::timeout(LAST_LOOK, ask(0)).await;
    looked.unwrap_or(Err(BrokerError::ShuttingDown))
}

/// Messages of one queue. `Accept: text/event-stream` makes it a live stream that resumes with
/// `Last-Event-ID`; `Accept: application/vnd.quorate.batches` answers the stored bytes.
#[utoipa::path(get, path = "/v1/topics/{topic}/queues/{queue}/messages", tag = "consume",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("queue" = u32, Path, description = "Queue number"),
        ("offset" = Option<String>, Query, description = "A number, `earliest` (default) or `latest`"),
        ("from_timestamp_ms" = Option<u64>, Query, description = "Instead of offset: the first message at or after it"),
        ("max_messages" = Option<u32>, Query, description = "1 to 10000, default 100"),
        ("max_bytes" = Option<u32>, Query, description = "Default 1 MiB, at most 16 MiB; never hides the first message"),
        ("wait_ms" = Option<u32>, Query, description = "Wait this long for a message, at most 60000"),
        ("tag" = Option<String>, Query, description = "`created||paid`: only messages with one of these tags"),
        ("filter" = Option<String>, Query, description = "Only messages for which it is true, as in `headers.region = 'eu' and not tag in ('a', 'b')`: fields `headers.NAME`, `key`, `tag`, `offset`, `timestamp_ms`, `value_bytes`; `=`, `<>`, `<`, `<=`, `>`, `>=`, `in`, `between`, `like`, `is null`, `and`, `or`, `not`; at most 4096 bytes"),
        ("consistency" = Option<String>, Query, description = "`linearizable` (default) or `stale`"),
        ("encoding" = Option<String>, Query, description = "`base64` forces value_base64"),
        ("Last-Event-ID" = Option<u64>, Header, description = "Event stream: offset of the last message seen"),
    ),
    responses(
    (status = 200, description = "What is there, or nothing after wait_ms", content(
        (render::FetchDoc = "application/json"),
        (String = "text/event-stream"),
        (Vec<u8> = "application/vnd.quorate.batches"),
    )),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn fetch(
    State(state): State<HttpState>,
    from: TopicQueue,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let form = query::form(&headers);
    let fetch = Fetch::parse(from, params, form)?;
    match form {
        Form::Events => {
            let last = query::last_event_id(&headers)?;
            stream::response(state, fetch, last).await
        }
        Form::Batches => {
            let answer = fetch_raw(&state, fetch.request).await?;
            batches::response(answer, &state.budget)
        }
        Form::Json => {
            let answer = fetch_one(&state, fetch.request).await?;
            render::response(&answer, fetch.encoding, &state.budget)
        }
    }
}

/// How long a fetch took, if it did not ask to wait.
fn unwaited(begun: Instant, wait_ms: u64) -> Option<Duration> {
    (wait_ms == 0).then(|| begun.elapsed())
}

async fn fetch_one(state: &HttpState, request: FetchRequest) -> BrokerResult<FetchAnswer> {
    let (begun, wait) = (Instant::now(), request.wait_ms);
    let answer = until_shutdown(state, wait, |broker, wait_ms| {
        let asked = FetchRequest {
            wait_ms,
            ..request.clone()
        };
        async move { broker.fetch(asked).await }
    })
    .await?;
    let (messages, bytes) = (answer.messages.len(), render::value_bytes(&answer.messages));
    state
        .metrics
        .observe_fetch(unwaited(begun, wait), messages as u64, bytes as u64);
    Ok(answer)
}

async fn fetch_raw(state: &HttpState, request: FetchRequest) -> BrokerResult<RawFetchAnswer> {
    let (begun, wait) = (Instant::now(), request.wait_ms);
    let answer = until_shutdown(state, wait, |broker, wait_ms| {
        let asked = FetchRequest {
            wait_ms,
            ..request.clone()
        };
        async move { broker.fetch_raw(asked).await }
    })
    .await?;
    let bytes: usize = answer.batches.iter().map(bytes::Bytes::len).sum();
    state
        .metrics
        .observe_fetch(unwaited(begun, wait), 0, bytes as u64);
    Ok(answer)
}

/// Messages of many queues in one request: one result a queue, in the order asked for.
#[utoipa::path(post, path = "/v1/fetch", tag = "consume", request_body = FetchManyBody, responses(
    (status = 200, description = "`{\"results\": [{\"topic\", \"queue\", \"messages\", \"next_offset\", …}]}`", content(
        (render::FetchManyDoc = "application/json"),
        (Vec<u8> = "application/vnd.quorate.batches"),
    )),
    (status = 207, description = "Some queues failed; their entries are errors"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn fetch_many(
    State(state): State<HttpState>,
    params: Params,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: FetchManyBody = body.parse()?;
    let request = wanted.request()?;
    match query::form(&headers) {
        Form::Json => fetch_many_json(&state, &wanted, &request).await,
        Form::Batches => {
            let found = until_shutdown(&state, request.wait_ms, |broker, wait_ms| {
                let asked = MultiFetchRequest {
                    wait_ms,
                    ..request.clone()
                };
                async move { Ok(batches::fetch_many(&broker, &asked).await) }
            });
            batches::many_response(&request, found.await??, &state.budget)
        }
        Form::Events => Err(ApiError::invalid(
            "an event stream is of one queue; use GET /v1/topics/{topic}/queues/{queue}/messages",
        )),
    }
}

async fn fetch_many_json(
    state: &HttpState,
    wanted: &FetchManyBody,
    request: &MultiFetchRequest,
) -> Result<Response, ApiError> {
    let begun = Instant::now();
    let answers = until_shutdown(state, request.wait_ms, |broker, wait_ms| {
        let asked = MultiFetchRequest {
            wait_ms,
            ..request.clone()
        };
        async move { broker.fetch_many(asked).await }
    })
    .await?;
    let found = answers.iter().flatten();
    let (messages, bytes) = found.fold((0, 0), |(messages, bytes), answer| {
        (
            messages + answer.messages.len(),
            bytes + render::value_bytes(&answer.messages),
        )
    });
    let took = unwaited(begun, request.wait_ms);
    state
        .metrics
        .observe_fetch(took, messages as u64, bytes as u64);
    let mut share = BudgetShare::default();
    charge(&state.budget, &mut share, bytes + messages * 192)?;
    let parts = answers
        .iter()
        .zip(&request.queues)
        .map(|(answer, from)| match answer {
            Ok(answer) => Ok(FetchOut {
                answer,
                encoding: wanted.encoding,
                place: true,
            }),
            Err(error) => Err((
                Place {
                    topic: &from.topic,
                    queue: from.queue,
                },
                error.clone(),
            )),
        });
    Ok(keep_until_sent(respond(parts, Nothing {}, false), share))
}

/// The first offset at or after a time.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = OffsetAtTime)]
pub struct OffsetBody {
    offset: u64,
}

/// The offset of the first message at or after a time; the end where there is none.
#[utoipa::path(get, path = "/v1/topics/{topic}/queues/{queue}/offset", tag = "consume",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("queue" = u32, Path, description = "Queue number"),
        ("timestamp_ms" = u64, Query, description = "Milliseconds since 1970"),
    ), responses(
    (status = 200, description = "The offset", body = OffsetBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn offset_at(
    State(state): State<HttpState>,
    from: TopicQueue,
    params: Params,
) -> Result<Response, ApiError> {
    let timestamp_ms = params
        .only(&["timestamp_ms"])?
        .number("timestamp_ms")?
        .ok_or_else(|| {
            ApiError::invalid("timestamp_ms is missing; it says which time to look for")
        })?;
    let offset = state
        .broker
        .offset_at(&from.topic, from.queue, timestamp_ms)
        .await?;
    Ok(json(StatusCode::OK, &OffsetBody { offset }))
}
