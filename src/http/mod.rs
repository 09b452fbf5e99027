//! The HTTP layer: parses and checks requests, asks the [`Broker`], renders answers.
//!
//! Invariants: nothing here knows Raft or files; every failure leaves as an RFC 9457 problem
//! through [`error`]; nothing a client sends is ignored silently or kept without a bound.

pub mod body;
mod clients;
pub mod error;
mod layers;
pub mod limits;
mod multi;
mod object;
mod path;
mod query;
pub mod server;
mod sse;
mod v1;
mod write_timeout;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::broker::Broker;
use crate::config::ServerConfig;
use crate::metrics::Metrics;
use clients::ClientQuotas;
use limits::{ByteBudget, HttpLimits};

pub use server::serve;

/// What every handler can reach. Cloned for every request and every layer it passes.
#[derive(Debug, Clone)]
pub struct HttpState(Arc<HttpParts>);

#[derive(Debug)]
pub struct HttpParts {
    pub broker: Arc<Broker>,
    pub metrics: Arc<Metrics>,
    pub limits: HttpLimits,
    pub budget: ByteBudget,
    /// What each client address may send.
    pub clients: ClientQuotas,
    /// Cancelled when the node begins to stop: long polls and streams then end.
    pub shutdown: CancellationToken,
    /// Replicas of a topic whose creator doesn't say.
    pub default_replicas: u32,
    /// No topic may allow larger messages.
    pub max_message_bytes: u64,
    /// Pause of an event stream after which it shows that it lives.
    pub ping_interval: Duration,
}

impl HttpState {
    pub fn new(
        broker: Arc<Broker>,
        metrics: Arc<Metrics>,
        config: &ServerConfig,
        shutdown: CancellationToken,
    ) -> Self {
        let limits = HttpLimits::from(&config.http);
        Self(Arc::new(HttpParts {
            broker,
            metrics,
            budget: ByteBudget::new(limits.max_inflight_bytes),
            clients: ClientQuotas::new(&config.limits),
            limits,
            shutdown,
            default_replicas: config.default_replicas(),
            max_message_bytes: config.limits.max_message_bytes,
            ping_interval: Duration::from_secs(15),
        }))
    }
}

impl Deref for HttpState {
    type Target = HttpParts;

    fn deref(&self) -> &HttpParts {
        &self.0
    }
}

#[derive(Debug, OpenApi)]
#[openapi(info(
    title = "Quorate",
    description = "A replicated message log: every queue is a Raft group, every acknowledgement is on a majority's disks."
))]
struct ApiDoc;

fn routes() -> OpenApiRouter<HttpState> {
    OpenApiRouter::with_openapi(ApiDoc::openapi())
        .routes(routes!(v1::topics::create, v1::topics::list))
        .routes(routes!(
            v1::topics::get,
            v1::topics::update,
            v1::topics::delete
        ))
        .routes(routes!(v1::produce::produce, v1::lookup::lookup))
        .routes(routes!(v1::topics::queue_of_key))
        .routes(routes!(v1::cancel::cancel_message))
        .routes(routes!(v1::trace::message_trace))
        .routes(routes!(
            v1::topics::generator::put,
            v1::topics::generator::get,
            v1::topics::generator::delete
        ))
        .routes(routes!(v1::produce::register_producer))
        .routes(routes!(v1::consume::fetch))
        .routes(routes!(v1::consume::fetch_many))
        .routes(routes!(v1::consume::offset_at))
        .routes(routes!(v1::offsets::commit, v1::offsets::list))
        .routes(routes!(v1::offsets::reset))
        .routes(routes!(v1::leases::receive))
        .routes(routes!(v1::leases::messages))
        .routes(routes!(v1::leases::ack))
        .routes(routes!(v1::leases::nack))
        .routes(routes!(v1::leases::extend))
        .routes(routes!(
            v1::leases::get_retry_policy,
            v1::leases::set_retry_policy
        ))
        .routes(routes!(v1::leases::in_flight))
        .routes(routes!(v1::leases::redrive))
        .routes(routes!(v1::exchanges::list))
        .routes(routes!(
            v1::exchanges::put,
            v1::exchanges::get,
            v1::exchanges::delete
        ))
        .routes(routes!(v1::exchanges::bindings))
        .routes(routes!(
            v1::exchanges::put_binding,
            v1::exchanges::get_binding,
            v1::exchanges::delete_binding
        ))
        .routes(routes!(v1::exchanges::publish))
        .routes(routes!(v1::transactions::begin, v1::transactions::list))
        .routes(routes!(v1::transactions::get))
        .routes(routes!(v1::transactions::extend))
        .routes(routes!(v1::transactions::commit))
        .routes(routes!(v1::transactions::rollback))
        .routes(routes!(v1::groups::list))
        .routes(routes!(v1::groups::describe, v1::groups::delete))
        .routes(routes!(v1::groups::join))
        .routes(routes!(v1::groups::leave))
        .routes(routes!(v1::groups::heartbeat))
        .routes(routes!(v1::groups::messages))
        .routes(routes!(v1::cluster::describe))
        .routes(routes!(v1::cluster::events))
        .routes(routes!(v1::cluster::transfer_leader))
        .routes(routes!(v1::replica::describe))
        .routes(routes!(v1::replica::list))
        .routes(routes!(v1::health::live))
        .routes(routes!(v1::health::ready))
        .routes(routes!(v1::health::metrics))
        .routes(routes!(v1::health::openapi))
}

/// The reference, as generated from the handlers.
pub fn openapi() -> utoipa::openapi::OpenApi {
    routes().into_openapi()
}

/// The whole API over one broker.
pub fn router(state: HttpState) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(layers::unknown_route)
        .method_not_allowed_fallback(layers::method_not_allowed)
        .layer(CatchPanicLayer::custom(layers::panicked))
        .layer(from_fn(error::render))
        .layer(from_fn_with_state(state.clone(), layers::observe))
        .with_state(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_has_every_endpoint_of_the_contract() {
        let reference = serde_json::to_value(openapi()).unwrap();
        let paths = reference["paths"].as_object().unwrap();
        let mut found: Vec<String> = paths
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys();
                methods.map(move |method| format!("{} {path}", method.to_uppercase()))
            })
            .collect();
        found.sort();
        let expected = [
            "DELETE /v1/exchanges/{exchange}",
            "DELETE /v1/exchanges/{exchange}/bindings/{topic}",
            "DELETE /v1/groups/{group}",
            "DELETE /v1/groups/{group}/members/{member}",
            "DELETE /v1/topics/{topic}",
            "DELETE /v1/topics/{topic}/generator",
            "DELETE /v1/topics/{topic}/messages/{message_id}",
            "GET /health/live",
            "GET /health/ready",
            "GET /metrics",
            "GET /openapi.json",
            "GET /v1/cluster",
            "GET /v1/cluster/events",
            "GET /v1/cluster/replicas",
            "GET /v1/exchanges",
            "GET /v1/exchanges/{exchange}",
            "GET /v1/exchanges/{exchange}/bindings",
            "GET /v1/exchanges/{exchange}/bindings/{topic}",
            "GET /v1/groups",
            "GET /v1/groups/{group}",
            "GET /v1/groups/{group}/in_flight",
            "GET /v1/groups/{group}/members/{member}/messages",
            "GET /v1/groups/{group}/messages",
            "GET /v1/groups/{group}/offsets",
            "GET /v1/groups/{group}/retry_policy",
            "GET /v1/topics",
            "GET /v1/topics/{topic}",
            "GET /v1/topics/{topic}/generator",
            "GET /v1/topics/{topic}/messages",
            "GET /v1/topics/{topic}/messages/{message_id}/trace",
            "GET /v1/topics/{topic}/queue",
            "GET /v1/topics/{topic}/queues/{queue}/messages",
            "GET /v1/topics/{topic}/queues/{queue}/offset",
            "GET /v1/topics/{topic}/queues/{queue}/replica",
            "GET /v1/transactions",
            "GET /v1/transactions/{transaction}",
            "PATCH /v1/topics/{topic}",
            "POST /v1/exchanges/{exchange}/messages",
            "POST /v1/fetch",
            "POST /v1/groups/{group}/ack",
            "POST /v1/groups/{group}/dlq/redrive",
            "POST /v1/groups/{group}/extend",
            "POST /v1/groups/{group}/members",
            "POST /v1/groups/{group}/members/{member}/heartbeat",
            "POST /v1/groups/{group}/nack",
            "POST /v1/groups/{group}/offsets/reset",
            "POST /v1/groups/{group}/receive",
            "POST /v1/producers",
            "POST /v1/topics",
            "POST /v1/topics/{topic}/messages",
            "POST /v1/topics/{topic}/queues/{queue}/leader",
            "POST /v1/transactions",
            "POST /v1/transactions/{transaction}/commit",
            "POST /v1/transactions/{transaction}/messages",
            "POST /v1/transactions/{transaction}/rollback",
            "PUT /v1/exchanges/{exchange}",
            "PUT /v1/exchanges/{exchange}/bindings/{topic}",
            "PUT /v1/groups/{group}/offsets",
            "PUT /v1/groups/{group}/retry_policy",
            "PUT /v1/topics/{topic}/generator",
        ];
        assert_eq!(found, expected);
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_and_the_node_goes_on() {
        use axum::routing::post;
        use tower::ServiceExt;

        async fn broken() {
            panic!("a bug");
        }
        let app: Router = Router::new()
            .route("/broken", post(broken))
            .layer(CatchPanicLayer::custom(layers::panicked))
            .layer(from_fn(error::render));
        for _ in 0..2 {
            let request = axum::http::Request::post("/broken").body(axum::body::Body::empty());
            let response = app.clone().oneshot(request.unwrap()).await.unwrap();
            assert_eq!(response.status(), 500);
            let body = axum::body::to_bytes(response.into_body(), 1 << 16)
                .await
                .unwrap();
            let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(problem["code"], "internal");
            assert_eq!(problem["outcome"], "unknown");
            assert!(!problem.to_string().contains("a bug"), "{problem}");
        }
    }

    #[test]
    fn the_reference_describes_bodies_and_problems() {
        let reference = serde_json::to_value(openapi()).unwrap();
        let schemas = &reference["components"]["schemas"];
        for (schema, field) in [
            ("CreateTopic", "queues"),
            ("MessageBody", "value_base64"),
            ("Problem", "retryable"),
            ("FetchAnswer", "next_offset"),
            ("CommitBody", "allow_rewind"),
            ("ClusterBody", "nodes"),
            // Types of one name in different modules: each is described under a name of its own.
            ("OffsetBody", "offset"),
            ("TransactionOffset", "group"),
            ("TransactionExtend", "messages"),
            ("LeaseExtend", "receipts"),
        ] {
            assert!(
                schemas[schema]["properties"][field].is_object(),
                "{schema}.{field}"
            );
        }
        assert!(schemas["OffsetBody"]["properties"]["group"].is_null());
        assert!(schemas["StartBody"].is_object() && schemas["LeaseStart"].is_object());
        // Every reference inside the document leads somewhere.
        let text = reference.to_string();
        for name in text.split("#/components/schemas/").skip(1) {
            let name = name.split('"').next().unwrap();
            assert!(schemas[name].is_object(), "{name} is missing");
        }
    }
}
