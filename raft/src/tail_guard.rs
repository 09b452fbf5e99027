//! Replicas of async-flush groups after a crash of their machine.
//!
//! Such a replica may have lost a tail that it had acknowledged, so its vote could elect a leader
//! that lacks acknowledged messages. It neither votes nor stands until one of two things is known:
//!
//! - it holds everything that a leader of a later term has committed *in its own term*, which a
//!   majority of sound replicas elected; or
//! - so many replicas are in the same state that sound ones are no majority. Then the tail may be
//!   gone for good; the replicas go on with the longest log and say so ([`TailGuard::tail_lost`]).
//!
//! Where the leader outlived the crash, it may count on what such a replica has lost. So whoever
//! began suspect says so when it asks who leads, and the leader finds out anew where that log ends.
//! What was committed stays so: of it the leader has everything, and the replica does not vote
//! before it has it again.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use quorate_storage::mutation::{self, Mutation};
use serde::{Deserialize, Serialize};

const SOUND: u8 = 0;
const SUSPECT: u8 = 1;
const LOST: u8 = 2;

/// How long a suspect replica waits for replicas that do not answer before it goes by a majority.
pub(crate) const ABSENT_PATIENCE: Duration = Duration::from_secs(10);

/// Whether one replica's tail can be trusted.
#[derive(Debug)]
pub(crate) struct TailGuard {
    began_suspect: bool,
    state: AtomicU8,
}

/// What one replica says of its tail when another asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TailReport {
    pub(crate) suspect: bool,
    pub(crate) last: Option<(u64, u64)>,
}

/// What a suspect replica should do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TailVerdict {
    /// Sound replicas may still form a majority.
    Wait,
    /// They cannot. Go on; with `stand`, this replica's log is the longest known.
    GoOn { stand: bool },
}

impl TailGuard {
    pub(crate) fn new(suspect: bool) -> Self {
        let votes = !suspect || mutation::on(Mutation::SuspectTailVotes);
        Self {
            began_suspect: suspect,
            state: AtomicU8::new(if votes { SOUND } else { SUSPECT }),
        }
    }

    /// True for a replica that may have begun without what it had acknowledged, for as long as this
    /// process lives: a leader may come upon it at any time.
    pub(crate) fn began_suspect(&self) -> bool {
        self.began_suspect
    }

    /// True while this replica must neither vote nor stand.
    pub(crate) fn is_suspect(&self) -> bool {
        self.state.load(Ordering::Acquire) == SUSPECT
    }

    /// True when a majority may have lost acknowledged messages since this process began.
    pub(crate) fn tail_lost(&self) -> bool {
        self.state.load(Ordering::Acquire) == LOST
    }

    /// This replica holds all that a newly elected leader has committed.
    pub(crate) fn caught_up(&self) {
        self.state.store(SOUND, Ordering::Release);
    }

    pub(crate) fn go_on_without(&self) {
        self.state.store(LOST, Ordering::Release);
    }
}

/// Decides from the reports of the other replicas; silent ones gave none.
pub(crate) fn judge(
    own: TailReport,
    others: &[TailReport],
    replicas: usize,
    waited: Duration,
) -> TailVerdict {
    let majority = replicas / 2 + 1;
    let heard = others.len() + 1;
    let sound = others.iter().filter(|report| !report.suspect).count();
    let silent = replicas.saturating_sub(heard);
    let enough = silent == 0 || (waited >= ABSENT_PATIENCE && heard >= majority);
    let sound_majority_possible = if silent > 0 && waited < ABSENT_PATIENCE {
        sound + silent >= majority
    } else {
        sound >= majority
    };
    if !enough || sound_majority_possible {
        return TailVerdict::Wait;
    }
    TailVerdict::GoOn {
        stand: others.iter().all(|report| report.last <= own.last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(index: u64) -> TailReport {
        TailReport {
            suspect: true,
            last: Some((1, index)),
        }
    }

    fn sound(index: u64) -> TailReport {
        TailReport {
            suspect: false,
            last: Some((1, index)),
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_sound_majority_is_waited_for() {
        let verdict = judge(suspect(5), &[sound(9), sound(9)], 3, LONG);
        assert_eq!(verdict, TailVerdict::Wait);
    }

    #[test]
    fn silence_is_given_time() {
        assert_eq!(
            judge(suspect(5), &[suspect(5)], 3, Duration::ZERO),
            TailVerdict::Wait
        );
        assert_eq!(
            judge(suspect(5), &[], 3, LONG),
            TailVerdict::Wait,
            "no majority at all"
        );
    }

    #[test]
    fn when_sound_replicas_are_no_majority_the_longest_log_goes_on() {
        let all = [suspect(4), suspect(5)];
        assert_eq!(
            judge(suspect(5), &all, 3, Duration::ZERO),
            TailVerdict::GoOn { stand: true }
        );
        assert_eq!(
            judge(suspect(3), &all, 3, Duration::ZERO),
            TailVerdict::GoOn { stand: false }
        );
        let one_sound = [suspect(4), sound(9)];
        assert_eq!(
            judge(suspect(5), &one_sound, 3, Duration::ZERO),
            TailVerdict::GoOn { stand: false },
            "the sound one has the longest log"
        );
        assert_eq!(
            judge(suspect(5), &[suspect(4)], 3, LONG),
            TailVerdict::GoOn { stand: true }
        );
    }
}
