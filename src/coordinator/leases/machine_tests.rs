use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use quorate_raft::StateMachine;
use quorate_storage::derived::DerivedStore;
use quorate_storage::{LogId, RaftGroupId};

use super::*;
use crate::coordinator::{
    CoordinatorCommand, CoordinatorMachine, CoordinatorReply, QueueOffset, stamp,
};

const GROUP: &str = "g";
const QUEUES: u32 = 2;
const MAX_DELIVERIES: u32 = 3;

/// A coordinator over a store of its own.
struct Replica {
    machine: CoordinatorMachine,
    store: DerivedStore,
    applied: u64,
}

impl Replica {
    fn new() -> Self {
        let store = DerivedStore::in_memory();
        let machine = CoordinatorMachine::new(0, store.group(RaftGroupId(16)), Arc::default());
        Self {
            machine,
            store,
            applied: 0,
        }
    }

    fn apply_bytes(&mut self, body: &Bytes) -> Bytes {
        self.applied += 1;
        self.machine.apply(LogId::new(1, self.applied), body)
    }

    fn restart(&mut self) {
        let group = self.store.group(RaftGroupId(16));
        self.machine = CoordinatorMachine::new(0, group, Arc::default());
    }
}

fn body(now_ms: u64, command: LeaseCommand) -> Bytes {
    let command = CoordinatorCommand::Leases {
        group: GROUP.to_owned(),
        command,
    };
    stamp(now_ms, &postcard::to_stdvec(&command).unwrap())
}

fn reply(bytes: &[u8]) -> LeaseReply {
    match postcard::from_bytes(bytes).unwrap() {
        CoordinatorReply::Leases(reply) => reply,
        other => panic!("{other:?}"),
    }
}

/// One replica with its clock.
struct One {
    replica: Replica,
    now_ms: u64,
    token: u64,
}

impl One {
    fn new() -> Self {
        Self {
            replica: Replica::new(),
            now_ms: 1_000,
            token: 0,
        }
    }

    fn ask(&mut self, command: LeaseCommand) -> LeaseReply {
        let body = body(self.now_ms, command);
        reply(&self.replica.apply_bytes(&body))
    }

    /// What a leader would propose over queue 0 of a topic with `end` messages without keys.
    fn lease(&mut self, end: u64, max: u32) -> Vec<Receipt> {
        self.token += 1;
        let view = self.replica.machine.view();
        let known = view.queue_leases(GROUP, 1, 0).unwrap();
        let from = known.map_or(0, |leases| leases.next);
        let again = view
            .due(GROUP, 1, 0, self.now_ms, None, max as usize)
            .unwrap();
        let lease = Lease {
            token: self.token,
            consumer: self.token,
            lease_ms: 1_000,
            ordered: false,
            max,
            picks: vec![Pick {
                topic: 1,
                queue: 0,
                from,
                through: end,
                fresh: (from..end).map(|offset| (offset, 0)).collect(),
                again: again.iter().map(|due| due.offset).collect(),
                gone: Vec::new(),
            }],
        };
        let (token, consumer) = (lease.token, lease.consumer);
        match self.ask(LeaseCommand::Lease(lease)) {
            LeaseReply::Granted(granted) => granted
                .leases
                .iter()
                .map(|grant| Receipt {
                    topic: grant.topic,
                    queue: grant.queue,
                    offset: grant.offset,
                    token,
                    consumer,
                })
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    fn life(&self) -> u64 {
        let group = self.replica.machine.view().lease_group(GROUP).unwrap();
        group.unwrap().life
    }

    fn dead_lettered(&mut self, through: u64) {
        let life = self.life();
        self.ask(LeaseCommand::DeadLettered { life, through });
    }

    fn delete(&mut self) {
        let command = CoordinatorCommand::DeleteGroup {
            group: GROUP.to_owned(),
        };
        let body = stamp(self.now_ms, &postcard::to_stdvec(&command).unwrap());
        self.replica.apply_bytes(&body);
    }

    /// Makes the group, with one message dead at once.
    fn one_dead(&mut self) {
        let policy = RetryPolicy {
            max_deliveries: 1,
            backoff_ms: vec![0],
        };
        self.ask(LeaseCommand::SetPolicy(policy));
        let receipts = self.lease(1, 1);
        self.ask(LeaseCommand::Nack {
            receipts,
            delay_ms: None,
        });
    }

    fn committed(&self) -> u64 {
        self.replica.machine.view().offsets(GROUP).unwrap()[0].offset
    }

    fn counts(&self) -> LeaseCounts {
        self.replica.machine.view().lease_counts(GROUP).unwrap()[0]
    }
}

fn offsets(receipts: &[Receipt]) -> Vec<u64> {
    receipts.iter().map(|receipt| receipt.offset).collect()
}

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

#[derive(Debug, Clone)]
enum Step {
    Receive { max: u32, lease_ms: u64 },
    Ack(prop::sample::Index),
    Through(prop::sample::Index),
    Nack(prop::sample::Index, Option<u64>),
    Extend(prop::sample::Index, u64),
    Expire,
    Forward,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    use any as of;
    prop_oneof![
        4 => (1u32..6, 1u64..50).prop_map(|(max, lease_ms)| Step::Receive { max, lease_ms }),
        3 => of::<prop::sample::Index>().prop_map(Step::Ack),
        1 => of::<prop::sample::Index>().prop_map(Step::Through),
        3 => (of::<prop::sample::Index>(), prop::option::of(0u64..40))
            .prop_map(|(receipt, delay_ms)| Step::Nack(receipt, delay_ms)),
        1 => (of::<prop::sample::Index>(), 1u64..50)
            .prop_map(|(receipt, lease_ms)| Step::Extend(receipt, lease_ms)),
        2 => Just(Step::Expire),
        2 => Just(Step::Forward),
        3 => (1u64..60).prop_map(Step::Wait),
    ]
}

/// What must be true of one message, kept beside the machine.
#[derive(Debug, Default, Clone)]
struct Known {
    leased_until: u64,
    deliveries: u32,
    done: bool,
    dead: bool,
}

type At = (u32, u64);

/// A leader that proposes, and what its group may expect.
struct Model {
    known: BTreeMap<At, Known>,
    receipts: Vec<Receipt>,
    /// Offsets the cursor went past.
    next: [u64; QUEUES as usize],
    now_ms: u64,
    token: u64,
    ordered: bool,
    letters: BTreeMap<u64, At>,
}

/// Messages a queue holds in the property test.
const END: u64 = 12;

fn key_of(offset: u64) -> u64 {
    offset % 4
}

impl Model {
    fn command(&mut self, replica: &Replica, step: &Step) -> Option<LeaseCommand> {
        let view = replica.machine.view();
        let pick_receipt = |index: &prop::sample::Index, receipts: &[Receipt]| {
            (!receipts.is_empty()).then(|| *index.get(receipts))
        };
        Some(match step {
            Step::Receive { max, lease_ms } => {
                self.token += 1;
                let picks = (0..QUEUES).map(|queue| {
                    let leases = view.queue_leases(GROUP, 1, queue).unwrap();
                    let from = leases.map_or(0, |leases| leases.next);
                    let through = END.min(from + u64::from(*max));
                    let due = view.due(GROUP, 1, queue, self.now_ms, None, 4).unwrap();
                    let again = match self.token % 4 {
                        // A plan that others have overtaken: any of them may be leased or done.
                        0 => (0..from).collect(),
                        _ => due.iter().map(|due| due.offset).collect(),
                    };
                    Pick {
                        topic: 1,
                        queue,
                        from,
                        through,
                        // One in five is left out by the filter.
                        fresh: (from..through)
                            .filter(|offset| offset % 5 != 4)
                            .map(|offset| (offset, key_of(offset)))
                            .collect(),
                        again,
                        gone: Vec::new(),
                    }
                });
                LeaseCommand::Lease(Lease {
                    token: self.token,
                    consumer: self.token % 3,
                    lease_ms: *lease_ms,
                    ordered: self.ordered,
                    max: *max,
                    picks: picks.collect(),
                })
            }
            Step::Ack(index) => LeaseCommand::Ack {
                receipts: vec![pick_receipt(index, &self.receipts)?],
                through: None,
            },
            Step::Through(index) => LeaseCommand::Ack {
                receipts: Vec::new(),
                through: Some(pick_receipt(index, &self.receipts)?),
            },
            Step::Nack(index, delay_ms) => LeaseCommand::Nack {
                receipts: vec![pick_receipt(index, &self.receipts)?],
                delay_ms: *delay_ms,
            },
            Step::Extend(index, lease_ms) => LeaseCommand::Extend {
                receipts: vec![pick_receipt(index, &self.receipts)?],
                lease_ms: *lease_ms,
            },
            Step::Expire => LeaseCommand::Expire,
            Step::Forward => {
                let letters = view.dead_letters(GROUP, 2).unwrap();
                let (through, _) = *letters.last()?;
                for (sequence, letter) in letters {
                    let at = (letter.queue, letter.offset);
                    assert_eq!(self.letters.insert(sequence, at), None, "forwarded twice");
                    let known = self.known.get_mut(&at).unwrap();
                    assert!(known.dead && !known.done, "{at:?}");
                    known.done = true;
                }
                let life = view.lease_group(GROUP).unwrap()?.life;
                LeaseCommand::DeadLettered { life, through }
            }
            Step::Wait(ms) => {
                self.now_ms += ms;
                return None;
            }
        })
    }

    fn check(&mut self, replica: &Replica, command: &LeaseCommand, reply: &LeaseReply) {
        // What died may have made room for a later message of its key at once.
        self.look_at_the_dead(replica);
        match (command, reply) {
            (LeaseCommand::Lease(lease), LeaseReply::Granted(granted)) => {
                assert!(granted.leases.len() <= lease.max as usize && !granted.moved);
                for pick in &lease.picks {
                    self.next[pick.queue as usize] = pick.through;
                }
                for grant in &granted.leases {
                    self.granted(lease, grant);
                }
            }
            (LeaseCommand::Ack { receipts, through }, LeaseReply::Receipts(verdicts)) => {
                let asked = receipts.iter().chain(through);
                for (receipt, verdict) in asked.zip(verdicts) {
                    self.acked(receipt, through.is_some(), *verdict);
                }
            }
            (LeaseCommand::Nack { receipts, .. }, LeaseReply::Receipts(verdicts))
                if verdicts[0] == ReceiptVerdict::Done =>
            {
                let at = (receipts[0].queue, receipts[0].offset);
                self.known.get_mut(&at).unwrap().leased_until = 0;
            }
            // Said again of the same delivery it is done, too, until that is over for good.
            (LeaseCommand::Nack { receipts, .. }, LeaseReply::Receipts(_)) => {
                let at = (receipts[0].queue, receipts[0].offset);
                let newest = self.receipts.iter().rfind(|r| (r.queue, r.offset) == at);
                let known = &self.known[&at];
                assert!(known.done || newest != Some(&receipts[0]), "{at:?}");
            }
            (LeaseCommand::Extend { receipts, lease_ms }, LeaseReply::Receipts(verdicts))
                if verdicts[0] == ReceiptVerdict::Done =>
            {
                let at = (receipts[0].queue, receipts[0].offset);
                let known = self.known.get_mut(&at).unwrap();
                assert!(!known.done && !known.dead);
                known.leased_until = self.now_ms + lease_ms;
            }
            _ => {}
        }
        self.look_at_the_watermark(replica);
    }

    fn granted(&mut self, lease: &Lease, grant: &Grant) {
        let at = (grant.queue, grant.offset);
        let known = self.known.entry(at).or_default();
        assert!(!known.done && !known.dead, "{at:?} was done");
        assert!(known.leased_until <= self.now_ms, "{at:?} is with another");
        known.deliveries += 1;
        assert_eq!(known.deliveries, grant.deliveries);
        assert!(known.deliveries <= MAX_DELIVERIES);
        known.leased_until = self.now_ms + lease.lease_ms;
        self.receipts.push(Receipt {
            topic: 1,
            queue: grant.queue,
            offset: grant.offset,
            token: lease.token,
            consumer: lease.consumer,
        });
        if self.ordered && key_of(grant.offset) != 0 {
            for earlier in (0..grant.offset).filter(|o| o % 5 != 4) {
                let same = key_of(earlier) == key_of(grant.offset);
                let over = self.known.get(&(grant.queue, earlier));
                let over = over.is_some_and(|known| known.done || known.dead);
                assert!(!same || over, "{at:?} before {earlier}");
            }
        }
    }

    fn acked(&mut self, receipt: &Receipt, through: bool, verdict: ReceiptVerdict) {
        if verdict == ReceiptVerdict::Ended {
            return;
        }
        let at = (receipt.queue, receipt.offset);
        let newest = self.receipts.iter().rfind(|r| (r.queue, r.offset) == at);
        let is_over = newest != Some(receipt);
        assert!(
            through || !is_over || self.known[&at].done,
            "{at:?} is with another"
        );
        for ((queue, offset), known) in &mut self.known {
            let own = *offset == receipt.offset;
            let held = self
                .receipts
                .iter()
                .rfind(|r| r.queue == *queue && r.offset == *offset);
            let before = through
                && *offset < receipt.offset
                && known.leased_until > 0
                && held.is_some_and(|r| r.consumer == receipt.consumer);
            if *queue == receipt.queue && (before || own && !through) && !known.dead {
                known.done = true;
            }
        }
        if through && !is_over {
            let known = self.known.get_mut(&at).unwrap();
            known.done |= !known.dead;
        }
    }

    fn look_at_the_dead(&mut self, replica: &Replica) {
        let letters = replica.machine.view().dead_letters(GROUP, 1_000).unwrap();
        let mut seen: BTreeSet<At> = self.letters.values().copied().collect();
        for (sequence, letter) in letters {
            let at = (letter.queue, letter.offset);
            if self.letters.contains_key(&sequence) {
                continue;
            }
            assert!(seen.insert(at), "{at:?} died twice");
            let known = self.known.get_mut(&at).unwrap();
            assert_eq!(known.deliveries, MAX_DELIVERIES);
            known.dead = true;
        }
    }

    fn look_at_the_watermark(&self, replica: &Replica) {
        let view = replica.machine.view();
        for committed in view.offsets(GROUP).unwrap() {
            let next = self.next[committed.queue as usize];
            let open = |offset: &u64| {
                let known = self.known.get(&(committed.queue, *offset));
                offset % 5 != 4 && !known.is_some_and(|known| known.done)
            };
            let lowest = (0..next).find(open).unwrap_or(next);
            assert_eq!(committed.offset, lowest, "queue {}", committed.queue);
        }
        for count in view.lease_counts(GROUP).unwrap() {
            let leases = view.queue_leases(GROUP, 1, count.queue).unwrap().unwrap();
            assert_eq!(leases.in_flight, count.leased + count.waiting + count.dead);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever consumers do and whenever replicas restart: nobody is given what another has or what
    /// is done, the dead die once, the committed offset is right, and replicas agree.
    #[test]
    fn leases_keep_their_word(
        steps in prop::collection::vec((step(), 0u8..8), 1..120),
        ordered in any::<bool>(),
    ) {
        let (mut steady, mut shaken) = (Replica::new(), Replica::new());
        let mut model = Model {
            known: BTreeMap::new(),
            receipts: Vec::new(),
            next: [0; QUEUES as usize],
            now_ms: 1_000,
            token: 0,
            ordered,
            letters: BTreeMap::new(),
        };
        let mut log: Vec<Bytes> = Vec::new();
        let mut checkpoint: (u64, Option<Vec<u8>>) = (0, None);
        let policy = RetryPolicy { max_deliveries: MAX_DELIVERIES, backoff_ms: vec![5, 20] };
        let first = body(model.now_ms, LeaseCommand::SetPolicy(policy));
        steady.apply_bytes(&first);
        shaken.apply_bytes(&first);
        log.push(first);
        for (step, event) in steps {
            let Some(command) = model.command(&steady, &step) else {
                continue;
            };
            let body = body(model.now_ms, command.clone());
            let answer = steady.apply_bytes(&body);
            prop_assert_eq!(&answer, &shaken.apply_bytes(&body));
            log.push(body);
            model.check(&steady, &command, &reply(&answer));
            match event {
                0 => checkpoint = (shaken.applied, Some(shaken.machine.checkpoint().unwrap())),
                1 | 2 => {
                    if event == 2 {
                        shaken.store.reset("a test").unwrap();
                    }
                    shaken.restart();
                    let (index, state) = &checkpoint;
                    let from = Some(LogId::new(1, *index)).filter(|_| *index > 0);
                    shaken.machine.restore(from, state.as_deref()).unwrap();
                    shaken.applied = *index;
                    for body in &log[*index as usize..] {
                        shaken.apply_bytes(body);
                    }
                }
                3 => {
                    let state = steady.machine.checkpoint().unwrap();
                    shaken.machine.install(LogId::new(1, shaken.applied), &state).unwrap();
                }
                _ => {}
            }
            prop_assert_eq!(steady.machine.state_hash(), shaken.machine.state_hash());
        }
    }
}
