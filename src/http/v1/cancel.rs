//! Taking delayed messages back.

use axum::extract::State;
use axum::http::StatusCode;

use crate::http::HttpState;
use crate::http::error::{ApiError, Problem};
use crate::http::path::MessagePath;
use crate::http::query::Params;

/// Takes a delayed message back: it will never be delivered. Cancelled and delivered exclude each
/// other. Repeating it is safe.
#[utoipa::path(delete, path = "/v1/topics/{topic}/messages/{message_id}", tag = "produce",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("message_id" = String, Path, description = "As the produce answer gave it"),
    ),
    responses(
    (status = 204, description = "Cancelled, now or before"),
    (status = 404, description = "`message_not_found`: the topic has no such message", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "`already_delivered`: it is visible", body = Problem, content_type = "application/problem+json"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn cancel_message(
    State(state): State<HttpState>,
    MessagePath { topic, message_id }: MessagePath,
    params: Params,
) -> Result<StatusCode, ApiError> {
    params.none()?;
    state.broker.cancel_message(&topic, &message_id).await?;
    Ok(StatusCode::NO_CONTENT)
}
