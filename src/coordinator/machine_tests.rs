use proptest::prelude::*;

use super::*;
use crate::broker::MemberMark;

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

fn verdict(machine: &mut CoordinatorMachine, command: CoordinatorCommand) -> CommitVerdict {
    match machine.execute(command) {
        CoordinatorReply::Committed(verdicts) => verdicts[0],
        other => panic!("{other:?}"),
    }
}

fn register(machine: &mut CoordinatorMachine, name: Option<&str>) -> (i64, i16, Vec<u64>) {
    let name = name.map(str::to_owned);
    match machine.execute(CoordinatorCommand::RegisterProducer { name }) {
        CoordinatorReply::Producer { id, epoch, fence } => (id, epoch, fence),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_committed_offset_goes_back_only_when_allowed() {
    let mut machine = CoordinatorMachine::new(0);
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
    assert_eq!(machine.view().offsets("g")[0].offset, 5);
    assert_eq!(
        verdict(&mut machine, commit("g", 0, 4, true)),
        CommitVerdict::Done
    );
    assert_eq!(machine.view().offsets("g")[0].offset, 4);
}

#[test]
fn groups_whose_names_begin_alike_are_apart() {
    let mut machine = CoordinatorMachine::new(0);
    machine.execute(commit("g", 300, 1, false));
    machine.execute(commit("g", 2, 2, false));
    machine.execute(commit("gg", 0, 3, false));
    let offsets = machine.view().offsets("g");
    let queues: Vec<_> = offsets.iter().map(|o| (o.queue, o.offset)).collect();
    assert_eq!(queues, [(2, 2), (300, 1)]);
}

#[test]
fn a_member_is_fenced_while_there_are_none() {
    let mut machine = CoordinatorMachine::new(0);
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
    assert!(machine.view().offsets("g").is_empty());
}

#[test]
fn producer_ids_are_unique_over_coordinators_and_names_raise_the_epoch() {
    let mut two = CoordinatorMachine::new(2);
    let mut three = CoordinatorMachine::new(3);
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
fn a_new_epoch_learns_where_the_old_one_wrote() {
    let mut machine = CoordinatorMachine::new(0);
    let (id, _, _) = register(&mut machine, Some("a"));
    let attach = |machine: &mut CoordinatorMachine, epoch, queue_group| {
        machine.execute(CoordinatorCommand::AttachProducer {
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

fn any_command() -> impl Strategy<Value = CoordinatorCommand> {
    let name = (0..3u8).prop_map(|n| format!("n{n}"));
    prop_oneof![
        (name.clone(), 0..3u32, 0..9u64, any::<bool>())
            .prop_map(|(group, queue, offset, rewind)| commit(&group, queue, offset, rewind)),
        proptest::option::of(name).prop_map(|name| CoordinatorCommand::RegisterProducer { name }),
        (1..4i64, 0..2i16, 0..3u64).prop_map(|(n, epoch, queue_group)| {
            CoordinatorCommand::AttachProducer {
                id: NAMED_BIT | n,
                epoch,
                queue_group,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn replicas_agree_whenever_they_restart(
        commands in proptest::collection::vec((any_command(), any::<bool>()), 1..60)
    ) {
        let mut steady = CoordinatorMachine::new(0);
        let mut shaken = CoordinatorMachine::new(0);
        let id = LogId::new(1, 1);
        for (command, restart) in commands {
            let body = Bytes::from(postcard::to_stdvec(&command).unwrap());
            prop_assert_eq!(steady.apply(id, &body), shaken.apply(id, &body));
            if restart {
                let state = shaken.checkpoint().unwrap();
                shaken = CoordinatorMachine::new(0);
                shaken.install(id, &state).unwrap();
            }
            prop_assert_eq!(steady.state_hash(), shaken.state_hash());
        }
    }
}
