//! When a delayed message is to become visible.

use serde::{Deserialize, Serialize};

use super::{BrokerError, BrokerResult};

/// No message is delayed for longer: a year.
pub const MAX_DELAY_MS: u64 = 365 * 24 * 3_600_000;

/// As a client gives it. A retry gives the same one again, whatever the time is then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delay {
    /// So many ms after the queue's leader took it.
    For(u64),
    /// At a time, in ms since 1970.
    Until(u64),
}

impl Delay {
    /// Of the two ways to say it, one may be given.
    pub fn new(delay_ms: Option<u64>, deliver_at_ms: Option<u64>) -> Result<Option<Self>, String> {
        match (delay_ms, deliver_at_ms) {
            (None, None) => Ok(None),
            (Some(ms), None) if ms > MAX_DELAY_MS => Err(format!(
                "delay_ms is at most {MAX_DELAY_MS}, which is a year"
            )),
            (Some(ms), None) => Ok(Some(Self::For(ms))),
            (None, Some(ms)) => Ok(Some(Self::Until(ms))),
            (Some(_), Some(_)) => Err("give one of delay_ms and deliver_at_ms, not both".into()),
        }
    }

    /// Refuses what is too far ahead at `now_ms`.
    pub(super) fn check(self, now_ms: u64) -> BrokerResult<()> {
        match self {
            Self::Until(ms) if ms > now_ms.saturating_add(MAX_DELAY_MS) => {
                let text =
                    "deliver_at_ms is more than a year ahead; it is in milliseconds since 1970";
                Err(BrokerError::InvalidRequest(text.to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// When that is, taken at `now_ms`. None: at once.
    pub(crate) fn due_ms(self, now_ms: u64) -> Option<u64> {
        let due_ms = match self {
            Self::For(ms) => now_ms.saturating_add(ms),
            Self::Until(ms) => ms,
        };
        (due_ms > now_ms).then_some(due_ms)
    }

    /// Whether the message is a batch of its own. Whatever the time is, so that a retry makes the same
    /// batches.
    pub(super) fn stands_alone(self) -> bool {
        self != Self::For(0)
    }

    /// What tells this delay from every other.
    pub(super) fn fingerprint(self) -> [u8; 9] {
        let (kind, ms) = match self {
            Self::For(ms) => (1, ms),
            Self::Until(ms) => (2, ms),
        };
        let mut bytes = [kind; 9];
        bytes[1..].copy_from_slice(&ms.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_way_of_saying_it_up_to_a_year() {
        assert_eq!(Delay::new(None, None), Ok(None));
        assert_eq!(Delay::new(Some(5), None), Ok(Some(Delay::For(5))));
        assert_eq!(Delay::new(None, Some(5)), Ok(Some(Delay::Until(5))));
        assert!(Delay::new(Some(5), Some(5)).is_err());
        assert!(Delay::new(Some(MAX_DELAY_MS), None).is_ok());
        assert!(Delay::new(Some(MAX_DELAY_MS + 1), None).is_err());
    }

    #[test]
    fn what_is_past_is_at_once_and_what_is_too_far_is_refused() {
        let now = 1 << 40;
        assert_eq!(Delay::For(0).due_ms(now), None);
        assert_eq!(Delay::For(7).due_ms(now), Some(now + 7));
        assert_eq!(Delay::Until(now - 1).due_ms(now), None);
        assert_eq!(Delay::Until(now + 1).due_ms(now), Some(now + 1));
        let year = now + MAX_DELAY_MS;
        assert!(Delay::Until(year).check(now).is_ok());
        assert!(Delay::Until(year + 1).check(now).is_err());
    }
}
