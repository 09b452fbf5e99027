//! The body of a queue's Raft entry.
//!
//! Everything is big-endian, as in the RecordBatch v2 bytes it carries.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | version = 1 |
//! | 1 | kind: 1 = append, 2 = fence a producer |
//! | 2..10 | stamp, ms: max(the leader's clock, its last stamp) |
//!
//! An append goes on with:
//!
//! | bytes | field |
//! |---|---|
//! | 10..12 | number of batches, at least 1 |
//! | per batch: 16 | hash of the idempotency key, zeroes = none |
//! | 8 | fingerprint of the whole request, 0 without a key |
//! | 4 | length of the batch |
//! | … | one RecordBatch v2, stamped, base offset 0 |
//!
//! A fence goes on with the producer id (8) and the epoch (2) below which it is refused.
//!
//! Invariant: nothing here trusts a length or a count; hostile bytes give an [`EntryError`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quorate_storage::batch;

const VERSION: u8 = 1;
const KIND_APPEND: u8 = 1;
const KIND_FENCE: u8 = 2;
const HEADER_BYTES: usize = 10;
const BATCH_PREFIX_BYTES: usize = 16 + 8 + 4;

/// Batches one entry may carry.
pub const MAX_BATCHES: usize = 4096;

/// The hash of an idempotency key; zeroes mean that there is none.
pub type KeyHash = [u8; 16];

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error("the entry is cut short")]
    Truncated,
    #[error("{0} bytes follow the entry")]
    TrailingBytes(usize),
    #[error("entry version {0} is not known")]
    Version(u8),
    #[error("entry kind {0} is not known")]
    Kind(u8),
    #[error("an entry has 1 to {MAX_BATCHES} batches, this one says {0}")]
    BatchCount(u16),
}

/// One batch of an append with the request's idempotency mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryBatch {
    pub key: KeyHash,
    pub fingerprint: u64,
    pub batch: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryBody {
    Append(Vec<EntryBatch>),
    Fence { producer: i64, epoch: i16 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub stamp_ms: u64,
    pub body: EntryBody,
}

/// Joins batches into one append.
#[derive(Debug)]
pub struct AppendBuilder {
    buffer: BytesMut,
    stamp_ms: u64,
    count: u16,
}

impl AppendBuilder {
    /// `batch_bytes` is a hint for the sum of the batches to come.
    pub fn new(stamp_ms: u64, batches: usize, batch_bytes: usize) -> Self {
        let mut buffer =
            BytesMut::with_capacity(HEADER_BYTES + 2 + batches * BATCH_PREFIX_BYTES + batch_bytes);
        put_header(&mut buffer, KIND_APPEND, stamp_ms);
        buffer.put_u16(0);
        Self {
            buffer,
            stamp_ms,
            count: 0,
        }
    }

    /// Adds a validated batch, giving it the entry's stamp. False, adding nothing, when it is not
    /// exactly one batch or the entry is full.
    pub fn push(&mut self, key: KeyHash, fingerprint: u64, batch: &[u8]) -> bool {
        let Ok(len) = u32::try_from(batch.len()) else {
            return false;
        };
        if usize::from(self.count) == MAX_BATCHES {
            return false;
        }
        let start = self.buffer.len();
        self.buffer.put_slice(&key);
        self.buffer.put_u64(fingerprint);
        self.buffer.put_u32(len);
        let body = self.buffer.len();
        self.buffer.put_slice(batch);
        // The batch is stamped in place: splitting and joining neighbours copies nothing.
        let mut tail = self.buffer.split_off(body);
        let stamped = batch::stamp(&mut tail, self.stamp_ms);
        batch::patch_base_offset(&mut tail, 0);
        self.buffer.unsplit(tail);
        if stamped {
            self.count += 1;
        } else {
            self.buffer.truncate(start);
        }
        stamped
    }

    pub fn count(&self) -> u16 {
        self.count
    }

    pub fn finish(mut self) -> Bytes {
        let count = self.count.to_be_bytes();
        self.buffer[HEADER_BYTES..HEADER_BYTES + 2].copy_from_slice(&count);
        self.buffer.freeze()
    }
}

/// The entry that refuses a producer's older epochs from here on.
pub fn fence(stamp_ms: u64, producer: i64, epoch: i16) -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 10);
    put_header(&mut buffer, KIND_FENCE, stamp_ms);
    buffer.put_i64(producer);
    buffer.put_i16(epoch);
    buffer.freeze()
}

fn put_header(buffer: &mut BytesMut, kind: u8, stamp_ms: u64) {
    buffer.put_u8(VERSION);
    buffer.put_u8(kind);
    buffer.put_u64(stamp_ms);
}

/// Reads an entry. The batches are slices of `body`; their insides are not looked at.
pub fn decode(body: &Bytes) -> Result<Entry, EntryError> {
    let mut rest = body.clone();
    if rest.len() < HEADER_BYTES {
        return Err(EntryError::Truncated);
    }
    let version = rest.get_u8();
    if version != VERSION {
        return Err(EntryError::Version(version));
    }
    let kind = rest.get_u8();
    let stamp_ms = rest.get_u64();
    let body = match kind {
        KIND_APPEND => EntryBody::Append(decode_append(&mut rest)?),
        KIND_FENCE => {
            if rest.len() < 10 {
                return Err(EntryError::Truncated);
            }
            EntryBody::Fence {
                producer: rest.get_i64(),
                epoch: rest.get_i16(),
            }
        }
        other => return Err(EntryError::Kind(other)),
    };
    if rest.has_remaining() {
        return Err(EntryError::TrailingBytes(rest.len()));
    }
    Ok(Entry { stamp_ms, body })
}

fn decode_append(rest: &mut Bytes) -> Result<Vec<EntryBatch>, EntryError> {
    if rest.len() < 2 {
        return Err(EntryError::Truncated);
    }
    let count = rest.get_u16();
    if count == 0 || usize::from(count) > MAX_BATCHES {
        return Err(EntryError::BatchCount(count));
    }
    // Grown as batches are found: a lying count allocates nothing.
    let mut batches = Vec::with_capacity(usize::from(count).min(rest.len() / BATCH_PREFIX_BYTES));
    for _ in 0..count {
        if rest.len() < BATCH_PREFIX_BYTES {
            return Err(EntryError::Truncated);
        }
        let mut key = KeyHash::default();
        rest.copy_to_slice(&mut key);
        let fingerprint = rest.get_u64();
        let len = rest.get_u32() as usize;
        if rest.len() < len {
            return Err(EntryError::Truncated);
        }
        batches.push(EntryBatch {
            key,
            fingerprint,
            batch: rest.split_to(len),
        });
    }
    Ok(batches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quorate_storage::batch::{BatchBuilder, BatchView, RecordInput};

    fn one_batch(value: &[u8]) -> Bytes {
        let mut builder = BatchBuilder::new();
        builder.push(RecordInput {
            value: Some(value),
            ..RecordInput::default()
        });
        builder.finish()
    }

    fn append(values: &[&[u8]]) -> Bytes {
        let mut builder = AppendBuilder::new(77, values.len(), 0);
        for (place, value) in values.iter().enumerate() {
            assert!(builder.push([place as u8; 16], place as u64, &one_batch(value)));
        }
        builder.finish()
    }

    #[test]
    fn an_append_comes_back_stamped_and_sliced() {
        let body = append(&[b"a", b"bc"]);
        let entry = decode(&body).unwrap();
        assert_eq!(entry.stamp_ms, 77);
        let EntryBody::Append(batches) = entry.body else {
            panic!("an append");
        };
        assert_eq!(batches.len(), 2);
        assert_eq!(batches[1].key, [1; 16]);
        assert_eq!(batches[1].fingerprint, 1);
        let view = BatchView::parse(batches[1].batch.clone()).unwrap();
        assert_eq!(view.max_timestamp_ms(), 77);
        let record = view.records().next().unwrap().unwrap();
        assert_eq!(record.value.as_deref(), Some(&b"bc"[..]));
        assert!(body.as_ptr_range().contains(&batches[1].batch.as_ptr()));
    }

    #[test]
    fn what_is_no_batch_is_not_taken() {
        let mut builder = AppendBuilder::new(1, 1, 0);
        assert!(!builder.push([0; 16], 0, b"not a batch"));
        assert!(builder.push([0; 16], 0, &one_batch(b"x")));
        let EntryBody::Append(batches) = decode(&builder.finish()).unwrap().body else {
            panic!("an append");
        };
        assert_eq!(batches.len(), 1);
    }

    #[test]
    fn a_fence_comes_back() {
        let entry = decode(&fence(5, 1 << 40, 3)).unwrap();
        assert_eq!(
            entry.body,
            EntryBody::Fence {
                producer: 1 << 40,
                epoch: 3
            }
        );
    }

    #[test]
    fn every_cut_is_noticed() {
        let body = append(&[b"a", b"bc"]);
        for len in 0..body.len() {
            assert!(decode(&body.slice(..len)).is_err(), "cut at {len}");
        }
        let mut longer = BytesMut::from(&body[..]);
        longer.put_u8(0);
        assert_eq!(decode(&longer.freeze()), Err(EntryError::TrailingBytes(1)));
    }

    #[test]
    fn unknown_versions_and_kinds_are_refused() {
        let mut body = BytesMut::from(&append(&[b"a"])[..]);
        body[0] = 9;
        assert_eq!(decode(&body.clone().freeze()), Err(EntryError::Version(9)));
        body[0] = VERSION;
        body[1] = 9;
        assert_eq!(decode(&body.freeze()), Err(EntryError::Kind(9)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&Bytes::from(bytes.clone()));
            let mut framed = vec![VERSION, KIND_APPEND];
            framed.extend(bytes);
            let _ = decode(&Bytes::from(framed));
        }
    }
}
