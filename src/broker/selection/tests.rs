//! What passes, what is refused, and agreement with an evaluator that follows the definition.

use bytes::Bytes;
use proptest::prelude::*;
use quorate_storage::batch::{BatchBuilder, BatchView, MessageRecord, RecordInput};

use super::*;

const SEEN: Seen = Seen {
    offset: 7,
    timestamp_ms: 1_700_000_000_000,
};

fn record(key: Option<&str>, tag: Option<&str>, headers: &[(&str, &str)]) -> RecordView {
    let mut batch = BatchBuilder::new();
    let headers = headers.iter();
    let message = MessageRecord {
        key: key.map(str::to_owned),
        value: Some(Bytes::from_static(b"12345")),
        tag: tag.map(str::to_owned),
        ttl_ms: None,
        headers: headers
            .map(|(name, value)| (name.to_string(), Bytes::copy_from_slice(value.as_bytes())))
            .collect(),
    };
    message.encode(&mut batch).unwrap();
    first(batch)
}

fn first(mut batch: BatchBuilder) -> RecordView {
    let view = BatchView::parse(batch.finish()).unwrap();
    view.records().next().unwrap().unwrap()
}

fn truth(filter: &str, record: &RecordView) -> Option<bool> {
    let parsed = parse_filter(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
    parsed.expression.truth(record, SEEN)
}

#[test]
fn the_example() {
    let filter = "headers.region = 'eu' and (headers.amount between 10 and 20 or headers.vip is not null) and not tag in ('a','b')";
    for (tag, headers, expected) in [
        ("c", &[("region", "eu"), ("amount", "10")][..], Some(true)),
        ("c", &[("region", "eu"), ("amount", "9.99")], Some(false)),
        (
            "c",
            &[("region", "eu"), ("amount", "9"), ("vip", "")],
            Some(true),
        ),
        ("c", &[("region", "us"), ("amount", "10")], Some(false)),
        ("a", &[("region", "eu"), ("amount", "10")], Some(false)),
        ("c", &[("region", "eu"), ("amount", "many")], None),
        ("c", &[("region", "us"), ("amount", "many")], Some(false)),
        ("c", &[("amount", "10")], None),
    ] {
        let record = record(None, Some(tag), headers);
        assert_eq!(truth(filter, &record), expected, "{tag} {headers:?}");
    }
}

#[test]
fn what_each_part_means() {
    let headers = [
        ("a", "x"),
        ("n", "10"),
        ("big", "9007199254740993"),
        ("q'q", "it's"),
        ("a", "y"),
    ];
    let record = record(Some("order-17"), None, &headers);
    for (filter, expected) in [
        ("headers.a = 'y'", Some(true)),
        ("HEADERS.a = 'x'", Some(false)),
        ("headers.A = 'y'", None),
        ("headers.n = 10", Some(true)),
        ("headers.n = 10.0", Some(true)),
        ("headers.n = '10.0'", Some(false)),
        ("headers.n > 9 AND headers.n < 1e1", Some(false)),
        ("headers.n > '9'", Some(false)),
        ("headers.a = 10", None),
        ("headers.a <> 10", None),
        ("not headers.a = 10", None),
        ("headers.big > 9007199254740992", Some(true)),
        ("headers['q''q'] = 'it''s'", Some(true)),
        ("headers.none = 'x' or key = 'order-17'", Some(true)),
        ("headers.none = 'x' and key = 'order-17'", None),
        ("headers.none = 'x' and key <> 'order-17'", Some(false)),
        ("headers.none in ('a')", None),
        ("headers.none not in ('a')", None),
        ("headers.none is null", Some(true)),
        ("tag is null and key is not null", Some(true)),
        ("tag is not null", Some(false)),
        ("headers.n in (1, 10)", Some(true)),
        ("headers.n not in (1, 10)", Some(false)),
        ("key in ('z', 'order-17', 'a')", Some(true)),
        ("headers.n not between 11 and 20", Some(true)),
        ("headers.a between 'x' and 'z'", Some(true)),
        ("10 = headers.n", Some(true)),
        ("headers.a = headers.a", Some(true)),
        ("headers.a <> headers.n", Some(true)),
        ("key like 'order-%'", Some(true)),
        ("key not like 'order-1_'", Some(false)),
        ("headers['q''q'] like 'it!''s' escape 'x'", Some(false)),
        (
            "offset = 7 and timestamp_ms >= 1700000000000 and value_bytes < 6",
            Some(true),
        ),
        ("offset = headers.n", Some(false)),
        ("value_bytes is null", Some(false)),
        ("not not key is not null", Some(true)),
        ("key = 'a' and key = 'b' or key = 'order-17'", Some(true)),
        ("key = 'order-17' or key = 'a' and key = 'b'", Some(true)),
        ("(key = 'order-17' or key = 'a') and key = 'b'", Some(false)),
        ("  (\tkey='order-17'\n)  ", Some(true)),
    ] {
        assert_eq!(truth(filter, &record), expected, "{filter}");
    }
}

#[test]
fn what_is_not_text_is_null() {
    let mut batch = BatchBuilder::new();
    batch.push(RecordInput {
        key: None,
        value: None,
        headers: &[("raw", &[0xff, b'1'])],
        timestamp_delta: 0,
    });
    let record = first(batch);
    assert_eq!(truth("headers.raw = 1", &record), None);
    assert_eq!(truth("headers.raw like '%'", &record), None);
    assert_eq!(truth("headers.raw is null", &record), Some(false));
    assert_eq!(truth("value_bytes >= 0", &record), None);
    assert_eq!(truth("value_bytes is null", &record), Some(true));
}

#[test]
fn only_what_is_true_is_taken() {
    let record = record(None, Some("paid"), &[("a", "x")]);
    let takes = |tag: Option<&str>, filter: Option<&str>| {
        Selection::parse(tag, filter).unwrap().takes(&record, SEEN)
    };
    assert!(takes(None, None));
    assert!(takes(Some("created || paid"), Some("headers.a = 'x'")));
    assert!(!takes(Some("created"), Some("headers.a = 'x'")));
    assert!(!takes(Some("paid"), Some("headers.b = 'x'")));
    assert!(!takes(Some("paid"), Some("headers.b <> 'x'")));
}

fn refused(filter: &str) -> String {
    match Selection::parse(None, Some(filter)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{filter:?} was taken"),
    }
}

#[test]
fn errors_say_where_and_what_was_expected() {
    for (filter, said) in [
        (
            "",
            "character 1: expected not, (, a field, 'text', a number, found the end",
        ),
        (
            "key",
            "character 4: expected =, <>, !=, <=, >=, <, >, is, not, in, between, like, found the end",
        ),
        (
            "key =",
            "character 6: expected a field, 'text', a number, found the end",
        ),
        ("key ~ 3", "character 5: expected =,"),
        (
            "key = 'a' und tag = 'b'",
            "character 11: expected and, or, the end, found \"und\"",
        ),
        ("key = 'a' and", "character 14: expected not, (, a field"),
        (
            "(key = 'a'",
            "character 11: expected and, or, ), found the end",
        ),
        (
            "key = 'a')",
            "character 10: expected and, or, the end, found \")\"",
        ),
        ("key = 'a", "character 9: a text ends with a quote"),
        (
            "amount > 3",
            "character 1: \"amount\" is not known; fields are headers.NAME",
        ),
        (
            "headers > 3",
            "character 8: expected .NAME, ['NAME'], found \">\"",
        ),
        ("headers['quorate.tag'] = 'x'", "the field tag"),
        ("key = 12x", "\"12x\" is not a number"),
        ("key = 1e999", "not a number in range"),
        ("'a' = 'a'", "one side must be a field"),
        ("offset = '3'", "write it without quotes"),
        ("offset like '3'", "like looks at"),
        ("key in ('a', 3)", "not both"),
        (
            "key in ()",
            "character 9: expected 'text', a number, found \")\"",
        ),
        ("key in ('a' 'b')", "character 13: expected"),
        ("1 in (1)", "must be a field"),
        (
            "key between 'a' or 'b'",
            "character 17: expected and, found \"or\"",
        ),
        ("key is 3", "character 8: expected null"),
        ("key not = 'a'", "character 9: expected in, between, like"),
        ("key like 'a' escape 'xy'", "one character"),
        ("ключ = 'ä'", "character 1: \"ключ\" is not known"),
        ("key = 'ä' x", "character 11"),
    ] {
        let error = refused(filter);
        assert!(error.contains(said), "{filter}: {error}");
    }
    assert!(refused(&" ".repeat(4097)).contains("4097 bytes"));
    assert!(refused(&"(".repeat(4096)).contains("more than 64 levels"));
    assert!(refused(&"not ".repeat(1000)).contains("more than 64 levels"));
    let deep = format!("{}key = 'a'{}", "(".repeat(64), ")".repeat(64));
    assert!(Selection::parse(None, Some(&deep)).is_ok());
    let long = vec!["key = 'a'"; 300].join(" or ");
    assert!(Selection::parse(None, Some(&long)).is_ok());
}

#[test]
fn a_selection_crosses_the_link() {
    let selection = Selection::parse(Some("a||b"), Some("offset > 3")).unwrap();
    let bytes = postcard::to_stdvec(&selection).unwrap();
    assert_eq!(
        postcard::from_bytes::<Selection>(&bytes).unwrap(),
        selection
    );
    let bad = Written {
        tag: None,
        filter: Some("offset >".to_owned()),
    };
    let bytes = postcard::to_stdvec(&bad).unwrap();
    assert!(postcard::from_bytes::<Selection>(&bytes).is_err());
}

/// A condition as the test makes it, with its truth as the definition says.
#[derive(Debug, Clone)]
enum Model {
    Equal(usize, i64),
    Less(usize, i64),
    In(usize, Vec<i64>),
    Between(usize, i64, i64),
    IsNull(usize),
    Not(Box<Model>),
    And(Box<Model>, Box<Model>),
    Or(Box<Model>, Box<Model>),
}

impl Model {
    fn written(&self) -> String {
        match self {
            Self::Equal(h, n) => format!("headers.h{h} = {n}"),
            Self::Less(h, n) => format!("{n} > headers.h{h}"),
            Self::In(h, list) => {
                let list: Vec<_> = list.iter().map(i64::to_string).collect();
                format!("headers.h{h} IN ({})", list.join(" , "))
            }
            Self::Between(h, a, b) => format!("headers['h{h}'] between {a} and {b}"),
            Self::IsNull(h) => format!("headers.h{h} is null"),
            Self::Not(part) => format!("not ({})", part.written()),
            Self::And(a, b) => format!("({}) and ({})", a.written(), b.written()),
            Self::Or(a, b) => format!("({}) or ({})", a.written(), b.written()),
        }
    }

    /// In the three-valued logic of SQL: min and max of false < unknown < true.
    fn truth(&self, headers: &[Option<i64>]) -> Option<bool> {
        let rank = |truth: Option<bool>| truth.map_or(1, |t| 2 * u8::from(t));
        let unrank = |rank: u8| [Some(false), None, Some(true)][usize::from(rank)];
        match self {
            Self::Equal(h, n) => headers[*h].map(|v| v == *n),
            Self::Less(h, n) => headers[*h].map(|v| v < *n),
            Self::In(h, list) => headers[*h].map(|v| list.contains(&v)),
            Self::Between(h, a, b) => headers[*h].map(|v| (*a..=*b).contains(&v)),
            Self::IsNull(h) => Some(headers[*h].is_none()),
            Self::Not(part) => part.truth(headers).map(|t| !t),
            Self::And(a, b) => unrank(rank(a.truth(headers)).min(rank(b.truth(headers)))),
            Self::Or(a, b) => unrank(rank(a.truth(headers)).max(rank(b.truth(headers)))),
        }
    }
}

fn model() -> impl Strategy<Value = Model> {
    let (header, number) = (0..3usize, -3..4i64);
    let leaf = prop_oneof![
        (header.clone(), number.clone()).prop_map(|(h, n)| Model::Equal(h, n)),
        (header.clone(), number.clone()).prop_map(|(h, n)| Model::Less(h, n)),
        (header.clone(), prop::collection::vec(number.clone(), 1..4))
            .prop_map(|(h, list)| Model::In(h, list)),
        (header.clone(), number.clone(), number).prop_map(|(h, a, b)| Model::Between(h, a, b)),
        header.prop_map(Model::IsNull),
    ];
    leaf.prop_recursive(5, 24, 2, |inner| {
        let two = (inner.clone(), inner.clone());
        prop_oneof![
            inner.prop_map(|part| Model::Not(Box::new(part))),
            two.clone()
                .prop_map(|(a, b)| Model::And(Box::new(a), Box::new(b))),
            two.prop_map(|(a, b)| Model::Or(Box::new(a), Box::new(b))),
        ]
    })
}

proptest! {
    #[test]
    fn agrees_with_the_definition(
        model in model(),
        headers in prop::collection::vec(prop::option::of(-3..4i64), 3),
    ) {
        let texts: Vec<(String, String)> = headers
            .iter()
            .enumerate()
            .filter_map(|(h, n)| Some((format!("h{h}"), n.as_ref()?.to_string())))
            .collect();
        let texts: Vec<(&str, &str)> = texts.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let written = model.written();
        prop_assert_eq!(truth(&written, &record(None, None, &texts)), model.truth(&headers), "{}", written);
    }

    #[test]
    fn hostile_text_is_refused_or_evaluated(text in "[a-z0-9 ()'%_=<>.,\\[\\]-]{0,80}") {
        if let Ok(selection) = Selection::parse(None, Some(&text)) {
            selection.takes(&record(Some("k"), Some("t"), &[("a", "1")]), SEEN);
        }
    }
}
