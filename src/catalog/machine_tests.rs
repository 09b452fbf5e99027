use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::exchange::{Binding, Exchange};

fn machine(nodes: u64) -> CatalogMachine {
    let mut machine = CatalogMachine::new(watch::Sender::new(Arc::default()));
    let bootstrap = CatalogCommand::Bootstrap {
        cluster_id: "c".to_owned(),
        nodes: (1..=nodes).map(|n| (n, format!("host{n}:1"))).collect(),
        coordinators: 16,
        limits: QueueLimits::default(),
    };
    assert_eq!(machine.execute(bootstrap), CatalogReply::Done);
    machine
}

fn create(machine: &mut CatalogMachine, name: &str, queues: u32, replicas: u32) -> CatalogReply {
    let config = TopicConfig {
        queues,
        replicas,
        hash_queues: 0,
        ..TopicConfig::default()
    };
    machine.create(name.to_owned(), config, &[])
}

#[test]
fn leaders_and_replicas_are_spread_evenly() {
    let mut machine = machine(5);
    create(&mut machine, "a", 13, 3);
    create(&mut machine, "b", 7, 3);
    let mut leaders = BTreeMap::new();
    let mut replicas = BTreeMap::new();
    for placement in machine.state.placements() {
        *leaders.entry(placement.preferred).or_insert(0) += 1;
        let mut nodes: Vec<_> = placement.nodes().collect();
        assert_eq!(nodes.first(), Some(&placement.preferred));
        nodes.sort_unstable();
        nodes.dedup();
        assert_eq!(nodes.len(), 3, "three different nodes");
        for node in nodes {
            *replicas.entry(node).or_insert(0) += 1;
        }
    }
    for counts in [leaders, replicas] {
        let (low, high) = (
            counts.values().min().unwrap(),
            counts.values().max().unwrap(),
        );
        assert!(high - low <= 2, "uneven: {counts:?}");
    }
}

#[test]
fn the_same_topic_again_exists_and_another_conflicts() {
    let mut machine = machine(3);
    assert_eq!(create(&mut machine, "a", 4, 0), CatalogReply::Created(1));
    assert_eq!(machine.state.topic("a").unwrap().config.replicas, 3);
    assert_eq!(create(&mut machine, "a", 4, 0), CatalogReply::Exists(1));
    assert_eq!(create(&mut machine, "a", 4, 3), CatalogReply::Exists(1));
    assert_eq!(create(&mut machine, "a", 5, 3), CatalogReply::Conflict);
}

#[test]
fn replicas_left_open_follow_the_cluster_and_too_many_are_refused() {
    let mut machine = machine(1);
    create(&mut machine, "a", 1, 0);
    assert_eq!(machine.state.topic("a").unwrap().config.replicas, 1);
    assert_eq!(
        create(&mut machine, "b", 1, 3),
        CatalogReply::NotEnoughNodes {
            available: 1,
            required: 3
        }
    );
}

#[test]
fn queues_grow_only_and_keyed_messages_stay() {
    let mut machine = machine(3);
    create(&mut machine, "a", 4, 0);
    let before = machine.state.topic("a").unwrap().queues.clone();
    let grow = |queues| TopicChange {
        queues: Some(queues),
        ..TopicChange::default()
    };
    assert_eq!(machine.update("a", &grow(6), &[]), CatalogReply::Exists(1));
    let topic = machine.state.topic("a").unwrap();
    assert_eq!((topic.queues.len(), topic.config.hash_queues), (6, 4));
    assert_eq!(topic.queues[..4], before[..]);
    assert!(matches!(
        machine.update("a", &grow(5), &[]),
        CatalogReply::Invalid(_)
    ));
    assert_eq!(machine.update("b", &grow(5), &[]), CatalogReply::NotFound);
}

#[test]
fn groups_replicas_and_topic_ids_are_never_given_again() {
    let mut machine = machine(3);
    create(&mut machine, "a", 2, 0);
    let old = machine.state.topic("a").unwrap().clone();
    assert_eq!(machine.delete("a"), CatalogReply::Done);
    assert_eq!(machine.delete("a"), CatalogReply::NotFound);
    assert_eq!(machine.state.owner(old.queues[0].id()), None);
    create(&mut machine, "a", 2, 0);
    let new = machine.state.topic("a").unwrap();
    assert!(new.id > old.id);
    assert!(new.queues[0].group > old.queues[1].group);
    assert!(new.queues[0].replicas[0].replica > old.queues[1].replicas[2].replica);
}

#[test]
fn dead_nodes_are_avoided_while_there_are_others() {
    let mut machine = machine(4);
    let config = TopicConfig {
        queues: 8,
        ..TopicConfig::default()
    };
    machine.create("a".to_owned(), config, &[2]);
    let topic = machine.state.topic("a").unwrap();
    assert!(topic.queues.iter().all(|q| !q.on(2)));
}

#[test]
fn a_node_id_stays_with_its_disk() {
    let mut machine = machine(3);
    let entry = |uuid: &str| NodeEntry {
        url: "http://a".to_owned(),
        peer_addr: "a:1".to_owned(),
        uuid: uuid.to_owned(),
        version: "1".to_owned(),
        quarantine: None,
    };
    assert_eq!(machine.register(1, entry("u1")), CatalogReply::Done);
    let version = machine.state.version;
    assert_eq!(machine.register(1, entry("u1")), CatalogReply::Done);
    assert_eq!(machine.state.version, version, "nothing new");
    let other = CatalogReply::OtherDisk {
        known: "u1".to_owned(),
    };
    assert_eq!(machine.register(1, entry("u2")), other);
}

#[test]
fn readers_get_a_new_state_only_after_a_change() {
    let mut machine = machine(3);
    let mut seen = machine.published.subscribe();
    machine.applied_batch(LogId::new(1, 1));
    assert!(seen.has_changed().unwrap());
    assert_eq!(seen.borrow_and_update().coordinators.len(), 16);
    machine.applied_batch(LogId::new(1, 2));
    assert!(!seen.has_changed().unwrap());
}

#[test]
fn readers_are_never_shown_an_older_state() {
    let mut machine = machine(3);
    create(&mut machine, "a", 1, 0);
    machine.applied_batch(LogId::new(1, 1));
    let seen = machine.published.subscribe();
    // As a new replica begins, beside the readers of the one it replaces.
    let mut anew = CatalogMachine::new(machine.published.clone());
    anew.restore(None, None).unwrap();
    assert!(seen.borrow().topic("a").is_some());
}

#[test]
fn an_epoch_is_raised_once_from_each_value() {
    let mut machine = machine(3);
    create(&mut machine, "t", 2, 3);
    let group = machine.state.topics.values().next().unwrap().queues[1].group;
    let raise = |machine: &mut CatalogMachine, from| {
        machine.execute(CatalogCommand::RaiseEpoch { group, from })
    };
    assert_eq!(raise(&mut machine, 0), CatalogReply::Done);
    assert_eq!(raise(&mut machine, 0), CatalogReply::Done);
    let epochs = |machine: &CatalogMachine| -> Vec<u64> {
        let topic = machine.state.topics.values().next().unwrap();
        topic.queues.iter().map(|queue| queue.epoch).collect()
    };
    assert_eq!(epochs(&machine), [0, 1]);
    assert_eq!(raise(&mut machine, 1), CatalogReply::Done);
    assert_eq!(epochs(&machine), [0, 2]);
}

fn generator(per_1000_s: u64, bytes: usize) -> Generator {
    Generator {
        per_1000_s,
        value: vec![0; bytes].into(),
    }
}

#[test]
fn a_generator_lives_as_long_as_its_topic() {
    let mut machine = machine(1);
    assert_eq!(machine.set_generator("a", None), CatalogReply::NotFound);
    create(&mut machine, "a", 1, 1);
    let set = |machine: &mut CatalogMachine, rate, bytes| {
        let reply = machine.set_generator("a", Some(generator(rate, bytes)));
        (
            reply == CatalogReply::Done,
            machine.state.generators.get(&1).cloned(),
        )
    };
    assert_eq!(set(&mut machine, 0, 0), (false, None));
    assert_eq!(set(&mut machine, 10_000_001, 0), (false, None));
    assert_eq!(
        set(&mut machine, 1, Generator::MAX_VALUE_BYTES + 1),
        (false, None)
    );
    let kept = Some(generator(1, 3));
    assert_eq!(set(&mut machine, 1, 3), (true, kept.clone()));
    let version = machine.state.version;
    assert_eq!(set(&mut machine, 1, 3), (true, kept));
    assert_eq!(
        machine.state.version, version,
        "the same again changes nothing"
    );
    machine.delete("a");
    assert!(machine.state.generators.is_empty());
}

#[test]
fn unreadable_commands_are_answered() {
    let mut machine = machine(1);
    let reply = machine.apply(LogId::new(1, 1), &Bytes::from_static(&[0xff; 9]));
    let reply: CatalogReply = postcard::from_bytes(&reply).unwrap();
    assert!(matches!(reply, CatalogReply::Invalid(_)));
}

fn put_exchange(machine: &mut CatalogMachine, name: &str, kind: ExchangeKind) -> CatalogReply {
    machine.put_exchange(name.to_owned(), kind, &[])
}

fn bind(machine: &mut CatalogMachine, topic: &str, key: Option<&str>) -> CatalogReply {
    let binding = key.map_or(Binding::Always, |key| {
        Binding::Keys([key.to_owned()].into())
    });
    exchanges::bind(&mut machine.state, "x", topic, binding)
}

#[test]
fn an_exchange_lives_with_its_store() {
    let mut machine = machine(3);
    let put = put_exchange(&mut machine, "x", ExchangeKind::Direct);
    assert_eq!(put, CatalogReply::Created(1));
    let store = machine.state.topic("_exchange.x").unwrap();
    assert_eq!((store.id, store.queues.len()), (1, 4));
    assert_eq!(store.config.retention.max_age_ms, None);
    let again = put_exchange(&mut machine, "x", ExchangeKind::Direct);
    assert_eq!(again, CatalogReply::Exists(1));
    let other = put_exchange(&mut machine, "x", ExchangeKind::Topic);
    assert_eq!(other, CatalogReply::Conflict);
    assert_eq!(machine.delete_exchange("x"), CatalogReply::Done);
    assert_eq!(machine.delete_exchange("x"), CatalogReply::ExchangeNotFound);
    assert!(machine.state.topics.is_empty() && machine.state.queue_groups.is_empty());
    // Another one of the name has another store.
    let other = put_exchange(&mut machine, "x", ExchangeKind::Topic);
    assert_eq!(other, CatalogReply::Created(2));
}

#[test]
fn bindings_fit_their_exchange_and_go_with_their_topic() {
    let mut machine = machine(3);
    create(&mut machine, "t", 1, 0);
    assert_eq!(
        bind(&mut machine, "t", Some("k")),
        CatalogReply::ExchangeNotFound
    );
    put_exchange(&mut machine, "x", ExchangeKind::Direct);
    assert_eq!(
        bind(&mut machine, "none", Some("k")),
        CatalogReply::NotFound
    );
    assert!(matches!(
        bind(&mut machine, "t", None),
        CatalogReply::Invalid(_)
    ));
    let exchange = |machine: &CatalogMachine| Exchange::clone(&machine.state.exchanges["x"]);
    let routes = |machine: &CatalogMachine, key| exchange(machine).routes(key, &BTreeMap::new());

    assert_eq!(bind(&mut machine, "t", Some("k")), CatalogReply::Created(1));
    let version = machine.state.version;
    assert_eq!(bind(&mut machine, "t", Some("k")), CatalogReply::Exists(1));
    assert_eq!(machine.state.version, version, "nothing new");
    assert_eq!(
        (routes(&machine, "k"), routes(&machine, "l")),
        (vec![1], vec![])
    );
    assert!(!exchange(&machine).narrowed);
    assert_eq!(bind(&mut machine, "t", Some("l")), CatalogReply::Exists(1));
    assert_eq!(
        (routes(&machine, "k"), routes(&machine, "l")),
        (vec![], vec![1])
    );
    assert!(exchange(&machine).narrowed);

    assert_eq!(machine.delete("t"), CatalogReply::Done);
    create(&mut machine, "t", 1, 0);
    assert!(routes(&machine, "l").is_empty());
    let unbind = exchanges::unbind(&mut machine.state, "x", "t");
    assert_eq!(unbind, CatalogReply::BindingNotFound);
    assert!(matches!(
        bind(&mut machine, "t", Some("l")),
        CatalogReply::Created(_)
    ));
    let unbind = exchanges::unbind(&mut machine.state, "x", "t");
    assert_eq!(unbind, CatalogReply::Done);
    assert!(routes(&machine, "l").is_empty());
}

fn any_command() -> impl Strategy<Value = CatalogCommand> {
    let name = (0..4u8).prop_map(|n| format!("t{n}"));
    prop_oneof![
        (name.clone(), 0..6u32, 0..4u32).prop_map(|(name, queues, replicas)| {
            let config = TopicConfig {
                queues,
                replicas,
                hash_queues: 0,
                ..TopicConfig::default()
            };
            CatalogCommand::CreateTopic {
                name,
                config,
                avoid: vec![2],
            }
        }),
        (name.clone(), 0..9u32).prop_map(|(name, queues)| CatalogCommand::UpdateTopic {
            name,
            change: TopicChange {
                queues: Some(queues),
                ..TopicChange::default()
            },
            avoid: vec![]
        }),
        name.clone()
            .prop_map(|name| CatalogCommand::DeleteTopic { name }),
        (name.clone(), any::<bool>()).prop_map(|(name, fanout)| CatalogCommand::PutExchange {
            name,
            kind: match fanout {
                true => ExchangeKind::Fanout,
                false => ExchangeKind::Direct,
            },
            avoid: vec![]
        }),
        name.clone()
            .prop_map(|name| CatalogCommand::DeleteExchange { name }),
        (name.clone(), name.clone(), 0..3u8).prop_map(|(exchange, topic, key)| {
            let binding = match key {
                0 => Binding::Always,
                key => Binding::Keys([key.to_string()].into()),
            };
            CatalogCommand::PutBinding {
                exchange,
                topic,
                binding,
            }
        }),
        (name.clone(), name.clone())
            .prop_map(|(exchange, topic)| CatalogCommand::DeleteBinding { exchange, topic }),
        (name.clone(), proptest::option::of(0..3u64)).prop_map(|(name, rate)| {
            let generator = rate.map(|rate| generator(rate, 1));
            CatalogCommand::SetGenerator { name, generator }
        }),
        name.prop_map(|name| CatalogCommand::DeleteTopic { name }),
        (1024..1030u64, 0..2u64)
            .prop_map(|(group, from)| CatalogCommand::RaiseEpoch { group, from }),
    ]
}

proptest! {
    #[test]
    fn replicas_agree_whenever_they_restart(
        commands in proptest::collection::vec((any_command(), any::<bool>()), 1..60)
    ) {
        let mut steady = machine(3);
        let mut shaken = machine(3);
        for (command, restart) in commands {
            let body = Bytes::from(postcard::to_stdvec(&command).unwrap());
            let id = LogId::new(1, 1);
            prop_assert_eq!(steady.apply(id, &body), shaken.apply(id, &body));
            if restart {
                let state = shaken.checkpoint().unwrap();
                shaken = CatalogMachine::new(watch::Sender::new(Arc::default()));
                shaken.restore(Some(id), Some(&state)).unwrap();
            }
            prop_assert_eq!(steady.state_hash(), shaken.state_hash());
        }
    }
}
