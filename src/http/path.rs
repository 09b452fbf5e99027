//! What a path names, checked before any handler runs.

use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;

use super::error::ApiError;
use crate::names::{is_readable_topic, is_valid_name};

/// `{topic}` of the path.
#[derive(Debug)]
pub struct TopicName(pub String);

/// `{topic}` and `{queue}` of the path.
#[derive(Debug)]
pub struct TopicQueue {
    pub topic: String,
    pub queue: u32,
}

/// `{topic}` and `{message_id}` of the path.
#[derive(Debug)]
pub struct MessagePath {
    pub topic: String,
    pub message_id: String,
}

/// `{group}` of the path.
#[derive(Debug)]
pub struct GroupName(pub String);

/// `name` if it follows the rule, which the error repeats; `what` is the kind of thing it names.
pub fn checked_name(what: &str, name: &str) -> Result<(), ApiError> {
    if is_valid_name(name) {
        Ok(())
    } else {
        Err(ApiError::invalid_name(what, name))
    }
}

/// The name of a topic that is not written to: one of the users' or of dead letters.
pub fn checked_topic(name: &str) -> Result<(), ApiError> {
    if is_readable_topic(name) {
        Ok(())
    } else {
        Err(ApiError::invalid_name("topic name", name))
    }
}

async fn params<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<RawPathParams, ApiError> {
    RawPathParams::from_request_parts(parts, state)
        .await
        .map_err(|error| ApiError::invalid(format!("the path cannot be read: {error}")))
}

fn find<'a>(params: &'a RawPathParams, name: &str) -> &'a str {
    // Routes that use an extractor have its parameter; an empty name is refused all the same.
    params
        .iter()
        .find(|(key, _)| *key == name)
        .map_or("", |(_, value)| value)
}

impl<S: Send + Sync> FromRequestParts<S> for TopicName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let name = find(&params, "topic");
        checked_topic(name)?;
        Ok(Self(name.to_owned()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for TopicQueue {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let topic = find(&params, "topic");
        checked_topic(topic)?;
        let queue = find(&params, "queue");
        let queue = queue.parse().map_err(|_| {
            let shown: String = queue.chars().take(40).collect();
            ApiError::invalid(format!("the queue {shown:?} is not a whole number from 0"))
        })?;
        Ok(Self {
            topic: topic.to_owned(),
            queue,
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for MessagePath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let topic = find(&params, "topic");
        checked_name("topic name", topic)?;
        Ok(Self {
            topic: topic.to_owned(),
            message_id: find(&params, "message_id").to_owned(),
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for GroupName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let name = find(&params, "group");
        checked_name("consumer group", name)?;
        Ok(Self(name.to_owned()))
    }
}
