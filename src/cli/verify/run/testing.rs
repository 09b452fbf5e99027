//! Small histories for the judges' tests: one queue, and two producers that speak in milliseconds.

use super::findings::{Findings, Kind};
use super::history::{History, Id, Lane, Outcome, Source, Stored};
use super::judge::{LaneLogs, ReplicaLog};
use super::watch::{Read, Shown};

/// Two queues, `t/0` and `t/1`; producers 0 and 1; witness 0.
pub fn history() -> History {
    let mut history = History::new(vec![Lane::new("t", 0), Lane::new("t", 1)]);
    history.add_witness("somebody".into());
    history.add_producer("producer 0".into());
    history.add_producer("producer 1".into());
    history
}

pub fn us(ms: u64) -> u64 {
    ms * 1000
}

/// Somebody, after an answer of node 2.
pub fn by(at_ms: u64) -> Source {
    Source {
        witness: 0,
        node: 2,
        at_us: us(at_ms),
    }
}

/// A message to queue 0 that leaves then.
pub fn send(history: &mut History, producer: u16, at_ms: u64) -> Id {
    history.begin(producer, 1, Some(0), (1, us(at_ms)))
}

/// The same, acknowledged later.
pub fn acked(history: &mut History, producer: u16, (sent, done): (u64, u64), offset: u64) -> Id {
    let id = send(history, producer, sent);
    history.acked(id, (0, offset), mark(id), by(done));
    id
}

pub fn refused(history: &mut History, producer: u16, at_ms: u64) -> Id {
    let id = send(history, producer, at_ms);
    history.settle(id, Outcome::Refused, us(at_ms + 1));
    id
}

fn mark(id: Id) -> u64 {
    u64::from(id.producer) << 32 | u64::from(id.number)
}

pub fn stored(id: Id) -> Stored {
    Stored { id, mark: mark(id) }
}

pub fn shown(offset: u64, id: Id) -> Shown {
    Shown {
        offset,
        stored: Ok(stored(id)),
    }
}

/// A linearizable read of queue 0 at this time, with what was known then.
pub fn read(history: &History, from: u64, at_ms: u64) -> Read {
    Read {
        lane: 0,
        by: by(at_ms + 1),
        from,
        floor: history.lane(0).floor(),
        began_us: us(at_ms),
    }
}

/// Two replicas of queue 0.
pub fn replicas(one: &[Id], two: &[Id]) -> Vec<LaneLogs> {
    let log = |node, ids: &[Id]| ReplicaLog {
        node,
        messages: ids.iter().map(|id| Some(stored(*id))).collect(),
    };
    vec![LaneLogs {
        lane: 0,
        replicas: vec![log(1, one), log(2, two)],
    }]
}

/// Exactly these kinds were found, once each, and the words for the first of them say this.
#[track_caller]
pub fn assert_found(findings: &Findings, kinds: &[(Kind, u64)], told: &[&str]) {
    let found: Vec<(Kind, u64)> = findings.counts.iter().map(|(k, n)| (*k, *n)).collect();
    let mut expected = kinds.to_vec();
    expected.sort_unstable();
    assert_eq!(found, expected, "{:#?}", findings.listed);
    let text = format!("{:?}", findings.listed);
    for words in told {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
}
