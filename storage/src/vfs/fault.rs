//! A file system in memory that knows what was synced, can lose the rest, and can fail on demand.
//!
//! The model is harsher than a disk: a write without fsync may survive in any part and any order, a
//! name without fsync of its directory may vanish, and after a failed fsync the bytes it was about are
//! never written, though they stay readable until the crash (as with Linux's page cache). A write that
//! fails has written its first half.
//!
//! [`FaultVfs::crash`] draws one of the states a power cut may leave; [`FaultVfs::power_cuts`] lists them.

mod cuts;
mod unsynced;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Vfs, VfsFile};

pub use cuts::CutLimits;
use unsynced::{Change, FileData, Renaming, SplitMix};

/// The kinds of operation that can be counted and made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Open,
    Create,
    Read,
    Write,
    /// `sync_data` and `sync_all`.
    Sync,
    /// `set_len` and `allocate`.
    Resize,
    Rename,
    Remove,
    SyncDir,
}

/// See the module. Clones are the same file system.
#[derive(Debug, Clone, Default)]
pub struct FaultVfs {
    disk: Arc<Mutex<Disk>>,
}

/// Called without any lock held.
type SyncHook = Arc<dyn Fn() + Send + Sync>;

struct Disk {
    files: Vec<FileData>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Changes of names since the last fsync of their directory, in order.
    renamings: Vec<Renaming>,
    dirs: BTreeSet<PathBuf>,
    /// Those whose own entry no fsync of their directory has made durable.
    unsynced_dirs: BTreeSet<PathBuf>,
    counts: BTreeMap<Operation, u64>,
    /// Calls that may change something, in all.
    changes: u64,
    failing: Vec<(Operation, u64, io::ErrorKind)>,
    /// The reads that bring a wrong byte, and which one.
    flipping: Vec<(u64, usize)>,
    halt_at: Option<u64>,
    free_space: u64,
    /// Nothing can grow.
    full: bool,
    before_sync: Option<SyncHook>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("names", &self.names)
            .field("changes", &self.changes)
            .finish_non_exhaustive()
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            renamings: Vec::new(),
            dirs: BTreeSet::new(),
            unsynced_dirs: BTreeSet::new(),
            counts: BTreeMap::new(),
            changes: 0,
            failing: Vec::new(),
            flipping: Vec::new(),
            halt_at: None,
            free_space: u64::MAX,
            full: false,
            before_sync: None,
        }
    }
}

impl FaultVfs {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the `nth` next operation of a kind fail (1 is the very next).
    pub fn fail_nth(&self, operation: Operation, nth: u64, kind: io::ErrorKind) {
        let mut disk = self.disk.lock();
        let at = disk.counts.get(&operation).copied().unwrap_or(0) + nth;
        disk.failing.push((operation, at, kind));
    }

    /// Makes the `nth` next read bring its byte `at` (of as many as it reads) wrong.
    pub fn flip_nth_read(&self, nth: u64, at: usize) {
        let mut disk = self.disk.lock();
        let count = disk.counts.get(&Operation::Read).copied().unwrap_or(0) + nth;
        disk.flipping.push((count, at));
    }

    /// Called at the beginning of every fsync of a file, which may take as long as it likes.
    pub fn before_sync(&self, hook: impl Fn() + Send + Sync + 'static) {
        self.disk.lock().before_sync = Some(Arc::new(hook));
    }

    /// While it is full, no file can be created and none can grow.
    pub fn set_full(&self, full: bool) {
        self.disk.lock().full = full;
    }

    /// The power goes after `count` more operations that change something: every later operation of
    /// any kind fails and changes nothing.
    pub fn halt_after(&self, count: u64) {
        let mut disk = self.disk.lock();
        disk.halt_at = Some(disk.changes + count);
    }

    /// How many operations of a kind were asked for.
    pub fn count(&self, operation: Operation) -> u64 {
        self.disk
            .lock()
            .counts
            .get(&operation)
            .copied()
            .unwrap_or(0)
    }

    /// Calls so far that change something.
    pub fn changes(&self) -> u64 {
        self.disk.lock().changes
    }

    pub fn set_free_space(&self, bytes: u64) {
        self.disk.lock().free_space = bytes;
    }

    /// What a machine finds that loses its power now: everything synced, and of the rest what the seed
    /// says. This file system goes on as it was.
    pub fn crash(&self, seed: u64) -> Self {
        let mut rng = SplitMix(seed);
        let disk = self.disk.lock();
        let files = disk.files.iter().map(|file| file.after_crash(&mut rng));
        let files = files.collect();
        let percent = match rng.below(3) {
            0 => 0,
            1 => 100,
            _ => 10 + rng.below(85),
        };
        let mut names = disk.durable_names.clone();
        disk.rename_some(&mut names, &mut || rng.below(100) < percent);
        let state = Self::booted(files, names, &disk);
        state.lose_some_dirs(&mut || rng.below(100) < percent);
        state
    }

    /// What the next process finds after this one was killed: everything written, synced or not.
    /// What was not synced is still not synced.
    pub fn kill(&self) -> Self {
        let disk = self.disk.lock();
        let files = disk.files.iter().map(FileData::as_it_is).collect();
        let other = Self::booted(files, disk.durable_names.clone(), &disk);
        {
            let mut next = other.disk.lock();
            next.names = disk.names.clone();
            next.renamings = disk.renamings.clone();
        }
        other
    }

    fn booted(files: Vec<FileData>, names: BTreeMap<PathBuf, usize>, old: &Disk) -> Self {
        Self {
            disk: Arc::new(Mutex::new(Disk {
                files,
                names: names.clone(),
                durable_names: names,
                dirs: old.dirs.clone(),
                unsynced_dirs: old.unsynced_dirs.clone(),
                free_space: old.free_space,
                ..Disk::default()
            })),
        }
    }

    /// Flips bits of a file, on the medium too: `bytes[at] ^= with`.
    pub fn corrupt(&self, path: &Path, at: usize, with: u8) {
        let mut disk = self.disk.lock();
        if let Some(file) = disk.names.get(path).copied() {
            let file = &mut disk.files[file];
            for bytes in [&mut file.live, &mut file.durable] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= with;
                }
            }
        }
    }

    /// The bytes of a file as reads see them.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let disk = self.disk.lock();
        let file = disk.names.get(path)?;
        Some(disk.files[*file].live.clone())
    }
}

impl Disk {
    /// Counts an operation, and fails it if that was asked for.
    fn begin(&mut self, operation: Operation) -> io::Result<()> {
        let count = self.counts.entry(operation).or_default();
        *count += 1;
        let count = *count;
        if !matches!(operation, Operation::Open | Operation::Read) {
            self.changes += 1;
        }
        if self.halted() {
            return Err(io::Error::other("the power is gone"));
        }
        let failing = self.failing.iter();
        match failing.clone().find(|f| f.0 == operation && f.1 == count) {
            Some((_, _, kind)) => Err(io::Error::new(*kind, "made to fail")),
            None => Ok(()),
        }
    }

    fn halted(&self) -> bool {
        self.halt_at.is_some_and(|at| self.changes > at)
    }

    fn rename(&mut self, renaming: Renaming) {
        renaming.apply(&mut self.names);
        self.renamings.push(renaming);
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let found = self.names.get(path).copied();
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"))
    }
}

#[derive(Debug)]
struct FaultFile {
    disk: Arc<Mutex<Disk>>,
    file: usize,
}

impl FaultFile {
    fn change(&self, operation: Operation, change: Change) -> io::Result<()> {
        let mut disk = self.disk.lock();
        let begun = disk.begin(operation);
        let halted = disk.halted();
        let full = disk.full;
        let file = &mut disk.files[self.file];
        if begun.is_ok() && full && change.end() > file.live.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match (&begun, change) {
            (Ok(()), change) => file.change(change),
            (Err(_), Change::Write { at, mut bytes }) if !halted => {
                bytes.truncate(bytes.len() / 2);
                file.change(Change::Write { at, bytes });
            }
            (Err(_), _) => {}
        }
        begun
    }
}

impl VfsFile for FaultFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::Read)?;
        let live = &disk.files[self.file].live;
        let from = live.len().min(position as usize);
        let count = buf.len().min(live.len() - from);
        buf[..count].copy_from_slice(&live[from..from + count]);
        let reads = disk.counts.get(&Operation::Read).copied();
        let wrong = disk.flipping.iter().find(|(nth, _)| Some(*nth) == reads);
        if let Some((_, at)) = wrong
            && count > 0
        {
            buf[at % count] ^= 0x20;
        }
        Ok(count)
    }

    fn write_all_at(&self, buf: &[u8], position: u64) -> io::Result<()> {
        let change = Change::Write {
            at: position as usize,
            bytes: buf.to_vec(),
        };
        self.change(Operation::Write, change)
    }

    fn sync_data(&self) -> io::Result<()> {
        let hook = self.disk.lock().before_sync.clone();
        if let Some(hook) = hook {
            hook();
        }
        let mut disk = self.disk.lock();
        let begun = disk.begin(Operation::Sync);
        let halted = disk.halted();
        let file = &mut disk.files[self.file];
        match &begun {
            Ok(()) => file.sync(),
            Err(_) if halted => {}
            // The kernel forgets that these pages are dirty.
            Err(_) => file.pending.clear(),
        }
        begun
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Operation::Resize, Change::SetLen(len as usize))
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let now = self.len()?;
        self.set_len(len.max(now))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[self.file].live.len() as u64)
    }
}

impl Vfs for FaultVfs {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::Open)?;
        let file = disk.find(path)?;
        Ok(Arc::new(FaultFile {
            disk: self.disk.clone(),
            file,
        }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::Create)?;
        if disk.names.contains_key(path) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists"));
        }
        if disk.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = disk.files.len();
        disk.files.push(FileData::default());
        disk.rename(Renaming::Add(path.to_path_buf(), file));
        Ok(Arc::new(FaultFile {
            disk: self.disk.clone(),
            file,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::Rename)?;
        disk.find(from)?;
        disk.rename(Renaming::Move(from.to_path_buf(), to.to_path_buf()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::Remove)?;
        disk.find(path)?;
        disk.rename(Renaming::Remove(path.to_path_buf()));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let disk = self.disk.lock();
        let entries = disk.names.keys().chain(&disk.dirs);
        let inside = entries.filter(|path| path.parent() == Some(dir));
        let inside: BTreeSet<_> = inside.cloned().collect();
        Ok(inside.into_iter().collect())
    }

    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock();
        for dir in dir.ancestors().filter(|dir| dir.parent().is_some()) {
            if disk.dirs.insert(dir.to_path_buf()) {
                disk.unsynced_dirs.insert(dir.to_path_buf());
            }
        }
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.begin(Operation::SyncDir)?;
        let renamings = std::mem::take(&mut disk.renamings);
        let (now, later): (Vec<_>, Vec<_>) = renamings.into_iter().partition(|r| r.is_in(dir));
        for renaming in now {
            renaming.apply(&mut disk.durable_names);
        }
        disk.renamings = later;
        disk.unsynced_dirs.retain(|made| made.parent() != Some(dir));
        Ok(())
    }

    fn free_space(&self, _dir: &Path) -> io::Result<u64> {
        Ok(self.disk.lock().free_space)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let disk = self.disk.lock();
        let root = path.parent().is_none();
        Ok(root || disk.names.contains_key(path) || disk.dirs.contains(path))
    }
}
