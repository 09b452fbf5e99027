//! Bounds on the calls in service for one peer.
//!
//! Each class has its own count and bytes, so that a flood of one kind (forwarded writes) never
//! refuses another (votes). Reading goes on in any case: calls beyond the bounds are refused,
//! not waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) struct InService {
    classes: Vec<ClassLoad>,
    calls_max: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct ClassLoad {
    calls: AtomicUsize,
    bytes: AtomicUsize,
}

/// A call's share of the bounds, from its arrival until its answer is written.
pub(crate) struct ServiceSlot {
    load: Arc<InService>,
    class: u8,
    bytes: usize,
}

impl InService {
    pub(crate) fn new(calls_max: usize, bytes_max: usize) -> InService {
        let classes = (0..=u8::MAX).map(|_| ClassLoad::default()).collect();
        InService {
            classes,
            calls_max,
            bytes_max,
        }
    }

    /// A slot, or `None` when the call has to be refused. One call is always admitted.
    pub(crate) fn admit(self: &Arc<Self>, class: u8, bytes: usize) -> Option<ServiceSlot> {
        let load = &self.classes[usize::from(class)];
        let calls = load.calls.fetch_add(1, Ordering::Relaxed);
        let held = load.bytes.fetch_add(bytes, Ordering::Relaxed);
        let slot = ServiceSlot {
            load: self.clone(),
            class,
            bytes,
        };
        let room = calls < self.calls_max && held.saturating_add(bytes) <= self.bytes_max;
        (room || calls == 0).then_some(slot)
    }
}

impl ServiceSlot {
    pub(crate) fn class(&self) -> u8 {
        self.class
    }
}

impl Drop for ServiceSlot {
    fn drop(&mut self) {
        let load = &self.load.classes[usize::from(self.class)];
        load.calls.fetch_sub(1, Ordering::Relaxed);
        load.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for ServiceSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceSlot")
            .field("class", &self.class)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_class_refuses_and_the_others_do_not_notice() {
        let service = Arc::new(InService::new(2, 100));
        let first = service.admit(1, 10).expect("room");
        let _second = service.admit(1, 10).expect("room");
        assert!(service.admit(1, 10).is_none());
        assert!(service.admit(2, 10).is_some());
        drop(first);
        assert!(service.admit(1, 91).is_none(), "too many bytes");
        assert!(service.admit(1, 90).is_some());
    }

    #[test]
    fn one_call_larger_than_the_bound_is_served_alone() {
        let service = Arc::new(InService::new(2, 100));
        let large = service.admit(1, 1000).expect("the only one");
        assert!(service.admit(1, 1).is_none());
        drop(large);
        assert!(service.admit(1, 1).is_some());
    }
}
