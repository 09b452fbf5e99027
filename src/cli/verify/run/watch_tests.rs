//! Each kind of wrong answer must be seen when it comes.

use super::super::testing::*;
use super::*;

#[test]
fn reading_on_and_reading_again_is_no_violation() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    let b = acked(&mut history, 0, (3, 4), 1);
    let first = read(&history, 0, 5);
    assert_eq!(history.read(&first, &[shown(0, a), shown(1, b)]), 2);
    let again = read(&history, 1, 7);
    assert_eq!(history.read(&again, &[shown(1, b)]), 2);
    let end = read(&history, 2, 9);
    assert_eq!(history.read(&end, &[]), 2);
    assert_found(&history.findings, &[], &[]);
}

#[test]
fn one_offset_with_two_messages_is_seen_whoever_shows_it() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    let b = send(&mut history, 1, 1);
    let wrong = read(&history, 0, 3);
    history.read(&wrong, &[shown(0, b)]);
    let told = [
        "t/0",
        "offset 0",
        "message 0 of producer 0",
        "message 0 of producer 1",
        "0.002s",
        "0.004s",
    ];
    assert_found(&history.findings, &[(Kind::TwoValues, 1)], &told);
    assert_eq!(history.name_of(a), "message 0 of producer 0");
}

#[test]
fn one_message_with_two_ids_is_seen() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    let mut other = shown(0, a);
    if let Ok(stored) = &mut other.stored {
        stored.mark += 1;
    }
    let wrong = read(&history, 0, 3);
    history.read(&wrong, &[other]);
    assert_found(&history.findings, &[(Kind::TwoValues, 1)], &[]);
}

#[test]
fn an_acknowledgement_for_a_taken_offset_is_seen() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    acked(&mut history, 1, (1, 3), 0);
    assert_found(&history.findings, &[(Kind::TwoValues, 1)], &["offset 0"]);
}

#[test]
fn a_retry_acknowledged_at_another_place_is_seen() {
    let mut history = history();
    let a = acked(&mut history, 0, (1, 2), 0);
    history.acked(a, (0, 0), stored(a).mark, by(3));
    assert_found(&history.findings, &[], &[]);
    history.acked(a, (0, 1), stored(a).mark, by(4));
    let told = ["two places", "acknowledged again in t/0 offset 1"];
    assert_found(&history.findings, &[(Kind::Twice, 1)], &told);
}

#[test]
fn an_acknowledgement_from_another_queue_is_seen() {
    let mut history = history();
    let a = send(&mut history, 0, 1);
    history.acked(a, (1, 0), 7, by(2));
    assert_found(&history.findings, &[(Kind::NeverSent, 1)], &["t/1"]);
}

#[test]
fn a_skip_and_a_repetition_are_seen() {
    let mut history = history();
    let ids: Vec<Id> = (0..3)
        .map(|n| acked(&mut history, 0, (n, n + 1), n))
        .collect();
    let skips = read(&history, 0, 9);
    let next = history.read(&skips, &[shown(0, ids[0]), shown(2, ids[2])]);
    assert_eq!(next, 3);
    let told = ["offset 2 came where 1 was next"];
    assert_found(&history.findings, &[(Kind::Skipped, 1)], &told);
    let repeats = read(&history, 0, 9);
    history.read(&repeats, &[shown(0, ids[0]), shown(0, ids[0])]);
    assert_found(&history.findings, &[(Kind::Skipped, 2)], &[]);
}

#[test]
fn a_read_that_misses_an_earlier_acknowledgement_is_seen() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    let late = read(&history, 0, 3);
    history.read(&late, &[]);
    let told = [
        "did not show offset 0",
        "acknowledged at 0.002s",
        "asked node 2 from offset 0; at 0.004s it showed nothing",
    ];
    assert_found(&history.findings, &[(Kind::StaleRead, 1)], &told);
}

#[test]
fn an_end_before_an_earlier_acknowledgement_is_seen() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    acked(&mut history, 0, (3, 4), 1);
    let late = read(&history, 2, 5);
    history.ended_early(&late, 2);
    assert_found(&history.findings, &[], &[]);
    history.ended_early(&late, 1);
    assert_found(&history.findings, &[(Kind::StaleRead, 1)], &["an end at 1"]);
}

#[test]
fn a_read_that_began_before_the_acknowledgement_may_miss_it() {
    let mut history = history();
    let early = read(&history, 0, 1);
    acked(&mut history, 0, (1, 2), 0);
    history.read(&early, &[]);
    let mut stale = read(&history, 0, 3);
    stale.floor = 0;
    history.read(&stale, &[]);
    assert_found(&history.findings, &[], &[]);
}

#[test]
fn what_nobody_sent_is_seen() {
    let mut history = history();
    let foreign = Shown {
        offset: 0,
        stored: Err("a stranger's".into()),
    };
    let first = read(&history, 0, 1);
    history.read(&first, &[foreign]);
    assert_found(
        &history.findings,
        &[(Kind::NeverSent, 1)],
        &["a stranger's"],
    );
    let not_yet = Id {
        producer: 0,
        number: 5,
    };
    let second = read(&history, 1, 2);
    history.read(&second, &[shown(1, not_yet)]);
    assert_found(&history.findings, &[(Kind::NeverSent, 2)], &[]);
}

#[test]
fn an_offset_out_of_all_reason_is_seen_and_takes_no_memory() {
    let mut history = history();
    let a = send(&mut history, 0, 1);
    history.acked(a, (0, u64::MAX), 1, by(2));
    assert_found(&history.findings, &[(Kind::Hole, 1)], &[]);
    assert!(history.lane(0).seen.is_empty());
}

#[test]
fn a_committed_offset_neither_goes_back_nor_comes_from_nowhere() {
    let mut committed = Committed::default();
    assert_eq!(committed.read(None), None);
    committed.ask(5);
    committed.acked(5);
    committed.ask(9);
    assert_eq!(committed.read(Some(5)), None);
    // The answer to the second commit was lost, and it came about all the same.
    assert_eq!(committed.read(Some(9)), None);
    let back = committed.read(Some(5)).expect("it was at 9");
    assert!(back.contains("was 9 and is 5"), "{back}");
    assert!(committed.read(None).is_some());
    let nowhere = committed.read(Some(12)).expect("nobody asked for 12");
    assert!(nowhere.contains("12"), "{nowhere}");
}

#[test]
fn the_longest_time_without_an_acknowledgement_is_kept() {
    let mut history = history();
    acked(&mut history, 0, (1, 2), 0);
    acked(&mut history, 0, (3, 40), 1);
    acked(&mut history, 0, (41, 45), 2);
    let lane = history.lane_mut(0);
    assert_eq!(lane.longest_gap_us, (us(2), us(40)));
    lane.end_gap(us(100));
    assert_eq!(lane.longest_gap_us, (us(45), us(100)));
}
