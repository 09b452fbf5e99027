//! Exchanges: to which topics a message goes that was published to none of them by name.
//!
//! A pure function of the exchange, the routing key and the message's headers. Where the result is
//! kept and carried out is `broker::exchanges`' business.

mod binding;
mod pattern;

pub use binding::{Binding, MAX_KEYS, MAX_ROUTING_KEY_BYTES, check_routing_key};
pub use pattern::matches as matches_pattern;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::catalog::TopicId;

/// How an exchange chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeKind {
    /// Every bound topic.
    Fanout,
    /// The topics bound under exactly this routing key.
    Direct,
    /// The topics bound under a pattern that the routing key matches.
    Topic,
    /// The topics bound under headers that the message has.
    Headers,
}

impl ExchangeKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fanout => "fanout",
            Self::Direct => "direct",
            Self::Topic => "topic",
            Self::Headers => "headers",
        }
    }
}

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One exchange, as the catalog holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    pub name: String,
    pub kind: ExchangeKind,
    /// The internal topic that keeps what was published until every bound topic has it.
    pub store: TopicId,
    /// One for each bound topic.
    pub bindings: BTreeMap<TopicId, Binding>,
    /// Whether a binding was ever taken away or replaced: else routes only ever grew.
    pub narrowed: bool,
}

impl Exchange {
    /// The topics that a message goes to.
    pub fn routes(&self, routing_key: &str, headers: &BTreeMap<String, String>) -> Vec<TopicId> {
        let takes = |binding: &Binding| binding.takes(self.kind, routing_key, headers);
        let bound = self.bindings.iter();
        bound.filter(|(_, b)| takes(b)).map(|(id, _)| *id).collect()
    }
}

/// The internal topic's name. No user's topic begins so.
pub fn store_of(exchange: &str) -> String {
    format!("_exchange.{exchange}")
}
