//! Offsets of consumer groups that move with a transaction.

use super::*;

#[test]
fn a_held_offset_is_moved_by_its_transaction_alone() {
    let mut machine = Fixture::new();
    let fine = TransactionReply::Held(vec![HoldVerdict::Fine]);
    assert_eq!(machine.commit(0, 3), CommitVerdict::Done);
    let behind = TransactionReply::Held(vec![HoldVerdict::Behind { committed: 3 }]);
    assert_eq!(machine.hold(ID, 0, 2), behind);
    assert_eq!(machine.hold(ID, 0, 5), fine);
    assert_eq!(machine.hold(ID, 0, 5), fine);
    let other = TransactionReply::Held(vec![HoldVerdict::HeldByOther]);
    assert_eq!(machine.hold([8; 16], 0, 6), other);
    assert_eq!(machine.commit(0, 9), CommitVerdict::Held);
    assert_eq!(machine.commit(1, 1), CommitVerdict::Done);
    assert_eq!(machine.committed(), [3, 1]);
    // Another transaction's end is none of its.
    machine.settle_offsets([8; 16], true);
    assert_eq!(machine.commit(0, 9), CommitVerdict::Held);
    for _ in 0..2 {
        machine.settle_offsets(ID, true);
        assert_eq!(machine.committed(), [5, 1]);
    }
    assert_eq!(machine.commit(0, 4), CommitVerdict::Done);
    machine.settle_offsets(ID, true);
    assert_eq!(machine.committed(), [4, 1]);
}

#[test]
fn an_offset_is_moved_from_where_the_work_began_or_not_at_all() {
    let mut machine = Fixture::new();
    let fine = TransactionReply::Held(vec![HoldVerdict::Fine]);
    // Nothing is committed yet.
    assert_eq!(machine.hold_from(ID, 0, Some(4), 7), fine);
    machine.settle_offsets(ID, true);
    for from in [4, 6, 8] {
        let moved = TransactionReply::Held(vec![HoldVerdict::Moved { committed: 7 }]);
        assert_eq!(machine.hold_from([8; 16], 0, Some(from), 9), moved);
    }
    assert_eq!(machine.commit(0, 7), CommitVerdict::Done, "nothing is held");
    assert_eq!(machine.hold_from([8; 16], 0, Some(7), 9), fine);
    assert_eq!(machine.commit(0, 8), CommitVerdict::Held);
}

#[test]
fn a_reset_moves_nothing_while_one_of_its_offsets_is_held() {
    let mut machine = Fixture::new();
    machine.commit(0, 3);
    machine.commit(1, 3);
    machine.hold(ID, 1, 5);
    let at = |queue| QueueOffset {
        topic: 1,
        queue,
        offset: 1,
    };
    let reset = || CoordinatorCommand::Reset {
        group: "g".to_owned(),
        offsets: vec![at(0), at(1)],
        force: false,
    };
    let reply = machine.apply(reset());
    assert!(
        matches!(&reply, CoordinatorReply::Committed(v) if v[1] == CommitVerdict::Held),
        "{reply:?}"
    );
    assert_eq!(machine.committed(), [3, 3]);
    machine.settle_offsets(ID, true);
    machine.apply(reset());
    assert_eq!(machine.committed(), [1, 1]);
}

#[test]
fn a_start_leaves_a_held_offset_to_its_transaction() {
    let mut machine = Fixture::new();
    machine.hold(ID, 0, 5);
    let newcomer = Newcomer {
        id: "m".to_owned(),
        instance_id: None,
        topics: vec!["t".to_owned()],
        tag: None,
        filter: None,
        delivery: Delivery::Cluster,
        start: GroupStart::Latest,
        session_timeout_ms: 1_000,
        strategy: None,
    };
    machine.apply(CoordinatorCommand::Join {
        group: "g".to_owned(),
        newcomer,
        topics: Default::default(),
    });
    let mut begin = |offset| {
        machine.apply(CoordinatorCommand::Begin {
            group: "g".to_owned(),
            instance: None,
            offsets: vec![QueueOffset {
                topic: 1,
                queue: 0,
                offset,
            }],
        })
    };
    assert_eq!(begin(100), CoordinatorReply::Begun(vec![5]));
    assert_eq!(begin(0), CoordinatorReply::Begun(vec![0]));
    assert!(machine.committed().is_empty());
    machine.settle_offsets(ID, true);
    assert_eq!(machine.committed(), [5]);
}

#[test]
fn a_rollback_lets_go_and_a_late_hold_is_refused() {
    let mut machine = Fixture::new();
    machine.hold(ID, 0, 5);
    machine.settle_offsets(ID, false);
    assert_eq!(machine.committed(), [0u64; 0]);
    assert_eq!(machine.commit(0, 1), CommitVerdict::Done);
    assert_eq!(machine.hold(ID, 0, 5), TransactionReply::HoldTooLate);
    // Never prepared here, but over all the same.
    machine.settle_offsets([8; 16], false);
    assert_eq!(machine.hold([8; 16], 0, 5), TransactionReply::HoldTooLate);
    let late = TransactionCommand::HoldOffsets {
        id: [9; 16],
        group: "g".to_owned(),
        offsets: Vec::new(),
        member: None,
        until_ms: machine.now_ms - 1,
    };
    assert_eq!(machine.transact(late), TransactionReply::HoldTooLate);
}

#[test]
fn marks_go_when_no_late_hold_can_come() {
    let mut machine = Fixture::new();
    let marks = |machine: &Fixture| {
        let group = machine.store.group(RaftGroupId(16));
        let marks = group.scan(&records::mark_key("g", &[0; 16])[..4]).unwrap();
        let times = group.scan(records::MARK_TIME_PREFIX).unwrap();
        assert_eq!(marks.len(), times.len());
        marks.len()
    };
    for n in 0..10 {
        machine.settle_offsets([n; 16], false);
    }
    assert_eq!(marks(&machine), 10);
    machine.now_ms += 3_600_000;
    for n in 10..20 {
        machine.settle_offsets([n; 16], false);
    }
    assert_eq!(marks(&machine), 10);
}

#[test]
fn committed_offsets_leave_no_mark() {
    let mut machine = Fixture::new();
    let id = |n: u64| {
        let mut id = [0; 16];
        id[8..].copy_from_slice(&n.to_be_bytes());
        id
    };
    for n in 1..=10_000 {
        machine.hold(id(n), 0, n);
        machine.settle_offsets(id(n), true);
    }
    assert_eq!(machine.committed(), [10_000]);
    let checkpoint = machine.machine.checkpoint().unwrap();
    assert!(checkpoint.len() < 4_096, "{} bytes", checkpoint.len());
    // Told again when others have moved on, it changes nothing.
    machine.settle_offsets(id(7), true);
    assert_eq!(machine.committed(), [10_000]);
}

#[test]
fn a_deleted_group_gets_no_offset_of_an_open_transaction() {
    let mut machine = Fixture::new();
    machine.commit(1, 1);
    machine.hold(ID, 0, 5);
    let group = "g".to_owned();
    machine.apply(CoordinatorCommand::DeleteGroup { group });
    machine.settle_offsets(ID, true);
    assert_eq!(machine.committed(), [0u64; 0]);
    assert_eq!(machine.commit(0, 1), CommitVerdict::Done);
}

#[test]
fn one_bad_offset_holds_none() {
    let mut machine = Fixture::new();
    machine.commit(1, 9);
    let at = |queue, offset| OffsetMove {
        to: QueueOffset {
            topic: 1,
            queue,
            offset,
        },
        from: None,
    };
    let hold = TransactionCommand::HoldOffsets {
        id: ID,
        group: "g".to_owned(),
        offsets: vec![at(0, 1), at(1, 1)],
        member: None,
        until_ms: u64::MAX,
    };
    let expected = vec![HoldVerdict::Fine, HoldVerdict::Behind { committed: 9 }];
    assert_eq!(machine.transact(hold), TransactionReply::Held(expected));
    assert_eq!(machine.commit(0, 3), CommitVerdict::Done);
}
