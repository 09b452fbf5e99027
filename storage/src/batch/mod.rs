//! Kafka's RecordBatch v2: the body in which messages travel, are stored and are served.
//!
//! One batch has one producer and becomes visible as one. The bytes are written once and only
//! sliced afterwards: [`BatchView`] reads them in place, [`BatchBuilder`] makes them,
//! [`MessageRecord`] puts the message model (key, value, tag, headers) on top of records.
//!
//! Invariant: nothing here trusts a length. Bytes from a client or from a damaged disk give a
//! [`BatchError`], never a panic and never an allocation larger than the bytes themselves.
//!
//! Layout (big-endian, <https://kafka.apache.org/documentation/#recordbatch>):
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | base offset (outside the checksum) |
//! | 8..12 | batch length: bytes after this field |
//! | 12..16 | partition leader epoch (outside the checksum; -1 here) |
//! | 16 | magic = 2 |
//! | 17..21 | CRC-32C of everything from byte 21 on |
//! | 21..23 | attributes: compression in bits 0-2, LogAppendTime 3, transactional 4, control 5 |
//! | 23..27 | last offset delta |
//! | 27..35 | base timestamp |
//! | 35..43 | max timestamp |
//! | 43..51 | producer id, -1 = none |
//! | 51..53 | producer epoch, -1 = none |
//! | 53..57 | base sequence, -1 = none |
//! | 57..61 | record count |
//! | 61.. | records |

mod builder;
mod error;
mod message;
mod records;
mod validate;
mod varint;
mod view;

pub use builder::{BatchBuilder, RecordInput};
pub use error::BatchError;
pub use message::{MessageRecord, TAG_HEADER, TTL_HEADER, parse_ttl};
pub use records::{HeaderView, Headers, HeadersIter, RecordView, Records};
pub use validate::MAX_RECORD_HEADERS;
pub use view::{BatchView, Split, split};

use bytes::BytesMut;
use std::fmt;

/// Bytes before the first record; no batch is shorter.
pub const BATCH_HEADER_BYTES: usize = 61;

/// The only format version there is here.
pub const MAGIC: i8 = 2;

/// Bytes of the base offset and the batch length, which the batch length does not count.
const LENGTH_PREFIX_BYTES: usize = 12;
/// Where the bytes under the checksum begin.
const CRC_START: usize = 21;

const ATTRIBUTE_COMPRESSION: i16 = 0b111;
const ATTRIBUTE_LOG_APPEND_TIME: i16 = 1 << 3;
const ATTRIBUTE_TRANSACTIONAL: i16 = 1 << 4;
const ATTRIBUTE_CONTROL: i16 = 1 << 5;

/// How the records of a batch are compressed. Only `None` can be iterated at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

impl Compression {
    fn from_attributes(attributes: i16) -> Result<Self, BatchError> {
        match attributes & ATTRIBUTE_COMPRESSION {
            0 => Ok(Self::None),
            1 => Ok(Self::Gzip),
            2 => Ok(Self::Snappy),
            3 => Ok(Self::Lz4),
            4 => Ok(Self::Zstd),
            _ => Err(BatchError::Header {
                field: "compression",
                value: i64::from(attributes & ATTRIBUTE_COMPRESSION),
            }),
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who produced a batch, and which of its messages is the first one: what dedupe looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerStamp {
    pub id: i64,
    pub epoch: i16,
    /// Sequence of the first record; the others count up from it, wrapping from `i32::MAX` to 0.
    pub base_sequence: i32,
}

/// Gives the batch the log's time: base and max timestamp become `timestamp_ms`, the
/// LogAppendTime attribute is set, and the checksum is computed anew.
///
/// The leader does this before it proposes, to a batch that has been validated. Bytes that are
/// not exactly one batch are left as they are and `false` is returned.
pub fn stamp(batch: &mut BytesMut, timestamp_ms: u64) -> bool {
    if view::check_frame(batch).is_err() {
        return false;
    }
    // Milliseconds beyond i64::MAX lie 292 million years ahead; the wire has no room for them.
    let timestamp = i64::try_from(timestamp_ms)
        .unwrap_or(i64::MAX)
        .to_be_bytes();
    let attributes = i16::from_be_bytes([batch[21], batch[22]]) | ATTRIBUTE_LOG_APPEND_TIME;
    batch[21..23].copy_from_slice(&attributes.to_be_bytes());
    batch[27..35].copy_from_slice(&timestamp);
    batch[35..43].copy_from_slice(&timestamp);
    let crc = crc32c::crc32c(&batch[CRC_START..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
    true
}

/// Writes the base offset into the first batch of `batch`. It lies outside the checksum, so a
/// stored batch can be given its offset when it is read. Fewer than 8 bytes are left alone.
pub fn patch_base_offset(batch: &mut [u8], base_offset: u64) {
    if let Some(field) = batch.first_chunk_mut::<8>() {
        *field = base_offset.to_be_bytes();
    }
}

#[cfg(test)]
mod tests;
