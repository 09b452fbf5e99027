//! Bodies of the exchange endpoints.

use std::collections::{BTreeMap, BTreeSet};

use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::{BindingDescription, ExchangeDescription, PublishAnswer};
use crate::exchange::{Binding, ExchangeKind};
use crate::http::multi::{Nothing, respond};

/// How an exchange chooses among the topics bound to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeKindBody {
    Fanout,
    Direct,
    Topic,
    Headers,
}

impl From<ExchangeKindBody> for ExchangeKind {
    fn from(kind: ExchangeKindBody) -> Self {
        match kind {
            ExchangeKindBody::Fanout => Self::Fanout,
            ExchangeKindBody::Direct => Self::Direct,
            ExchangeKindBody::Topic => Self::Topic,
            ExchangeKindBody::Headers => Self::Headers,
        }
    }
}

/// An exchange to create.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutExchange {
    pub kind: ExchangeKindBody,
}

/// How many of a binding's headers a message must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MatchBody {
    All,
    Any,
}

/// What a topic is bound under: nothing for a fanout exchange, routing keys for a direct one,
/// patterns for a topic one, headers for a headers one.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PutBinding {
    /// In patterns `*` is one word and `#` any number of them; words are separated by dots.
    #[serde(default)]
    routing_key: Option<String>,
    /// Several: any of them is enough.
    #[serde(default)]
    routing_keys: Option<Vec<String>>,
    /// With null as its value a header has only to be there.
    #[serde(default)]
    headers: Option<BTreeMap<String, Option<String>>>,
    /// `all` if absent.
    #[serde(default, rename = "match")]
    matching: Option<MatchBody>,
}

impl PutBinding {
    pub fn binding(self, kind: ExchangeKind) -> Result<Binding, String> {
        let binding = match (self.routing_key, self.routing_keys, self.headers) {
            (None, None, None) => Binding::Always,
            // The empty key says nothing where keys don't count.
            (Some(key), None, None) if key.is_empty() && kind == ExchangeKind::Fanout => {
                Binding::Always
            }
            (Some(key), None, None) => Binding::Keys([key].into()),
            (None, Some(keys), None) => Binding::Keys(BTreeSet::from_iter(keys)),
            (None, None, Some(headers)) => Binding::Headers {
                headers,
                any: self.matching == Some(MatchBody::Any),
            },
            _ => return Err("give one of routing_key, routing_keys and headers".to_owned()),
        };
        if self.matching.is_some() && !matches!(binding, Binding::Headers { .. }) {
            return Err("match belongs to headers".to_owned());
        }
        binding.check(kind)?;
        Ok(binding)
    }
}

/// One binding.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct BindingAnswer<'a> {
    topic: &'a str,
    /// Where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    routing_key: Option<&'a str>,
    /// Where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    routing_keys: Option<Vec<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<&'a BTreeMap<String, Option<String>>>,
    /// `all` or `any`.
    #[serde(skip_serializing_if = "Option::is_none", rename = "match")]
    matching: Option<&'static str>,
}

impl<'a> From<&'a BindingDescription> for BindingAnswer<'a> {
    fn from(bound: &'a BindingDescription) -> Self {
        let topic = bound.topic.as_str();
        let answer = Self {
            topic,
            ..Self::default()
        };
        match &bound.binding {
            Binding::Always => answer,
            Binding::Keys(keys) if keys.len() == 1 => Self {
                routing_key: keys.first().map(String::as_str),
                ..answer
            },
            Binding::Keys(keys) => Self {
                routing_keys: Some(keys.iter().map(String::as_str).collect()),
                ..answer
            },
            Binding::Headers { headers, any } => Self {
                headers: Some(headers),
                matching: Some(if *any { "any" } else { "all" }),
                ..answer
            },
        }
    }
}

/// One exchange.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExchangeAnswer<'a> {
    name: &'a str,
    /// `fanout`, `direct`, `topic` or `headers`.
    kind: &'static str,
    bindings: Vec<BindingAnswer<'a>>,
}

impl<'a> From<&'a ExchangeDescription> for ExchangeAnswer<'a> {
    fn from(exchange: &'a ExchangeDescription) -> Self {
        Self {
            name: &exchange.name,
            kind: exchange.kind.as_str(),
            bindings: exchange.bindings.iter().map(BindingAnswer::from).collect(),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ExchangesAnswer<'a> {
    pub exchanges: Vec<ExchangeAnswer<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct BindingsAnswer<'a> {
    pub bindings: Vec<BindingAnswer<'a>>,
}

/// One published message.
#[derive(Debug, Serialize, ToSchema)]
pub struct PublishedBody<'a> {
    /// Opaque and unique for ever. What the topics get has it in the header
    /// `quorate.exchange.message_id`.
    message_id: &'a str,
    /// The topics that it is brought to.
    routed: &'a [String],
}

/// The answer to a publish request; failed entries are `{"error": {problem}}`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = PublishAnswer)]
pub struct PublishAnswerBody<'a> {
    results: Vec<PublishedBody<'a>>,
    /// `majority_fsync`.
    durability: &'static str,
}

#[derive(Debug, Serialize)]
struct Extra {
    durability: &'static str,
}

pub fn publish_response(answer: &PublishAnswer) -> Response {
    let parts = answer.results.iter().map(|result| match result {
        Ok(published) => Ok(PublishedBody {
            message_id: &published.message_id,
            routed: &published.routed,
        }),
        Err(error) => Err((Nothing {}, error.clone())),
    });
    let durability = answer.durability.as_str();
    respond(parts, Extra { durability }, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn parse(kind: ExchangeKind, text: &str) -> Result<Binding, String> {
        let body: PutBinding = parse_json(text.as_bytes()).map_err(|e| format!("{e:?}"))?;
        body.binding(kind)
    }

    #[test]
    fn the_forms_of_a_binding() {
        use ExchangeKind::{Direct, Fanout, Headers, Topic};
        assert_eq!(parse(Fanout, "{}"), Ok(Binding::Always));
        assert_eq!(parse(Fanout, r#"{"routing_key":""}"#), Ok(Binding::Always));
        let keys = |keys: &[&str]| Binding::Keys(keys.iter().map(|k| (*k).to_owned()).collect());
        assert_eq!(parse(Direct, r#"{"routing_key":""}"#), Ok(keys(&[""])));
        assert_eq!(
            parse(Topic, r#"{"routing_keys":["a.#","b.*"]}"#),
            Ok(keys(&["a.#", "b.*"]))
        );
        let found = parse(Headers, r#"{"headers":{"a":"1","b":null},"match":"any"}"#);
        let wanted = [
            ("a".to_owned(), Some("1".to_owned())),
            ("b".to_owned(), None),
        ];
        assert_eq!(
            found,
            Ok(Binding::Headers {
                headers: wanted.into(),
                any: true
            })
        );
        for (kind, text, named) in [
            (Fanout, r#"{"routing_key":"a"}"#, "no routing_key"),
            (Direct, "{}", "routing_key"),
            (
                Topic,
                r#"{"routing_key":"a","routing_keys":["b"]}"#,
                "one of",
            ),
            (
                Topic,
                r#"{"routing_key":"a","match":"any"}"#,
                "match belongs",
            ),
            (Headers, r#"{"headers":{"a":1}}"#, "string"),
            (Headers, r#"{"headers":{},"match":"most"}"#, "most"),
            (Direct, r#"{"key":"a"}"#, "unknown field"),
        ] {
            let error = parse(kind, text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
