//! Tests of the batch format; [`oracle`] compares with the crate kafka-protocol.

mod hostile;
mod oracle;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;

/// A record that owns its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owned {
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub timestamp_delta: i64,
}

pub(super) fn owned() -> impl Strategy<Value = Owned> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
    (
        proptest::option::of(bytes()),
        proptest::option::of(bytes()),
        proptest::collection::vec(("[a-zé]{0,9}", bytes()), 0..4),
        -1_000_000i64..1_000_000,
    )
        .prop_map(|(key, value, headers, timestamp_delta)| Owned {
            key,
            value,
            headers,
            timestamp_delta,
        })
}

pub(super) fn build(records: &[Owned], producer: Option<ProducerStamp>) -> Bytes {
    let mut builder = BatchBuilder::new();
    if let Some(p) = producer {
        builder = builder.producer(p.id, p.epoch, p.base_sequence);
    }
    for record in records {
        let headers: Vec<(&str, &[u8])> = record
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_slice()))
            .collect();
        builder.push(RecordInput {
            key: record.key.as_deref(),
            value: record.value.as_deref(),
            headers: &headers,
            timestamp_delta: record.timestamp_delta,
        });
    }
    let size = builder.size_bytes();
    let bytes = builder.finish();
    assert_eq!(bytes.len(), size);
    bytes
}

pub(super) fn sample() -> Bytes {
    let records = [
        Owned {
            key: Some(b"order-17".to_vec()),
            value: Some(b"{\"total\":12}".to_vec()),
            headers: vec![("trace".into(), b"a1".to_vec()), ("empty".into(), vec![])],
            timestamp_delta: 0,
        },
        Owned {
            key: None,
            value: None,
            headers: vec![],
            timestamp_delta: -5,
        },
        Owned {
            key: Some(vec![]),
            value: Some(vec![]),
            headers: vec![],
            timestamp_delta: 7,
        },
    ];
    let producer = ProducerStamp {
        id: 9,
        epoch: 2,
        base_sequence: 40,
    };
    build(&records, Some(producer))
}

/// Puts a correct checksum on a batch that was tampered with.
pub(super) fn seal(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[CRC_START..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

fn read(view: &BatchView) -> Vec<Owned> {
    view.records()
        .enumerate()
        .map(|(place, record)| {
            let record = record.unwrap();
            assert_eq!(record.offset_delta as usize, place);
            Owned {
                key: record.key.map(|key| key.to_vec()),
                value: record.value.map(|value| value.to_vec()),
                headers: record
                    .headers
                    .iter()
                    .map(|h| {
                        let name = String::from_utf8(h.key.to_vec()).unwrap();
                        (name, h.value.unwrap().to_vec())
                    })
                    .collect(),
                timestamp_delta: record.timestamp_delta,
            }
        })
        .collect()
}

proptest! {
    #[test]
    fn built_batches_read_back(
        records in proptest::collection::vec(owned(), 1..20),
        producer in proptest::option::of((0..i64::MAX, 0..i16::MAX, 0..i32::MAX)),
    ) {
        let producer = producer.map(|(id, epoch, base_sequence)| ProducerStamp { id, epoch, base_sequence });
        let view = BatchView::parse(build(&records, producer)).unwrap();
        prop_assert_eq!(view.record_count() as usize, records.len());
        prop_assert_eq!(view.producer(), producer);
        prop_assert_eq!(view.compression(), Compression::None);
        prop_assert!(view.is_log_append_time());
        prop_assert_eq!(read(&view), records);
    }

    #[test]
    fn messages_read_back(
        key in proptest::option::of(".{0,9}"),
        value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..50)),
        tag in proptest::option::of(".{0,9}"),
        ttl_ms in proptest::option::of(1..u64::MAX),
        headers in proptest::collection::vec(("[a-z]{0,5}", proptest::collection::vec(any::<u8>(), 0..9)), 0..4),
    ) {
        let message = MessageRecord {
            key,
            value: value.map(Bytes::from),
            tag,
            ttl_ms,
            headers: headers.into_iter().map(|(name, value)| (name, Bytes::from(value))).collect(),
        };
        let mut builder = BatchBuilder::new();
        message.encode(&mut builder).unwrap();
        let view = BatchView::parse(builder.finish()).unwrap();
        view.validate_client().unwrap();
        let record = view.records().next().unwrap().unwrap();
        prop_assert_eq!(record.tag().map(|t| t.to_vec()), message.tag.clone().map(String::into_bytes));
        prop_assert_eq!(record.ttl_ms(), ttl_ms);
        prop_assert_eq!(MessageRecord::decode(&record).unwrap(), message);
    }
}

#[test]
fn stamping_sets_the_time_and_a_checksum_that_holds() {
    let mut batch = BytesMut::from(&sample()[..]);
    batch[22] = 0;
    seal(&mut batch);
    assert!(stamp(&mut batch, 1_700_000_000_123));
    let view = BatchView::parse(batch.freeze()).unwrap();
    assert_eq!(view.base_timestamp_ms(), 1_700_000_000_123);
    assert_eq!(view.max_timestamp_ms(), 1_700_000_000_123);
    assert!(view.is_log_append_time());
    view.validate_client().unwrap();
}

#[test]
fn stamping_leaves_alone_what_is_not_one_batch() {
    let mut two = BytesMut::from(&[sample(), sample()].concat()[..]);
    let before = two.clone();
    assert!(!stamp(&mut two, 5));
    assert_eq!(two, before);
    assert!(!stamp(&mut BytesMut::from(&sample()[..60]), 5));
}

#[test]
fn base_offset_is_outside_the_checksum() {
    let mut batch = BytesMut::from(&sample()[..]);
    patch_base_offset(&mut batch, 4711);
    let view = BatchView::parse(batch.freeze()).unwrap();
    assert_eq!(view.base_offset(), 4711);
    patch_base_offset(&mut [0; 3], 1);
}

#[test]
fn split_cuts_at_the_lengths_and_stops_at_the_first_error() {
    let one = sample();
    let mut joined = [&one[..], &one[..]].concat();
    let pieces: Vec<_> = split(Bytes::from(joined.clone())).collect();
    assert_eq!(pieces, vec![Ok(one.clone()), Ok(one.clone())]);
    joined.truncate(one.len() + 70);
    let pieces: Vec<_> = split(Bytes::from(joined)).collect();
    assert_eq!(pieces.len(), 2);
    assert_eq!(
        pieces[1],
        Err(BatchError::Truncated {
            needed: one.len(),
            have: 70
        })
    );
    assert_eq!(split(Bytes::new()).count(), 0);
}

#[test]
fn the_tag_is_no_user_header_and_cannot_be_sent_as_one() {
    let message = MessageRecord {
        headers: vec![(TAG_HEADER.into(), Bytes::from_static(b"x"))],
        ..MessageRecord::default()
    };
    let mut builder = BatchBuilder::new();
    assert_eq!(
        message.encode(&mut builder),
        Err(BatchError::ReservedHeader(TAG_HEADER.into()))
    );
    assert_eq!(builder.record_count(), 0);
}

#[test]
fn a_time_to_live_is_a_number_of_milliseconds() {
    for (text, read) in [
        ("1", Some(1)),
        ("18446744073709551615", Some(u64::MAX)),
        ("07", Some(7)),
    ] {
        assert_eq!(parse_ttl(text.as_bytes()), read);
    }
    for text in [
        "",
        "0",
        "-1",
        "+1",
        " 1",
        "1.5",
        "18446744073709551616",
        "\u{661}",
    ] {
        assert_eq!(parse_ttl(text.as_bytes()), None, "{text:?}");
    }
}

#[test]
fn too_many_headers_are_refused_on_both_ways_in() {
    let have = MAX_RECORD_HEADERS + 1;
    let refused = Err(BatchError::TooManyHeaders {
        have,
        most: MAX_RECORD_HEADERS,
    });
    let message = MessageRecord {
        headers: vec![("h".into(), Bytes::new()); have],
        ..MessageRecord::default()
    };
    let mut builder = BatchBuilder::new();
    assert_eq!(message.encode(&mut builder), refused);
    let headers = vec![("h", &b""[..]); have];
    builder.push(RecordInput {
        headers: &headers,
        ..RecordInput::default()
    });
    let view = BatchView::parse(builder.finish()).unwrap();
    assert_eq!(view.validate_client(), refused);
}

#[test]
fn an_empty_builder_makes_a_readable_batch_that_clients_may_not_send() {
    let view = BatchView::parse(BatchBuilder::new().finish()).unwrap();
    assert_eq!(view.records().count(), 0);
    assert_eq!(view.validate_client(), Err(BatchError::Empty));
}
