//! Produce: JSON, one message as bytes, ndjson, stored batches; and the registry of producers.

mod answer;
mod lines;
pub mod wire;

use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use quorate_storage::batch::split;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::{
    Broker, BrokerError, Delay, NewMessage, ProduceAnswer, ProduceRequest, records_in,
};
use crate::http::HttpState;
use crate::http::body::{
    BodyReader, JsonBody, WholeBody, is_json, media_type, parse_json, wrong_media_type,
};
use crate::http::clients::ClientAddress;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::{TopicName, checked_name};
use crate::http::query::Params;
use crate::metrics::Metrics;
use crate::names::check_tag;
use wire::{ProduceBody, check_ttl};

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
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
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

/// When a producer is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ack {
    /// When a majority has its messages.
    Majority,
    /// At once; what becomes of the messages is not told.
    None,
}

fn ack(params: &Params) -> Result<Ack, ApiError> {
    match params.get("ack") {
        None | Some("all" | "majority") => Ok(Ack::Majority),
        Some("none" | "0") => Ok(Ack::None),
        Some("leader" | "1") => Err(ApiError::invalid(
            "ack=leader is not offered: before a majority has a message, its offset may still go \
             to another one; use ack=all, or ack=none to be answered before anything is stored",
        )),
        Some(other) => {
            let shown: String = other.chars().take(100).collect();
            Err(ApiError::invalid(format!(
                "ack={shown:?} is not known; use all (default) or none"
            )))
        }
    }
}

/// The answer to `ack=none`.
#[derive(Debug, Serialize, ToSchema)]
pub struct AcceptedBody {
    /// Messages that were queued. They may be lost, and nobody will be told.
    accepted: usize,
}

/// One request on its way to the broker.
struct Producing<'a> {
    state: &'a HttpState,
    client: ClientAddress,
    ack: Ack,
}

impl Producing<'_> {
    /// `body` is what the messages are slices of.
    async fn store(&self, request: ProduceRequest, body: WholeBody) -> Result<Response, ApiError> {
        let clients = &self.state.clients;
        clients.take_messages(self.client, &request.messages)?;
        match self.ack {
            Ack::Majority => {
                let answer = measured(&self.state.metrics, &self.state.broker, request).await?;
                Ok(answer::response(&answer))
            }
            Ack::None => {
                let accepted = self.state.broker.accept(request, body).await?;
                Ok(json(StatusCode::ACCEPTED, &AcceptedBody { accepted }))
            }
        }
    }

    fn only_majority(&self, form: &str) -> Result<(), ApiError> {
        match self.ack {
            Ack::Majority => Ok(()),
            Ack::None => Err(ApiError::invalid(format!(
                "ack=none takes messages as application/json or application/octet-stream, not {form}"
            ))),
        }
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
        ("delay_ms" = Option<u64>, Query, description = "octet-stream only: becomes visible so much later, at most a year"),
        ("deliver_at_ms" = Option<u64>, Query, description = "octet-stream only: becomes visible then, in ms since 1970; at once if that is past"),
        ("ttl_ms" = Option<u64>, Query, description = "octet-stream only: how long it is delivered once it is visible"),
        ("ack" = Option<String>, Query, description = "`all` (default): answered when a majority has the messages. `none`: answered 202 at once, unacknowledged; JSON and octet-stream only"),
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
    (status = 202, description = "`ack=none`: queued, not stored yet, and never acknowledged", body = AcceptedBody),
    (status = 207, description = "Some stored; the other entries are errors", body = answer::ProduceAnswerBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn produce(
    State(state): State<HttpState>,
    TopicName(topic): TopicName,
    client: ClientAddress,
    params: Params,
    request: Request,
) -> Result<Response, ApiError> {
    // Dead letters are the server's to write.
    checked_name("topic name", &topic)?;
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    let idempotency_key = idempotency_key(&headers)?;
    let producing = Producing {
        state: &state,
        client,
        ack: ack(&params)?,
    };
    match form(&headers)? {
        Form::Json => {
            params.only(&["ack"])?;
            let whole = read(&state, &headers, body).await?;
            let parsed: ProduceBody<'_> = parse_json(&whole.bytes)?;
            let (messages, producer) = parsed.into_messages(&whole.bytes)?;
            let request = ProduceRequest {
                topic,
                messages,
                producer,
                idempotency_key,
            };
            producing.store(request, whole).await
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
            producing.store(request, whole).await
        }
        Form::Lines => {
            producing.only_majority("application/x-ndjson")?;
            params.only(&["ack"])?;
            let reader = BodyReader::new(&headers, body, &state.limits)?;
            lines::produce_lines(&state, client, reader, topic, idempotency_key).await
        }
        Form::Batches => {
            producing.only_majority(BATCHES)?;
            let queue = params
                .only(&["ack", "queue"])?
                .number("queue")?
                .ok_or_else(|| {
                    ApiError::invalid("batches go to one queue; name it with ?queue=")
                })?;
            let whole = read(&state, &headers, body).await?;
            produce_batches(&producing, &topic, queue, whole.bytes, idempotency_key).await
        }
    }
}

async fn read(state: &HttpState, headers: &HeaderMap, body: Body) -> Result<WholeBody, ApiError> {
    BodyReader::new(headers, body, &state.limits)?
        .read_all(&state.budget)
        .await
}

async fn produce_batches(
    producing: &Producing<'_>,
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
    let state = producing.state;
    let (begun, bytes) = (Instant::now(), batches.len() as u64);
    let views = split(batches.clone()).map_while(Result::ok);
    let messages = views.map(|batch| u64::from(records_in(&batch)));
    state
        .clients
        .take(producing.client, messages.sum(), bytes)?;
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
    let params = params.only(&[
        "ack",
        "key",
        "tag",
        "queue",
        "delay_ms",
        "deliver_at_ms",
        "ttl_ms",
    ])?;
    let delay = Delay::new(params.number("delay_ms")?, params.number("deliver_at_ms")?);
    let delay = delay.map_err(ApiError::invalid)?;
    let ttl_ms = params.number("ttl_ms")?;
    check_ttl(ttl_ms).map_err(ApiError::invalid)?;
    let tag = params.get("tag").map(str::to_owned);
    if let Some(tag) = &tag {
        check_tag(tag).map_err(ApiError::invalid)?;
    }
    let key = params.get("key").map(str::to_owned);
    Ok(NewMessage {
        key,
        tag,
        ttl_ms,
        delay,
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
