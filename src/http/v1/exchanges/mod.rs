//! Exchanges: make, bind, publish.

mod wire;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::produce::idempotency_key;
use super::produce::wire::ProduceBody;
use crate::broker::PublishRequest;
use crate::http::HttpState;
use crate::http::body::{BodyReader, JsonBody, is_json, media_type, parse_json, wrong_media_type};
use crate::http::clients::ClientAddress;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::{ExchangeName, ExchangeTopic};
use crate::http::query::Params;
use wire::{
    BindingAnswer, BindingsAnswer, ExchangeAnswer, ExchangesAnswer, PublishAnswerBody, PutBinding,
    PutExchange, publish_response,
};

fn created(now: bool) -> StatusCode {
    match now {
        true => StatusCode::CREATED,
        false => StatusCode::OK,
    }
}

/// Creates an exchange. The same again is answered 200.
#[utoipa::path(put, path = "/v1/exchanges/{exchange}", tag = "exchanges",
    params(("exchange" = String, Path, description = "Exchange name")),
    request_body = PutExchange, responses(
    (status = 201, description = "Created", body = ExchangeAnswer),
    (status = 200, description = "Existed with this kind", body = ExchangeAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn put(
    State(state): State<HttpState>,
    ExchangeName(name): ExchangeName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: PutExchange = body.parse()?;
    let (exchange, now) = state.broker.put_exchange(&name, wanted.kind.into()).await?;
    Ok(json(created(now), &ExchangeAnswer::from(&exchange)))
}

/// All exchanges with their bindings.
#[utoipa::path(get, path = "/v1/exchanges", tag = "exchanges", responses(
    (status = 200, description = "All exchanges", body = ExchangesAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    params.none()?;
    let exchanges = state.broker.exchanges().await;
    let exchanges = exchanges.iter().map(ExchangeAnswer::from).collect();
    Ok(json(StatusCode::OK, &ExchangesAnswer { exchanges }))
}

/// One exchange with its bindings.
#[utoipa::path(get, path = "/v1/exchanges/{exchange}", tag = "exchanges",
    params(("exchange" = String, Path, description = "Exchange name")), responses(
    (status = 200, description = "The exchange", body = ExchangeAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get(
    State(state): State<HttpState>,
    ExchangeName(name): ExchangeName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let exchange = state.broker.exchange(&name).await?;
    Ok(json(StatusCode::OK, &ExchangeAnswer::from(&exchange)))
}

/// Deletes an exchange with its bindings, and with what was published and not brought to its
/// topics yet. The topics keep what they have.
#[utoipa::path(delete, path = "/v1/exchanges/{exchange}", tag = "exchanges",
    params(("exchange" = String, Path, description = "Exchange name")), responses(
    (status = 204, description = "Deleted"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn delete(
    State(state): State<HttpState>,
    ExchangeName(name): ExchangeName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    state.broker.delete_exchange(&name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The topics bound to an exchange.
#[utoipa::path(get, path = "/v1/exchanges/{exchange}/bindings", tag = "exchanges",
    params(("exchange" = String, Path, description = "Exchange name")), responses(
    (status = 200, description = "The bindings", body = BindingsAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn bindings(
    State(state): State<HttpState>,
    ExchangeName(name): ExchangeName,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let exchange = state.broker.exchange(&name).await?;
    let bindings = exchange.bindings.iter().map(BindingAnswer::from).collect();
    Ok(json(StatusCode::OK, &BindingsAnswer { bindings }))
}

/// Binds a topic to an exchange, or replaces the binding it has.
#[utoipa::path(put, path = "/v1/exchanges/{exchange}/bindings/{topic}", tag = "exchanges",
    params(
        ("exchange" = String, Path, description = "Exchange name"),
        ("topic" = String, Path, description = "Topic name"),
    ),
    request_body = PutBinding, responses(
    (status = 201, description = "Bound", body = BindingAnswer),
    (status = 200, description = "Was bound, and is so now", body = BindingAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn put_binding(
    State(state): State<HttpState>,
    ExchangeTopic { exchange, topic }: ExchangeTopic,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: PutBinding = body.parse_or_empty()?;
    let kind = state.broker.exchange(&exchange).await?.kind;
    let binding = wanted.binding(kind).map_err(ApiError::invalid)?;
    let (binding, now) = state.broker.bind(&exchange, &topic, binding).await?;
    Ok(json(created(now), &BindingAnswer::from(&binding)))
}

/// One binding.
#[utoipa::path(get, path = "/v1/exchanges/{exchange}/bindings/{topic}", tag = "exchanges",
    params(
        ("exchange" = String, Path, description = "Exchange name"),
        ("topic" = String, Path, description = "Topic name"),
    ), responses(
    (status = 200, description = "The binding", body = BindingAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get_binding(
    State(state): State<HttpState>,
    ExchangeTopic { exchange, topic }: ExchangeTopic,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    let binding = state.broker.binding(&exchange, &topic).await?;
    Ok(json(StatusCode::OK, &BindingAnswer::from(&binding)))
}

/// Unbinds a topic. What was published before is still brought to it.
#[utoipa::path(delete, path = "/v1/exchanges/{exchange}/bindings/{topic}", tag = "exchanges",
    params(
        ("exchange" = String, Path, description = "Exchange name"),
        ("topic" = String, Path, description = "Topic name"),
    ), responses(
    (status = 204, description = "Unbound"),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn delete_binding(
    State(state): State<HttpState>,
    ExchangeTopic { exchange, topic }: ExchangeTopic,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    state.broker.unbind(&exchange, &topic).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Publishes messages. Returns when a majority has each of them, once and with its routes, on
/// disk; the bound topics have them soon after.
#[utoipa::path(post, path = "/v1/exchanges/{exchange}/messages", tag = "exchanges",
    params(
        ("exchange" = String, Path, description = "Exchange name"),
        ("Idempotency-Key" = Option<String>, Header, description = "A retry with the same key and exchange within 10 minutes gets the first answer"),
    ),
    request_body = ProduceBody, responses(
    (status = 200, description = "All stored", body = PublishAnswerBody),
    (status = 207, description = "Some stored; the other entries are errors", body = PublishAnswerBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn publish(
    State(state): State<HttpState>,
    ExchangeName(exchange): ExchangeName,
    client: ClientAddress,
    params: Params,
    request: Request,
) -> Result<Response, ApiError> {
    params.none()?;
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    let idempotency_key = idempotency_key(&headers)?;
    let media = media_type(&headers)?;
    if !is_json(media.as_deref()) {
        return Err(wrong_media_type(media.as_deref(), "application/json"));
    }
    let whole = BodyReader::new(&headers, body, &state.limits)?
        .read_all(&state.budget)
        .await?;
    let parsed: ProduceBody<'_> = parse_json(&whole.bytes)?;
    let (messages, producer) = parsed.into_routed(&whole.bytes)?;
    let bytes = messages.iter().map(|(message, _)| message.size_bytes());
    let count = messages.len() as u64;
    state.clients.take(client, count, bytes.sum())?;
    let answer = state.broker.publish_messages(PublishRequest {
        exchange,
        messages,
        producer,
        idempotency_key,
    });
    Ok(publish_response(&answer.await?))
}
