use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    producers: 1000,
    findings: 1000,
};

fn batch(offset: u64, id: i64, epoch: i16, sequence: i32, count: u32) -> Batch {
    Batch {
        base_offset: offset,
        count,
        timestamp_ms: 1000 + offset,
        producer: Some(ProducerStamp {
            id,
            epoch,
            base_sequence: sequence,
        }),
    }
}

/// Batches of producer 7 in epoch 0: (sequence, count), one after the other in the queue.
fn judged(is_whole: bool, batches: &[(i32, u32)]) -> Judge {
    let mut judge = Judge::new(3, is_whole, LIMITS);
    let mut offset = 0;
    for (sequence, count) in batches {
        judge.batch(batch(offset, 7, 0, *sequence, *count));
        offset += u64::from(*count);
    }
    judge.finish();
    judge
}

fn kinds(judge: &Judge) -> Vec<Kind> {
    judge.findings.iter().map(|f| f.kind.clone()).collect()
}

#[test]
fn in_order_is_fine_also_around_the_end_of_the_numbers() {
    for batches in [&[(0, 3), (3, 1), (4, 2)][..], &[(0, 1)]] {
        let judge = judged(true, batches);
        assert_eq!(kinds(&judge), []);
        assert_eq!((judge.totals.missing, judge.totals.late), (0, 0));
    }
    let wrapping = [(i32::MAX - 1, 2), (0, 1), (1, 5)];
    assert_eq!(kinds(&judged(false, &wrapping)), []);
    let inside = [(i32::MAX - 1, 4), (2, 1)];
    assert_eq!(kinds(&judged(false, &inside)), []);
}

#[test]
fn a_front_that_was_cut_is_a_start_and_no_gap() {
    assert_eq!(kinds(&judged(false, &[(40, 2), (42, 1)])), []);
    let whole = judged(true, &[(40, 2), (42, 1)]);
    assert_eq!(kinds(&whole), [Kind::Gap]);
    assert!(
        whole.findings[0].detail.contains("0 to 39 (40)"),
        "{:?}",
        whole.findings
    );
    assert_eq!(whole.totals.missing, 40);
}

#[test]
fn gaps_duplicates_and_what_was_late() {
    let gap = judged(true, &[(0, 2), (5, 1)]);
    assert_eq!((kinds(&gap), gap.totals.missing), (vec![Kind::Gap], 3));
    let twice = judged(true, &[(0, 2), (2, 2), (2, 2), (4, 1)]);
    assert_eq!(
        (kinds(&twice), twice.totals.duplicates),
        (vec![Kind::Duplicate], 2)
    );
    let late = judged(true, &[(0, 2), (5, 1), (2, 3), (6, 1)]);
    assert_eq!(
        (kinds(&late), late.totals.late, late.totals.missing),
        (vec![], 3, 0)
    );
    let partly = judged(true, &[(0, 1), (5, 1), (2, 1), (6, 1)]);
    assert_eq!(partly.totals.late, 1);
    assert_eq!((partly.totals.gaps, partly.totals.missing), (2, 3));
    let late_again = judged(true, &[(0, 1), (5, 1), (2, 1), (2, 1)]);
    assert_eq!(late_again.totals.duplicates, 1);
    // Of a queue read from the middle, an earlier one that comes later was held.
    let before = judged(false, &[(10, 1), (4, 2), (11, 1)]);
    assert_eq!((kinds(&before), before.totals.late), (vec![], 2));
}

#[test]
fn gaps_and_repetitions_around_the_end_of_the_numbers() {
    let gap = judged(false, &[(i32::MAX, 1), (2, 1), (0, 2), (3, 1)]);
    assert_eq!((kinds(&gap), gap.totals.late), (vec![], 2));
    let gap = judged(false, &[(i32::MAX - 1, 1), (1, 1)]);
    assert!(
        gap.findings[0].detail.contains("2147483647 to 0 (2)"),
        "{:?}",
        gap.findings
    );
    let twice = judged(false, &[(i32::MAX, 1), (0, 1), (i32::MAX, 1)]);
    assert_eq!(twice.totals.duplicates, 1);
}

#[test]
fn a_new_epoch_begins_at_zero_and_an_old_one_is_doubted() {
    let mut judge = Judge::new(0, true, LIMITS);
    judge.batch(batch(0, 7, 0, 0, 2));
    judge.batch(batch(2, 7, 1, 0, 1));
    judge.batch(batch(3, 7, 0, 2, 1));
    judge.batch(batch(4, 7, 2, 5, 1));
    judge.batch(batch(5, 7, 2, 6, 1));
    let doubts = judge.doubts.clone();
    assert_eq!((doubts[0].offset, doubts[0].next_epoch_at), (3, 2));
    judge.settle(&doubts[0], true);
    assert_eq!(judge.totals.late, 1);
    judge.settle(&doubts[0], false);
    judge.finish();
    assert_eq!(kinds(&judge), [Kind::OldEpoch, Kind::Gap]);
    assert_eq!(judge.totals.producers, 3);
}

#[test]
fn a_producer_that_was_forgotten_begins_again() {
    let mut judge = Judge::new(0, true, LIMITS);
    judge.batch(batch(0, 7, 0, 0, 2));
    let mut again = batch(2, 7, 0, 0, 2);
    again.timestamp_ms += FORGOTTEN_AFTER_MS;
    judge.batch(again);
    judge.finish();
    assert_eq!(kinds(&judge), []);
}

#[test]
fn offsets_are_dense() {
    let mut judge = Judge::new(0, false, LIMITS);
    for (offset, count) in [(10, 2), (12, 1), (15, 1), (14, 1), (16, 1)] {
        judge.batch(Batch {
            producer: None,
            ..batch(offset, 0, 0, 0, count)
        });
    }
    judge.finish();
    assert_eq!(kinds(&judge), [Kind::OffsetTwice, Kind::OffsetHole]);
    judge.cut(30);
    assert_eq!(judge.totals.removed_meanwhile, 13);
    judge.batch(batch(30, 7, 0, 9, 1));
    judge.finish();
    assert_eq!(judge.findings.len(), 2, "the cut itself is none");
}

#[test]
fn memory_is_bounded() {
    let limits = Limits {
        producers: 10,
        findings: 5,
    };
    let mut judge = Judge::new(0, true, limits);
    for n in 0..1000u32 {
        judge.batch(batch(u64::from(n) * 2, i64::from(n), 0, 0, 2));
        assert!(judge.producers.len() <= 10);
    }
    assert_eq!(kinds(&judge), []);
    for n in 0..300u32 {
        judge.batch(batch(u64::from(2000 + n), 1, 0, n as i32 * 2, 1));
    }
    judge.finish();
    assert_eq!((judge.findings.len(), judge.totals.missing), (5, 299));
    assert_eq!(judge.totals.gaps, 299);
}

proptest! {
    /// Messages of one producer in any order, some missing, some twice: the sums are right.
    #[test]
    fn sums_are_right(
        start in prop_oneof![Just(0u64), (ROUND - 20)..ROUND],
        order in prop::collection::vec(0u64..40, 1..60),
    ) {
        let mut judge = Judge::new(0, start == 0, LIMITS);
        for (offset, n) in (0u64..).zip(&order) {
            let sequence = (start + n) % ROUND;
            judge.batch(batch(offset, 7, 0, sequence as i32, 1));
        }
        judge.finish();
        let distinct: std::collections::BTreeSet<u64> = order.iter().copied().collect();
        // Gaps are told from the first that was seen on, or from 0 where that is known.
        let first = if start == 0 { 0 } else { order[0] };
        let last = order.iter().max().unwrap();
        let missing = (first..=*last).filter(|n| !distinct.contains(n)).count() as u64;
        prop_assert_eq!(judge.totals.missing, missing);
        let early = |n: &u64| *n < first;
        if !order.iter().any(early) {
            prop_assert_eq!(judge.totals.duplicates, (order.len() - distinct.len()) as u64);
        }
    }
}
