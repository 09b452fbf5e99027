//! The machine of leases, asked as a coordinator's log would ask it.

mod granting;
mod model;
mod settling;

use std::sync::Arc;

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::derived::DerivedStore;
use quorate_storage::{LogId, RaftGroupId};

use super::*;
use crate::coordinator::{
    CoordinatorCommand, CoordinatorMachine, CoordinatorReply, QueueOffset, stamp,
};

const GROUP: &str = "g";

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

    fn delete(&mut self) -> CoordinatorReply {
        let command = CoordinatorCommand::DeleteGroup {
            group: GROUP.to_owned(),
        };
        let body = stamp(self.now_ms, &postcard::to_stdvec(&command).unwrap());
        postcard::from_bytes(&self.replica.apply_bytes(&body)).unwrap()
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
