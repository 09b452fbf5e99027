//! The body of a queue's Raft entry.
//!
//! Everything is big-endian, as in the RecordBatch v2 bytes it carries.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | version = 3 |
//! | 1 | kind: 1 append, 2 fence a producer, 3 deliver, 4 settle a transaction, 5 cancel, 7 trim |
//! | 2..10 | stamp, ms: max(the leader's clock, its last stamp) |
//!
//! An append goes on with:
//!
//! | bytes | field |
//! |---|---|
//! | 10..12 | number of batches, at least 1 |
//! | per batch: 1 | mark: 0 = none, 1 = idempotency key, 2 = forwarded |
//! | mark 1: 16, 8 | hash of the key, fingerprint of the whole request |
//! | mark 2: 16, 8 | source, sequence in that source |
//! | 1 | hold: 0 = visible at once, 1 = until a time, 2 = until its transaction ends |
//! | hold 1: 8 | deliver at, ms |
//! | hold 2: 16, 4 | transaction id, the batch's number in it |
//! | 4 | length of the batch |
//! | … | one RecordBatch v2, stamped, base offset 0 |
//!
//! A fence goes on with the producer id (8) and the epoch (2) below which it is refused; a delivery
//! of what is due at the stamp with the most batches it may take (2); a settlement with the
//! transaction id (16), 1 = commit or 0 = rollback (1), how many parts are given up all the same (2)
//! and their numbers (4 each); a cancellation with term (8), index (8) and batch (2) of what is held;
//! a trim with the offset (8) below which messages are gone.
//!
//! Invariant: nothing here trusts a length or a count; hostile bytes give an [`EntryError`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quorate_storage::{LogId, batch};
use serde::{Deserialize, Serialize};

const VERSION: u8 = 3;
const KIND_APPEND: u8 = 1;
const KIND_FENCE: u8 = 2;
const KIND_DELIVER: u8 = 3;
const KIND_SETTLE: u8 = 4;
const KIND_CANCEL: u8 = 5;
const KIND_TRIM: u8 = 7;
const HEADER_BYTES: usize = 10;
/// Where the stamp is.
const STAMP: std::ops::Range<usize> = 2..10;
/// Of a batch without mark and hold.
const MIN_PREFIX_BYTES: usize = 1 + 1 + 4;
/// Of a batch with the longest mark and hold.
const MAX_PREFIX_BYTES: usize = MIN_PREFIX_BYTES + 24 + 20;

/// Batches one entry may carry.
pub const MAX_BATCHES: usize = 4096;

/// The hash of an idempotency key.
pub type KeyHash = [u8; 16];

/// What a repetition of a batch is known by, beside its producer's own numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mark {
    #[default]
    None,
    /// The client's idempotency key, and a fingerprint of the whole request.
    Key { hash: KeyHash, fingerprint: u64 },
    /// A forwarder brings what is stored elsewhere. Of one source it comes in the order of
    /// `sequence`, and what is not above the last one is a repetition, for ever.
    Forwarded { source: [u8; 16], sequence: u64 },
}

/// Why a batch is stored without being visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    Until { deliver_at_ms: u64 },
    Transaction { id: TransactionId, part: u32 },
}

/// Of one transaction's life, unique for ever.
pub type TransactionId = [u8; 16];

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
    #[error("mark {0} of a batch is not known")]
    Mark(u8),
    #[error("hold {0} of a batch is not known")]
    Hold(u8),
    #[error("end {0} of a transaction is not known")]
    End(u8),
}

/// One batch of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryBatch {
    pub mark: Mark,
    /// None: visible at once.
    pub hold: Option<Hold>,
    pub batch: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryBody {
    Append(Vec<EntryBatch>),
    Fence {
        producer: i64,
        epoch: i16,
    },
    /// What is due at the entry's stamp becomes visible, in the order of its times.
    Deliver {
        max_batches: u16,
    },
    /// What the queue holds for a transaction becomes visible, or never will.
    Settle {
        id: TransactionId,
        commit: bool,
        /// Parts that are never seen, whatever the end is.
        given_up: Vec<u32>,
    },
    /// A batch that is held until a time is to stay unseen for ever.
    Cancel {
        term: u64,
        index: u64,
        batch: u16,
    },
    /// Messages below the offset are let go.
    Trim {
        earliest_offset: u64,
    },
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
            BytesMut::with_capacity(HEADER_BYTES + 2 + batches * MAX_PREFIX_BYTES + batch_bytes);
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
    pub fn push(&mut self, mark: &Mark, hold: Option<&Hold>, batch: &[u8]) -> bool {
        let Ok(len) = u32::try_from(batch.len()) else {
            return false;
        };
        if usize::from(self.count) == MAX_BATCHES {
            return false;
        }
        let start = self.buffer.len();
        put_mark(&mut self.buffer, mark);
        put_hold(&mut self.buffer, hold);
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

/// The entry that makes what is due at `stamp_ms` visible, at most `max_batches`.
pub fn deliver(stamp_ms: u64, max_batches: u16) -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 2);
    put_header(&mut buffer, KIND_DELIVER, stamp_ms);
    buffer.put_u16(max_batches);
    buffer.freeze()
}

/// The entry that ends a transaction in this queue. Parts that were given up are never seen.
pub fn settle(stamp_ms: u64, id: &TransactionId, commit: bool, given_up: &[u32]) -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 19 + 4 * given_up.len());
    put_header(&mut buffer, KIND_SETTLE, stamp_ms);
    buffer.put_slice(id);
    buffer.put_u8(commit.into());
    // A transaction has far fewer parts than 2^16.
    buffer.put_u16(given_up.len() as u16);
    given_up.iter().for_each(|part| buffer.put_u32(*part));
    buffer.freeze()
}

/// The entry that takes back a batch which is held until a time.
pub fn cancel(stamp_ms: u64, stored: LogId, batch: u16) -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 18);
    put_header(&mut buffer, KIND_CANCEL, stamp_ms);
    buffer.put_u64(stored.term);
    buffer.put_u64(stored.index);
    buffer.put_u16(batch);
    buffer.freeze()
}

/// The entry that lets go of the messages below an offset.
pub fn trim(stamp_ms: u64, earliest_offset: u64) -> Bytes {
    let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 8);
    put_header(&mut buffer, KIND_TRIM, stamp_ms);
    buffer.put_u64(earliest_offset);
    buffer.freeze()
}

/// The same entry as its queue's leader stamps it: a queue's time is never another node's.
pub fn stamped(body: &Bytes, stamp_ms: u64) -> Bytes {
    let mut body = BytesMut::from(&body[..]);
    if let Some(stamp) = body.get_mut(STAMP) {
        stamp.copy_from_slice(&stamp_ms.to_be_bytes());
    }
    body.freeze()
}

/// Whether a body is one that [`trim`] made. It frees space, so a full disk is no reason against it.
pub fn is_trim(body: &[u8]) -> bool {
    body.first_chunk() == Some(&[VERSION, KIND_TRIM]) && body.len() == HEADER_BYTES + 8
}

/// Whether another Raft group will remember that this entry was stored: a transaction's coordinator
/// its parts and its end, a forwarder what it has brought. It must not be forgotten here then.
pub fn is_remembered_elsewhere(body: &Bytes) -> bool {
    let Ok(entry) = decode(body) else {
        return false;
    };
    match entry.body {
        EntryBody::Append(batches) => batches.iter().any(|batch| {
            matches!(batch.hold, Some(Hold::Transaction { .. }))
                || matches!(batch.mark, Mark::Forwarded { .. })
        }),
        EntryBody::Settle { .. } => true,
        EntryBody::Fence { .. }
        | EntryBody::Deliver { .. }
        | EntryBody::Cancel { .. }
        | EntryBody::Trim { .. } => false,
    }
}

fn put_header(buffer: &mut BytesMut, kind: u8, stamp_ms: u64) {
    buffer.put_u8(VERSION);
    buffer.put_u8(kind);
    buffer.put_u64(stamp_ms);
}

fn put_mark(buffer: &mut BytesMut, mark: &Mark) {
    match mark {
        Mark::None => buffer.put_u8(0),
        Mark::Key { hash, fingerprint } => {
            buffer.put_u8(1);
            buffer.put_slice(hash);
            buffer.put_u64(*fingerprint);
        }
        Mark::Forwarded { source, sequence } => {
            buffer.put_u8(2);
            buffer.put_slice(source);
            buffer.put_u64(*sequence);
        }
    }
}

fn put_hold(buffer: &mut BytesMut, hold: Option<&Hold>) {
    match hold {
        None => buffer.put_u8(0),
        Some(Hold::Until { deliver_at_ms }) => {
            buffer.put_u8(1);
            buffer.put_u64(*deliver_at_ms);
        }
        Some(Hold::Transaction { id, part }) => {
            buffer.put_u8(2);
            buffer.put_slice(id);
            buffer.put_u32(*part);
        }
    }
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
            let mut fields = take(&mut rest, 10)?;
            EntryBody::Fence {
                producer: fields.get_i64(),
                epoch: fields.get_i16(),
            }
        }
        KIND_DELIVER => EntryBody::Deliver {
            max_batches: take(&mut rest, 2)?.get_u16(),
        },
        KIND_SETTLE => EntryBody::Settle {
            id: take_16(&mut rest)?,
            commit: match take(&mut rest, 1)?.get_u8() {
                0 => false,
                1 => true,
                other => return Err(EntryError::End(other)),
            },
            given_up: decode_numbers(&mut rest)?,
        },
        KIND_CANCEL => {
            let mut fields = take(&mut rest, 18)?;
            EntryBody::Cancel {
                term: fields.get_u64(),
                index: fields.get_u64(),
                batch: fields.get_u16(),
            }
        }
        KIND_TRIM => EntryBody::Trim {
            earliest_offset: take(&mut rest, 8)?.get_u64(),
        },
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
    let mut batches = Vec::with_capacity(usize::from(count).min(rest.len() / MIN_PREFIX_BYTES));
    for _ in 0..count {
        let mark = decode_mark(rest)?;
        let hold = decode_hold(rest)?;
        let len = take(rest, 4)?.get_u32() as usize;
        let batch = take(rest, len)?;
        batches.push(EntryBatch { mark, hold, batch });
    }
    Ok(batches)
}

fn decode_numbers(rest: &mut Bytes) -> Result<Vec<u32>, EntryError> {
    let count = take(rest, 2)?.get_u16();
    let mut numbers = take(rest, 4 * usize::from(count))?;
    Ok((0..count).map(|_| numbers.get_u32()).collect())
}

fn take(rest: &mut Bytes, bytes: usize) -> Result<Bytes, EntryError> {
    match rest.len() >= bytes {
        true => Ok(rest.split_to(bytes)),
        false => Err(EntryError::Truncated),
    }
}

fn take_16(rest: &mut Bytes) -> Result<[u8; 16], EntryError> {
    let mut bytes = [0; 16];
    take(rest, 16)?.copy_to_slice(&mut bytes);
    Ok(bytes)
}

fn decode_mark(rest: &mut Bytes) -> Result<Mark, EntryError> {
    match take(rest, 1)?.get_u8() {
        0 => Ok(Mark::None),
        1 => Ok(Mark::Key {
            hash: take_16(rest)?,
            fingerprint: take(rest, 8)?.get_u64(),
        }),
        2 => Ok(Mark::Forwarded {
            source: take_16(rest)?,
            sequence: take(rest, 8)?.get_u64(),
        }),
        other => Err(EntryError::Mark(other)),
    }
}

fn decode_hold(rest: &mut Bytes) -> Result<Option<Hold>, EntryError> {
    match take(rest, 1)?.get_u8() {
        0 => Ok(None),
        1 => Ok(Some(Hold::Until {
            deliver_at_ms: take(rest, 8)?.get_u64(),
        })),
        2 => Ok(Some(Hold::Transaction {
            id: take_16(rest)?,
            part: take(rest, 4)?.get_u32(),
        })),
        other => Err(EntryError::Hold(other)),
    }
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

    /// Every kind of mark and of hold, one after the other.
    fn prefix(place: u8) -> (Mark, Option<Hold>) {
        let mark = match place % 3 {
            0 => Mark::None,
            1 => Mark::Key {
                hash: [place; 16],
                fingerprint: place.into(),
            },
            _ => Mark::Forwarded {
                source: [place; 16],
                sequence: place.into(),
            },
        };
        let hold = match place / 3 % 3 {
            0 => None,
            1 => Some(Hold::Until {
                deliver_at_ms: place.into(),
            }),
            _ => Some(Hold::Transaction {
                id: [place; 16],
                part: place.into(),
            }),
        };
        (mark, hold)
    }

    fn append(values: &[&[u8]]) -> Bytes {
        let mut builder = AppendBuilder::new(77, values.len(), 0);
        for (place, value) in values.iter().enumerate() {
            let (mark, hold) = prefix(place as u8);
            assert!(builder.push(&mark, hold.as_ref(), &one_batch(value)));
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
        assert_eq!((batches[1].mark, batches[1].hold), prefix(1));
        let view = BatchView::parse(batches[1].batch.clone()).unwrap();
        assert_eq!(view.max_timestamp_ms(), 77);
        let record = view.records().next().unwrap().unwrap();
        assert_eq!(record.value.as_deref(), Some(&b"bc"[..]));
        assert!(body.as_ptr_range().contains(&batches[1].batch.as_ptr()));
    }

    #[test]
    fn every_mark_and_hold_comes_back() {
        let EntryBody::Append(batches) = decode(&append(&[&b"x"[..]; 9])).unwrap().body else {
            panic!("an append");
        };
        let found: Vec<_> = batches.iter().map(|b| (b.mark, b.hold)).collect();
        assert_eq!(found, (0..9).map(prefix).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_no_batch_is_not_taken() {
        let mut builder = AppendBuilder::new(1, 1, 0);
        assert!(!builder.push(&Mark::None, None, b"not a batch"));
        assert!(builder.push(&Mark::None, None, &one_batch(b"x")));
        let EntryBody::Append(batches) = decode(&builder.finish()).unwrap().body else {
            panic!("an append");
        };
        assert_eq!(batches.len(), 1);
    }

    #[test]
    fn a_new_stamp_changes_nothing_else() {
        for body in [fence(5, 1, 1), settle(5, &[7; 16], true, &[3]), trim(5, 9)] {
            let before = decode(&body).unwrap();
            let after = decode(&stamped(&body, 77)).unwrap();
            assert_eq!((after.stamp_ms, after.body), (77, before.body));
        }
        assert_eq!(stamped(&Bytes::from_static(b"short"), 77), "short");
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
    fn what_becomes_of_held_batches_comes_back() {
        let id = [7; 16];
        let (term, index, batch) = (3, 1 << 40, 9);
        for (body, expected) in [
            (deliver(5, 77), EntryBody::Deliver { max_batches: 77 }),
            (
                settle(5, &id, true, &[]),
                EntryBody::Settle {
                    id,
                    commit: true,
                    given_up: Vec::new(),
                },
            ),
            (
                settle(5, &id, false, &[1, 1 << 20]),
                EntryBody::Settle {
                    id,
                    commit: false,
                    given_up: vec![1, 1 << 20],
                },
            ),
            (
                cancel(5, LogId::new(term, index), batch),
                EntryBody::Cancel { term, index, batch },
            ),
        ] {
            let entry = decode(&body).unwrap();
            assert_eq!((entry.stamp_ms, entry.body), (5, expected));
        }
    }

    #[test]
    fn what_other_groups_remember_is_told_from_the_rest() {
        for place in 0..9 {
            let (mark, hold) = prefix(place);
            let remembered = matches!(mark, Mark::Forwarded { .. })
                || matches!(hold, Some(Hold::Transaction { .. }));
            let mut builder = AppendBuilder::new(77, 2, 0);
            assert!(builder.push(&Mark::None, None, &one_batch(b"a")));
            assert!(builder.push(&mark, hold.as_ref(), &one_batch(b"b")));
            assert_eq!(is_remembered_elsewhere(&builder.finish()), remembered);
        }
        assert!(is_remembered_elsewhere(&settle(5, &[7; 16], false, &[])));
        for other in [fence(5, 1, 2), deliver(5, 77), trim(5, 3)] {
            assert!(!is_remembered_elsewhere(&other));
        }
    }

    #[test]
    fn a_trim_comes_back_and_is_known_for_one() {
        let body = trim(5, 1 << 40);
        let earliest_offset = 1 << 40;
        assert_eq!(
            decode(&body).unwrap().body,
            EntryBody::Trim { earliest_offset }
        );
        assert!(is_trim(&body));
        for other in [fence(5, 1, 1), append(&[b"a"]), body.slice(..17)] {
            assert!(!is_trim(&other));
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        for body in [
            append(&[&b"a"[..]; 9]),
            deliver(5, 77),
            settle(5, &[7; 16], true, &[3]),
            cancel(5, LogId::new(3, 4), 1),
        ] {
            for len in 0..body.len() {
                assert!(decode(&body.slice(..len)).is_err(), "cut at {len}");
            }
            let mut longer = BytesMut::from(&body[..]);
            longer.put_u8(0);
            assert_eq!(decode(&longer.freeze()), Err(EntryError::TrailingBytes(1)));
        }
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
