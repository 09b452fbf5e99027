//! Committed commands that no version of this program wrote: every replica answers them, changes
//! nothing by them or the same, and goes on. A replica that stopped at one could never start again.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use quorate::broker::queue::entry::{
    AppendBuilder, Hold, Mark, cancel, deliver, fence, settle, trim,
};
use quorate::broker::queue::{Place, QueueLimits, QueueMachine, QueueReply, QueueShared};
use quorate::broker::{Generator, TopicConfig};
use quorate::catalog::{CatalogCommand, CatalogMachine, CatalogReply, GivenUp, TopicChange};
use quorate::coordinator::leases::{Lease, LeaseCommand, Pick, Receipt, RetryPolicy};
use quorate::coordinator::transactions::{
    Decision, NewTransaction, OffsetMove, Part, PreparedParts, Timing, TransactionCommand,
};
use quorate::coordinator::{
    AssignStrategy, CoordinatorCommand, CoordinatorMachine, CoordinatorReply, Delivery, GroupStart,
    Newcomer, QueueId, QueueOffset, TopicShape, stamp,
};
use quorate::exchange::{Binding, ExchangeKind};
use quorate_raft::StateMachine;
use quorate_storage::batch::{BatchBuilder, RecordInput};
use quorate_storage::derived::DerivedStore;
use quorate_storage::queue_index::QueueIndex;
use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::{LogId, RaftGroupId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::mutate::{corpus, directory, fuzz};

fn written<T: Serialize>(command: &T) -> Bytes {
    postcard::to_stdvec(command).expect("in memory").into()
}

fn keep(target: &str, name: &str, bytes: &[u8]) {
    let dir = directory(target);
    fs::create_dir_all(&dir).expect("directory");
    fs::write(dir.join(name), bytes).expect("write");
}

/// Applies `body` between commands that are sound, on two replicas; a third one joins after it.
fn agree<R: DeserializeOwned>(
    new: &dyn Fn() -> Box<dyn StateMachine>,
    sound: &[Bytes],
    body: &Bytes,
) {
    let mut replicas: Vec<Box<dyn StateMachine>> = vec![new(), new()];
    for replica in &mut replicas {
        replica.restore(None, None).expect("empty");
    }
    let (mut index, half) = (0, sound.len() / 2);
    let mut apply = |replicas: &mut Vec<Box<dyn StateMachine>>, body: &Bytes| {
        index += 1;
        let log_id = LogId::new(1, index);
        let each = replicas.iter_mut().map(|replica| {
            let reply = replica.apply(log_id, body);
            replica.applied_batch(log_id);
            (reply, replica.state_hash())
        });
        let each: Vec<_> = each.collect();
        assert!(
            each.windows(2).all(|pair| pair[0] == pair[1]),
            "replicas differ"
        );
        postcard::from_bytes::<R>(&each[0].0).expect("a reply");
        log_id
    };
    for command in &sound[..half] {
        apply(&mut replicas, command);
    }
    let last = apply(&mut replicas, body);
    let state = replicas[0].checkpoint().expect("sound after it");
    let mut late = new();
    late.install(last, &state).expect("its state can be read");
    assert_eq!(late.state_hash(), replicas[0].state_hash());
    replicas.push(late);
    for command in &sound[half..] {
        apply(&mut replicas, command);
    }
}

/// The corpus as commands, in the order of its files; what was found by fuzzing is none of them.
fn sound(target: &str) -> Vec<Bytes> {
    let files = corpus(target).into_iter();
    let own = files.filter(|(path, _)| !path.to_string_lossy().contains("found"));
    own.map(|(_, bytes)| Bytes::from(bytes)).collect()
}

#[test]
fn queue_entries_that_lie() {
    let limits = QueueLimits {
        max_producers: 3,
        max_keys: 3,
        key_window_ms: 10_000,
        max_held: 3,
    };
    let new = || -> Box<dyn StateMachine> {
        let index = QueueIndex::open(Arc::new(FaultVfs::new()), "/queues/1.idx").expect("open");
        let index = Arc::new(index);
        let shared = QueueShared::new(index.clone(), Arc::default());
        let held = DerivedStore::in_memory().group(RaftGroupId(1));
        Box::new(QueueMachine::new(index, shared, held, limits))
    };
    let sound = sound("entry");
    fuzz("entry", 1500, |input| {
        let body = Bytes::from(input.bytes.clone());
        agree::<QueueReply>(&new, &sound, &body);
    });
}

#[test]
fn catalog_commands_that_lie() {
    let new = || -> Box<dyn StateMachine> {
        Box::new(CatalogMachine::new(watch::Sender::new(Arc::default())))
    };
    let sound = sound("catalog");
    fuzz("catalog", 600, |input| {
        let body = Bytes::from(input.bytes.clone());
        agree::<CatalogReply>(&new, &sound, &body);
        // As the first command of a cluster's life, too.
        agree::<CatalogReply>(&new, &[], &body);
    });
}

#[test]
fn coordinator_commands_that_lie() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = DerivedStore::open(&dir.path().join("derived")).expect("open");
    let groups = AtomicU64::new(1);
    let new = || -> Box<dyn StateMachine> {
        let group = RaftGroupId(groups.fetch_add(1, Ordering::Relaxed));
        Box::new(CoordinatorMachine::new(
            3,
            store.group(group),
            Arc::default(),
        ))
    };
    let sound = sound("coordinator");
    fuzz("coordinator", 400, |input| {
        let body = Bytes::from(input.bytes.clone());
        agree::<CoordinatorReply>(&new, &sound, &body);
    });
}

fn batch(values: u8, producer: Option<i64>) -> Bytes {
    let mut builder = BatchBuilder::new();
    if let Some(id) = producer {
        builder = builder.producer(id, 0, 0);
    }
    for value in 0..values {
        builder.push(RecordInput {
            value: Some(&[value; 5]),
            ..RecordInput::default()
        });
    }
    builder.finish()
}

fn entries() {
    let append = |stamp: u64, batches: &[(u8, Bytes)]| {
        let mut builder = AppendBuilder::new(stamp, batches.len(), 0);
        for (key, batch) in batches {
            let mark = match key {
                0 => Mark::None,
                key => Mark::Key {
                    hash: [*key; 16],
                    fingerprint: u64::from(*key),
                },
            };
            assert!(builder.push(&mark, None, batch));
        }
        builder.finish()
    };
    keep("entry", "1-one", &append(100, &[(0, batch(1, None))]));
    keep(
        "entry",
        "2-several",
        &append(200, &[(1, batch(2, None)), (0, batch(3, Some(5)))]),
    );
    keep("entry", "3-fence", &fence(300, 5, 1));
    keep(
        "entry",
        "4-again",
        &append(400, &[(1, batch(2, None)), (0, batch(3, Some(5)))]),
    );
    let id = [9; 16];
    let mut held = AppendBuilder::new(500, 3, 0);
    let until = |deliver_at_ms| Some(Hold::Until { deliver_at_ms });
    let part = Some(Hold::Transaction { id, part: 0 });
    for hold in [until(700), until(600), part] {
        assert!(held.push(&Mark::None, hold.as_ref(), &batch(1, None)));
    }
    keep("entry", "5-held", &held.finish());
    keep("entry", "retention-trim", &trim(510, 2));
    keep("entry", "6-cancel", &cancel(510, LogId::new(1, 5), 0));
    keep("entry", "7-deliver", &deliver(650, 10));
    keep("entry", "8-settle", &settle(660, &id, true, &[2]));
}

fn catalog() {
    let config = TopicConfig {
        queues: 3,
        ..TopicConfig::default()
    };
    let commands = [
        (
            "1-bootstrap",
            CatalogCommand::Bootstrap {
                cluster_id: "c".to_owned(),
                nodes: (1..=3)
                    .map(|node| (node, format!("host{node}:1")))
                    .collect(),
                coordinators: 4,
                limits: QueueLimits::default(),
            },
        ),
        (
            "2-node",
            CatalogCommand::RegisterNode {
                node: 2,
                url: "http://host2:2".to_owned(),
                peer_addr: "host2:1".to_owned(),
                uuid: "u".to_owned(),
                version: "1".to_owned(),
            },
        ),
        (
            "3-create",
            CatalogCommand::CreateTopic {
                name: "orders".to_owned(),
                config,
                avoid: vec![3],
            },
        ),
        (
            "4-update",
            CatalogCommand::UpdateTopic {
                name: "orders".to_owned(),
                change: TopicChange {
                    queues: Some(4),
                    ttl_ms: Some(None),
                    ..TopicChange::default()
                },
                avoid: vec![],
            },
        ),
        (
            "5-epoch",
            CatalogCommand::RaiseEpoch {
                group: 1024,
                from: 0,
            },
        ),
        (
            "6-given-up",
            CatalogCommand::GiveUp {
                node: 2,
                what: GivenUp::All { id: "q".to_owned() },
            },
        ),
        (
            "7-some-given-up",
            CatalogCommand::GiveUp {
                node: 1,
                what: GivenUp::Some(vec![(1024, 1030), (5, 6)]),
            },
        ),
        (
            "8-filled",
            CatalogCommand::Filled {
                group: 1024,
                replica: 1040,
            },
        ),
        (
            "8a-exchange",
            CatalogCommand::PutExchange {
                name: "shop".to_owned(),
                kind: ExchangeKind::Topic,
                avoid: vec![],
            },
        ),
        (
            "8b-bind",
            CatalogCommand::PutBinding {
                exchange: "shop".to_owned(),
                topic: "orders".to_owned(),
                binding: Binding::Keys(["order.*".to_owned(), "#".to_owned()].into()),
            },
        ),
        (
            "8c-unbind",
            CatalogCommand::DeleteBinding {
                exchange: "shop".to_owned(),
                topic: "orders".to_owned(),
            },
        ),
        (
            "8-generator",
            CatalogCommand::SetGenerator {
                name: "orders".to_owned(),
                generator: Some(Generator {
                    per_1000_s: 500,
                    value: Bytes::from_static(b"token"),
                }),
            },
        ),
        (
            "9-delete",
            CatalogCommand::DeleteTopic {
                name: "orders".to_owned(),
            },
        ),
        (
            "9a-delete-exchange",
            CatalogCommand::DeleteExchange {
                name: "shop".to_owned(),
            },
        ),
    ];
    for (name, command) in commands {
        keep("catalog", name, &written(&command));
    }
}

/// One transaction from its begin to its end, with the offsets of a consumer group.
fn transactions() -> impl Iterator<Item = (&'static str, TransactionCommand)> {
    let id = [3; 16];
    let group = || "billing".to_owned();
    let part = |queue_group, message| Part {
        topic: "orders".to_owned(),
        queue: 1,
        queue_group,
        messages: vec![message],
        bytes: 100,
    };
    let place = Place {
        base_offset: 7,
        count: 1,
        term: 1,
        index: 9,
        batch: 0,
    };
    let new = NewTransaction {
        producer_group: "p".to_owned(),
        timing: Timing {
            timeout_ms: 10,
            check_interval_ms: 100,
            max_checks: 3,
        },
        check_url: Some("http://h/".to_owned()),
        parts: vec![part(77, 0)],
        offset_groups: vec![group()],
        prepare_ms: 1_000,
    };
    let parts = PreparedParts {
        first: 0,
        count: 2,
        offsets: true,
    };
    let extend = TransactionCommand::Extend {
        id,
        parts: vec![part(78, 0)],
        prepare_ms: 1_000,
    };
    let hold = TransactionCommand::HoldOffsets {
        id,
        group: group(),
        offsets: vec![OffsetMove {
            to: QueueOffset {
                topic: 1,
                queue: 2,
                offset: 9,
            },
            from: Some(4),
        }],
        member: None,
        until_ms: u64::MAX,
    };
    let decision = Decision::Commit;
    let settle = TransactionCommand::SettleOffsets {
        id,
        group: group(),
        commit: true,
    };
    let settled = TransactionCommand::Settled {
        id,
        queues: vec![(77, vec![(0, place)]), (78, vec![(1, place)])],
        offset_groups: vec![group()],
    };
    let give_up = TransactionCommand::GiveUp {
        id,
        first: 1,
        count: 1,
    };
    let commands = [
        ("t1-begin", TransactionCommand::Begin { id, new }),
        ("t2-extend", extend),
        ("t3-hold", hold),
        ("t4-prepared", TransactionCommand::Prepared { id, parts }),
        ("t5-due", TransactionCommand::Due { id }),
        ("t5-give-up", give_up),
        ("t6-commit", TransactionCommand::Decide { id, decision }),
        ("t7-settle", settle),
        ("t8-settled", settled),
        ("t9-forget", TransactionCommand::Forget),
    ];
    commands.into_iter()
}
fn topics(version: u64, queues: u32) -> BTreeMap<String, TopicShape> {
    let found = Some((1, queues));
    [("orders".to_owned(), TopicShape { version, found })].into()
}

fn join(member: &str, instance: &str) -> CoordinatorCommand {
    CoordinatorCommand::Join {
        group: "shipping".to_owned(),
        newcomer: Newcomer {
            id: member.to_owned(),
            instance_id: Some(instance.to_owned()),
            topics: vec!["orders".to_owned()],
            tag: Some("paid".to_owned()),
            filter: Some("headers.region = 'eu'".to_owned()),
            delivery: Delivery::Cluster,
            start: GroupStart::Latest,
            session_timeout_ms: 10_000,
            strategy: Some(AssignStrategy::Range),
        },
        topics: topics(1, 4),
    }
}
fn leases(command: LeaseCommand) -> CoordinatorCommand {
    CoordinatorCommand::Leases {
        group: "packing".to_owned(),
        command,
    }
}

fn lease(token: u64, again: Vec<u64>) -> Lease {
    Lease {
        token,
        consumer: 9,
        lease_ms: 1,
        ordered: true,
        max: 2,
        picks: vec![Pick {
            topic: 1,
            queue: 2,
            from: 5,
            through: 9,
            fresh: vec![(5, 77), (6, 77), (7, 0)],
            again,
            gone: vec![8],
        }],
    }
}

fn receipt(offset: u64) -> Receipt {
    Receipt {
        topic: 1,
        queue: 2,
        offset,
        token: 40,
        consumer: 9,
    }
}

fn coordinator() {
    let commands = [
        (
            "1-commit",
            CoordinatorCommand::Commit {
                group: "billing".to_owned(),
                offsets: vec![QueueOffset {
                    topic: 1,
                    queue: 2,
                    offset: 3,
                }],
                allow_rewind: false,
                member: None,
            },
        ),
        (
            "2-producer",
            CoordinatorCommand::RegisterProducer { name: None },
        ),
        (
            "3-named",
            CoordinatorCommand::RegisterProducer {
                name: Some("p".to_owned()),
            },
        ),
        (
            "4-attach",
            CoordinatorCommand::AttachProducer {
                id: (3 << 40) | (1 << 39) | 2,
                epoch: 0,
                queue_group: 77,
            },
        ),
        ("5-join", join("m1", "host-1")),
        ("6-join-too", join("m2", "host-2")),
        (
            "7-heartbeat",
            CoordinatorCommand::Heartbeat {
                group: "shipping".to_owned(),
                member: "m1".to_owned(),
                epoch: 2,
                owned: Some(vec![QueueId { topic: 1, queue: 0 }]),
            },
        ),
        (
            "8-topics",
            CoordinatorCommand::SeeTopics {
                group: "shipping".to_owned(),
                topics: topics(2, 5),
            },
        ),
        (
            "9-begin",
            CoordinatorCommand::Begin {
                group: "shipping".to_owned(),
                instance: None,
                offsets: vec![QueueOffset {
                    topic: 1,
                    queue: 2,
                    offset: 3,
                }],
            },
        ),
        (
            "5-policy",
            leases(LeaseCommand::SetPolicy(RetryPolicy::default())),
        ),
        ("6-lease", leases(LeaseCommand::Lease(lease(40, vec![])))),
        (
            "7-lease-again",
            leases(LeaseCommand::Lease(lease(41, vec![5]))),
        ),
        (
            "8-ack",
            leases(LeaseCommand::Ack {
                receipts: vec![receipt(5), receipt(7)],
                through: Some(receipt(6)),
            }),
        ),
        (
            "9-nack",
            leases(LeaseCommand::Nack {
                receipts: vec![receipt(6)],
                delay_ms: Some(0),
            }),
        ),
        (
            "a-extend",
            leases(LeaseCommand::Extend {
                receipts: vec![receipt(6)],
                lease_ms: 1,
            }),
        ),
        ("b-expire", leases(LeaseCommand::Expire)),
        (
            "c-dead",
            leases(LeaseCommand::DeadLettered {
                life: 0,
                through: 0,
            }),
        ),
        (
            "d-redriven",
            leases(LeaseCommand::Redriven {
                life: 0,
                topic: 1,
                next: 5,
            }),
        ),
        (
            "e-seek",
            leases(LeaseCommand::Seek {
                offsets: vec![QueueOffset {
                    topic: 1,
                    queue: 2,
                    offset: 3,
                }],
            }),
        ),
        (
            "a-reset",
            CoordinatorCommand::Reset {
                group: "billing".to_owned(),
                offsets: vec![QueueOffset {
                    topic: 1,
                    queue: 2,
                    offset: 1,
                }],
                force: true,
            },
        ),
        (
            "b-remove",
            CoordinatorCommand::RemoveMembers {
                group: "shipping".to_owned(),
                members: vec![("m1".to_owned(), 1), ("m2".to_owned(), 2)],
            },
        ),
        (
            "c-delete",
            CoordinatorCommand::DeleteGroup {
                group: "shipping".to_owned(),
            },
        ),
        ("f-forget", leases(LeaseCommand::ForgetTopic { topic: 1 })),
    ];
    let transactions =
        transactions().map(|(name, command)| (name, CoordinatorCommand::Transaction(command)));
    let forget = CoordinatorCommand::ForgetTopics {
        group: "billing".to_owned(),
        topics: [1, 2].into(),
    };
    let commands = commands.into_iter().chain(transactions);
    let commands = commands.chain([("u-forget", forget)]);
    for (time, (name, command)) in (1_000..).zip(commands) {
        keep("coordinator", name, &stamp(time, &written(&command)));
    }
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    entries();
    catalog();
    coordinator();
}
