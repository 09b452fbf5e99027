//! Who this node is: a small file in its data directory, written at its first start.
//!
//! `identity.json` ties a disk to a node id. A node that comes up with its id and an empty disk
//! gets another uuid, and its peers, which remember the old one, refuse it: it may have voted and
//! acknowledged what it no longer knows (see [`RefuseReason::known_id_other_disk`]).
//!
//! Invariant: whatever a method of [`Identity`] has returned is on disk. The file is replaced as a
//! whole: temporary file, fsync, rename, fsync of the directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{StorageError, files};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::NodeId;
use crate::link::{PeerRegistry, RefuseCode, RefuseReason};

const FILE: &str = "identity.json";
/// Of the file's layout.
const VERSION: u32 = 1;

/// What the file says. Fields of later versions would be lost by rewriting: they are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    node_id: NodeId,
    node_uuid: Uuid,
    cluster: String,
    cluster_id: Option<Uuid>,
    /// The uuids other nodes have shown.
    peers: BTreeMap<NodeId, Uuid>,
}

/// This node's identity and what it knows of the others'. Methods that change it block on fsync.
#[derive(Debug)]
pub struct Identity {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    contents: Mutex<Contents>,
}

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("can't {0}")]
    Storage(#[from] StorageError),
    #[error(
        "{} is damaged ({reason}): restore it from a backup, or remove the whole data directory \
         and let the node come back under a new id", path.display()
    )]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "{} was written by a newer version (layout {found}, this one knows {VERSION}): \
         run that version", path.display()
    )]
    Version { path: PathBuf, found: u64 },
    #[error(
        "the data directory {} belongs to node {found}, this node is configured as node \
         {configured}: set the node id back to {found}, or point to an empty data directory",
        dir.display()
    )]
    OtherNode {
        dir: PathBuf,
        found: NodeId,
        configured: NodeId,
    },
    #[error(
        "the data directory {} belongs to cluster {found:?}, this node is configured for cluster \
         {configured:?}: set the cluster name back to {found:?}, or point to an empty data \
         directory", dir.display()
    )]
    OtherCluster {
        dir: PathBuf,
        found: String,
        configured: String,
    },
    #[error(
        "this node belongs to cluster {known}, not to {shown} of the same name: check the peers' \
         addresses"
    )]
    OtherClusterId { known: Uuid, shown: Uuid },
    #[error(transparent)]
    OtherDisk(#[from] RefuseReason),
}

impl Identity {
    /// Reads the identity in `dir`, or makes one at the first start. Refuses the directory of
    /// another node or cluster.
    pub fn open(dir: &Path, node_id: NodeId, cluster: &str) -> Result<Identity, IdentityError> {
        Self::open_in(Arc::new(OsVfs), dir, node_id, cluster)
    }

    /// The same in another file system.
    pub fn open_in(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        node_id: NodeId,
        cluster: &str,
    ) -> Result<Identity, IdentityError> {
        vfs.create_dir_all(dir)
            .map_err(|source| StorageError::io("create", dir, source))?;
        let contents = match read(&*vfs, dir)? {
            Some(contents) => contents,
            None => {
                let contents = Contents {
                    version: VERSION,
                    node_id,
                    node_uuid: Uuid::new_v4(),
                    cluster: cluster.to_owned(),
                    cluster_id: None,
                    peers: BTreeMap::new(),
                };
                write(&*vfs, dir, &contents)?;
                tracing::info!(node_id, uuid = %contents.node_uuid, "new node identity");
                contents
            }
        };
        if contents.node_id != node_id {
            let (dir, found) = (dir.to_owned(), contents.node_id);
            return Err(IdentityError::OtherNode {
                dir,
                found,
                configured: node_id,
            });
        }
        if contents.cluster != cluster {
            let (dir, found, configured) = (dir.to_owned(), contents.cluster, cluster.to_owned());
            return Err(IdentityError::OtherCluster {
                dir,
                found,
                configured,
            });
        }
        Ok(Identity {
            vfs,
            dir: dir.to_owned(),
            contents: Mutex::new(contents),
        })
    }

    pub fn node_id(&self) -> NodeId {
        self.contents.lock().node_id
    }

    /// Of this node's disk.
    pub fn uuid(&self) -> Uuid {
        self.contents.lock().node_uuid
    }

    pub fn cluster(&self) -> String {
        self.contents.lock().cluster.clone()
    }

    /// The cluster's identity, once known.
    pub fn cluster_id(&self) -> Option<Uuid> {
        self.contents.lock().cluster_id
    }

    /// The uuids other nodes have shown.
    pub fn peers(&self) -> BTreeMap<NodeId, Uuid> {
        self.contents.lock().peers.clone()
    }

    /// Records the cluster's identity; another one than recorded is refused.
    pub fn set_cluster_id(&self, cluster_id: Uuid) -> Result<(), IdentityError> {
        self.change(|contents| match contents.cluster_id {
            Some(known) if known != cluster_id => Err(IdentityError::OtherClusterId {
                known,
                shown: cluster_id,
            }),
            _ => {
                contents.cluster_id = Some(cluster_id);
                Ok(())
            }
        })
    }

    /// Records a peer's uuid; another one than recorded is refused.
    pub fn remember_peer(&self, node: NodeId, uuid: Uuid) -> Result<(), IdentityError> {
        self.change(|contents| {
            judge(contents, node, uuid)?;
            contents.peers.insert(node, uuid);
            Ok(())
        })
    }

    /// Forgets a peer that was removed from the cluster for good.
    pub fn forget_peer(&self, node: NodeId) -> Result<(), IdentityError> {
        self.change(|contents| {
            contents.peers.remove(&node);
            Ok(())
        })
    }

    /// Makes a change durable before it is visible; one that changes nothing writes nothing.
    fn change(
        &self,
        change: impl FnOnce(&mut Contents) -> Result<(), IdentityError>,
    ) -> Result<(), IdentityError> {
        let mut contents = self.contents.lock();
        let mut changed = contents.clone();
        change(&mut changed)?;
        if changed != *contents {
            write(&*self.vfs, &self.dir, &changed)?;
            *contents = changed;
        }
        Ok(())
    }
}

impl PeerRegistry for Identity {
    fn check(&self, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason> {
        judge(&self.contents.lock(), node, uuid)
    }

    fn accepted(&self, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason> {
        self.remember_peer(node, uuid).map_err(|error| match error {
            IdentityError::OtherDisk(reason) => reason,
            error => {
                tracing::error!(node, %error, "can't remember a peer");
                let text = format!("node {} can't remember node {node} now", self.node_id());
                RefuseReason::new(RefuseCode::Internal, text)
            }
        })
    }
}

fn judge(contents: &Contents, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason> {
    match contents.peers.get(&node) {
        Some(known) if *known != uuid => Err(RefuseReason::known_id_other_disk(node, *known, uuid)),
        _ => Ok(()),
    }
}

fn read(vfs: &dyn Vfs, dir: &Path) -> Result<Option<Contents>, IdentityError> {
    let path = dir.join(FILE);
    let Some(bytes) = files::read(vfs, &path)? else {
        return Ok(None);
    };
    let damaged = |error: serde_json::Error| IdentityError::Damaged {
        path: path.clone(),
        reason: error.to_string(),
    };
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(found) if found > u64::from(VERSION) => Err(IdentityError::Version { path, found }),
        _ => serde_json::from_value(value).map(Some).map_err(damaged),
    }
}

fn write(vfs: &dyn Vfs, dir: &Path, contents: &Contents) -> Result<(), IdentityError> {
    let path = dir.join(FILE);
    let mut bytes = serde_json::to_vec_pretty(contents)
        .map_err(|error| StorageError::io("write", &path, error.into()))?;
    bytes.push(b'\n');
    Ok(files::replace(vfs, &path, &bytes)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TEMPORARY_FILE: &str = "identity.json.tmp";

    fn open(dir: &Path) -> Result<Identity, IdentityError> {
        Identity::open(dir, 1, "test")
    }

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let dir = dir();
        let data = dir.path().join("data");
        let first = open(&data).expect("new");
        assert_eq!((first.node_id(), first.cluster().as_str()), (1, "test"));
        let (uuid, cluster_id) = (first.uuid(), Uuid::new_v4());
        first.set_cluster_id(cluster_id).expect("unknown so far");
        first
            .remember_peer(2, Uuid::from_u128(2))
            .expect("unknown so far");
        first
            .remember_peer(3, Uuid::from_u128(3))
            .expect("unknown so far");
        first.forget_peer(3).expect("written");
        let again = open(&data).expect("there");
        assert_eq!((again.uuid(), again.cluster_id()), (uuid, Some(cluster_id)));
        assert_eq!(again.peers(), BTreeMap::from([(2, Uuid::from_u128(2))]));
        assert!(!data.join(TEMPORARY_FILE).exists());
    }

    #[test]
    fn the_directory_of_another_node_or_cluster_is_refused_with_advice() {
        let dir = dir();
        open(dir.path()).expect("new");
        let error = Identity::open(dir.path(), 2, "test").expect_err("another node");
        assert!(
            error.to_string().contains("set the node id back to 1"),
            "{error}"
        );
        let error = Identity::open(dir.path(), 1, "other").expect_err("another cluster");
        assert!(
            error
                .to_string()
                .contains("set the cluster name back to \"test\""),
            "{error}"
        );
    }

    #[test]
    fn a_known_node_with_another_disk_is_refused_and_not_remembered() {
        let dir = dir();
        let identity = open(dir.path()).expect("new");
        let (known, shown) = (Uuid::from_u128(2), Uuid::from_u128(22));
        assert_eq!(
            identity.check(2, known),
            Ok(()),
            "checking remembers nothing"
        );
        assert_eq!(identity.check(2, shown), Ok(()));
        assert_eq!(identity.accepted(2, known), Ok(()));
        for refused in [identity.check(2, shown), identity.accepted(2, shown)] {
            let reason = refused.expect_err("another disk");
            assert_eq!(reason.code, RefuseCode::KnownIdOtherDisk);
            assert!(
                reason.text.contains("must come back under a new id"),
                "{reason}"
            );
        }
        assert_eq!(open(dir.path()).expect("there").check(2, known), Ok(()));
    }

    #[test]
    fn another_cluster_id_is_refused() {
        let dir = dir();
        let identity = open(dir.path()).expect("new");
        identity
            .set_cluster_id(Uuid::from_u128(1))
            .expect("unknown so far");
        identity
            .set_cluster_id(Uuid::from_u128(1))
            .expect("the same");
        let error = identity
            .set_cluster_id(Uuid::from_u128(2))
            .expect_err("another");
        assert!(matches!(error, IdentityError::OtherClusterId { .. }));
    }

    #[test]
    fn a_damaged_or_newer_file_is_refused_and_left_alone() {
        let dir = dir();
        let path = dir.path().join(FILE);
        for (bytes, expected) in [
            ("", "is damaged"),
            ("{\"version\": 1}", "is damaged"),
            ("{\"version\": 2, \"else\": 0}", "newer version"),
        ] {
            fs::write(&path, bytes).expect("writable");
            let error = open(dir.path()).expect_err("not an identity");
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(fs::read_to_string(&path).expect("there"), bytes);
        }
    }

    #[test]
    fn a_peer_that_can_not_be_written_down_is_not_accepted() {
        let dir = dir();
        let identity = open(dir.path()).expect("new");
        // Nothing can be created under this name any more.
        fs::create_dir(dir.path().join(TEMPORARY_FILE)).expect("free");
        let reason = identity
            .accepted(2, Uuid::from_u128(2))
            .expect_err("no room");
        assert_eq!(reason.code, RefuseCode::Internal);
        assert!(identity.peers().is_empty());
    }
}
