//! What a frame means, and its way to bytes and back.
//!
//! A frame is tied to its place: its own position is under its checksum, so bytes that were copied,
//! shifted or left over from an earlier use of the file never pass for a frame.

use super::format::{ALIGNMENT, FRAME_HEADER, FRAME_VERSION, FrameHeader};
use super::types::EntryKind;
use crate::{LogId, RaftGroupId, Vote};

/// Why a mark was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MarkKind {
    /// The first frame of every write.
    Begin,
    /// The log went quiet or was closed.
    Closing,
    /// The last frame of a segment.
    Seal,
}

/// The meaning of a frame, without the body of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Entry {
        log_id: LogId,
        kind: EntryKind,
    },
    Vote(Vote),
    /// Entries at `from` and above are gone; `kept` is the last one that stays.
    Truncate {
        from: u64,
        kept: Option<LogId>,
    },
    Purge(LogId),
    /// Everything of the group before this frame is forgotten.
    Remove,
    /// An entry moved to the head by the cleaner; it truncates nothing.
    Relocated {
        log_id: LogId,
        kind: EntryKind,
    },
    /// Everything below `durable_end` had been fsynced when this was written.
    Mark {
        mark: MarkKind,
        durable_end: u64,
    },
}

/// One frame as found on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub epoch: u32,
    pub position: u64,
    pub group: RaftGroupId,
    pub content: Content,
    /// Bytes of the body, without padding.
    pub length: u32,
}

/// Why a header with a good checksum can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unknown {
    #[error("frame version {0} is not known to this program; start the one that wrote it")]
    Version(u8),
    #[error("frame kind {0} with subkind {1} is not known to this program")]
    Kind(u8, u8),
    #[error("frame kind {0} of epoch {1} at index {2}: no log counts that far")]
    Number(u8, u32, u64),
}

const ENTRY: u8 = 1;
const VOTE: u8 = 2;
const TRUNCATE: u8 = 3;
const PURGE: u8 = 4;
const REMOVE: u8 = 5;
const RELOCATED: u8 = 6;
const MARK: u8 = 7;

const VOTED_FOR: u8 = 1;
const COMMITTED: u8 = 2;
const KEPT: u8 = 1;

/// Appends one frame to `buf`, which is written so that this frame lands at `position`.
///
/// The body must be shorter than 4 GiB; [`super::CommitLogConfig`] bounds it far below.
pub(super) fn push(
    buf: &mut Vec<u8>,
    epoch: u32,
    position: u64,
    group: RaftGroupId,
    content: &Content,
    body: &[u8],
) {
    let start = buf.len();
    let (kind, subkind, term, index) = fields(content);
    let header = FrameHeader {
        length: body.len() as u32,
        crc: 0,
        version: FRAME_VERSION,
        kind,
        subkind,
        epoch,
        position,
        group: group.0,
        term,
        index,
    };
    buf.extend_from_slice(&header.encode());
    buf.extend_from_slice(body);
    let crc = crc32c::crc32c(&buf[start + 8..]);
    buf[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    let padded = start + (FRAME_HEADER + body.len()).next_multiple_of(ALIGNMENT);
    buf.resize(padded, 0);
}

/// The checksum that a header and its body should carry.
pub(super) fn checksum(header: &[u8; FRAME_HEADER], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[8..]), body)
}

/// Gives a header, whose checksum the caller has verified, its meaning.
pub(super) fn interpret(header: &FrameHeader) -> Result<Frame, Unknown> {
    if header.version != FRAME_VERSION {
        return Err(Unknown::Version(header.version));
    }
    if !is_countable(header) {
        return Err(Unknown::Number(header.kind, header.epoch, header.index));
    }
    let log_id = LogId::new(header.term, header.index);
    let unknown = Unknown::Kind(header.kind, header.subkind);
    let content = match header.kind {
        ENTRY => Content::Entry {
            log_id,
            kind: entry_kind(header.subkind).ok_or(unknown)?,
        },
        RELOCATED => Content::Relocated {
            log_id,
            kind: entry_kind(header.subkind).ok_or(unknown)?,
        },
        VOTE => Content::Vote(Vote {
            term: header.term,
            voted_for: (header.subkind & VOTED_FOR != 0).then_some(header.index),
            committed: header.subkind & COMMITTED != 0,
        }),
        TRUNCATE => Content::Truncate {
            from: header.index,
            kept: (header.subkind & KEPT != 0)
                .then(|| LogId::new(header.term, header.index.wrapping_sub(1))),
        },
        PURGE => Content::Purge(log_id),
        REMOVE => Content::Remove,
        MARK => Content::Mark {
            mark: match header.subkind {
                0 => MarkKind::Begin,
                1 => MarkKind::Closing,
                2 => MarkKind::Seal,
                _ => return Err(unknown),
            },
            durable_end: header.index,
        },
        _ => return Err(unknown),
    };
    Ok(Frame {
        epoch: header.epoch,
        position: header.position,
        group: RaftGroupId(header.group),
        content,
        length: header.length,
    })
}

/// Whether there is an epoch after this one, an index after an entry's, and one before what a
/// truncation cuts when it keeps something.
fn is_countable(header: &FrameHeader) -> bool {
    let index = match header.kind {
        ENTRY | RELOCATED | PURGE => header.index < u64::MAX,
        TRUNCATE => header.index > 0 || header.subkind & KEPT == 0,
        _ => true,
    };
    index && header.epoch < u32::MAX
}

/// (kind, subkind, term, index) of a content.
fn fields(content: &Content) -> (u8, u8, u64, u64) {
    match *content {
        Content::Entry { log_id, kind } => (ENTRY, kind as u8, log_id.term, log_id.index),
        Content::Relocated { log_id, kind } => (RELOCATED, kind as u8, log_id.term, log_id.index),
        Content::Vote(vote) => {
            let mut flags = 0;
            if vote.voted_for.is_some() {
                flags |= VOTED_FOR;
            }
            if vote.committed {
                flags |= COMMITTED;
            }
            (VOTE, flags, vote.term, vote.voted_for.unwrap_or(0))
        }
        Content::Truncate { from, kept } => match kept {
            Some(kept) => (TRUNCATE, KEPT, kept.term, from),
            None => (TRUNCATE, 0, 0, from),
        },
        Content::Purge(upto) => (PURGE, 0, upto.term, upto.index),
        Content::Remove => (REMOVE, 0, 0, 0),
        Content::Mark { mark, durable_end } => (MARK, mark as u8, 0, durable_end),
    }
}

fn entry_kind(subkind: u8) -> Option<EntryKind> {
    match subkind {
        0 => Some(EntryKind::Blank),
        1 => Some(EntryKind::Command),
        2 => Some(EntryKind::Membership),
        _ => None,
    }
}
