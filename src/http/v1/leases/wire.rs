//! What requests about leases say: parsing and bounds.

use serde::{Deserialize, Deserializer};
use utoipa::ToSchema;

use super::super::consume::query::{self, Encoding};
use crate::broker::StartAt;
use crate::broker::leases::ReceiveRequest;
use crate::http::error::ApiError;
use crate::http::object;
use crate::http::path::checked_topic;
use crate::http::query::{Params, bounded};
use crate::names::dead_letter_topic;

const MAX_TOPICS: usize = 100;
const MAX_MESSAGES: usize = 10_000;
const DEFAULT_MESSAGES: usize = 10;
const MAX_PREFETCH: usize = 1_000;
const MAX_RECEIPTS: usize = 10_000;
const MIN_LEASE_MS: u64 = 100;
/// Twelve hours, for leases and for delays alike.
pub const MAX_LEASE_MS: u64 = 43_200_000;
const DEFAULT_LEASE_MS: u64 = 30_000;
const MAX_CONSUMER_BYTES: usize = 255;

/// Asks for messages.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiveBody {
    /// 1 to 100.
    topics: Vec<String>,
    /// 1 to 10000, default 10.
    #[serde(default)]
    max_messages: Option<usize>,
    /// Default 1 MiB, at most 16 MiB; never hides the first message.
    #[serde(default)]
    max_bytes: Option<usize>,
    /// Wait this long for a message, at most 60000.
    #[serde(default)]
    wait_ms: Option<u64>,
    /// 100 to 43200000, default 30000.
    #[serde(default)]
    lease_ms: Option<u64>,
    /// Messages of one key one at a time, in their order.
    #[serde(default, deserialize_with = "object::or_default")]
    ordered: bool,
    /// `created||paid`: only messages with one of these tags; others are done for the group.
    #[serde(default)]
    tag: Option<String>,
    /// As in a fetch; messages it leaves out are done for the group.
    #[serde(default)]
    filter: Option<String>,
    /// Where the group begins in queues it never leased from.
    #[serde(default, deserialize_with = "start")]
    start: StartBody,
    /// Who asks, for acks that go `through`. Without it each receive counts as another consumer.
    #[serde(default)]
    consumer: Option<String>,
    #[serde(default, deserialize_with = "query::encoding_of_body")]
    pub encoding: Encoding,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = LeaseStart)]
pub enum StartBody {
    #[default]
    Earliest,
    Latest,
    TimestampMs(u64),
}

fn start<'de, D: Deserializer<'de>>(deserializer: D) -> Result<StartBody, D::Error> {
    let allowed = r#""earliest", "latest" or {"timestamp_ms": N}"#;
    Ok(object::choice(deserializer, allowed)?.unwrap_or_default())
}

impl From<StartBody> for StartAt {
    fn from(start: StartBody) -> Self {
        match start {
            StartBody::Earliest => Self::Earliest,
            StartBody::Latest => Self::Latest,
            StartBody::TimestampMs(ms) => Self::Timestamp(ms),
        }
    }
}

impl ReceiveBody {
    pub fn request(self, group: String) -> Result<ReceiveRequest, ApiError> {
        check_topics(&group, &self.topics)?;
        if let Some(consumer) = &self.consumer
            && !(1..=MAX_CONSUMER_BYTES).contains(&consumer.len())
        {
            return Err(ApiError::invalid(format!(
                "consumer has 1 to {MAX_CONSUMER_BYTES} bytes"
            )));
        }
        Ok(ReceiveRequest {
            group,
            topics: self.topics,
            max_messages: bounded(
                "max_messages",
                self.max_messages,
                1..=MAX_MESSAGES,
                DEFAULT_MESSAGES,
            )?,
            max_bytes: query::max_bytes(self.max_bytes)?,
            wait_ms: query::wait_ms(self.wait_ms)?,
            lease_ms: lease_ms(self.lease_ms)?,
            ordered: self.ordered,
            selection: query::selection(self.tag.as_deref(), self.filter.as_deref())?,
            start: self.start.into(),
            consumer: self.consumer,
            held: Vec::new(),
        })
    }
}

fn check_topics(group: &str, topics: &[String]) -> Result<(), ApiError> {
    let own = dead_letter_topic(group);
    if topics.contains(&own) {
        // What died again would go where it came from.
        return Err(ApiError::invalid(format!(
            "topic {own:?} has the dead letters of consumer group {group:?} itself; read it with \
             another group, or put them back with dlq/redrive"
        )));
    }
    let count = topics.len();
    if !(1..=MAX_TOPICS).contains(&count) {
        return Err(ApiError::invalid(format!(
            "topics has {count} entries; it must have 1 to {MAX_TOPICS}"
        )));
    }
    for (place, topic) in topics.iter().enumerate() {
        checked_topic(topic)?;
        if topics[..place].contains(topic) {
            return Err(ApiError::invalid(format!("topic {topic:?} is named twice")));
        }
    }
    Ok(())
}

pub fn lease_ms(value: Option<u64>) -> Result<u64, ApiError> {
    bounded(
        "lease_ms",
        value,
        MIN_LEASE_MS..=MAX_LEASE_MS,
        DEFAULT_LEASE_MS,
    )
}

pub fn checked_delay(delay_ms: u64) -> Result<u64, ApiError> {
    bounded("delay_ms", Some(delay_ms), 0..=MAX_LEASE_MS, 0)
}

/// Messages that are done.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AckBody {
    #[serde(default, deserialize_with = "object::or_default")]
    pub receipts: Vec<String>,
    /// Everything that the consumer of this receipt holds of its queue, up to it.
    #[serde(default)]
    pub through: Option<String>,
}

/// Messages to be delivered again.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NackBody {
    pub receipts: Vec<String>,
    /// 0 to 43200000. Without it the group's retry policy says when.
    #[serde(default)]
    pub delay_ms: Option<u64>,
}

/// Leases to prolong.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LeaseExtend)]
pub struct ExtendBody {
    pub receipts: Vec<String>,
    /// From now on. 100 to 43200000, default 30000.
    #[serde(default)]
    pub lease_ms: Option<u64>,
}

pub fn check_receipts(count: usize) -> Result<(), ApiError> {
    match (1..=MAX_RECEIPTS).contains(&count) {
        true => Ok(()),
        false => Err(ApiError::invalid(format!(
            "receipts has {count} entries; it must have 1 to {MAX_RECEIPTS}"
        ))),
    }
}

/// A stream's request: as many messages as it may hold at once.
pub fn stream_request(
    group: String,
    params: Params,
) -> Result<(ReceiveRequest, Encoding), ApiError> {
    let params = params.only(&[
        "topic", "prefetch", "lease_ms", "ordered", "tag", "filter", "start", "encoding",
    ])?;
    let topics = params.get("topic").unwrap_or_default();
    let topics: Vec<String> = topics.split(',').map(str::to_owned).collect();
    check_topics(&group, &topics)?;
    let start = match params.get("start") {
        None | Some("earliest") => StartAt::Earliest,
        Some("latest") => StartAt::Latest,
        Some(_) => match params.number("start") {
            Ok(Some(ms)) => StartAt::Timestamp(ms),
            _ => {
                return Err(ApiError::invalid(
                    "start must be earliest, latest or milliseconds since 1970",
                ));
            }
        },
    };
    let ordered = match params.get("ordered") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(ApiError::invalid("ordered must be true or false")),
    };
    let prefetch = params.number("prefetch")?;
    let request = ReceiveRequest {
        group,
        topics,
        max_messages: bounded("prefetch", prefetch, 1..=MAX_PREFETCH, DEFAULT_MESSAGES)?,
        max_bytes: query::max_bytes(None)?,
        wait_ms: 0,
        lease_ms: lease_ms(params.number("lease_ms")?)?,
        ordered,
        selection: query::selection(params.get("tag"), params.get("filter"))?,
        start,
        // Each stream is a consumer of its own.
        consumer: Some(format!("stream {}", uuid::Uuid::new_v4())),
        held: Vec::new(),
    };
    Ok((request, query::encoding(params.get("encoding"))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn parse(text: &str) -> Result<ReceiveRequest, String> {
        let said = |error: ApiError| match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        parse_json::<ReceiveBody>(text.as_bytes())
            .and_then(|body| body.request("g".to_owned()))
            .map_err(said)
    }

    #[test]
    fn a_receive_is_checked() {
        let request = parse(r#"{"topics":["orders"]}"#).unwrap();
        let defaults = (request.max_messages, request.wait_ms, request.lease_ms);
        assert_eq!(defaults, (10, 0, 30_000));
        assert_eq!(request.start, StartAt::Earliest);
        let request = parse(r#"{"topics":["_dlq.h"],"start":{"timestamp_ms":5}}"#).unwrap();
        assert_eq!(request.start, StartAt::Timestamp(5));
        let nulls = parse(r#"{"topics":["a"],"ordered":null,"start":null,"encoding":null}"#);
        let request = nulls.unwrap();
        assert_eq!((request.start, request.ordered), (StartAt::Earliest, false));
        for (text, named) in [
            (r#"{"topics":[]}"#, "1 to 100"),
            (r#"{"topics":["a","a"]}"#, "twice"),
            (r#"{"topics":["_x"]}"#, "topic name"),
            (r#"{"topics":["a","_dlq.g"]}"#, "another group"),
            (r#"{"topics":["a"],"lease_ms":99}"#, "100 to 43200000"),
            (r#"{"topics":["a"],"wait_ms":60001}"#, "0 to 60000"),
            (r#"{"topics":["a"],"max_messages":0}"#, "1 to 10000"),
            (r#"{"topics":["a"],"tag":""}"#, "empty part"),
            (r#"{"topics":["a"],"consumer":""}"#, "1 to 255"),
            (r#"{"topics":["a"],"lease":1}"#, "unknown field `lease`"),
            (r#"{"topics":["a"],"start":"middle"}"#, "middle"),
            (r#"{"topics":["a"],"start":7}"#, r#"{"timestamp_ms": N}"#),
            (r#"{"topics":["a"],"encoding":7}"#, r#""base64""#),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
