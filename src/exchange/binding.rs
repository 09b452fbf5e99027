//! What a topic is bound under.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::ExchangeKind;
use super::pattern;

/// Routing keys under which one topic may be bound to one exchange.
pub const MAX_KEYS: usize = 256;
/// As AMQP's short strings.
pub const MAX_ROUTING_KEY_BYTES: usize = 255;
const MAX_HEADERS: usize = 128;
const MAX_HEADER_BYTES: usize = 16 << 10;

/// The condition under which a topic gets a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Binding {
    /// Of a fanout exchange: none.
    Always,
    /// Of a direct or topic exchange: any of these keys, or patterns.
    Keys(BTreeSet<String>),
    /// Of a headers exchange: these with these values; without a value, being there is enough.
    Headers {
        headers: BTreeMap<String, Option<String>>,
        /// One of them is enough.
        any: bool,
    },
}

impl Binding {
    pub fn takes(
        &self,
        kind: ExchangeKind,
        routing_key: &str,
        message: &BTreeMap<String, String>,
    ) -> bool {
        match self {
            Self::Always => true,
            Self::Keys(keys) if kind == ExchangeKind::Topic => keys
                .iter()
                .any(|pattern| pattern::matches(pattern, routing_key)),
            Self::Keys(keys) => keys.contains(routing_key),
            Self::Headers { headers, any } => {
                let mut each = headers.iter().map(|(name, wanted)| {
                    let found = message.get(name);
                    found.is_some_and(|found| wanted.as_ref().is_none_or(|w| w == found))
                });
                match any {
                    true => each.any(|fits| fits),
                    false => each.all(|fits| fits),
                }
            }
        }
    }

    /// Says why this is no binding for an exchange of `kind`.
    pub fn check(&self, kind: ExchangeKind) -> Result<(), String> {
        match (self, kind) {
            (Self::Always, ExchangeKind::Fanout) => Ok(()),
            (Self::Keys(keys), ExchangeKind::Direct | ExchangeKind::Topic) => {
                if !(1..=MAX_KEYS).contains(&keys.len()) {
                    return Err(format!("a binding has 1 to {MAX_KEYS} routing keys"));
                }
                keys.iter().try_for_each(|key| check_routing_key(key))
            }
            (Self::Headers { headers, .. }, ExchangeKind::Headers) => {
                let value = |v: &Option<String>| v.as_ref().map_or(0, String::len);
                let bytes: usize = headers.iter().map(|(n, v)| n.len() + value(v)).sum();
                match headers.len() <= MAX_HEADERS && bytes <= MAX_HEADER_BYTES {
                    true => Ok(()),
                    false => Err(format!(
                        "a binding has at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together"
                    )),
                }
            }
            (_, kind) => Err(format!(
                "a binding of a {kind} exchange has {}",
                match kind {
                    ExchangeKind::Fanout => "no routing_key and no headers",
                    ExchangeKind::Direct => "a routing_key (or routing_keys)",
                    ExchangeKind::Topic =>
                        "a pattern as its routing_key (or several as routing_keys)",
                    ExchangeKind::Headers =>
                        "headers and, if one of them is enough, \"match\":\"any\"",
                }
            )),
        }
    }
}

/// Of bindings and of messages.
pub fn check_routing_key(key: &str) -> Result<(), String> {
    match key.len() <= MAX_ROUTING_KEY_BYTES {
        true => Ok(()),
        false => Err(format!(
            "a routing key has at most {MAX_ROUTING_KEY_BYTES} bytes"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(headers: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        headers.iter().map(own).collect()
    }

    fn headers(wanted: &[(&str, Option<&str>)], any: bool) -> Binding {
        let own = |(n, v): &(&str, Option<&str>)| ((*n).to_owned(), v.map(str::to_owned));
        let headers = wanted.iter().map(own).collect();
        Binding::Headers { headers, any }
    }

    #[test]
    fn headers_all_or_any() {
        let takes = |binding: &Binding, found: &[(&str, &str)]| {
            binding.takes(ExchangeKind::Headers, "", &message(found))
        };
        let wanted = [("format", Some("pdf")), ("type", Some("report"))];
        let (all, any) = (headers(&wanted, false), headers(&wanted, true));
        let both = [("format", "pdf"), ("type", "report"), ("x", "y")];
        assert!(takes(&all, &both) && takes(&any, &both));
        let one = [("format", "pdf"), ("type", "log")];
        assert!(!takes(&all, &one) && takes(&any, &one));
        let none = [("format", "zip")];
        assert!(!takes(&all, &none) && !takes(&any, &none));
        assert!(!takes(&all, &[]) && !takes(&any, &[]));
    }

    #[test]
    fn a_header_without_a_value_has_only_to_be_there() {
        let there = headers(&[("vip", None)], false);
        assert!(there.takes(ExchangeKind::Headers, "", &message(&[("vip", "whatever")])));
        assert!(!there.takes(ExchangeKind::Headers, "", &message(&[("x", "vip")])));
    }

    #[test]
    fn no_headers_are_all_there_but_none_of_them_is() {
        let found = message(&[("a", "b")]);
        assert!(headers(&[], false).takes(ExchangeKind::Headers, "", &found));
        assert!(!headers(&[], true).takes(ExchangeKind::Headers, "", &found));
    }

    #[test]
    fn direct_keys_are_no_patterns() {
        let keys = Binding::Keys(["a.*".to_owned(), "b".to_owned()].into());
        let takes = |kind, key| keys.takes(kind, key, &BTreeMap::new());
        assert!(takes(ExchangeKind::Topic, "a.x") && takes(ExchangeKind::Topic, "b"));
        assert!(!takes(ExchangeKind::Direct, "a.x"));
        assert!(takes(ExchangeKind::Direct, "a.*") && takes(ExchangeKind::Direct, "b"));
    }

    #[test]
    fn every_kind_says_what_its_bindings_have() {
        use ExchangeKind::{Direct, Fanout, Headers, Topic};
        let keys = Binding::Keys(["a".to_owned()].into());
        let some = headers(&[("a", None)], true);
        for (binding, kinds) in [
            (&Binding::Always, &[Fanout][..]),
            (&keys, &[Direct, Topic]),
            (&some, &[Headers]),
        ] {
            for kind in [Fanout, Direct, Topic, Headers] {
                let checked = binding.check(kind);
                assert_eq!(checked.is_ok(), kinds.contains(&kind), "{binding:?} {kind}");
                assert!(checked.err().is_none_or(|e| e.contains(kind.as_str())));
            }
        }
        let long = Binding::Keys(["x".repeat(256)].into());
        assert!(long.check(Direct).is_err());
        assert!(Binding::Keys(BTreeSet::new()).check(Direct).is_err());
    }
}
