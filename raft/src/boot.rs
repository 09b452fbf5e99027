//! Whether the machine, and not only the process, may have crashed since the last run.
//!
//! What was written without an fsync survives the death of a process but not that of its machine.
//! The kernel's boot id tells the two apart.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use quorate_storage::vfs::Vfs;
use quorate_storage::{StorageError, files};

/// Stands for the boot id until every tail that a crash made suspect has been made good.
const SUSPECT: &str = "suspect";
const FILE: &str = "run";

/// The kernel's name for the present boot of this machine.
///
/// # Errors
/// When the kernel does not tell.
pub fn this_boot() -> Result<String, StorageError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let id = std::fs::read_to_string(path).map_err(|e| StorageError::io("read", path, e))?;
    Ok(id.trim().to_owned())
}

/// The mark of the run that is under way. Without [`Run::end`], it counts as crashed.
#[derive(Debug)]
pub struct Run {
    vfs: Arc<dyn Vfs>,
    dir: std::path::PathBuf,
    boot_id: String,
    tails_suspect: bool,
    settled: AtomicBool,
}

impl Run {
    /// Begins a run under the machine's present boot, see [`this_boot`].
    ///
    /// # Errors
    /// When the mark cannot be read or written.
    pub fn begin(vfs: Arc<dyn Vfs>, dir: &Path, boot_id: &str) -> Result<Self, StorageError> {
        let path = dir.join(FILE);
        let previous = files::read(&*vfs, &path)?;
        let previous = previous.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        // No mark is a first start; a clean end or the same boot lost nothing. A run that began with
        // suspect tails and did not settle them leaves them to the next one.
        let tails_suspect = previous.is_some_and(|previous| {
            let previous = previous.trim();
            previous != "ended" && previous != boot_id
        });
        let run = Self {
            vfs,
            dir: dir.to_path_buf(),
            boot_id: boot_id.to_owned(),
            tails_suspect,
            settled: AtomicBool::new(!tails_suspect),
        };
        run.write(if tails_suspect { SUSPECT } else { boot_id })?;
        Ok(run)
    }

    /// True when unsynced writes of the run before this one may be lost.
    pub fn tails_suspect(&self) -> bool {
        self.tails_suspect
    }

    /// Whether something is still to be made good.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// Every suspect tail has been made good, or its loss was told.
    pub fn settle(&self) -> Result<(), StorageError> {
        self.write(&self.boot_id)?;
        self.settled.store(true, Ordering::Release);
        Ok(())
    }

    /// Everything is on disk: the next run need not suspect anything, unless this one did.
    pub fn end(&self) -> Result<(), StorageError> {
        match self.is_settled() {
            true => self.write("ended"),
            false => Ok(()),
        }
    }

    fn write(&self, mark: &str) -> Result<(), StorageError> {
        files::replace(&*self.vfs, &self.dir.join(FILE), mark.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_storage::vfs::os::OsVfs;

    fn begin(dir: &Path, boot: &str) -> Run {
        Run::begin(Arc::new(OsVfs), dir, boot).unwrap()
    }

    #[test]
    fn only_another_boot_after_an_unclean_end_makes_tails_suspect() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!begin(dir.path(), "a").tails_suspect(), "first start");
        assert!(
            !begin(dir.path(), "a").tails_suspect(),
            "the process was killed"
        );
        assert!(
            begin(dir.path(), "b").tails_suspect(),
            "the machine crashed"
        );
        // Not made good before the process ended, whichever way.
        assert!(begin(dir.path(), "b").tails_suspect(), "killed");
        let run = begin(dir.path(), "b");
        run.end().unwrap();
        let run = begin(dir.path(), "b");
        assert!(run.tails_suspect() && !run.is_settled(), "ended");
        run.settle().unwrap();
        let run = begin(dir.path(), "b");
        assert!(!run.tails_suspect(), "killed after it was made good");
        run.end().unwrap();
        assert!(
            !begin(dir.path(), "c").tails_suspect(),
            "rebooted after a clean end"
        );
    }
}
