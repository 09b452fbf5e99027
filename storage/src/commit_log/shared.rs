//! What the writer, the readers and the background share.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::background::Background;
use super::format::{ALIGNMENT, FRAME_HEADER, SEGMENT_HEADER};
use super::group::{CacheSize, Group};
use super::index::Written;
use super::queue::Queue;
use super::segment::Segment;
use super::stats::{CommitLogStats, Stats};
use super::types::CommitLogConfig;
use crate::vfs::Vfs;
use crate::{RaftGroupId, StorageError};

/// How long an answer about free space is believed.
const ROOM_CHECK_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Shared {
    pub vfs: Arc<dyn Vfs>,
    pub dir: PathBuf,
    pub config: CommitLogConfig,
    /// The largest body that fits into a segment.
    pub max_body: usize,
    pub queue: Queue,
    pub groups: RwLock<HashMap<RaftGroupId, Arc<Group>>>,
    pub cache: CacheSize,
    pub stats: Stats,
    pub poison: Poison,
    pub damage: Damage,
    pub background: Background,
    /// Sealed segments by base.
    pub sealed: Mutex<BTreeMap<u64, Arc<Segment>>>,
    /// Bytes of all segment files.
    pub disk_bytes: AtomicUsize,
    /// Held while cleaning.
    pub cleaning: Mutex<()>,
    /// Held while a damaged sidecar is rebuilt.
    pub rebuilding: Mutex<()>,
    room: Room,
}

impl Shared {
    pub fn new(
        vfs: Arc<dyn Vfs>,
        dir: PathBuf,
        config: CommitLogConfig,
        groups: HashMap<RaftGroupId, Written>,
        sealed: BTreeMap<u64, Arc<Segment>>,
    ) -> Self {
        let groups = groups
            .into_iter()
            .map(|(id, written)| (id, Arc::new(Group::new(id, written))))
            .collect();
        Self {
            vfs,
            dir,
            max_body: max_body(&config),
            config,
            queue: Queue::default(),
            groups: RwLock::new(groups),
            cache: CacheSize::default(),
            stats: Stats::default(),
            poison: Poison::default(),
            damage: Damage::default(),
            background: Background::default(),
            sealed: Mutex::new(sealed),
            disk_bytes: AtomicUsize::new(0),
            cleaning: Mutex::new(()),
            rebuilding: Mutex::new(()),
            room: Room::default(),
        }
    }

    pub fn group(&self, id: RaftGroupId) -> Arc<Group> {
        if let Some(group) = self.groups.read().get(&id) {
            return group.clone();
        }
        let mut groups = self.groups.write();
        let new = || Arc::new(Group::new(id, Written::default()));
        groups.entry(id).or_insert_with(new).clone()
    }

    /// A poisoned log serves nothing: what it holds may not be what is on disk.
    pub fn check_readable(&self) -> Result<(), StorageError> {
        self.poison.error().map_or(Ok(()), Err)
    }

    pub fn stats(&self) -> CommitLogStats {
        CommitLogStats {
            queued_bytes: self.queue.bytes() as u64,
            cached_bytes: self.cache.bytes() as u64,
            evicted_bytes: self.cache.evicted_bytes(),
            segments: self.sealed.lock().len() as u64 + 1,
            disk_bytes: self.disk_bytes.load(Ordering::Relaxed) as u64,
            poisoned: self.poison.reason(),
            ..self.stats.read()
        }
    }

    pub fn disk_has_room(&self) -> bool {
        let reserve = self.config.reserve_bytes;
        self.room.check(|| match self.vfs.free_space(&self.dir) {
            Ok(free) => Some(free > reserve),
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), %error, "cannot measure free space");
                None
            }
        })
    }
}

/// A segment also holds its header, a begin mark, the frame's own header and the seal.
fn max_body(config: &CommitLogConfig) -> usize {
    config.segment_bytes as usize - SEGMENT_HEADER as usize - 3 * FRAME_HEADER - ALIGNMENT
}

type Hook = Box<dyn Fn(&StorageError) + Send + Sync>;

/// The end of all promises: set once, by the first failed write or fsync.
#[derive(Default)]
pub(super) struct Poison {
    reason: OnceLock<Arc<str>>,
    hooks: Mutex<Vec<Hook>>,
}

impl fmt::Debug for Poison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Poison").field(&self.reason.get()).finish()
    }
}

impl Poison {
    /// The error every caller gets from now on.
    pub fn set(&self, cause: &StorageError) -> StorageError {
        let reason = self.reason.get_or_init(|| cause.to_string().into());
        StorageError::Poisoned {
            reason: reason.clone(),
        }
    }

    pub fn error(&self) -> Option<StorageError> {
        self.reason.get().map(|reason| StorageError::Poisoned {
            reason: reason.clone(),
        })
    }

    pub fn reason(&self) -> Option<String> {
        self.reason.get().map(|reason| reason.to_string())
    }

    /// Calls every hook; a later call finds none left.
    pub fn tell(&self, error: &StorageError) {
        let hooks = std::mem::take(&mut *self.hooks.lock());
        for hook in hooks {
            hook(error);
        }
    }

    /// Adds a hook, or calls it now if it came too late.
    pub fn hook(&self, hook: Hook) {
        let mut hooks = self.hooks.lock();
        match self.error() {
            None => hooks.push(hook),
            Some(error) => {
                drop(hooks);
                hook(&error);
            }
        }
    }
}

/// Called with the group whose read found damage.
pub type DamageHook = Box<dyn Fn(RaftGroupId, &StorageError) + Send + Sync>;

/// Who is told when a reader finds damage.
#[derive(Default)]
pub(super) struct Damage(OnceLock<DamageHook>);

impl fmt::Debug for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Damage")
    }
}

impl Damage {
    pub fn hook(&self, hook: DamageHook) {
        self.0.set(hook).ok();
    }

    /// Hands the result on, and tells of damage in it.
    pub fn watch<T>(
        &self,
        group: RaftGroupId,
        result: Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        if let (Err(error @ StorageError::Damaged { .. }), Some(hook)) = (&result, self.0.get()) {
            hook(group, error);
        }
        result
    }
}

/// The last answer about free space.
#[derive(Debug)]
struct Room {
    checked: Mutex<Option<Instant>>,
    enough: AtomicBool,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            checked: Mutex::new(None),
            enough: AtomicBool::new(true),
        }
    }
}

impl Room {
    fn check(&self, measure: impl FnOnce() -> Option<bool>) -> bool {
        // Whoever finds the lock taken uses the last answer.
        if let Some(mut checked) = self.checked.try_lock()
            && checked.is_none_or(|at| at.elapsed() >= ROOM_CHECK_EVERY)
        {
            *checked = Some(Instant::now());
            if let Some(enough) = measure() {
                self.enough.store(enough, Ordering::Relaxed);
            }
        }
        self.enough.load(Ordering::Relaxed)
    }
}
