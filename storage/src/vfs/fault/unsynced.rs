//! Changes of files and names that no fsync has made durable yet.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Writes are torn at multiples of this.
pub(super) const SECTOR: usize = 512;

#[derive(Debug, Default)]
pub(super) struct FileData {
    /// What reads see.
    pub(super) live: Vec<u8>,
    /// What is on the medium.
    pub(super) durable: Vec<u8>,
    /// The way from `durable` to `live`, as far as a sync can still bring it there.
    pub(super) pending: Vec<Change>,
}

#[derive(Debug, Clone)]
pub(super) enum Change {
    Write { at: usize, bytes: Vec<u8> },
    SetLen(usize),
}

#[derive(Debug, Clone)]
pub(super) enum Renaming {
    Add(PathBuf, usize),
    Remove(PathBuf),
    Move(PathBuf, PathBuf),
}

impl FileData {
    pub(super) fn as_it_is(&self) -> Self {
        Self {
            live: self.live.clone(),
            durable: self.durable.clone(),
            pending: self.pending.clone(),
        }
    }

    pub(super) fn change(&mut self, change: Change) {
        change.apply(&mut self.live);
        self.pending.push(change);
    }

    pub(super) fn sync(&mut self) {
        for change in self.pending.drain(..) {
            change.apply(&mut self.durable);
        }
    }

    pub(super) fn after_crash(&self, rng: &mut SplitMix) -> Self {
        let mut bytes = self.durable.clone();
        let all = &self.pending[..];
        match rng.below(4) {
            0 => {}
            1 => all.iter().for_each(|change| change.apply(&mut bytes)),
            2 => {
                // A prefix, the last write torn at any byte.
                let kept = rng.below(all.len() as u64 + 1) as usize;
                all[..kept].iter().for_each(|c| c.apply(&mut bytes));
                if let Some(Change::Write { at, bytes: torn }) = all.get(kept) {
                    let torn = &torn[..rng.below(torn.len() as u64 + 1) as usize];
                    write(&mut bytes, *at, torn);
                }
            }
            _ => {
                // Any sectors of any writes.
                let percent = 10 + rng.below(85);
                for change in all {
                    change.apply_some(&mut bytes, &mut || rng.below(100) < percent);
                }
            }
        }
        Self {
            live: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
        }
    }
}

impl Change {
    /// The length a file has at least after it.
    pub(super) fn end(&self) -> usize {
        match self {
            Self::Write { at, bytes } => at + bytes.len(),
            Self::SetLen(len) => *len,
        }
    }

    pub(super) fn apply(&self, to: &mut Vec<u8>) {
        self.apply_some(to, &mut || true);
    }

    pub(super) fn apply_some(&self, to: &mut Vec<u8>, keep: &mut dyn FnMut() -> bool) {
        match self {
            Change::SetLen(len) if keep() => to.resize(*len, 0),
            Change::SetLen(_) => {}
            Change::Write { at, bytes } => {
                let mut from = 0;
                while from < bytes.len() {
                    let place = at + from;
                    let size = (SECTOR - place % SECTOR).min(bytes.len() - from);
                    if keep() {
                        write(to, place, &bytes[from..from + size]);
                    }
                    from += size;
                }
            }
        }
    }
}

pub(super) fn write(to: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if to.len() < end {
        to.resize(end, 0);
    }
    to[at..end].copy_from_slice(bytes);
}

impl Renaming {
    pub(super) fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Add(path, file) => drop(names.insert(path.clone(), *file)),
            Self::Remove(path) => drop(names.remove(path)),
            Self::Move(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
        }
    }

    pub(super) fn names(&self) -> Vec<&Path> {
        match self {
            Self::Add(path, _) | Self::Remove(path) => vec![path],
            Self::Move(from, to) => vec![from, to],
        }
    }

    pub(super) fn is_in(&self, dir: &Path) -> bool {
        self.names().iter().any(|name| name.parent() == Some(dir))
    }
}

/// Sebastiano Vigna's SplitMix64: small, and the same everywhere.
#[derive(Debug)]
pub(super) struct SplitMix(pub(super) u64);

impl SplitMix {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
