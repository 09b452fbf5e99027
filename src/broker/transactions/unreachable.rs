//! Queues and coordinators that lately could not be told how a transaction ended.
//!
//! Telling one that has no leader takes as long as a write may. Where many transactions have a part in
//! it, one of them at a time finds out whether it is back, and the others leave it out.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Between two attempts at the same group, doubling.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
struct Down {
    not_before: Instant,
    pause: Duration,
}

/// By Raft group, those that are out of reach.
#[derive(Debug, Default)]
pub(in crate::broker) struct Unreachable(Mutex<HashMap<u64, Down>>);

impl Unreachable {
    /// Whether nobody has to try it now.
    pub(super) fn is_down(&self, group: u64) -> bool {
        let known = self.0.lock();
        known
            .get(&group)
            .is_some_and(|down| down.not_before > Instant::now())
    }

    /// Whether to try it now. If it was out of reach, the others wait meanwhile.
    pub(super) fn may_try(&self, group: u64) -> bool {
        let mut known = self.0.lock();
        let Some(down) = known.get_mut(&group) else {
            return true;
        };
        let now = Instant::now();
        if down.not_before > now {
            return false;
        }
        down.pause = (down.pause * 2).min(PAUSE_MAX);
        down.not_before = now + down.pause;
        true
    }

    /// What came of an attempt.
    pub(super) fn tried(&self, group: u64, reached: bool) {
        let mut known = self.0.lock();
        match reached {
            true => drop(known.remove(&group)),
            false => {
                known.entry(group).or_insert_with(|| Down {
                    not_before: Instant::now() + PAUSE_MIN,
                    pause: PAUSE_MIN,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_at_a_time_finds_out_and_less_and_less_often() {
        let groups = Unreachable::default();
        assert!(groups.may_try(1) && groups.may_try(1));
        // Several find out at the same time; that is one failure.
        for _ in 0..9 {
            groups.tried(1, false);
        }
        assert!(groups.may_try(2), "another one");
        for pause in [PAUSE_MIN, PAUSE_MIN * 2, PAUSE_MIN * 4] {
            assert!(groups.is_down(1) && !groups.may_try(1));
            tokio::time::advance(pause).await;
            assert!(!groups.is_down(1) && groups.may_try(1));
            groups.tried(1, false);
        }
        groups.tried(1, true);
        assert!(!groups.is_down(1) && groups.may_try(1) && groups.may_try(1));
    }
}
