//! The bytes of a frame header and of a segment header. `docs/format.md` is the same in words.
//!
//! Everything is little-endian. A checksum is CRC-32C over all bytes after itself, so a header whose
//! length was hit is found out by the checksum of the wrong range.

use std::ops::RangeInclusive;

/// Bytes of a frame before its body.
pub(super) const FRAME_HEADER: usize = 48;
/// Bytes at the start of a segment file; the first frame follows.
pub(super) const SEGMENT_HEADER: u64 = 64;
/// Frames start at multiples of this, so that a scan after damage knows where to look.
pub(super) const ALIGNMENT: usize = 8;
pub(super) const FRAME_VERSION: u8 = 1;
/// How long a segment file can be.
pub(super) const SEGMENT_BYTES: RangeInclusive<u64> = 4096..=1 << 32;
/// Where a segment can begin: positions behind it can still be counted.
pub(super) const BASE_MAX: u64 = u64::MAX >> 1;

const SEGMENT_MAGIC: [u8; 8] = *b"QRTE-LOG";
const SEGMENT_VERSION: u32 = 1;

/// The fixed part of every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    /// Bytes of the body, without padding.
    pub length: u32,
    pub crc: u32,
    pub version: u8,
    pub kind: u8,
    pub subkind: u8,
    /// Which opening of the log wrote it; never falls along the log.
    pub epoch: u32,
    /// The frame's own place in the whole log.
    pub position: u64,
    pub group: u64,
    pub term: u64,
    pub index: u64,
}

/// Bytes a frame takes on disk: header, body, padding.
pub(super) const fn frame_bytes(body: usize) -> u64 {
    (FRAME_HEADER + body).next_multiple_of(ALIGNMENT) as u64
}

impl FrameHeader {
    pub fn encode(&self) -> [u8; FRAME_HEADER] {
        let mut out = [0; FRAME_HEADER];
        out[0..4].copy_from_slice(&self.length.to_le_bytes());
        out[4..8].copy_from_slice(&self.crc.to_le_bytes());
        out[8] = self.version;
        out[9] = self.kind;
        out[10] = self.subkind;
        out[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        out[16..24].copy_from_slice(&self.position.to_le_bytes());
        out[24..32].copy_from_slice(&self.group.to_le_bytes());
        out[32..40].copy_from_slice(&self.term.to_le_bytes());
        out[40..48].copy_from_slice(&self.index.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8; FRAME_HEADER]) -> Self {
        Self {
            length: u32_at(bytes, 0),
            crc: u32_at(bytes, 4),
            version: bytes[8],
            kind: bytes[9],
            subkind: bytes[10],
            epoch: u32_at(bytes, 12),
            position: u64_at(bytes, 16),
            group: u64_at(bytes, 24),
            term: u64_at(bytes, 32),
            index: u64_at(bytes, 40),
        }
    }
}

/// What the first bytes of a segment file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    /// Position of the file's first byte in the whole log.
    pub base: u64,
    /// Bytes of the file; the next segment's base is `base + capacity`.
    pub capacity: u64,
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; SEGMENT_HEADER as usize] {
        let mut out = [0; SEGMENT_HEADER as usize];
        out[0..8].copy_from_slice(&SEGMENT_MAGIC);
        out[12..16].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.base.to_le_bytes());
        out[24..32].copy_from_slice(&self.capacity.to_le_bytes());
        let crc = crc32c::crc32c(&out[12..]);
        out[8..12].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8; SEGMENT_HEADER as usize]) -> Result<Self, String> {
        if bytes[0..8] != SEGMENT_MAGIC {
            return Err("the segment header is missing".to_owned());
        }
        if u32_at(bytes, 8) != crc32c::crc32c(&bytes[12..]) {
            return Err("the segment header's checksum is wrong".to_owned());
        }
        let version = u32_at(bytes, 12);
        if version != SEGMENT_VERSION {
            return Err(format!(
                "segment version {version} is not known to this program; start the one that wrote it"
            ));
        }
        let (base, capacity) = (u64_at(bytes, 16), u64_at(bytes, 24));
        let sound = SEGMENT_BYTES.contains(&capacity)
            && capacity.is_multiple_of(ALIGNMENT as u64)
            && base <= BASE_MAX;
        if !sound {
            return Err(format!(
                "the segment header says {capacity} bytes from position {base}: that is no segment"
            ));
        }
        Ok(Self { base, capacity })
    }
}

/// The little-endian u32 at `at`; the caller has checked the length.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

/// The little-endian u64 at `at`; the caller has checked the length.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}
