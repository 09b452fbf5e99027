//! A file system for tests that fails on demand and counts reads.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::vfs::os::OsVfs;
use crate::vfs::{Vfs, VfsFile};

/// Something to do once, in the middle of somebody's read.
#[derive(Default)]
pub(crate) struct Hook(parking_lot::Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Hook {
    pub(crate) fn set(&self, hook: impl FnOnce() + Send + 'static) {
        *self.0.lock() = Some(Box::new(hook));
    }

    fn fire(&self) {
        let hook = self.0.lock().take();
        if let Some(hook) = hook {
            hook();
        }
    }
}

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

#[derive(Debug, Default)]
pub(crate) struct Switches {
    pub before_read: Hook,
    pub fail_write: AtomicBool,
    pub fail_sync: AtomicBool,
    pub fail_create: AtomicBool,
    pub fail_rename: AtomicBool,
    pub fail_sync_dir: AtomicBool,
    pub reads: AtomicU64,
    pub syncs: AtomicU64,
    pub dir_syncs: AtomicU64,
}

/// The real file system behind [`Switches`].
#[derive(Debug, Default, Clone)]
pub(crate) struct TestVfs(pub Arc<Switches>);

#[derive(Debug)]
struct TestFile(Arc<dyn VfsFile>, Arc<Switches>);

fn gate(switch: &AtomicBool) -> io::Result<()> {
    if switch.load(Ordering::SeqCst) {
        return Err(io::Error::other("told to fail"));
    }
    Ok(())
}

impl VfsFile for TestFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        self.1.before_read.fire();
        self.1.reads.fetch_add(1, Ordering::SeqCst);
        self.0.read_at(buf, position)
    }
    fn write_all_at(&self, buf: &[u8], position: u64) -> io::Result<()> {
        gate(&self.1.fail_write)?;
        self.0.write_all_at(buf, position)
    }
    fn sync_data(&self) -> io::Result<()> {
        gate(&self.1.fail_sync)?;
        self.1.syncs.fetch_add(1, Ordering::SeqCst);
        self.0.sync_data()
    }
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn allocate(&self, len: u64) -> io::Result<()> {
        self.0.allocate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

impl Vfs for TestVfs {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        Ok(Arc::new(TestFile(OsVfs.open(path)?, Arc::clone(&self.0))))
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        gate(&self.0.fail_create)?;
        Ok(Arc::new(TestFile(OsVfs.create(path)?, Arc::clone(&self.0))))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        gate(&self.0.fail_rename)?;
        OsVfs.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        OsVfs.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        OsVfs.list(dir)
    }
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        OsVfs.create_dir_all(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        gate(&self.0.fail_sync_dir)?;
        self.0.dir_syncs.fetch_add(1, Ordering::SeqCst);
        OsVfs.sync_dir(dir)
    }
    fn free_space(&self, dir: &Path) -> io::Result<u64> {
        OsVfs.free_space(dir)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        OsVfs.exists(path)
    }
}
