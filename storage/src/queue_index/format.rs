//! The bytes of a queue index file: two header slots, then records of 40 bytes. Little-endian.
//!
//! | bytes | header slot (at 0 and at 512; the valid one with the higher sequence counts) |
//! |---|---|
//! | 0..8 | magic `QRTQIDX1`, the last digit is the version |
//! | 8..16 | sequence of this header; even ones are written to slot 0, odd ones to slot 1 |
//! | 16..24 | start offset: base offset of record 0, or of the first one to come |
//! | 24..32 | first offset: lower ones were trimmed |
//! | 32..40 | ordinal of the record that holds the first offset |
//! | 40..48 | records that were durable before this header was written |
//! | 48..60 | zero |
//! | 60..64 | CRC-32C of bytes 0..60 |
//!
//! | bytes | record n, at 1024 + 40 n |
//! |---|---|
//! | 0..8 | base offset |
//! | 8..16 | Raft log index |
//! | 16..24 | timestamp, ms |
//! | 24..28 | count of messages, never 0 |
//! | 28..30 | ordinal of the batch in its entry |
//! | 30..32 | zero |
//! | 32..36 | low half of n: ties the record to its place |
//! | 36..40 | CRC-32C of bytes 0..36 |

use super::IndexRecord;
use crate::mutation::{self, Mutation};

pub(super) const RECORD_BYTES: usize = 40;
/// Where the records begin.
pub(super) const HEADER_BYTES: u64 = 1024;
pub(super) const SLOT_BYTES: usize = 64;
/// The slots lie in different disk sectors, so that one torn write can't spoil both.
const SLOT_DISTANCE: u64 = 512;
const MAGIC: &[u8; 8] = b"QRTQIDX1";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub sequence: u64,
    pub start_offset: u64,
    pub first_offset: u64,
    pub live_from: u64,
    pub durable: u64,
}

impl Header {
    /// The header of a new file whose `durable` records begin at `start_offset`.
    pub(super) fn new(start_offset: u64, first_offset: u64, durable: u64) -> Self {
        Self {
            sequence: 0,
            start_offset,
            first_offset,
            live_from: 0,
            durable,
        }
    }

    pub(super) fn position(&self) -> u64 {
        self.sequence % 2 * SLOT_DISTANCE
    }

    pub(super) fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(MAGIC);
        let fields = [
            self.sequence,
            self.start_offset,
            self.first_offset,
            self.live_from,
            self.durable,
        ];
        for (field, place) in fields.iter().zip(slot[8..48].chunks_exact_mut(8)) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c::crc32c(&slot[..60]);
        slot[60..].copy_from_slice(&crc.to_le_bytes());
        slot
    }

    fn decode(slot: &[u8]) -> Option<Self> {
        let slot: &[u8; SLOT_BYTES] = slot.first_chunk()?;
        let sound = slot.starts_with(MAGIC) && u32_at(slot, 60) == crc32c::crc32c(&slot[..60]);
        let header = Self {
            sequence: u64_at(slot, 8),
            start_offset: u64_at(slot, 16),
            first_offset: u64_at(slot, 24),
            live_from: u64_at(slot, 32),
            durable: u64_at(slot, 40),
        };
        // Next headers have to be possible; no index uses up half of the numbers.
        (sound && header.sequence < u64::MAX >> 1).then_some(header)
    }

    /// The newest sound header in the first [`HEADER_BYTES`] of a file, or as many as there are.
    pub(super) fn newest(area: &[u8]) -> Option<Self> {
        let second = area.get(SLOT_DISTANCE as usize..).unwrap_or_default();
        [area, second]
            .into_iter()
            .filter_map(Self::decode)
            .max_by_key(|header| header.sequence)
    }
}

pub(super) fn record_position(ordinal: u64) -> u64 {
    HEADER_BYTES + ordinal * RECORD_BYTES as u64
}

pub(super) fn encode_record(out: &mut Vec<u8>, record: &IndexRecord, ordinal: u64) {
    let start = out.len();
    out.extend_from_slice(&record.base_offset.to_le_bytes());
    out.extend_from_slice(&record.log_index.to_le_bytes());
    out.extend_from_slice(&record.timestamp_ms.to_le_bytes());
    out.extend_from_slice(&record.count.to_le_bytes());
    out.extend_from_slice(&record.batch.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&(ordinal as u32).to_le_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// Decodes the 40 bytes of record `ordinal`, or says what is wrong with them.
pub(super) fn decode_record(bytes: &[u8], ordinal: u64) -> Result<IndexRecord, &'static str> {
    let bytes: &[u8; RECORD_BYTES] = bytes.first_chunk().ok_or("the record is cut short")?;
    let sound = u32_at(bytes, 36) == crc32c::crc32c(&bytes[..36]);
    if !sound && !mutation::on(Mutation::ServeBadIndexRecord) {
        return Err("the record's checksum does not match");
    }
    if u32_at(bytes, 32) != ordinal as u32 {
        return Err("the record belongs to another place");
    }
    let record = IndexRecord {
        base_offset: u64_at(bytes, 0),
        log_index: u64_at(bytes, 8),
        timestamp_ms: u64_at(bytes, 16),
        count: u32_at(bytes, 24),
        batch: u16::from_le_bytes([bytes[28], bytes[29]]),
    };
    if record.count == 0
        || record
            .base_offset
            .checked_add(u64::from(record.count))
            .is_none()
    {
        return Err("the record's count is impossible");
    }
    Ok(record)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}
