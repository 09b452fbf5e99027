//! The bytes of a block file: pages of 4096 bytes. Little-endian.
//!
//! | bytes | page 0 |
//! |---|---|
//! | 0..8 | magic `QRTKEYS1`, the last digit is the version |
//! | 8..16 | block number n: the offsets n × 65536 up to the next block's |
//! | 16..24, 24..32 | term and index of the last entry that was applied when it was built |
//! | 32..36 | entries |
//! | 36..40 | zero |
//! | 40 + 8 p | hash of the first entry of page p + 1, as many as there are pages; the rest zero |
//! | 4092..4096 | CRC-32C of bytes 0..4092 |
//!
//! | bytes | page p + 1 |
//! |---|---|
//! | 12 k | hash of entry 340 p + k (8), its offset in the block (4); sorted by both; the rest zero |
//! | 4080..4084 | p + 1: ties the page to its place |
//! | 4084..4092 | block number |
//! | 4092..4096 | CRC-32C of bytes 0..4092 |

use super::{BLOCK_OFFSETS, KeyEntry};
use crate::LogId;

pub(super) const PAGE_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"QRTKEYS1";
const ENTRY_BYTES: usize = 12;
const CRC_AT: usize = PAGE_BYTES - 4;
const BLOCK_AT: usize = CRC_AT - 8;
const NUMBER_AT: usize = BLOCK_AT - 4;
const ENTRIES_PER_PAGE: usize = NUMBER_AT / ENTRY_BYTES;
const FENCES_AT: usize = 40;

// A full block's fences fit into page 0.
const _: () =
    assert!(FENCES_AT + (BLOCK_OFFSETS as usize).div_ceil(ENTRIES_PER_PAGE) * 8 <= CRC_AT);

/// Page 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub block: u64,
    pub built_at: LogId,
    pub entries: u32,
    /// The first hash of every page.
    pub fences: Vec<u64>,
}

type Page = [u8; PAGE_BYTES];

/// The whole file. `entries` are sorted, and at most one per offset of the block.
pub(super) fn encode(block: u64, built_at: LogId, entries: &[KeyEntry]) -> Vec<u8> {
    let pages = entries.chunks(ENTRIES_PER_PAGE);
    let mut head = [0; PAGE_BYTES];
    head[..8].copy_from_slice(MAGIC);
    for (at, field) in [(8, block), (16, built_at.term), (24, built_at.index)] {
        head[at..at + 8].copy_from_slice(&field.to_le_bytes());
    }
    head[32..36].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    for (fence, page) in head[FENCES_AT..CRC_AT]
        .chunks_exact_mut(8)
        .zip(pages.clone())
    {
        let first = page.first().map_or(0, |entry| entry.hash);
        fence.copy_from_slice(&first.to_le_bytes());
    }
    seal(&mut head);
    let mut file = Vec::with_capacity((1 + pages.len()) * PAGE_BYTES);
    file.extend_from_slice(&head);
    for (entries, number) in pages.zip(1u32..) {
        let mut page = [0; PAGE_BYTES];
        for (entry, place) in entries.iter().zip(page.chunks_exact_mut(ENTRY_BYTES)) {
            place[..8].copy_from_slice(&entry.hash.to_le_bytes());
            place[8..].copy_from_slice(&((entry.offset % BLOCK_OFFSETS) as u32).to_le_bytes());
        }
        page[NUMBER_AT..BLOCK_AT].copy_from_slice(&number.to_le_bytes());
        page[BLOCK_AT..CRC_AT].copy_from_slice(&block.to_le_bytes());
        seal(&mut page);
        file.extend_from_slice(&page);
    }
    file
}

fn seal(page: &mut Page) {
    let crc = crc32c::crc32c(&page[..CRC_AT]);
    page[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

fn sound(bytes: &[u8]) -> Result<&Page, &'static str> {
    let page: &Page = bytes.try_into().map_err(|_| "the page is cut short")?;
    match u32_at(page, CRC_AT) == crc32c::crc32c(&page[..CRC_AT]) {
        true => Ok(page),
        false => Err("the page's checksum does not match"),
    }
}

pub(super) fn decode_head(bytes: &[u8], block: u64) -> Result<Head, &'static str> {
    let page = sound(bytes)?;
    if !page.starts_with(MAGIC) {
        return Err("it is not a block of keys of this version");
    }
    let head = Head {
        block: u64_at(page, 8),
        built_at: LogId {
            term: u64_at(page, 16),
            index: u64_at(page, 24),
        },
        entries: u32_at(page, 32),
        fences: Vec::new(),
    };
    if head.block != block {
        return Err("it is another block");
    }
    if u64::from(head.entries) > BLOCK_OFFSETS {
        return Err("it says that it has more keys than offsets");
    }
    let pages = (head.entries as usize).div_ceil(ENTRIES_PER_PAGE);
    let fences = (0..pages)
        .map(|p| u64_at(page, FENCES_AT + 8 * p))
        .collect();
    Ok(Head { fences, ..head })
}

/// The entries of page `number`, from 1.
pub(super) fn decode_page(
    bytes: &[u8],
    head: &Head,
    number: usize,
) -> Result<Vec<KeyEntry>, &'static str> {
    let page = sound(bytes)?;
    if u32_at(page, NUMBER_AT) as usize != number || u64_at(page, BLOCK_AT) != head.block {
        return Err("the page belongs to another place");
    }
    let before = (number - 1) * ENTRIES_PER_PAGE;
    let here = (head.entries as usize)
        .saturating_sub(before)
        .min(ENTRIES_PER_PAGE);
    let base = head.block.saturating_mul(BLOCK_OFFSETS);
    let entry = |k: usize| {
        let within = u64::from(u32_at(page, k * ENTRY_BYTES + 8));
        (within < BLOCK_OFFSETS).then(|| KeyEntry {
            hash: u64_at(page, k * ENTRY_BYTES),
            offset: base.saturating_add(within),
        })
    };
    let entries: Option<Vec<_>> = (0..here).map(entry).collect();
    entries.ok_or("an entry names an offset outside of its block")
}

fn u32_at(bytes: &Page, at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &Page, at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
