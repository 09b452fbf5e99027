//! The sidecar of a sealed segment: per group a summary, and one for each run of entries that the
//! cleaner moved there; then one record an entry.
//!
//! Opening the log reads the summaries only; a lookup reads one record. A sidecar is derived: when it
//! is missing or bad its segment is scanned and it is written again, byte for byte the same.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::format::{u32_at, u64_at};
use super::part::{EntryRef, EntryRun, GroupPart};
use super::segment::{Segment, temporary_path};
use crate::vfs::Vfs;
use crate::{LogId, RaftGroupId, StorageError, Vote};

/// Bytes of one entry's record.
pub(super) const RECORD_BYTES: u64 = 32;
const HEADER_BYTES: usize = 64;
const SUMMARY_BYTES: usize = 128;
const MAGIC: [u8; 8] = *b"QRTE-IDX";
const VERSION: u32 = 1;

const REMOVED: u32 = 1;
const HAS_VOTE: u32 = 2;
const HAS_VOTED_FOR: u32 = 4;
const VOTE_COMMITTED: u32 = 8;
const HAS_PURGED: u32 = 16;
const SAYS_LAST: u32 = 32;
const HAS_LAST: u32 = 64;
const RELOCATED: u32 = 128;

/// What a sidecar says without its records.
#[derive(Debug)]
pub(super) struct Sidecar {
    /// Position behind the segment's last frame.
    pub data_end: u64,
    /// The newest epoch among the segment's frames.
    pub epoch: u32,
    pub groups: Vec<Summary>,
}

/// One group's part without its entries, and where their records are.
#[derive(Debug)]
pub(super) struct Summary {
    pub group: RaftGroupId,
    /// `entries` is empty here; `first` is set.
    pub part: GroupPart,
    /// Its entries were moved here; it says nothing else, and follows the group's own summary.
    pub relocated: bool,
    pub count: u64,
    /// Byte in the sidecar of the first record.
    pub records_at: u64,
}

/// Where the records of each run of each part of a written sidecar begin, in the order of the parts.
pub(super) type Places = Vec<Vec<u64>>;

/// Writes a segment's sidecar durably under its name. `parts` must be sorted by group.
pub(super) fn write(
    vfs: &dyn Vfs,
    dir: &Path,
    segment: &Segment,
    data_end: u64,
    epoch: u32,
    parts: &[(RaftGroupId, Arc<GroupPart>)],
) -> Result<Places, StorageError> {
    let (bytes, places) = encode(segment, data_end, epoch, parts);
    let path = segment.sidecar.path();
    let temporary = temporary_path(path);
    let io = |action, e| StorageError::io(action, path, e);
    if vfs.exists(&temporary).map_err(|e| io("look for", e))? {
        vfs.remove(&temporary).map_err(|e| io("remove", e))?;
    }
    let file = vfs.create(&temporary).map_err(|e| io("create", e))?;
    file.write_all_at(&bytes, 0).map_err(|e| io("write", e))?;
    file.sync_all().map_err(|e| io("fsync", e))?;
    vfs.rename(&temporary, path).map_err(|e| io("rename", e))?;
    vfs.sync_dir(dir)
        .map_err(|e| StorageError::io("fsync", dir, e))?;
    segment.sidecar.reopen_later();
    Ok(places)
}

fn encode(
    segment: &Segment,
    data_end: u64,
    epoch: u32,
    parts: &[(RaftGroupId, Arc<GroupPart>)],
) -> (Vec<u8>, Places) {
    let runs = |part: &Arc<GroupPart>| (0..part.runs()).collect::<Vec<_>>();
    let length = |part: &GroupPart, run| part.run(run).1.len();
    let summaries: usize = parts.iter().map(|(_, part)| part.runs()).sum();
    let of_part = |part: &Arc<GroupPart>| runs(part).iter().map(|run| length(part, *run)).sum();
    let entries: usize = parts
        .iter()
        .map(|(_, part)| -> usize { of_part(part) })
        .sum();
    let records_from = HEADER_BYTES + summaries * SUMMARY_BYTES;
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.reserve_exact(records_from - HEADER_BYTES + entries * RECORD_BYTES as usize);
    let mut places = Vec::with_capacity(parts.len());
    let mut at = records_from as u64;
    for (group, part) in parts {
        let mut of_runs = Vec::with_capacity(part.runs());
        for run in 0..part.runs() {
            of_runs.push(at);
            bytes.extend_from_slice(&match run {
                0 => encode_summary(*group, part, at),
                run => encode_relocated(*group, &part.relocated[run - 1], at),
            });
            at += length(part, run) as u64 * RECORD_BYTES;
        }
        places.push(of_runs);
    }
    let checksum = crc32c::crc32c(&bytes[HEADER_BYTES..]);
    for (_, part) in parts {
        for run in 0..part.runs() {
            let (first, entries) = part.run(run);
            for (index, entry) in (first..).zip(entries) {
                bytes.extend_from_slice(&encode_record(index, entry));
            }
        }
    }
    bytes[0..8].copy_from_slice(&MAGIC);
    bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&segment.base.to_le_bytes());
    bytes[24..32].copy_from_slice(&data_end.to_le_bytes());
    bytes[32..40].copy_from_slice(&(entries as u64).to_le_bytes());
    bytes[40..44].copy_from_slice(&(summaries as u32).to_le_bytes());
    bytes[44..48].copy_from_slice(&epoch.to_le_bytes());
    bytes[48..52].copy_from_slice(&checksum.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[12..HEADER_BYTES]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    (bytes, places)
}

/// Reads a sidecar's header and summaries. The inner error says why the file can't be used.
pub(super) fn read(
    vfs: &dyn Vfs,
    segment: &Segment,
) -> Result<Result<Sidecar, &'static str>, StorageError> {
    let path = segment.sidecar.path();
    let io = |action, e| StorageError::io(action, path, e);
    if !vfs.exists(path).map_err(|e| io("look for", e))? {
        return Ok(Err("missing"));
    }
    let file = segment.sidecar.get(vfs)?;
    let mut header = [0; HEADER_BYTES];
    let got = file.read_at(&mut header, 0).map_err(|e| io("read", e))?;
    if got < HEADER_BYTES || header[0..8] != MAGIC {
        return Ok(Err("no header"));
    }
    if u32_at(&header, 8) != crc32c::crc32c(&header[12..])
        || u32_at(&header, 12) != VERSION
        || u64_at(&header, 16) != segment.base
    {
        return Ok(Err("bad header"));
    }
    let (data_end, epoch) = (u64_at(&header, 24), u32_at(&header, 44));
    if !(segment.base..=segment.end()).contains(&data_end) || epoch == u32::MAX {
        return Ok(Err("bad header"));
    }
    let count = u32_at(&header, 40) as usize;
    let records_from = (HEADER_BYTES + count * SUMMARY_BYTES) as u64;
    let expected = u64_at(&header, 32)
        .checked_mul(RECORD_BYTES)
        .and_then(|records| records.checked_add(records_from));
    let len = file.len().map_err(|e| io("measure", e))?;
    if expected != Some(len) {
        return Ok(Err("wrong length"));
    }
    let mut bytes = vec![0; count * SUMMARY_BYTES];
    let got = file
        .read_at(&mut bytes, HEADER_BYTES as u64)
        .map_err(|e| io("read", e))?;
    if got < bytes.len() || u32_at(&header, 48) != crc32c::crc32c(&bytes) {
        return Ok(Err("bad summaries"));
    }
    let (groups, _) = bytes.as_chunks::<SUMMARY_BYTES>();
    let groups: Vec<Summary> = groups.iter().map(decode_summary).collect();
    let sound = |summary: &Summary| summary.is_sound(&(records_from..len));
    if !groups.iter().all(sound) {
        return Ok(Err("bad summaries"));
    }
    Ok(Ok(Sidecar {
        data_end,
        epoch,
        groups,
    }))
}

impl Summary {
    /// Whether the records lie where records are, and no index is beyond what can be counted.
    fn is_sound(&self, records: &Range<u64>) -> bool {
        let end = self
            .count
            .checked_mul(RECORD_BYTES)
            .and_then(|bytes| bytes.checked_add(self.records_at));
        let placed = end.is_some_and(|end| end <= records.end)
            && (self.count == 0 || self.records_at >= records.start);
        let named = [self.part.last.flatten(), self.part.purged.map(|(id, _)| id)];
        placed
            && self.part.first.checked_add(self.count).is_some()
            && named.iter().flatten().all(|id| id.index < u64::MAX)
    }
}

/// Reads `count` records from byte `at`, the first of them that of Raft index `first`.
/// The inner error says that a record is bad.
pub(super) fn read_records(
    vfs: &dyn Vfs,
    segment: &Segment,
    at: u64,
    first: u64,
    count: usize,
) -> Result<Result<Vec<EntryRef>, u64>, StorageError> {
    let file = segment.sidecar.get(vfs)?;
    let mut bytes = vec![0; count * RECORD_BYTES as usize];
    let got = file
        .read_at(&mut bytes, at)
        .map_err(|e| StorageError::io("read", segment.sidecar.path(), e))?;
    let (records, _) = bytes[..got].as_chunks::<{ RECORD_BYTES as usize }>();
    let mut out = Vec::with_capacity(records.len());
    for (index, record) in (first..).zip(records) {
        match decode_record(record, index) {
            Some(entry) if entry.is_within(segment) => out.push(entry),
            _ => return Ok(Err(at + (index - first) * RECORD_BYTES)),
        }
    }
    if out.len() < count {
        return Ok(Err(at + got as u64));
    }
    Ok(Ok(out))
}

fn encode_record(index: u64, entry: &EntryRef) -> [u8; RECORD_BYTES as usize] {
    let mut out = [0; RECORD_BYTES as usize];
    out[4..8].copy_from_slice(&entry.offset.to_le_bytes());
    out[8..12].copy_from_slice(&entry.length.to_le_bytes());
    out[16..24].copy_from_slice(&entry.term.to_le_bytes());
    out[24..32].copy_from_slice(&index.to_le_bytes());
    let crc = crc32c::crc32c(&out[4..]);
    out[0..4].copy_from_slice(&crc.to_le_bytes());
    out
}

fn decode_record(bytes: &[u8; RECORD_BYTES as usize], index: u64) -> Option<EntryRef> {
    let good = u32_at(bytes, 0) == crc32c::crc32c(&bytes[4..]) && u64_at(bytes, 24) == index;
    good.then(|| EntryRef {
        term: u64_at(bytes, 16),
        offset: u32_at(bytes, 4),
        length: u32_at(bytes, 8),
    })
}

fn encode_summary(group: RaftGroupId, part: &GroupPart, records_at: u64) -> [u8; SUMMARY_BYTES] {
    let mut out = [0; SUMMARY_BYTES];
    let mut flags = 0;
    let mut put = |at: usize, value: u64| out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    if part.removed {
        flags |= REMOVED;
    }
    put(0, group.0);
    put(16, part.cut_from);
    if let Some((vote, position)) = part.vote {
        flags |= HAS_VOTE;
        put(24, vote.term);
        if let Some(replica) = vote.voted_for {
            flags |= HAS_VOTED_FOR;
            put(32, replica);
        }
        if vote.committed {
            flags |= VOTE_COMMITTED;
        }
        put(40, position);
    }
    if let Some((upto, position)) = part.purged {
        flags |= HAS_PURGED;
        put(48, upto.term);
        put(56, upto.index);
        put(64, position);
    }
    if let Some(last) = part.last {
        flags |= SAYS_LAST;
        if let Some(last) = last {
            flags |= HAS_LAST;
            put(72, last.term);
            put(80, last.index);
        }
    }
    put(88, part.first);
    put(96, part.entries.len() as u64);
    put(104, records_at);
    out[8..12].copy_from_slice(&flags.to_le_bytes());
    out
}

/// The summary of a run that was moved here: it does nothing else to the group.
fn encode_relocated(group: RaftGroupId, run: &EntryRun, records_at: u64) -> [u8; SUMMARY_BYTES] {
    let said = GroupPart {
        last: Some(run.last()),
        first: run.first,
        ..GroupPart::default()
    };
    let mut out = encode_summary(group, &said, records_at);
    out[8..12].copy_from_slice(&(RELOCATED | SAYS_LAST | HAS_LAST).to_le_bytes());
    out[96..104].copy_from_slice(&(run.entries.len() as u64).to_le_bytes());
    out
}

fn decode_summary(bytes: &[u8; SUMMARY_BYTES]) -> Summary {
    let flags = u32_at(bytes, 8);
    let has = |flag: u32| flags & flag != 0;
    let get = |at: usize| u64_at(bytes, at);
    let vote = Vote {
        term: get(24),
        voted_for: has(HAS_VOTED_FOR).then(|| get(32)),
        committed: has(VOTE_COMMITTED),
    };
    let last = has(HAS_LAST).then(|| LogId::new(get(72), get(80)));
    Summary {
        group: RaftGroupId(get(0)),
        part: GroupPart {
            removed: has(REMOVED),
            cut_from: get(16),
            vote: has(HAS_VOTE).then(|| (vote, get(40))),
            purged: has(HAS_PURGED).then(|| (LogId::new(get(48), get(56)), get(64))),
            last: has(SAYS_LAST).then_some(last),
            first: get(88),
            entries: Default::default(),
            relocated: Vec::new(),
        },
        relocated: has(RELOCATED),
        count: get(96),
        records_at: get(104),
    }
}
