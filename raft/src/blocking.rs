//! Work that waits for a disk, kept from holding up the other tasks.
//!
//! A runtime with one thread has nobody else to do it, and a simulation's must do all its work on
//! that thread to be repeatable: there it is done in place.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{self, JoinError};

fn has_threads() -> bool {
    Handle::try_current().is_ok_and(|h| h.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// Runs it here; the other tasks of this thread move elsewhere.
pub(crate) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match has_threads() {
        true => task::block_in_place(work),
        false => work(),
    }
}

/// Runs it on the pool of blocking threads. It goes on when nobody waits for it any more.
pub async fn on_pool<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    match has_threads() {
        true => task::spawn_blocking(work).await,
        false => Ok(work()),
    }
}
