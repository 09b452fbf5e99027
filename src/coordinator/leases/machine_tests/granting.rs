//! What a lease grants, and what it leaves.

use super::*;

#[test]
fn what_is_read_and_not_leased_is_free() {
    let mut one = One::new();
    assert_eq!(offsets(&one.lease(5, 2)), [0, 1]);
    assert_eq!(one.counts().waiting, 3);
    assert_eq!(offsets(&one.lease(5, 10)), [2, 3, 4]);
    assert_eq!(one.committed(), 0);
}

#[test]
fn a_stale_cursor_takes_nothing_new() {
    let mut one = One::new();
    one.lease(3, 3);
    let pick = Pick {
        topic: 1,
        queue: 0,
        from: 0,
        through: 5,
        fresh: vec![(0, 0), (4, 0)],
        again: vec![0, 1],
        gone: vec![2],
    };
    let lease = Lease {
        token: 9,
        consumer: 9,
        lease_ms: 1,
        ordered: false,
        max: 10,
        picks: vec![pick],
    };
    let granted = Granted {
        leases: Vec::new(),
        moved: true,
    };
    let reply = one.ask(LeaseCommand::Lease(lease));
    assert_eq!(reply, LeaseReply::Granted(granted));
    assert_eq!(one.counts().leased, 3);
}

#[test]
fn in_flight_is_bounded() {
    let mut one = One::new();
    let end = u64::from(MAX_IN_FLIGHT) + 10;
    one.lease(end, 1);
    let next = |one: &One| one.counts().next;
    assert_eq!(next(&one), u64::from(MAX_IN_FLIGHT));
    assert_eq!(one.lease(end, 1).len(), 1);
    assert_eq!(next(&one), u64::from(MAX_IN_FLIGHT));
    let held = one.lease(end, 2);
    one.ask(LeaseCommand::Ack {
        receipts: held,
        through: None,
    });
    one.lease(end, 1);
    assert_eq!(next(&one), u64::from(MAX_IN_FLIGHT) + 2);
}

#[test]
fn what_is_due_is_seen_page_by_page() {
    let mut one = One::new();
    one.lease(5, 5);
    one.now_ms += 1_000;
    let view = one.replica.machine.view();
    let (mut seen, mut after) = (Vec::new(), None);
    while let Some(last) = {
        let page = view.due(GROUP, 1, 0, one.now_ms, after, 2).unwrap();
        seen.extend(page.iter().map(|due| due.offset));
        page.last().copied()
    } {
        after = Some(last);
    }
    assert_eq!(seen, [0, 1, 2, 3, 4]);
    let next = |now_ms| view.next_due_ms(GROUP, 1, 0, now_ms).unwrap();
    assert_eq!(
        (next(one.now_ms - 1), next(one.now_ms)),
        (Some(one.now_ms), None)
    );
}

#[test]
fn what_is_gone_is_done() {
    let mut one = One::new();
    one.lease(3, 3);
    one.now_ms += 5_000;
    let pick = Pick {
        topic: 1,
        queue: 0,
        from: 3,
        through: 3,
        fresh: Vec::new(),
        again: Vec::new(),
        gone: vec![0, 1],
    };
    let lease = Lease {
        token: 9,
        consumer: 9,
        lease_ms: 1,
        ordered: false,
        max: 1,
        picks: vec![pick],
    };
    one.ask(LeaseCommand::Lease(lease));
    assert_eq!(one.committed(), 2);
}
