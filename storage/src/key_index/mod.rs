//! The index of one queue's keys: key → offsets. What RocketMQ calls the IndexFile.
//!
//! ```text
//! offsets:  [ block 0: 65536 ][ block 1 ][ block 2 ][ the open end ]
//! files:      0.keys            1.keys     missing    never
//! ```
//!
//! A block of 65,536 offsets that is full never changes, so its file is written once, off the write
//! path, and never touched again: about 12 bytes a keyed message, sorted by the key's hash. The hash
//! is the owner's; two keys may share one, so what is found is to be compared with the message.
//!
//! The index is derived and says nothing that the messages don't. What is missing is looked for in
//! them until it is built; a file that is damaged is removed when that is noticed, and so missing.
//!
//! Memory: a few bytes a block. No file is kept open.

mod format;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;

use crate::files::{self, TEMP_SUFFIX};
use crate::vfs::{Vfs, VfsFile};
use crate::{LogId, StorageError};
use format::{Head, PAGE_BYTES};

/// Offsets of one block.
pub const BLOCK_OFFSETS: u64 = 65_536;
const EXTENSION: &str = "keys";

/// One message's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyEntry {
    pub hash: u64,
    pub offset: u64,
}

/// See the module. Blocks are built by one caller at a time, and read by many.
#[derive(Debug)]
pub struct KeyIndex {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The blocks that have a file, with its size.
    blocks: BTreeMap<u64, u64>,
    /// None below this one is to be built, so that asking again costs nothing.
    all_done_below: u64,
}

/// The block that holds an offset.
pub fn block_of(offset: u64) -> u64 {
    offset / BLOCK_OFFSETS
}

impl KeyIndex {
    /// Looks at the files in `dir`, which need not exist. A block counts only if `still_true` says
    /// so of the last entry that was applied when it was built: a log that lost a tail may have
    /// given the offsets to other messages.
    pub fn open(
        vfs: Arc<dyn Vfs>,
        dir: PathBuf,
        still_true: impl Fn(LogId) -> bool,
    ) -> Result<Self, StorageError> {
        let index = Self {
            vfs,
            dir,
            state: RwLock::default(),
        };
        for path in files_in(&*index.vfs, &index.dir)? {
            let Some(block) = block_of_file(&path) else {
                let is_temp = path.to_string_lossy().ends_with(TEMP_SUFFIX);
                if is_temp {
                    files::remove_if_present(&*index.vfs, &path)?;
                }
                continue;
            };
            match index.read_head(block) {
                Ok((_, head)) if still_true(head.built_at) => {
                    let pages = 1 + head.fences.len();
                    let mut state = index.state.write();
                    state.blocks.insert(block, (pages * PAGE_BYTES) as u64);
                }
                Ok(_) => files::remove_if_present(&*index.vfs, &path)?,
                Err(error) => index.distrust(block, &error),
            }
        }
        Ok(index)
    }

    /// The lowest block that is full, not trimmed altogether, and has no file.
    pub fn next_to_build(&self, earliest_offset: u64, end_offset: u64) -> Option<u64> {
        let full = block_of(end_offset);
        let mut next = block_of(earliest_offset).max(self.state.read().all_done_below);
        if next >= full {
            return None;
        }
        let mut state = self.state.write();
        while next < full && state.blocks.contains_key(&next) {
            next += 1;
        }
        state.all_done_below = next;
        (next < full).then_some(next)
    }

    pub fn has(&self, block: u64) -> bool {
        self.state.read().blocks.contains_key(&block)
    }

    /// Writes a full block's file, durably. `built_at` is the last entry that had been applied when
    /// the messages were read.
    pub fn build(
        &self,
        block: u64,
        built_at: LogId,
        mut entries: Vec<KeyEntry>,
    ) -> Result<(), StorageError> {
        let fits = |entry: &KeyEntry| block_of(entry.offset) == block;
        entries.sort_unstable();
        entries.dedup();
        if !entries.iter().all(fits) || entries.len() as u64 > BLOCK_OFFSETS {
            let text = format!("block {block} of keys was given other offsets than its own");
            return Err(StorageError::InvalidArgument(text));
        }
        let bytes = format::encode(block, built_at, &entries);
        files::create_dirs(&*self.vfs, &self.dir)?;
        files::replace(&*self.vfs, &self.path(block), &bytes)?;
        self.state.write().blocks.insert(block, bytes.len() as u64);
        Ok(())
    }

    /// The offsets of a block whose keys have this hash, ascending; none if the block has no file
    /// that can be believed.
    pub fn find(&self, block: u64, hash: u64) -> Option<Vec<u64>> {
        if !self.has(block) {
            return None;
        }
        match self.search(block, hash) {
            Ok(offsets) => Some(offsets),
            Err(error) => {
                self.distrust(block, &error);
                None
            }
        }
    }

    /// Removes the blocks that lie below an offset altogether.
    pub fn trim(&self, earliest_offset: u64) -> Result<(), StorageError> {
        let kept_from = block_of(earliest_offset);
        let gone: Vec<u64> = {
            let state = self.state.read();
            let below = state.blocks.range(..kept_from);
            below.map(|(block, _)| *block).collect()
        };
        for block in gone {
            files::remove_if_present(&*self.vfs, &self.path(block))?;
            self.state.write().blocks.remove(&block);
        }
        Ok(())
    }

    /// Bytes on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.state.read().blocks.values().sum()
    }

    /// Removes all files of an index that nobody uses any more.
    pub fn remove(vfs: &dyn Vfs, dir: &Path) -> Result<(), StorageError> {
        for path in files_in(vfs, dir)? {
            files::remove_if_present(vfs, &path)?;
        }
        Ok(())
    }

    fn path(&self, block: u64) -> PathBuf {
        self.dir.join(format!("{block:020}.{EXTENSION}"))
    }

    /// After a failed read. A file that is there and can't be read now may be read later; one that
    /// is bad is built again.
    fn distrust(&self, block: u64, error: &StorageError) {
        let is_there = match error {
            StorageError::Damaged { .. } => false,
            StorageError::Io { source, .. } => source.kind() != io::ErrorKind::NotFound,
            _ => true,
        };
        if is_there {
            tracing::warn!(%error, "a block of keys cannot be read; its messages are searched instead");
            return;
        }
        tracing::warn!(%error, "a block of keys is given up, to be built again from the messages");
        {
            let mut state = self.state.write();
            state.blocks.remove(&block);
            state.all_done_below = state.all_done_below.min(block);
        }
        if let Err(error) = files::remove_if_present(&*self.vfs, &self.path(block)) {
            tracing::warn!(%error, "a bad block of keys is still on disk");
        }
    }

    fn read_head(&self, block: u64) -> Result<(Arc<dyn VfsFile>, Head), StorageError> {
        let path = self.path(block);
        let file = self.vfs.open(&path);
        let file = file.map_err(|e| StorageError::io("open", &path, e))?;
        let page = read_page(&*file, &path, 0)?;
        let head = format::decode_head(&page, block).map_err(|reason| damaged(&path, 0, reason))?;
        Ok((file, head))
    }

    fn search(&self, block: u64, hash: u64) -> Result<Vec<u64>, StorageError> {
        let (file, head) = self.read_head(block)?;
        let path = self.path(block);
        // An equal fence may have equal hashes before it, at the end of the page before.
        let first = head.fences.partition_point(|fence| *fence < hash).max(1);
        let mut found = Vec::new();
        for number in first..=head.fences.len() {
            let page = read_page(&*file, &path, number)?;
            let entries = format::decode_page(&page, &head, number)
                .map_err(|reason| damaged(&path, number, reason))?;
            let same = entries.iter().filter(|entry| entry.hash == hash);
            found.extend(same.map(|entry| entry.offset));
            let next_is_higher = head.fences.get(number).is_some_and(|fence| *fence > hash);
            if next_is_higher {
                break;
            }
        }
        Ok(found)
    }
}

fn read_page(file: &dyn VfsFile, path: &Path, number: usize) -> Result<Vec<u8>, StorageError> {
    let mut page = vec![0; PAGE_BYTES];
    let read = file.read_at(&mut page, (number * PAGE_BYTES) as u64);
    let read = read.map_err(|e| StorageError::io("read", path, e))?;
    page.truncate(read);
    Ok(page)
}

fn damaged(path: &Path, page: usize, reason: &str) -> StorageError {
    StorageError::Damaged {
        path: path.to_path_buf(),
        position: (page * PAGE_BYTES) as u64,
        reason: reason.to_owned(),
    }
}

fn files_in(vfs: &dyn Vfs, dir: &Path) -> Result<Vec<PathBuf>, StorageError> {
    match vfs.list(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed.map_err(|e| StorageError::io("list", dir, e)),
    }
}

fn block_of_file(path: &Path) -> Option<u64> {
    if path.extension()? != EXTENSION {
        return None;
    }
    path.file_stem()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests;
