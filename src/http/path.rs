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

/// `{group}` of the path.
#[derive(Debug)]
pub struct GroupName(pub String);

/// `{exchange}` of the path.
#[derive(Debug)]
pub struct ExchangeName(pub String);

/// `{exchange}` and `{topic}` of the path.
#[derive(Debug)]
pub struct ExchangeTopic {
    pub exchange: String,
    pub topic: String,
}

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

impl<S: Send + Sync> FromRequestParts<S> for GroupName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let name = find(&params, "group");
        checked_name("consumer group", name)?;
        Ok(Self(name.to_owned()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ExchangeName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let name = find(&params, "exchange");
        checked_name("exchange name", name)?;
        Ok(Self(name.to_owned()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ExchangeTopic {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = params(parts, state).await?;
        let (exchange, topic) = (find(&params, "exchange"), find(&params, "topic"));
        checked_name("exchange name", exchange)?;
        checked_name("topic name", topic)?;
        Ok(Self {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
        })
    }
}
