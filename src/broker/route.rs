//! Where a request goes: to the group's leader for writes, to any replica for reads.
//!
//! A write follows hints and waits out elections, but is sent on only while nobody can have taken
//! it. From the first unclear answer on, its fate is unknown and it is never sent again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quorate_raft::{CallError, Group, NodeLiveness, ProposeError};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::batcher::now_ms;
use super::queue::entry;
use super::{Broker, BrokerError, BrokerResult, NodeId, Outcome};
use crate::catalog::{
    CATALOG_GROUP, CatalogCommand, CatalogState, FIRST_QUEUE_GROUP, GroupOwner, GroupPlacement,
    Topic,
};
use crate::coordinator::stamp;
use crate::peer::{PeerError, PeerRequest, PeerResult, decode, encode};
use quorate_storage::RaftGroupId;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(100);
/// How much longer a caller waits for an answer than the node that makes it.
const CALL_MARGIN: Duration = Duration::from_millis(250);

/// Grows from 10 to 100 ms, and never passes the deadline.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    deadline: Instant,
}

impl Backoff {
    pub(super) fn until(deadline: Instant) -> Self {
        Self {
            next: BACKOFF_MIN,
            deadline,
        }
    }

    /// False when the time is over.
    pub(super) async fn wait(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.deadline {
            return false;
        }
        tokio::time::sleep_until(self.deadline.min(now + self.next)).await;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        true
    }
}

/// Why one attempt at a write came to nothing.
#[derive(Debug)]
pub(super) enum Attempt {
    /// Nobody took it; with a node named, ask there.
    NotTaken { leader: Option<NodeId> },
    /// The final answer.
    Failed(BrokerError),
}

impl From<PeerError> for Attempt {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::NotLeader { leader } => Self::NotTaken { leader },
            PeerError::NotHere => Self::NotTaken { leader: None },
            PeerError::Broker(error) => Self::Failed(error),
        }
    }
}

pub(super) const NO_LEADER: BrokerError = BrokerError::NoLeader {
    outcome: Outcome::NotCommitted,
};
pub(super) const UNKNOWN: BrokerError = BrokerError::Timeout {
    outcome: Outcome::Unknown,
};

/// What becomes of a write that has begun: its first steps are done, so that it failed for the moment
/// must not sound as if nothing had happened.
pub(super) fn once_begun(error: BrokerError) -> BrokerError {
    match error.retryable() {
        true => UNKNOWN,
        false => error,
    }
}

/// Deleting is how a full disk gets room again; the reserve has space for it.
fn frees_space(group: u64, body: &[u8]) -> bool {
    if group >= FIRST_QUEUE_GROUP {
        return entry::is_trim(body);
    }
    group == CATALOG_GROUP.0
        && matches!(
            postcard::from_bytes(body),
            Ok(CatalogCommand::DeleteTopic { .. } | CatalogCommand::DeleteExchange { .. })
        )
}

impl Broker {
    /// The group's replica here, whatever the group is for.
    pub(super) fn local_group(&self, group: u64) -> Option<Group> {
        self.host.group(RaftGroupId(group))
    }

    /// The nodes that have a replica of a group.
    pub(super) fn replica_nodes(&self, catalog: &CatalogState, group: u64) -> Vec<NodeId> {
        match catalog.owner(RaftGroupId(group)) {
            Some(GroupOwner::Catalog) => self.host.nodes().iter().map(|n| n.node).collect(),
            Some(_) => catalog
                .placement(RaftGroupId(group))
                .map(|p| p.nodes().collect())
                .unwrap_or_default(),
            None => Vec::new(),
        }
    }

    /// Who leads the group, as far as this node can tell.
    pub(super) fn leader_of(&self, group: u64) -> Option<NodeId> {
        match self.local_group(group) {
            Some(group) => group.leader(),
            None => self.hints.lock().get(&group).copied(),
        }
    }

    pub(super) fn hint_leader(&self, group: u64, leader: Option<NodeId>) {
        let mut hints = self.hints.lock();
        match leader {
            Some(node) => hints.insert(group, node),
            None => hints.remove(&group),
        };
    }

    pub(super) fn is_down(&self, node: NodeId) -> bool {
        let dead =
            |n: &quorate_raft::NodeStatus| n.node == node && n.liveness == NodeLiveness::Down;
        self.host.nodes().iter().any(dead)
    }

    /// Brings a write to the leader of `group`. `here` tries it on this node, `request` is what
    /// another node is asked; both get the time that is left.
    pub(super) async fn write<T, F>(
        &self,
        group: u64,
        timeout: Duration,
        here: impl Fn(Duration) -> F,
        request: impl Fn(u64) -> PeerRequest,
    ) -> BrokerResult<T>
    where
        T: DeserializeOwned,
        F: Future<Output = Result<T, Attempt>>,
    {
        let deadline = Instant::now() + timeout;
        let mut backoff = Backoff::until(deadline);
        let mut hint = None;
        let mut followed = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let target = hint.take().or_else(|| self.write_target(group, followed));
            let attempt = match target {
                None => Attempt::NotTaken { leader: None },
                Some(node) if node == self.node_id() => match here(left).await {
                    Ok(done) => return Ok(done),
                    Err(attempt) => attempt,
                },
                Some(node) => {
                    let request = request(left.as_millis() as u64);
                    match self.ask_to_write(node, &request, left).await {
                        Ok(done) => {
                            self.hint_leader(group, Some(node));
                            return Ok(done);
                        }
                        Err(attempt) => attempt,
                    }
                }
            };
            match attempt {
                Attempt::Failed(error) => return Err(error),
                // A fresh hint is followed at once, but two nodes may name each other.
                Attempt::NotTaken {
                    leader: Some(leader),
                } if followed < 2 => {
                    followed += 1;
                    hint = Some(leader);
                }
                Attempt::NotTaken { .. } => {
                    followed += 1;
                    if let Some(local) = self.local_group(group) {
                        tokio::spawn(async move { local.check_leader().await });
                    }
                    let catalog = self.catalog();
                    let placement = catalog.placement(RaftGroupId(group));
                    if placement.is_some_and(GroupPlacement::is_beyond_repair) {
                        return Err(BrokerError::Quarantined);
                    }
                    if !self.catalog_knows(group) || !backoff.wait().await {
                        self.hint_leader(group, None);
                        return Err(NO_LEADER);
                    }
                }
            }
        }
    }

    pub(super) fn catalog_knows(&self, group: u64) -> bool {
        self.catalog().owner(RaftGroupId(group)).is_some()
    }

    /// The likely leader's node. Without any idea, each attempt asks another replica: it answers
    /// with what it knows.
    fn write_target(&self, group: u64, attempt: usize) -> Option<NodeId> {
        if let Some(local) = self.local_group(group) {
            return local.leader();
        }
        let nodes = self.replica_nodes(&self.catalog(), group);
        let alive: Vec<_> = nodes.into_iter().filter(|n| !self.is_down(*n)).collect();
        let hint = self.leader_of(group).filter(|n| alive.contains(n));
        match hint {
            Some(node) if attempt < 2 => Some(node),
            _ => alive.get(attempt % alive.len().max(1)).copied(),
        }
    }

    async fn ask_to_write<T: DeserializeOwned>(
        &self,
        node: NodeId,
        request: &PeerRequest,
        left: Duration,
    ) -> Result<T, Attempt> {
        match self
            .host
            .call(node, encode(request), left + CALL_MARGIN)
            .await
        {
            Ok(answer) => match decode::<PeerResult<T>>(&answer) {
                Ok(Ok(done)) => Ok(done),
                Ok(Err(error)) => Err(error.into()),
                Err(reason) => {
                    tracing::warn!(node, %reason, "an answer that cannot be read");
                    Err(Attempt::Failed(UNKNOWN))
                }
            },
            Err(CallError::NotSent(reason)) => {
                tracing::debug!(node, %reason, "a write was not sent");
                Err(Attempt::NotTaken { leader: None })
            }
            Err(CallError::Unknown(reason)) => {
                tracing::debug!(node, %reason, "fate of a forwarded write unknown");
                Err(Attempt::Failed(UNKNOWN))
            }
            Err(CallError::Lost(reason)) => {
                tracing::debug!(node, %reason, "the answer to a forwarded write was lost");
                Err(Attempt::Failed(BrokerError::AnswerLost))
            }
        }
    }

    /// Asks another node something that changes nothing there.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        node: NodeId,
        request: &PeerRequest,
        timeout: Duration,
    ) -> PeerResult<T> {
        let internal = |text: String| PeerError::Broker(BrokerError::Internal(text));
        match self.host.call(node, encode(request), timeout).await {
            Ok(answer) => decode::<PeerResult<T>>(&answer).map_err(internal)?,
            Err(error) => {
                tracing::debug!(node, %error, "no answer from a peer");
                Err(PeerError::NotHere)
            }
        }
    }

    /// Asks the replicas of a group one after the other, the leader first, until one answers.
    /// `wait` is how long the answer may take on purpose.
    pub(super) async fn ask_replicas<T: DeserializeOwned>(
        &self,
        group: u64,
        request: &PeerRequest,
        wait: Duration,
    ) -> BrokerResult<T> {
        let deadline = Instant::now() + self.config.read_timeout;
        let mut backoff = Backoff::until(deadline);
        loop {
            for node in self.read_targets(group) {
                let timeout = wait + self.config.read_timeout + CALL_MARGIN;
                match self.ask(node, request, timeout).await {
                    Ok(answer) => return Ok(answer),
                    Err(PeerError::Broker(error)) if !error.retryable() => return Err(error),
                    Err(PeerError::NotLeader { leader }) => self.hint_leader(group, leader),
                    Err(_) => {}
                }
            }
            if !self.catalog_knows(group) || !backoff.wait().await {
                return Err(NO_LEADER);
            }
        }
    }

    fn read_targets(&self, group: u64) -> Vec<NodeId> {
        let leader = self.leader_of(group);
        let mut nodes = self.replica_nodes(&self.catalog(), group);
        nodes.retain(|n| *n != self.node_id() && !self.is_down(*n));
        nodes.sort_by_key(|n| Some(*n) != leader);
        nodes
    }

    /// Proposes a command to the catalog or a coordinator, wherever it is led.
    pub(super) async fn propose(&self, group: u64, body: Bytes) -> BrokerResult<Bytes> {
        let timeout = self.config.write_timeout;
        let here = |left| {
            let body = body.clone();
            async move { Ok(self.propose_here(group, body, left).await?) }
        };
        let request = |timeout_ms| PeerRequest::Propose {
            group,
            body: body.clone(),
            timeout_ms,
        };
        self.write(group, timeout, here, request).await
    }

    /// Proposes on this node's replica, which must lead.
    pub(crate) async fn propose_here(
        &self,
        group: u64,
        body: Bytes,
        timeout: Duration,
    ) -> PeerResult<Bytes> {
        let Some(replica) = self.local_group(group) else {
            return Err(PeerError::NotHere);
        };
        if !replica.is_leader() {
            return Err(PeerError::NotLeader {
                leader: replica.leader().filter(|n| *n != self.node_id()),
            });
        }
        if !frees_space(group, &body) {
            self.refuse_without_room().map_err(PeerError::Broker)?;
        }
        let body = match self.catalog().owner(RaftGroupId(group)) {
            Some(GroupOwner::Coordinator(_)) => stamp(now_ms(), &body),
            Some(GroupOwner::Queue { .. }) => entry::stamped(&body, now_ms()),
            _ => body,
        };
        match tokio::time::timeout(timeout, replica.propose(body)).await {
            Ok(Ok((_, reply))) => Ok(reply),
            Ok(Err(ProposeError::NotLeader { leader })) => Err(PeerError::NotLeader { leader }),
            Ok(Err(ProposeError::Closed)) => Err(PeerError::NotHere),
            Ok(Err(ProposeError::Unknown(reason))) => {
                tracing::debug!(group, %reason, "fate of a command unknown");
                Err(PeerError::Broker(BrokerError::AnswerLost))
            }
            Err(_) => Err(PeerError::Broker(UNKNOWN)),
        }
    }

    /// Before anything is proposed here: is there space on the disk and in front of it?
    pub(super) fn refuse_without_room(&self) -> BrokerResult<()> {
        if !self.log.disk_has_room() {
            return Err(BrokerError::DiskFull {
                node: self.node_id(),
            });
        }
        if !self.log.has_room() {
            let text = "its disk does not keep up with what is written";
            return Err(BrokerError::Overloaded(text.to_owned()));
        }
        Ok(())
    }

    /// The topic of that name. One that is not known here may have been made through another node
    /// a moment ago, so its absence is proved before it is told.
    pub(super) async fn find_topic(&self, name: &str) -> BrokerResult<Arc<Topic>> {
        if !crate::names::is_readable_topic(name) {
            let rule = crate::names::NAME_RULE;
            let text = format!("topic name {name:?} is not valid: a name has {rule}");
            return Err(BrokerError::InvalidName(text));
        }
        self.trust_catalog().await;
        if let Some(topic) = self.catalog().topic(name) {
            return Ok(topic.clone());
        }
        self.catalog_barrier().await?;
        let found = self.catalog().topic(name).cloned();
        found.ok_or_else(|| BrokerError::TopicNotFound {
            topic: name.to_owned(),
        })
    }

    /// The topic, which has this queue, and the queue's Raft group.
    pub(super) async fn find_queue(
        &self,
        name: &str,
        queue: u32,
    ) -> BrokerResult<(Arc<Topic>, u64)> {
        let mut topic = self.find_topic(name).await?;
        if topic.queues.len() <= queue as usize {
            self.catalog_barrier().await?;
            topic = self.find_topic(name).await?;
        }
        match topic.queues.get(queue as usize) {
            Some(placement) => Ok((topic.clone(), placement.group)),
            None => Err(BrokerError::QueueNotFound {
                topic: name.to_owned(),
                queue,
                queues: topic.config.queues,
            }),
        }
    }

    /// When this returns, the local copy of the catalog has all that was committed before.
    pub(super) async fn catalog_barrier(&self) -> BrokerResult<()> {
        let deadline = Instant::now() + self.config.read_timeout;
        let catalog = self.local_group(CATALOG_GROUP.0).ok_or(NO_LEADER)?;
        self.barrier(&catalog, deadline).await
    }

    /// A read barrier on a replica of this node, which waits out an election.
    pub(super) async fn barrier(&self, group: &Group, deadline: Instant) -> BrokerResult<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        group.read_barrier(left).await.map_err(|error| {
            tracing::debug!(group = %group.id(), %error, "no proof of leadership");
            NO_LEADER
        })
    }
}
