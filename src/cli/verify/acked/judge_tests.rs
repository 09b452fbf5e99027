//! Each kind of bad news must be seen, and good news must not be mistaken for it.

use super::*;

fn message(offset: u64, id: &str, value: &str) -> Message {
    Message {
        queue: 0,
        offset,
        message_id: id.into(),
        timestamp_ms: 1,
        key: None,
        tag: None,
        headers: BTreeMap::new(),
        value: Some(value.into()),
        value_base64: None,
    }
}

fn log(node: u64, messages: &[(u64, &str, &str)]) -> ReplicaLog {
    let mut log = ReplicaLog::new(node);
    for (offset, id, value) in messages {
        log.add(&message(*offset, id, value));
    }
    log
}

fn acks(messages: &[(u64, &str, &str)]) -> QueueAcks {
    let mut acks = QueueAcks::default();
    for (offset, id, value) in messages {
        acks.add(&Acked {
            topic: "t".into(),
            queue: 0,
            offset: *offset,
            message_id: (*id).into(),
            value: Some((*value).into()),
            value_base64: None,
        });
    }
    acks
}

fn judged(acks: &QueueAcks, logs: &[ReplicaLog]) -> Findings {
    let mut findings = Findings::new(true);
    judge_queue(&mut findings, ("t", 0), acks, logs);
    findings
}

const TWO: &[(u64, &str, &str)] = &[(0, "a", "x"), (1, "b", "y")];

#[test]
fn all_there_is_clean_even_with_more_than_was_acknowledged() {
    let findings = judged(&acks(&TWO[1..]), &[log(1, TWO), log(2, TWO)]);
    assert!(findings.is_clean(), "{findings:?}");
    assert!(
        findings
            .summary()
            .ends_with("1 acknowledged, 1 found on every replica, 0 acknowledged messages lost")
    );
}

#[test]
fn a_message_missing_on_one_replica_is_lost() {
    let findings = judged(&acks(TWO), &[log(1, TWO), log(2, &TWO[..1])]);
    assert_eq!((findings.lost, findings.found_on_every_replica), (1, 1));
    assert!(findings.problems[0].contains("offset 1"), "{findings:?}");
}

#[test]
fn another_value_or_another_id_at_the_offset_is_lost() {
    let other_value = &[(0, "a", "x"), (1, "b", "z")];
    assert_eq!(judged(&acks(TWO), &[log(1, other_value)]).lost, 1);
    let other_id = &[(0, "a", "x"), (1, "c", "y")];
    assert_eq!(judged(&acks(TWO), &[log(1, other_id)]).lost, 1);
}

#[test]
fn replicas_that_differ_in_what_nobody_acknowledged_differ_all_the_same() {
    let findings = judged(
        &acks(&TWO[..1]),
        &[log(1, TWO), log(2, &[TWO[0], (1, "b", "z")])],
    );
    assert_eq!((findings.lost, findings.differences), (0, 1));
    assert!(!findings.is_clean());
}

#[test]
fn a_hole_and_a_repeated_offset_are_found() {
    assert_eq!(
        judged(&acks(&[]), &[log(1, &[TWO[0], (2, "b", "y")])]).holes,
        1
    );
    assert_eq!(
        judged(&acks(&[]), &[log(1, &[TWO[0], (0, "b", "y")])]).holes,
        1
    );
    assert_eq!(judged(&acks(&[]), &[log(1, &TWO[1..])]).holes, 1);
}

#[test]
fn a_message_stored_twice_is_found_by_its_value() {
    let twice = &[(0, "a", "x"), (1, "b", "x")];
    assert_eq!(judged(&acks(&[]), &[log(1, twice)]).duplicates, 1);
}

#[test]
fn one_offset_acknowledged_for_two_messages_loses_one() {
    let findings = judged(&acks(&[TWO[0], (0, "b", "y")]), &[log(1, TWO)]);
    assert_eq!(findings.lost, 1);
}

#[test]
fn what_retention_removed_is_not_lost() {
    let mut short = ReplicaLog::new(1);
    short.starts_at(1);
    short.add(&message(1, "b", "y"));
    let findings = judged(&acks(TWO), &[short]);
    assert_eq!((findings.lost, findings.expired, findings.holes), (0, 1, 0));
}

#[test]
fn without_a_replica_everything_is_lost() {
    assert_eq!(judged(&acks(TWO), &[]).lost, 2);
}
