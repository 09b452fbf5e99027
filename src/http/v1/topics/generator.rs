//! A topic's generator: messages that the server makes at a steady rate.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::Generator;
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::object;
use crate::http::path::TopicName;
use crate::http::query::Params;

/// Messages that the leader of queue 0 stores there, as long as the topic's backlog has room.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GeneratorBody {
    /// 0.001 to 10000, in steps of 0.001.
    rate_per_s: f64,
    /// Of every message; at most 64 KiB.
    #[serde(default, deserialize_with = "object::or_default")]
    value: String,
}

impl GeneratorBody {
    fn generator(self) -> Result<Generator, ApiError> {
        let rate = self.rate_per_s;
        let per_1000_s = (rate * 1000.0).round();
        if !(1.0..=10_000_000.0).contains(&per_1000_s) {
            return Err(ApiError::invalid(format!(
                "rate_per_s is {rate}; it must be 0.001 to 10000"
            )));
        }
        Ok(Generator {
            // Checked above.
            per_1000_s: per_1000_s as u64,
            value: Bytes::from(self.value),
        })
    }
}

/// Has the topic generate messages; a generator that is there is replaced.
#[utoipa::path(put, path = "/v1/topics/{topic}/generator", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")),
    request_body = GeneratorBody, responses(
    (status = 200, description = "The generator", body = GeneratorBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn put(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let generator = body.parse::<GeneratorBody>()?.generator()?;
    let answer = shown(&generator);
    state.broker.set_generator(&name, Some(generator)).await?;
    Ok(answer)
}

/// What the topic generates.
#[utoipa::path(get, path = "/v1/topics/{topic}/generator", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")), responses(
    (status = 200, description = "The generator", body = GeneratorBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    Ok(shown(&state.broker.generator(&name).await?))
}

/// Stops the generator, if there is one.
#[utoipa::path(delete, path = "/v1/topics/{topic}/generator", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")), responses(
    (status = 204, description = "Nothing is generated any more"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn delete(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    state.broker.set_generator(&name, None).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn shown(generator: &Generator) -> Response {
    let body = GeneratorBody {
        rate_per_s: generator.per_1000_s as f64 / 1000.0,
        value: String::from_utf8_lossy(&generator.value).into_owned(),
    };
    json(StatusCode::OK, &body)
}
