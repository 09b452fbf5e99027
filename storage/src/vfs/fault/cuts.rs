//! Every state that a power cut may leave behind, instead of one drawn by lot.
//!
//! Each unsynced change of a file may be on the medium wholly, in part or not at all, and each unsynced
//! change of a name may have happened or not, independently of each other. Few of them are combined in
//! every way; of many, a sample is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use super::unsynced::{Change, FileData, Renaming, SECTOR, SplitMix, write};
use super::{Disk, FaultVfs};

/// How far [`FaultVfs::power_cuts`] goes.
#[derive(Debug, Clone, Copy)]
pub struct CutLimits {
    /// Up to so many unsynced changes are combined in every way.
    pub combined: usize,
    /// Combinations drawn by lot when there are more; up to 8 of the others for each torn write.
    pub samples: usize,
    /// Places at which one write may be torn.
    pub tears: usize,
    /// What the lots depend on.
    pub seed: u64,
}

/// What became of one unsynced change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Kept,
    /// The bytes of a write before this one are there.
    Until(usize),
    /// Those from this one on are there.
    From(usize),
    /// Every second sector is there.
    Alternating,
    /// The file has grown and its new bytes are zero.
    LengthOnly,
}

impl FaultVfs {
    /// What a machine may find that loses its power now: first nothing unsynced, then all of it, then
    /// mixtures. Different from each other. This file system goes on as it was.
    pub fn power_cuts(&self, limits: CutLimits) -> Vec<Self> {
        let disk = self.disk.lock();
        let tears = disk.tears(limits.tears);
        let mut seen = BTreeSet::new();
        let mut states = Vec::new();
        for fates in combinations(&tears, limits) {
            let state = disk.cut(&fates);
            if seen.insert(state.fingerprint()) {
                states.push(state);
            }
        }
        states
    }

    /// The state in which nothing unsynced has survived.
    pub fn all_unsynced_lost(&self) -> Self {
        let disk = self.disk.lock();
        let count = disk.unsynced();
        disk.cut(&vec![Fate::Lost; count])
    }

    /// The same for two file systems with the same names and bytes.
    pub fn fingerprint(&self) -> u64 {
        let disk = self.disk.lock();
        let mut hasher = DefaultHasher::new();
        for (name, file) in &disk.names {
            name.hash(&mut hasher);
            disk.files[*file].live.hash(&mut hasher);
        }
        hasher.finish()
    }
}

impl FaultVfs {
    /// Takes away unsynced directories with all that is in them; the others are durable.
    pub(super) fn lose_some_dirs(&self, keep: &mut dyn FnMut() -> bool) {
        let mut disk = self.disk.lock();
        let disk = &mut *disk;
        for lost in std::mem::take(&mut disk.unsynced_dirs) {
            if keep() {
                continue;
            }
            disk.dirs.retain(|dir| !dir.starts_with(&lost));
            for names in [&mut disk.names, &mut disk.durable_names] {
                names.retain(|name, _| !name.starts_with(&lost));
            }
        }
    }
}

impl Disk {
    fn unsynced(&self) -> usize {
        let files = self.files.iter().map(|file| file.pending.len());
        files.sum::<usize>() + self.renamings.len() + self.unsynced_dirs.len()
    }

    /// For each unsynced change, in order, what may have become of it between all and nothing.
    fn tears(&self, most: usize) -> Vec<Vec<Fate>> {
        let files = self.files.iter().flat_map(|file| {
            let mut len = file.durable.len();
            file.pending.iter().map(move |change| {
                let tears = change.tears(len, most);
                len = len.max(change.end());
                tears
            })
        });
        let names = self.renamings.len() + self.unsynced_dirs.len();
        files.chain(vec![Vec::new(); names]).collect()
    }

    fn cut(&self, fates: &[Fate]) -> FaultVfs {
        let mut fates = fates.iter();
        let files = self.files.iter();
        let files: Vec<FileData> = files.map(|file| file.cut(&mut fates)).collect();
        let mut names = self.durable_names.clone();
        self.rename_some(&mut names, &mut || fates.next() == Some(&Fate::Kept));
        let state = FaultVfs::booted(files, names, self);
        state.lose_some_dirs(&mut || fates.next() == Some(&Fate::Kept));
        state
    }

    /// Changes of different names may survive in any order, those of one name only in theirs.
    pub(super) fn rename_some(
        &self,
        names: &mut BTreeMap<std::path::PathBuf, usize>,
        keep: &mut dyn FnMut() -> bool,
    ) {
        let mut lost: BTreeSet<&Path> = BTreeSet::new();
        for renaming in &self.renamings {
            let touched = Renaming::names(renaming);
            if keep() && touched.iter().all(|name| !lost.contains(name)) {
                renaming.apply(names);
            } else {
                lost.extend(touched);
            }
        }
    }
}

impl FileData {
    fn cut<'a>(&self, fates: &mut impl Iterator<Item = &'a Fate>) -> Self {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            let fate = fates.next().copied().unwrap_or(Fate::Lost);
            change.apply_as(fate, &mut bytes);
        }
        Self {
            live: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
        }
    }
}

impl Change {
    /// The fates of a write to a file of `len` bytes besides being kept or lost: sector borders, then
    /// places within sectors.
    fn tears(&self, len: usize, most: usize) -> Vec<Fate> {
        let Change::Write { at, bytes } = self else {
            return Vec::new();
        };
        let size = bytes.len();
        let first = SECTOR - at % SECTOR;
        let mut fates = Vec::new();
        if at + size > len {
            fates.push(Fate::LengthOnly);
        }
        if first < size {
            fates.extend([Fate::Until(first), Fate::From(first), Fate::Alternating]);
        }
        // The middle first: of a mark and a frame, the frame is torn.
        fates.extend([size / 2 + 3, 1, size.saturating_sub(1), 49, 97].map(Fate::Until));
        fates.extend((first..size).step_by(SECTOR).skip(1).map(Fate::Until));
        fates.retain(|fate| !matches!(fate, Fate::Until(until) if *until >= size));
        fates.truncate(most);
        fates
    }

    fn apply_as(&self, fate: Fate, to: &mut Vec<u8>) {
        let mut odd = false;
        match (fate, self) {
            (Fate::Lost, _) => {}
            (Fate::Kept, _) | (_, Change::SetLen(_)) => self.apply(to),
            (Fate::Until(until), Change::Write { at, bytes }) => write(to, *at, &bytes[..until]),
            (Fate::From(from), Change::Write { at, bytes }) => {
                write(to, at + from, &bytes[from..]);
            }
            (Fate::Alternating, Change::Write { .. }) => self.apply_some(to, &mut || {
                odd = !odd;
                odd
            }),
            (Fate::LengthOnly, Change::Write { .. }) => {
                let len = to.len().max(self.end());
                to.resize(len, 0);
            }
        }
    }
}

fn combinations(tears: &[Vec<Fate>], limits: CutLimits) -> Vec<Vec<Fate>> {
    let count = tears.len();
    let mut rng = SplitMix(limits.seed);
    let mut all = vec![vec![Fate::Lost; count], vec![Fate::Kept; count]];
    all.extend(subsets(count, limits, &mut rng));
    for (place, fates) in tears.iter().enumerate() {
        for fate in fates {
            // With everything before it there and nothing behind, as after writes in order.
            let mut in_order = vec![Fate::Lost; count];
            in_order[..place].fill(Fate::Kept);
            in_order[place] = *fate;
            all.push(in_order);
            let others = CutLimits {
                combined: limits.combined.min(3),
                samples: limits.samples.min(8),
                ..limits
            };
            for mut fates in subsets(count, others, &mut rng) {
                fates[place] = *fate;
                all.push(fates);
            }
        }
    }
    all
}

/// Every choice of kept changes, or some.
fn subsets(count: usize, limits: CutLimits, rng: &mut SplitMix) -> Vec<Vec<Fate>> {
    let chosen = |mask: u64, place: usize| match mask >> (place % 64) & 1 {
        0 => Fate::Lost,
        _ => Fate::Kept,
    };
    let masks: Vec<u64> = if count <= limits.combined {
        (0..1 << count).collect()
    } else {
        (0..limits.samples).map(|_| rng.next()).collect()
    };
    let each = masks.into_iter();
    each.map(|mask| (0..count).map(|place| chosen(mask, place)).collect())
        .collect()
}
