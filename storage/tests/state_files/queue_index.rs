//! What a queue index called durable is there, what is there is right, and the rest can be made again.

use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use quorate_storage::StorageError;
use quorate_storage::queue_index::{IndexRecord, QueueIndex};
use quorate_storage::vfs::fault::{FaultVfs, Operation};

use crate::{FEW, OPERATIONS, Place, endings, limits};

const PATH: &str = "/data/queues/7.idx";

/// One index as its owner knows it.
#[derive(Debug, Clone, Default)]
struct Model {
    start: u64,
    first: u64,
    records: Vec<IndexRecord>,
    /// How many of the records are durable, and the first offset that is.
    durable: usize,
    durable_first: u64,
}

impl Model {
    fn empty_at(start: u64) -> Self {
        Self {
            start,
            first: start,
            durable_first: start,
            records: Vec::new(),
            durable: 0,
        }
    }

    fn end(&self) -> u64 {
        self.records.last().map_or(self.start, |r| r.end_offset())
    }

    /// The record that comes next; counts and times are uneven.
    fn next(&self) -> IndexRecord {
        let base_offset = self.end();
        IndexRecord {
            base_offset,
            count: 1 + (base_offset / 5 % 3) as u32,
            batch: (base_offset % 2) as u16,
            log_index: base_offset * 10,
            timestamp_ms: base_offset / 8,
        }
    }

    fn truncate(&mut self, end: u64) {
        self.records.retain(|record| record.end_offset() <= end);
        self.durable = self.records.len();
        self.first = self.first.min(self.end());
        self.durable_first = self.first;
    }

    fn first_offsets(&self) -> RangeInclusive<u64> {
        self.durable_first.min(self.first)..=self.durable_first.max(self.first)
    }
}

#[derive(Debug)]
enum Step {
    Append(usize),
    Flush,
    Sync,
    Truncate(u64),
    Trim(u64),
    Reset(u64),
    Create(u64),
    Reopen,
}

fn steps() -> Vec<Step> {
    use Step::*;
    vec![
        Append(10),
        Sync,
        Append(5),
        Flush,
        Append(3),
        Sync,
        Reopen,
        // Into the file, then within the tail; the second one straddles a batch.
        Truncate(21),
        Append(4),
        Sync,
        Append(6),
        Truncate(33),
        Append(2),
        Sync,
        // Into the file through full tails, and the end of a process without a sync.
        Append(230),
        Flush,
        Reopen,
        Sync,
        Append(40),
        Reopen,
        // Little is dead, then more than half.
        Append(1700),
        Sync,
        Trim(30),
        Sync,
        Trim(3600),
        Append(1),
        Sync,
        // Below what was trimmed; a snapshot; an index made anew.
        Truncate(100),
        Append(3),
        Sync,
        Reset(5000),
        Append(12),
        Sync,
        Create(60),
        Append(7),
        Sync,
    ]
}

fn open(vfs: &FaultVfs) -> Result<QueueIndex, StorageError> {
    QueueIndex::open(Arc::new(vfs.clone()), PATH)
}

/// Before the step that did not end, and after it.
#[derive(Debug, Default)]
struct Told {
    before: Model,
    after: Model,
}

fn take(
    step: &Step,
    index: &mut QueueIndex,
    vfs: &FaultVfs,
    told: &mut Told,
) -> Result<(), StorageError> {
    let model = &mut told.after;
    match step {
        Step::Append(count) => {
            for _ in 0..*count {
                index.append(model.next())?;
                model.records.push(model.next());
            }
        }
        Step::Flush => index.flush()?,
        Step::Sync => {
            index.sync()?;
            (model.durable, model.durable_first) = (model.records.len(), model.first);
        }
        Step::Truncate(end) if *end < model.start => {
            *model = Model::empty_at(*end);
            index.truncate_to(*end)?;
        }
        Step::Truncate(end) => {
            model.truncate(*end);
            // Of the tail alone nothing was durable before.
            model.durable = model.durable.min(told.before.durable);
            index.truncate_to(*end)?;
        }
        Step::Trim(offset) => {
            model.first = *offset;
            index.trim_front(*offset)?;
            // Once the dead part is reclaimed, what was trimmed is not there any more.
            let written = index.disk_bytes() < 1024 + 40 * model.records.len() as u64;
            if written {
                let gone = model.records.partition_point(|r| r.end_offset() <= *offset);
                model.start = model.records[gone].base_offset;
                model.records.drain(..gone);
                (model.durable, model.durable_first) = (model.records.len(), *offset);
            }
        }
        Step::Reset(offset) => {
            *model = Model::empty_at(*offset);
            index.reset_to(*offset)?;
        }
        Step::Create(offset) => {
            *model = Model::empty_at(*offset);
            *index = QueueIndex::create_at(Arc::new(vfs.clone()), PATH, *offset)?;
        }
        Step::Reopen => {
            index.flush()?;
            *index = open(vfs)?;
            // Cut back by a wrong read, as the report says: its owner appends again what is missing.
            let end = index.end_offset();
            let missing = model.records.iter().filter(|r| r.base_offset >= end);
            missing
                .copied()
                .try_for_each(|record| index.append(record))?;
        }
    }
    Ok(())
}

fn live(vfs: &FaultVfs) -> (Told, Result<(), StorageError>) {
    let mut told = Told::default();
    let mut index = match open(vfs) {
        Ok(index) => index,
        Err(error) => return (told, Err(error)),
    };
    for step in steps() {
        let taken = take(&step, &mut index, vfs, &mut told);
        if taken.is_err() {
            return (told, taken);
        }
        told.before = told.after.clone();
        let seen = match read(&index) {
            Ok(seen) => seen,
            Err(error) => return (told, Err(error)),
        };
        assert_eq!(seen, visible(&told.before), "{step:?}");
    }
    (told, Ok(()))
}

/// What readers find: first offset, records, end.
type Seen = (u64, Vec<IndexRecord>, u64);

fn read(index: &QueueIndex) -> Result<Seen, StorageError> {
    let first = index.first_offset();
    let records = index.find_from(first, usize::MAX)?;
    Ok((first, records, index.end_offset()))
}

fn visible(model: &Model) -> Seen {
    let from = model
        .records
        .partition_point(|r| r.end_offset() <= model.first);
    (model.first, model.records[from..].to_vec(), model.end())
}

/// Whether a recovered index is a model's, cut anywhere behind its durable records.
fn is_of(seen: &Seen, model: &Model, least: usize) -> bool {
    let (first, records, end) = seen;
    let kept = model.records.partition_point(|r| r.end_offset() <= *end);
    let left = Model {
        first: *first,
        records: model.records[..kept].to_vec(),
        ..model.clone()
    };
    let expected = visible(&left);
    // What is trimmed ahead of the end that is left is trimmed to it.
    let trimmed = model.first_offsets().contains(first) || *first == *end;
    kept >= least && trimmed && expected.1 == *records && expected.2 == *end
}

fn recover(state: &FaultVfs, told: &Told) {
    let index = open(state).expect("open");
    assert!(!index.report().durable_loss, "{:?}", index.report());
    let found = read(&index).expect("read");
    let least = told.before.durable.min(told.after.durable);
    let before = is_of(
        &found,
        &told.before,
        told.before.durable.min(told.after.records.len()),
    );
    let legal = before || is_of(&found, &told.after, least);
    assert!(legal, "{found:?}: {told:?}");
    // The owner appends again what is missing, and is told when that is durable.
    let model = if is_of(&found, &told.after, least) {
        &told.after
    } else {
        &told.before
    };
    let missing = model.records.iter().filter(|r| r.base_offset >= found.2);
    for record in missing {
        index.append(*record).expect("append");
    }
    index.sync().expect("sync");
    let whole = read(&index).expect("read");
    drop(index);
    let index = open(&state.all_unsynced_lost()).expect("open again");
    assert!(!index.report().durable_loss, "{:?}", index.report());
    // Records cut off before a failed fsync may be back; the owner cuts at its checkpoint's end.
    let end = index.truncate_to(whole.2).expect("truncate");
    assert_eq!(end, whole.2);
    let again = read(&index).expect("read");
    assert_eq!(again, whole, "after a second power cut");
}

#[test]
fn every_state_of_every_crash_is_recovered_from() {
    let started = Instant::now();
    let whole = FaultVfs::new();
    live(&whole).1.expect("a life without a fault");
    let mut states = 0;
    for point in 0..=whole.changes() {
        let vfs = FaultVfs::new();
        vfs.halt_after(point);
        let (told, _) = live(&vfs);
        for (number, state) in endings(&vfs, limits()).enumerate() {
            let _place = Place(format!("power lost after {point}, state {number}"));
            recover(&state, &told);
            states += 1;
        }
    }
    let points = whole.changes() + 1;
    println!(
        "queue index: {points} points, {states} states in {:.1?}",
        started.elapsed()
    );
    assert!(states > 200);
}

#[test]
fn every_failing_operation_is_told_and_loses_nothing() {
    let whole = FaultVfs::new();
    live(&whole).1.expect("a life without a fault");
    let mut told_of = 0;
    for operation in OPERATIONS {
        for nth in 1..=whole.count(operation) {
            for kind in [ErrorKind::Other, ErrorKind::StorageFull] {
                let _place = Place(format!("{operation:?} number {nth}, {kind}"));
                let vfs = FaultVfs::new();
                vfs.fail_nth(operation, nth, kind);
                let (told, ended) = live(&vfs);
                if let Err(error) = ended {
                    assert!(matches!(error, StorageError::Io { .. }), "{error}");
                    assert!(error.to_string().contains(" /"), "{error}");
                    told_of += 1;
                }
                for state in endings(&vfs, FEW) {
                    recover(&state, &told);
                }
            }
        }
    }
    assert!(told_of > 40, "{told_of}");
}

#[test]
fn a_wrong_byte_is_never_served() {
    let whole = FaultVfs::new();
    live(&whole).1.expect("a life without a fault");
    let mut damaged = 0;
    for nth in 1..=whole.count(Operation::Read) {
        for at in [9, 35, 999, 30_000] {
            let vfs = FaultVfs::new();
            vfs.flip_nth_read(nth, at);
            let _place = Place(format!("byte {at} of read {nth}"));
            match live(&vfs).1 {
                Ok(()) => {}
                Err(StorageError::Damaged { path, .. }) => {
                    assert_eq!(path, Path::new(PATH));
                    damaged += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(damaged > 10, "{damaged}");
}
