//! What bounds the HTTP layer: sizes, counts and times, and the budget of bytes in memory.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::HttpConfig;

/// The bounds of one listener. See the configuration table for what each means.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    pub max_request_bytes: usize,
    pub max_inflight_bytes: usize,
    pub max_connections: usize,
    pub header_timeout: Duration,
    pub body_idle_timeout: Duration,
    pub body_timeout: Duration,
    pub write_timeout: Duration,
    pub shutdown_timeout: Duration,
}

impl From<&HttpConfig> for HttpLimits {
    fn from(config: &HttpConfig) -> Self {
        let bytes = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        Self {
            max_request_bytes: bytes(config.max_request_bytes),
            max_inflight_bytes: bytes(config.max_inflight_bytes),
            max_connections: config.max_connections as usize,
            header_timeout: Duration::from_millis(config.header_timeout_ms),
            body_idle_timeout: Duration::from_millis(config.body_idle_timeout_ms),
            body_timeout: Duration::from_millis(config.body_timeout_ms),
            write_timeout: Duration::from_millis(config.write_timeout_ms),
            shutdown_timeout: Duration::from_millis(config.shutdown_timeout_ms),
        }
    }
}

/// Bytes of bodies that may be in memory together. Nobody waits for it: who finds it used up is
/// turned away, so a full budget can't become a queue of half-read requests.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    free: Arc<Semaphore>,
    total: usize,
}

/// A share of the budget, given back when dropped.
#[derive(Debug, Default)]
pub struct BudgetShare(Option<OwnedSemaphorePermit>);

impl ByteBudget {
    pub fn new(total: usize) -> Self {
        let total = total.min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(total)),
            total,
        }
    }

    /// Adds `bytes` to `share`; false when the budget does not have them.
    #[must_use]
    pub fn take(&self, share: &mut BudgetShare, bytes: usize) -> bool {
        let Ok(bytes) = u32::try_from(bytes) else {
            return false;
        };
        let Ok(more) = Arc::clone(&self.free).try_acquire_many_owned(bytes) else {
            return false;
        };
        match &mut share.0 {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        true
    }

    pub fn used(&self) -> usize {
        self.total - self.free.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_given_back_and_never_exceeded() {
        let budget = ByteBudget::new(100);
        let mut a = BudgetShare::default();
        assert!(budget.take(&mut a, 60));
        assert!(budget.take(&mut a, 30));
        let mut b = BudgetShare::default();
        assert!(!budget.take(&mut b, 11));
        assert_eq!(budget.used(), 90);
        drop(a);
        assert!(budget.take(&mut b, 100));
        assert!(!budget.take(&mut b, usize::MAX));
    }
}
