//! Filters that a client made up: refused with a place inside the text, or evaluated without harm.

use std::fs;

use bytes::Bytes;
use quorate::broker::Selection;
use quorate::broker::selection::{Seen, SelectionError};
use quorate_storage::batch::{BatchBuilder, BatchView, MessageRecord, RecordView};

use crate::mutate::{directory, fuzz};

fn record() -> RecordView {
    let header =
        |name: &str, value: &'static str| (name.to_owned(), Bytes::from_static(value.as_bytes()));
    let message = MessageRecord {
        key: Some("order-17".to_owned()),
        value: Some(Bytes::from_static(b"value")),
        tag: Some("paid".to_owned()),
        ttl_ms: None,
        headers: vec![header("region", "eu"), header("amount", "17.5")],
    };
    let mut batch = BatchBuilder::new();
    message.encode(&mut batch).expect("a message");
    let view = BatchView::parse(batch.finish()).expect("a batch");
    let first = view.records().next();
    first.expect("a record").expect("that can be read")
}

#[test]
fn filters_that_lie() {
    let record = record();
    let seen = Seen {
        offset: 3,
        timestamp_ms: 4,
    };
    fuzz("filter", 3000, |input| {
        let Ok(text) = std::str::from_utf8(&input.bytes) else {
            return;
        };
        match Selection::parse(None, Some(text)) {
            Ok(selection) => {
                let again = Selection::parse(None, selection.filter()).expect("the same text");
                assert_eq!(selection.takes(&record, seen), again.takes(&record, seen));
            }
            Err(SelectionError::Filter { character, .. }) => {
                assert!(
                    (1..=text.chars().count() + 1).contains(&character),
                    "{text:?}"
                );
            }
            Err(error) => assert!(
                matches!(error, SelectionError::FilterTooLong { .. }),
                "{error}"
            ),
        }
    });
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    let dir = directory("filter");
    fs::create_dir_all(&dir).expect("directory");
    for (name, text) in [
        (
            "all",
            "headers.region = 'eu' and (headers.amount between 10 and 2e1 or headers['vip'] is not null) and not tag in ('a','it''s')",
        ),
        (
            "numbers",
            "offset >= 3 and timestamp_ms < 1700000000000 and value_bytes <> -1 or 5 > headers.amount",
        ),
        (
            "patterns",
            "key like 'order-%' and key not like '%!_%_' escape '!'",
        ),
        (
            "lists",
            "headers.amount not in (1, 2.5, 17.5) or key in ('order-17')",
        ),
        ("nested", "not (not ((key is null)))"),
    ] {
        fs::write(dir.join(name), text).expect("write");
    }
}
