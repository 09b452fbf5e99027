//! When a replica stands for election in a group that nobody leads. Pure: time comes in as an
//! argument.
//!
//! Candidates stand one after the other, each a *turn* later than the one before, and all of them
//! again after each round. A turn must be long enough to win in, and how long that is depends on
//! machines and disks: an election takes two round trips and an fsync. So it grows where it was too
//! short, which shows in the terms: each one begun in earnest without a leader at its end doubles
//! it. And nobody cuts another candidate's turn short: who sees a new term begins to count anew.

use std::time::Duration;

use tokio::time::Instant;

/// A turn is doubled so many times at most.
const DOUBLED_MAX: u64 = 3;

/// By how much the turns, and the patience in them, have grown. A first candidate's term is no
/// failure yet.
pub(crate) fn growth(term: u64, last_led: u64) -> u32 {
    1 << term.saturating_sub(last_led + 1).min(DOUBLED_MAX)
}

/// What a replica sees when it looks whether its turn has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sight {
    pub(crate) now: Instant,
    pub(crate) term: u64,
    pub(crate) turn: Duration,
    /// This replica's place among the candidates, and their number.
    pub(crate) rank: u32,
    pub(crate) candidates: u32,
}

/// The turns of one replica.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    next: Option<Instant>,
    term: u64,
}

impl Turns {
    /// Somebody leads.
    pub(crate) fn end(&mut self) {
        self.next = None;
    }

    pub(crate) fn has_come(&mut self, seen: Sight) -> bool {
        let after = |turns: u32| seen.now + seen.turn * turns;
        let mut next = self.next.unwrap_or_else(|| after(seen.rank));
        if self.next.is_some() && self.term != seen.term {
            next = next.max(after(seen.rank + 1));
        }
        self.term = seen.term;
        let come = next <= seen.now;
        // From now, not from when it was due: a process that slept does not make up for it.
        self.next = Some(if come {
            after(seen.candidates.max(1))
        } else {
            next
        });
        come
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: Duration = Duration::from_millis(250);
    const SWEEP: Duration = Duration::from_millis(50);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// One of three candidates, looking every 50 ms.
    struct Candidate {
        turns: Turns,
        rank: u32,
        began: Instant,
        now: Instant,
    }

    impl Candidate {
        fn new(rank: u32) -> Self {
            let now = Instant::now();
            Self {
                turns: Turns::default(),
                rank,
                began: now,
                now,
            }
        }

        fn looks(&mut self, term: u64, turn: Duration) -> bool {
            self.turns.has_come(Sight {
                now: self.now,
                term,
                turn,
                rank: self.rank,
                candidates: 3,
            })
        }

        /// When its turn comes next, in milliseconds from the beginning.
        fn next_turn(&mut self, term: u64, turn: Duration) -> u64 {
            while !self.looks(term, turn) {
                self.now += SWEEP;
            }
            (self.now - self.began).as_millis() as u64
        }
    }

    #[test]
    fn candidates_stand_a_turn_apart_and_again_after_each_round() {
        for rank in 0..3 {
            let mut candidate = Candidate::new(rank);
            for round in 0..4 {
                let at = u64::from(rank) * 250 + round * 750;
                assert_eq!(candidate.next_turn(7, TURN), at, "rank {rank}");
            }
        }
    }

    #[test]
    fn a_new_term_is_somebodys_turn() {
        let mut last = Candidate::new(2);
        assert!(!last.looks(7, TURN));
        last.now += ms(450);
        assert!(!last.looks(8, TURN), "its own turn was to come at 500 ms");
        assert_eq!(last.next_turn(8, TURN), 450 + 750);
    }

    #[test]
    fn what_was_slept_through_is_not_made_up_for() {
        let mut candidate = Candidate::new(0);
        assert!(candidate.looks(7, TURN));
        candidate.now += ms(30_000);
        assert!(candidate.looks(7, TURN));
        candidate.now += SWEEP;
        assert!(!candidate.looks(7, TURN));
        assert_eq!(candidate.next_turn(7, TURN), 30_750);
    }

    #[test]
    fn a_leader_in_between_begins_a_new_count() {
        let mut candidate = Candidate::new(1);
        assert!(!candidate.looks(7, TURN));
        candidate.turns.end();
        candidate.now += ms(10_000);
        assert!(!candidate.looks(8, TURN));
        assert_eq!(candidate.next_turn(8, TURN), 10_250);
    }

    #[test]
    fn turns_grow_with_the_terms_in_which_nobody_came_to_lead() {
        let grown: Vec<u32> = (10..17).map(|term| growth(term, 10)).collect();
        assert_eq!(grown, [1, 1, 2, 4, 8, 8, 8]);
        assert_eq!(growth(0, 0), 1, "a new group");
        assert_eq!(growth(3, 9), 1, "a log that is ahead of the vote");
    }
}
