//! Produce bodies: what they may say, and how they become messages without copying values.
//!
//! A text without escapes stays a slice of the request's body all the way to the broker; the
//! number of messages and headers is bounded while parsing, before they take memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::given;
use crate::broker::{Delay, MAX_TTL_MS, NewMessage, ProducerMark};
use crate::http::error::ApiError;
use crate::http::object::{self, Object};
use crate::names::{RESERVED_HEADER_PREFIX, check_tag};

/// Messages one request may carry. With 16 MiB of body, `{}` alone would make millions.
pub const MAX_MESSAGES: usize = 50_000;
/// Headers one message may have; storage has room for more, the tag among them.
pub const MAX_HEADERS: usize = 128;

/// A string, borrowed from the body where it has no escapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text<'a>(pub Cow<'a, str>);

impl Text<'_> {
    /// As bytes: a slice of `body` where borrowed from it.
    fn into_bytes(self, body: &Bytes) -> Bytes {
        match self.0 {
            Cow::Borrowed(text) => body.slice_ref(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
            fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text)))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// Messages to store.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProduceBody<'a> {
    /// 1 to 50000 messages.
    #[serde(borrow)]
    #[schema(value_type = Vec<MessageBody>)]
    pub messages: Messages<'a>,
    #[serde(default, deserialize_with = "object::optional")]
    pub producer: Option<ProducerBody>,
}

/// The idempotent producer's mark: a retry with the same one is stored once.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProducerBody {
    pub id: String,
    pub epoch: u32,
    /// Of the request's first message; counts messages.
    pub sequence: u64,
}

/// A message: at most one of `value`, `value_base64`, `value_json`; none of them for an empty body.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MessageBody<'a> {
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    pub value: Option<Text<'a>>,
    #[serde(borrow, default)]
    #[schema(value_type = Option<String>)]
    pub value_base64: Option<Text<'a>>,
    /// Any JSON; stored as its text, exactly as sent.
    #[serde(borrow, default, deserialize_with = "given")]
    #[schema(value_type = Option<Object>)]
    pub value_json: Option<&'a RawValue>,
    #[serde(default)]
    pub key: Option<String>,
    #[serde(default)]
    pub tag: Option<String>,
    #[serde(default, deserialize_with = "object::or_default")]
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub headers: Headers,
    /// Beats the key's hash, which beats round robin.
    #[serde(default)]
    pub queue: Option<u32>,
    /// Becomes visible so much later, in ms: at most a year.
    #[serde(default)]
    pub delay_ms: Option<u64>,
    /// Becomes visible then, in ms since 1970, at most a year ahead; at once if that is past.
    #[serde(default)]
    pub deliver_at_ms: Option<u64>,
    /// How long it is delivered once it is visible, in ms.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
    /// Only of a message that is published to an exchange.
    #[serde(default)]
    pub routing_key: Option<String>,
}

/// A list that stops being read at [`MAX_MESSAGES`].
#[derive(Debug)]
pub struct Messages<'a>(pub Vec<MessageBody<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Messages<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<'a>(PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for ListVisitor<'a> {
            type Value = Messages<'a>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of messages")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut messages = Vec::new();
                while let Some(Object(message)) = list.next_element()? {
                    if messages.len() == MAX_MESSAGES {
                        let error = format!("more than {MAX_MESSAGES} messages in one request");
                        return Err(A::Error::custom(error));
                    }
                    messages.push(message);
                }
                Ok(Messages(messages))
            }
        }
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

/// A message's headers, at most [`MAX_HEADERS`], each name once and none of the server's own.
#[derive(Debug, Default)]
pub struct Headers(pub BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;
        impl<'de> Visitor<'de> for MapVisitor {
            type Value = Headers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut headers = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    if headers.len() == MAX_HEADERS {
                        let error = format!("more than {MAX_HEADERS} headers on one message");
                        return Err(A::Error::custom(error));
                    }
                    if name.starts_with(RESERVED_HEADER_PREFIX) {
                        let error = format!(
                            "headers that begin with {RESERVED_HEADER_PREFIX:?} are reserved"
                        );
                        return Err(A::Error::custom(error));
                    }
                    if headers.insert(name, value).is_some() {
                        return Err(A::Error::custom("a header is given twice"));
                    }
                }
                Ok(Headers(headers))
            }
        }
        deserializer.deserialize_map(MapVisitor)
    }
}

impl ProduceBody<'_> {
    /// The same of a request to an exchange: each message with its routing key.
    #[expect(clippy::type_complexity)]
    pub fn into_routed(
        mut self,
        body: &Bytes,
    ) -> Result<(Vec<(NewMessage, String)>, Option<ProducerMark>), ApiError> {
        let mut keys = Vec::with_capacity(self.messages.0.len());
        for (i, message) in self.messages.0.iter_mut().enumerate() {
            if message.queue.is_some() {
                return Err(ApiError::invalid(format!(
                    "messages[{i}]: an exchange chooses the queues itself; leave queue out"
                )));
            }
            keys.push(message.routing_key.take().unwrap_or_default());
        }
        let (messages, producer) = self.into_messages(body)?;
        Ok((messages.into_iter().zip(keys).collect(), producer))
    }

    /// The messages and the producer's mark; `body` is what this was parsed from.
    pub fn into_messages(
        self,
        body: &Bytes,
    ) -> Result<(Vec<NewMessage>, Option<ProducerMark>), ApiError> {
        if self.messages.0.is_empty() {
            return Err(ApiError::invalid("messages is empty; send at least one"));
        }
        let messages = self
            .messages
            .0
            .into_iter()
            .enumerate()
            .map(|(i, message)| {
                message
                    .into_message(body)
                    .map_err(|why| ApiError::invalid(format!("messages[{i}]: {why}")))
            })
            .collect::<Result<_, _>>()?;
        let producer = self.producer.map(|mark| {
            let ProducerBody {
                id,
                epoch,
                sequence,
            } = mark;
            ProducerMark {
                id,
                epoch,
                sequence,
            }
        });
        Ok((messages, producer))
    }
}

impl MessageBody<'_> {
    /// The message, or why it can't be one.
    pub fn into_message(self, body: &Bytes) -> Result<NewMessage, String> {
        if self.routing_key.is_some() {
            return Err("routing_key: a topic has none; publish to an exchange".to_owned());
        }
        let delay = Delay::new(self.delay_ms, self.deliver_at_ms)?;
        check_ttl(self.ttl_ms)?;
        if let Some(tag) = &self.tag {
            check_tag(tag)?;
        }
        let value = match (self.value, self.value_base64, self.value_json) {
            (None, None, None) => Bytes::new(),
            (Some(text), None, None) => text.into_bytes(body),
            (None, Some(text), None) => BASE64
                .decode(text.0.as_bytes())
                .map(Bytes::from)
                .map_err(|error| format!("value_base64 is not standard base64: {error}"))?,
            (None, None, Some(raw)) => body.slice_ref(raw.get().as_bytes()),
            _ => return Err("give one of value, value_base64 and value_json, not several".into()),
        };
        Ok(NewMessage {
            value: Some(value),
            key: self.key,
            tag: self.tag,
            headers: self.headers.0,
            ttl_ms: self.ttl_ms,
            delay,
            queue: self.queue,
        })
    }
}

/// A time to live is at least a millisecond.
pub fn check_ttl(ttl_ms: Option<u64>) -> Result<(), String> {
    match ttl_ms {
        Some(ms) if !(1..=MAX_TTL_MS).contains(&ms) => {
            Err(format!("ttl_ms is {ms}; it must be 1 to {MAX_TTL_MS}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn parse(text: &str) -> Result<(Vec<NewMessage>, Option<ProducerMark>), String> {
        let body = Bytes::copy_from_slice(text.as_bytes());
        let parsed = parse_json::<ProduceBody<'_>>(&body).and_then(|p| p.into_messages(&body));
        parsed.map_err(|error| match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        })
    }

    fn value(text: &str) -> Vec<u8> {
        let (messages, _) = parse(&format!(r#"{{"messages":[{text}]}}"#)).unwrap();
        messages[0].value.clone().unwrap().to_vec()
    }

    #[test]
    fn the_forms_of_a_value() {
        assert_eq!(value(r#"{"value":"text"}"#), b"text");
        assert_eq!(value(r#"{"value":"a\n\u00e4"}"#), "a\nä".as_bytes());
        assert_eq!(value(r#"{"value_base64":"/wA="}"#), [0xff, 0]);
        assert_eq!(value(r#"{}"#), b"");
        assert_eq!(value(r#"{"value":null,"headers":null}"#), b"");
    }

    #[test]
    fn json_values_are_stored_as_they_were_sent() {
        for text in [
            r#"{"b": 1,  "a":[1.0,2e3]}"#,
            "null",
            "12345678901234567890",
            "\"x\"",
            "[]",
        ] {
            assert_eq!(
                value(&format!(r#"{{"value_json": {text} }}"#)),
                text.as_bytes()
            );
        }
    }

    #[test]
    fn a_text_without_escapes_is_not_copied() {
        let body = Bytes::from_static(br#"{"messages":[{"value":"abcdef"}]}"#);
        let (messages, _) = parse_json::<ProduceBody<'_>>(&body)
            .unwrap()
            .into_messages(&body)
            .unwrap();
        let value = messages[0].value.as_ref().unwrap();
        assert!(body.as_ptr_range().contains(&value.as_ptr()));
    }

    #[test]
    fn everything_a_message_may_say() {
        let (messages, producer) = parse(
            r#"{"messages":[{"value":"v","key":"k","tag":"t","headers":{"a":"1"},"queue":2}],
               "producer":{"id":"p","epoch":0,"sequence":40}}"#,
        )
        .unwrap();
        let message = &messages[0];
        assert_eq!(message.key.as_deref(), Some("k"));
        assert_eq!(message.tag.as_deref(), Some("t"));
        assert_eq!(message.headers["a"], "1");
        assert_eq!(message.queue, Some(2));
        assert_eq!(
            producer,
            Some(ProducerMark {
                id: "p".into(),
                epoch: 0,
                sequence: 40
            })
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (message, named) in [
            (r#"{"valeu":"x"}"#, "unknown field `valeu`"),
            (r#"{"valeu":"x"}"#, "`value_base64`"),
            (
                r#"{"value":"x","value_json":1}"#,
                "messages[1]: give one of",
            ),
            (r#"{"value":7}"#, "expected a string"),
            (r#"{"value_base64":"?"}"#, "messages[1]: value_base64"),
            (r#"{"delay_ms":31536000001}"#, "a year"),
            (r#"{"delay_ms":-1}"#, "line 1 column"),
            (r#"{"delay_ms":5,"deliver_at_ms":5}"#, "not both"),
            (r#"{"ttl_ms":0}"#, "ttl_ms is 0; it must be 1"),
            (r#"{"queue":-1}"#, "line 1 column"),
            (r#"{"tag":"a||b"}"#, "||"),
            (r#"{"tag":""}"#, "1 to 255"),
            (r#"{"headers":{"a":1}}"#, "expected a string"),
            (r#"{"headers":{"a":"1","a":"2"}}"#, "twice"),
            (r#"{"headers":{"quorate.tag":"x"}}"#, "reserved"),
            (r#"{"value":"a","value":"b"}"#, "duplicate field"),
        ] {
            let error = parse(&format!(r#"{{"messages":[{{}},{message}]}}"#)).unwrap_err();
            assert!(error.contains(named), "{message}: {error}");
        }
        assert!(
            parse(r#"{"messages":[]}"#)
                .unwrap_err()
                .contains("at least one")
        );
        assert!(
            parse(r#"{"messages":[{}],"producer":{"id":"p"}}"#)
                .unwrap_err()
                .contains("epoch")
        );
        assert!(parse("{").unwrap_err().contains("line 1 column 1"));
        assert!(parse("").unwrap_err().contains("empty"));
        assert!(parse("{\"messages\":[{\"value\":\"\u{0}\"}]}").is_err());
        assert!(parse(&format!("{{\"messages\":{}", "[".repeat(10_000))).is_err());
    }

    #[test]
    fn lists_are_bounded_while_they_are_read() {
        let messages = vec!["{}"; MAX_MESSAGES + 1].join(",");
        assert!(
            parse(&format!(r#"{{"messages":[{messages}]}}"#))
                .unwrap_err()
                .contains("50000")
        );
        let headers: Vec<String> = (0..=MAX_HEADERS)
            .map(|i| format!("\"h{i}\":\"\""))
            .collect();
        let message = format!(
            r#"{{"messages":[{{"headers":{{{}}}}}]}}"#,
            headers.join(",")
        );
        assert!(parse(&message).unwrap_err().contains("128 headers"));
    }
}
