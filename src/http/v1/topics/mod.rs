//! Topics: create, list, describe, change, delete.

pub mod generator;
mod wire;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::{TopicName, checked_name};
use crate::http::query::Params;
use wire::{Allowed, CreateTopic, TopicBody, TopicsBody, UpdateTopic};

/// Creates a topic; returns when every queue has a leader. The same again is answered 200.
#[utoipa::path(post, path = "/v1/topics", tag = "topics", request_body = CreateTopic, responses(
    (status = 201, description = "Created", body = TopicBody),
    (status = 200, description = "Existed with this configuration", body = TopicBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn create(
    State(state): State<HttpState>,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: CreateTopic = body.parse()?;
    checked_name("topic name", &wanted.name)?;
    let config = wanted.config(Allowed::from(&state))?;
    let (topic, created) = state.broker.create_topic(&wanted.name, config).await?;
    let status = if created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let mut response = json(status, &TopicBody::from(&topic));
    if let Ok(location) = HeaderValue::try_from(format!("/v1/topics/{}", wanted.name)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// All topics.
#[utoipa::path(get, path = "/v1/topics", tag = "topics", responses(
    (status = 200, description = "All topics", body = TopicsBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    let topics = state.broker.topics().await?;
    let topics = topics.iter().map(TopicBody::from).collect();
    Ok(json(StatusCode::OK, &TopicsBody { topics }))
}

/// One topic with the state of its queues.
#[utoipa::path(get, path = "/v1/topics/{topic}", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")), responses(
    (status = 200, description = "The topic", body = TopicBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let topic = state.broker.topic(&name).await?;
    Ok(json(StatusCode::OK, &TopicBody::from(&topic)))
}

/// Changes a topic; absent fields stay as they are, queues can only grow.
#[utoipa::path(patch, path = "/v1/topics/{topic}", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")),
    request_body = UpdateTopic, responses(
    (status = 200, description = "The changed topic", body = TopicBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn update(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: UpdateTopic = body.parse()?;
    let current = state.broker.topic(&name).await?;
    let patch = wanted.patch(&current.config, Allowed::from(&state))?;
    let topic = state.broker.update_topic(&name, patch).await?;
    Ok(json(StatusCode::OK, &TopicBody::from(&topic)))
}

#[derive(Debug, Serialize, ToSchema)]
pub struct QueueOfKey {
    queue: u32,
}

/// The queue that messages with this key go to. It stays the same until `hash_queues` is changed.
#[utoipa::path(get, path = "/v1/topics/{topic}/queue", tag = "topics",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("key" = String, Query, description = "A message's key"),
    ), responses(
    (status = 200, description = "The queue", body = QueueOfKey),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn queue_of_key(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    let params = params.only(&["key"])?;
    let missing = || ApiError::invalid("name the key with ?key=");
    let key = params.get("key").ok_or_else(missing)?;
    let queue = state.broker.queue_of_key(&name, key).await?;
    Ok(json(StatusCode::OK, &QueueOfKey { queue }))
}

/// Deletes a topic with all its messages.
#[utoipa::path(delete, path = "/v1/topics/{topic}", tag = "topics",
    params(("topic" = String, Path, description = "Topic name")), responses(
    (status = 204, description = "Deleted"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn delete(
    State(state): State<HttpState>,
    TopicName(name): TopicName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    state.broker.delete_topic(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
