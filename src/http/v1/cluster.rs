//! The cluster: its nodes, what happens in it, and handing over leadership.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use utoipa::ToSchema;

use crate::broker::{
    ClusterDescription, ClusterEvent, ClusterEventKind, NodeDescription, NodeState,
};
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::TopicQueue;
use crate::http::query::Params;
use crate::http::sse;

#[derive(Debug, Serialize, ToSchema)]
pub struct ClusterBody<'a> {
    cluster_id: &'a str,
    nodes: Vec<NodeBody<'a>>,
    catalog: CatalogBody,
    queues: QueuesBody,
}

#[derive(Debug, Serialize, ToSchema)]
struct NodeBody<'a> {
    id: u64,
    url: &'a str,
    /// `up`, `suspect`, `down` or `draining`.
    state: &'static str,
    leaders: usize,
    replicas: usize,
    /// Replicas damaged here that are not filled again yet, internal ones included.
    quarantined: usize,
    version: &'a str,
}

#[derive(Debug, Serialize, ToSchema)]
struct CatalogBody {
    leader: Option<u64>,
    term: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct QueuesBody {
    total: usize,
    leaderless: usize,
    under_replicated: usize,
}

fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Up => "up",
        NodeState::Suspect => "suspect",
        NodeState::Down => "down",
        NodeState::Draining => "draining",
    }
}

impl<'a> From<&'a NodeDescription> for NodeBody<'a> {
    fn from(node: &'a NodeDescription) -> Self {
        Self {
            id: node.id,
            url: &node.url,
            state: state_name(node.state),
            leaders: node.leaders,
            replicas: node.replicas,
            quarantined: node.quarantined,
            version: &node.version,
        }
    }
}

impl<'a> From<&'a ClusterDescription> for ClusterBody<'a> {
    fn from(cluster: &'a ClusterDescription) -> Self {
        Self {
            cluster_id: &cluster.cluster_id,
            nodes: cluster.nodes.iter().map(NodeBody::from).collect(),
            catalog: CatalogBody {
                leader: cluster.catalog_leader,
                term: cluster.catalog_term,
            },
            queues: QueuesBody {
                total: cluster.queues_total,
                leaderless: cluster.queues_leaderless,
                under_replicated: cluster.queues_under_replicated,
            },
        }
    }
}

/// The nodes and how the queues are.
#[utoipa::path(get, path = "/v1/cluster", tag = "cluster", responses(
    (status = 200, description = "The cluster as this node sees it", body = ClusterBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn describe(
    State(state): State<HttpState>,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let cluster = state.broker.cluster().await?;
    Ok(json(StatusCode::OK, &ClusterBody::from(&cluster)))
}

/// The name of an event, for programs and metrics.
pub fn event_name(kind: ClusterEventKind) -> &'static str {
    match kind {
        ClusterEventKind::LeaderElected => "leader_elected",
        ClusterEventKind::LeaderLost => "leader_lost",
        ClusterEventKind::NodeUp => "node_up",
        ClusterEventKind::NodeDown => "node_down",
        ClusterEventKind::MembershipChanged => "membership_changed",
        ClusterEventKind::Quarantined => "quarantined",
    }
}

/// Events that a slow client missed.
#[derive(Debug, Serialize)]
struct Missed {
    missed: u64,
}

async fn next_event(events: &mut Receiver<ClusterEvent>, state: &HttpState) -> Option<Bytes> {
    let mut buffer = Vec::with_capacity(192);
    tokio::select! {
        () = state.shutdown.cancelled() => return None,
        () = tokio::time::sleep(state.ping_interval) => buffer.extend_from_slice(sse::PING),
        event = events.recv() => match event {
            Ok(event) => {
                sse::write_event(&mut buffer, None, Some(event_name(event.event)), &event);
            }
            Err(RecvError::Lagged(missed)) => {
                sse::write_event(&mut buffer, None, Some("missed"), &Missed { missed });
            }
            Err(RecvError::Closed) => return None,
        },
    }
    Some(buffer.into())
}

/// What happens in the cluster, as it happens: elections, nodes up and down, damage.
#[utoipa::path(get, path = "/v1/cluster/events", tag = "cluster", responses(
    (status = 200, description = "Server-sent events, each with event, time_ms, topic, queue, term, node", body = String, content_type = "text/event-stream"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn events(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    let events = state.broker.events();
    let live = stream::unfold((events, state), |(mut events, state)| async move {
        let piece = next_event(&mut events, &state).await?;
        Some((piece, (events, state)))
    });
    Ok(sse::response(live))
}

/// The node that is to lead.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TransferBody {
    node_id: u64,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TransferAnswer<'a> {
    topic: &'a str,
    queue: u32,
    leader: u64,
}

/// Hands the leadership of a queue to another of its replicas.
#[utoipa::path(post, path = "/v1/topics/{topic}/queues/{queue}/leader", tag = "cluster",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("queue" = u32, Path, description = "Queue number"),
    ), request_body = TransferBody, responses(
    (status = 200, description = "That node leads now", body = TransferAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn transfer_leader(
    State(state): State<HttpState>,
    from: TopicQueue,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let TransferBody { node_id } = body.parse()?;
    state
        .broker
        .transfer_leader(&from.topic, from.queue, node_id)
        .await?;
    let answer = TransferAnswer {
        topic: &from.topic,
        queue: from.queue,
        leader: node_id,
    };
    Ok(json(StatusCode::OK, &answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_the_contract() {
        let cluster = ClusterDescription {
            cluster_id: "c".into(),
            nodes: vec![NodeDescription {
                id: 1,
                url: "http://a".into(),
                state: NodeState::Suspect,
                leaders: 12,
                replicas: 40,
                quarantined: 0,
                version: "0.1.0".into(),
            }],
            catalog_leader: None,
            catalog_term: 3,
            queues_total: 4,
            queues_leaderless: 1,
            queues_under_replicated: 2,
        };
        let expected = serde_json::json!({"cluster_id": "c",
            "nodes": [{"id": 1, "url": "http://a", "state": "suspect", "leaders": 12, "replicas": 40, "quarantined": 0, "version": "0.1.0"}],
            "catalog": {"leader": null, "term": 3},
            "queues": {"total": 4, "leaderless": 1, "under_replicated": 2}});
        assert_eq!(
            serde_json::to_value(ClusterBody::from(&cluster)).unwrap(),
            expected
        );
    }

    #[test]
    fn event_names_are_those_of_their_data() {
        use ClusterEventKind as K;
        for kind in [
            K::LeaderElected,
            K::LeaderLost,
            K::NodeUp,
            K::NodeDown,
            K::MembershipChanged,
            K::Quarantined,
        ] {
            assert_eq!(serde_json::to_value(kind).unwrap(), event_name(kind));
        }
    }
}
