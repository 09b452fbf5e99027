use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn shapes(version: u64, topics: &[(&str, TopicId, u32)]) -> BTreeMap<String, TopicShape> {
    let shape = |(name, id, queues): &(&str, TopicId, u32)| {
        let found = (*queues > 0).then_some((*id, *queues));
        ((*name).to_owned(), TopicShape { version, found })
    };
    topics.iter().map(shape).collect()
}

fn newcomer(id: &str, topics: &[&str]) -> Newcomer {
    Newcomer {
        id: id.to_owned(),
        instance_id: None,
        topics: topics.iter().map(|t| (*t).to_owned()).collect(),
        tag: None,
        filter: None,
        delivery: Delivery::Cluster,
        start: GroupStart::Earliest,
        session_timeout_ms: 10_000,
        strategy: None,
    }
}

fn named(id: &str, instance: &str, topics: &[&str]) -> Newcomer {
    Newcomer {
        instance_id: Some(instance.to_owned()),
        ..newcomer(id, topics)
    }
}

/// A group over topic `t`, id 1, of `queues` queues.
struct Fixture {
    group: Membership,
    topics: BTreeMap<String, TopicShape>,
}

impl Fixture {
    fn new(queues: u32) -> Self {
        Self {
            group: Membership::default(),
            topics: shapes(1, &[("t", 1, queues)]),
        }
    }

    fn join(&mut self, id: &str) -> u64 {
        self.join_as(newcomer(id, &["t"]))
    }

    fn join_as(&mut self, newcomer: Newcomer) -> u64 {
        let id = self.group.join(newcomer, &self.topics).unwrap();
        self.epoch(&id)
    }

    fn epoch(&self, id: &str) -> u64 {
        self.group.members[id].epoch
    }

    fn queues(&self, id: &str) -> Vec<u32> {
        self.group.assignment(id).iter().map(|q| q.queue).collect()
    }

    /// A heartbeat of a member that knows everything and has stopped what it was asked to stop.
    fn beat(&mut self, id: &str) -> Vec<u32> {
        let (epoch, owned) = (self.epoch(id), self.group.assignment(id));
        self.group.heartbeat(id, epoch, Some(&owned)).unwrap();
        self.queues(id)
    }

    fn commits(&self, id: &str, epoch: u64, queue: u32) -> bool {
        let mark = MemberMark {
            id: id.to_owned(),
            epoch,
        };
        self.group.may_commit(&mark, QueueId { topic: 1, queue })
    }
}

#[test]
fn a_queue_moves_only_after_its_owner_has_stopped() {
    let mut group = Fixture::new(4);
    let first = group.join("a");
    assert_eq!(group.queues("a"), [0, 1, 2, 3]);
    let second = group.join("b");
    assert_eq!(group.queues("b"), [0u32; 0], "nobody has stopped yet");
    assert_eq!(group.queues("a"), [0, 1]);
    assert!(group.group.is_moving());

    // Of the old epoch: the member doesn't know yet, whatever it lists.
    let all: Vec<QueueId> = (0..4).map(|queue| QueueId { topic: 1, queue }).collect();
    assert_eq!(group.group.heartbeat("a", first, Some(&all)), Ok(false));
    assert_eq!(group.group.heartbeat("a", first, Some(&[])), Ok(false));
    assert_eq!(group.group.heartbeat("a", first, None), Ok(false));
    // Of the new epoch, still busy with one of the two.
    let told = group.epoch("a");
    assert!(told > first);
    assert_eq!(group.group.heartbeat("a", told, Some(&all[..3])), Ok(true));
    assert_eq!(group.queues("b"), [3]);
    assert!(group.epoch("b") > second, "b hears of it");
    assert_eq!(group.group.heartbeat("a", told, None), Ok(true));
    assert_eq!(group.queues("b"), [2, 3]);
    assert!(!group.group.is_moving());
    assert_eq!(group.epoch("a"), told, "what doesn't change isn't told");
}

#[test]
fn commits_are_of_the_owner_in_an_epoch_in_which_it_had_the_queue() {
    let mut group = Fixture::new(2);
    let first = group.join("a");
    assert!(group.commits("a", first, 0) && group.commits("a", first, 1));
    assert!(!group.commits("a", first + 1, 0), "never told");
    assert!(!group.commits("nobody", first, 0));
    group.join("b");
    // While it is asked to stop it may still finish.
    assert!(group.commits("a", first, 1));
    group.beat("a");
    let own = group.epoch("b");
    assert!(!group.commits("a", first, 1) && !group.commits("a", group.epoch("a"), 1));
    assert!(group.commits("b", own, 1));
    assert!(!group.commits("b", own - 1, 1), "before it had it");
    assert!(!group.commits("b", own, 0), "it is another's");
    // What did not move can be committed with the older epoch.
    assert!(group.commits("a", first, 0));

    // Back with its first owner: what that did in its first time is over.
    group.group.remove(&[("b".to_owned(), u64::MAX)]);
    assert_eq!(group.queues("a"), [0, 1]);
    assert!(!group.commits("a", first, 1));
    assert!(group.commits("a", group.epoch("a"), 1));
    assert!(!group.commits("b", own, 1));
}

#[test]
fn joining_again_is_the_same_member_with_its_queues() {
    let mut group = Fixture::new(4);
    let first = group.join_as(named("a", "host-1", &["t"]));
    group.join_as(named("b", "host-2", &["t"]));
    group.beat("a");
    let before = group.queues("a");
    let again = group.join_as(named("c", "host-1", &["t"]));
    assert!(again > first && group.group.members.len() == 2);
    assert_eq!(group.queues("a"), before);
    assert!(!group.commits("a", again - 1, before[0]), "its former life");
    assert!(group.commits("a", again, before[0]));
    assert_eq!(
        group.group.heartbeat("a", again - 1, None),
        Err(NotAMember::Fenced { current: again })
    );
    // Whoever was late to expel the former life leaves the new one alone.
    assert!(!group.group.remove(&[("a".to_owned(), first)]));
    assert!(group.group.remove(&[("a".to_owned(), again)]));
    assert_eq!(group.queues("b"), [0, 1, 2, 3]);
    assert_eq!(
        group.group.heartbeat("a", again, None),
        Err(NotAMember::Unknown)
    );
}

#[test]
fn topics_grow_go_and_come_back() {
    let mut group = Fixture::new(2);
    group.join_as(newcomer("a", &["later", "t"]));
    let before = group.epoch("a");
    assert!(group.group.see_topics(&shapes(5, &[("t", 1, 3)])));
    assert_eq!(group.queues("a"), [0, 1, 2]);
    assert!(group.epoch("a") > before);
    // A node whose catalog is behind.
    assert!(
        !group
            .group
            .see_topics(&shapes(4, &[("t", 1, 2), ("later", 0, 0)]))
    );
    assert!(group.group.see_topics(&shapes(6, &[("later", 2, 1)])));
    assert_eq!(group.group.assignment("a").len(), 4);
    assert!(group.group.see_topics(&shapes(7, &[("t", 1, 0)])));
    assert_eq!(
        group.group.assignment("a"),
        [QueueId { topic: 2, queue: 0 }]
    );
    // Made again, it is another topic.
    assert!(group.group.see_topics(&shapes(8, &[("t", 9, 1)])));
    assert!(
        group
            .group
            .assignment("a")
            .contains(&QueueId { topic: 9, queue: 0 })
    );
    assert!(
        !group.group.see_topics(&shapes(9, &[("t", 9, 1)])),
        "as it was"
    );
}

#[test]
fn broadcast_gives_everybody_everything() {
    let mut group = Fixture::new(2);
    let everything = |id: &str, instance: &str| Newcomer {
        delivery: Delivery::Broadcast,
        ..named(id, instance, &["t"])
    };
    group.join_as(everything("a", "1"));
    let epoch = group.join_as(everything("b", "2"));
    assert_eq!(
        (group.queues("a"), group.queues("b")),
        (vec![0, 1], vec![0, 1])
    );
    assert!(group.commits("b", epoch, 1) && !group.commits("b", epoch, 2));
    assert_eq!(
        group.group.join(newcomer("c", &["t"]), &group.topics),
        Err(JoinRefused::Delivery(Delivery::Broadcast))
    );
    group
        .group
        .remove(&[("a".to_owned(), 99), ("b".to_owned(), 99)]);
    group.join("c");
    assert_eq!(group.queues("c"), [0, 1], "an empty group can choose anew");
}

#[test]
fn the_last_word_about_the_strategy_counts() {
    let mut group = Fixture::new(4);
    group.join("a");
    let with = |id: &str, strategy| Newcomer {
        strategy: Some(strategy),
        ..newcomer(id, &["t"])
    };
    group.join_as(with("b", AssignStrategy::RoundRobin));
    group.beat("a");
    assert_eq!(
        (group.queues("a"), group.queues("b")),
        (vec![0, 2], vec![1, 3])
    );
    group.join("c");
    assert_eq!(group.group.strategy, AssignStrategy::RoundRobin);
}

#[test]
fn a_group_takes_so_many_and_no_more() {
    let mut group = Fixture::new(1);
    for n in 0..MAX_MEMBERS {
        group.join(&format!("m{n}"));
    }
    let one_more = group.group.join(newcomer("x", &["t"]), &group.topics);
    assert_eq!(one_more, Err(JoinRefused::Full));
}

#[test]
fn topics_with_too_many_queues_are_refused_and_leave_nothing_behind() {
    let mut group = Fixture::new(4);
    group.join("a");
    let before = group.group.clone();
    let wide = shapes(2, &[("u", 2, 9_997)]);
    let refused = group.group.join(newcomer("b", &["u"]), &wide);
    assert_eq!(refused, Err(JoinRefused::TooManyQueues));
    assert_eq!(group.group, before);
}

#[derive(Debug, Clone)]
enum Event {
    Join(u8, u8),
    Rejoin(u8),
    /// Some members know more than others, and stop owning what they were asked to, or not yet.
    Beat {
        member: u8,
        newest: bool,
        stopped: bool,
    },
    Leave(u8),
    Expire(u8),
    Grow(u8),
}

fn event() -> impl proptest::strategy::Strategy<Value = Event> {
    let beat = |(member, newest, stopped)| Event::Beat {
        member,
        newest,
        stopped,
    };
    prop_oneof![
        2 => (0..6u8, 0..3u8).prop_map(|(m, topics)| Event::Join(m, topics)),
        1 => (0..6u8).prop_map(Event::Rejoin),
        6 => (0..6u8, any::<bool>(), any::<bool>()).prop_map(beat),
        1 => (0..6u8).prop_map(Event::Leave),
        1 => (0..6u8).prop_map(Event::Expire),
        1 => (0..3u8).prop_map(Event::Grow),
    ]
}

/// What a client of the group believes.
#[derive(Debug, Clone, Default)]
struct Client {
    id: String,
    epoch: u64,
    /// What it consumes.
    owned: BTreeSet<QueueId>,
}

proptest! {
    /// Whatever clients do in whatever order: no queue is consumed by two that are members, nobody
    /// but its owner may commit, and in the end every queue has the owner it is to have.
    #[test]
    fn no_queue_is_ever_owned_twice(events in proptest::collection::vec(event(), 1..80)) {
        let mut group = Membership::default();
        let mut topics = shapes(1, &[("t", 1, 5), ("u", 2, 3)]);
        let mut clients: BTreeMap<u8, Client> = BTreeMap::new();
        let (mut lives, mut version, mut width) = (0, 1, 5);
        let mut former: Vec<(MemberMark, BTreeSet<QueueId>)> = Vec::new();
        let subscription = |n: u8| match n { 0 => vec!["t"], 1 => vec!["u"], _ => vec!["t", "u"] };
        for event in events {
            match event {
                Event::Join(n, choice) => {
                    lives += 1;
                    let joins = named(&format!("m{lives}"), &format!("i{n}"), &subscription(choice));
                    let id = group.join(joins, &topics).unwrap();
                    if let Some(old) = clients.remove(&n) {
                        former.push((MemberMark { id: old.id, epoch: old.epoch }, old.owned));
                    }
                    let owned = group.assignment(&id).into_iter().collect();
                    clients.insert(n, Client { epoch: group.members[&id].epoch, id, owned });
                }
                Event::Rejoin(n) => {
                    let Some(client) = clients.get_mut(&n) else { continue };
                    let known = group.members[&client.id].clone();
                    let names: Vec<&str> = known.topics.iter().map(String::as_str).collect();
                    let old = MemberMark { id: client.id.clone(), epoch: client.epoch };
                    former.push((old, client.owned.clone()));
                    group.join(named("unused", &format!("i{n}"), &names), &topics).unwrap();
                    client.epoch = group.members[&client.id].epoch;
                    client.owned = group.assignment(&client.id).into_iter().collect();
                }
                Event::Beat { member, newest, stopped } => {
                    let Some(client) = clients.get_mut(&member) else { continue };
                    let current = group.members[&client.id].epoch;
                    if newest && client.epoch != current {
                        // The answer of an earlier heartbeat arrives now.
                        client.epoch = current;
                        let told: BTreeSet<QueueId> =
                            group.assignment(&client.id).into_iter().collect();
                        client.owned = match stopped {
                            true => told,
                            false => client.owned.union(&told).copied().collect(),
                        };
                    } else if stopped && client.epoch == current {
                        client.owned = group.assignment(&client.id).into_iter().collect();
                    }
                    let owned: Vec<QueueId> = client.owned.iter().copied().collect();
                    group.heartbeat(&client.id, client.epoch, Some(&owned)).unwrap();
                }
                Event::Leave(n) | Event::Expire(n) => {
                    let Some(client) = clients.remove(&n) else { continue };
                    let joined = group.members[&client.id].joined;
                    prop_assert!(group.remove(&[(client.id.clone(), joined)]));
                    former.push((MemberMark { id: client.id, epoch: client.epoch }, client.owned));
                }
                Event::Grow(by) => {
                    version += 1;
                    width += u32::from(by);
                    topics = shapes(version, &[("t", 1, width), ("u", 2, 3)]);
                    group.see_topics(&topics);
                }
            }
            // Two clients that are members never consume the same queue.
            let mut taken = BTreeMap::new();
            for client in clients.values() {
                for queue in &client.owned {
                    let Some(turn) = group.queues.get(queue) else { continue };
                    let mark = MemberMark { id: client.id.clone(), epoch: client.epoch };
                    if turn.owner == client.id {
                        prop_assert!(group.may_commit(&mark, *queue));
                    }
                    prop_assert_eq!(taken.insert(*queue, client.id.clone()), None, "{:?}", queue);
                }
            }
            for (queue, turn) in &group.queues {
                prop_assert!(group.members.contains_key(&turn.owner), "{:?}", queue);
                prop_assert!(group.members.contains_key(&turn.target), "{:?}", queue);
                for client in clients.values().filter(|client| client.id != turn.owner) {
                    let mark = MemberMark { id: client.id.clone(), epoch: client.epoch };
                    prop_assert!(!group.may_commit(&mark, *queue), "{:?} {:?}", mark, queue);
                }
            }
            for (mark, owned) in &former {
                for queue in owned {
                    prop_assert!(!group.may_commit(mark, *queue), "{:?} {:?}", mark, queue);
                }
            }
        }
        // When everybody hears and does what it is told, the group comes to rest.
        for _ in 0..3 {
            for client in clients.values() {
                let (id, epoch) = (&client.id, group.members[&client.id].epoch);
                let owned = group.assignment(id);
                group.heartbeat(id, epoch, Some(&owned)).unwrap();
            }
        }
        prop_assert!(!group.is_moving());
        let assigned: usize = clients.values().map(|c| group.assignment(&c.id).len()).sum();
        prop_assert_eq!(assigned, group.queues.len());
    }
}
