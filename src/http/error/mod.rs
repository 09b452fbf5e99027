//! The one place that turns failures into RFC 9457 problems: status, code, title, retry hints.
//!
//! A handler or extractor fails with an [`ApiError`]; the response then carries it as an extension
//! and [`render`], the outermost layer, writes the body. Only there is it known whether the
//! request was a write, which decides whether the client is told an `outcome`.

#[cfg(test)]
mod tests;

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::broker::{BrokerError, Outcome};
use crate::names::NAME_RULE;

/// What clients are told to wait before they try again, in seconds, where nothing better is known.
const RETRY_AFTER_S: u64 = 1;

pub const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// Every way an endpoint says no.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiError {
    Broker(BrokerError),
    UnknownRoute { path: String },
    MethodNotAllowed { method: Method },
    SlowBody { reason: String },
    NotReady(String),
    Panicked,
}

impl ApiError {
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::Broker(BrokerError::InvalidRequest(detail.into()))
    }

    /// `what` is the kind of thing named: "topic name", "consumer group".
    pub fn invalid_name(what: &str, name: &str) -> Self {
        let shown: String = name.chars().take(130).collect();
        Self::Broker(BrokerError::InvalidName(format!(
            "the {what} {shown:?} is not {NAME_RULE}"
        )))
    }

    pub fn overloaded(detail: &str) -> Self {
        Self::Broker(BrokerError::Overloaded(detail.to_owned()))
    }
}

impl From<BrokerError> for ApiError {
    fn from(error: BrokerError) -> Self {
        Self::Broker(error)
    }
}

/// Status and stable code of a failure: the contract's table.
fn classify(error: &ApiError) -> (StatusCode, &'static str, &'static str) {
    use BrokerError as B;
    use StatusCode as S;
    let broker = match error {
        ApiError::Broker(broker) => broker,
        ApiError::UnknownRoute { .. } => return (S::NOT_FOUND, "not_found", "No such resource"),
        ApiError::MethodNotAllowed { .. } => {
            return (
                S::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "Method not allowed",
            );
        }
        ApiError::SlowBody { .. } => {
            return (
                S::REQUEST_TIMEOUT,
                "request_timeout",
                "The request took too long to arrive",
            );
        }
        ApiError::NotReady(_) => return (S::SERVICE_UNAVAILABLE, "not_ready", "Not ready"),
        ApiError::Panicked => return (S::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
    };
    match broker {
        B::InvalidRequest(_) => (S::BAD_REQUEST, "invalid_request", "Invalid request"),
        B::InvalidName(_) => (S::BAD_REQUEST, "invalid_name", "Invalid name"),
        B::TopicNotFound { .. } => (S::NOT_FOUND, "topic_not_found", "Topic not found"),
        B::QueueNotFound { .. } => (S::NOT_FOUND, "queue_not_found", "Queue not found"),
        B::ReplicaNotFound { .. } => (S::NOT_FOUND, "replica_not_found", "Replica not found"),
        B::ExchangeNotFound { .. } => (S::NOT_FOUND, "exchange_not_found", "Exchange not found"),
        B::ExchangeExists { .. } => (S::CONFLICT, "exchange_exists", "Exchange exists"),
        B::BindingNotFound { .. } => (S::NOT_FOUND, "binding_not_found", "Binding not found"),
        B::Unroutable { .. } => (S::NOT_FOUND, "unroutable", "No binding takes the message"),
        B::ConsumerGroupNotFound { .. } => (
            S::NOT_FOUND,
            "consumer_group_not_found",
            "Consumer group not found",
        ),
        B::TopicExists { .. } => (S::CONFLICT, "topic_exists", "Topic exists"),
        B::FencedMember { .. } | B::NotAMember { .. } => {
            (S::CONFLICT, "fenced_member", "Member is fenced")
        }
        B::MemberNotFound { .. } => (S::NOT_FOUND, "member_not_found", "Member not found"),
        B::GroupHasMembers { .. } => (
            S::CONFLICT,
            "group_has_members",
            "Consumer group has members",
        ),
        B::GroupModeConflict { .. } | B::GroupDeliveryConflict { .. } => (
            S::CONFLICT,
            "group_mode_conflict",
            "Consumer group works the other way",
        ),
        B::FencedProducer { .. } => (S::CONFLICT, "fenced_producer", "Producer is fenced"),
        B::OutOfOrderSequence { .. } => (
            S::CONFLICT,
            "out_of_order_sequence",
            "Sequence out of order",
        ),
        B::OffsetConflict { .. } | B::OffsetMoved { .. } => {
            (S::CONFLICT, "offset_conflict", "Offset conflict")
        }
        B::LeaseExpired { .. } => (S::CONFLICT, "lease_expired", "Lease is over"),
        B::OffsetHeld { .. } => (S::CONFLICT, "offset_conflict", "Offset conflict"),
        B::TransactionNotFound { .. } => (
            S::NOT_FOUND,
            "transaction_not_found",
            "Transaction not found",
        ),
        B::TransactionEnded { .. } => (S::CONFLICT, "transaction_ended", "Transaction has ended"),
        B::TransactionBusy { .. } => (
            S::CONFLICT,
            "transaction_busy",
            "Transaction is being prepared",
        ),
        B::OffsetOutOfRange { .. } => (
            S::RANGE_NOT_SATISFIABLE,
            "offset_out_of_range",
            "Offset out of range",
        ),
        B::MessageTooLarge { .. } => (
            S::PAYLOAD_TOO_LARGE,
            "message_too_large",
            "Message too large",
        ),
        B::RequestTooLarge { .. } => (
            S::PAYLOAD_TOO_LARGE,
            "request_too_large",
            "Request too large",
        ),
        B::MessageNotFound { .. } => (S::NOT_FOUND, "message_not_found", "Message not found"),
        B::AlreadyDelivered { .. } => (
            S::CONFLICT,
            "already_delivered",
            "Message was already delivered",
        ),
        B::QuotaExceeded(_) | B::RateExceeded { .. } => {
            (S::TOO_MANY_REQUESTS, "quota_exceeded", "Quota exceeded")
        }
        B::GeneratorNotFound { .. } => (S::NOT_FOUND, "generator_not_found", "Generator not found"),
        B::BacklogFull(_) | B::Dropped { .. } => {
            (S::TOO_MANY_REQUESTS, "backlog_full", "Backlog full")
        }
        B::NoLeader { .. } => (S::SERVICE_UNAVAILABLE, "no_leader", "No leader"),
        B::NotEnoughReplicas { .. } | B::CannotLead { .. } => (
            S::SERVICE_UNAVAILABLE,
            "not_enough_replicas",
            "Not enough replicas",
        ),
        B::Overloaded(_) => (S::SERVICE_UNAVAILABLE, "overloaded", "Overloaded"),
        B::DiskFull { .. } => (S::SERVICE_UNAVAILABLE, "disk_full", "Disk full"),
        B::Quarantined => (S::SERVICE_UNAVAILABLE, "quarantined", "Quarantined"),
        B::ShuttingDown => (S::SERVICE_UNAVAILABLE, "shutting_down", "Shutting down"),
        B::Timeout { .. } => (S::GATEWAY_TIMEOUT, "timeout", "Timeout"),
        B::AnswerLost => (S::GATEWAY_TIMEOUT, "timeout", "Answer lost"),
        B::Internal(_) => (S::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
    }
}

fn detail(error: &ApiError) -> String {
    match error {
        ApiError::Broker(broker) => broker.to_string(),
        ApiError::UnknownRoute { path } => {
            format!("there is nothing at {path}; /openapi.json lists what there is")
        }
        ApiError::MethodNotAllowed { method } => {
            format!("{method} is not possible here; the Allow header lists what is")
        }
        ApiError::SlowBody { reason } => reason.clone(),
        ApiError::NotReady(reason) => reason.clone(),
        ApiError::Panicked => {
            "the request failed in an unforeseen way; the server's log has more".to_owned()
        }
    }
}

/// An error body: RFC 9457 with `code`, `retryable` and what else helps to go on.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// `urn:quorate:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: &'static str,
    pub status: u16,
    pub detail: String,
    /// Stable, for programs.
    pub code: &'static str,
    /// Whether the same request may succeed later without a change to it.
    pub retryable: bool,
    /// For writes: `not_committed` or `unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub earliest_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_offset: Option<u64>,
    /// After this time the same request would be within its quota.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Where a request of several parts failed in all of them: each part's own result.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub results: Option<Box<RawValue>>,
}

impl Problem {
    /// `write` says whether the client must be told if something may have been stored.
    pub fn new(error: &ApiError, write: bool) -> Self {
        let (status, code, title) = classify(error);
        let (retryable, outcome) = match error {
            ApiError::Broker(broker) => (broker.retryable(), broker.outcome()),
            ApiError::SlowBody { .. } | ApiError::NotReady(_) => (true, Outcome::NotCommitted),
            ApiError::UnknownRoute { .. } | ApiError::MethodNotAllowed { .. } => {
                (false, Outcome::NotCommitted)
            }
            ApiError::Panicked => (false, Outcome::Unknown),
        };
        let (earliest_offset, end_offset) = match error {
            ApiError::Broker(BrokerError::OffsetOutOfRange {
                earliest_offset,
                end_offset,
                ..
            }) => (Some(*earliest_offset), Some(*end_offset)),
            _ => (None, None),
        };
        Self {
            kind: format!("urn:quorate:problem:{code}"),
            title,
            status: status.as_u16(),
            detail: detail(error),
            code,
            retryable,
            outcome: write.then_some(match outcome {
                Outcome::NotCommitted => "not_committed",
                Outcome::Unknown => "unknown",
            }),
            earliest_offset,
            end_offset,
            retry_after_ms: match error {
                ApiError::Broker(BrokerError::RateExceeded { retry_after_ms, .. }) => {
                    Some(*retry_after_ms)
                }
                _ => None,
            },
            results: None,
        }
    }

    pub fn status(&self) -> StatusCode {
        // Every status above is one of http's constants.
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The whole response, with `Retry-After` where waiting helps.
    pub fn response(&self) -> Response {
        // The struct has string keys and numbers only: serialising it cannot fail.
        let body = serde_json::to_vec(self).unwrap_or_default();
        let mut response = (self.status(), Body::from(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, PROBLEM_JSON);
        if matches!(self.status, 429 | 503) {
            let seconds = self.retry_after_ms.map(|ms| ms.div_ceil(1000));
            let seconds = seconds.unwrap_or(RETRY_AFTER_S).max(RETRY_AFTER_S);
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// An [`ApiError`] on its way to [`render`].
#[derive(Debug, Clone)]
struct Unrendered(ApiError);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = classify(&self).0.into_response();
        response.extensions_mut().insert(Unrendered(self));
        response
    }
}

/// Whether a request could change something: any but reads, and `/v1/fetch`, a read by POST.
pub fn is_write(method: &Method, path: &str) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) && path != "/v1/fetch"
}

/// The layer that writes the problem bodies and logs what a person should look at.
pub async fn render(request: Request, next: Next) -> Response {
    let write = is_write(request.method(), request.uri().path());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    let Some(Unrendered(error)) = response.extensions_mut().remove::<Unrendered>() else {
        return response;
    };
    let problem = Problem::new(&error, write);
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    if problem.status == 500 {
        tracing::error!(%method, route, code = problem.code, detail = problem.detail, "request failed");
    } else {
        tracing::debug!(%method, route, status = problem.status, code = problem.code, "request refused");
    }
    let mut rendered = problem.response();
    for name in [header::ALLOW, header::CONNECTION] {
        copy_header(&response, &mut rendered, name);
    }
    if matches!(error, ApiError::SlowBody { .. }) {
        rendered
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    rendered
}

fn copy_header(from: &Response, to: &mut Response, name: HeaderName) {
    if let Some(value) = from.headers().get(&name) {
        to.headers_mut().insert(name, value.clone());
    }
}
