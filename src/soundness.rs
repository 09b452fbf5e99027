//! Whether what a replica derived from its log can still be used.

use std::sync::Arc;

use parking_lot::Mutex;
use quorate_storage::StorageError;
use tokio::sync::Notify;

/// Shared by a state machine, its readers, and whoever makes its files anew. A broken replica stays
/// broken: the new one has a soundness of its own.
#[derive(Debug)]
pub struct Soundness {
    broken: Mutex<Option<StorageError>>,
    repair: Arc<Notify>,
}

impl Soundness {
    /// `repair` is told when it breaks.
    pub fn new(repair: Arc<Notify>) -> Self {
        Self {
            broken: Mutex::new(None),
            repair,
        }
    }

    /// Why this replica can't be read any more, if so.
    pub fn broken(&self) -> Option<StorageError> {
        self.broken.lock().clone()
    }

    pub fn set_broken(&self, cause: StorageError) {
        self.broken.lock().get_or_insert(cause);
        self.repair.notify_one();
    }
}
