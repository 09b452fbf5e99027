//! Creating and replacing small files so that a crash leaves the old one or the new one.

use std::io;
use std::path::{Path, PathBuf};

use crate::StorageError;
use crate::mutation::{self, Mutation};
use crate::vfs::Vfs;

/// Suffix of files that are being written and mean nothing yet.
pub(crate) const TEMP_SUFFIX: &str = ".tmp";

/// Creates `dir` with all its parents, and makes their directory entries durable.
///
/// An entry counts only after an fsync of the directory that holds it. Each one is synced before
/// anything is created in it, so of those that exist only the innermost can be in doubt: a process
/// that died may have created it without getting that far.
pub fn create_dirs(vfs: &dyn Vfs, dir: &Path) -> Result<(), StorageError> {
    let exists = |path: &Path| {
        vfs.exists(path)
            .map_err(|e| StorageError::io("look up", path, e))
    };
    let mut missing = Vec::new();
    let mut there = dir.to_path_buf();
    while !exists(&there)? {
        let holder = parent(&there);
        missing.push(std::mem::replace(&mut there, holder));
    }
    match sync_dir(vfs, &parent(&there)) {
        // Whoever must not open it has not created anything in it either.
        Err(StorageError::Io { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied => {}
        synced => synced?,
    }
    for made in missing.iter().rev() {
        vfs.create_dir_all(made)
            .map_err(|e| StorageError::io("create directory", made, e))?;
        sync_dir(vfs, &parent(made))?;
    }
    Ok(())
}

/// The bytes of a small file; none if it isn't there.
pub fn read(vfs: &dyn Vfs, path: &Path) -> Result<Option<Vec<u8>>, StorageError> {
    let file = match vfs.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|e| StorageError::io("open", path, e))?,
    };
    let len = file
        .len()
        .map_err(|e| StorageError::io("measure", path, e))?;
    let mut bytes = vec![0; len as usize];
    let got = file
        .read_at(&mut bytes, 0)
        .map_err(|e| StorageError::io("read", path, e))?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

/// Replaces a small file as a whole, durably: after a crash it has the old content or the new.
pub fn replace(vfs: &dyn Vfs, path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let temp = with_suffix(path, TEMP_SUFFIX);
    remove_if_present(vfs, &temp)?;
    let io = |action| {
        let temp = &temp;
        move |e| StorageError::io(action, temp, e)
    };
    let file = vfs.create(&temp).map_err(io("create"))?;
    file.write_all_at(bytes, 0).map_err(io("write"))?;
    file.sync_all().map_err(io("fsync"))?;
    publish(vfs, &temp, path)
}

/// Puts the finished, fsynced file `temp` in the place of `path`, durably.
pub(crate) fn publish(vfs: &dyn Vfs, temp: &Path, path: &Path) -> Result<(), StorageError> {
    vfs.rename(temp, path)
        .map_err(|e| StorageError::io("rename", path, e))?;
    sync_dir(vfs, &parent(path))
}

pub(crate) fn sync_dir(vfs: &dyn Vfs, dir: &Path) -> Result<(), StorageError> {
    if mutation::on(Mutation::NoDirectoryFsync) {
        return Ok(());
    }
    vfs.sync_dir(dir)
        .map_err(|e| StorageError::io("fsync directory", dir, e))
}

/// Removes a file; one that isn't there is fine. Not durable until the directory is synced.
pub(crate) fn remove_if_present(vfs: &dyn Vfs, path: &Path) -> Result<(), StorageError> {
    match vfs.remove(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StorageError::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// `path` with `suffix` added to its last component.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The directory that holds `path`; `.` for a bare relative name.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_path_buf(),
        None => path.to_path_buf(),
    }
}
