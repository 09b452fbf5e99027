//! Each broken promise must be seen at the end, and good news must not be mistaken for it.

use super::super::testing::*;
use super::*;

#[test]
fn what_is_as_it_should_be_is_clean() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    let unknown = send(&mut history, 1, 1);
    history.settle(unknown, Outcome::Unknown, us(9));
    let never_came = send(&mut history, 1, 3);
    history.settle(never_came, Outcome::Unknown, us(9));
    refused(&mut history, 1, 5);
    let b = acked(&mut history, 0, (3, 4), 2);
    let log = [a, unknown, b];
    let totals = judge(&mut history, &replicas(&log, &log));
    assert_found(&history.findings, &[], &[]);
    let expected = Totals {
        acked: 2,
        lost: 0,
        unknown: 2,
        unknown_stored: 1,
        refused: 1,
        stored: 3,
    };
    assert_eq!(totals, expected);
}

#[test]
fn an_acknowledged_message_missing_on_one_replica_is_lost() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    let b = acked(&mut history, 0, (3, 4), 1);
    let totals = judge(&mut history, &replicas(&[a, b], &[a]));
    assert_eq!(totals.lost, 1);
    let kinds = [(Kind::Lost, 1), (Kind::Vanished, 1), (Kind::TwoValues, 1)];
    let told = [
        "an acknowledged message is not at offset 1",
        "node 2 ends at offset 1",
        "through node 1: acknowledged at 0.004s in t/0 offset 1",
    ];
    assert_found(&history.findings, &kinds, &told);
}

#[test]
fn an_acknowledged_message_missing_everywhere_is_lost() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    acked(&mut history, 0, (3, 4), 1);
    let totals = judge(&mut history, &replicas(&[a], &[a]));
    assert_eq!((totals.acked, totals.lost), (2, 1));
    let kinds = [(Kind::Lost, 1), (Kind::Vanished, 1)];
    assert_found(&history.findings, &kinds, &[]);
}

#[test]
fn an_acknowledged_message_that_was_overwritten_is_lost() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    let other = send(&mut history, 1, 1);
    let totals = judge(&mut history, &replicas(&[other], &[other]));
    assert_eq!(totals.lost, 1);
    let kinds = [(Kind::Lost, 1), (Kind::TwoValues, 1)];
    let told = ["node 1 holds at offset 0 message 0 of producer 1"];
    assert_found(&history.findings, &kinds, &told);
}

#[test]
fn without_a_replica_everything_is_lost() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    assert_eq!(judge(&mut history, &[]).lost, 1);
}

#[test]
fn replicas_that_differ_where_nobody_was_acknowledged_differ_all_the_same() {
    let mut history = history();
    let (a, b) = (send(&mut history, 0, 1), send(&mut history, 1, 1));
    judge(&mut history, &replicas(&[a], &[b]));
    let told = ["node 1 holds at offset 0 message 0 of producer 0", "node 2"];
    assert_found(&history.findings, &[(Kind::TwoValues, 1)], &told);
}

#[test]
fn what_a_reader_saw_during_the_run_must_be_there_at_the_end() {
    let mut history = history();
    let (a, b) = (send(&mut history, 0, 1), send(&mut history, 1, 1));
    let early = read(&history, 0, 2);
    history.read(&early, &[shown(0, a)]);
    judge(&mut history, &replicas(&[b], &[b]));
    let told = ["what was seen at offset 0 is not there", "somebody had"];
    assert_found(&history.findings, &[(Kind::TwoValues, 1)], &told);
}

#[test]
fn a_message_that_is_stored_twice_is_found() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    judge(&mut history, &replicas(&[a, a], &[a, a]));
    let told = ["lies in t/0 offset 0 and at offset 1"];
    assert_found(&history.findings, &[(Kind::Twice, 1)], &told);
}

#[test]
fn an_unknown_message_may_be_stored_once_and_not_twice() {
    let mut history = history();
    let a = send(&mut history, 0, 1);
    history.settle(a, Outcome::Unknown, us(2));
    judge(&mut history, &replicas(&[a], &[a]));
    assert_found(&history.findings, &[], &[]);
    judge(&mut history, &replicas(&[a, a], &[a, a]));
    assert_found(&history.findings, &[(Kind::Twice, 1)], &[]);
}

#[test]
fn a_refused_message_that_is_stored_is_found() {
    let mut history = history();
    let a = refused(&mut history, 0, 1);
    judge(&mut history, &replicas(&[a], &[a]));
    let told = ["holds what was refused", "refused as not committed"];
    assert_found(&history.findings, &[(Kind::RefusedButStored, 1)], &told);
}

#[test]
fn what_was_never_sent_or_sent_elsewhere_is_found() {
    let mut history = history();
    let elsewhere = history.begin(0, 1, Some(1), (1, 0));
    let never = Id {
        producer: 1,
        number: 8,
    };
    let log = [elsewhere, never];
    judge(&mut history, &replicas(&log, &log));
    let told = ["sent to another queue", "nobody sent"];
    assert_found(&history.findings, &[(Kind::NeverSent, 2)], &told);
}

#[test]
fn a_producers_acknowledged_messages_in_another_order_are_found() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 1);
    let b = acked(&mut history, 0, (3, 4), 0);
    judge(&mut history, &replicas(&[b, a], &[b, a]));
    let told = ["offset 0 was sent when offset 1 was acknowledged"];
    assert_found(&history.findings, &[(Kind::Order, 1)], &told);
}

#[test]
fn the_order_of_two_producers_counts_where_one_waited_for_the_other() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 5), 1);
    let overlapping = acked(&mut history, 1, (4, 6), 0);
    judge(
        &mut history,
        &replicas(&[overlapping, a], &[overlapping, a]),
    );
    assert_found(&history.findings, &[], &[]);

    let mut history = super::super::testing::history();
    let a = acked(&mut history, 0, (1, 2), 1);
    let later = send(&mut history, 1, 3);
    history.settle(later, Outcome::Unknown, us(9));
    judge(&mut history, &replicas(&[later, a], &[later, a]));
    assert_found(&history.findings, &[(Kind::Order, 1)], &[]);
}

#[test]
fn a_request_that_was_torn_apart_is_found() {
    let mut history = history();
    let first = history.begin(0, 2, Some(0), (1, us(1)));
    let second = Id { number: 1, ..first };
    let other = send(&mut history, 1, 1);
    let whole = [first, second, other];
    judge(&mut history, &replicas(&whole, &whole));
    assert_found(&history.findings, &[], &[]);
    let apart = [first, other, second];
    judge(&mut history, &replicas(&apart, &apart));
    assert_found(&history.findings, &[(Kind::Torn, 1)], &["side by side"]);
    judge(&mut history, &replicas(&[first], &[first]));
    assert_found(&history.findings, &[(Kind::Torn, 2)], &["not stored"]);
}
