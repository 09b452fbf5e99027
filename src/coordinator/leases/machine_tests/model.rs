//! Any run of commands, restarts and snapshots against a model of what must be true.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const QUEUES: u32 = 2;
const MAX_DELIVERIES: u32 = 3;

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
