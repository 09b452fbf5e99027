//! Snapshots and queue indexes on a disk that loses its power, and fails, at every place.

mod queue_index;
mod snapshots;

use quorate_storage::vfs::fault::{CutLimits, FaultVfs, Operation};

pub const OPERATIONS: [Operation; 9] = [
    Operation::Open,
    Operation::Create,
    Operation::Read,
    Operation::Write,
    Operation::Sync,
    Operation::Resize,
    Operation::Rename,
    Operation::Remove,
    Operation::SyncDir,
];

/// `CRASH_STATES=all` goes further.
pub fn limits() -> CutLimits {
    let all = std::env::var("CRASH_STATES").is_ok_and(|asked| asked == "all");
    CutLimits {
        combined: 6,
        samples: if all { 64 } else { 2 },
        tears: if all { 24 } else { 2 },
        seed: 5,
    }
}

/// For a disk that has failed before: less is left open.
pub const FEW: CutLimits = CutLimits {
    combined: 1,
    samples: 1,
    tears: 0,
    seed: 6,
};

/// All that a machine or a process may leave when it ends now.
pub fn endings(vfs: &FaultVfs, limits: CutLimits) -> impl Iterator<Item = FaultVfs> {
    let cuts = vfs.power_cuts(limits).into_iter();
    cuts.chain(std::iter::once(vfs.kill()))
}

/// Says where a failed check was.
#[derive(Debug)]
pub struct Place(pub String);

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}
