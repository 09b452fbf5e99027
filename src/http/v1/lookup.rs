//! Looking messages up over all queues of a topic.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use serde::ser::Serializer;
use utoipa::ToSchema;

use super::consume::query::{self, Encoding};
use super::consume::render::{MessageDoc, MessageOut, json_bytes};
use crate::broker::{LookupAnswer, LookupRequest, Message};
use crate::http::HttpState;
use crate::http::body::{charge, keep_until_sent};
use crate::http::error::{ApiError, Problem};
use crate::http::limits::BudgetShare;
use crate::http::multi::json_with_capacity;
use crate::http::path::TopicName;
use crate::http::query::{Params, bounded};

const DEFAULT_MESSAGES: usize = 100;
const MAX_MESSAGES: usize = 1_000;

/// What a lookup found, by time, queue and offset.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LookupAnswer)]
pub struct LookupDoc {
    messages: Vec<MessageDoc>,
    /// Whether there may be more behind these, or behind what there was time to look at.
    more: bool,
    /// With `more`: give it as `after`, with the same other parameters, to go on.
    next: Option<String>,
}

#[derive(Serialize)]
struct LookupOut<'a> {
    #[serde(serialize_with = "messages_out")]
    messages: (&'a [Message], Encoding),
    more: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

fn messages_out<S: Serializer>(
    (messages, encoding): &(&[Message], Encoding),
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(messages.iter().map(|message| MessageOut {
        message,
        encoding: *encoding,
    }))
}

/// Messages of all queues, by key, by time, or the one with an id; the oldest first.
#[utoipa::path(get, path = "/v1/topics/{topic}/messages", tag = "consume",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("message_id" = Option<String>, Query, description = "The message with this id, or `message_not_found`; alone, but for `encoding`"),
        ("key" = Option<String>, Query, description = "Messages with exactly this key"),
        ("from_timestamp_ms" = Option<u64>, Query, description = "Stored at or after it"),
        ("to_timestamp_ms" = Option<u64>, Query, description = "Stored at or before it"),
        ("tag" = Option<String>, Query, description = "`created||paid`: only messages with one of these tags"),
        ("filter" = Option<String>, Query, description = "Only messages for which it is true, as in a fetch"),
        ("max_messages" = Option<u32>, Query, description = "1 to 1000, default 100"),
        ("after" = Option<String>, Query, description = "`next` of the answer before"),
        ("encoding" = Option<String>, Query, description = "`base64` forces value_base64"),
    ),
    responses(
    (status = 200, description = "What was found", body = LookupDoc),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn lookup(
    State(state): State<HttpState>,
    TopicName(topic): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    let params = params.only(&[
        "message_id",
        "key",
        "from_timestamp_ms",
        "to_timestamp_ms",
        "tag",
        "filter",
        "max_messages",
        "after",
        "encoding",
    ])?;
    let encoding = query::encoding(params.get("encoding"))?;
    let answer = match params.get("message_id").map(str::to_owned) {
        Some(id) => {
            params.only(&["message_id", "encoding"])?;
            LookupAnswer {
                messages: vec![state.broker.message(&topic, &id).await?],
                next: None,
            }
        }
        None => state.broker.lookup(&wanted(topic, &params)?).await?,
    };
    let capacity = json_bytes(&answer.messages);
    let mut share = BudgetShare::default();
    charge(&state.budget, &mut share, capacity)?;
    let out = LookupOut {
        messages: (&answer.messages, encoding),
        more: answer.next.is_some(),
        next: answer.next.map(|next| next.to_string()),
    };
    let response = json_with_capacity(StatusCode::OK, &out, capacity);
    Ok(keep_until_sent(response, share))
}

fn wanted(topic: String, params: &Params) -> Result<LookupRequest, ApiError> {
    let request = LookupRequest {
        topic,
        key: params.get("key").map(str::to_owned),
        selection: query::selection(params.get("tag"), params.get("filter"))?,
        from_timestamp_ms: params.number("from_timestamp_ms")?,
        to_timestamp_ms: params.number("to_timestamp_ms")?,
        after: params.get("after").map(str::parse).transpose()?,
        max_messages: bounded(
            "max_messages",
            params.number("max_messages")?,
            1..=MAX_MESSAGES,
            DEFAULT_MESSAGES,
        )?,
    };
    let times = (request.from_timestamp_ms, request.to_timestamp_ms);
    match times {
        (None, None) if request.key.is_none() => Err(ApiError::invalid(
            "nothing to look for; give key, message_id, or from_timestamp_ms and to_timestamp_ms",
        )),
        (Some(from), Some(to)) if from > to => Err(ApiError::invalid(
            "from_timestamp_ms is later than to_timestamp_ms",
        )),
        _ => Ok(request),
    }
}
