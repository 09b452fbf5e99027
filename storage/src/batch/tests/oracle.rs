//! The crate kafka-protocol, an independent implementation, has to agree in both directions.

use bytes::{Bytes, BytesMut};
use kafka_protocol::indexmap::IndexMap;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{
    Compression as TheirCompression, Record, RecordBatchDecoder, RecordBatchEncoder,
    RecordEncodeOptions, TimestampType,
};
use proptest::prelude::*;

use super::super::*;
use super::{Owned, build, owned};

/// Their map of headers keeps one value per name.
fn without_repeated_names(mut record: Owned) -> Owned {
    let mut seen = std::collections::HashSet::new();
    record.headers.retain(|(name, _)| seen.insert(name.clone()));
    record
}

fn unique_owned() -> impl Strategy<Value = Owned> {
    owned().prop_map(without_repeated_names)
}

fn theirs(record: &Owned, place: i64, null_header: bool) -> Record {
    let mut headers: IndexMap<StrBytes, Option<Bytes>> = record
        .headers
        .iter()
        .map(|(name, value)| {
            (
                StrBytes::from_string(name.clone()),
                Some(Bytes::from(value.clone())),
            )
        })
        .collect();
    if null_header {
        headers.insert(StrBytes::from_static_str("NULL"), None);
    }
    Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: 3,
        producer_id: 12,
        producer_epoch: 1,
        timestamp_type: TimestampType::Creation,
        offset: place,
        sequence: 70 + place as i32,
        timestamp: 1_000_000_000 + record.timestamp_delta,
        key: record.key.clone().map(Bytes::from),
        value: record.value.clone().map(Bytes::from),
        headers,
    }
}

proptest! {
    #[test]
    fn they_read_what_we_build(
        records in proptest::collection::vec(unique_owned(), 1..20),
        base_offset in 0u64..1 << 40,
        timestamp in 0u64..1 << 45,
    ) {
        let producer = ProducerStamp { id: 5, epoch: 6, base_sequence: 7 };
        let mut batch = BytesMut::from(&build(&records, Some(producer))[..]);
        prop_assert!(stamp(&mut batch, timestamp));
        patch_base_offset(&mut batch, base_offset);
        let decoded = RecordBatchDecoder::decode(&mut batch.freeze()).unwrap();
        prop_assert_eq!(decoded.version, 2);
        prop_assert_eq!(decoded.records.len(), records.len());
        for (place, (got, want)) in decoded.records.iter().zip(&records).enumerate() {
            prop_assert_eq!(got.offset, base_offset as i64 + place as i64);
            prop_assert_eq!(got.sequence, 7 + place as i32);
            prop_assert_eq!((got.producer_id, got.producer_epoch), (5, 6));
            prop_assert_eq!(got.timestamp_type, TimestampType::LogAppend);
            prop_assert_eq!(got.timestamp, timestamp as i64 + want.timestamp_delta);
            prop_assert_eq!(got.key.as_deref(), want.key.as_deref());
            prop_assert_eq!(got.value.as_deref(), want.value.as_deref());
            let headers: Vec<_> = got.headers.iter()
                .map(|(name, value)| (name.to_string(), value.clone().unwrap().to_vec()))
                .collect();
            prop_assert_eq!(&headers, &want.headers);
        }
    }

    #[test]
    fn we_read_what_they_build(
        records in proptest::collection::vec((unique_owned(), any::<bool>()), 1..20),
    ) {
        let all: Vec<Record> = records.iter().enumerate()
            .map(|(place, (record, null))| theirs(record, place as i64, *null))
            .collect();
        let mut out = BytesMut::new();
        let options = RecordEncodeOptions { version: 2, compression: TheirCompression::None };
        RecordBatchEncoder::encode(&mut out, &all, &options).unwrap();
        let view = BatchView::parse(out.freeze()).unwrap();
        prop_assert_eq!(view.producer(), Some(ProducerStamp { id: 12, epoch: 1, base_sequence: 70 }));
        prop_assert!(!view.is_log_append_time());
        let utf8_keys = records.iter().all(|(r, _)| {
            r.key.as_ref().is_none_or(|key| std::str::from_utf8(key).is_ok())
        });
        prop_assert_eq!(view.validate_client().is_ok(), utf8_keys);
        let got: Vec<_> = view.records().map(Result::unwrap).collect();
        prop_assert_eq!(got.len(), all.len());
        for (place, (got, want)) in got.iter().zip(&all).enumerate() {
            prop_assert_eq!(got.offset_delta as usize, place);
            prop_assert_eq!(view.base_timestamp_ms() + got.timestamp_delta, want.timestamp);
            prop_assert_eq!(&got.key, &want.key);
            prop_assert_eq!(&got.value, &want.value);
            let headers: Vec<_> = got.headers.iter()
                .map(|h| (String::from_utf8(h.key.to_vec()).unwrap(), h.value))
                .collect();
            let wanted: Vec<_> = want.headers.iter()
                .map(|(name, value)| (name.to_string(), value.clone()))
                .collect();
            prop_assert_eq!(headers, wanted);
        }
    }
}
