//! How long nodes have been up, for those who want to give them something to lead. Pure: time comes
//! in as an argument.

use std::time::Duration;

use tokio::time::Instant;

/// However often a node went away, after being up for so long it is trusted again.
const NEEDED_MAX: Duration = Duration::from_secs(300);
/// A node that stayed for so many times what was asked of it begins anew when it goes.
const STAYED: u32 = 4;

/// One node's.
#[derive(Debug)]
pub(crate) struct Uptime {
    since: Option<Instant>,
    /// The incarnation that was seen last.
    process: Option<u64>,
    /// What is asked of it; twice as much each time it goes away soon after it came, so that one
    /// that is held for dead again and again does not have each leadership moved twice a time. A new
    /// process begins anew.
    needed: Duration,
    least: Duration,
}

impl Uptime {
    pub(crate) fn new(least: Duration) -> Self {
        Self {
            since: None,
            process: None,
            needed: least,
            least,
        }
    }

    pub(crate) fn note(&mut self, up: bool, process: Option<u64>, now: Instant) {
        if process != self.process {
            *self = Self {
                process,
                ..Self::new(self.least)
            };
        }
        if up {
            self.since.get_or_insert(now);
        } else if let Some(since) = self.since.take() {
            self.needed = match now - since < self.needed * STAYED {
                true => (self.needed * 2).min(NEEDED_MAX.max(self.least)),
                false => self.least,
            };
        }
    }

    /// Up for as long as is asked of it.
    pub(crate) fn is_settled(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now - since >= self.needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn who_comes_and_goes_is_asked_for_more_each_time() {
        let mut now = Instant::now();
        let mut uptime = Uptime::new(secs(5));
        for needed in [5, 10, 20, 40, 80, 160, 300, 300] {
            uptime.note(true, Some(1), now);
            assert!(!uptime.is_settled(now + secs(needed - 1)), "{needed}");
            assert!(uptime.is_settled(now + secs(needed)), "{needed}");
            now += secs(6);
            uptime.note(false, Some(1), now);
            assert!(!uptime.is_settled(now));
        }
    }

    #[test]
    fn who_stayed_begins_anew() {
        let mut now = Instant::now();
        let mut uptime = Uptime::new(secs(5));
        for stays in [6, 6, 80] {
            uptime.note(true, Some(1), now);
            now += secs(stays);
            uptime.note(false, Some(1), now);
        }
        uptime.note(true, Some(1), now);
        assert!(uptime.is_settled(now + secs(5)));
    }

    #[test]
    fn a_new_process_begins_anew() {
        let now = Instant::now();
        let mut uptime = Uptime::new(secs(5));
        for process in [1, 1, 1, 2] {
            uptime.note(true, Some(process), now);
            uptime.note(false, Some(process), now);
        }
        uptime.note(true, Some(3), now);
        assert!(uptime.is_settled(now + secs(5)));
    }
}
