//! What is held in a queue, and what becomes of it, through every way a replica begins again.

use bytes::Bytes;
use proptest::prelude::*;
use quorate_raft::StateMachine;
use quorate_storage::{LogId, StorageError};

use super::entry::{self, AppendBuilder, Hold, Mark};
use super::held::{END_KEPT_MS, REMEMBER_MS};
use super::state::tests::{Replica, batch};
use super::{BatchOutcome, CancelVerdict, HeldSize, Place, QueueReply, Settled};

fn until(deliver_at_ms: u64) -> Option<Hold> {
    Some(Hold::Until { deliver_at_ms })
}

fn part(id: u8, part: u32) -> Option<Hold> {
    let id = [id; 16];
    Some(Hold::Transaction { id, part })
}

fn append(stamp_ms: u64, holds: &[Option<Hold>]) -> Bytes {
    let batches: Vec<_> = holds.iter().map(|hold| (1, *hold)).collect();
    append_many(stamp_ms, &batches)
}

/// The same with so many messages in each batch.
fn append_many(stamp_ms: u64, batches: &[(usize, Option<Hold>)]) -> Bytes {
    let mut builder = AppendBuilder::new(stamp_ms, batches.len(), 0);
    for (messages, hold) in batches {
        assert!(builder.push(&Mark::None, hold.as_ref(), &batch(*messages, None)));
    }
    builder.finish()
}

/// Entry and batch of what is visible, in the order of the offsets.
fn visible(replica: &Replica) -> Vec<(u64, u16)> {
    let index = replica.machine.index();
    let records = index.find_from(index.first_offset(), 1000).unwrap();
    records.iter().map(|r| (r.log_index, r.batch)).collect()
}

fn held(replica: &Replica) -> u64 {
    held_size(replica).batches
}

fn held_size(replica: &Replica) -> HeldSize {
    replica.machine.shared().held()
}

/// Of batches with so many messages each.
fn size_of(batches: &[usize]) -> HeldSize {
    let bytes = batches.iter().map(|messages| batch(*messages, None).len());
    HeldSize {
        batches: batches.len() as u64,
        messages: batches.iter().sum::<usize>() as u64,
        bytes: bytes.sum::<usize>() as u64,
    }
}

/// Messages that are visible or held.
fn all_messages(replica: &Replica) -> u64 {
    let (bounds, held) = replica.machine.shared().bounds_and_held();
    bounds.end + held.messages
}

fn settle(replica: &mut Replica, stamp_ms: u64, id: u8, commit: bool) -> Settled {
    match replica.reply(&entry::settle(stamp_ms, &[id; 16], commit, &[])) {
        QueueReply::Settled(settled) => settled,
        other => panic!("{other:?}"),
    }
}

fn cancel(replica: &mut Replica, stamp_ms: u64, index: u64, batch: u16) -> CancelVerdict {
    match replica.reply(&entry::cancel(stamp_ms, LogId::new(1, index), batch)) {
        QueueReply::Cancelled(verdict) => verdict,
        other => panic!("{other:?}"),
    }
}

#[test]
fn delayed_batches_come_in_the_order_of_their_times_and_never_early() {
    let mut replica = Replica::new();
    let outcomes = replica.apply(&append(10, &[until(300), None, until(200), until(200)]));
    let BatchOutcome::Held { place, due_ms } = outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(due_ms, Some(300));
    assert_eq!((place.offset(), place.index, place.batch), (None, 1, 0));
    assert_eq!(visible(&replica), [(1, 1)]);
    assert_eq!(held(&replica), 3);
    assert_eq!(replica.machine.shared().next_due_ms(), Some(200));

    replica.reply(&entry::deliver(199, 10));
    assert_eq!(visible(&replica), [(1, 1)]);
    replica.reply(&entry::deliver(250, 1));
    assert_eq!(visible(&replica), [(1, 1), (1, 2)]);
    assert_eq!(replica.machine.shared().next_due_ms(), Some(200));
    replica.reply(&entry::deliver(400, 10));
    assert_eq!(visible(&replica), [(1, 1), (1, 2), (1, 3), (1, 0)]);
    assert_eq!(replica.machine.shared().next_due_ms(), None);
    assert_eq!(held(&replica), 0);
    let record = replica.machine.index().find(3).unwrap().unwrap();
    assert_eq!(record.timestamp_ms, 400, "the time of becoming visible");
}

#[test]
fn another_leaders_fast_clock_makes_nothing_due() {
    let mut replica = Replica::new();
    replica.apply(&append(10, &[until(500)]));
    replica.apply(&append(1_000, &[None]));
    // This leader's own clock is behind.
    replica.reply(&entry::deliver(400, 10));
    assert_eq!(visible(&replica), [(2, 0)]);
    replica.reply(&entry::deliver(500, 10));
    assert_eq!(visible(&replica), [(2, 0), (1, 0)]);
    let record = replica.machine.index().find(1).unwrap().unwrap();
    assert_eq!(record.timestamp_ms, 1_000, "log time never goes back");
}

#[test]
fn a_transaction_becomes_visible_in_the_order_of_its_parts() {
    let mut replica = Replica::new();
    let held_twice = append(1, &[part(7, 1), part(7, 0), part(8, 0), part(7, 0)]);
    let outcomes = replica.apply(&held_twice);
    let BatchOutcome::Held {
        place: first,
        due_ms: None,
    } = outcomes[1]
    else {
        panic!("{outcomes:?}");
    };
    assert_eq!(outcomes[3], BatchOutcome::Duplicate(first));
    assert_eq!(replica.apply(&append(2, &[part(7, 0)])), [outcomes[3]]);
    assert_eq!(visible(&replica), []);

    let settled = settle(&mut replica, 3, 7, true);
    assert_eq!(visible(&replica), [(1, 1), (1, 0)]);
    let places: Vec<_> = settled
        .parts
        .iter()
        .map(|(n, p)| (*n, p.offset()))
        .collect();
    assert_eq!(places, [(0, Some(0)), (1, Some(1))]);
    assert_eq!(
        settled.parts[0].1,
        Place {
            base_offset: 0,
            ..first
        }
    );
    for again in [true, false] {
        assert_eq!(settle(&mut replica, 4, 7, again), settled);
    }
    let late = replica.apply(&append(5, &[part(7, 2)]));
    assert_eq!(late, [BatchOutcome::TransactionEnded]);

    let rolled_back = settle(&mut replica, 6, 8, false);
    assert_eq!(rolled_back, Settled::default());
    assert_eq!((visible(&replica).len(), held(&replica)), (2, 0));
    // One that nothing was prepared of here.
    assert_eq!(settle(&mut replica, 7, 9, true).parts, []);
    let late = replica.apply(&append(8, &[part(9, 0)]));
    assert_eq!(late, [BatchOutcome::TransactionEnded]);
}

#[test]
fn parts_that_were_given_up_are_never_seen() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[part(7, 0), part(7, 1), part(7, 2)]));
    let (last, state) = replica.take_checkpoint();
    let settle = entry::settle(3, &[7; 16], true, &[1, 5]);
    for again in 0..2 {
        if again == 1 {
            replica.reopen();
            replica.machine.restore(Some(last), Some(&state)).unwrap();
            replica.applied = last.index;
        }
        let QueueReply::Settled(settled) = replica.reply(&settle) else {
            panic!("a settlement");
        };
        let parts: Vec<_> = settled.parts.iter().map(|(part, _)| *part).collect();
        assert_eq!(parts, [0, 2]);
        assert_eq!(visible(&replica), [(1, 0), (1, 2)]);
        assert_eq!(held(&replica), 0);
        let late = replica.apply(&append(4, &[part(7, 5)]));
        assert_eq!(late, [BatchOutcome::TransactionEnded]);
    }
}

#[test]
fn an_end_is_remembered_for_its_time_and_a_new_one_counts_after_it() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[part(7, 0)]));
    settle(&mut replica, 10, 7, true);
    let ended = replica.apply(&append(10 + END_KEPT_MS, &[part(7, 0)]));
    assert_eq!(ended, [BatchOutcome::TransactionEnded]);
    let anew = replica.apply(&append(11 + END_KEPT_MS, &[part(7, 0)]));
    assert!(matches!(anew[..], [BatchOutcome::Held { .. }]), "{anew:?}");
    let settled = settle(&mut replica, 12 + END_KEPT_MS, 7, true);
    assert_eq!(settled.parts.len(), 1);
    assert_eq!(visible(&replica), [(1, 0), (4, 0)]);
}

#[test]
fn what_was_held_before_a_forgotten_end_is_there_when_the_end_is_applied_again() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[part(7, 0)]));
    let (last, state) = replica.take_checkpoint();
    let settled = settle(&mut replica, 10, 7, true);
    replica.apply(&append(11 + END_KEPT_MS, &[part(7, 0)]));
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    replica.applied = last.index;
    assert_eq!(settle(&mut replica, 10, 7, true), settled);
    assert_eq!(settled.parts.len(), 1);
}

#[test]
fn a_delayed_batch_is_either_cancelled_or_delivered() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(100), until(200), part(7, 0), None]));
    assert_eq!(cancel(&mut replica, 2, 1, 1), CancelVerdict::Cancelled);
    assert_eq!(cancel(&mut replica, 3, 1, 1), CancelVerdict::Cancelled);
    for batch in [2, 3, 4] {
        assert_eq!(cancel(&mut replica, 3, 1, batch), CancelVerdict::NotHeld);
    }
    let other_term = entry::cancel(3, LogId::new(2, 1), 0);
    let refused = QueueReply::Cancelled(CancelVerdict::NotHeld);
    assert_eq!(replica.reply(&other_term), refused);
    replica.reply(&entry::deliver(300, 10));
    assert_eq!(visible(&replica), [(1, 3), (1, 0)]);
    assert_eq!(cancel(&mut replica, 301, 1, 0), CancelVerdict::NotHeld);
    assert_eq!(cancel(&mut replica, 301, 1, 1), CancelVerdict::Cancelled);
    assert_eq!(held(&replica), 1);
}

#[test]
fn too_much_that_is_held_is_refused_and_the_rest_goes_on() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(100); 8]));
    let outcomes = replica.apply(&append(2, &[until(100), None, part(7, 0)]));
    assert_eq!(outcomes[0], BatchOutcome::HeldFull);
    assert!(matches!(outcomes[1], BatchOutcome::Stored(_)));
    assert_eq!(outcomes[2], BatchOutcome::HeldFull);
    replica.reply(&entry::deliver(100, 1));
    let room = replica.apply(&append(101, &[until(300)]));
    assert!(matches!(room[..], [BatchOutcome::Held { .. }]));
}

#[test]
fn what_is_held_is_counted_in_messages_and_bytes_until_it_is_visible_or_gone() {
    let mut replica = Replica::new();
    let batches = [
        (2, until(100)),
        (7, None),
        (3, until(200)),
        (4, part(7, 0)),
        (5, part(7, 1)),
        (6, part(8, 0)),
    ];
    replica.apply(&append_many(1, &batches));
    assert_eq!(held_size(&replica), size_of(&[2, 3, 4, 5, 6]));
    // A retry is not counted again.
    replica.apply(&append_many(2, &[(6, part(8, 0))]));
    assert_eq!(held_size(&replica), size_of(&[2, 3, 4, 5, 6]));
    assert_eq!(all_messages(&replica), 27);
    let (last, state) = replica.take_checkpoint();
    let restored = held_size(&replica);

    let steps = [
        (entry::deliver(100, 10), vec![3, 4, 5, 6], 27),
        (entry::cancel(101, LogId::new(1, 1), 2), vec![4, 5, 6], 24),
        (entry::cancel(102, LogId::new(1, 1), 2), vec![4, 5, 6], 24),
        (entry::settle(103, &[7; 16], true, &[]), vec![6], 24),
        (entry::settle(104, &[8; 16], false, &[]), vec![], 18),
        (entry::settle(105, &[8; 16], false, &[]), vec![], 18),
    ];
    let go_on = |replica: &mut Replica| {
        for (body, left, all) in &steps {
            replica.reply(body);
            assert_eq!(held_size(replica), size_of(left));
            assert_eq!(all_messages(replica), *all);
        }
    };
    go_on(&mut replica);
    let (empty, all_gone) = replica.take_checkpoint();
    replica.reopen();
    replica
        .machine
        .restore(Some(empty), Some(&all_gone))
        .unwrap();
    assert_eq!(held_size(&replica), HeldSize::default());

    // From the checkpoint before, on this disk and on another one.
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    assert_eq!(held_size(&replica), restored);
    replica.applied = last.index;
    go_on(&mut replica);
    let mut newcomer = Replica::new();
    newcomer.machine.install(last, &state).unwrap();
    assert_eq!(held_size(&newcomer), restored);
    newcomer.applied = last.index;
    go_on(&mut newcomer);

    newcomer.apply(&append_many(200, &[(2, until(300))]));
    newcomer.machine.restore(None, None).unwrap();
    assert_eq!(held_size(&newcomer), HeldSize::default());
}

#[test]
fn what_is_still_needed_of_the_log_counts_what_was_delivered_late() {
    let mut replica = Replica::new();
    let needed = |replica: &mut Replica| replica.machine.oldest_needed().unwrap();
    assert_eq!(needed(&mut replica), u64::MAX);
    replica.apply(&append(1, &[until(100)]));
    replica.apply(&append(2, &[None]));
    assert_eq!(needed(&mut replica), 1, "pending");
    replica.reply(&entry::trim(3, 1));
    assert_eq!(needed(&mut replica), 1);
    replica.reply(&entry::deliver(100, 1));
    replica.apply(&append(101, &[None]));
    assert_eq!(needed(&mut replica), 1, "delivered and visible");
    replica.reply(&entry::trim(102, 2));
    assert_eq!(needed(&mut replica), 1, "its chunk of offsets is not over");
}

#[test]
fn records_that_are_gone_or_too_old_are_noticed() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(100), part(7, 0)]));
    let (last, state) = replica.take_checkpoint();
    replica.store.reset("a test").unwrap();
    replica.reopen();
    let refused = replica.machine.restore(Some(last), Some(&state));
    assert!(matches!(refused, Err(StorageError::Damaged { .. })));
    replica.machine.install(last, &state).unwrap();
    assert_eq!(held(&replica), 2);
    replica.reply(&entry::deliver(100, 1));
    assert_eq!(settle(&mut replica, 101, 7, true).parts.len(), 1);
    assert_eq!(visible(&replica), [(1, 0), (1, 1)]);
}

#[test]
fn a_replica_that_cannot_use_its_records_answers_nothing() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(100)]));
    replica.store.reset("a test").unwrap();
    let reply = replica
        .machine
        .apply(LogId::new(1, 2), &append(2, &[until(5), None]));
    assert!(reply.is_empty());
    assert!(replica.machine.shared().soundness().broken().is_some());
    let reply = replica.machine.apply(LogId::new(1, 3), &append(2, &[None]));
    assert!(reply.is_empty());
    assert_eq!(replica.machine.shared().bounds().end, 0);
    assert!(replica.machine.checkpoint().is_err());
}

#[test]
fn a_queue_that_never_held_anything_lives_on_after_its_store_was_reset() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[None]));
    let (last, state) = replica.take_checkpoint();
    replica.store.reset("a test").unwrap();
    replica.apply(&append(2, &[None]));
    assert!(replica.machine.checkpoint().is_err());
    let broken = replica.machine.shared().soundness().broken();
    assert!(broken.is_some(), "so it is opened again");
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    replica.applied = last.index;
    replica.apply(&append(2, &[None]));
    replica.take_checkpoint();
    assert_eq!(visible(&replica), [(1, 0), (2, 0)]);
}

/// A store in which an installation was cut off after any of its parts.
#[test]
fn an_installation_that_was_cut_off_is_noticed_and_made_again() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(100), part(7, 0), part(8, 0)]));
    settle(&mut replica, 2, 7, true);
    let (last, state) = replica.take_checkpoint();
    let content = replica.machine.held.content().unwrap();
    let pages: Vec<_> = content.pages().collect();
    assert!(pages.len() >= 2, "what is pending, and what has ended");
    for written in 1..=pages.len() {
        let mut newcomer = Replica::new();
        for page in &pages[..written] {
            newcomer.machine.held.install_page(page.clone()).unwrap();
        }
        newcomer.reopen();
        let refused = newcomer.machine.restore(Some(last), Some(&state));
        assert!(matches!(refused, Err(StorageError::Damaged { .. })));
        newcomer.machine.install(last, &state).unwrap();
        newcomer.reopen();
        newcomer.machine.restore(Some(last), Some(&state)).unwrap();
        newcomer.applied = last.index;
        let late = newcomer.apply(&append(3, &[part(7, 1)]));
        assert_eq!(late, [BatchOutcome::TransactionEnded]);
        assert_eq!(settle(&mut newcomer, 4, 8, true).parts.len(), 1);
    }
}

#[test]
fn what_was_cancelled_counts_as_a_record_for_as_long_as_it_is_one() {
    let mut replica = Replica::new();
    let records = |replica: &Replica| replica.machine.held.records();
    replica.apply(&append(1, &[until(100), until(200)]));
    cancel(&mut replica, 2, 1, 0);
    cancel(&mut replica, 2, 1, 0);
    assert_eq!(records(&replica), 2, "one pending, one cancelled");
    let (last, state) = replica.take_checkpoint();
    cancel(&mut replica, 3, 1, 1);
    assert_eq!(records(&replica), 2);
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    replica.applied = last.index;
    assert_eq!(records(&replica), 2);
    cancel(&mut replica, 3, 1, 1);
    let long_after = 4 + REMEMBER_MS;
    replica.apply(&append(long_after, &[None]));
    replica.take_checkpoint();
    replica.apply(&append(long_after, &[None]));
    replica.take_checkpoint();
    replica.apply(&append(long_after, &[until(0)]));
    assert_eq!(records(&replica), 1, "the new one alone");
}

#[test]
fn what_is_over_leaves_no_records_where_nothing_more_is_held() {
    let mut replica = Replica::new();
    // Batches, their times, parts and ends.
    let stored = |replica: &Replica| {
        let group = replica.store.group(quorate_storage::RaftGroupId(1));
        [b"b", b"d", b"p", b"s"].map(|kind| group.scan(kind).unwrap().len())
    };
    let times = [200, 201];
    replica.apply(&append(1, &[until(100); 4]));
    replica.apply(&append(2, &[part(7, 0), part(8, 0), until(1 << 40)]));
    assert_eq!(stored(&replica), [7, 5, 2, 0]);
    replica.reply(&entry::deliver(100, 10));
    settle(&mut replica, 101, 7, true);
    settle(&mut replica, 102, 8, false);
    for time in times {
        replica.apply(&append(time, &[None]));
        replica.take_checkpoint();
    }
    // From here on there are messages alone.
    replica.apply(&append(300, &[None]));
    assert_eq!(stored(&replica), [1, 1, 0, 2]);
    for time in times {
        replica.apply(&append(time + END_KEPT_MS, &[None]));
        replica.take_checkpoint();
    }
    assert_eq!(replica.machine.held.records(), 3);
    replica.apply(&append(300 + END_KEPT_MS, &[None]));
    assert_eq!(replica.machine.held.records(), 1);
    assert_eq!(stored(&replica), [1, 1, 0, 0]);
}

#[test]
fn the_oldest_that_is_pending_is_found_whatever_happens_before_it() {
    let mut replica = Replica::new();
    let oldest = |replica: &mut Replica| replica.machine.held.oldest_index().unwrap();
    assert_eq!(oldest(&mut replica), None);
    for time in 1..=4 {
        replica.apply(&append(time, &[until(100 * time)]));
    }
    assert_eq!(oldest(&mut replica), Some(1));
    let (last, state) = replica.take_checkpoint();
    replica.reply(&entry::deliver(200, 10));
    assert_eq!(oldest(&mut replica), Some(3));
    replica.reply(&entry::deliver(400, 10));
    assert_eq!(oldest(&mut replica), None);
    replica.apply(&append(401, &[until(500)]));
    assert_eq!(oldest(&mut replica), Some(7));
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    assert_eq!(oldest(&mut replica), Some(1));
}

#[test]
fn after_a_restart_nothing_is_due_that_was_cancelled() {
    let mut replica = Replica::new();
    replica.apply(&append(1, &[until(20_000)]));
    assert_eq!(cancel(&mut replica, 2, 1, 0), CancelVerdict::Cancelled);
    let next = replica.machine.shared().next_due_ms();
    assert_eq!(next, None);
    let (last, state) = replica.take_checkpoint();
    replica.reopen();
    replica.machine.restore(Some(last), Some(&state)).unwrap();
    assert_eq!(replica.machine.shared().next_due_ms(), next);
}

#[derive(Debug, Clone)]
enum Step {
    /// Time that passes, and what is appended then: so many messages a batch.
    Append(u64, Vec<(usize, Option<Hold>)>),
    Deliver(u64, u16),
    Settle(u64, u8, bool),
    /// So many entries ago.
    Cancel(u64, u16),
    Trim(u64),
    Checkpoint,
    /// From the newest checkpoint or the one before it.
    Restart(bool),
    /// What is derived is lost with the process.
    Lose,
}

fn any_hold() -> impl Strategy<Value = Option<Hold>> {
    prop_oneof![
        1 => Just(None),
        // In the past too: relative to the steps' own times.
        3 => (0..30_000u64).prop_map(until),
        2 => (0..3u8, 0..3u32).prop_map(|(id, n)| part(id, n)),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let passes =
        prop_oneof![9 => 0..2_000u64, 1 => Just(END_KEPT_MS + 1), 1 => Just(REMEMBER_MS + 1)];
    prop_oneof![
        6 => (passes, proptest::collection::vec((1..4usize, any_hold()), 1..4))
            .prop_map(|(ms, batches)| Step::Append(ms, batches)),
        3 => (0..2_000u64, 0..4u16).prop_map(|(ms, n)| Step::Deliver(ms, n)),
        2 => (0..100u64, 0..3u8, any::<bool>()).prop_map(|(ms, id, c)| Step::Settle(ms, id, c)),
        2 => (1..6u64, 0..3u16).prop_map(|(ago, n)| Step::Cancel(ago, n)),
        1 => (0..3u64).prop_map(Step::Trim),
        3 => Just(Step::Checkpoint),
        2 => any::<bool>().prop_map(Step::Restart),
        1 => Just(Step::Lose),
    ]
}

/// A replica that is shaken, and all that it was told.
struct Shaken {
    replica: Replica,
    log: Vec<(Bytes, QueueReply)>,
    checkpoints: Vec<(LogId, Vec<u8>)>,
}

impl Shaken {
    /// Applies the rest of the log again: the answers must be the same.
    fn catch_up(&mut self) {
        for (body, reply) in &self.log[self.replica.applied as usize..] {
            assert_eq!(self.replica.reply(body), *reply);
        }
    }

    /// As [`quorate_raft`] does it: the newest checkpoint that can be restored, else from nothing.
    fn restart(&mut self, skip: usize) {
        self.replica.reopen();
        let mut restored = 0;
        for (last, state) in self.checkpoints.iter().rev().skip(skip) {
            if self
                .replica
                .machine
                .restore(Some(*last), Some(state))
                .is_ok()
            {
                restored = last.index;
                break;
            }
        }
        if restored == 0 {
            self.replica.machine.restore(None, None).unwrap();
        }
        self.replica.applied = restored;
        self.checkpoints.retain(|(last, _)| last.index <= restored);
        self.catch_up();
    }

    /// Another replica begins with the newest checkpoint.
    fn join(&self) -> Option<Self> {
        let (last, state) = self.checkpoints.last()?;
        let mut joined = Self {
            replica: Replica::new(),
            log: self.log.clone(),
            checkpoints: Vec::new(),
        };
        joined.replica.machine.install(*last, state).unwrap();
        joined.replica.applied = last.index;
        joined.catch_up();
        Some(joined)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn held_batches_come_through_every_beginning(
        steps in proptest::collection::vec(any_step(), 1..50)
    ) {
        let mut steady = Replica::new();
        let mut shaken = Shaken {
            replica: Replica::new(),
            log: Vec::new(),
            checkpoints: Vec::new(),
        };
        let mut now_ms = 0;
        for step in steps {
            let body = match step {
                Step::Append(ms, batches) => {
                    now_ms += ms;
                    Some(append_many(now_ms, &batches))
                }
                Step::Deliver(ms, n) => {
                    now_ms += ms;
                    Some(entry::deliver(now_ms, n))
                }
                Step::Settle(ms, id, commit) => {
                    now_ms += ms;
                    Some(entry::settle(now_ms, &[id; 16], commit, &[2]))
                }
                Step::Cancel(ago, batch) => {
                    let index = steady.applied.saturating_sub(ago);
                    Some(entry::cancel(now_ms, LogId::new(1, index), batch))
                }
                Step::Trim(by) => {
                    let to = steady.machine.shared().bounds().earliest + by;
                    Some(entry::trim(now_ms, to))
                }
                Step::Checkpoint => {
                    shaken.checkpoints.push(shaken.replica.take_checkpoint());
                    None
                }
                Step::Restart(newest) => {
                    shaken.restart(usize::from(!newest));
                    None
                }
                Step::Lose => {
                    shaken.replica.store.reset("a test").unwrap();
                    shaken.restart(0);
                    None
                }
            };
            if let Some(body) = body {
                let before = all_messages(&steady);
                let reply = steady.reply(&body);
                prop_assert_eq!(&shaken.replica.reply(&body), &reply);
                // Its room was taken when it was held.
                match &reply {
                    QueueReply::Delivered(_) => prop_assert_eq!(all_messages(&steady), before),
                    QueueReply::Settled(settled) => {
                        prop_assert!(all_messages(&steady) <= before);
                        prop_assert!(settled.parts.iter().all(|(part, _)| *part != 2));
                    }
                    _ => {}
                }
                shaken.log.push((body, reply));
            }
            prop_assert_eq!(steady.machine.state_hash(), shaken.replica.machine.state_hash());
            prop_assert_eq!(
                steady.machine.shared().next_due_ms(),
                shaken.replica.machine.shared().next_due_ms()
            );
            prop_assert_eq!(held_size(&steady), held_size(&shaken.replica));
            let oldest = [&mut steady, &mut shaken.replica].map(|r| r.machine.held.oldest_index().unwrap());
            prop_assert_eq!(oldest[0], oldest[1]);
        }
        prop_assert_eq!(visible(&steady), visible(&shaken.replica));
        if let Some(joined) = shaken.join() {
            let hash = joined.replica.machine.state_hash();
            prop_assert_eq!(steady.machine.state_hash(), hash);
            prop_assert_eq!(held_size(&steady), held_size(&joined.replica));
        }
        // Everything comes to an end, and nothing is left of any count.
        steady.reply(&entry::deliver(now_ms + 60_000, u16::MAX));
        for id in 0..3 {
            steady.reply(&entry::settle(now_ms + REMEMBER_MS * 2, &[id; 16], false, &[]));
        }
        prop_assert_eq!(held_size(&steady), HeldSize::default());
    }
}
