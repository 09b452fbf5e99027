//! Fetch answers as JSON, written straight from the messages' bytes into one buffer.

use axum::http::StatusCode;
use axum::response::Response;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use utoipa::ToSchema;

use super::query::Encoding;
use crate::broker::{FetchAnswer, Message, ProducerMark};
use crate::http::body::{charge, keep_until_sent};
use crate::http::error::ApiError;
use crate::http::limits::{BudgetShare, ByteBudget};
use crate::http::multi::json_with_capacity;

/// A message as the reference describes it; [`MessageOut`] writes it.
#[derive(Debug, serde::Serialize, ToSchema)]
#[schema(as = Message)]
pub struct MessageDoc {
    queue: u32,
    offset: u64,
    /// Opaque and unique for ever.
    message_id: String,
    timestamp_ms: u64,
    key: Option<String>,
    tag: Option<String>,
    headers: std::collections::BTreeMap<String, String>,
    /// Where the bytes are UTF-8, else `value_base64`.
    value: Option<String>,
    value_base64: Option<String>,
    /// `{"id", "epoch", "sequence"}` for messages of an idempotent producer.
    #[schema(value_type = Option<Object>)]
    producer: Option<()>,
}

/// What a fetch found.
#[derive(Debug, serde::Serialize, ToSchema)]
#[schema(as = FetchAnswer)]
pub struct FetchDoc {
    messages: Vec<MessageDoc>,
    /// Has moved past what a filter left out.
    next_offset: u64,
    earliest_offset: u64,
    end_offset: u64,
}

/// What a fetch over many queues found, in the order asked for.
#[derive(Debug, serde::Serialize, ToSchema)]
#[schema(as = FetchManyAnswer)]
pub struct FetchManyDoc {
    results: Vec<QueueFetchDoc>,
}

/// What was found in one of many queues.
#[derive(Debug, serde::Serialize, ToSchema)]
#[schema(as = QueueFetchAnswer)]
pub struct QueueFetchDoc {
    topic: String,
    queue: u32,
    messages: Vec<MessageDoc>,
    next_offset: u64,
    earliest_offset: u64,
    end_offset: u64,
}

/// One message on its way into JSON.
#[derive(Debug)]
pub struct MessageOut<'a> {
    pub message: &'a Message,
    pub encoding: Encoding,
}

#[derive(Debug, serde::Serialize)]
struct ProducerOut<'a> {
    id: &'a str,
    epoch: u32,
    sequence: u64,
}

impl<'a> From<&'a ProducerMark> for ProducerOut<'a> {
    fn from(mark: &'a ProducerMark) -> Self {
        Self {
            id: &mark.id,
            epoch: mark.epoch,
            sequence: mark.sequence,
        }
    }
}

struct Base64Out<'a>(&'a [u8]);

impl Serialize for Base64Out<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &BASE64))
    }
}

impl Serialize for MessageOut<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let message = self.message;
        let fields = 8 + usize::from(message.producer.is_some());
        let mut out = serializer.serialize_struct("Message", fields)?;
        out.serialize_field("queue", &message.queue)?;
        out.serialize_field("offset", &message.offset)?;
        out.serialize_field("message_id", &message.message_id)?;
        out.serialize_field("timestamp_ms", &message.timestamp_ms)?;
        out.serialize_field("key", &message.key)?;
        out.serialize_field("tag", &message.tag)?;
        out.serialize_field("headers", &message.headers)?;
        match (&message.value, self.encoding) {
            (None, _) => out.serialize_field("value", &())?,
            (Some(value), Encoding::Base64) => {
                out.serialize_field("value_base64", &Base64Out(value))?;
            }
            (Some(value), Encoding::Auto) => match std::str::from_utf8(value) {
                Ok(text) => out.serialize_field("value", text)?,
                Err(_) => out.serialize_field("value_base64", &Base64Out(value))?,
            },
        }
        if let Some(mark) = &message.producer {
            out.serialize_field("producer", &ProducerOut::from(mark))?;
        }
        out.end()
    }
}

/// A fetch answer on its way into JSON. `place` says where it is from, among several.
#[derive(Debug)]
pub struct FetchOut<'a> {
    pub answer: &'a FetchAnswer,
    pub encoding: Encoding,
    pub place: bool,
}

struct List<'a>(&'a [Message], Encoding);

impl Serialize for List<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|message| MessageOut {
            message,
            encoding: self.1,
        }))
    }
}

impl Serialize for FetchOut<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let answer = self.answer;
        let mut out = serializer.serialize_struct("Fetch", if self.place { 6 } else { 4 })?;
        if self.place {
            out.serialize_field("topic", &answer.topic)?;
            out.serialize_field("queue", &answer.queue)?;
        }
        out.serialize_field("messages", &List(&answer.messages, self.encoding))?;
        out.serialize_field("next_offset", &answer.next_offset)?;
        out.serialize_field("earliest_offset", &answer.earliest_offset)?;
        out.serialize_field("end_offset", &answer.end_offset)?;
        out.end()
    }
}

/// Bytes of the values in an answer.
pub fn value_bytes(messages: &[Message]) -> usize {
    messages
        .iter()
        .map(|message| message.value.as_ref().map_or(0, |value| value.len()))
        .sum()
}

/// A little more than the JSON will take if few bytes need escaping.
pub fn json_bytes(messages: &[Message]) -> usize {
    256 + messages.len() * 192 + value_bytes(messages) * 9 / 8
}

/// The answer to a fetch from one queue; it counts against the budget until it is sent.
pub fn response(
    answer: &FetchAnswer,
    encoding: Encoding,
    budget: &ByteBudget,
) -> Result<Response, ApiError> {
    let capacity = json_bytes(&answer.messages);
    let mut share = BudgetShare::default();
    charge(budget, &mut share, capacity)?;
    let out = FetchOut {
        answer,
        encoding,
        place: false,
    };
    Ok(keep_until_sent(
        json_with_capacity(StatusCode::OK, &out, capacity),
        share,
    ))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;

    fn message(value: Option<&'static [u8]>) -> Message {
        Message {
            queue: 1,
            offset: 42,
            message_id: "m-1".into(),
            timestamp_ms: 7,
            key: Some("k\"".into()),
            tag: None,
            headers: [("a".to_owned(), "1".to_owned())].into(),
            value: value.map(Bytes::from_static),
            producer: None,
        }
    }

    fn rendered(message: &Message, encoding: Encoding) -> Value {
        serde_json::to_value(MessageOut { message, encoding }).unwrap()
    }

    #[test]
    fn text_is_text_and_bytes_are_base64() {
        let text = message(Some(b"a\n\"b\""));
        let expected = json!({"queue": 1, "offset": 42, "message_id": "m-1", "timestamp_ms": 7,
            "key": "k\"", "tag": null, "headers": {"a": "1"}, "value": "a\n\"b\""});
        assert_eq!(rendered(&text, Encoding::Auto), expected);
        let forced = rendered(&text, Encoding::Base64);
        assert_eq!(forced["value_base64"], "YQoiYiI=");
        assert!(forced.get("value").is_none());
        let bytes = rendered(&message(Some(&[0xff, 0])), Encoding::Auto);
        assert_eq!(bytes["value_base64"], "/wA=");
        assert!(bytes.get("value").is_none());
    }

    #[test]
    fn empty_is_not_null() {
        assert_eq!(rendered(&message(Some(b"")), Encoding::Auto)["value"], "");
        let null = rendered(&message(None), Encoding::Base64);
        assert_eq!(null.get("value"), Some(&Value::Null));
    }

    #[test]
    fn a_producers_messages_carry_its_mark() {
        let mut stamped = message(Some(b""));
        stamped.producer = Some(ProducerMark {
            id: "p".into(),
            epoch: 2,
            sequence: 40,
        });
        let expected = json!({"id": "p", "epoch": 2, "sequence": 40});
        assert_eq!(rendered(&stamped, Encoding::Auto)["producer"], expected);
    }

    #[tokio::test]
    async fn the_budget_is_held_until_the_answer_is_gone() {
        let budget = ByteBudget::new(1 << 20);
        let answer = FetchAnswer {
            group: 1024,
            topic: "t".into(),
            queue: 1,
            messages: vec![message(Some(b"x"))],
            next_offset: 43,
            earliest_offset: 0,
            end_offset: 43,
        };
        let response = response(&answer, Encoding::Auto, &budget).unwrap();
        assert!(budget.used() > 0);
        let body = http_body_util::BodyExt::collect(response.into_body())
            .await
            .unwrap();
        let body: Value = serde_json::from_slice(&body.to_bytes()).unwrap();
        assert_eq!(body["next_offset"], 43);
        assert_eq!(body["messages"].as_array().unwrap().len(), 1);
        assert_eq!(budget.used(), 0);
        let full = ByteBudget::new(10);
        assert!(super::response(&answer, Encoding::Auto, &full).is_err());
    }
}
