//! From the files of a stopped log to its state. The only place that cuts the log's end.
//!
//! [`survey`] reads and decides, and changes nothing; [`repair`] does what was decided. The end of the
//! log is the first bad or absent frame of the last segment in use, unless a mark behind it proves that
//! bytes there had been durable: then something was lost that may have been promised, and the log does
//! not open.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::background::SealTask;
use super::format::{SEGMENT_HEADER, SegmentHeader};
use super::index::{Records, Span, Written, memory_spans};
use super::scan::{self, Scan, Stop};
use super::segment::{self, FileKind, Segment, classify, fill_with_zeroes, sidecar_path};
use super::sidecar::{self, Sidecar};
use super::start;
use super::types::{DamagedRange, RecoveryReport, TruncatedTail};
use crate::mutation::{self, Mutation};
use crate::vfs::Vfs;
use crate::{RaftGroupId, StorageError};

/// Bytes are written again in pieces of this size.
const REWRITE_BYTES: usize = 1 << 20;

/// What a survey found, and what is to be done before the log is written again.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    pub groups: HashMap<RaftGroupId, Written>,
    /// In log order.
    pub sealed: Vec<Arc<Segment>>,
    /// Sealed segments whose sidecar is to be written again.
    pub seals: Vec<SealTask>,
    /// The segment to go on in; none: create one at `next_base`.
    pub tail: Option<Tail>,
    pub next_base: u64,
    /// An empty segment behind the tail.
    pub prepared: Option<Arc<Segment>>,
    /// The newest epoch seen.
    pub epoch: u32,
    repairs: Vec<Repair>,
    pub report: RecoveryReport,
}

#[derive(Debug)]
pub(super) struct Tail {
    pub segment: Arc<Segment>,
    /// Byte of the file where the next frame goes.
    pub offset: u64,
    pub closed: bool,
    /// The groups with frames in it.
    pub groups: Vec<RaftGroupId>,
}

#[derive(Debug)]
enum Repair {
    Remove(PathBuf),
    /// Bytes `from..to` were never promised: zero them, and give the file its full size again.
    Wipe {
        segment: Arc<Segment>,
        from: u64,
        to: u64,
    },
    /// Bytes `from..to` are good but perhaps not on the medium: a killed process leaves bytes that
    /// were never synced, and after a failed fsync the system takes them for clean. From here on they
    /// count, so they are written again and synced.
    Rewrite {
        segment: Arc<Segment>,
        from: u64,
        to: u64,
    },
}

/// Reads the log in `dir` without changing anything. Damage is in the report.
pub(super) fn survey(vfs: &dyn Vfs, dir: &Path) -> Result<Recovered, StorageError> {
    let mut survey = Survey {
        vfs,
        dir,
        out: Recovered::default(),
    };
    let mut segments = survey.list()?;
    survey.drop_half_created(&mut segments)?;
    let Some(mut segments) = survey.check_chain(segments)? else {
        return Ok(survey.out);
    };
    survey.out.report.segments = segments.len();
    survey.out.next_base = segments.last().map_or(0, |segment| segment.end());
    let mut open = survey.find_tail(&segments)?;
    segments.truncate(open.sealed);
    for segment in &segments {
        survey.take_sealed(
            segment,
            open.last_sealed.take_if(|(base, _)| *base == segment.base),
        )?;
    }
    survey.take_tail(open)?;
    survey.out.sealed = segments;
    survey.check_groups();
    Ok(survey.out)
}

/// Carries out what a survey decided. Nothing may be damaged.
pub(super) fn repair(vfs: &dyn Vfs, dir: &Path, found: &Recovered) -> Result<(), StorageError> {
    for repair in &found.repairs {
        match repair {
            Repair::Remove(path) => vfs
                .remove(path)
                .map_err(|e| StorageError::io("remove", path, e))?,
            Repair::Wipe { .. } if mutation::on(Mutation::ReviveStaleTail) => {}
            Repair::Wipe { segment, from, to } => {
                let io = |action, e| StorageError::io(action, segment.log.path(), e);
                let file = segment.log.get(vfs)?;
                fill_with_zeroes(&*file, *from, *to).map_err(|e| io("wipe", e))?;
                file.allocate(segment.capacity)
                    .map_err(|e| io("reserve space for", e))?;
                file.sync_all().map_err(|e| io("fsync", e))?;
            }
            Repair::Rewrite { .. } if mutation::on(Mutation::NoRewriteAfterRestart) => {}
            Repair::Rewrite { segment, from, to } => rewrite(vfs, segment, *from, *to)?,
        }
    }
    vfs.sync_dir(dir)
        .map_err(|e| StorageError::io("fsync", dir, e))
}

/// Writes again only what is still good: a wrong byte of this one read must not get onto the disk.
fn rewrite(vfs: &dyn Vfs, segment: &Segment, from: u64, to: u64) -> Result<(), StorageError> {
    let io = |action, e| StorageError::io(action, segment.log.path(), e);
    let file = segment.log.get(vfs)?;
    let mut piece = vec![0; REWRITE_BYTES.min((to - from) as usize)];
    let mut at = from;
    while at < to {
        let size = piece.len().min((to - at) as usize);
        let got = file
            .read_at(&mut piece[..size], at)
            .map_err(|e| io("read", e))?;
        let good = scan::good_frames(&piece[..got], segment.base + at);
        if good > 0 {
            file.write_all_at(&piece[..good], at)
                .map_err(|e| io("write", e))?;
            at += good as u64;
        } else if (size as u64) < to - at {
            // A frame longer than the piece.
            piece.resize((2 * size).min((to - at) as usize), 0);
        } else if at == from && from > SEGMENT_HEADER {
            // A mark that no release wrote: its durable end lies inside a frame.
            return rewrite(vfs, segment, SEGMENT_HEADER, to);
        } else {
            return Err(segment.damaged(at, "a frame that was good has just been read differently"));
        }
    }
    file.sync_data().map_err(|e| io("fsync", e))
}

struct Survey<'a> {
    vfs: &'a dyn Vfs,
    dir: &'a Path,
    out: Recovered,
}

/// A file that may be a segment, or why it is not.
type Candidate = (u64, Result<Arc<Segment>, String>);

/// The segments that are not sealed, and what the scan of them and of the last sealed one gave.
struct OpenFrom {
    /// How many segments are sealed.
    sealed: usize,
    /// In log order: the tail, then empty ones.
    open: Vec<(Arc<Segment>, Scan)>,
    /// The scan of the last sealed segment, by base, if it had no sidecar.
    last_sealed: Option<(u64, Scan)>,
}

impl Survey<'_> {
    fn damage(&mut self, path: &Path, position: u64, reason: impl Into<String>) {
        self.out.report.damaged.push(DamagedRange {
            path: path.to_path_buf(),
            position,
            good_again: None,
            reason: reason.into(),
        });
    }

    fn list(&mut self) -> Result<Vec<Candidate>, StorageError> {
        let listed = self.vfs.list(self.dir);
        let listed = listed.map_err(|e| StorageError::io("list", self.dir, e))?;
        let mut bases = BTreeSet::new();
        let mut sidecars = BTreeSet::new();
        for path in listed {
            match classify(&path) {
                FileKind::Log(base) => drop(bases.insert(base)),
                FileKind::Sidecar(base) => drop(sidecars.insert(base)),
                FileKind::Temporary => self.out.repairs.push(Repair::Remove(path)),
                FileKind::Other => {}
            }
        }
        for base in sidecars.difference(&bases) {
            let path = sidecar_path(self.dir, *base);
            if bases.first().is_some_and(|first| base < first) {
                // Cleaning was interrupted.
                self.out.repairs.push(Repair::Remove(path));
            } else {
                self.damage(&path, 0, "the segment of this sidecar is missing");
            }
        }
        self.check_start(bases.first().copied())?;
        let read = |base| Ok((base, self.read_header(base)?));
        bases.into_iter().map(read).collect()
    }

    /// Only cleaning may remove the first segments, and it says so before.
    fn check_start(&mut self, first: Option<u64>) -> Result<(), StorageError> {
        let path = start::path(self.dir);
        match (start::read(self.vfs, self.dir)?, first) {
            (Err(()), _) => self.damage(&path, 0, "it does not say where the log begins"),
            (Ok(Some(_)), None) => self.damage(&path, 0, "every segment of this log is missing"),
            (Ok(start), Some(first)) if first > start.unwrap_or(0) => {
                let missing = segment::log_path(self.dir, start.unwrap_or(0));
                self.damage(&missing, 0, "the first segment is missing");
            }
            _ => {}
        }
        Ok(())
    }

    fn read_header(&self, base: u64) -> Result<Result<Arc<Segment>, String>, StorageError> {
        let unread = Segment::new(self.dir, SegmentHeader { base, capacity: 0 });
        let io = |action, e| StorageError::io(action, unread.log.path(), e);
        let file = unread.log.get(self.vfs)?;
        let mut bytes = [0; SEGMENT_HEADER as usize];
        let got = file.read_at(&mut bytes, 0).map_err(|e| io("read", e))?;
        if got < bytes.len() {
            return Ok(Err("the segment header is missing".to_owned()));
        }
        Ok(match SegmentHeader::decode(&bytes) {
            Ok(header) if header.base == base => Ok(Arc::new(Segment::new(self.dir, header))),
            Ok(_) => Err("the segment header is that of another segment".to_owned()),
            Err(reason) => Err(reason),
        })
    }

    /// A last file without a header and without a frame never was a segment.
    fn drop_half_created(&mut self, segments: &mut Vec<Candidate>) -> Result<(), StorageError> {
        let Some((base, Err(_))) = segments.last() else {
            return Ok(());
        };
        let capacity = u64::from(u32::MAX) + 1;
        let header = SegmentHeader {
            base: *base,
            capacity,
        };
        let segment = Segment::new(self.dir, header);
        let file = segment.log.get(self.vfs)?;
        let io = |e| StorageError::io("read", segment.log.path(), e);
        let scan = scan::scan(&*file, &segment, 0).map_err(io)?;
        let refused = matches!(scan.stop, Stop::Refused(_));
        if scan.frames == 0 && !refused && scan.rest.first_good.is_none() {
            let path = segment.log.path().to_path_buf();
            self.out.repairs.push(Repair::Remove(path));
            segments.pop();
        }
        Ok(())
    }

    /// The segments, if each begins where the one before it ends.
    fn check_chain(
        &mut self,
        candidates: Vec<Candidate>,
    ) -> Result<Option<Vec<Arc<Segment>>>, StorageError> {
        let mut segments: Vec<Arc<Segment>> = Vec::with_capacity(candidates.len());
        for (base, candidate) in candidates {
            let path = segment::log_path(self.dir, base);
            if let Some(before) = segments.last()
                && before.end() != base
            {
                let reason = format!("the segment at {} before it is missing", before.end());
                self.damage(&path, 0, reason);
            }
            match candidate {
                Ok(segment) => segments.push(segment),
                Err(reason) => {
                    self.damage(&path, 0, reason);
                    return Ok(None);
                }
            }
        }
        Ok(self.out.report.damaged.is_empty().then_some(segments))
    }

    fn scan(&mut self, segment: &Arc<Segment>) -> Result<Scan, StorageError> {
        let file = segment.log.get(self.vfs)?;
        let scan = scan::scan(&*file, segment, 0)
            .map_err(|e| StorageError::io("read", segment.log.path(), e))?;
        self.out.report.segments_scanned += 1;
        self.out.report.bytes_scanned += scan.bytes_read;
        self.out.epoch = self.out.epoch.max(scan.epoch);
        Ok(scan)
    }

    /// Goes back from the last segment to where the log ends.
    fn find_tail(&mut self, segments: &[Arc<Segment>]) -> Result<OpenFrom, StorageError> {
        let mut found = OpenFrom {
            sealed: segments.len(),
            open: Vec::new(),
            last_sealed: None,
        };
        // What later segments prove to have been durable.
        let mut proven = 0;
        for segment in segments.iter().rev() {
            if sidecar::read(self.vfs, segment)?.is_ok() {
                break;
            }
            let scan = self.scan(segment)?;
            if scan.sealed {
                found.last_sealed = Some((segment.base, scan));
                break;
            }
            proven = proven.max(scan.rest.durable_end);
            if let Stop::Refused(reason) = &scan.stop {
                self.damage(segment.log.path(), scan.end, reason.clone());
            } else if proven > segment.base + scan.end
                && !mutation::on(Mutation::TruncateAtAnyBadChecksum)
            {
                self.damage_at_end(segment, &scan);
            }
            found.sealed -= 1;
            let empty = scan.frames == 0;
            found.open.insert(0, (segment.clone(), scan));
            if !empty {
                break;
            }
        }
        Ok(found)
    }

    fn damage_at_end(&mut self, segment: &Segment, scan: &Scan) {
        let what = match &scan.stop {
            Stop::Bad(reason) | Stop::Refused(reason) => reason.as_str(),
            Stop::End => "frames are missing",
        };
        self.out.report.damaged.push(DamagedRange {
            path: segment.log.path().to_path_buf(),
            position: scan.end,
            good_again: scan.rest.first_good,
            reason: format!("{what}, and a later mark shows that these bytes had been fsynced"),
        });
    }

    fn take_sealed(
        &mut self,
        segment: &Arc<Segment>,
        scanned: Option<(u64, Scan)>,
    ) -> Result<(), StorageError> {
        if let Some((_, scan)) = scanned {
            self.take_scan(segment, scan);
            return Ok(());
        }
        match sidecar::read(self.vfs, segment)? {
            Ok(sidecar) => self.take_sidecar(segment, &sidecar),
            Err(reason) => {
                tracing::info!(segment = segment.base, reason, "rebuilding a sidecar");
                let scan = self.scan(segment)?;
                self.take_scan(segment, scan);
                Ok(())
            }
        }
    }

    fn take_sidecar(
        &mut self,
        segment: &Arc<Segment>,
        sidecar: &Sidecar,
    ) -> Result<(), StorageError> {
        let file = segment.log.get(self.vfs)?;
        let len = file
            .len()
            .map_err(|e| StorageError::io("measure", segment.log.path(), e))?;
        segment.log.reopen_later();
        segment.sidecar.reopen_later();
        if segment.base + len < sidecar.data_end {
            self.damage(segment.log.path(), len, "the file is shorter than it was");
        }
        for summary in &sidecar.groups {
            let own = (summary.count > 0).then(|| Span {
                segment: segment.clone(),
                first: summary.part.first,
                last: summary.part.first + summary.count - 1,
                records: Records::Sidecar {
                    at: summary.records_at,
                    first: summary.part.first,
                },
            });
            let group = self.out.groups.entry(summary.group).or_default();
            if !summary.relocated {
                group.absorb(&summary.part);
            } else if let Some(last) = summary.part.last.flatten() {
                group.raise_last(last);
            }
            if let Some(own) = own {
                group.insert(own);
            }
        }
        self.out.epoch = self.out.epoch.max(sidecar.epoch);
        self.out.report.sidecars_used += 1;
        Ok(())
    }

    /// A sealed segment without a sidecar: as if it had been sealed just now.
    fn take_scan(&mut self, segment: &Arc<Segment>, mut scan: Scan) {
        match &scan.stop {
            Stop::Refused(reason) => {
                self.damage(segment.log.path(), scan.end, reason.clone());
            }
            _ if !scan.sealed => self.damage_at_end(segment, &scan),
            _ => {}
        }
        self.plan_rewrite(segment, &scan);
        let parts = scan.take_parts();
        for (id, part) in &parts {
            let group = self.out.groups.entry(*id).or_default();
            group.absorb(part);
            for span in memory_spans(segment, part) {
                group.insert(span);
            }
        }
        self.out.seals.push(SealTask {
            segment: segment.clone(),
            data_end: segment.base + scan.end,
            epoch: scan.epoch,
            parts,
        });
        self.out.report.sidecars_rebuilt += 1;
    }

    fn take_tail(&mut self, found: OpenFrom) -> Result<(), StorageError> {
        for (at, (segment, scan)) in found.open.into_iter().enumerate() {
            if at > 1 {
                self.out
                    .repairs
                    .push(Repair::Remove(segment.log.path().to_path_buf()));
                self.out.report.segments -= 1;
                continue;
            }
            self.plan_wipe(&segment, &scan)?;
            self.plan_rewrite(&segment, &scan);
            if self
                .vfs
                .exists(segment.sidecar.path())
                .map_err(|e| StorageError::io("look for", segment.sidecar.path(), e))?
            {
                let path = segment.sidecar.path().to_path_buf();
                self.out.repairs.push(Repair::Remove(path));
            }
            if at == 1 {
                self.out.prepared = Some(segment);
                continue;
            }
            self.out.tail = Some(Tail {
                segment: segment.clone(),
                offset: scan.end,
                closed: scan.closed || scan.frames == 0,
                groups: scan.parts.keys().copied().collect(),
            });
            for (id, part) in scan.parts {
                let group = self.out.groups.entry(id).or_default();
                group.absorb_active(part, &segment);
            }
        }
        Ok(())
    }

    /// What no mark of the segment proves to be durable is made so.
    fn plan_rewrite(&mut self, segment: &Arc<Segment>, scan: &Scan) {
        let proven = scan.durable_end.saturating_sub(segment.base);
        self.out.repairs.push(Repair::Rewrite {
            segment: segment.clone(),
            from: proven.clamp(SEGMENT_HEADER, scan.end),
            to: scan.end,
        });
    }

    fn plan_wipe(&mut self, segment: &Arc<Segment>, scan: &Scan) -> Result<(), StorageError> {
        let file = segment.log.get(self.vfs)?;
        let len = file
            .len()
            .map_err(|e| StorageError::io("measure", segment.log.path(), e))?;
        let to = scan.rest.nonzero_end.max(scan.end);
        if to == scan.end && len >= segment.capacity {
            return Ok(());
        }
        // What is wiped is gone for good, so one wrong read must not be enough for it.
        if to > scan.end && self.scan(segment)?.end != scan.end {
            let reason = "two reads gave different bytes; nothing was changed";
            return Err(segment.damaged(scan.end, reason));
        }
        self.out.repairs.push(Repair::Wipe {
            segment: segment.clone(),
            from: scan.end,
            to,
        });
        if to > scan.end {
            self.out.report.truncated_tail.get_or_insert(TruncatedTail {
                path: segment.log.path().to_path_buf(),
                position: segment.base + scan.end,
                bytes: to - scan.end,
            });
        }
        Ok(())
    }

    fn check_groups(&mut self) {
        if !self.out.report.damaged.is_empty() {
            return;
        }
        let groups = std::mem::take(&mut self.out.groups);
        for (id, group) in &groups {
            if let Err(reason) = group.check(*id) {
                let dir = self.dir.to_path_buf();
                self.damage(&dir, 0, reason);
            }
        }
        self.out.groups = groups;
    }
}
