//! Consume by lease: receive, ack, nack, extend, and the stream that pushes.

mod dead_letters;
mod stream;
mod wire;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::consume::query::{self, Encoding, Form};
use super::consume::render::{MessageDoc, MessageOut};
use super::consume::until_shutdown;
use crate::broker::leases::{LeasedMessage, ReceiptResult, ReceiveRequest, encode_receipt};
use crate::http::HttpState;
use crate::http::body::{JsonBody, keep_until_sent};
use crate::http::error::{ApiError, Problem};
use crate::http::limits::BudgetShare;
use crate::http::multi::{Nothing, json_with_capacity, respond};
use crate::http::path::GroupName;
use crate::http::query::Params;
pub use dead_letters::{
    __path_get_retry_policy, __path_in_flight, __path_redrive, __path_set_retry_policy,
    get_retry_policy, in_flight, redrive, set_retry_policy,
};
use wire::{AckBody, ExtendBody, NackBody, ReceiveBody};

/// A leased message on its way into JSON.
#[derive(Debug, Serialize)]
struct LeasedOut<'a> {
    topic: &'a str,
    #[serde(flatten)]
    message: MessageOut<'a>,
    receipt: String,
    delivery_count: u32,
}

impl<'a> LeasedOut<'a> {
    fn new(group: &str, leased: &'a LeasedMessage, encoding: Encoding) -> Self {
        Self {
            topic: &leased.topic,
            message: MessageOut {
                message: &leased.message,
                encoding,
            },
            receipt: encode_receipt(group, &leased.receipt),
            delivery_count: leased.delivery_count,
        }
    }
}

/// Bytes of an answer's JSON, if few need escaping.
fn json_bytes(messages: &[LeasedMessage]) -> usize {
    let values = messages.iter().map(|leased| {
        let value = leased.message.value.as_ref();
        value.map_or(0, bytes::Bytes::len) * 9 / 8 + 320
    });
    values.sum::<usize>() + 64
}

#[derive(Debug, Serialize)]
struct ReceiveOut<'a> {
    messages: Vec<LeasedOut<'a>>,
}

/// A leased message as the reference describes it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LeasedMessage)]
pub struct LeasedDoc {
    topic: String,
    #[serde(flatten)]
    message: MessageDoc,
    /// Opaque; names this delivery for ack, nack and extend.
    receipt: String,
    /// How often the message was leased, this time included.
    delivery_count: u32,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ReceiveAnswer)]
pub struct ReceiveDoc {
    messages: Vec<LeasedDoc>,
}

/// Leases messages to the caller: nobody else in the group gets them until the lease ends or they
/// are given back. A group that leases commits no offsets.
#[utoipa::path(post, path = "/v1/groups/{group}/receive", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = ReceiveBody, responses(
    (status = 200, description = "The messages, or none after wait_ms", body = ReceiveDoc),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn receive(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: ReceiveBody = body.parse()?;
    let encoding = wanted.encoding;
    let request = wanted.request(group)?;
    let answer = until_shutdown(&state, request.wait_ms, |broker, wait_ms| {
        let asked = ReceiveRequest {
            wait_ms,
            ..request.clone()
        };
        async move { broker.receive(asked).await }
    })
    .await?;
    let capacity = json_bytes(&answer.messages);
    let values = answer.messages.iter();
    let values = values.map(|m| m.message.value.as_ref().map_or(0, bytes::Bytes::len) as u64);
    let count = answer.messages.len() as u64;
    state.metrics.observe_fetch(None, count, values.sum());
    // What is leased is answered, even where the budget is used up: it is in memory already.
    let mut share = BudgetShare::default();
    let _ = state.budget.take(&mut share, capacity);
    let messages = answer.messages.iter();
    let out = ReceiveOut {
        messages: messages
            .map(|leased| LeasedOut::new(&request.group, leased, encoding))
            .collect(),
    };
    let response = json_with_capacity(StatusCode::OK, &out, capacity);
    Ok(keep_until_sent(response, share))
}

/// One receipt's result.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReceiptBody<'a> {
    receipt: &'a str,
    /// Of `through`: messages that are done now.
    #[serde(skip_serializing_if = "Option::is_none")]
    acked: Option<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ReceiptsAnswer<'a> {
    results: Vec<ReceiptBody<'a>>,
}

fn results<'a>(receipts: impl Iterator<Item = &'a String>, results: &[ReceiptResult]) -> Response {
    let parts = receipts.zip(results).map(|(receipt, result)| {
        let body = |acked| ReceiptBody { receipt, acked };
        match result {
            Ok(acked) => Ok(body(*acked)),
            Err(error) => Err((body(None), error.clone())),
        }
    });
    respond(parts, Nothing {}, true)
}

/// Says that messages are done. Once more is harmless.
#[utoipa::path(post, path = "/v1/groups/{group}/ack", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = AckBody, responses(
    (status = 200, description = "All done", body = ReceiptsAnswer),
    (status = 207, description = "Some done; the other entries are errors", body = ReceiptsAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn ack(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let AckBody { receipts, through } = body.parse()?;
    wire::check_receipts(receipts.len() + usize::from(through.is_some()))?;
    let done = state.broker.ack(&group, &receipts, through.as_ref());
    let done = done.await?;
    Ok(results(receipts.iter().chain(through.as_ref()), &done))
}

/// Gives messages back: they are delivered again after the delay, or as the retry policy says; after
/// their last delivery they go to the dead letters.
#[utoipa::path(post, path = "/v1/groups/{group}/nack", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = NackBody, responses(
    (status = 200, description = "All given back", body = ReceiptsAnswer),
    (status = 207, description = "Some given back; the other entries are errors", body = ReceiptsAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn nack(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let NackBody { receipts, delay_ms } = body.parse()?;
    wire::check_receipts(receipts.len())?;
    let delay_ms = delay_ms.map(wire::checked_delay).transpose()?;
    let done = state.broker.nack(&group, &receipts, delay_ms).await?;
    Ok(results(receipts.iter(), &done))
}

/// Lets leases end `lease_ms` from now.
#[utoipa::path(post, path = "/v1/groups/{group}/extend", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = ExtendBody, responses(
    (status = 200, description = "All extended", body = ReceiptsAnswer),
    (status = 207, description = "Some extended; the other entries are errors", body = ReceiptsAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn extend(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let ExtendBody { receipts, lease_ms } = body.parse()?;
    wire::check_receipts(receipts.len())?;
    let lease_ms = wire::lease_ms(lease_ms)?;
    let done = state.broker.extend(&group, &receipts, lease_ms).await?;
    Ok(results(receipts.iter(), &done))
}

/// Pushes leased messages as server-sent events, at most `prefetch` that are neither acked nor given
/// back at a time. Each event is a message as receive gives it; acks go the usual way.
#[utoipa::path(get, path = "/v1/groups/{group}/messages", tag = "leases",
    params(
        ("group" = String, Path, description = "Consumer group"),
        ("topic" = String, Query, description = "A topic, or several with commas between them"),
        ("prefetch" = Option<u32>, Query, description = "1 to 1000, default 10"),
        ("lease_ms" = Option<u64>, Query, description = "100 to 43200000, default 30000"),
        ("ordered" = Option<bool>, Query, description = "Messages of one key one at a time"),
        ("tag" = Option<String>, Query, description = "`created||paid`: only messages with one of these tags; others are done"),
        ("filter" = Option<String>, Query, description = "As in a fetch; messages it leaves out are done"),
        ("start" = Option<String>, Query, description = "Where the group never leased: `earliest` (default), `latest` or milliseconds since 1970"),
        ("encoding" = Option<String>, Query, description = "`base64` forces value_base64"),
    ),
    responses(
    (status = 200, description = "The stream", content((String = "text/event-stream"))),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn messages(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (request, encoding) = wire::stream_request(group, params)?;
    if query::form(&headers) != Form::Events {
        return Err(ApiError::invalid(
            "this is an event stream; send Accept: text/event-stream, or use POST …/receive",
        ));
    }
    stream::response(state, request, encoding).await
}
