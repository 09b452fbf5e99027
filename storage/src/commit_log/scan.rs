//! Reading a segment frame by frame, and looking for proof behind a bad place. Never writes.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::format::{ALIGNMENT, FRAME_HEADER, FrameHeader, SEGMENT_HEADER, frame_bytes, u64_at};
use super::frame::{self, Content, Frame, MarkKind};
use super::part::GroupPart;
use super::segment::Segment;
use crate::RaftGroupId;
use crate::mutation::{self, Mutation};
use crate::vfs::VfsFile;

const WINDOW_BYTES: usize = 1 << 20;

/// What a scan from a segment's first frame to its first bad place found.
#[derive(Debug)]
pub(super) struct Scan {
    pub parts: HashMap<RaftGroupId, GroupPart>,
    /// Byte in the file behind the last good frame.
    pub end: u64,
    pub frames: u64,
    /// The largest durable end that the marks before `end` claim.
    pub durable_end: u64,
    /// Newest epoch seen; 0 without frames.
    pub epoch: u32,
    /// The last good frame was a seal: nothing follows.
    pub sealed: bool,
    /// The last good frame was a closing mark.
    pub closed: bool,
    /// What is at `end`.
    pub stop: Stop,
    pub rest: Rest,
    pub bytes_read: u64,
}

impl Scan {
    /// The parts in the order of a sidecar.
    pub fn take_parts(&mut self) -> Vec<(RaftGroupId, Arc<GroupPart>)> {
        let parts = std::mem::take(&mut self.parts).into_iter();
        let mut parts: Vec<_> = parts.map(|(id, part)| (id, Arc::new(part))).collect();
        parts.sort_by_key(|(id, _)| *id);
        parts
    }
}

/// Why the scan ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// Zeroes, the file's end or a seal.
    End,
    Bad(String),
    /// A good frame that this program can't take in: not for recovery to cut away.
    Refused(String),
}

/// What lies behind the end of a scan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rest {
    /// Byte in the file behind the last one that is not zero; 0 if all are.
    pub nonzero_end: u64,
    /// The largest durable end that a good mark there claims.
    pub durable_end: u64,
    /// Byte in the file of the first good frame there.
    pub first_good: Option<u64>,
}

/// Scans a segment. `floor` is the newest epoch before it: an older frame is left over from an
/// earlier life of these bytes.
pub(super) fn scan(file: &dyn VfsFile, segment: &Segment, floor: u32) -> io::Result<Scan> {
    let mut window = Window::new(file, segment)?;
    let mut out = Scan {
        parts: HashMap::new(),
        end: SEGMENT_HEADER,
        frames: 0,
        durable_end: 0,
        epoch: 0,
        sealed: false,
        closed: false,
        stop: Stop::End,
        rest: Rest::default(),
        bytes_read: 0,
    };
    while !out.sealed {
        match window.frame_at(out.end, floor.max(out.epoch))? {
            At::Frame(frame) => {
                if let Err(reason) = take_in(&mut out, &frame) {
                    out.stop = Stop::Refused(reason.to_owned());
                    break;
                }
            }
            At::Nothing => break,
            At::Bad(reason) => {
                out.stop = Stop::Bad(reason);
                break;
            }
            At::Unknown(reason) => {
                out.stop = Stop::Refused(reason);
                break;
            }
        }
    }
    if !out.sealed {
        out.rest = window.search(out.end)?;
    }
    out.bytes_read = window.bytes_read;
    Ok(out)
}

fn take_in(out: &mut Scan, frame: &Frame) -> Result<(), &'static str> {
    out.closed = false;
    if let Content::Mark { mark, durable_end } = frame.content {
        out.durable_end = out.durable_end.max(durable_end);
        out.closed = mark == MarkKind::Closing;
        out.sealed = mark == MarkKind::Seal;
    } else {
        out.parts.entry(frame.group).or_default().apply(
            &frame.content,
            frame.position,
            out.end as u32,
            frame.length,
        )?;
    }
    out.frames += 1;
    out.epoch = frame.epoch;
    out.end += frame_bytes(frame.length as usize);
    Ok(())
}

/// How many of the bytes at a position of the log are whole frames with right checksums.
pub(super) fn good_frames(bytes: &[u8], position: u64) -> usize {
    let mut end = 0;
    while let Some(raw) = bytes[end..].first_chunk::<FRAME_HEADER>() {
        let header = FrameHeader::decode(raw);
        let size = frame_bytes(header.length as usize) as usize;
        let body = end + FRAME_HEADER..end + FRAME_HEADER + header.length as usize;
        if header.position != position + end as u64
            || size > bytes.len() - end
            || frame::checksum(raw, &bytes[body]) != header.crc
        {
            break;
        }
        end += size;
    }
    end
}

enum At {
    Frame(Frame),
    Nothing,
    Bad(String),
    Unknown(String),
}

/// A piece of the file in memory.
struct Window<'a> {
    file: &'a dyn VfsFile,
    base: u64,
    /// Bytes of the file that belong to the segment.
    len: u64,
    at: u64,
    bytes: Vec<u8>,
    bytes_read: u64,
}

impl<'a> Window<'a> {
    fn new(file: &'a dyn VfsFile, segment: &Segment) -> io::Result<Self> {
        Ok(Self {
            file,
            base: segment.base,
            len: file.len()?.min(segment.capacity),
            at: 0,
            bytes: Vec::new(),
            bytes_read: 0,
        })
    }

    /// The bytes `offset..offset + count`, shorter only at the file's end.
    fn get(&mut self, offset: u64, count: usize) -> io::Result<&[u8]> {
        let end = (offset + count as u64).min(self.len);
        if offset < self.at || end > self.at + self.bytes.len() as u64 {
            let wanted = count.max(WINDOW_BYTES) as u64;
            let size = wanted.min(self.len.saturating_sub(offset)) as usize;
            self.bytes.resize(size, 0);
            self.at = offset;
            let got = self.file.read_at(&mut self.bytes, offset)?;
            self.bytes.truncate(got);
            self.bytes_read += got as u64;
        }
        let from = (offset - self.at) as usize;
        let to = self.bytes.len().min(from + count);
        Ok(&self.bytes[from.min(to)..to])
    }

    fn frame_at(&mut self, offset: u64, floor: u32) -> io::Result<At> {
        let mut raw = [0; FRAME_HEADER];
        let bytes = self.get(offset, FRAME_HEADER)?;
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(At::Nothing);
        }
        if bytes.len() < FRAME_HEADER {
            return Ok(At::Bad("the file ends inside a frame".to_owned()));
        }
        raw.copy_from_slice(bytes);
        let header = FrameHeader::decode(&raw);
        if header.position != self.base + offset {
            return Ok(At::Bad("there is no frame of this place".to_owned()));
        }
        let length = header.length as usize;
        if offset + frame_bytes(length) > self.len {
            return Ok(At::Bad("a frame is longer than its segment".to_owned()));
        }
        let body = self.get(offset + FRAME_HEADER as u64, length)?;
        if body.len() < length || frame::checksum(&raw, body) != header.crc {
            return Ok(At::Bad("a frame's checksum is wrong".to_owned()));
        }
        if header.epoch < floor && !mutation::on(Mutation::ReviveStaleTail) {
            return Ok(At::Bad(
                "a frame is left over from an earlier start".to_owned(),
            ));
        }
        Ok(match frame::interpret(&header) {
            Ok(frame) => At::Frame(frame),
            Err(unknown) => At::Unknown(unknown.to_string()),
        })
    }

    /// Looks at every place where a frame could be, from `from` to the end of the file.
    fn search(&mut self, from: u64) -> io::Result<Rest> {
        let mut rest = Rest::default();
        let mut offset = from;
        while offset < self.len {
            let base = self.base;
            let piece = self.get(offset, WINDOW_BYTES)?;
            if piece.is_empty() {
                break;
            }
            let size = piece.len();
            let mut candidates = Vec::new();
            if let Some(last) = piece.iter().rposition(|byte| *byte != 0) {
                rest.nonzero_end = offset + last as u64 + 1;
                for at in (0..size.saturating_sub(FRAME_HEADER - 1)).step_by(ALIGNMENT) {
                    if u64_at(piece, at + 16) == base + offset + at as u64 {
                        candidates.push(offset + at as u64);
                    }
                }
            }
            for candidate in candidates {
                if candidate == from {
                    continue;
                }
                if let At::Frame(frame) = self.frame_at(candidate, 0)? {
                    rest.first_good.get_or_insert(candidate);
                    if let Content::Mark { durable_end, .. } = frame.content {
                        rest.durable_end = rest.durable_end.max(durable_end);
                    }
                }
            }
            // The next piece overlaps, so that a header across the border is seen whole.
            let overlap = if offset + (size as u64) < self.len {
                (FRAME_HEADER - ALIGNMENT) as u64
            } else {
                0
            };
            offset += (size as u64).saturating_sub(overlap).max(1);
        }
        Ok(rest)
    }
}
