//! Batches of a client, and stored ones, that are not what they say.

use bytes::{Bytes, BytesMut};
use quorate_storage::batch::{
    BATCH_HEADER_BYTES, BatchBuilder, BatchView, Compression, MAX_RECORD_HEADERS, MessageRecord,
    patch_base_offset, split, stamp,
};

use crate::mutate::fuzz;

/// Gives every batch in a row of them a right checksum.
fn seal(bytes: &mut [u8]) {
    let mut rest = bytes;
    while let Some(length) = rest.get(8..12).and_then(|field| field.first_chunk()) {
        let total = i64::from(i32::from_be_bytes(*length)) + 12;
        let total = usize::try_from(total).unwrap_or(0);
        if total < BATCH_HEADER_BYTES || total > rest.len() {
            return;
        }
        let (batch, after) = rest.split_at_mut(total);
        let crc = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
        rest = after;
    }
}

fn check(bytes: &Bytes) {
    let Ok(view) = BatchView::parse(bytes.clone()) else {
        return;
    };
    let valid = view.validate_client().is_ok();
    let records: Vec<_> = view.records().take(bytes.len()).collect();
    // The shortest record takes 7 bytes, and an error ends the row.
    assert!(records.len() <= bytes.len() / 7 + 1, "{}", records.len());
    let good: Vec<_> = records.iter().flatten().collect();
    if valid {
        assert_eq!(view.compression(), Compression::None);
        assert_eq!(good.len(), view.record_count() as usize);
        assert_eq!(records.len(), good.len());
    }
    let mut again = BatchBuilder::new();
    let mut messages = Vec::new();
    for record in good {
        let held = record
            .key
            .iter()
            .chain(&record.value)
            .map(Bytes::len)
            .sum::<usize>();
        assert!(held <= bytes.len());
        assert_eq!(record.headers.iter().count(), record.headers.len());
        let message = MessageRecord::decode(record);
        assert!(!valid || message.is_ok());
        if let Ok(message) = message
            && message.headers.len() + 2 <= MAX_RECORD_HEADERS
        {
            message
                .encode(&mut again)
                .expect("what was decoded encodes");
            messages.push(message);
        }
    }
    let again = BatchView::parse(again.finish()).expect("our own batch");
    let back: Vec<_> = again
        .records()
        .map(|r| MessageRecord::decode(&r.unwrap()).unwrap())
        .collect();
    assert_eq!(back, messages);
    let mut stamped = BytesMut::from(&bytes[..]);
    assert!(stamp(&mut stamped, u64::MAX));
    patch_base_offset(&mut stamped, 7);
    let stamped = BatchView::parse(stamped.freeze()).expect("stamping keeps a batch whole");
    assert_eq!(
        (stamped.base_offset(), stamped.record_count()),
        (7, view.record_count())
    );
    assert_eq!(stamped.validate_client().is_ok(), valid);
}

#[test]
fn batches_that_lie() {
    fuzz("batch", 4000, |input| {
        let mut bytes = input.bytes.clone();
        if input.seal {
            seal(&mut bytes);
        }
        let bytes = Bytes::from(bytes);
        let pieces: Vec<_> = split(bytes.clone()).collect();
        let cut: Vec<Bytes> = pieces.iter().flatten().cloned().collect();
        assert_eq!(cut.concat()[..], bytes[..cut.iter().map(Bytes::len).sum()]);
        assert!(
            pieces.iter().take(cut.len()).all(Result::is_ok),
            "it ends at its first error"
        );
        for piece in &cut {
            check(piece);
            if let Ok(view) = BatchView::parse_trusted(piece.clone()) {
                let _ = view.records().count();
            }
        }
        check(&bytes);
    });
}
