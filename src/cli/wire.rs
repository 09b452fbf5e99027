//! The JSON this client sends and reads, as far as it needs it. The server may say more.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::Problem;

#[derive(Debug, Clone, Deserialize)]
pub struct Topic {
    pub name: String,
    pub config: TopicConfig,
    pub queues: Vec<Queue>,
}

/// Only what the tables show; `topic show --json` prints the whole.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct TopicConfig {
    pub replicas: u32,
    pub flush: String,
    pub retention: Retention,
    pub max_message_bytes: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Retention {
    pub max_age_ms: Option<u64>,
    pub max_bytes: Option<u64>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Queue {
    pub queue: u32,
    pub leader: Option<u64>,
    #[serde(default)]
    pub term: u64,
    #[serde(default)]
    pub replicas: Vec<u64>,
    #[serde(default)]
    pub in_sync: Vec<u64>,
    pub earliest_offset: u64,
    pub end_offset: u64,
}

#[derive(Debug, Deserialize)]
pub struct Topics {
    pub topics: Vec<Topic>,
}

/// A message to store. Bytes that are not UTF-8 travel as base64.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NewMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

impl NewMessage {
    pub fn set_value(&mut self, bytes: Vec<u8>) {
        match String::from_utf8(bytes) {
            Ok(text) => self.value = Some(text),
            Err(error) => self.value_base64 = Some(BASE64.encode(error.as_bytes())),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct ProduceBody<'a> {
    pub messages: &'a [NewMessage],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub producer: Option<ProducerMark<'a>>,
}

#[derive(Debug, Serialize)]
pub struct ProducerMark<'a> {
    pub id: &'a str,
    pub epoch: u64,
    /// Of the request's first message.
    pub sequence: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct ProducerIdentity {
    pub id: String,
    pub epoch: u64,
}

#[derive(Debug, Deserialize)]
pub struct ProduceAnswer {
    pub results: Vec<ProduceResult>,
    #[serde(default)]
    pub durability: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum ProduceResult {
    Failed {
        error: Problem,
    },
    /// The topic drops what does not fit its backlog.
    Dropped {
        queue: u32,
        #[serde(rename = "dropped")]
        _dropped: bool,
    },
    Stored(Stored),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stored {
    pub queue: u32,
    /// None for a delayed message, which has none yet.
    pub offset: Option<u64>,
    pub message_id: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    pub queue: u32,
    pub offset: u64,
    pub message_id: String,
    pub timestamp_ms: u64,
    #[serde(default)]
    pub key: Option<String>,
    #[serde(default)]
    pub tag: Option<String>,
    #[serde(default)]
    pub headers: BTreeMap<String, Value>,
    #[serde(default)]
    pub value: Option<String>,
    #[serde(default)]
    pub value_base64: Option<String>,
}

impl Message {
    /// The value's bytes; None where a message has none or its base64 is broken.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match (&self.value, &self.value_base64) {
            (Some(text), _) => Some(text.clone().into_bytes()),
            (None, Some(encoded)) => BASE64.decode(encoded).ok(),
            (None, None) => None,
        }
    }
}

/// A fetch answer; messages stay raw JSON so that `--json` prints them as the server wrote them.
#[derive(Debug, Deserialize)]
pub struct FetchAnswer<M = Message> {
    pub messages: Vec<M>,
    pub next_offset: u64,
    pub end_offset: u64,
    #[serde(default)]
    pub earliest_offset: u64,
}

#[derive(Debug, Deserialize)]
pub struct GroupOffsets {
    pub offsets: Vec<GroupOffset>,
}

#[derive(Debug, Deserialize)]
pub struct GroupOffset {
    pub topic: String,
    pub queue: u32,
    pub offset: Option<u64>,
    #[serde(default)]
    pub end_offset: Option<u64>,
    #[serde(default)]
    pub lag: Option<u64>,
    #[serde(default)]
    pub lag_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub struct Cluster {
    pub cluster_id: String,
    pub nodes: Vec<Node>,
    pub catalog: Catalog,
    pub queues: QueueTotals,
}

#[derive(Debug, Deserialize)]
pub struct Node {
    pub id: u64,
    pub url: String,
    pub state: String,
    #[serde(default)]
    pub leaders: u64,
    #[serde(default)]
    pub replicas: u64,
    #[serde(default)]
    pub quarantined: u64,
    #[serde(default)]
    pub version: String,
}

#[derive(Debug, Deserialize)]
pub struct Catalog {
    pub leader: Option<u64>,
    #[serde(default)]
    pub term: u64,
}

#[derive(Debug, Deserialize)]
pub struct QueueTotals {
    pub total: u64,
    pub leaderless: u64,
    pub under_replicated: u64,
}

#[derive(Debug, Deserialize)]
pub struct ClusterEvent {
    pub event: String,
    pub time_ms: u64,
    #[serde(default)]
    pub topic: Option<String>,
    #[serde(default)]
    pub queue: Option<u32>,
    #[serde(default)]
    pub term: Option<u64>,
    #[serde(default)]
    pub node: Option<u64>,
}

/// One line of an `--acked` file: what was acknowledged, and where.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Acked {
    pub topic: String,
    pub queue: u32,
    pub offset: u64,
    pub message_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_base64: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partly_failed_answer_is_read_entry_by_entry() {
        let text = r#"{"results":[
            {"queue":2,"offset":42,"message_id":"m"},
            {"error":{"title":"no leader","status":503,"code":"no_leader","retryable":true,"outcome":"not_committed"}}
        ],"durability":"majority_fsync"}"#;
        let answer: ProduceAnswer = serde_json::from_str(text).unwrap();
        assert!(matches!(&answer.results[0], ProduceResult::Stored(s) if s.offset == Some(42)));
        assert!(
            matches!(&answer.results[1], ProduceResult::Failed { error } if error.status == 503)
        );
    }

    #[test]
    fn bytes_that_are_no_text_travel_as_base64() {
        let mut message = NewMessage::default();
        message.set_value(vec![0xff, 0x00]);
        assert_eq!(
            serde_json::to_string(&message).unwrap(),
            r#"{"value_base64":"/wA="}"#
        );
    }
}
