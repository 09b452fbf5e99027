mod offsets;

use std::sync::Arc;

use quorate_raft::StateMachine;
use quorate_storage::derived::DerivedStore;
use quorate_storage::{LogId, RaftGroupId};

use super::*;
use crate::coordinator::membership::{Delivery, GroupStart, Newcomer};
use crate::coordinator::{
    CommitVerdict, CoordinatorCommand, CoordinatorMachine, CoordinatorReply, stamp,
};

/// A coordinator in memory, with a clock of its own.
pub(super) struct Fixture {
    pub machine: CoordinatorMachine,
    pub now_ms: u64,
    pub store: DerivedStore,
    applied: u64,
}

pub(super) const ID: TransactionId = [7; 16];
pub(super) const PREPARE_MS: u64 = 30_000;

fn extend(parts: Vec<Part>) -> TransactionCommand {
    TransactionCommand::Extend {
        id: ID,
        parts,
        prepare_ms: PREPARE_MS,
    }
}

impl Fixture {
    pub fn new() -> Self {
        let store = DerivedStore::in_memory();
        let group = store.group(RaftGroupId(16));
        let mut machine = CoordinatorMachine::new(0, group, Arc::default());
        machine.restore(None, None).unwrap();
        Self {
            machine,
            now_ms: 1_000_000,
            store,
            applied: 0,
        }
    }

    pub fn apply(&mut self, command: CoordinatorCommand) -> CoordinatorReply {
        self.applied += 1;
        let body = stamp(self.now_ms, &postcard::to_stdvec(&command).unwrap());
        let reply = self.machine.apply(LogId::new(1, self.applied), &body);
        postcard::from_bytes(&reply).unwrap()
    }

    pub fn transact(&mut self, command: TransactionCommand) -> TransactionReply {
        match self.apply(CoordinatorCommand::Transaction(command)) {
            CoordinatorReply::Transaction(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn begin(&mut self, parts: Vec<Part>, offset_groups: &[&str]) {
        let reply = self.transact(begin(ID, parts, offset_groups));
        assert!(
            matches!(reply, TransactionReply::Recorded { first_part: 0, .. }),
            "{reply:?}"
        );
    }

    fn prepared(&mut self, first: u32, count: u32, offsets: bool) -> TransactionReply {
        let parts = PreparedParts {
            first,
            count,
            offsets,
        };
        self.transact(TransactionCommand::Prepared { id: ID, parts })
    }

    fn decide(&mut self, decision: Decision) -> TransactionReply {
        self.transact(TransactionCommand::Decide { id: ID, decision })
    }

    fn settled(&mut self, queue_group: u64, places: Vec<(u32, Place)>) -> TransactionReply {
        self.transact(TransactionCommand::Settled {
            id: ID,
            queues: vec![(queue_group, places)],
            offset_groups: Vec::new(),
        })
    }

    fn due(&mut self) -> TransactionState {
        match self.transact(TransactionCommand::Due { id: ID }) {
            TransactionReply::Is(now) => now.state(),
            other => panic!("{other:?}"),
        }
    }

    fn state(&self) -> TransactionState {
        self.get().unwrap().state()
    }

    fn get(&self) -> Option<Transaction> {
        self.machine.view().transaction(&ID).unwrap()
    }

    fn listed(&self, group: Option<&str>, state: Option<TransactionState>) -> usize {
        let filter = TransactionFilter {
            producer_group: group.map(str::to_owned),
            state,
            limit: 10,
        };
        self.machine.view().transactions(&filter).unwrap().len()
    }

    fn hold(&mut self, id: TransactionId, queue: u32, offset: u64) -> TransactionReply {
        self.hold_from(id, queue, None, offset)
    }

    fn hold_from(
        &mut self,
        id: TransactionId,
        queue: u32,
        from: Option<u64>,
        offset: u64,
    ) -> TransactionReply {
        let to = QueueOffset {
            topic: 1,
            queue,
            offset,
        };
        self.transact(TransactionCommand::HoldOffsets {
            id,
            group: "g".to_owned(),
            offsets: vec![OffsetMove { to, from }],
            member: None,
            until_ms: self.now_ms + 1_000,
        })
    }

    fn settle_offsets(&mut self, id: TransactionId, commit: bool) {
        let group = "g".to_owned();
        let reply = self.transact(TransactionCommand::SettleOffsets { id, group, commit });
        assert_eq!(reply, TransactionReply::OffsetsSettled);
    }

    fn commit(&mut self, queue: u32, offset: u64) -> CommitVerdict {
        let command = CoordinatorCommand::Commit {
            group: "g".to_owned(),
            offsets: vec![QueueOffset {
                topic: 1,
                queue,
                offset,
            }],
            allow_rewind: true,
            member: None,
        };
        match self.apply(command) {
            CoordinatorReply::Committed(verdicts) => verdicts[0],
            other => panic!("{other:?}"),
        }
    }

    fn committed(&self) -> Vec<u64> {
        let offsets = self.machine.view().offsets("g").unwrap();
        offsets.into_iter().map(|o| o.offset).collect()
    }
}

pub(super) fn part(queue_group: u64, messages: &[u32]) -> Part {
    Part {
        topic: "t".to_owned(),
        queue: queue_group as u32,
        queue_group,
        messages: messages.to_vec(),
        bytes: 10,
    }
}

pub(super) fn begin(
    id: TransactionId,
    parts: Vec<Part>,
    offset_groups: &[&str],
) -> TransactionCommand {
    let new = NewTransaction {
        producer_group: "p".to_owned(),
        timing: Timing {
            timeout_ms: 100,
            check_interval_ms: 1_000,
            max_checks: 2,
        },
        check_url: None,
        parts,
        offset_groups: offset_groups.iter().map(|g| (*g).to_owned()).collect(),
        prepare_ms: PREPARE_MS,
    };
    TransactionCommand::Begin { id, new }
}

/// One that is not checked while a test looks at other times.
fn begin_patient(parts: Vec<Part>) -> TransactionCommand {
    let mut command = begin(ID, parts, &[]);
    if let TransactionCommand::Begin { new, .. } = &mut command {
        new.timing.timeout_ms = 100 * PREPARE_MS;
    }
    command
}

pub(super) fn place(index: u64) -> Place {
    Place {
        base_offset: index * 10,
        count: 1,
        term: 1,
        index,
        batch: 0,
    }
}

#[test]
fn ids_name_their_coordinator() {
    for coordinator in [0, 1, 255, 65_535] {
        let id = new_transaction_id(coordinator, [0xab; 16]).unwrap();
        assert_eq!(owner_of_transaction(&id), coordinator);
        assert_eq!(id[2..], [0xab; 14]);
    }
    assert_eq!(new_transaction_id(65_536, [0; 16]), None);
}

#[test]
fn the_way_of_a_commit() {
    let mut machine = Fixture::new();
    machine.begin(vec![part(20, &[1]), part(21, &[0, 2])], &[]);
    assert_eq!(machine.state(), TransactionState::Preparing);
    assert_eq!(machine.prepared(0, 1, false), machine.prepared(0, 1, false));
    assert_eq!(
        machine.decide(Decision::Commit),
        TransactionReply::NotPrepared
    );
    machine.prepared(1, 1, false);
    assert_eq!(machine.state(), TransactionState::Open);
    assert_eq!(machine.machine.view().transaction_counts().unwrap().open, 1);
    machine.decide(Decision::Commit);
    assert_eq!(machine.state(), TransactionState::Committing);
    machine.settled(20, vec![(0, place(5))]);
    // A queue that takes no part, and one that is told again, change nothing.
    machine.settled(99, vec![(1, place(9))]);
    machine.settled(20, vec![(0, place(6))]);
    assert_eq!(machine.state(), TransactionState::Committing);
    machine.settled(21, vec![(1, place(7))]);
    let done = machine.get().unwrap();
    assert_eq!(done.state(), TransactionState::Committed);
    let places: Vec<_> = done.parts.iter().map(|p| p.place.unwrap().index).collect();
    assert_eq!(places, [5, 7]);
    assert_eq!(done.due_ms(), None);
    let again = machine.decide(Decision::Commit);
    assert_eq!(again, TransactionReply::Is(Box::new(done.clone())));
    let opposite = machine.decide(Decision::Rollback);
    assert_eq!(opposite, TransactionReply::Ended(Box::new(done)));
    let counts = machine.machine.view().transaction_counts().unwrap();
    assert_eq!((counts.open, counts.committed, counts.ended), (0, 1, 1));
}

#[test]
fn a_rollback_needs_nothing_prepared_and_stands() {
    let mut machine = Fixture::new();
    machine.begin(vec![part(20, &[0])], &["g"]);
    machine.decide(Decision::Rollback);
    assert_eq!(machine.state(), TransactionState::RollingBack);
    assert!(matches!(
        machine.prepared(0, 1, true),
        TransactionReply::Ended(_)
    ));
    assert!(matches!(
        machine.decide(Decision::Commit),
        TransactionReply::Ended(_)
    ));
    let parts = vec![part(21, &[0])];
    let extended = machine.transact(extend(parts));
    assert!(matches!(extended, TransactionReply::Ended(_)));
    machine.settled(20, vec![(0, place(3))]);
    assert_eq!(machine.state(), TransactionState::RollingBack);
    machine.transact(TransactionCommand::Settled {
        id: ID,
        queues: Vec::new(),
        offset_groups: vec!["g".to_owned()],
    });
    assert_eq!(machine.state(), TransactionState::RolledBack);
    assert_eq!(machine.get().unwrap().parts[0].place, None);
}

#[test]
fn more_messages_must_be_prepared_before_the_commit() {
    let mut machine = Fixture::new();
    machine.begin(Vec::new(), &[]);
    assert_eq!(machine.state(), TransactionState::Open);
    for number in 0..2 {
        let parts = vec![part(20, &[0]), part(21, &[1])];
        let reply = machine.transact(extend(parts));
        let expected = TransactionReply::Recorded {
            first_part: number * 2,
            prepare_by_ms: machine.now_ms + PREPARE_MS,
        };
        assert_eq!(reply, expected);
    }
    machine.prepared(0, 2, false);
    assert_eq!(
        machine.decide(Decision::Commit),
        TransactionReply::NotPrepared
    );
    machine.prepared(2, 2, false);
    let open = machine.get().unwrap();
    let numbers: Vec<_> = open
        .parts
        .iter()
        .flat_map(|p| p.part.messages.clone())
        .collect();
    assert_eq!((numbers, open.messages()), (vec![0, 1, 2, 3], 4));
    assert!(matches!(
        machine.decide(Decision::Commit),
        TransactionReply::Is(_)
    ));
}

#[test]
fn overlapping_extends_have_their_full_time_each() {
    let mut machine = Fixture::new();
    machine.transact(begin_patient(Vec::new()));
    for number in 0..4 {
        machine.transact(extend(vec![part(20, &[0])]));
        machine.now_ms += PREPARE_MS / 2;
        if number > 0 {
            machine.prepared(number - 1, 1, false);
        }
        assert_eq!(machine.due(), TransactionState::Open, "{number}");
    }
    assert_eq!(
        machine.decide(Decision::Commit),
        TransactionReply::NotPrepared
    );
    machine.now_ms += PREPARE_MS / 2;
    assert_eq!(machine.due(), TransactionState::Open);
    assert!(machine.get().unwrap().is_prepared());
}

#[test]
fn an_extension_that_nobody_goes_on_with_waits_for_no_other() {
    let mut machine = Fixture::new();
    machine.transact(begin_patient(Vec::new()));
    machine.transact(extend(vec![part(20, &[0])]));
    machine.now_ms += PREPARE_MS / 2;
    machine.transact(extend(vec![part(20, &[0])]));
    machine.prepared(1, 1, false);
    assert_eq!(
        machine.decide(Decision::Commit),
        TransactionReply::NotPrepared
    );
    machine.now_ms += PREPARE_MS / 2;
    assert_eq!(machine.due(), TransactionState::Open);
    machine.decide(Decision::Commit);
    assert_eq!(machine.state(), TransactionState::Committing);
}

#[test]
fn an_extension_that_is_never_prepared_is_left_out_alone() {
    let mut machine = Fixture::new();
    machine.transact(begin_patient(vec![part(20, &[0])]));
    machine.prepared(0, 1, false);
    machine.transact(extend(vec![part(20, &[0]), part(21, &[1])]));
    machine.now_ms += 1;
    machine.transact(extend(vec![part(20, &[0])]));
    let give_up = |first, count| TransactionCommand::GiveUp {
        id: ID,
        first,
        count,
    };
    // Whoever brought the second one gives it up, although it was prepared.
    machine.prepared(3, 1, false);
    machine.transact(give_up(3, 1));
    assert_eq!(machine.prepared(3, 1, false), TransactionReply::GivenUp);
    // Nobody does that for the first, of which one part was stored.
    machine.now_ms += PREPARE_MS;
    assert_eq!(machine.due(), TransactionState::Open);
    assert_eq!(machine.prepared(1, 2, false), TransactionReply::GivenUp);
    machine.transact(extend(vec![part(21, &[0])]));
    machine.prepared(4, 1, false);
    let open = machine.get().unwrap();
    assert_eq!(
        (open.given_up(20), open.given_up(21)),
        (vec![1, 3], vec![2])
    );
    assert_eq!(open.messages(), 2);
    assert_eq!(open.due_ms(), Some(open.next_check_ms));

    machine.decide(Decision::Commit);
    let refused = machine.transact(give_up(4, 1));
    assert!(matches!(refused, TransactionReply::Ended(_)));
    machine.settled(20, vec![(0, place(5)), (1, place(6))]);
    machine.settled(21, vec![(4, place(7))]);
    let done = machine.get().unwrap();
    assert_eq!(done.state(), TransactionState::Committed);
    let placed = done.parts.iter().map(|p| p.place.map(|p| p.index));
    assert_eq!(
        placed.collect::<Vec<_>>(),
        [Some(5), None, None, None, Some(7)]
    );
}

#[test]
fn what_a_transaction_begins_with_is_not_given_up_alone() {
    let mut machine = Fixture::new();
    machine.begin(vec![part(20, &[0])], &[]);
    let give_up = TransactionCommand::GiveUp {
        id: ID,
        first: 0,
        count: 1,
    };
    assert_eq!(machine.transact(give_up), TransactionReply::NotPrepared);
    assert_eq!(machine.state(), TransactionState::Preparing);
}

#[test]
fn what_is_never_prepared_is_rolled_back() {
    let mut machine = Fixture::new();
    machine.begin(vec![part(20, &[0])], &[]);
    assert_eq!(machine.due(), TransactionState::Preparing);
    machine.now_ms += PREPARE_MS;
    assert_eq!(machine.due(), TransactionState::RollingBack);
}

#[test]
fn checks_come_at_their_times_and_end() {
    let mut machine = Fixture::new();
    machine.begin(Vec::new(), &[]);
    machine.now_ms += 99;
    assert_eq!(machine.due(), TransactionState::Open);
    machine.now_ms += 1;
    for checks in 1..=2 {
        for _ in 0..2 {
            // However often it is looked at, each time counts once.
            assert_eq!(machine.due(), TransactionState::NeedsCheck);
            assert_eq!(machine.get().unwrap().checks, checks);
        }
        assert_eq!(
            machine.listed(Some("p"), Some(TransactionState::NeedsCheck)),
            1
        );
        assert_eq!(machine.listed(Some("p"), Some(TransactionState::Open)), 0);
        assert_eq!(machine.listed(Some("q"), None), 0);
        machine.now_ms += 1_000;
    }
    assert_eq!(machine.due(), TransactionState::Expired);
    assert_eq!(machine.listed(None, Some(TransactionState::Expired)), 1);
    assert!(matches!(
        machine.decide(Decision::Commit),
        TransactionReply::Ended(_)
    ));
    assert!(matches!(
        machine.decide(Decision::Rollback),
        TransactionReply::Is(_)
    ));
    assert_eq!(machine.state(), TransactionState::Expired);
    assert_eq!(
        machine.machine.view().transaction_counts().unwrap().expired,
        1
    );
}

#[test]
fn the_due_index_has_each_undone_transaction_once() {
    let mut machine = Fixture::new();
    machine.begin(vec![part(20, &[0])], &[]);
    let due = |machine: &Fixture| {
        let view = machine.machine.view();
        [Duty::Look, Duty::Tell].map(|duty| view.due_transactions(duty, None, 10).unwrap())
    };
    let begun = machine.now_ms;
    assert_eq!(due(&machine), [vec![(begun + PREPARE_MS, ID)], vec![]]);
    machine.prepared(0, 1, false);
    assert_eq!(due(&machine), [vec![(begun + 100, ID)], vec![]]);
    machine.now_ms += 50;
    machine.decide(Decision::Commit);
    let resumed = machine.now_ms + RESUME_AFTER_MS;
    assert_eq!(due(&machine), [vec![], vec![(resumed, ID)]]);
    machine.settled(20, vec![(0, place(1))]);
    assert_eq!(due(&machine), [vec![], vec![]]);
}

#[test]
fn ended_transactions_are_forgotten_after_a_day() {
    let mut machine = Fixture::new();
    machine.begin(Vec::new(), &[]);
    machine.decide(Decision::Commit);
    let at = machine.machine.view().forget_transactions_at().unwrap();
    assert_eq!(at, Some(machine.now_ms + KEPT_MS));
    machine.now_ms += KEPT_MS - 1;
    machine.transact(TransactionCommand::Forget);
    assert_eq!(machine.state(), TransactionState::Committed);
    machine.now_ms += 1;
    machine.transact(TransactionCommand::Forget);
    assert_eq!(machine.get(), None);
    assert_eq!(machine.listed(None, None), 0);
    assert_eq!(
        machine.machine.view().transaction_counts().unwrap().ended,
        0
    );
    assert_eq!(machine.decide(Decision::Commit), TransactionReply::NotFound);
}

#[test]
fn the_oldest_ended_go_first_when_there_are_too_many() {
    let mut machine = Fixture::new();
    let id = |n: u64| {
        let mut id = [0; 16];
        id[8..].copy_from_slice(&n.to_be_bytes());
        id
    };
    for n in 0..MAX_ENDED + 5 {
        machine.now_ms += 1;
        machine.transact(begin(id(n), Vec::new(), &[]));
        let decision = Decision::Rollback;
        machine.transact(TransactionCommand::Decide {
            id: id(n),
            decision,
        });
    }
    let view = machine.machine.view();
    assert_eq!(view.transaction_counts().unwrap().ended, MAX_ENDED);
    assert_eq!(view.transaction(&id(4)).unwrap(), None);
    assert!(view.transaction(&id(5)).unwrap().is_some());
}

#[test]
fn a_transaction_and_a_producer_group_have_bounds() {
    let mut machine = Fixture::new();
    let all: Vec<u32> = (0..MAX_MESSAGES).collect();
    machine.begin(vec![part(20, &all)], &[]);
    machine.prepared(0, 1, false);
    let parts = vec![part(20, &[0])];
    let reply = machine.transact(extend(parts));
    assert!(matches!(reply, TransactionReply::Invalid(text) if text.contains("1000")));
    let large = Part {
        bytes: MAX_BYTES + 1,
        ..part(20, &[0])
    };
    let reply = machine.transact(begin([8; 16], vec![large], &[]));
    assert!(matches!(reply, TransactionReply::Invalid(_)));
    let lying = part(20, &[5]);
    let reply = machine.transact(begin([8; 16], vec![lying], &[]));
    assert!(matches!(reply, TransactionReply::Invalid(_)));
    for n in 1..MAX_OPEN_PER_GROUP {
        let mut id = [9; 16];
        id[..4].copy_from_slice(&n.to_be_bytes());
        machine.transact(begin(id, Vec::new(), &[]));
    }
    let reply = machine.transact(begin([8; 16], Vec::new(), &[]));
    assert!(matches!(reply, TransactionReply::TooMany(_)), "{reply:?}");
    machine.decide(Decision::Rollback);
    machine.settled(20, Vec::new());
    let reply = machine.transact(begin([8; 16], Vec::new(), &[]));
    assert!(
        matches!(reply, TransactionReply::Recorded { .. }),
        "{reply:?}"
    );
}

#[test]
fn what_is_decided_and_not_settled_takes_its_room_until_it_is() {
    let mut machine = Fixture::new();
    let id = |n: u32| {
        let mut id = [9; 16];
        id[..4].copy_from_slice(&n.to_be_bytes());
        id
    };
    let decision = Decision::Rollback;
    for n in 0..MAX_OPEN_PER_GROUP {
        let id = id(n);
        machine.transact(begin(id, vec![part(20, &[0])], &[]));
        machine.transact(TransactionCommand::Decide { id, decision });
    }
    let reply = machine.transact(begin(ID, Vec::new(), &[]));
    assert!(matches!(reply, TransactionReply::TooMany(_)), "{reply:?}");
    machine.transact(TransactionCommand::Settled {
        id: id(0),
        queues: vec![(20, Vec::new())],
        offset_groups: Vec::new(),
    });
    let reply = machine.transact(begin(ID, Vec::new(), &[]));
    assert!(matches!(reply, TransactionReply::Recorded { .. }));
}

#[test]
fn the_oldest_are_listed_first_whatever_their_ids_and_groups() {
    let mut machine = Fixture::new();
    for n in (1..=6u8).rev() {
        machine.now_ms += 1;
        let mut command = begin([n; 16], Vec::new(), &[]);
        if let TransactionCommand::Begin { new, .. } = &mut command {
            new.producer_group = ["p", "q"][usize::from(n % 2)].to_owned();
        }
        machine.transact(command);
    }
    // In another state than the rest, whose turn comes later.
    machine.transact(TransactionCommand::Decide {
        id: [6; 16],
        decision: Decision::Commit,
    });
    let listed = |producer_group: Option<&str>, limit| {
        let filter = TransactionFilter {
            producer_group: producer_group.map(str::to_owned),
            state: None,
            limit,
        };
        let found = machine.machine.view().transactions(&filter).unwrap();
        found.iter().map(|t| t.id[0]).collect::<Vec<_>>()
    };
    assert_eq!(listed(None, 3), [6, 5, 4]);
    assert_eq!(listed(Some("q"), 2), [5, 3]);
    assert_eq!(listed(Some("p"), 10), [6, 4, 2]);
}

#[test]
fn whoever_waits_is_woken() {
    let mut machine = Fixture::new();
    let mut watched = machine.machine.view().watch_transactions();
    watched.mark_unchanged();
    machine.commit(0, 1);
    assert!(!watched.has_changed().unwrap());
    machine.begin(Vec::new(), &[]);
    assert!(watched.has_changed().unwrap());
}
