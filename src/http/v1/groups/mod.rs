//! Consumer groups: members, their queues, and what is told of a group.

mod stream;
mod wire;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};

use super::consume::{Form, form};
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::{GroupMember, GroupName};
use crate::http::query::{Params, bounded};
use wire::{
    GroupBody, GroupSummaryBody, GroupsBody, HeartbeatAnswer, HeartbeatBody, JoinBody, JoinedBody,
};

/// Makes somebody a member; again with the same instance_id, the same member.
#[utoipa::path(post, path = "/v1/groups/{group}/members", tag = "groups",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = JoinBody, responses(
    (status = 201, description = "A member, with the queues it may consume at once", body = JoinedBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn join(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let request = body.parse::<JoinBody>()?.request(group)?;
    let answer = state.broker.join_group(request).await?;
    Ok(json(StatusCode::CREATED, &JoinedBody::from(answer)))
}

/// A member's sign of life; tells it the queues it is to consume.
#[utoipa::path(post, path = "/v1/groups/{group}/members/{member}/heartbeat", tag = "groups",
    params(
        ("group" = String, Path, description = "Consumer group"),
        ("member" = String, Path, description = "Member id"),
    ),
    request_body = HeartbeatBody, responses(
    (status = 200, description = "The member's epoch and queues", body = HeartbeatAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn heartbeat(
    State(state): State<HttpState>,
    GroupMember { group, member }: GroupMember,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let body: HeartbeatBody = body.parse()?;
    let epoch = body.epoch;
    let owned = body.owned()?;
    let broker = &state.broker;
    let answer = broker.heartbeat(&group, &member, epoch, owned.as_deref());
    Ok(json(StatusCode::OK, &HeartbeatAnswer::from(&answer.await?)))
}

/// Ends a membership at once; its queues go to the others.
#[utoipa::path(delete, path = "/v1/groups/{group}/members/{member}", tag = "groups",
    params(
        ("group" = String, Path, description = "Consumer group"),
        ("member" = String, Path, description = "Member id"),
        ("epoch" = Option<u64>, Query, description = "Only if the member's epoch is of its present life"),
    ), responses(
    (status = 204, description = "It is a member no more"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn leave(
    State(state): State<HttpState>,
    GroupMember { group, member }: GroupMember,
    params: Params,
) -> Result<Response, ApiError> {
    let epoch = params.only(&["epoch"])?.number("epoch")?;
    state.broker.leave_group(&group, &member, epoch).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Every consumer group.
#[utoipa::path(get, path = "/v1/groups", tag = "groups", responses(
    (status = 200, description = "All groups by name", body = GroupsBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    let groups = state.broker.groups().await?.into_iter();
    let groups = groups.map(GroupSummaryBody::from).collect();
    Ok(json(StatusCode::OK, &GroupsBody { groups }))
}

/// A group's members, their queues, and how far it is in each.
#[utoipa::path(get, path = "/v1/groups/{group}", tag = "groups",
    params(("group" = String, Path, description = "Consumer group")), responses(
    (status = 200, description = "The group", body = GroupBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn describe(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let described = state.broker.describe_group(&group).await?;
    Ok(json(StatusCode::OK, &GroupBody::new(group, described)))
}

/// Forgets a group: its offsets and everything else. Refused while it has members.
#[utoipa::path(delete, path = "/v1/groups/{group}", tag = "groups",
    params(("group" = String, Path, description = "Consumer group")), responses(
    (status = 204, description = "Deleted"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn delete(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    state.broker.delete_group(&group).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Messages of a member's queues as they come, as a live stream. While the client takes it, it
/// counts as the member's heartbeats.
#[utoipa::path(get, path = "/v1/groups/{group}/members/{member}/messages", tag = "groups",
    params(
        ("group" = String, Path, description = "Consumer group"),
        ("member" = String, Path, description = "Member id"),
        ("epoch" = u64, Query, description = "The newest the member was told"),
        ("prefetch" = Option<u64>, Query, description = "Messages sent beyond a queue's committed offset before it pauses: 1 to 100000, default 1000"),
    ), responses(
    (status = 200, description = "Events `message`, `assignment` and, at the end, `error`", content_type = "text/event-stream", body = String),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn messages(
    State(state): State<HttpState>,
    GroupMember { group, member }: GroupMember,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let params = params.only(&["epoch", "prefetch"])?;
    let epoch = params.number("epoch")?;
    let epoch = epoch.ok_or_else(|| {
        ApiError::invalid("epoch is missing; it is the newest that the member was told")
    })?;
    let prefetch = bounded("prefetch", params.number("prefetch")?, 1..=100_000, 1_000)?;
    if form(&headers) != Form::Events {
        return Err(ApiError::invalid(
            "a member's messages are a stream; send Accept: text/event-stream, or fetch its queues",
        ));
    }
    stream::response(state, group, member, epoch, prefetch).await
}
