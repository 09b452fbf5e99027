//! Bodies of transactions: what they may say, and how they are shown.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;
use serde::de::value::{CowStrDeserializer, MapAccessDeserializer};
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::broker::{
    BeginTransaction, MemberMark, TransactionMessage, TransactionOffset, TransactionResult,
    transaction_results, transaction_text,
};
use crate::coordinator::transactions::{
    MAX_MESSAGES, MAX_OFFSET_GROUPS, Timing, Transaction, TransactionState,
};
use crate::http::error::ApiError;
use crate::http::object;
use crate::http::path::checked_name;
use crate::http::query::bounded;
use crate::http::v1::produce::wire::{MessageBody, Text};

const DAY_MS: u64 = 24 * 3_600_000;
/// Offsets of all consumer groups together.
const MAX_OFFSETS: usize = 10_000;
/// Of a transaction that names none.
const DEFAULT_PRODUCER_GROUP: &str = "default";

/// A transaction to begin.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BeginBody<'a> {
    /// Whose transactions are checked, listed and bounded together; `default` when absent.
    #[serde(default)]
    producer_group: Option<String>,
    /// When it is first checked: 1 ms to 24 h, 6000 when absent.
    #[serde(default)]
    timeout_ms: Option<u64>,
    /// Between two checks: 100 ms to 24 h, 30000 when absent.
    #[serde(default)]
    check_interval_ms: Option<u64>,
    /// After so many it is rolled back: 0 to 1000, 15 when absent.
    #[serde(default)]
    max_checks: Option<u32>,
    /// Asked at each check, if the server's configuration allows it.
    #[serde(default)]
    check_url: Option<String>,
    /// At most 1000 in one transaction.
    #[serde(borrow, default, deserialize_with = "object::or_default")]
    #[schema(value_type = Option<Vec<TransactionMessageBody>>)]
    messages: Messages<'a>,
    #[serde(default, deserialize_with = "object::optional_list")]
    #[schema(value_type = Option<Vec<OffsetBody>>)]
    offsets: Vec<OffsetBody>,
}

/// More messages of an open transaction.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TransactionExtend)]
pub struct ExtendBody<'a> {
    #[serde(borrow)]
    #[schema(value_type = Vec<TransactionMessageBody>)]
    messages: Messages<'a>,
}

/// Nothing is said where a transaction is ended.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EndBody {}

/// A consumer group's next offset in one queue, committed with the messages or not at all.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TransactionOffset)]
pub struct OffsetBody {
    group: String,
    topic: String,
    queue: u32,
    offset: u64,
    /// Where the work began: refused if the group has committed another offset. One that has
    /// committed none there yet may begin anywhere.
    from: Option<u64>,
    /// Needed while the group has live members.
    #[serde(default, deserialize_with = "object::optional")]
    member: Option<MemberBody>,
}

#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TransactionMember)]
pub struct MemberBody {
    id: String,
    epoch: u64,
}

/// A message as in produce, with its topic.
#[derive(Debug)]
pub struct TransactionMessageBody<'a> {
    topic: String,
    message: MessageBody<'a>,
}

/// The fields of a message and the topic among them.
impl PartialSchema for TransactionMessageBody<'_> {
    fn schema() -> RefOr<Schema> {
        let mut schema = MessageBody::schema();
        if let RefOr::T(Schema::Object(message)) = &mut schema {
            let topic = String::schema();
            message.properties.insert("topic".to_owned(), topic);
            message.required.push("topic".to_owned());
            message.description = Some("A message as in produce, with its topic.".to_owned());
        }
        schema
    }
}

impl ToSchema for TransactionMessageBody<'_> {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("TransactionMessageBody")
    }
}

/// Shows a message's fields but for the topic, which it keeps.
struct WithoutTopic<'t, A> {
    map: A,
    topic: &'t mut Option<String>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for WithoutTopic<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        loop {
            let Some(Text(key)) = self.map.next_key::<Text<'de>>()? else {
                return Ok(None);
            };
            if key != "topic" {
                let key: CowStrDeserializer<'_, A::Error> = CowStrDeserializer::new(key);
                return seed.deserialize(key).map(Some);
            }
            if self.topic.replace(self.map.next_value()?).is_some() {
                return Err(A::Error::duplicate_field("topic"));
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for TransactionMessageBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MessageVisitor<'a>(PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for MessageVisitor<'a> {
            type Value = TransactionMessageBody<'a>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message with its topic")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let mut topic = None;
                let map = WithoutTopic {
                    map,
                    topic: &mut topic,
                };
                let message = MessageBody::deserialize(MapAccessDeserializer::new(map))?;
                let topic = topic.ok_or_else(|| A::Error::missing_field("topic"))?;
                Ok(TransactionMessageBody { topic, message })
            }
        }
        deserializer.deserialize_map(MessageVisitor(PhantomData))
    }
}

/// A list that stops being read at [`MAX_MESSAGES`].
#[derive(Debug, Default)]
struct Messages<'a>(Vec<TransactionMessageBody<'a>>);

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
                while let Some(message) = list.next_element()? {
                    if messages.len() == MAX_MESSAGES as usize {
                        let error = format!("more than {MAX_MESSAGES} messages in a transaction");
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

impl Messages<'_> {
    fn into_messages(self, body: &Bytes) -> Result<Vec<TransactionMessage>, ApiError> {
        let each = self.0.into_iter().enumerate();
        each.map(|(i, TransactionMessageBody { topic, message })| {
            checked_name("topic name", &topic)?;
            if message.delay_ms.is_some() || message.deliver_at_ms.is_some() {
                return Err(ApiError::invalid(format!(
                    "messages[{i}]: a message of a transaction becomes visible by its commit, it can't be delayed beyond that; leave delay_ms and deliver_at_ms out"
                )));
            }
            let message = message
                .into_message(body)
                .map_err(|why| ApiError::invalid(format!("messages[{i}]: {why}")))?;
            Ok(TransactionMessage { topic, message })
        })
        .collect()
    }
}

impl BeginBody<'_> {
    /// What is asked for; `body` is what this was parsed from.
    pub fn request(self, body: &Bytes) -> Result<BeginTransaction, ApiError> {
        let producer_group = self.producer_group;
        let producer_group = producer_group.unwrap_or_else(|| DEFAULT_PRODUCER_GROUP.to_owned());
        checked_name("producer group", &producer_group)?;
        let timing = Timing {
            timeout_ms: bounded("timeout_ms", self.timeout_ms, 1..=DAY_MS, 6_000)?,
            check_interval_ms: bounded(
                "check_interval_ms",
                self.check_interval_ms,
                100..=DAY_MS,
                30_000,
            )?,
            max_checks: bounded("max_checks", self.max_checks, 0..=1_000, 15)?,
        };
        Ok(BeginTransaction {
            producer_group,
            timing,
            check_url: self.check_url,
            messages: self.messages.into_messages(body)?,
            offsets: offsets(self.offsets)?,
        })
    }
}

fn offsets(bodies: Vec<OffsetBody>) -> Result<Vec<TransactionOffset>, ApiError> {
    if bodies.len() > MAX_OFFSETS {
        let count = bodies.len();
        return Err(ApiError::invalid(format!(
            "offsets has {count} entries; it must have at most {MAX_OFFSETS}"
        )));
    }
    let mut groups: Vec<&str> = bodies.iter().map(|o| o.group.as_str()).collect();
    groups.sort_unstable();
    groups.dedup();
    if groups.len() > MAX_OFFSET_GROUPS {
        return Err(ApiError::invalid(format!(
            "offsets names {} consumer groups; a transaction moves at most {MAX_OFFSET_GROUPS}",
            groups.len()
        )));
    }
    let each = bodies.into_iter().map(|body| {
        checked_name("consumer group", &body.group)?;
        checked_name("topic name", &body.topic)?;
        Ok(TransactionOffset {
            group: body.group,
            topic: body.topic,
            queue: body.queue,
            offset: body.offset,
            from: body.from,
            member: body
                .member
                .map(|MemberBody { id, epoch }| MemberMark { id, epoch }),
        })
    });
    each.collect()
}

impl ExtendBody<'_> {
    pub fn messages(self, body: &Bytes) -> Result<Vec<TransactionMessage>, ApiError> {
        if self.messages.0.is_empty() {
            return Err(ApiError::invalid("messages is empty; send at least one"));
        }
        self.messages.into_messages(body)
    }
}

/// A transaction as it is now.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Transaction)]
pub struct TransactionBody {
    transaction_id: String,
    /// `preparing`, `open`, `needs_check`, `committing`, `committed`, `rolling_back`,
    /// `rolled_back` or `expired`.
    state: &'static str,
    producer_group: String,
    created_ms: u64,
    timeout_ms: u64,
    check_interval_ms: u64,
    max_checks: u32,
    /// How often it was due for a check so far.
    checks: u32,
    /// When it is checked next, or rolled back; null once it is decided.
    next_check_ms: Option<u64>,
    /// How many messages it has.
    messages: u32,
    /// When the last queue and consumer group had applied the end.
    ended_ms: Option<u64>,
    /// Of a committed one: its messages in the order in which they were given.
    #[serde(skip_serializing_if = "Option::is_none")]
    results: Option<Vec<ResultBody>>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = TransactionResult)]
struct ResultBody {
    topic: String,
    queue: u32,
    /// Null where the topic was deleted before the commit came to it.
    offset: Option<u64>,
    message_id: Option<String>,
}

impl From<TransactionResult> for ResultBody {
    fn from(result: TransactionResult) -> Self {
        let (offset, message_id) = result.stored.unzip();
        Self {
            topic: result.topic,
            queue: result.queue,
            offset,
            message_id,
        }
    }
}

impl From<&Transaction> for TransactionBody {
    fn from(transaction: &Transaction) -> Self {
        let state = transaction.state();
        let results = || {
            let results = transaction_results(transaction).into_iter();
            results.map(ResultBody::from).collect()
        };
        Self {
            transaction_id: transaction_text(&transaction.id),
            state: state.as_str(),
            producer_group: transaction.producer_group.clone(),
            created_ms: transaction.created_ms,
            timeout_ms: transaction.timing.timeout_ms,
            check_interval_ms: transaction.timing.check_interval_ms,
            max_checks: transaction.timing.max_checks,
            checks: transaction.checks,
            next_check_ms: transaction
                .decision
                .is_none()
                .then_some(transaction.next_check_ms),
            messages: transaction.messages(),
            ended_ms: transaction.done_ms,
            results: (state == TransactionState::Committed).then(results),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Transactions)]
pub struct TransactionsBody {
    pub transactions: Vec<TransactionBody>,
}

/// A state by its name.
pub fn parse_state(name: &str) -> Result<TransactionState, ApiError> {
    let known = TransactionState::ALL
        .into_iter()
        .find(|s| s.as_str() == name);
    known.ok_or_else(|| {
        let names: Vec<Cow<'_, str>> = TransactionState::ALL
            .iter()
            .map(|s| Cow::Borrowed(s.as_str()))
            .collect();
        ApiError::invalid(format!("state must be one of {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn parse(text: &str) -> Result<BeginTransaction, String> {
        let body = Bytes::copy_from_slice(text.as_bytes());
        let parsed = parse_json::<BeginBody<'_>>(&body).and_then(|p| p.request(&body));
        parsed.map_err(|error| match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn everything_a_transaction_may_say() {
        let begun = parse(
            r#"{"producer_group":"p","timeout_ms":1,"check_interval_ms":100,"max_checks":2,
                "messages":[{"value_json":{"a": 1},"topic":"t","key":"k"},{"topic":"u"}],
                "offsets":[{"group":"g","topic":"t","queue":0,"offset":7,"member":{"id":"m","epoch":2}}]}"#,
        );
        let begun = begun.unwrap();
        assert_eq!(begun.producer_group, "p");
        assert_eq!(begun.timing.max_checks, 2);
        assert_eq!(begun.messages[0].topic, "t");
        assert_eq!(
            begun.messages[0].message.value.as_deref(),
            Some(&br#"{"a": 1}"#[..])
        );
        assert_eq!(begun.messages[1].topic, "u");
        assert_eq!(begun.offsets[0].offset, 7);
        assert_eq!(begun.offsets[0].member.as_ref().unwrap().epoch, 2);
        let least = parse("{}").unwrap();
        assert_eq!(least.producer_group, "default");
        assert_eq!(
            (least.timing.timeout_ms, least.timing.max_checks),
            (6_000, 15)
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (text, named) in [
            (r#"{"messages":[{"value":"x"}]}"#, "missing field `topic`"),
            (
                r#"{"messages":[{"topic":"a","topic":"b"}]}"#,
                "duplicate field `topic`",
            ),
            (r#"{"messages":[{"topic":"_a"}]}"#, "topic name"),
            (
                r#"{"messages":[{"topic":"a","vlaue":"b"}]}"#,
                "unknown field `vlaue`",
            ),
            (r#"{"messages":[["a","b"]]}"#, "a message with its topic"),
            (
                r#"{"messages":[{"topic":"a","delay_ms":5}]}"#,
                "can't be delayed",
            ),
            (
                r#"{"messages":[{"topic":"a","deliver_at_ms":5}]}"#,
                "can't be delayed",
            ),
            (r#"{"timeout_ms":0}"#, "timeout_ms is 0"),
            (r#"{"check_interval_ms":99}"#, "100 to"),
            (r#"{"max_checks":1001}"#, "0 to 1000"),
            (r#"{"producer_group":"_p"}"#, "producer group"),
            (
                r#"{"offsets":[{"group":"g","topic":"t","queue":0}]}"#,
                "missing field `offset`",
            ),
            (r#"{"message":[]}"#, "unknown field `message`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        let messages = vec![r#"{"topic":"t"}"#; 1_001].join(",");
        let error = parse(&format!(r#"{{"messages":[{messages}]}}"#)).unwrap_err();
        assert!(error.contains("1000"), "{error}");
    }
}
