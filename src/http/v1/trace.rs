//! What became of one message.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::broker::TraceEvent;
use crate::http::HttpState;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::MessagePath;
use crate::http::query::Params;

/// Something that happened to a message. What is not known is left out.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TraceEvent)]
pub struct EventDoc {
    /// `stored`, `delivered`, `acked`, `acked_through`, `nacked`, `dead`, `passed` (by a commit).
    event: String,
    time_ms: u64,
    /// The node that saw it.
    node: Option<u64>,
    /// Of `stored`: that of the leader.
    term: Option<u64>,
    group: Option<String>,
    consumer: Option<String>,
    delivery_count: Option<u32>,
    reason: Option<String>,
    /// Tells consumers without a name apart.
    holder: Option<String>,
}

/// The trace of a message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessageTrace)]
pub struct TraceBody<'a> {
    message_id: &'a str,
    queue: u32,
    offset: u64,
    /// Whether its topic is traced now; if not, `stored` is all there may be.
    traced: bool,
    /// By time.
    #[schema(value_type = Vec<EventDoc>)]
    events: &'a [TraceEvent],
    /// Whether there were more than are shown.
    more: bool,
}

/// What became of a message of a topic with `trace: true`: who got it, who said that it was done,
/// how it died. Kept for a day; best effort: what a node saw just before it failed may be missing.
#[utoipa::path(get, path = "/v1/topics/{topic}/messages/{message_id}/trace", tag = "consume",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("message_id" = String, Path, description = "As the produce answer gave it"),
    ),
    responses(
    (status = 200, description = "What was seen, by time", body = TraceBody),
    (status = 404, description = "`message_not_found`: the topic has no such message, or it is not visible", body = Problem, content_type = "application/problem+json"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn message_trace(
    State(state): State<HttpState>,
    MessagePath { topic, message_id }: MessagePath,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let trace = state.broker.message_trace(&topic, &message_id).await?;
    let body = TraceBody {
        message_id: &message_id,
        queue: trace.queue,
        offset: trace.offset,
        traced: trace.traced,
        events: &trace.events,
        more: trace.more,
    };
    Ok(json(StatusCode::OK, &body))
}
