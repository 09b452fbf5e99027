//! Bytes that lie: cut, flipped, overlong, or with a correct checksum over nonsense.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::super::*;
use super::{sample, seal};

fn tampered(change: impl FnOnce(&mut [u8])) -> Bytes {
    let mut batch = BytesMut::from(&sample()[..]);
    change(&mut batch);
    seal(&mut batch);
    batch.freeze()
}

fn validate(bytes: Bytes) -> Result<(), BatchError> {
    BatchView::parse(bytes)?.validate_client()
}

#[test]
fn a_flipped_bit_is_detected_everywhere_but_outside_the_checksum() {
    let good = sample();
    validate(good.clone()).unwrap();
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut batch = good.to_vec();
            batch[position] ^= 1 << bit;
            let outside = (0..8).contains(&position) || (12..16).contains(&position);
            // The base offset must not be negative even so.
            let negative = position == 0 && bit == 7;
            let result = BatchView::parse(Bytes::from(batch));
            assert_eq!(
                result.is_ok(),
                outside && !negative,
                "byte {position} bit {bit}: {result:?}"
            );
        }
    }
}

#[test]
fn every_truncation_is_detected() {
    let good = sample();
    for len in 0..good.len() {
        let result = BatchView::parse(good.slice(..len));
        assert!(
            matches!(result, Err(BatchError::Truncated { .. })),
            "{len}: {result:?}"
        );
    }
    let longer = Bytes::from([&good[..], b"x"].concat());
    assert_eq!(
        BatchView::parse(longer).unwrap_err(),
        BatchError::TrailingBytes { extra: 1 }
    );
}

#[test]
fn every_truncation_with_a_length_and_checksum_to_match_is_detected() {
    let good = sample();
    for len in BATCH_HEADER_BYTES..good.len() {
        let mut batch = good[..len].to_vec();
        let length = (len - LENGTH_PREFIX_BYTES) as i32;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        seal(&mut batch);
        assert!(validate(Bytes::from(batch)).is_err(), "{len}");
    }
}

#[test]
fn clients_may_not_send_these() {
    let set_attributes = |bits: i16| tampered(|b| b[21..23].copy_from_slice(&bits.to_be_bytes()));
    assert_eq!(validate(set_attributes(1 << 5)), Err(BatchError::Control));
    assert_eq!(
        validate(set_attributes(1 << 4)),
        Err(BatchError::Transactional)
    );
    assert!(matches!(
        validate(set_attributes(1 << 6)),
        Err(BatchError::Header {
            field: "attributes",
            ..
        })
    ));
    assert!(matches!(
        validate(set_attributes(5)),
        Err(BatchError::Header {
            field: "compression",
            ..
        })
    ));
    for (bits, name) in [(1, "gzip"), (2, "snappy"), (3, "lz4"), (4, "zstd")] {
        assert_eq!(
            validate(set_attributes(bits)),
            Err(BatchError::UnsupportedCompression(name))
        );
    }
    let refused = |range: std::ops::Range<usize>, value: i64, field: &str| {
        let bytes = tampered(|b| {
            let len = range.len();
            b[range].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        });
        match validate(bytes) {
            Err(BatchError::Header { field: f, .. }) => assert_eq!(f, field),
            other => panic!("{field} = {value}: {other:?}"),
        }
    };
    refused(23..27, 3, "last offset delta");
    refused(23..27, -1, "last offset delta");
    refused(43..51, -2, "producer id");
    refused(43..51, -1, "producer epoch");
    refused(51..53, -1, "producer epoch");
    refused(53..57, -1, "base sequence");
    refused(53..57, -7, "base sequence");
    refused(57..61, -1, "record count");
    for count in [2i32, 4, i32::MAX] {
        let bytes = tampered(|b| {
            b[57..61].copy_from_slice(&count.to_be_bytes());
            b[23..27].copy_from_slice(&(count - 1).to_be_bytes());
        });
        assert!(validate(bytes).is_err(), "{count}");
    }
}

#[test]
fn offset_deltas_must_count_up() {
    // The second record: after length, attributes and a one-byte timestamp delta.
    let view = BatchView::parse(sample()).unwrap();
    let first = view.records().next().unwrap().unwrap();
    assert_eq!(first.offset_delta, 0);
    let first_len = view.bytes()[BATCH_HEADER_BYTES] as usize / 2;
    let at = BATCH_HEADER_BYTES + 1 + first_len + 3;
    assert_eq!(view.bytes()[at], 2, "zigzag of 1");
    for wrong in [0u8, 1, 4] {
        assert!(matches!(
            validate(tampered(|b| b[at] = wrong)),
            Err(BatchError::Record { record: 1, .. })
        ));
    }
}

#[test]
fn names_must_be_utf8() {
    let at = |needle: &[u8]| {
        sample()
            .windows(needle.len())
            .position(|w| w == needle)
            .unwrap()
    };
    let (key, header) = (at(b"order-17"), at(b"trace"));
    assert!(matches!(
        validate(tampered(|b| b[key] = 0xff)),
        Err(BatchError::NotUtf8(_))
    ));
    assert!(matches!(
        validate(tampered(|b| b[header] = 0xff)),
        Err(BatchError::NotUtf8(_))
    ));
}

#[test]
fn a_header_count_larger_than_the_record_is_refused() {
    // One record of 7 bytes, its header count replaced by a five-byte varint of 2^31 - 1.
    let mut batch = BatchBuilder::new()
        .push(RecordInput::default())
        .finish()
        .to_vec();
    batch.pop();
    batch.extend_from_slice(&[0xfe, 0xff, 0xff, 0xff, 0x0f]);
    batch[BATCH_HEADER_BYTES] += 2 * 4;
    let length = (batch.len() - LENGTH_PREFIX_BYTES) as i32;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    seal(&mut batch);
    let view = BatchView::parse(Bytes::from(batch)).unwrap();
    let results: Vec<_> = view.records().collect();
    assert_eq!(
        results,
        vec![Err(BatchError::Record {
            record: 0,
            reason: "more headers than bytes"
        })]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nonsense_under_a_correct_checksum_never_panics(
        changes in proptest::collection::vec((21usize..120, any::<u8>()), 1..6),
    ) {
        let bytes = tampered(|batch| {
            for (at, byte) in changes {
                let at = CRC_START + (at - CRC_START) % (batch.len() - CRC_START);
                batch[at] = byte;
            }
        });
        if let Ok(view) = BatchView::parse(bytes) {
            let validated = view.validate_client();
            let mut good = 0;
            for record in view.records().flatten() {
                good += 1;
                let decoded = MessageRecord::decode(&record);
                prop_assert!(validated.is_err() || decoded.is_ok());
                prop_assert_eq!(record.headers.iter().count(), record.headers.len());
            }
            prop_assert!(validated.is_err() || good == view.record_count());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = Bytes::from(bytes);
        let _ = split(bytes.clone()).count();
        if let Ok(view) = BatchView::parse_trusted(bytes) {
            let _ = view.records().count();
        }
    }
}
