use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;
use quorate_storage::batch::{BatchBuilder, RecordInput};
use quorate_storage::derived::DerivedStore;
use quorate_storage::vfs::os::OsVfs;
use tempfile::TempDir;

use super::*;
use crate::broker::queue::entry::AppendBuilder;

const REMEMBER_MS: u64 = 10_000;
const LIMITS: QueueLimits = QueueLimits {
    max_producers: 3,
    max_keys: 3,
    key_window_ms: REMEMBER_MS,
    max_held: 8,
};

pub(in crate::broker::queue) struct Replica {
    pub machine: QueueMachine,
    pub applied: u64,
    checkpoint: Option<(LogId, Vec<u8>)>,
    dir: TempDir,
    pub store: DerivedStore,
}

fn machine_at(path: &Path, store: &DerivedStore) -> QueueMachine {
    let index = Arc::new(QueueIndex::open(Arc::new(OsVfs), path.join("index")).unwrap());
    let shared = QueueShared::new(Arc::clone(&index), Arc::default());
    let held = store.group(quorate_storage::RaftGroupId(1));
    QueueMachine::new(index, shared, held, LIMITS)
}

impl Replica {
    pub(in crate::broker::queue) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = DerivedStore::in_memory();
        let mut machine = machine_at(dir.path(), &store);
        machine.restore(None, None).unwrap();
        Self {
            machine,
            applied: 0,
            checkpoint: None,
            dir,
            store,
        }
    }

    pub(in crate::broker::queue) fn reply(&mut self, body: &Bytes) -> QueueReply {
        self.applied += 1;
        let log_id = LogId::new(1, self.applied);
        let reply = self.machine.apply(log_id, body);
        self.machine.applied_batch(log_id);
        postcard::from_bytes(&reply).unwrap()
    }

    pub(in crate::broker::queue) fn apply(&mut self, body: &Bytes) -> Vec<BatchOutcome> {
        match self.reply(body) {
            QueueReply::Batches(outcomes) => outcomes,
            _ => Vec::new(),
        }
    }

    pub(in crate::broker::queue) fn take_checkpoint(&mut self) -> (LogId, Vec<u8>) {
        let state = self.machine.checkpoint().unwrap();
        let last = LogId::new(1, self.applied);
        self.machine.checkpoint_written(last);
        self.checkpoint = Some((last, state.clone()));
        (last, state)
    }

    /// A process that begins with what is on the disk.
    pub(in crate::broker::queue) fn reopen(&mut self) {
        self.machine = machine_at(self.dir.path(), &self.store);
    }

    /// Restarts from the last checkpoint and applies what came after it again.
    fn restart(self, log: &[Bytes]) -> Self {
        let Replica {
            machine,
            applied,
            checkpoint,
            dir,
            store,
        } = self;
        drop(machine);
        let mut machine = machine_at(dir.path(), &store);
        let from = match &checkpoint {
            Some((last, state)) => {
                machine.restore(Some(*last), Some(state)).unwrap();
                last.index
            }
            None => {
                machine.restore(None, None).unwrap();
                0
            }
        };
        let mut again = Replica {
            machine,
            applied: from,
            checkpoint,
            dir,
            store,
        };
        for body in &log[from as usize..applied as usize] {
            again.apply(body);
        }
        again
    }
}

pub(in crate::broker::queue) fn batch(values: usize, producer: Option<(i64, i16, i32)>) -> Bytes {
    let mut builder = BatchBuilder::new();
    if let Some((id, epoch, sequence)) = producer {
        builder = builder.producer(id, epoch, sequence);
    }
    for _ in 0..values {
        builder.push(RecordInput {
            value: Some(b"v"),
            ..RecordInput::default()
        });
    }
    builder.finish()
}

fn append(stamp_ms: u64, batches: &[(Mark, Bytes)]) -> Bytes {
    let mut builder = AppendBuilder::new(stamp_ms, batches.len(), 0);
    for (mark, batch) in batches {
        assert!(builder.push(mark, None, batch));
    }
    builder.finish()
}

fn forwarded(sequence: u64) -> Mark {
    Mark::Forwarded {
        source: [9; 16],
        sequence,
    }
}

fn keyed(key: u8, fingerprint: u64) -> Mark {
    Mark::Key {
        hash: [key; 16],
        fingerprint,
    }
}

fn plain(stamp_ms: u64, values: usize) -> Bytes {
    append(stamp_ms, &[(Mark::None, batch(values, None))])
}

fn stored(outcome: BatchOutcome) -> (u64, u32) {
    match outcome {
        BatchOutcome::Stored(place) => (place.base_offset, place.count),
        other => panic!("expected a stored batch, got {other:?}"),
    }
}

#[test]
fn offsets_are_dense_over_batches_and_entries() {
    let mut replica = Replica::new();
    let body = append(
        5,
        &[(Mark::None, batch(2, None)), (Mark::None, batch(1, None))],
    );
    let outcomes = replica.apply(&body);
    assert_eq!(stored(outcomes[0]), (0, 2));
    assert_eq!(stored(outcomes[1]), (2, 1));
    assert_eq!(stored(replica.apply(&plain(6, 3))[0]), (3, 3));
    let bounds = replica.machine.shared.bounds();
    assert_eq!((bounds.earliest, bounds.end), (0, 6));
    let record = replica.machine.index.find(2).unwrap().unwrap();
    assert_eq!(
        (record.batch, record.log_index, record.timestamp_ms),
        (1, 1, 5)
    );
}

#[test]
fn log_time_never_goes_back() {
    let mut replica = Replica::new();
    replica.apply(&plain(100, 1));
    replica.apply(&plain(50, 1));
    let record = replica.machine.index.find(1).unwrap().unwrap();
    assert_eq!(record.timestamp_ms, 100);
    assert_eq!(replica.machine.shared.last_stamp_ms(), 100);
}

#[test]
fn a_producers_retry_is_stored_once_across_restart_and_install() {
    let first = append(1, &[(Mark::None, batch(2, Some((9, 0, 0))))]);
    let mut log = vec![first.clone()];
    let mut replica = Replica::new();
    let place = match replica.apply(&first)[0] {
        BatchOutcome::Stored(place) => place,
        other => panic!("{other:?}"),
    };
    replica.take_checkpoint();
    let mut replica = replica.restart(&log);
    assert_eq!(replica.apply(&first), [BatchOutcome::Duplicate(place)]);
    log.push(first.clone());

    replica.take_checkpoint();
    let (last, state) = replica.checkpoint.clone().unwrap();
    let mut newcomer = Replica::new();
    newcomer.machine.install(last, &state).unwrap();
    assert_eq!(newcomer.apply(&first), [BatchOutcome::Duplicate(place)]);
    let bounds = newcomer.machine.shared.bounds();
    assert_eq!((bounds.earliest, bounds.end), (2, 2));
}

#[test]
fn a_fence_entry_refuses_the_old_epoch() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[(Mark::None, batch(1, Some((9, 0, 0))))]));
    replica.apply(&entry::fence(2, 9, 1));
    let old = append(3, &[(Mark::None, batch(1, Some((9, 0, 1))))]);
    assert_eq!(replica.apply(&old), [BatchOutcome::Fenced { current: 1 }]);
}

#[test]
fn idempotency_keys_answer_refuse_reuse_and_expire_by_log_time() {
    let mut replica = Replica::new();
    let request = |stamp, fingerprint| append(stamp, &[(keyed(1, fingerprint), batch(1, None))]);
    let first = replica.apply(&request(1000, 7))[0];
    let (offset, _) = stored(first);
    assert!(matches!(
        replica.apply(&request(2000, 7))[0],
        BatchOutcome::Duplicate(place) if place.base_offset == offset
    ));
    assert_eq!(replica.apply(&request(2000, 8)), [BatchOutcome::KeyReused]);
    let late = replica.apply(&request(1001 + REMEMBER_MS, 7))[0];
    assert_eq!(stored(late), (1, 1));
}

#[test]
fn a_full_key_table_refuses_and_stores_nothing() {
    let mut replica = Replica::new();
    for key in 1..=3 {
        replica.apply(&append(1, &[(keyed(key, 0), batch(1, None))]));
    }
    let fourth = append(1, &[(keyed(4, 0), batch(1, None))]);
    assert_eq!(replica.apply(&fourth), [BatchOutcome::KeysFull]);
    assert_eq!(replica.machine.shared.bounds().end, 3);
}

#[test]
fn an_unreadable_entry_changes_nothing_but_is_answered() {
    let mut replica = Replica::new();
    assert_eq!(
        replica.apply(&Bytes::from_static(b"?")),
        [BatchOutcome::Malformed]
    );
    assert_eq!(replica.machine.shared.bounds().end, 0);
}

#[test]
fn an_index_that_cannot_back_its_checkpoint_is_reported() {
    let mut replica = Replica::new();
    replica.apply(&plain(1, 2));
    replica.take_checkpoint();
    let (last, state) = replica.checkpoint.clone().unwrap();
    replica.machine.index.reset_to(0).unwrap();
    let refused = replica.machine.restore(Some(last), Some(&state));
    assert!(matches!(refused, Err(StorageError::Damaged { .. })));
    replica.machine.restore(None, None).unwrap();
}

#[test]
fn readers_are_woken_once_per_run_of_applies() {
    let mut replica = Replica::new();
    let mut wake = replica.machine.shared.subscribe();
    replica.machine.apply(LogId::new(1, 1), &plain(1, 1));
    assert!(!wake.has_changed().unwrap());
    replica.machine.applied_batch(LogId::new(1, 1));
    assert!(wake.has_changed().unwrap());
    wake.mark_unchanged();
    replica.machine.applied_batch(LogId::new(1, 2));
    assert!(!wake.has_changed().unwrap());
}

#[test]
fn what_a_forwarder_brings_again_is_stored_once_however_late() {
    let mut replica = Replica::new();
    let bring = |stamp, sequence| append(stamp, &[(forwarded(sequence), batch(1, None))]);
    assert!(matches!(
        replica.apply(&bring(1, 0))[..],
        [BatchOutcome::Stored(_)]
    ));
    // Sequences may leave some out: the source decides what goes where.
    assert!(matches!(
        replica.apply(&bring(2, 5))[..],
        [BatchOutcome::Stored(_)]
    ));
    let log = [bring(1, 0), bring(2, 5)];
    replica.take_checkpoint();
    let mut replica = replica.restart(&log);
    for sequence in [0, 3, 5] {
        let late = bring(super::super::dedupe::EXPIRE_AFTER_MS * 9, sequence);
        assert_eq!(replica.apply(&late), [BatchOutcome::AlreadyForwarded]);
    }
    assert_eq!(replica.machine.shared.bounds().end, 2);
}

#[test]
fn a_trim_moves_the_beginning_forward_only_and_not_beyond_the_end() {
    let mut replica = Replica::new();
    replica.apply(&plain(1, 3));
    replica.apply(&plain(2, 3));
    let bounds = |replica: &Replica| {
        let bounds = replica.machine.shared.bounds();
        (bounds.earliest, bounds.end)
    };
    assert_eq!(replica.machine.oldest_needed().unwrap(), 1);
    assert_eq!(replica.apply(&entry::trim(3, 4)), []);
    assert_eq!(bounds(&replica), (4, 6));
    assert!(replica.machine.wants_checkpoint());
    assert!(!replica.machine.wants_checkpoint(), "once");
    // The batch that holds offset 4 is still needed, the one before it is not.
    assert_eq!(replica.machine.oldest_needed().unwrap(), 2);
    replica.apply(&entry::trim(4, 2));
    assert_eq!(bounds(&replica), (4, 6));
    assert!(!replica.machine.wants_checkpoint(), "nothing changed");
    replica.apply(&entry::trim(5, 99));
    assert_eq!(bounds(&replica), (6, 6));
    assert_eq!(replica.machine.oldest_needed().unwrap(), u64::MAX);
    assert_eq!(stored(replica.apply(&plain(6, 1))[0]), (6, 1));
}

#[test]
fn what_a_few_entries_hold_is_in_a_checkpoint_soon() {
    let mut replica = Replica::new();
    replica.machine.limits.max_held = u32::MAX;
    let full = |stamp_ms| {
        let mut builder = AppendBuilder::new(stamp_ms, entry::MAX_BATCHES, 0);
        let hold = entry::Hold::Until { deliver_at_ms: 300 };
        for _ in 0..entry::MAX_BATCHES {
            assert!(builder.push(&Mark::None, Some(&hold), &batch(1, None)));
        }
        builder.finish()
    };
    let mut wanted = 0;
    for stamp_ms in 0..10 {
        replica.apply(&full(stamp_ms));
        wanted += u32::from(replica.machine.wants_checkpoint());
    }
    assert_eq!(wanted, 2, "40,960 batches");
    replica.apply(&plain(11, 3));
    assert!(!replica.machine.wants_checkpoint(), "nothing is held");
}

#[test]
fn a_checkpoint_from_before_a_trim_needs_nothing_that_was_trimmed() {
    let mut log = vec![plain(1, 3), plain(2, 3)];
    let mut replica = Replica::new();
    replica.apply(&log[0]);
    replica.take_checkpoint();
    let (at, old) = replica.checkpoint.clone().unwrap();
    replica.apply(&log[1]);
    log.push(entry::trim(3, 5));
    replica.apply(&log[2]);
    replica.take_checkpoint();
    let hash = replica.machine.state_hash();
    replica.checkpoint = Some((at, old));
    let again = replica.restart(&log);
    assert_eq!(again.machine.state_hash(), hash);
    assert_eq!(again.machine.shared.bounds().earliest, 5);
}

#[derive(Debug, Clone)]
enum Step {
    Entry(Bytes),
    Checkpoint,
    Restart,
    /// A newcomer takes its place: the boundary, then everything after it.
    Replace,
}

fn any_mark(key: u8, number: u64) -> Mark {
    match key {
        0 => Mark::None,
        4 => forwarded(number),
        key => keyed(key, number),
    }
}

fn any_entry() -> impl Strategy<Value = Bytes> {
    let producer = proptest::option::of((0..4i64, 0..2i16, 0..6i32));
    let hold = proptest::option::of(prop_oneof![
        (0..3 * REMEMBER_MS).prop_map(|deliver_at_ms| Hold::Until { deliver_at_ms }),
        (0..3u8, 0..3u32).prop_map(|(id, part)| Hold::Transaction { id: [id; 16], part }),
    ]);
    let one = (0..5u8, 0..2u64, 1..3usize, producer, hold);
    let append_entry = (0..2 * REMEMBER_MS, proptest::collection::vec(one, 1..4)).prop_map(
        |(stamp_ms, batches)| {
            let mut builder = AppendBuilder::new(stamp_ms, batches.len(), 0);
            for (key, number, n, producer, hold) in batches {
                let mark = any_mark(key, number);
                assert!(builder.push(&mark, hold.as_ref(), &batch(n, producer)));
            }
            builder.finish()
        },
    );
    prop_oneof![
        8 => append_entry,
        1 => (0..4i64, 0..3i16).prop_map(|(id, epoch)| entry::fence(1, id, epoch)),
        2 => (0..60u64).prop_map(|offset| entry::trim(1, offset)),
        1 => (0..2 * REMEMBER_MS, 0..4u16).prop_map(|(ms, n)| entry::deliver(ms, n)),
        1 => (0..3u8, any::<bool>()).prop_map(|(id, end)| entry::settle(1, &[id; 16], end, &[])),
        1 => (1..40u64, 0..3u16).prop_map(|(i, n)| entry::cancel(1, LogId::new(1, i), n)),
        1 => (0..2 * REMEMBER_MS, 0..4u16).prop_map(|(ms, n)| entry::deliver(ms, n)),
        1 => (0..3u8, any::<bool>()).prop_map(|(id, end)| entry::settle(1, &[id; 16], end, &[])),
        1 => (1..40u64, 0..3u16).prop_map(|(i, n)| entry::cancel(1, LogId::new(1, i), n)),
        2 => (0..60u64).prop_map(|offset| entry::trim(1, offset)),
        1 => proptest::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any_entry().prop_map(Step::Entry),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Restart),
        1 => Just(Step::Replace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn replicas_agree_whenever_they_checkpoint_and_restart(
        steps in proptest::collection::vec(any_step(), 1..40)
    ) {
        let mut steady = Replica::new();
        let mut shaken = Replica::new();
        let mut log = Vec::new();
        for step in steps {
            match step {
                Step::Entry(body) => {
                    log.push(body.clone());
                    prop_assert_eq!(steady.reply(&body), shaken.reply(&body));
                }
                Step::Checkpoint => drop(shaken.take_checkpoint()),
                Step::Restart => shaken = shaken.restart(&log),
                Step::Replace => {
                    // Only a checkpoint from before everything needed may be its boundary.
                    let needed = shaken.machine.oldest_needed().unwrap();
                    let boundary = shaken.checkpoint.clone();
                    if let Some((last, state)) = boundary.filter(|(last, _)| last.index < needed) {
                        let mut newcomer = Replica::new();
                        newcomer.machine.install(last, &state).unwrap();
                        newcomer.applied = last.index;
                        newcomer.checkpoint = Some((last, state));
                        for body in &log[last.index as usize..] {
                            newcomer.apply(body);
                        }
                        shaken = newcomer;
                    }
                }
            }
            prop_assert_eq!(steady.machine.state_hash(), shaken.machine.state_hash());
        }
        let ends = (steady.machine.index.end_offset(), shaken.machine.index.end_offset());
        prop_assert_eq!(ends.0, ends.1);
        let bounds = (steady.machine.shared.bounds(), shaken.machine.shared.bounds());
        prop_assert_eq!(bounds.0, bounds.1);
        prop_assert_eq!(
            steady.machine.index.find_from(bounds.0.earliest, 1000).unwrap(),
            shaken.machine.index.find_from(bounds.0.earliest, 1000).unwrap()
        );
    }
}
