//! For operation: health, metrics and the generated reference.

use std::sync::LazyLock;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::broker::BrokerError;
use crate::http::HttpState;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::query::Params;

#[derive(Debug, Serialize, ToSchema)]
pub struct HealthBody {
    status: &'static str,
}

/// Whether the process runs and answers.
#[utoipa::path(get, path = "/health/live", tag = "operation", responses(
    (status = 200, description = "It does", body = HealthBody),
))]
pub async fn live(params: Params) -> Result<Response, ApiError> {
    params.none()?;
    Ok(json(StatusCode::OK, &HealthBody { status: "live" }))
}

/// Whether the node can serve requests; if not, why.
#[utoipa::path(get, path = "/health/ready", tag = "operation", responses(
    (status = 200, description = "It can", body = HealthBody),
    (status = 503, description = "Not now; `detail` says why", body = Problem, content_type = "application/problem+json"),
))]
pub async fn ready(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    if state.shutdown.is_cancelled() {
        return Err(BrokerError::ShuttingDown.into());
    }
    match state.broker.not_ready() {
        Some(reason) => Err(ApiError::NotReady(reason)),
        None => Ok(json(StatusCode::OK, &HealthBody { status: "ready" })),
    }
}

/// Prometheus metrics of this node.
#[utoipa::path(get, path = "/metrics", tag = "operation", responses(
    (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text"),
))]
pub async fn metrics(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    state.metrics.set_inflight_bytes(state.budget.used());
    let text = state
        .metrics
        .render()
        .map_err(|_| BrokerError::Internal("the metrics can't be written".to_owned()))?;
    let media = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, media)], text).into_response())
}

/// This reference.
#[utoipa::path(get, path = "/openapi.json", tag = "operation", responses(
    (status = 200, description = "OpenAPI 3.1", body = Object),
))]
pub async fn openapi(params: Params) -> Result<Response, ApiError> {
    static DOCUMENT: LazyLock<serde_json::Result<String>> =
        LazyLock::new(|| crate::http::openapi().to_pretty_json());
    params.none()?;
    match &*DOCUMENT {
        Ok(text) => {
            Ok(([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response())
        }
        Err(error) => Err(BrokerError::Internal(format!("no reference: {error}")).into()),
    }
}
