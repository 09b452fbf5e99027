//! Reading everything the log holds, slowly, so that damage is found while the others are sound.
//!
//! Bits rot where nobody reads. One damaged replica is filled again by the others; two of the same
//! group, found on the same day, may be a majority. The log's readers tell of what they find.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quorate_raft::blocking;
use quorate_storage::commit_log::{CommitLog, GroupLog};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Between the end of one pass and the beginning of the next.
const REST: Duration = Duration::from_secs(6 * 60 * 60);
const PIECE_BYTES: usize = 1 << 20;
/// So that it takes a small part of what a disk can do.
const BYTES_PER_SECOND: u64 = 64 << 20;

/// What was read so far.
#[derive(Debug, Default)]
pub struct Scrubbed {
    pub passes: AtomicU64,
    pub bytes: AtomicU64,
}

/// Reads all groups one after the other, again and again, until it is stopped.
pub(super) async fn run(log: CommitLog, scrubbed: Arc<Scrubbed>, stop: CancellationToken) {
    let passes = async {
        loop {
            for group in log.groups() {
                scrub(&log.group(group), &scrubbed).await;
            }
            scrubbed.passes.fetch_add(1, Ordering::Relaxed);
            sleep(REST).await;
        }
    };
    stop.run_until_cancelled(passes).await;
}

async fn scrub(group: &GroupLog, scrubbed: &Scrubbed) {
    let state = group.state();
    let mut next = state.purged.map_or(0, |purged| purged.index + 1);
    let end = state.last.map_or(0, |last| last.index + 1);
    while next < end {
        let reader = group.clone();
        let piece = blocking::on_pool(move || reader.read(next, end, PIECE_BYTES)).await;
        // Damage was told by the log itself, and whatever else it is, others notice it too.
        let Ok(Ok(entries)) = piece else { return };
        if entries.is_empty() {
            return;
        }
        next += entries.len() as u64;
        let bytes: u64 = entries.iter().map(|entry| entry.body.len() as u64).sum();
        scrubbed.bytes.fetch_add(bytes, Ordering::Relaxed);
        sleep(Duration::from_secs(1).mul_f64(bytes as f64 / BYTES_PER_SECOND as f64)).await;
    }
}
