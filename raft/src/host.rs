//! All Raft groups of one node: opening, finding, closing, and who is told of what.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use openraft::{Config, SnapshotPolicy};
use parking_lot::RwLock;
use quorate_storage::commit_log::{CommitLog, Flush};
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::snapshot::SnapshotStore;
use quorate_storage::{RaftGroupId, StorageError};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::config::{GroupSpec, HostConfig, LogRetention};
use crate::elections::{self, ASK_PATIENCE};
use crate::error::{CallError, OpenGroupError};
use crate::group::{Group, Raft};
use crate::identity::Identity;
use crate::link::{LinkConfig, LinkHandler, LinkStream, LinkTable, Network};
use crate::liveness::{Liveness, PeerState};
use crate::log_store::{LogStore, completion};
use crate::machine::Machine;
use crate::network::{Acknowledged, NetworkFactory};
use crate::serve::{self, Groups};
use crate::state_machine::StateMachine;
use crate::tail_guard::TailGuard;
use crate::types::{NodeId, ReplicaNode};
use crate::wire::class;

/// The broker's side of requests between nodes.
pub trait PeerService: Send + Sync + 'static {
    fn call(&self, from: NodeId, body: Bytes) -> BoxFuture<'static, Bytes>;
}

/// Where a host keeps what it must not lose.
#[derive(Debug, Clone)]
pub struct HostStorage {
    pub log: CommitLog,
    pub snapshots: Arc<SnapshotStore>,
    pub identity: Arc<Identity>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeLiveness {
    Up,
    Suspect,
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeStatus {
    pub node: NodeId,
    pub liveness: NodeLiveness,
}

/// What an operator would like to see as it happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RaftEvent {
    LeaderElected {
        group: RaftGroupId,
        node: NodeId,
        term: u64,
    },
    LeaderLost {
        group: RaftGroupId,
        node: NodeId,
        term: u64,
    },
    NodeUp {
        node: NodeId,
    },
    NodeDown {
        node: NodeId,
    },
    /// A group ended here by itself. The node must not go on: the others believe it to lead.
    Failed {
        group: RaftGroupId,
        reason: String,
    },
    /// A peer refuses this node for good: the text says why and what to do.
    Refused {
        node: NodeId,
        reason: String,
    },
}

/// The links to the other nodes, with what is known of their lives.
pub(crate) struct Peers {
    node: NodeId,
    link: Arc<LinkTable>,
    liveness: Arc<Liveness>,
    timeout: Duration,
    lease: Duration,
}

impl Peers {
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn link(&self) -> &Arc<LinkTable> {
        &self.link
    }

    pub(crate) fn liveness(&self) -> &Arc<Liveness> {
        &self.liveness
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Whether the several messages of a handover fit well into the time of one request.
    pub(crate) fn answers_quickly(&self, node: NodeId) -> bool {
        let stats = self.link.stats(node);
        stats.is_some_and(|stats| stats.round_trip <= self.timeout / 8)
    }

    /// False once this node believes the other to be gone.
    pub(crate) fn may_be_alive(&self, node: NodeId) -> bool {
        node == self.node || self.liveness.state(node) != PeerState::Down
    }
}

type GroupTable = RwLock<HashMap<RaftGroupId, Group>>;

/// Opens, runs and closes Raft groups.
pub struct RaftHost {
    pub(crate) config: HostConfig,
    storage: HostStorage,
    table: Arc<GroupTable>,
    pub(crate) peers: Arc<Peers>,
    service: Arc<dyn PeerService>,
    pub(crate) events: broadcast::Sender<RaftEvent>,
    pub(crate) stop: CancellationToken,
}

impl std::fmt::Debug for RaftHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RaftHost(node {})", self.config.node_id)
    }
}

struct TableGroups(Arc<GroupTable>);

impl Groups for TableGroups {
    fn find(&self, group: RaftGroupId) -> Option<Group> {
        self.0.read().get(&group).cloned()
    }
}

/// What arrives over the links.
struct Handler {
    groups: Arc<TableGroups>,
    service: Arc<dyn PeerService>,
}

impl LinkHandler for Handler {
    fn call(&self, from: NodeId, class: u8, group: u64, body: Bytes) -> BoxFuture<'static, Bytes> {
        let groups = self.groups.clone();
        match class {
            class::BROKER => self.service.call(from, body),
            class::FAILOVER => {
                Box::pin(async move { elections::answer_failover(groups.as_ref(), body).await })
            }
            _ => Box::pin(async move { serve::call(groups.as_ref(), class, group, body).await }),
        }
    }

    fn stream(
        &self,
        _from: NodeId,
        group: u64,
        hello: Bytes,
        stream: LinkStream,
    ) -> BoxFuture<'static, ()> {
        let groups = self.groups.clone();
        Box::pin(serve::append_stream(groups, group, hello, stream))
    }
}

impl RaftHost {
    /// Starts the links and the elections; groups are opened afterwards.
    pub async fn start(
        config: HostConfig,
        storage: HostStorage,
        network: impl Into<Network>,
        service: Arc<dyn PeerService>,
    ) -> Result<Arc<RaftHost>, OpenGroupError> {
        let table = Arc::new(GroupTable::default());
        let handler = Arc::new(Handler {
            groups: Arc::new(TableGroups(table.clone())),
            service: service.clone(),
        });
        let mut link_config = LinkConfig::new(
            config.cluster_name.clone(),
            config.node_id,
            storage.identity.uuid(),
            config.nodes.clone(),
        );
        link_config.registry = storage.identity.clone();
        link_config.ping_interval = config.ping_interval;
        link_config.silence_timeout = config.silence_timeout;
        link_config.urgent_classes = class::URGENT;
        link_config
            .validate()
            .map_err(|e| OpenGroupError::Raft(e.to_string()))?;
        let link = LinkTable::start(link_config, network, handler);
        let liveness = Liveness::start(link.clone());
        let (events, _) = broadcast::channel(4096);
        let host = Arc::new(RaftHost {
            peers: Arc::new(Peers {
                node: config.node_id,
                link,
                liveness,
                timeout: config.replication_timeout,
                lease: config.lease,
            }),
            config,
            storage,
            table,
            service,
            events,
            stop: CancellationToken::new(),
        });
        elections::start(&host);
        Ok(host)
    }

    pub fn node_id(&self) -> NodeId {
        self.config.node_id
    }

    /// Opens this node's replica of a group, recovering what its disk holds.
    pub async fn open_group(
        self: &Arc<Self>,
        spec: GroupSpec,
        machine: Box<dyn StateMachine>,
    ) -> Result<Group, OpenGroupError> {
        if self.stop.is_cancelled() {
            return Err(OpenGroupError::ShuttingDown);
        }
        let here = spec.replicas.iter().find(|r| r.node == self.config.node_id);
        let replica = here
            .ok_or(OpenGroupError::NoReplicaHere {
                node: self.config.node_id,
                group: spec.group.0,
            })?
            .replica;
        let log = self.storage.log.group(spec.group);
        let state = log.state();
        let must_be_synced = machine.must_be_synced();
        let (applied_tx, applied) = watch::channel(None);
        let machine = Machine::open(
            &spec,
            machine,
            self.storage.snapshots.clone(),
            Box::new(log.clone()),
            applied_tx,
        )?;
        let acknowledged = Arc::<Acknowledged>::default();
        let network = NetworkFactory {
            link: self.peers.link.clone(),
            group: spec.group,
            timeout: self.config.replication_timeout,
            acknowledged: acknowledged.clone(),
        };
        let store = LogStore::new(log.clone(), spec.flush, must_be_synced);
        let raft = Raft::new(replica, self.raft_config(&spec)?, network, store, machine)
            .await
            .map_err(|e| OpenGroupError::Raft(e.to_string()))?;
        // A vote without entries may have lost all of them.
        let used = state.last.is_some() || state.vote.is_some();
        let suspect = self.config.tails_suspect && spec.flush == Flush::Async && used;
        let tail = TailGuard::new(suspect);
        let peers = self.peers.clone();
        let group = Group::new(spec, raft, log, applied, peers, tail, acknowledged);
        let pristine = group.is_pristine();
        let founder = group.spec().founders.iter().any(|r| r.replica == replica);
        if pristine && founder {
            // Before anyone can ask for its vote: a replica that has voted can't begin any more, and
            // the one that was to begin may be gone.
            self.initialize(&group).await;
        }
        self.table.write().insert(group.id(), group.clone());
        if !pristine || !founder {
            // Its leader may be waiting out a long backoff.
            let group = group.clone();
            tokio::spawn(async move { group.ask_who_leads(ASK_PATIENCE).await });
        } else if group.spec().preferred == self.config.node_id {
            tokio::spawn(elections::win_first_election(self.clone(), group.clone()));
        }
        Ok(group)
    }

    /// Writes the first entry, the membership. Every replica would write the very same, so it does
    /// not matter which of them does, or whether two do.
    pub(crate) async fn initialize(&self, group: &Group) {
        let members: std::collections::BTreeMap<_, _> = group
            .spec()
            .founders
            .iter()
            .map(|r| (r.replica, ReplicaNode { node: r.node }))
            .collect();
        if let Err(error) = group.raft().initialize(members).await {
            tracing::debug!(group = %group.id(), %error, "group was initialized already");
        }
    }

    fn raft_config(&self, spec: &GroupSpec) -> Result<Arc<Config>, OpenGroupError> {
        let lease = (self.config.lease.as_millis() as u64).max(2);
        let config = Config {
            cluster_name: spec.group.to_string(),
            // Liveness and elections are the host's, see `elections`. So the first two are nothing
            // but bounds: of a heartbeat and of the request for a vote. An answer that comes later
            // is thrown away, so they are as long as they may be. The last one is how long a
            // follower's promise to its leader lasts.
            heartbeat_interval: lease,
            election_timeout_min: lease * 2 - 1,
            election_timeout_max: lease * 2,
            enable_tick: false,
            enable_heartbeat: false,
            enable_elect: false,
            enable_pre_vote: Some(true),
            // A restarted leader may have lost a tail that followers hold as committed.
            enable_leader_restore: Some(mutation::on(Mutation::LeaderRestore)),
            allow_log_reversion: None,
            max_payload_entries: 1024,
            snapshot_policy: match spec.retention {
                LogRetention::Messages => SnapshotPolicy::Never,
                LogRetention::StateOnly => SnapshotPolicy::LogsSinceLast(spec.checkpoint_every),
            },
            max_in_snapshot_log_to_keep: match spec.retention {
                // A boundary is only moved to where everything up to it may go.
                LogRetention::Messages => 0,
                // So much that the checkpoint before the newest can take its place.
                LogRetention::StateOnly => spec.checkpoint_every + 256,
            },
            purge_batch_size: match spec.retention {
                LogRetention::Messages => 1,
                LogRetention::StateOnly => 256,
            },
            ..Config::default()
        };
        let config = config
            .validate()
            .map_err(|e| OpenGroupError::Raft(e.to_string()))?;
        Ok(Arc::new(config))
    }

    /// Stops a group here; with `remove`, its log and snapshots go too. When this returns, what it
    /// did is on disk.
    ///
    /// # Errors
    /// When that can't be said: what was to be removed may still be there.
    pub async fn close_group(&self, group: RaftGroupId, remove: bool) -> Result<(), StorageError> {
        let found = self.table.write().remove(&group);
        if let Some(group) = found {
            group.stop().await;
        }
        let (done, synced) = completion();
        let log = &self.storage.log;
        if remove {
            self.storage.snapshots.remove_group(group)?;
            log.remove_group(group, done);
        } else {
            log.group(group).append(Vec::new(), Flush::Sync, done)?;
        }
        // Opened again, a group takes what the log holds for synced.
        synced.await.unwrap_or(Err(StorageError::Closed))
    }

    pub fn group(&self, group: RaftGroupId) -> Option<Group> {
        self.table.read().get(&group).cloned()
    }

    pub fn groups(&self) -> Vec<Group> {
        self.table.read().values().cloned().collect()
    }

    /// A request to the broker of another node, or of this one.
    pub async fn call(
        &self,
        node: NodeId,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        if node == self.config.node_id {
            let answer = tokio::time::timeout(timeout, self.service.call(node, body)).await;
            return answer.map_err(|_| CallError::Unknown("no answer in time".to_owned()));
        }
        let link = &self.peers.link;
        link.call(node, class::BROKER, 0, body, timeout)
            .await
            .map_err(|error| {
                if error.nobody_took_it() {
                    CallError::NotSent(error.to_string())
                } else if error == crate::link::CallError::Timeout {
                    CallError::Unknown(error.to_string())
                } else {
                    CallError::Lost(error.to_string())
                }
            })
    }

    pub fn nodes(&self) -> Vec<NodeStatus> {
        let status = |node| NodeStatus {
            node,
            liveness: if node == self.config.node_id {
                NodeLiveness::Up
            } else {
                match self.peers.liveness.state(node) {
                    PeerState::Up => NodeLiveness::Up,
                    PeerState::Suspect => NodeLiveness::Suspect,
                    PeerState::Down => NodeLiveness::Down,
                }
            },
        };
        self.config
            .nodes
            .iter()
            .map(|(node, _)| status(*node))
            .collect()
    }

    /// A receiver that lags loses events: what failed is then to be asked of [`Self::failures`].
    pub fn events(&self) -> broadcast::Receiver<RaftEvent> {
        self.events.subscribe()
    }

    /// The groups that ended here by themselves, and why.
    pub fn failures(&self) -> Vec<(RaftGroupId, String)> {
        let groups = self.groups().into_iter();
        groups
            .filter_map(|group| Some((group.id(), group.failure()?)))
            .collect()
    }

    /// Hands every leadership over, then stops all groups and closes the links.
    pub async fn shutdown(&self, patience: Duration) {
        self.stop.cancel();
        elections::hand_over(self, patience).await;
        let groups = self.groups();
        join_all(groups.iter().map(Group::stop)).await;
        self.table.write().clear();
        self.peers.link.shutdown().await;
    }
}
