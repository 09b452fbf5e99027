//! What becomes of leases, of the dead, and of what a group leaves behind.

use std::collections::BTreeSet;

use super::*;

#[test]
fn dead_letters_are_numbered_in_the_order_of_their_death() {
    let mut one = One::new();
    let policy = RetryPolicy {
        max_deliveries: 1,
        backoff_ms: vec![0],
    };
    one.ask(LeaseCommand::SetPolicy(policy));
    let held = one.lease(3, 3);
    let nack = |receipt: Receipt| LeaseCommand::Nack {
        receipts: vec![receipt],
        delay_ms: None,
    };
    for _ in 0..2 {
        let verdicts = LeaseReply::Receipts(vec![ReceiptVerdict::Done]);
        assert_eq!(one.ask(nack(held[2])), verdicts);
    }
    one.now_ms += 5_000;
    assert_eq!(one.ask(LeaseCommand::Expire), LeaseReply::Done);
    let letters = one.replica.machine.view().dead_letters(GROUP, 10).unwrap();
    let found: Vec<_> = letters
        .iter()
        .map(|(n, l)| (*n, l.offset, l.reason))
        .collect();
    assert_eq!(
        found,
        [
            (0, 2, DeathReason::Nacked),
            (1, 0, DeathReason::LeaseExpired),
            (2, 1, DeathReason::LeaseExpired)
        ]
    );
    let ack = LeaseCommand::Ack {
        receipts: vec![held[0]],
        through: None,
    };
    let ended = LeaseReply::Receipts(vec![ReceiptVerdict::Ended]);
    assert_eq!(one.ask(ack), ended);
    assert_eq!(one.committed(), 0);
    one.dead_lettered(1);
    assert_eq!(one.committed(), 1);
    one.dead_lettered(2);
    assert_eq!(one.committed(), 3);
    let view = one.replica.machine.view();
    assert!(view.groups_with_dead_letters().unwrap().is_empty());
}

#[test]
fn a_second_nack_of_the_same_delivery_changes_nothing() {
    let mut one = One::new();
    let held = one.lease(1, 1);
    let nack = |delay_ms| LeaseCommand::Nack {
        receipts: vec![held[0]],
        delay_ms: Some(delay_ms),
    };
    let done = LeaseReply::Receipts(vec![ReceiptVerdict::Done]);
    assert_eq!(one.ask(nack(1_000)), done);
    one.now_ms += 500;
    assert_eq!(one.ask(nack(0)), done);
    assert_eq!(one.ask(nack(60_000)), done);
    assert!(one.lease(1, 1).iter().all(|r| r.offset != 0));
    one.now_ms += 500;
    assert_eq!(offsets(&one.lease(1, 1)), [0]);
    let ended = LeaseReply::Receipts(vec![ReceiptVerdict::Ended]);
    assert_eq!(one.ask(nack(0)), ended);
}

#[test]
fn a_seek_keeps_the_dead_and_forgets_the_rest() {
    let mut one = One::new();
    let policy = RetryPolicy {
        max_deliveries: 1,
        backoff_ms: vec![0],
    };
    one.ask(LeaseCommand::SetPolicy(policy));
    let held = one.lease(3, 3);
    one.ask(LeaseCommand::Nack {
        receipts: vec![held[0]],
        delay_ms: None,
    });
    let to = QueueOffset {
        topic: 1,
        queue: 0,
        offset: 0,
    };
    let sought = one.ask(LeaseCommand::Seek { offsets: vec![to] });
    assert_eq!(sought, LeaseReply::Sought { queues: 1 });
    assert_eq!((one.committed(), one.counts().leased), (0, 0));
    assert_eq!(offsets(&one.lease(3, 3)), [0, 1, 2]);
    one.dead_lettered(0);
    assert_eq!(one.counts().leased, 3);
    one.ask(LeaseCommand::ForgetTopic { topic: 1 });
    let view = one.replica.machine.view();
    assert!(view.leased_queues().unwrap().is_empty());
    assert!(view.offsets(GROUP).unwrap().is_empty());
}

#[test]
fn one_command_does_not_remove_it_all() {
    let mut one = One::new();
    let many = REMOVE_AT_ONCE as u64;
    one.lease(many, 1);
    let to = |queue| QueueOffset {
        topic: 1,
        queue,
        offset: 0,
    };
    let offsets = vec![to(0), to(1)];
    let sought = one.ask(LeaseCommand::Seek { offsets });
    assert_eq!(sought, LeaseReply::Sought { queues: 1 });
    assert_eq!(one.lease(many, 1).len(), 1);
    let forget = LeaseCommand::ForgetTopic { topic: 1 };
    let mut steps = 1;
    while one.ask(forget.clone()) == LeaseReply::More {
        steps += 1;
    }
    assert_eq!(steps, 3);
    let view = one.replica.machine.view();
    assert!(view.leased_queues().unwrap().is_empty());
    assert!(view.offsets(GROUP).unwrap().is_empty());
}

#[test]
fn a_deletion_that_stops_halfway_leaves_whole_queues() {
    const QUEUES: u32 = 4;
    const EACH: u64 = 400;
    let mut one = One::new();
    // Each message has a key of its own, so that none waits for another.
    let lease = |one: &mut One| {
        one.token += 1;
        let view = one.replica.machine.view();
        let pick = |queue| {
            let known = view.queue_leases(GROUP, 1, queue).unwrap();
            let from = known.map_or(0, |leases| leases.next);
            Pick {
                topic: 1,
                queue,
                from,
                through: EACH,
                fresh: (from..EACH).map(|offset| (offset, offset + 1)).collect(),
                again: Vec::new(),
                gone: Vec::new(),
            }
        };
        let picks = (0..QUEUES).map(pick).collect();
        let lease = Lease {
            token: one.token,
            consumer: one.token,
            lease_ms: 1_000,
            ordered: true,
            max: u32::MAX,
            picks,
        };
        one.ask(LeaseCommand::Lease(lease));
    };
    lease(&mut one);
    let begun = CoordinatorReply::GroupDeleted { more: true };
    assert_eq!(one.delete(), begun);
    let view = one.replica.machine.view();
    let left = view.leased_queues().unwrap().len();
    assert!((1..QUEUES as usize).contains(&left), "{left} queues");
    assert_eq!(view.offsets(GROUP).unwrap().len(), left);

    // Whoever comes now gets every message of the queues that are gone.
    lease(&mut one);
    let counts = one.replica.machine.view().lease_counts(GROUP).unwrap();
    assert_eq!(counts.len(), QUEUES as usize);
    for count in counts {
        assert_eq!(u64::from(count.leased), EACH, "{count:?}");
    }
    while one.delete() == begun {}
    assert_eq!(one.delete(), CoordinatorReply::UnknownGroup);
}

#[test]
fn lives_of_one_name_differ_though_time_stands_still() {
    let mut one = One::new();
    let mut lives = BTreeSet::new();
    for _ in 0..3 {
        one.ask(LeaseCommand::SetPolicy(RetryPolicy::default()));
        lives.insert(one.life());
        one.delete();
    }
    assert_eq!(lives.len(), 3, "{lives:?}");
}

#[test]
fn what_is_said_of_an_earlier_life_changes_nothing() {
    let mut one = One::new();
    one.one_dead();
    let life = one.life();
    one.delete();
    one.one_dead();
    one.ask(LeaseCommand::DeadLettered { life, through: 0 });
    one.ask(LeaseCommand::Redriven {
        life,
        topic: 7,
        next: 1,
    });
    let view = one.replica.machine.view();
    assert_eq!(view.dead_letters(GROUP, 10).unwrap().len(), 1);
    assert_eq!(view.lease_group(GROUP).unwrap().unwrap().redriven, None);
    one.dead_lettered(0);
    assert_eq!(one.committed(), 1);
}

#[test]
fn a_group_that_never_leased_has_no_receipts() {
    let mut one = One::new();
    let receipt = Receipt {
        topic: 1,
        queue: 0,
        offset: 0,
        token: 1,
        consumer: 1,
    };
    let ack = LeaseCommand::Ack {
        receipts: vec![receipt],
        through: Some(receipt),
    };
    let ended = LeaseReply::Receipts(vec![ReceiptVerdict::Ended; 2]);
    assert_eq!(one.ask(ack), ended);
    assert_eq!(one.ask(LeaseCommand::Expire), LeaseReply::NoGroup);
}
