//! What a fetch asks for: parsing and bounds.

use std::fmt;

use axum::http::{HeaderMap, header};
use serde::de;
use serde::{Deserialize, Deserializer};
use utoipa::ToSchema;

use super::super::produce::BATCHES;
use super::out_of_range;
use crate::broker::{
    BrokerError, Consistency, FetchRequest, MultiFetchRequest, QueueFetch, Selection, StartAt,
};
use crate::http::error::ApiError;
use crate::http::object;
use crate::http::path::{TopicQueue, checked_topic};
use crate::http::query::{Params, bounded};

const DEFAULT_MESSAGES: usize = 100;
const MAX_MESSAGES: usize = 10_000;
const DEFAULT_BYTES: usize = 1 << 20;
const MAX_BYTES: usize = 16 << 20;
const MAX_WAIT_MS: u64 = 60_000;
const MAX_QUEUES: usize = 1_000;

/// How the client wants its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Json,
    Events,
    Batches,
}

/// The first form of the Accept header that exists here; JSON without one.
pub fn form(headers: &HeaderMap) -> Form {
    let accepted = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .find_map(|range| {
            match range
                .split(';')
                .next()?
                .trim()
                .to_ascii_lowercase()
                .as_str()
            {
                "text/event-stream" => Some(Form::Events),
                BATCHES => Some(Form::Batches),
                "application/json" | "application/*" | "*/*" => Some(Form::Json),
                _ => None,
            }
        })
        .unwrap_or(Form::Json)
}

/// `value` where the bytes are UTF-8, or always `value_base64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    #[default]
    Auto,
    Base64,
}

/// The field of a body; null is as good as none.
pub fn encoding_of_body<'de, D: Deserializer<'de>>(d: D) -> Result<Encoding, D::Error> {
    Ok(object::choice(d, r#""auto" or "base64""#)?.unwrap_or_default())
}

/// A fetch from one queue, and how to write its answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Fetch {
    pub request: FetchRequest,
    pub encoding: Encoding,
    /// Where to go on instead of answering 416.
    pub on_out_of_range: Option<StartAt>,
}

impl Fetch {
    pub fn parse(from: TopicQueue, params: Params, form: Form) -> Result<Self, ApiError> {
        let params = params.only(&[
            "offset",
            "from_timestamp_ms",
            "max_messages",
            "max_bytes",
            "wait_ms",
            "tag",
            "filter",
            "consistency",
            "encoding",
            "on_out_of_range",
        ])?;
        let selection = selection(params.get("tag"), params.get("filter"))?;
        let encoding = encoding(params.get("encoding"))?;
        if form == Form::Batches && (!selection.is_everything() || params.get("encoding").is_some())
        {
            return Err(ApiError::invalid(
                "tag, filter and encoding: stored batches are sent as they are; fetch JSON instead",
            ));
        }
        let request = FetchRequest {
            topic: from.topic,
            queue: from.queue,
            start: start(&params)?,
            max_messages: max_messages(params.number("max_messages")?)?,
            max_bytes: max_bytes(params.number("max_bytes")?)?,
            wait_ms: wait_ms(params.number("wait_ms")?)?,
            selection,
            consistency: consistency(params.get("consistency"))?,
        };
        Ok(Self {
            request,
            encoding,
            on_out_of_range: out_of_range::parse(params.get("on_out_of_range"))?,
        })
    }
}

fn max_messages(value: Option<usize>) -> Result<usize, ApiError> {
    bounded("max_messages", value, 1..=MAX_MESSAGES, DEFAULT_MESSAGES)
}

pub fn max_bytes(value: Option<usize>) -> Result<usize, ApiError> {
    bounded("max_bytes", value, 1..=MAX_BYTES, DEFAULT_BYTES)
}

pub fn wait_ms(value: Option<u64>) -> Result<u64, ApiError> {
    bounded("wait_ms", value, 0..=MAX_WAIT_MS, 0)
}

fn start(params: &Params) -> Result<StartAt, ApiError> {
    match (params.get("offset"), params.number("from_timestamp_ms")?) {
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "give offset or from_timestamp_ms, not both",
        )),
        (None, Some(timestamp_ms)) => Ok(StartAt::Timestamp(timestamp_ms)),
        (None | Some("earliest"), None) => Ok(StartAt::Earliest),
        (Some("latest"), None) => Ok(StartAt::Latest),
        (Some(text), None) => text.parse().map(StartAt::Offset).map_err(|_| {
            let shown: String = text.chars().take(40).collect();
            ApiError::invalid(format!(
                "offset is {shown:?}; it must be a whole number from 0, earliest or latest"
            ))
        }),
    }
}

pub fn selection(tag: Option<&str>, filter: Option<&str>) -> Result<Selection, ApiError> {
    Ok(Selection::parse(tag, filter).map_err(BrokerError::from)?)
}

fn consistency(text: Option<&str>) -> Result<Consistency, ApiError> {
    match text {
        None | Some("linearizable") => Ok(Consistency::Linearizable),
        Some("stale") => Ok(Consistency::Stale),
        Some(_) => Err(ApiError::invalid(
            "consistency must be linearizable or stale",
        )),
    }
}

pub fn encoding(text: Option<&str>) -> Result<Encoding, ApiError> {
    match text {
        None | Some("auto") => Ok(Encoding::Auto),
        Some("base64") => Ok(Encoding::Base64),
        Some(_) => Err(ApiError::invalid("encoding must be base64 or auto")),
    }
}

/// The `Last-Event-ID` header: the offset of the last message the client has seen.
pub fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get("last-event-id") else {
        return Ok(None);
    };
    let offset = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    offset
        .map(Some)
        .ok_or_else(|| ApiError::invalid("Last-Event-ID must be an offset: a whole number from 0"))
}

/// A fetch over many queues in one request.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FetchManyBody {
    /// 1 to 1000 queues.
    #[serde(deserialize_with = "object::list")]
    queues: Vec<FromQueue>,
    /// Of all queues together. 1 to 10000, default 100.
    #[serde(default)]
    max_messages: Option<usize>,
    /// Of all queues together. Default 1 MiB, at most 16 MiB; never hides a first message.
    #[serde(default)]
    max_bytes: Option<usize>,
    /// Answers at once when any of the queues has a message. At most 60000.
    #[serde(default)]
    wait_ms: Option<u64>,
    /// `linearizable` (default) or `stale`.
    #[serde(default)]
    consistency: Option<String>,
    #[serde(default, deserialize_with = "encoding_of_body")]
    pub encoding: Encoding,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FromQueue {
    topic: String,
    queue: u32,
    /// A number, `earliest` or `latest`.
    #[serde(deserialize_with = "start_of_body")]
    #[schema(value_type = StartOfBody)]
    offset: StartAt,
    /// `created||paid`: only messages with one of these tags.
    #[serde(default)]
    tag: Option<String>,
    /// Only messages for which it is true, as in a fetch from one queue.
    #[serde(default)]
    filter: Option<String>,
}

/// What `offset` may be, for the reference.
#[derive(Debug, ToSchema)]
#[schema(as = FetchOffset)]
#[serde(untagged)]
#[allow(dead_code)] // never made: the reference alone reads it
enum StartOfBody {
    Number(u64),
    Word(String),
}

fn start_of_body<'de, D: Deserializer<'de>>(deserializer: D) -> Result<StartAt, D::Error> {
    struct StartVisitor;
    impl de::Visitor<'_> for StartVisitor {
        type Value = StartAt;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number from 0, \"earliest\" or \"latest\"")
        }
        fn visit_u64<E>(self, offset: u64) -> Result<StartAt, E> {
            Ok(StartAt::Offset(offset))
        }
        fn visit_str<E: de::Error>(self, word: &str) -> Result<StartAt, E> {
            match word {
                "earliest" => Ok(StartAt::Earliest),
                "latest" => Ok(StartAt::Latest),
                other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
            }
        }
    }
    deserializer.deserialize_any(StartVisitor)
}

impl FromQueue {
    fn fetch(&self) -> Result<QueueFetch, ApiError> {
        Ok(QueueFetch {
            topic: self.topic.clone(),
            queue: self.queue,
            start: self.offset,
            selection: selection(self.tag.as_deref(), self.filter.as_deref())?,
        })
    }
}

impl FetchManyBody {
    pub fn request(&self) -> Result<MultiFetchRequest, ApiError> {
        let count = self.queues.len();
        if !(1..=MAX_QUEUES).contains(&count) {
            return Err(ApiError::invalid(format!(
                "queues has {count} entries; it must have 1 to {MAX_QUEUES}"
            )));
        }
        for from in &self.queues {
            checked_topic(&from.topic)?;
        }
        Ok(MultiFetchRequest {
            queues: self
                .queues
                .iter()
                .map(FromQueue::fetch)
                .collect::<Result<_, _>>()?,
            max_messages: max_messages(self.max_messages)?,
            max_bytes: max_bytes(self.max_bytes)?,
            wait_ms: wait_ms(self.wait_ms)?,
            consistency: consistency(self.consistency.as_deref())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::FromRequestParts;
    use axum::http::{HeaderValue, Request};

    use super::*;
    use crate::http::body::parse_json;

    fn said(error: ApiError) -> String {
        match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    async fn parse(query: &str, form: Form) -> Result<Fetch, String> {
        let (mut parts, ()) = Request::get(format!("/x?{query}"))
            .body(())
            .unwrap()
            .into_parts();
        let params = Params::from_request_parts(&mut parts, &()).await.unwrap();
        let from = TopicQueue {
            topic: "t".into(),
            queue: 3,
        };
        Fetch::parse(from, params, form).map_err(said)
    }

    #[tokio::test]
    async fn defaults() {
        let fetch = parse("", Form::Json).await.unwrap();
        let expected = FetchRequest {
            topic: "t".into(),
            queue: 3,
            start: StartAt::Earliest,
            max_messages: 100,
            max_bytes: 1 << 20,
            wait_ms: 0,
            selection: Selection::default(),
            consistency: Consistency::Linearizable,
        };
        assert_eq!(
            fetch,
            Fetch {
                request: expected,
                encoding: Encoding::Auto,
                on_out_of_range: None,
            }
        );
    }

    #[tokio::test]
    async fn every_start() {
        for (query, start) in [
            ("offset=7", StartAt::Offset(7)),
            ("offset=earliest", StartAt::Earliest),
            ("offset=latest", StartAt::Latest),
            ("from_timestamp_ms=9", StartAt::Timestamp(9)),
        ] {
            assert_eq!(parse(query, Form::Json).await.unwrap().request.start, start);
        }
    }

    #[tokio::test]
    async fn everything_a_fetch_may_say() {
        let query = "offset=1&max_messages=5&max_bytes=10&wait_ms=60000&tag=a%7C%7Cb&filter=key%20%3D%20%27k%27&consistency=stale&encoding=base64";
        let fetch = parse(query, Form::Json).await.unwrap();
        let selection = Selection::parse(Some("a||b"), Some("key = 'k'")).unwrap();
        assert_eq!(fetch.request.selection, selection);
        assert_eq!(fetch.request.consistency, Consistency::Stale);
        assert_eq!(
            (fetch.request.max_messages, fetch.request.max_bytes),
            (5, 10)
        );
        assert_eq!(fetch.encoding, Encoding::Base64);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_named() {
        for (query, named) in [
            ("ofset=1", "unknown query parameter \"ofset\""),
            ("offset=-1", "whole number"),
            ("offset=1&from_timestamp_ms=1", "not both"),
            ("max_messages=0", "max_messages is 0; it must be 1 to 10000"),
            ("max_messages=10001", "1 to 10000"),
            ("max_bytes=16777217", "max_bytes"),
            ("wait_ms=60001", "0 to 60000"),
            ("wait_ms=soon", "wait_ms"),
            ("tag=a%7C%7C", "empty part"),
            ("filter=key+%3D", "character 6"),
            ("consistency=eventual", "linearizable or stale"),
            ("encoding=hex", "base64"),
        ] {
            let error = parse(query, Form::Json).await.unwrap_err();
            assert!(error.contains(named), "{query}: {error}");
        }
        assert!(parse("wait_ms=5", Form::Events).await.is_ok(), "it waits");
        assert!(
            parse("tag=a", Form::Batches)
                .await
                .unwrap_err()
                .contains("as they are")
        );
    }

    #[test]
    fn the_form_follows_accept() {
        let accept = |value| {
            form(&HeaderMap::from_iter([(
                header::ACCEPT,
                HeaderValue::from_static(value),
            )]))
        };
        assert_eq!(form(&HeaderMap::new()), Form::Json);
        assert_eq!(accept("*/*"), Form::Json);
        assert_eq!(accept("text/event-stream"), Form::Events);
        assert_eq!(accept("text/html, Text/Event-Stream;q=0.5"), Form::Events);
        assert_eq!(accept(BATCHES), Form::Batches);
        assert_eq!(accept("application/json, text/event-stream"), Form::Json);
    }

    #[test]
    fn last_event_ids() {
        let id = |value| {
            last_event_id(&HeaderMap::from_iter([(
                "last-event-id".parse().unwrap(),
                HeaderValue::from_static(value),
            )]))
        };
        assert_eq!(last_event_id(&HeaderMap::new()), Ok(None));
        assert_eq!(id("41"), Ok(Some(41)));
        assert!(id("x").is_err());
    }

    #[test]
    fn many_queues() {
        let parse = |text: &str| {
            parse_json::<FetchManyBody>(text.as_bytes())
                .and_then(|body| body.request())
                .map_err(said)
        };
        let request = parse(r#"{"queues":[{"topic":"t","queue":1,"offset":5}],"wait_ms":10}"#);
        let request = request.unwrap();
        let from = &request.queues[0];
        assert_eq!(
            (from.topic.as_str(), from.queue, from.start),
            ("t", 1, StartAt::Offset(5))
        );
        assert!(from.selection.is_everything());
        assert_eq!((request.max_messages, request.wait_ms), (100, 10));
        for (text, named) in [
            (r#"{"queues":[]}"#, "1 to 1000"),
            (
                r#"{"queues":[{"topic":"../x","queue":1,"offset":5}]}"#,
                "topic name",
            ),
            (
                r#"{"queues":[{"topic":"t","queue":1,"offset":5,"x":1}]}"#,
                "unknown field `x`",
            ),
            (
                r#"{"queues":[{"topic":"t","queue":1,"offset":5,"filter":"key"}]}"#,
                "expected =",
            ),
            (
                r#"{"queues":[{"topic":"t","queue":1,"offset":5}],"max_bytes":0}"#,
                "max_bytes",
            ),
        ] {
            assert!(parse(text).unwrap_err().contains(named), "{text}");
        }
    }
}
