//! A file system in memory on which hostile lengths show: nobody may read or reserve more than
//! the files here can hold.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quorate_storage::vfs::fault::FaultVfs;
use quorate_storage::vfs::{Vfs, VfsFile};

/// No reader needs a larger buffer for the small files of these tests.
const READ_MOST: usize = 1 << 20;
/// As on a small disk: larger files cannot be.
const FILE_MOST: u64 = 1 << 20;

#[derive(Debug, Clone, Default)]
pub struct BoundedVfs(pub FaultVfs);

#[derive(Debug)]
struct BoundedFile(Arc<dyn VfsFile>);

impl BoundedVfs {
    /// Puts a file there as a whole, its directory made before.
    pub fn put(&self, path: &Path, bytes: &[u8]) {
        let dir = path.parent().expect("a directory");
        self.0.create_dir_all(dir).expect("directory");
        let file = self.0.create(path).expect("create");
        file.write_all_at(bytes, 0).expect("write");
        file.sync_all().expect("sync");
        self.0.sync_dir(dir).expect("sync directory");
    }
}

fn bounded(len: u64) -> io::Result<()> {
    if len > FILE_MOST {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(())
}

impl VfsFile for BoundedFile {
    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        assert!(buf.len() <= READ_MOST, "a read of {} bytes", buf.len());
        self.0.read_at(buf, position)
    }
    fn write_all_at(&self, buf: &[u8], position: u64) -> io::Result<()> {
        bounded(position.saturating_add(buf.len() as u64))?;
        self.0.write_all_at(buf, position)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn sync_all(&self) -> io::Result<()> {
        self.0.sync_all()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        bounded(len)?;
        self.0.set_len(len)
    }
    fn allocate(&self, len: u64) -> io::Result<()> {
        bounded(len)?;
        self.0.allocate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

impl Vfs for BoundedVfs {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        Ok(Arc::new(BoundedFile(self.0.open(path)?)))
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn VfsFile>> {
        Ok(Arc::new(BoundedFile(self.0.create(path)?)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list(dir)
    }
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.0.create_dir_all(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.sync_dir(dir)
    }
    fn free_space(&self, dir: &Path) -> io::Result<u64> {
        self.0.free_space(dir)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.0.exists(path)
    }
}
