//! Topics as JSON: what may be asked for, with its bounds, and how a topic is shown.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::super::given;
use crate::broker::{
    Backlog, FlushMode, MAX_TTL_MS, OnFull, QueueDescription, Quota, Retention, TopicConfig,
    TopicDescription, TopicPatch,
};
use crate::http::HttpState;
use crate::http::error::ApiError;
use crate::http::object;
use crate::http::query::bounded;

const MAX_QUEUES: u32 = 1024;
const MAX_REPLICAS: u32 = 7;

/// A topic to create. Only `name` is required.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTopic {
    pub name: String,
    /// 1 to 1024, default 4.
    #[serde(default)]
    queues: Option<u32>,
    /// 1 to 7, default 3, or all nodes where there are fewer.
    #[serde(default)]
    replicas: Option<u32>,
    /// `sync` (default): a majority has it on disk. `async`: a majority has written it.
    #[serde(default, deserialize_with = "flush")]
    #[schema(value_type = Option<String>)]
    flush: Option<FlushMode>,
    #[serde(default, deserialize_with = "object::optional")]
    retention: Option<RetentionBody>,
    #[serde(default)]
    max_message_bytes: Option<u64>,
    #[serde(default, deserialize_with = "object::optional")]
    backlog: Option<BacklogBody>,
    #[serde(default, deserialize_with = "object::optional")]
    quota: Option<QuotaBody>,
    /// How long a message is delivered once it is visible. Default: as long as it is kept.
    #[serde(default)]
    ttl_ms: Option<u64>,
    /// Whether it is written down what becomes of each message; see
    /// `GET /v1/topics/{topic}/messages/{message_id}/trace`.
    #[serde(default)]
    trace: Option<bool>,
    /// Keys hash over this many queues, default all.
    #[serde(default)]
    hash_queues: Option<u32>,
}

/// What goes: messages older than `max_age_ms`, the oldest beyond `max_bytes`. Null means no limit.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetentionBody {
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    max_age_ms: Option<Option<u64>>,
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    max_bytes: Option<Option<u64>>,
}

/// What each queue takes that the slowest consumer group has not consumed yet (without any consumer
/// group: all that it holds). Null means no limit.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BacklogBody {
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    max_messages: Option<Option<u64>>,
    /// Stored bytes.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    max_bytes: Option<Option<u64>>,
    /// How long ago the oldest message that was not consumed became visible.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    max_age_ms: Option<Option<u64>>,
    /// `reject` (default): 429. `drop_newest`: 200 with `"dropped": true`, and nothing stored.
    #[serde(default, deserialize_with = "on_full")]
    #[schema(value_type = Option<String>)]
    on_full: Option<OnFull>,
}

/// Rates beyond which producers are answered 429. Null means no limit.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaBody {
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    messages_per_s: Option<Option<u64>>,
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    bytes_per_s: Option<Option<u64>>,
}

/// A change of a topic: absent fields stay as they are. Null gives `retention`, `backlog`, `quota` and
/// `ttl_ms` what a topic has that was created without them.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateTopic {
    /// Can only grow.
    #[serde(default)]
    queues: Option<u32>,
    #[serde(default, deserialize_with = "flush")]
    #[schema(value_type = Option<String>)]
    flush: Option<FlushMode>,
    #[serde(default, deserialize_with = "given_object")]
    #[schema(value_type = Option<RetentionBody>)]
    retention: Option<Option<RetentionBody>>,
    #[serde(default)]
    max_message_bytes: Option<u64>,
    #[serde(default, deserialize_with = "given_object")]
    #[schema(value_type = Option<BacklogBody>)]
    backlog: Option<Option<BacklogBody>>,
    #[serde(default, deserialize_with = "given_object")]
    #[schema(value_type = Option<QuotaBody>)]
    quota: Option<Option<QuotaBody>>,
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<u64>)]
    ttl_ms: Option<Option<u64>>,
    #[serde(default)]
    trace: Option<bool>,
    /// Moves keyed messages to other queues: their order is only kept within a queue.
    #[serde(default)]
    hash_queues: Option<u32>,
}

fn flush<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<FlushMode>, D::Error> {
    object::choice(deserializer, r#""sync" or "async""#)
}

fn on_full<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<OnFull>, D::Error> {
    object::choice(deserializer, r#""reject" or "drop_newest""#)
}

/// An object or null, both of which count as given.
fn given_object<'de, T, D>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    object::optional(deserializer).map(Some)
}

/// A topic with its queues as they are now.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicBody<'a> {
    name: &'a str,
    config: ConfigBody<'a>,
    queues: Vec<QueueBody<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ConfigBody<'a> {
    #[serde(flatten)]
    #[schema(value_type = Object)]
    config: &'a TopicConfig,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct QueueBody<'a> {
    queue: u32,
    /// Null while there is none.
    leader: Option<u64>,
    term: u64,
    replicas: &'a [u64],
    in_sync: &'a [u64],
    earliest_offset: u64,
    /// The offset that the next message gets.
    end_offset: u64,
    /// Goes up when an `async` queue lost a tail that had been acknowledged.
    epoch: u64,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TopicsBody<'a> {
    pub topics: Vec<TopicBody<'a>>,
}

impl<'a> From<&'a QueueDescription> for QueueBody<'a> {
    fn from(queue: &'a QueueDescription) -> Self {
        Self {
            queue: queue.queue,
            leader: queue.leader,
            term: queue.term,
            replicas: &queue.replicas,
            in_sync: &queue.in_sync,
            earliest_offset: queue.earliest_offset,
            end_offset: queue.end_offset,
            epoch: queue.epoch,
        }
    }
}

impl<'a> From<&'a TopicDescription> for TopicBody<'a> {
    fn from(topic: &'a TopicDescription) -> Self {
        Self {
            name: &topic.name,
            config: ConfigBody {
                config: &topic.config,
            },
            queues: topic.queues.iter().map(QueueBody::from).collect(),
        }
    }
}

/// What the cluster allows of any topic.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    default_replicas: u32,
    max_message_bytes: u64,
}

impl From<&HttpState> for Allowed {
    fn from(state: &HttpState) -> Self {
        Self {
            default_replicas: state.default_replicas,
            max_message_bytes: state.max_message_bytes,
        }
    }
}

impl CreateTopic {
    pub fn config(&self, allowed: Allowed) -> Result<TopicConfig, ApiError> {
        let base = TopicConfig::default();
        check_ttl(self.ttl_ms)?;
        let queues = bounded("queues", self.queues, 1..=MAX_QUEUES, base.queues)?;
        let default_bytes = base.max_message_bytes.min(allowed.max_message_bytes);
        Ok(TopicConfig {
            queues,
            replicas: bounded(
                "replicas",
                self.replicas,
                1..=MAX_REPLICAS,
                allowed.default_replicas,
            )?,
            flush: self.flush.unwrap_or(base.flush),
            retention: merge_retention(self.retention.as_ref(), base.retention)?,
            max_message_bytes: bounded(
                "max_message_bytes",
                self.max_message_bytes,
                1..=allowed.max_message_bytes,
                default_bytes,
            )?,
            backlog: merge_backlog(self.backlog.as_ref(), base.backlog)?,
            quota: merge_quota(self.quota.as_ref(), base.quota)?,
            ttl_ms: self.ttl_ms,
            trace: self.trace.unwrap_or(base.trace),
            // 0: as many as there are queues, or as the topic has if it is there already.
            hash_queues: match self.hash_queues {
                None => 0,
                given => bounded("hash_queues", given, 1..=queues, queues)?,
            },
        })
    }
}

impl UpdateTopic {
    /// `current` fills the absent parts of fields that are objects.
    pub fn patch(&self, current: &TopicConfig, allowed: Allowed) -> Result<TopicPatch, ApiError> {
        check_ttl(self.ttl_ms.flatten())?;
        if let Some(queues) = self.queues {
            bounded("queues", Some(queues), 1..=MAX_QUEUES, queues)?;
            if queues < current.queues {
                return Err(ApiError::invalid(format!(
                    "queues can only grow; the topic has {} and you asked for {queues}",
                    current.queues
                )));
            }
        }
        let queues = self.queues.unwrap_or(current.queues);
        if self.hash_queues.is_some() {
            bounded("hash_queues", self.hash_queues, 1..=queues, queues)?;
        }
        if let Some(bytes) = self.max_message_bytes {
            bounded(
                "max_message_bytes",
                Some(bytes),
                1..=allowed.max_message_bytes,
                bytes,
            )?;
        }
        let base = TopicConfig::default();
        Ok(TopicPatch {
            queues: self.queues,
            retention: match &self.retention {
                None => None,
                Some(None) => Some(base.retention),
                Some(given) => Some(merge_retention(given.as_ref(), current.retention)?),
            },
            max_message_bytes: self.max_message_bytes,
            backlog: match &self.backlog {
                None => None,
                Some(None) => Some(base.backlog),
                Some(given) => Some(merge_backlog(given.as_ref(), current.backlog)?),
            },
            quota: match &self.quota {
                None => None,
                Some(None) => Some(base.quota),
                Some(given) => Some(merge_quota(given.as_ref(), current.quota)?),
            },
            ttl_ms: self.ttl_ms,
            trace: self.trace,
            flush: self.flush,
            hash_queues: self.hash_queues,
        })
    }
}

fn check_ttl(ttl_ms: Option<u64>) -> Result<(), ApiError> {
    let Some(ttl_ms) = ttl_ms else {
        return Ok(());
    };
    bounded("ttl_ms", Some(ttl_ms), 1..=MAX_TTL_MS, ttl_ms).map(drop)
}

/// Limits that are given must lie above 0 and far below overflow.
fn check_limits(limits: &[(&str, Option<Option<u64>>)]) -> Result<(), ApiError> {
    for (name, value) in limits {
        if let Some(value) = value.flatten() {
            bounded(name, Some(value), 1..=u64::from(u32::MAX) << 20, value)?;
        }
    }
    Ok(())
}

fn merge_retention(body: Option<&RetentionBody>, base: Retention) -> Result<Retention, ApiError> {
    let Some(body) = body else {
        return Ok(base);
    };
    check_limits(&[
        ("retention.max_age_ms", body.max_age_ms),
        ("retention.max_bytes", body.max_bytes),
    ])?;
    Ok(Retention {
        max_age_ms: body.max_age_ms.unwrap_or(base.max_age_ms),
        max_bytes: body.max_bytes.unwrap_or(base.max_bytes),
    })
}

fn merge_backlog(body: Option<&BacklogBody>, base: Backlog) -> Result<Backlog, ApiError> {
    let Some(body) = body else {
        return Ok(base);
    };
    check_limits(&[
        ("backlog.max_messages", body.max_messages),
        ("backlog.max_bytes", body.max_bytes),
        ("backlog.max_age_ms", body.max_age_ms),
    ])?;
    Ok(Backlog {
        max_messages: body.max_messages.unwrap_or(base.max_messages),
        max_bytes: body.max_bytes.unwrap_or(base.max_bytes),
        max_age_ms: body.max_age_ms.unwrap_or(base.max_age_ms),
        on_full: body.on_full.unwrap_or(base.on_full),
    })
}

fn merge_quota(body: Option<&QuotaBody>, base: Quota) -> Result<Quota, ApiError> {
    let Some(body) = body else {
        return Ok(base);
    };
    check_limits(&[
        ("quota.messages_per_s", body.messages_per_s),
        ("quota.bytes_per_s", body.bytes_per_s),
    ])?;
    Ok(Quota {
        messages_per_s: body.messages_per_s.unwrap_or(base.messages_per_s),
        bytes_per_s: body.bytes_per_s.unwrap_or(base.bytes_per_s),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::body::parse_json;

    const ALLOWED: Allowed = Allowed {
        default_replicas: 1,
        max_message_bytes: 8 << 20,
    };

    fn create(body: &serde_json::Value) -> Result<TopicConfig, String> {
        let bytes = body.to_string();
        parse_json::<CreateTopic>(bytes.as_bytes())
            .and_then(|topic| topic.config(ALLOWED))
            .map_err(said)
    }

    fn said(error: ApiError) -> String {
        match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_name_is_required() {
        let config = create(&json!({"name": "t"})).unwrap();
        assert_eq!(
            config,
            TopicConfig {
                replicas: 1,
                // For the catalog to choose: a topic that exists keeps its own.
                hash_queues: 0,
                ..TopicConfig::default()
            }
        );
    }

    #[test]
    fn the_contracts_example() {
        let config = create(
            &json!({"name": "orders", "queues": 2, "replicas": 3, "flush": "async",
            "retention": {"max_age_ms": null, "max_bytes": 1000}, "max_message_bytes": 100,
            "backlog": {"max_messages": null, "on_full": "reject"}, "ttl_ms": null}),
        );
        let config = config.unwrap();
        assert_eq!(config.flush, FlushMode::Async);
        assert_eq!(
            config.retention,
            Retention {
                max_age_ms: None,
                max_bytes: Some(1000)
            }
        );
        assert_eq!(
            (config.queues, config.hash_queues, config.replicas),
            (2, 0, 3)
        );
    }

    #[test]
    fn a_part_of_retention_leaves_the_other_at_its_default() {
        let config = create(&json!({"name": "t", "retention": {"max_bytes": 5}})).unwrap();
        assert_eq!(config.retention.max_age_ms, Some(259_200_000));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (body, named) in [
            (
                json!({"name": "t", "partitions": 3}),
                "unknown field `partitions`",
            ),
            (json!({"name": "t", "partitions": 3}), "`queues`"),
            (json!({"queues": 3}), "missing field `name`"),
            (
                json!({"name": "t", "queues": 0}),
                "queues is 0; it must be 1 to 1024",
            ),
            (json!({"name": "t", "queues": "4"}), "line 1 column"),
            (json!({"name": "t", "replicas": 9}), "replicas"),
            (json!({"name": "t", "flush": "never"}), "never"),
            (json!({"name": "t", "flush": 1}), "\"sync\" or \"async\""),
            (
                json!({"name": "t", "ttl_ms": 0}),
                "ttl_ms is 0; it must be 1",
            ),
            (
                json!({"name": "t", "backlog": {"max_messages": 0}}),
                "backlog.max_messages is 0",
            ),
            (
                json!({"name": "t", "quota": {"bytes_per_s": 0}}),
                "quota.bytes_per_s is 0",
            ),
            (
                json!({"name": "t", "backlog": {"max": 5}}),
                "unknown field `max`",
            ),
            (
                json!({"name": "t", "retention": {"max_bytes": 0}}),
                "retention.max_bytes",
            ),
            (
                json!({"name": "t", "max_message_bytes": 9 << 20}),
                "max_message_bytes",
            ),
            (json!({"name": "t", "hash_queues": 5}), "hash_queues"),
        ] {
            let error = create(&body).unwrap_err();
            assert!(error.contains(named), "{body}: {error}");
        }
    }

    #[test]
    fn a_patch_keeps_what_it_does_not_name() {
        let current = TopicConfig {
            retention: Retention {
                max_age_ms: Some(7),
                max_bytes: Some(9),
            },
            backlog: Backlog {
                max_messages: Some(3),
                ..TopicConfig::default().backlog
            },
            ..TopicConfig::default()
        };
        let patch = |body: serde_json::Value| {
            let bytes = body.to_string();
            parse_json::<UpdateTopic>(bytes.as_bytes())
                .and_then(|wanted| wanted.patch(&current, ALLOWED))
                .map_err(said)
        };
        let changed = patch(json!({"retention": {"max_bytes": null}})).unwrap();
        assert_eq!(
            changed.retention,
            Some(Retention {
                max_age_ms: Some(7),
                max_bytes: None
            })
        );
        assert!(changed.queues.is_none() && changed.flush.is_none());
        let base = TopicConfig::default();
        let reset = patch(json!({"retention": null, "backlog": null, "quota": null})).unwrap();
        assert_eq!(reset.retention, Some(base.retention));
        assert_eq!(reset.backlog, Some(base.backlog));
        assert_eq!(reset.quota, Some(base.quota));
        let bounded = patch(json!({"backlog": {"max_bytes": 5}, "ttl_ms": null})).unwrap();
        let backlog = bounded.backlog.unwrap();
        assert_eq!(
            (backlog.max_messages, backlog.max_bytes),
            (Some(3), Some(5))
        );
        assert_eq!(bounded.ttl_ms, Some(None));
        assert_eq!(patch(json!({"queues": 8})).unwrap().queues, Some(8));
        assert!(
            patch(json!({"queues": 3}))
                .unwrap_err()
                .contains("only grow")
        );
        assert!(
            patch(json!({"name": "x"}))
                .unwrap_err()
                .contains("unknown field `name`")
        );
        assert!(
            patch(json!({"replicas": 1}))
                .unwrap_err()
                .contains("unknown field")
        );
    }
}
