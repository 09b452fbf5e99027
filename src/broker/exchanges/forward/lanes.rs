//! How far a forwarder has come for each topic. Pure bookkeeping, without clock or network.
//!
//! The scan reads the queue once and finds the topics that its messages go to. A topic has a lane
//! from the first message on that goes to it. What lies before the scan is done for every topic,
//! but for those whose lane is behind:
//!
//! ```text
//!   0 ......... lane of a full topic ........ scan ........ end
//!     done for all        done for the others      not looked at
//! ```
//!
//! A topic that can't take its messages, or not at once, goes on alone when it can
//! ([`Lane::apart`]); the others keep up with the scan together and share what was read.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::catalog::TopicId;

/// The others wait for a topic's step for so long: one that is full and drops, or has no leader,
/// takes far longer.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(super) struct Lanes {
    scan: u64,
    lanes: BTreeMap<TopicId, Lane>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lane {
    /// The first offset not done; none while it is level with the scan.
    pub behind: Option<u64>,
    /// Since when a step is under way.
    pub busy: Option<Instant>,
    /// It failed, or took too long, and has not come back to the scan since.
    pub apart: bool,
    /// One after the other.
    pub failures: u32,
}

impl Lanes {
    /// As saved: the scan under topic 0, which is no topic's id.
    pub fn load(saved: impl IntoIterator<Item = (TopicId, u64)>) -> Self {
        let mut saved: BTreeMap<TopicId, u64> = saved.into_iter().collect();
        let scan = saved.remove(&SCAN).unwrap_or(0);
        let lanes = saved.into_iter().map(|(topic, offset)| {
            let lane = Lane {
                behind: (offset < scan).then_some(offset),
                apart: offset < scan,
                ..Lane::default()
            };
            (topic, lane)
        });
        Self {
            scan,
            lanes: lanes.collect(),
        }
    }

    /// What [`load`](Self::load) takes.
    pub fn to_save(&self) -> Vec<(TopicId, u64)> {
        let lanes = self.lanes.iter();
        let lanes = lanes.map(|(topic, lane)| (*topic, lane.behind.unwrap_or(self.scan)));
        std::iter::once((SCAN, self.scan)).chain(lanes).collect()
    }

    pub fn scan(&self) -> u64 {
        self.scan
    }

    /// Everything before it is done, or will never be.
    pub fn done(&self) -> u64 {
        let behind = self.lanes.values().filter_map(|lane| lane.behind);
        behind.min().unwrap_or(self.scan)
    }

    /// Whether the topics that keep up have all that was read.
    pub fn may_scan(&self) -> bool {
        self.lanes
            .values()
            .all(|lane| lane.behind.is_none() || lane.apart)
    }

    /// The scan read on to `next` and found messages for `topics`.
    pub fn scanned(&mut self, next: u64, topics: impl IntoIterator<Item = TopicId>) {
        for topic in topics {
            let lane = self.lanes.entry(topic).or_default();
            lane.behind = lane.behind.or(Some(self.scan));
        }
        self.scan = next;
    }

    /// The lanes with something to do and nothing under way.
    pub fn waiting(&self) -> impl Iterator<Item = (TopicId, u64, Lane)> + '_ {
        let lanes = self.lanes.iter().filter(|(_, lane)| lane.busy.is_none());
        lanes.filter_map(|(topic, lane)| Some((*topic, lane.behind?, *lane)))
    }

    pub fn all(&self) -> impl Iterator<Item = (TopicId, u64)> + '_ {
        let lanes = self.lanes.iter();
        lanes.map(|(topic, lane)| (*topic, lane.behind.unwrap_or(self.scan)))
    }

    pub fn begin(&mut self, topic: TopicId, now: Instant) {
        if let Some(lane) = self.lanes.get_mut(&topic) {
            lane.busy = Some(now);
        }
    }

    /// The others go on without those whose step takes too long.
    pub fn leave_the_slow(&mut self, now: Instant) {
        for lane in self.lanes.values_mut() {
            lane.apart |= lane.busy.is_some_and(|since| since + PATIENCE <= now);
        }
    }

    /// When the others have waited for long enough for one of them.
    pub fn patience_ends(&self) -> Option<Instant> {
        let together = self.lanes.values().filter(|lane| !lane.apart);
        together
            .filter_map(|lane| Some(lane.busy? + PATIENCE))
            .min()
    }

    /// The topic has everything before `next`.
    pub fn advance(&mut self, topic: TopicId, next: u64) {
        let scan = self.scan;
        if let Some(lane) = self.lanes.get_mut(&topic) {
            let level = next >= scan;
            *lane = Lane {
                behind: (!level).then_some(next),
                apart: lane.apart && !level,
                ..Lane::default()
            };
        }
    }

    /// Returns how often it failed now.
    pub fn fail(&mut self, topic: TopicId) -> u32 {
        let Some(lane) = self.lanes.get_mut(&topic) else {
            return 0;
        };
        lane.busy = None;
        lane.apart = true;
        lane.failures = lane.failures.saturating_add(1);
        lane.failures
    }

    /// The topic is gone.
    pub fn forget(&mut self, topic: TopicId) {
        self.lanes.remove(&topic);
    }
}

const SCAN: TopicId = 0;

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(lanes: &Lanes) -> Vec<(TopicId, u64)> {
        lanes.waiting().map(|(topic, at, _)| (topic, at)).collect()
    }

    #[test]
    fn topics_that_keep_up_hold_the_scan_until_they_have_what_was_read() {
        let mut lanes = Lanes::default();
        assert!(lanes.may_scan());
        lanes.scanned(10, [3, 5]);
        assert_eq!(waiting(&lanes), [(3, 0), (5, 0)]);
        assert!(!lanes.may_scan());
        for topic in [3, 5] {
            lanes.begin(topic, Instant::now());
        }
        assert_eq!(waiting(&lanes), []);
        lanes.advance(3, 10);
        assert!(!lanes.may_scan());
        assert_eq!((lanes.done(), lanes.scan()), (0, 10));
        lanes.advance(5, 10);
        assert!(lanes.may_scan());
        assert_eq!(lanes.done(), 10);
    }

    #[test]
    fn a_topic_that_fails_holds_up_only_itself() {
        let mut lanes = Lanes::default();
        lanes.scanned(10, [3, 5]);
        lanes.begin(3, Instant::now());
        lanes.begin(5, Instant::now());
        assert_eq!(lanes.fail(3), 1);
        lanes.advance(5, 10);
        assert!(lanes.may_scan());
        lanes.scanned(20, [5]);
        assert!(!lanes.may_scan(), "of the others each waits for all");
        lanes.advance(5, 20);
        assert!(lanes.may_scan());
        assert_eq!(lanes.done(), 0);
        // It comes back chunk by chunk, and still holds up nobody.
        assert_eq!(waiting(&lanes), [(3, 0)]);
        lanes.begin(3, Instant::now());
        lanes.advance(3, 10);
        assert!(lanes.may_scan());
        assert_eq!(lanes.done(), 10);
        lanes.begin(3, Instant::now());
        lanes.advance(3, 20);
        lanes.scanned(30, [3]);
        assert!(!lanes.may_scan(), "and is one of the others again");
    }

    #[test]
    fn a_topic_that_takes_long_holds_up_only_itself() {
        let mut lanes = Lanes::default();
        let now = Instant::now();
        lanes.scanned(10, [3, 5]);
        lanes.begin(3, now);
        lanes.begin(5, now);
        lanes.advance(5, 10);
        assert_eq!(lanes.patience_ends(), Some(now + PATIENCE));
        lanes.leave_the_slow(now + PATIENCE - Duration::from_millis(1));
        assert!(!lanes.may_scan());
        lanes.leave_the_slow(now + PATIENCE);
        assert!(lanes.may_scan());
        assert_eq!(lanes.patience_ends(), None, "it is left already");
        lanes.scanned(20, [3, 5]);
        assert_eq!(waiting(&lanes), [(5, 10)], "its step is still under way");
        lanes.advance(5, 20);
        // When it is done there is more to do, and still nobody waits.
        lanes.advance(3, 10);
        assert_eq!(waiting(&lanes), [(3, 10)]);
        assert!(lanes.may_scan());
        lanes.begin(3, now);
        lanes.advance(3, 20);
        lanes.scanned(30, [3]);
        assert!(!lanes.may_scan(), "and is one of the others again");
    }

    #[test]
    fn what_is_saved_comes_back() {
        let mut lanes = Lanes::default();
        lanes.scanned(10, [3, 5]);
        lanes.advance(5, 10);
        lanes.begin(3, Instant::now());
        lanes.fail(3);
        lanes.scanned(20, []);
        let saved = lanes.to_save();
        assert_eq!(saved, [(0, 20), (3, 0), (5, 20)]);
        let again = Lanes::load(saved.clone());
        assert_eq!(again.to_save(), saved);
        assert_eq!(waiting(&again), [(3, 0)]);
        assert!(again.may_scan());
        assert_eq!(Lanes::load([]).to_save(), [(0, 0)]);
    }

    #[test]
    fn a_deleted_topic_holds_up_nothing() {
        let mut lanes = Lanes::default();
        lanes.scanned(10, [3]);
        lanes.begin(3, Instant::now());
        lanes.fail(3);
        assert_eq!(lanes.done(), 0);
        lanes.forget(3);
        assert_eq!(lanes.done(), 10);
        // A step that was under way comes to nothing.
        lanes.advance(3, 5);
        assert_eq!(lanes.fail(3), 0);
        assert_eq!(lanes.to_save(), [(0, 10)]);
    }
}
