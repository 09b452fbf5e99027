//! Transactions in every order of steps, repeated, at any time and with crashes of their clients
//! between any two: never both committed and rolled back, nothing half, and every replica alike,
//! wherever it restarted from a checkpoint or was filled from a snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use quorate_raft::StateMachine;
use quorate_storage::derived::DerivedStore;
use quorate_storage::{LogId, RaftGroupId};

use super::tests::{PREPARE_MS, begin, part, place};
use super::*;
use crate::coordinator::{CoordinatorCommand, CoordinatorMachine, stamp};

/// What happens next, to one of three transactions.
#[derive(Debug, Clone)]
enum Step {
    Begin,
    Extend,
    Prepared {
        first: u32,
        count: u32,
        offsets: bool,
    },
    GiveUp {
        first: u32,
    },
    Decide(Decision),
    Due,
    Settled {
        queue: u64,
        offsets: bool,
    },
    Hold {
        queue: u32,
        offset: u64,
    },
    SettleOffsets,
    Commit {
        queue: u32,
        offset: u64,
    },
    Forget,
    Pass(u64),
}

fn step() -> impl Strategy<Value = (u8, Step)> {
    let decision = prop_oneof![Just(Decision::Commit), Just(Decision::Rollback)];
    let step = prop_oneof![
        2 => Just(Step::Begin),
        1 => Just(Step::Extend),
        4 => (0u32..3, 0u32..4, any::<bool>())
            .prop_map(|(first, count, offsets)| Step::Prepared { first, count, offsets }),
        1 => (2u32..4).prop_map(|first| Step::GiveUp { first }),
        3 => decision.prop_map(Step::Decide),
        2 => Just(Step::Due),
        4 => (20u64..23, any::<bool>()).prop_map(|(queue, offsets)| Step::Settled { queue, offsets }),
        2 => (0u32..2, 0u64..9).prop_map(|(queue, offset)| Step::Hold { queue, offset }),
        2 => Just(Step::SettleOffsets),
        1 => (0u32..2, 0u64..9).prop_map(|(queue, offset)| Step::Commit { queue, offset }),
        1 => Just(Step::Forget),
        2 => prop_oneof![0u64..3_000, Just(PREPARE_MS), Just(KEPT_MS)].prop_map(Step::Pass),
    ];
    (0u8..3, step)
}

struct Replica {
    machine: CoordinatorMachine,
    store: DerivedStore,
}

impl Replica {
    fn new() -> Self {
        let store = DerivedStore::in_memory();
        let mut replica = Self {
            machine: CoordinatorMachine::new(0, store.group(RaftGroupId(16)), Arc::default()),
            store,
        };
        replica.machine.restore(None, None).unwrap();
        replica
    }

    fn restart(&mut self) {
        let group = self.store.group(RaftGroupId(16));
        self.machine = CoordinatorMachine::new(0, group, Arc::default());
    }

    fn get(&self, id: &TransactionId) -> Option<Transaction> {
        self.machine.view().transaction(id).unwrap()
    }
}

fn command(
    id: TransactionId,
    step: &Step,
    known: Option<&Transaction>,
    now_ms: u64,
) -> Option<CoordinatorCommand> {
    let offset = |queue: u32, offset: u64| QueueOffset {
        topic: 1,
        queue,
        offset,
    };
    let group = || "g".to_owned();
    let decision = known.and_then(|t| t.decision);
    let command = match step {
        Step::Begin => begin(id, vec![part(20, &[0]), part(21, &[1])], &["g"]),
        Step::Extend => TransactionCommand::Extend {
            id,
            parts: vec![part(22, &[0])],
            prepare_ms: PREPARE_MS,
        },
        Step::Prepared {
            first,
            count,
            offsets,
        } => TransactionCommand::Prepared {
            id,
            parts: PreparedParts {
                first: *first,
                count: *count,
                offsets: *offsets,
            },
        },
        Step::GiveUp { first } => TransactionCommand::GiveUp {
            id,
            first: *first,
            count: 1,
        },
        Step::Decide(decision) => TransactionCommand::Decide {
            id,
            decision: *decision,
        },
        Step::Due => TransactionCommand::Due { id },
        Step::Settled { queue, offsets } => TransactionCommand::Settled {
            id,
            queues: vec![(*queue, vec![(*queue as u32 - 20, place(*queue))])],
            offset_groups: offsets.then(group).into_iter().collect(),
        },
        Step::Hold { queue, offset: at } => TransactionCommand::HoldOffsets {
            id,
            group: group(),
            offsets: vec![OffsetMove {
                to: offset(*queue, *at),
                from: None,
            }],
            member: None,
            until_ms: now_ms + 60_000,
        },
        // Participants are told what was decided, and nothing before.
        Step::SettleOffsets => TransactionCommand::SettleOffsets {
            id,
            group: group(),
            commit: decision?.is_commit(),
        },
        Step::Commit { queue, offset: at } => {
            return Some(CoordinatorCommand::Commit {
                group: group(),
                offsets: vec![offset(*queue, *at)],
                allow_rewind: true,
                member: None,
            });
        }
        Step::Forget => TransactionCommand::Forget,
        Step::Pass(_) => return None,
    };
    Some(CoordinatorCommand::Transaction(command))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn decisions_stand_and_replicas_agree(
        steps in proptest::collection::vec((step(), 0u8..12), 1..120)
    ) {
        let (mut steady, mut shaken) = (Replica::new(), Replica::new());
        let mut log = Vec::new();
        let mut checkpoint: (usize, Option<Vec<u8>>) = (0, None);
        let mut now_ms = 1_000_000;
        let mut decided: BTreeMap<TransactionId, Decision> = BTreeMap::new();
        for ((number, step), event) in steps {
            let id = [number; 16];
            if let Step::Pass(ms) = step {
                now_ms += ms;
            }
            let before = steady.get(&id);
            let Some(command) = command(id, &step, before.as_ref(), now_ms) else {
                continue;
            };
            let body = stamp(now_ms, &postcard::to_stdvec(&command).unwrap());
            log.push(body.clone());
            let last = LogId::new(1, log.len() as u64);
            let replies = [&mut steady, &mut shaken].map(|r| r.machine.apply(last, &body));
            prop_assert_eq!(&replies[0], &replies[1]);
            prop_assert!(!replies[0].is_empty());

            // What is forgotten, whosever turn it is, may live again in this test under the same id.
            decided.retain(|id, _| steady.get(id).is_some());
            if let Some(after) = steady.get(&id) {
                // Once decided, for ever, and only if all was prepared.
                if let Some(decision) = after.decision {
                    let first = *decided.entry(id).or_insert(decision);
                    prop_assert_eq!(first, decision);
                    prop_assert!(!decision.is_commit() || after.is_prepared());
                }
                // What is due or done is in exactly one of the orders.
                let mut mine = Vec::new();
                for duty in [Duty::Look, Duty::Tell] {
                    let due = steady.machine.view().due_transactions(duty, None, 10).unwrap();
                    let found = due.into_iter().filter(|(_, i)| *i == id);
                    mine.extend(found.map(|(at, _)| (duty, at)));
                }
                let duty = match after.decision {
                    None => Duty::Look,
                    Some(_) => Duty::Tell,
                };
                let expected = after.due_ms().map(|at| (duty, at));
                prop_assert_eq!(mine, expected.into_iter().collect::<Vec<_>>());
                if after.done_ms.is_some() {
                    prop_assert!(after.unsettled_queues().is_empty());
                    prop_assert!(after.unsettled_offsets().next().is_none());
                }
                // Once open, no time for preparing ends it, and what it was told to have stays.
                if let Some(before) = before.filter(|t| t.opened && t.created_ms == after.created_ms) {
                    let asked = matches!(step, Step::Decide(_));
                    let expired = after.decision == Some(Decision::Expire);
                    prop_assert!(after.decision == before.decision || asked || expired);
                }
                prop_assert!(after.parts.iter().take(2).all(|p| p.state != PartState::GivenUp));
                for part in &after.parts {
                    prop_assert!(part.place.is_none() || part.state == PartState::Prepared);
                }
                if !after.decision.is_some_and(Decision::is_commit) {
                    prop_assert!(after.parts.iter().all(|p| p.place.is_none()));
                }
            }
            let filter = TransactionFilter { producer_group: None, state: None, limit: 100 };
            let listed = steady.machine.view().transactions(&filter).unwrap();
            let there = (0u8..3).filter(|n| steady.get(&[*n; 16]).is_some()).count();
            prop_assert_eq!(listed.len(), there);
            let open = listed.iter().filter(|t| t.decision.is_none()).count() as u64;
            let ended = listed.iter().filter(|t| t.done_ms.is_some()).count() as u64;
            let counts = steady.machine.view().transaction_counts().unwrap();
            let settling = there as u64 - open - ended;
            let counted = (counts.open, counts.settling, counts.ended);
            prop_assert_eq!(counted, (open, settling, ended));

            match event {
                0 => checkpoint = (log.len(), Some(shaken.machine.checkpoint().unwrap())),
                1 => {
                    shaken.restart();
                    let (index, state) = &checkpoint;
                    let from = Some(LogId::new(1, *index as u64)).filter(|_| *index > 0);
                    shaken.machine.restore(from, state.as_deref()).unwrap();
                    for (n, body) in log.iter().enumerate().skip(*index) {
                        shaken.machine.apply(LogId::new(1, n as u64 + 1), body);
                    }
                }
                2 => {
                    let state = steady.machine.checkpoint().unwrap();
                    shaken.machine.install(last, &state).unwrap();
                }
                _ => {}
            }
            prop_assert_eq!(steady.machine.state_hash(), shaken.machine.state_hash());
        }
    }
}
