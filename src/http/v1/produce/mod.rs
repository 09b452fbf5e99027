//! Produce: JSON, one message as bytes, ndjson, stored batches; and the registry of producers.

mod answer;
mod lines;
pub mod wire;

use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::{Broker, BrokerError, NewMessage, ProduceAnswer, ProduceRequest};
use crate::http::HttpState;
use crate::http::body::{BodyReader, JsonBody, is_json, media_type, parse_json, wrong_media_type};
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::{TopicName, checked_name};
use crate::http::query::Params;
use crate::metrics::Metrics;
use crate::names::check_tag;
use wire::{ProduceBody, refuse_later_fields};

/// Stored RecordBatch v2 bytes, one batch after the other.
pub const BATCHES: &str = "application/vnd.quorate.batches";

/// The forms in which messages come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Bytes,
    Lines,
    Batches,
}

fn form(headers: &HeaderMap) -> Result<Form, ApiError> {
    let media = media_type(headers)?;
    match media.as_deref() {
        Some("application/octet-stream") => Ok(Form::Bytes),
        Some("application/x-ndjson") => Ok(Form::Lines),
        Some(BATCHES) => Ok(Form::Batches),
        json if is_json(json) => Ok(Form::Json),
        other => Err(wrong_media_type(
            other,
            "application/json, application/x-ndjson, application/octet-stream or \
             application/vnd.quorate.batches",
        )),
    }
}

/// The `Idempotency-Key` header: 1 to 255 visible ASCII characters.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all("idempotency-key").iter();
    let (Some(value), None) = (given.next(), given.next()) else {
        return match headers.contains_key("idempotency-key") {
            true => Err(ApiError::invalid("Idempotency-Key is given twice")),
            false => Ok(None),
        };
    };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(ApiError::invalid(
            "Idempotency-Key must be 1 to 255 visible ASCII characters",
        )),
    }
}

/// Asks the broker and counts what was acknowledged.
async fn measured(
    metrics: &Metrics,
    broker: &Broker,
    request: ProduceRequest,
) -> Result<ProduceAnswer, BrokerError> {
    let sizes: Vec<usize> = request
        .messages
        .iter()
        .map(|m| m.value.as_ref().map_or(0, |v| v.len()))
        .collect();
    let begun = Instant::now();
    let answer = broker.produce(request).await?;
    let stored = answer
        .results
        .iter()
        .zip(&sizes)
        .filter(|(result, _)| result.is_ok());
    let (messages, bytes) = stored.fold((0, 0), |(messages, bytes), (_, size)| {
        (messages + 1, bytes + *size as u64)
    });
    if messages > 0 {
        metrics.observe_produce(begun.elapsed(), messages, bytes);
    }
    Ok(answer)
}

/// Stores messages. Returns when a majority has them on disk (`durability` says so).
#[utoipa::path(post, path = "/v1/topics/{topic}/messages", tag = "produce",
    params(
        ("topic" = String, Path, description = "Topic name"),
        ("key" = Option<String>, Query, description = "octet-stream only"),
        ("tag" = Option<String>, Query, description = "octet-stream only"),
        ("queue" = Option<u32>, Query, description = "octet-stream and batches only"),
        ("delay_ms" = Option<u64>, Query, description = "octet-stream only"),
        ("Idempotency-Key" = Option<String>, Header, description = "A retry with the same key and topic within 10 minutes gets the first answer"),
    ),
    request_body(content(
        (ProduceBody = "application/json"),
        (Vec<u8> = "application/octet-stream"),
        (String = "application/x-ndjson"),
        (Vec<u8> = "application/vnd.quorate.batches"),
    )),
    responses(
    (status = 200, description = "All stored", body = answer::ProduceAnswerBody),
    (status = 207, description = "Some stored; the other entries are errors", body = answer::ProduceAnswerBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn produce(
    State(state): State<HttpState>,
    TopicName(topic): TopicName,
    params: Params,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    let idempotency_key = idempotency_key(&headers)?;
    match form(&headers)? {
        Form::Json => {
            params.none()?;
            let whole = read(&state, &headers, body).await?;
            let parsed: ProduceBody<'_> = parse_json(&whole.bytes)?;
            let (messages, producer) = parsed.into_messages(&whole.bytes)?;
            let request = ProduceRequest {
                topic,
                messages,
                producer,
                idempotency_key,
            };
            Ok(answer::response(
                &measured(&state.metrics, &state.broker, request).await?,
            ))
        }
        Form::Bytes => {
            let mut message = message_of_query(params)?;
            let whole = read(&state, &headers, body).await?;
            message.value = Some(whole.bytes.clone());
            let messages = vec![message];
            let request = ProduceRequest {
                topic,
                messages,
                producer: None,
                idempotency_key,
            };
            Ok(answer::response(
                &measured(&state.metrics, &state.broker, request).await?,
            ))
        }
        Form::Lines => {
            params.none()?;
            let reader = BodyReader::new(&headers, body, &state.limits)?;
            lines::produce_lines(&state, reader, topic, idempotency_key).await
        }
        Form::Batches => {
            let queue = params.only(&["queue"])?.number("queue")?.ok_or_else(|| {
                ApiError::invalid("batches go to one queue; name it with ?queue=")
            })?;
            let whole = read(&state, &headers, body).await?;
            produce_batches(&state, &topic, queue, whole.bytes, idempotency_key).await
        }
    }
}

async fn read(
    state: &HttpState,
    headers: &HeaderMap,
    body: Body,
) -> Result<crate::http::body::WholeBody, ApiError> {
    BodyReader::new(headers, body, &state.limits)?
        .read_all(&state.budget)
        .await
}

async fn produce_batches(
    state: &HttpState,
    topic: &str,
    queue: u32,
    batches: bytes::Bytes,
    idempotency_key: Option<String>,
) -> Result<Response, ApiError> {
    if batches.is_empty() {
        return Err(ApiError::invalid(
            "the body is empty; it must be at least one RecordBatch v2",
        ));
    }
    let (begun, bytes) = (Instant::now(), batches.len() as u64);
    let answer = state
        .broker
        .produce_batches(topic, queue, batches, idempotency_key)
        .await?;
    let stored = answer
        .results
        .iter()
        .filter(|result| result.is_ok())
        .count() as u64;
    if stored > 0 {
        state
            .metrics
            .observe_produce(begun.elapsed(), stored, bytes);
    }
    Ok(answer::response(&answer))
}

/// The parameters of an octet-stream request; the body is the value.
fn message_of_query(params: Params) -> Result<NewMessage, ApiError> {
    let params = params.only(&["key", "tag", "queue", "delay_ms", "deliver_at_ms", "ttl_ms"])?;
    let later = |name| params.number::<u64>(name);
    refuse_later_fields(
        later("delay_ms")?,
        later("deliver_at_ms")?,
        later("ttl_ms")?,
    )
    .map_err(ApiError::invalid)?;
    let tag = params.get("tag").map(str::to_owned);
    if let Some(tag) = &tag {
        check_tag(tag).map_err(ApiError::invalid)?;
    }
    let key = params.get("key").map(str::to_owned);
    Ok(NewMessage {
        key,
        tag,
        queue: params.number("queue")?,
        ..NewMessage::default()
    })
}

/// A producer to register. The same name again raises the epoch and fences the old one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterProducer {
    #[serde(default)]
    name: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ProducerIdentityBody {
    id: String,
    epoch: u32,
}

/// Registers an idempotent producer.
#[utoipa::path(post, path = "/v1/producers", tag = "produce", request_body = RegisterProducer, responses(
    (status = 200, description = "Registered", body = ProducerIdentityBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn register_producer(
    State(state): State<HttpState>,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let wanted: RegisterProducer = body.parse_or_empty()?;
    if let Some(name) = &wanted.name {
        checked_name("producer name", name)?;
    }
    let identity = state
        .broker
        .register_producer(wanted.name.as_deref())
        .await?;
    let body = ProducerIdentityBody {
        id: identity.id,
        epoch: identity.epoch,
    };
    Ok(json(StatusCode::OK, &body))
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn with(name: &'static str, values: &[&'static str]) -> HeaderMap {
        let name = HeaderName::from_static(name);
        values
            .iter()
            .map(|v| (name.clone(), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn the_form_follows_the_content_type() {
        for (media, expected) in [
            ("application/json", Form::Json),
            ("Application/JSON; charset=utf-8", Form::Json),
            ("application/cloudevents+json", Form::Json),
            ("application/octet-stream", Form::Bytes),
            ("application/x-ndjson", Form::Lines),
            (BATCHES, Form::Batches),
        ] {
            assert_eq!(
                form(&with("content-type", &[media])),
                Ok(expected),
                "{media}"
            );
        }
        assert_eq!(form(&HeaderMap::new()), Ok(Form::Json));
        assert!(
            form(&with(
                "content-type",
                &["application/x-www-form-urlencoded"]
            ))
            .is_err()
        );
        assert!(form(&with("content-type", &["text/plain"])).is_err());
    }

    #[test]
    fn one_idempotency_key_of_bounded_length() {
        let key = |values| idempotency_key(&with("idempotency-key", values));
        assert_eq!(key(&[]), Ok(None));
        assert_eq!(key(&["a-1"]), Ok(Some("a-1".to_owned())));
        assert!(key(&[""]).is_err());
        assert!(key(&["a", "b"]).is_err());
        let long = HeaderValue::from_str(&"x".repeat(256)).unwrap();
        let headers = HeaderMap::from_iter([(HeaderName::from_static("idempotency-key"), long)]);
        assert!(idempotency_key(&headers).is_err());
    }
}
