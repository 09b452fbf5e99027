//! One node's own replicas, for whoever compares replicas with each other.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::broker::ReplicaDescription;
use crate::http::HttpState;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::TopicQueue;
use crate::http::query::Params;

#[derive(Debug, Serialize, ToSchema)]
pub struct ReplicaBody {
    /// The node that answers.
    node: u64,
    replica: u64,
    /// Raft index of the last entry applied; 0 before the first.
    applied_index: u64,
    /// Raft index up to which its log was purged by retention; 0 while it has everything.
    purged_index: u64,
    /// Of the state after that entry, in hexadecimal: the same on all replicas at one index.
    state_hash: String,
    /// `leader` or `follower`.
    role: &'static str,
}

impl From<&ReplicaDescription> for ReplicaBody {
    fn from(replica: &ReplicaDescription) -> Self {
        Self {
            node: replica.node,
            replica: replica.replica,
            applied_index: replica.applied_index,
            purged_index: replica.purged_index,
            state_hash: format!("{:016x}", replica.state_hash),
            role: if replica.leads { "leader" } else { "follower" },
        }
    }
}

/// The replica of the node that is asked: no other node answers for it.
#[utoipa::path(get, path = "/v1/topics/{topic}/queues/{queue}/replica", tag = "cluster",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("queue" = u32, Path, description = "Queue number"),
    ), responses(
    (status = 200, description = "How far it is and what it holds", body = ReplicaBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn describe(
    State(state): State<HttpState>,
    from: TopicQueue,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let replica = state.broker.replica(&from.topic, from.queue).await?;
    Ok(json(StatusCode::OK, &ReplicaBody::from(&replica)))
}

/// One replica of the node that answers.
#[derive(Debug, Serialize, ToSchema)]
struct HeldBody {
    /// Raft group.
    group: u64,
    /// `catalog`, `coordinator N` or `topic/queue`, internal topics included.
    holds: String,
    /// How many replicas the group should have, on all nodes together.
    replicas_wanted: usize,
    #[serde(flatten)]
    replica: ReplicaBody,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ReplicasBody {
    replicas: Vec<HeldBody>,
}

/// All replicas of the node that is asked: no other node answers for it.
#[utoipa::path(get, path = "/v1/cluster/replicas", tag = "cluster", responses(
    (status = 200, description = "What each holds and how far it is", body = ReplicasBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    let replicas = state.broker.replicas().await?;
    let replicas = replicas.iter().map(|(group, holds, replica)| HeldBody {
        group: *group,
        holds: holds.clone(),
        replicas_wanted: replica.wanted,
        replica: ReplicaBody::from(replica),
    });
    let body = ReplicasBody {
        replicas: replicas.collect(),
    };
    Ok(json(StatusCode::OK, &body))
}
