use proptest::prelude::*;

use quorate_storage::RaftGroupId;
use quorate_storage::derived::DerivedStore;
use tempfile::TempDir;

use super::*;
use crate::broker::MemberMark;
use crate::coordinator::membership::{Delivery, GroupStart, Newcomer, QueueId, TopicShape};
use crate::coordinator::producers::NAMED_BIT;
use crate::coordinator::records::{NamedProducer, producer_key};
use crate::coordinator::{
    AssignStrategy, CommitVerdict, NotAMember, QueueOffset, is_named, owner_of_producer, stamp,
};

/// A coordinator over a store of its own.
struct Fixture {
    machine: CoordinatorMachine,
    applied: u64,
    store: DerivedStore,
    _dir: TempDir,
}

impl Fixture {
    fn new(number: u32) -> Self {
        let dir = TempDir::new().unwrap();
        let store = DerivedStore::open(&dir.path().join("derived")).unwrap();
        let group = store.group(RaftGroupId(16));
        Self {
            machine: CoordinatorMachine::new(number, group, Arc::default()),
            applied: 0,
            store,
            _dir: dir,
        }
    }

    fn apply_bytes(&mut self, body: &Bytes) -> Bytes {
        self.applied += 1;
        self.machine.apply(LogId::new(1, self.applied), body)
    }

    fn apply(&mut self, command: CoordinatorCommand) -> CoordinatorReply {
        let body = postcard::to_stdvec(&command).unwrap();
        postcard::from_bytes(&self.apply_bytes(&stamp(0, &body))).unwrap()
    }

    /// Another life of the same replica, before it has restored anything.
    fn restart(&mut self) {
        let group = self.store.group(RaftGroupId(16));
        self.machine = CoordinatorMachine::new(self.machine.number, group, Arc::default());
    }

    fn offsets(&self, group: &str) -> Vec<QueueOffset> {
        self.machine.view().offsets(group).unwrap()
    }
}

fn commit(group: &str, queue: u32, offset: u64, allow_rewind: bool) -> CoordinatorCommand {
    CoordinatorCommand::Commit {
        group: group.to_owned(),
        offsets: vec![QueueOffset {
            topic: 1,
            queue,
            offset,
        }],
        allow_rewind,
        member: None,
    }
}

fn verdict(machine: &mut Fixture, command: CoordinatorCommand) -> CommitVerdict {
    match machine.apply(command) {
        CoordinatorReply::Committed(verdicts) => verdicts[0],
        other => panic!("{other:?}"),
    }
}

fn register(machine: &mut Fixture, name: Option<&str>) -> (i64, i16, Vec<u64>) {
    let name = name.map(str::to_owned);
    match machine.apply(CoordinatorCommand::RegisterProducer { name }) {
        CoordinatorReply::Producer {
            id, epoch, fence, ..
        } => (id, epoch, fence),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_committed_offset_goes_back_only_when_allowed() {
    let mut machine = Fixture::new(0);
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 5, false)),
        CommitVerdict::Done
    );
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 5, false)),
        CommitVerdict::Done
    );
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 4, false)),
        CommitVerdict::Conflict { committed: 5 }
    );
    assert_eq!(machine.offsets("g")[0].offset, 5);
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 4, true)),
        CommitVerdict::Done
    );
    assert_eq!(machine.offsets("g")[0].offset, 4);
}

#[test]
fn groups_whose_names_begin_alike_are_apart() {
    let mut machine = Fixture::new(0);
    machine.apply(commit("g", 300, 1, false));
    machine.apply(commit("g", 2, 2, false));
    machine.apply(commit("gg", 0, 3, false));
    let offsets = machine.offsets("g");
    let queues: Vec<_> = offsets.iter().map(|o| (o.queue, o.offset)).collect();
    assert_eq!(queues, [(2, 2), (300, 1)]);
}

#[test]
fn a_member_is_fenced_while_there_are_none() {
    let mut machine = Fixture::new(0);
    let CoordinatorCommand::Commit { group, offsets, .. } = commit("g", 0, 5, false) else {
        unreachable!()
    };
    let command = CoordinatorCommand::Commit {
        group,
        offsets,
        allow_rewind: false,
        member: Some(MemberMark {
            id: "m".to_owned(),
            epoch: 1,
        }),
    };
    assert_eq!(verdict(&mut machine, command), CommitVerdict::Fenced);
    assert!(machine.offsets("g").is_empty());
}

#[test]
fn producer_ids_are_unique_over_coordinators_and_names_raise_the_epoch() {
    let mut two = Fixture::new(2);
    let mut three = Fixture::new(3);
    let ids = [
        register(&mut two, None).0,
        register(&mut two, None).0,
        register(&mut two, Some("a")).0,
        register(&mut three, None).0,
        register(&mut three, Some("a")).0,
    ];
    let mut distinct = ids.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), ids.len());
    assert!(ids.iter().all(|id| *id > 0));
    assert_eq!(owner_of_producer(ids[2]), 2);
    assert!(is_named(ids[2]) && !is_named(ids[0]));
    assert_eq!(register(&mut two, Some("a")), (ids[2], 1, vec![]));
}

#[test]
fn a_name_whose_epochs_are_used_up_goes_on_under_another_id() {
    let mut machine = Fixture::new(0);
    let (old, _, _) = register(&mut machine, Some("p"));
    let mut known: NamedProducer = {
        let records = &machine.machine.records;
        records.read(&producer_key("p")).unwrap().unwrap()
    };
    known.epoch = i16::MAX - 2;
    known.queues = [5, 9].into();
    machine.machine.records.store(producer_key("p"), &known);
    // The last epoch leaves room for one that refuses it.
    let last = register(&mut machine, Some("p"));
    assert_eq!(last, (old, i16::MAX - 1, vec![5, 9]));
    let renew = |machine: &mut Fixture| {
        machine.apply(CoordinatorCommand::RegisterProducer {
            name: Some("p".to_owned()),
        })
    };
    let CoordinatorReply::Producer {
        id,
        epoch,
        retired,
        fence,
    } = renew(&mut machine)
    else {
        panic!("not registered");
    };
    assert!(id != old && is_named(id));
    assert_eq!((epoch, retired, fence), (0, Some(old), vec![5, 9]));
    let attach = |machine: &mut Fixture, id, epoch| {
        machine.apply(CoordinatorCommand::AttachProducer {
            id,
            epoch,
            queue_group: 5,
        })
    };
    let refused = CoordinatorReply::Fenced { current: i16::MAX };
    assert_eq!(attach(&mut machine, old, i16::MAX - 1), refused);
    assert_eq!(attach(&mut machine, old, 0), refused);
    assert_eq!(attach(&mut machine, id, 0), CoordinatorReply::Attached);
    // Whoever could not put up all the fences does it with the next registration.
    let again = renew(&mut machine);
    assert!(matches!(
        again,
        CoordinatorReply::Producer { epoch: 1, retired: Some(r), .. } if r == old
    ));
}

#[test]
fn a_new_epoch_learns_where_the_old_one_wrote() {
    let mut machine = Fixture::new(0);
    let (id, _, _) = register(&mut machine, Some("a"));
    let attach = |machine: &mut Fixture, epoch, queue_group| {
        machine.apply(CoordinatorCommand::AttachProducer {
            id,
            epoch,
            queue_group,
        })
    };
    assert_eq!(attach(&mut machine, 0, 1030), CoordinatorReply::Attached);
    assert_eq!(attach(&mut machine, 0, 1025), CoordinatorReply::Attached);
    assert_eq!(
        attach(&mut machine, 1, 1025),
        CoordinatorReply::UnknownProducer
    );
    assert_eq!(register(&mut machine, Some("a")), (id, 1, vec![1025, 1030]));
    assert_eq!(
        attach(&mut machine, 0, 1031),
        CoordinatorReply::Fenced { current: 1 }
    );
    // Whoever registered may have died before it fenced: the next one gets the list again.
    assert_eq!(register(&mut machine, Some("a")), (id, 2, vec![1025, 1030]));
}

fn shapes(version: u64, queues: u32) -> std::collections::BTreeMap<String, TopicShape> {
    let found = (queues > 0).then_some((1, queues));
    [("t".to_owned(), TopicShape { version, found })].into()
}

fn join(group: &str, id: &str, instance: Option<&str>) -> CoordinatorCommand {
    CoordinatorCommand::Join {
        group: group.to_owned(),
        newcomer: Newcomer {
            id: id.to_owned(),
            instance_id: instance.map(str::to_owned),
            topics: vec!["t".to_owned()],
            tag: None,
            filter: None,
            delivery: Delivery::Cluster,
            start: GroupStart::Latest,
            session_timeout_ms: 1_000,
            strategy: None,
        },
        topics: shapes(1, 3),
    }
}

fn by(member: &str, epoch: u64, command: CoordinatorCommand) -> CoordinatorCommand {
    match command {
        CoordinatorCommand::Commit {
            group,
            offsets,
            allow_rewind,
            ..
        } => CoordinatorCommand::Commit {
            group,
            offsets,
            allow_rewind,
            member: Some(MemberMark {
                id: member.to_owned(),
                epoch,
            }),
        },
        other => other,
    }
}

fn reset(group: &str, offset: u64, force: bool) -> CoordinatorCommand {
    CoordinatorCommand::Reset {
        group: group.to_owned(),
        offsets: vec![QueueOffset {
            topic: 1,
            queue: 0,
            offset,
        }],
        force,
    }
}

#[test]
fn while_there_are_members_offsets_are_theirs() {
    let mut machine = Fixture::new(0);
    verdict(&mut machine, commit("g", 0, 5, false));
    let joined = machine.apply(join("g", "m", None));
    assert_eq!(joined, CoordinatorReply::Joined("m".to_owned()));
    let nobody = verdict(&mut machine, commit("g", 0, 6, false));
    assert_eq!(nobody, CommitVerdict::Fenced);
    let own = by("m", 1, commit("g", 0, 6, false));
    assert_eq!(verdict(&mut machine, own), CommitVerdict::Done);
    let epoch_to_come = by("m", 2, commit("g", 0, 7, false));
    assert_eq!(verdict(&mut machine, epoch_to_come), CommitVerdict::Fenced);
    assert_eq!(
        machine.apply(reset("g", 1, false)),
        CoordinatorReply::GroupHasMembers(1)
    );
    assert_eq!(
        machine.apply(reset("g", 1, true)),
        CoordinatorReply::Committed(vec![CommitVerdict::Done])
    );
    assert_eq!(machine.offsets("g")[0].offset, 1);
}

#[test]
fn an_instance_of_a_broadcast_group_has_offsets_of_its_own() {
    let mut machine = Fixture::new(0);
    for (id, instance) in [("a", "one"), ("b", "two")] {
        let CoordinatorCommand::Join {
            group,
            mut newcomer,
            topics,
        } = join("g", id, Some(instance))
        else {
            unreachable!()
        };
        newcomer.delivery = Delivery::Broadcast;
        machine.apply(CoordinatorCommand::Join {
            group,
            newcomer,
            topics,
        });
    }
    let first = by("a", 1, commit("g", 2, 7, false));
    assert_eq!(verdict(&mut machine, first), CommitVerdict::Done);
    let second = by("b", 2, commit("g", 2, 3, false));
    assert_eq!(verdict(&mut machine, second), CommitVerdict::Done);
    let view = machine.machine.view();
    let offset = |instance| view.instance_offsets("g", instance).unwrap()[0].offset;
    assert_eq!((offset("one"), offset("two")), (7, 3));
    assert!(machine.offsets("g").is_empty());
}

#[test]
fn deleted_topics_are_forgotten() {
    let mut machine = Fixture::new(0);
    verdict(&mut machine, commit("g", 2, 7, false));
    verdict(&mut machine, commit("h", 2, 7, false));
    let begin = |topic| CoordinatorCommand::Begin {
        group: "b".to_owned(),
        instance: Some("one".to_owned()),
        offsets: vec![QueueOffset {
            topic,
            queue: 0,
            offset: 5,
        }],
    };
    machine.apply(join("b", "a", Some("one")));
    machine.apply(begin(1));
    machine.apply(begin(2));
    let known = |machine: &Fixture| machine.machine.view().committed_topics().unwrap();
    let all = [("b", 1), ("b", 2), ("g", 1), ("h", 1)];
    assert!(
        known(&machine)
            .iter()
            .map(|(g, t)| (g.as_str(), *t))
            .eq(all)
    );
    for group in ["b", "g"] {
        let forget = CoordinatorCommand::ForgetTopics {
            group: group.to_owned(),
            topics: [1, 7].into(),
        };
        assert_eq!(machine.apply(forget), CoordinatorReply::TopicsForgotten);
    }
    let left = [("b", 2), ("h", 1)];
    assert!(
        known(&machine)
            .iter()
            .map(|(g, t)| (g.as_str(), *t))
            .eq(left)
    );
}

#[test]
fn a_start_is_committed_once() {
    let mut machine = Fixture::new(0);
    machine.apply(join("g", "m", None));
    let mut begin = |queue, offset| {
        machine.apply(CoordinatorCommand::Begin {
            group: "g".to_owned(),
            instance: None,
            offsets: vec![QueueOffset {
                topic: 1,
                queue,
                offset,
            }],
        })
    };
    assert_eq!(begin(0, 5), CoordinatorReply::Begun(vec![5]));
    assert_eq!(begin(0, 9), CoordinatorReply::Begun(vec![5]));
}

#[test]
fn a_group_is_forgotten_bit_by_bit_once_nobody_is_in_it() {
    let mut machine = Fixture::new(0);
    machine.apply(join("g", "m", None));
    machine.apply(commit("other", 0, 1, false));
    let delete = || CoordinatorCommand::DeleteGroup {
        group: "g".to_owned(),
    };
    assert_eq!(
        machine.apply(delete()),
        CoordinatorReply::GroupHasMembers(1)
    );
    machine.apply(CoordinatorCommand::RemoveMembers {
        group: "g".to_owned(),
        members: vec![("m".to_owned(), 1)],
    });
    let offsets = (0..2_500).map(|queue| QueueOffset {
        topic: 1,
        queue,
        offset: 1,
    });
    machine.apply(CoordinatorCommand::Commit {
        group: "g".to_owned(),
        offsets: offsets.collect(),
        allow_rewind: false,
        member: None,
    });
    for more in [true, true, false] {
        let deleted = CoordinatorReply::GroupDeleted { more };
        assert_eq!(machine.apply(delete()), deleted);
    }
    assert_eq!(machine.apply(delete()), CoordinatorReply::UnknownGroup);
    assert!(machine.offsets("g").is_empty());
    let left = machine.machine.view().groups(None, 9).unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].name, "other");
}

#[test]
fn who_is_no_member_is_told_why() {
    let mut machine = Fixture::new(0);
    machine.apply(join("g", "m", Some("i")));
    machine.apply(join("g", "unused", Some("i")));
    let mut beat = |member: &str, epoch| {
        machine.apply(CoordinatorCommand::Heartbeat {
            group: "g".to_owned(),
            member: member.to_owned(),
            epoch,
            owned: None,
        })
    };
    assert_eq!(beat("m", 2), CoordinatorReply::MembersChanged);
    let fenced = NotAMember::Fenced { current: 2 };
    assert_eq!(beat("m", 1), CoordinatorReply::NotAMember(fenced));
    let unknown = CoordinatorReply::NotAMember(NotAMember::Unknown);
    assert_eq!(beat("unused", 2), unknown);
}

fn group_command() -> impl Strategy<Value = CoordinatorCommand> {
    let group = (0..2u8).prop_map(|n| format!("n{n}"));
    let member = (0..4u8).prop_map(|n| format!("m{n}"));
    let some = (group, member, 0..9u64, 0..4u32, any::<bool>());
    (0..8u8, some).prop_map(|(kind, (group, member, number, queue, flag))| match kind {
        0 | 1 => {
            let instance = format!("i{queue}");
            let joins = join(&group, &member, flag.then_some(instance.as_str()));
            match joins {
                CoordinatorCommand::Join {
                    group,
                    mut newcomer,
                    topics,
                } => {
                    newcomer.strategy = (number > 6).then_some(AssignStrategy::RoundRobin);
                    if flag && number == 0 {
                        newcomer.delivery = Delivery::Broadcast;
                    }
                    CoordinatorCommand::Join {
                        group,
                        newcomer,
                        topics,
                    }
                }
                other => other,
            }
        }
        2 => CoordinatorCommand::Heartbeat {
            group,
            member,
            epoch: number,
            owned: flag.then(|| vec![QueueId { topic: 1, queue }]),
        },
        3 => CoordinatorCommand::RemoveMembers {
            group,
            members: vec![(member, number)],
        },
        4 if flag && number == 0 => CoordinatorCommand::ForgetTopics {
            group,
            topics: [1].into(),
        },
        4 => CoordinatorCommand::SeeTopics {
            group,
            topics: shapes(number, queue),
        },
        5 => reset(&group, number, flag),
        6 => by(&member, number, commit(&group, queue, number, flag)),
        _ if flag => CoordinatorCommand::DeleteGroup { group },
        _ => CoordinatorCommand::Begin {
            group,
            instance: None,
            offsets: vec![QueueOffset {
                topic: 1,
                queue,
                offset: number,
            }],
        },
    })
}

fn any_command() -> impl Strategy<Value = CoordinatorCommand> {
    let name = (0..3u8).prop_map(|n| format!("n{n}"));
    prop_oneof![
        3 => group_command(),
        1 => (name.clone(), 0..3u32, 0..9u64, any::<bool>())
            .prop_map(|(group, queue, offset, rewind)| commit(&group, queue, offset, rewind)),
        1 => proptest::option::of(name).prop_map(|name| CoordinatorCommand::RegisterProducer { name }),
        1 => (1..4i64, 0..2i16, 0..3u64).prop_map(|(n, epoch, queue_group)| {
            CoordinatorCommand::AttachProducer {
                id: NAMED_BIT | n,
                epoch,
                queue_group,
            }
        }),
    ]
}

proptest! {
    // Each case opens two databases.
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn replicas_agree_whenever_they_restart(
        commands in proptest::collection::vec((any_command(), 0..4u8), 1..60)
    ) {
        let mut steady = Fixture::new(0);
        let mut shaken = Fixture::new(0);
        let mut log = Vec::new();
        let mut checkpoint = (0, None);
        for (command, event) in commands {
            let body = stamp(log.len() as u64, &postcard::to_stdvec(&command).unwrap());
            prop_assert_eq!(steady.apply_bytes(&body), shaken.apply_bytes(&body));
            log.push(body);
            let last = LogId::new(1, shaken.applied);
            match event {
                0 => checkpoint = (shaken.applied, Some(shaken.machine.checkpoint().unwrap())),
                // The store is ahead of the checkpoint, or was lost; then the log is applied again.
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
                _ => {
                    let state = steady.machine.checkpoint().unwrap();
                    shaken.machine.install(last, &state).unwrap();
                }
            }
            prop_assert_eq!(steady.machine.state_hash(), shaken.machine.state_hash());
        }
    }
}

#[test]
fn a_lost_store_is_noticed_and_nothing_is_answered_from_it() {
    let mut machine = Fixture::new(0);
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 5, false)),
        CommitVerdict::Done
    );
    machine.store.reset("a test").unwrap();
    let command = postcard::to_stdvec(&commit("g", 0, 6, false)).unwrap();
    assert!(machine.apply_bytes(&stamp(0, &command)).is_empty());
    assert!(machine.machine.soundness().broken().is_some());
    assert!(machine.machine.view().offsets("g").is_err());
    assert!(machine.machine.checkpoint().is_err());
}
