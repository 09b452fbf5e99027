//! What this node has given up after damage, written down before anything is done about it.
//!
//! A replica that may have lost a vote or an entry must never act again under its id. Two things
//! are kept in `quarantine.json`:
//!
//! - Single replicas, whose part of the log or whose snapshots are damaged.
//! - That the whole log was given up: where its end or a file of it is damaged, any group may have
//!   had something there. Then every file of the data directory but the identity is set aside in
//!   `damaged/<id>/`, untouched, and the node goes on with an empty log. It opens no replica before
//!   the catalog says that this giving up, by its id, is known to it: all replicas that the catalog
//!   names from then on are new ones.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use quorate_raft::{NodeId, ReplicaId};
use quorate_storage::vfs::Vfs;
use quorate_storage::{RaftGroupId, files};
use serde::{Deserialize, Serialize};

use crate::catalog::{CATALOG_GROUP, CatalogState, GivenUp, ReplicaPlace, ReplicaState};

const FILE: &str = "quarantine.json";
const VERSION: u32 = 1;
const ASIDE: &str = "damaged";
/// What is set aside with a damaged log: nothing else of it can be trusted to fit another one.
const SET_ASIDE: [&str; 4] = ["log", "snapshots", "queues", "derived"];

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    /// The whole log, if it was given up and not made good yet.
    whole: Option<Whole>,
    /// This node's replica of the catalog, when it is not the first one.
    catalog_replica: Option<ReplicaId>,
    replicas: Vec<LostReplica>,
    /// By group, the lowest replica id that may ever act here again. For ever: a restarted node
    /// reads an old state of the catalog first, which names the lost ones as if they were sound.
    floors: BTreeMap<u64, ReplicaId>,
    /// The last time that the whole log was given up, for the same reason.
    last_whole: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Whole {
    id: String,
    reason: String,
    /// The files were moved.
    set_aside: bool,
    /// The catalog has taken note.
    agreed: bool,
}

/// One replica that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LostReplica {
    pub group: u64,
    pub replica: ReplicaId,
    pub reason: String,
    /// Nothing of it is on this disk any more, so its successor may be opened. The entry stays
    /// until that is sound: an old state of the catalog must not bring this one back.
    pub removed: bool,
}

/// The file, and what it says.
#[derive(Debug)]
pub(super) struct Quarantine {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    node: NodeId,
    contents: Mutex<Contents>,
    /// Groups whose open replica was found damaged, written down or not yet.
    noted: Mutex<HashSet<RaftGroupId>>,
}

impl Quarantine {
    /// Reads the file, and finishes what a crash interrupted.
    pub(super) fn open(vfs: Arc<dyn Vfs>, dir: &Path, node: NodeId) -> Result<Self> {
        let path = dir.join(FILE);
        let contents = match files::read(&*vfs, &path)? {
            None => Contents {
                version: VERSION,
                whole: None,
                catalog_replica: None,
                replicas: Vec::new(),
                floors: BTreeMap::new(),
                last_whole: None,
            },
            Some(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!(
                    "{} is damaged: without it this node cannot know which of its replicas it gave up; \
                     let it come back with an empty data directory under a new node id",
                    path.display()
                )
            })?,
        };
        if contents.version != VERSION {
            let (path, found) = (path.display(), contents.version);
            bail!(
                "{path} was written by another version (layout {found}, this one knows {VERSION})"
            );
        }
        let this = Self {
            vfs,
            dir: dir.to_path_buf(),
            node,
            contents: Mutex::new(contents),
            noted: Mutex::default(),
        };
        this.set_aside()?;
        Ok(this)
    }

    /// Gives the whole log up, and sets it aside with all that stands on it.
    pub(super) fn give_up_log(&self, reason: String) -> Result<()> {
        let id = uuid::Uuid::new_v4().to_string();
        self.change(|contents| {
            contents.last_whole = Some(id.clone());
            contents.whole = Some(Whole {
                id,
                reason,
                set_aside: false,
                agreed: false,
            });
            contents.replicas.clear();
        })?;
        self.set_aside()
    }

    fn set_aside(&self) -> Result<()> {
        let whole = self.contents.lock().whole.clone();
        let Some(whole) = whole.filter(|whole| !whole.set_aside) else {
            return Ok(());
        };
        let aside = self.dir.join(ASIDE).join(&whole.id);
        let context = || format!("cannot set the damaged files aside in {}", aside.display());
        self.vfs.create_dir_all(&aside).with_context(context)?;
        for name in SET_ASIDE {
            let (from, to) = (self.dir.join(name), aside.join(name));
            if self.vfs.exists(&from)? && !self.vfs.exists(&to)? {
                self.vfs.rename(&from, &to).with_context(context)?;
            }
        }
        for dir in [&aside, &self.dir.join(ASIDE), &self.dir] {
            self.vfs.sync_dir(dir).with_context(context)?;
        }
        self.change(|contents| {
            if let Some(whole) = &mut contents.whole {
                whole.set_aside = true;
            }
        })?;
        tracing::error!(
            reason = whole.reason,
            aside = %aside.display(),
            "this node's log is damaged; its files were set aside, and its replicas are to be filled again by the others"
        );
        Ok(())
    }

    /// The whole log was given up and is not made good yet.
    pub(super) fn gave_up_log(&self) -> bool {
        self.contents.lock().whole.is_some()
    }

    /// The log may be empty: no replica was opened since it was given up.
    pub(super) fn log_is_new(&self) -> bool {
        let contents = self.contents.lock();
        contents.whole.as_ref().is_some_and(|whole| !whole.agreed)
    }

    /// Notes that a read of the group's open replica found damage. False if one did before.
    pub(super) fn note(&self, group: RaftGroupId) -> bool {
        self.noted.lock().insert(group)
    }

    pub(super) fn is_noted(&self, group: RaftGroupId) -> bool {
        self.noted.lock().contains(&group)
    }

    /// Another replica of the group is about to be opened.
    pub(super) fn begin_anew(&self, group: RaftGroupId) {
        self.noted.lock().remove(&group);
    }

    /// Gives one replica up. False if it was already, or is of an older life.
    pub(super) fn give_up(
        &self,
        group: RaftGroupId,
        replica: ReplicaId,
        reason: &str,
    ) -> Result<bool> {
        if self.is_lost(group, replica) {
            return Ok(false);
        }
        self.change(|contents| {
            contents.floors.insert(group.0, replica + 1);
            contents.replicas.push(LostReplica {
                group: group.0,
                replica,
                reason: reason.to_owned(),
                removed: false,
            });
        })?;
        tracing::error!(%group, replica, reason, "a replica is damaged and takes part in nothing any more; it is to be filled again by the others");
        Ok(true)
    }

    pub(super) fn is_lost(&self, group: RaftGroupId, replica: ReplicaId) -> bool {
        let contents = self.contents.lock();
        let floor = contents.floors.get(&group.0);
        floor.is_some_and(|floor| replica < *floor)
    }

    /// Lost replicas with a successor on this node, whose own files are still there.
    pub(super) fn to_remove(&self, state: &CatalogState) -> Vec<LostReplica> {
        let contents = self.contents.lock();
        let lost = contents.replicas.iter().filter(|lost| !lost.removed);
        let succeeded = lost.filter(|lost| self.successor(state, lost).is_some());
        succeeded.cloned().collect()
    }

    /// Nothing of a lost replica is on this disk any more.
    pub(super) fn removed(&self, lost: &LostReplica) -> Result<()> {
        self.change(|contents| {
            let same = |l: &&mut LostReplica| (l.group, l.replica) == (lost.group, lost.replica);
            if let Some(lost) = contents.replicas.iter_mut().find(same) {
                lost.removed = true;
            }
        })
    }

    /// Forgets the lost replicas whose successors are sound. True if there were any.
    pub(super) fn forget_succeeded(&self, state: &CatalogState) -> Result<bool> {
        let over = |lost: &LostReplica| {
            let successor = self.successor(state, lost);
            lost.removed && successor.is_some_and(|place| place.state == ReplicaState::Sound)
        };
        if !self.contents.lock().replicas.iter().any(over) {
            return Ok(false);
        }
        self.change(|contents| contents.replicas.retain(|lost| !over(lost)))?;
        Ok(true)
    }

    /// Forgets what was lost of a group that was deleted.
    pub(super) fn forget_group(&self, group: RaftGroupId) -> Result<()> {
        self.change(|contents| contents.replicas.retain(|lost| lost.group != group.0))
    }

    /// What took a lost replica's place. Ids only grow: a lower one is from an old state.
    fn successor(&self, state: &CatalogState, lost: &LostReplica) -> Option<ReplicaPlace> {
        let placement = state.placement(RaftGroupId(lost.group))?;
        placement
            .replica_on(self.node)
            .filter(|place| place.replica > lost.replica)
    }

    /// Whether a catalog's state is from after this node gave its log up: no replica that it names
    /// is one of those that were given up.
    pub(super) fn is_known_to(&self, state: &CatalogState) -> bool {
        let contents = self.contents.lock();
        let known = state
            .nodes
            .get(&self.node)
            .and_then(|n| n.quarantine.as_ref());
        contents.last_whole.is_none() || known == contents.last_whole.as_ref()
    }

    /// This node's replica of the catalog.
    pub(super) fn catalog_replica(&self) -> ReplicaId {
        self.contents.lock().catalog_replica.unwrap_or(self.node)
    }

    /// Why the catalog cannot be opened here before others have placed a new replica of it.
    pub(super) fn lost_catalog(&self) -> Option<String> {
        let contents = self.contents.lock();
        if let Some(whole) = contents.whole.as_ref().filter(|whole| !whole.agreed) {
            return Some(whole.reason.clone());
        }
        let own = contents.catalog_replica.unwrap_or(self.node);
        let mut lost = contents.replicas.iter();
        let lost = lost.find(|l| (l.group, l.replica) == (CATALOG_GROUP.0, own));
        lost.map(|lost| lost.reason.clone())
    }

    /// What is to be told to the catalog before it can be opened here.
    pub(super) fn to_regain_catalog(&self) -> GivenUp {
        let contents = self.contents.lock();
        match contents.whole.as_ref().filter(|whole| !whole.agreed) {
            Some(whole) => GivenUp::All {
                id: whole.id.clone(),
            },
            None => {
                let own = contents.catalog_replica.unwrap_or(self.node);
                GivenUp::Some(vec![(CATALOG_GROUP.0, own)])
            }
        }
    }

    /// The cluster has placed this replica of the catalog here instead.
    pub(super) fn regained_catalog(&self, replica: ReplicaId) -> Result<()> {
        self.change(|contents| {
            contents.catalog_replica = Some(replica);
            contents
                .replicas
                .retain(|lost| lost.group != CATALOG_GROUP.0);
            if let Some(whole) = &mut contents.whole {
                whole.agreed = true;
            }
        })
    }

    /// Lost replicas that this state of the catalog still counts on.
    pub(super) fn untold(&self, state: &CatalogState) -> Vec<(u64, ReplicaId)> {
        let contents = self.contents.lock();
        let counts_on = |lost: &&LostReplica| {
            let placement = state.placement(RaftGroupId(lost.group));
            let place = placement.and_then(|p| p.replica_on(self.node));
            place.is_some_and(|place| {
                place.replica == lost.replica && place.state != ReplicaState::Lost
            })
        };
        let untold = contents.replicas.iter().filter(counts_on);
        untold.map(|lost| (lost.group, lost.replica)).collect()
    }

    /// Every replica of this node is sound again: what was set aside is of no use to anyone.
    pub(super) fn made_good(&self) -> Result<()> {
        self.change(|contents| contents.whole = None)?;
        let aside = self.dir.join(ASIDE);
        if let Err(error) = std::fs::remove_dir_all(&aside) {
            tracing::warn!(aside = %aside.display(), %error, "damaged files that were made good are still there");
        }
        tracing::info!("all replicas of this node are sound again");
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Contents)) -> Result<()> {
        let mut contents = self.contents.lock();
        let mut changed = contents.clone();
        change(&mut changed);
        let mut bytes = serde_json::to_vec_pretty(&changed)?;
        bytes.push(b'\n');
        files::replace(&*self.vfs, &self.dir.join(FILE), &bytes)?;
        *contents = changed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use quorate_storage::vfs::fault::FaultVfs;

    use super::*;
    use crate::catalog::{GroupPlacement, NodeEntry, Topic};

    const NODE: NodeId = 2;
    const QUEUE: RaftGroupId = RaftGroupId(1024);

    fn open(vfs: &FaultVfs) -> Quarantine {
        Quarantine::open(Arc::new(vfs.clone()), Path::new("/data"), NODE).unwrap()
    }

    /// A catalog that has this replica of the queue on this node.
    fn state(replica: ReplicaId, state: ReplicaState, quarantine: Option<&str>) -> CatalogState {
        let mut catalog = CatalogState::default();
        let entry = NodeEntry {
            url: String::new(),
            peer_addr: String::new(),
            uuid: String::new(),
            version: String::new(),
            quarantine: quarantine.map(str::to_owned),
        };
        catalog.nodes.insert(NODE, entry);
        let placement = GroupPlacement {
            group: QUEUE.0,
            founders: vec![(1502, NODE)],
            replicas: vec![ReplicaPlace {
                replica,
                node: NODE,
                state,
            }],
            preferred: NODE,
            epoch: 0,
        };
        let topic = Topic {
            id: 1,
            name: "t".to_owned(),
            config: Default::default(),
            queues: vec![placement],
        };
        catalog.queue_groups.insert(QUEUE.0, (1, 0));
        catalog.topics.insert(1, Arc::new(topic));
        catalog
    }

    #[test]
    fn a_lost_replica_stays_lost_when_its_successor_is_sound_and_the_catalog_is_read_anew() {
        let vfs = FaultVfs::new();
        let quarantine = open(&vfs);
        assert!(quarantine.give_up(QUEUE, 1502, "rot").unwrap());
        let old = state(1502, ReplicaState::Sound, None);
        assert_eq!(quarantine.untold(&old), [(QUEUE.0, 1502)]);
        assert!(quarantine.to_remove(&old).is_empty(), "no successor yet");
        let filling = state(2000, ReplicaState::Filling, None);
        let lost = quarantine.to_remove(&filling).remove(0);
        quarantine.removed(&lost).unwrap();
        assert!(quarantine.to_remove(&filling).is_empty());
        assert!(!quarantine.forget_succeeded(&filling).unwrap());
        let sound = state(2000, ReplicaState::Sound, None);
        assert!(quarantine.forget_succeeded(&sound).unwrap());
        // The next process reads a catalog from before all this first.
        let quarantine = open(&vfs.kill());
        assert!(quarantine.is_lost(QUEUE, 1502));
        assert!(!quarantine.is_lost(QUEUE, 2000));
        assert!(!quarantine.give_up(QUEUE, 1502, "rot").unwrap());
        assert!(
            quarantine.to_remove(&sound).is_empty(),
            "the sound one stays"
        );
    }

    #[test]
    fn a_catalog_from_before_the_log_was_given_up_is_never_followed() {
        let vfs = FaultVfs::new();
        let quarantine = open(&vfs);
        let old = state(1502, ReplicaState::Sound, None);
        assert!(quarantine.is_known_to(&old));
        quarantine.give_up_log("rot".to_owned()).unwrap();
        assert!(!quarantine.is_known_to(&old));
        assert!(quarantine.log_is_new() && quarantine.lost_catalog().is_some());
        let GivenUp::All { id } = quarantine.to_regain_catalog() else {
            panic!("the whole log was given up");
        };
        quarantine.regained_catalog(2001).unwrap();
        assert!(
            !quarantine.log_is_new(),
            "from now on an empty log is a lost one"
        );
        assert!(quarantine.is_known_to(&state(2000, ReplicaState::Filling, Some(&id))));
        quarantine.made_good().unwrap();
        let quarantine = open(&vfs.kill());
        assert!(!quarantine.gave_up_log());
        assert_eq!(quarantine.catalog_replica(), 2001);
        assert!(!quarantine.is_known_to(&old), "read again after a restart");
    }
}
