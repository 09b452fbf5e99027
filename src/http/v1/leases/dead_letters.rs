//! Retries, dead letters, and what a group has in flight.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::wire::MAX_LEASE_MS;
use crate::coordinator::leases::RetryPolicy;
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::GroupName;
use crate::http::query::{Params, bounded};

const MAX_DELIVERIES: u32 = 1_000;
const MAX_BACKOFFS: usize = 100;
const MAX_REDRIVE: usize = 10_000;
const DEFAULT_REDRIVE: usize = 100;

/// How often a message is delivered before it is dead, and how long it waits after a nack.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicyBody {
    /// 1 to 1000, default 16.
    #[serde(default)]
    max_deliveries: Option<u32>,
    /// After the first delivery, the second…; the last value repeats. 1 to 100 values of 0 to
    /// 43200000, default 10000, 30000, 60000.
    #[serde(default)]
    backoff_ms: Option<Vec<u64>>,
}

impl RetryPolicyBody {
    fn policy(self) -> Result<RetryPolicy, ApiError> {
        let default = RetryPolicy::default();
        let backoff_ms = self.backoff_ms.unwrap_or(default.backoff_ms);
        if !(1..=MAX_BACKOFFS).contains(&backoff_ms.len()) {
            return Err(ApiError::invalid(format!(
                "backoff_ms must have 1 to {MAX_BACKOFFS} values"
            )));
        }
        for wait_ms in &backoff_ms {
            bounded("backoff_ms", Some(*wait_ms), 0..=MAX_LEASE_MS, 0)?;
        }
        let max_deliveries = bounded(
            "max_deliveries",
            self.max_deliveries,
            1..=MAX_DELIVERIES,
            default.max_deliveries,
        )?;
        Ok(RetryPolicy {
            max_deliveries,
            backoff_ms,
        })
    }

    fn of(policy: RetryPolicy) -> Self {
        Self {
            max_deliveries: Some(policy.max_deliveries),
            backoff_ms: Some(policy.backoff_ms),
        }
    }
}

/// Settles how a group that leases retries.
#[utoipa::path(put, path = "/v1/groups/{group}/retry_policy", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = RetryPolicyBody, responses(
    (status = 200, description = "The policy", body = RetryPolicyBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn set_retry_policy(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let policy = body.parse::<RetryPolicyBody>()?.policy()?;
    let set = state.broker.set_retry_policy(&group, policy.clone());
    set.await?;
    Ok(json(StatusCode::OK, &RetryPolicyBody::of(policy)))
}

/// How a group that leases retries.
#[utoipa::path(get, path = "/v1/groups/{group}/retry_policy", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")), responses(
    (status = 200, description = "The policy", body = RetryPolicyBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get_retry_policy(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let view = state.broker.lease_view(&group).await?;
    Ok(json(StatusCode::OK, &RetryPolicyBody::of(view.policy)))
}

/// What a group has in flight in one queue.
#[derive(Debug, Serialize, ToSchema)]
struct InFlightBody {
    topic: String,
    queue: u32,
    /// The lowest offset that is not done.
    offset: u64,
    /// The first one never looked at.
    next_offset: u64,
    /// With consumers.
    leased: u32,
    /// To be delivered again, or behind an earlier message of their key.
    waiting: u32,
    /// On their way to the dead letters.
    dead: u32,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct InFlightAnswer {
    queues: Vec<InFlightBody>,
}

/// What a group that leases has in flight.
#[utoipa::path(get, path = "/v1/groups/{group}/in_flight", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")), responses(
    (status = 200, description = "Queue by queue", body = InFlightAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn in_flight(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let queues = state.broker.in_flight(&group).await?.into_iter();
    let queues = queues.map(|(topic, counts)| InFlightBody {
        topic,
        queue: counts.queue,
        offset: counts.offset,
        next_offset: counts.next,
        leased: counts.leased,
        waiting: counts.waiting,
        dead: counts.dead,
    });
    let queues = queues.collect();
    Ok(json(StatusCode::OK, &InFlightAnswer { queues }))
}

/// How many dead letters are to go back.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RedriveBody {
    /// 1 to 10000, default 100.
    #[serde(default)]
    max_messages: Option<usize>,
}

#[derive(Debug, Serialize, ToSchema)]
struct SkippedBody {
    /// Among the dead letters.
    offset: u64,
    reason: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct RedriveAnswer {
    redriven: u64,
    /// Those that stay dead: their topic is gone.
    skipped: Vec<SkippedBody>,
}

/// Puts dead letters back where they came from, oldest first, each once. They stay readable in their
/// topic; the next call goes on behind them.
#[utoipa::path(post, path = "/v1/groups/{group}/dlq/redrive", tag = "leases",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = RedriveBody, responses(
    (status = 200, description = "How many went back", body = RedriveAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn redrive(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let RedriveBody { max_messages } = body.parse()?;
    let most = bounded(
        "max_messages",
        max_messages,
        1..=MAX_REDRIVE,
        DEFAULT_REDRIVE,
    )?;
    let done = state.broker.redrive(&group, most).await?;
    let skipped = done.skipped.into_iter();
    let answer = RedriveAnswer {
        redriven: done.redriven,
        skipped: skipped
            .map(|skipped| SkippedBody {
                offset: skipped.offset,
                reason: skipped.reason,
            })
            .collect(),
    };
    Ok(json(StatusCode::OK, &answer))
}
