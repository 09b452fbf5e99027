//! Who leads which queue and where it ends, asked of the leaders themselves; and what this node's
//! own replica of a queue is.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;

use quorate_raft::Group;

use super::{Broker, BrokerError, BrokerResult, NodeId, ReplicaDescription};
use crate::catalog::GroupOwner;
use crate::peer::{GroupView, PeerRequest};

/// A leader that does not answer in this time is described by what others know.
const PATIENCE: Duration = Duration::from_millis(300);
/// A replica this many entries behind still counts as in sync.
const IN_SYNC_LAG: u64 = 1024;

impl Broker {
    /// This node's own replica of a queue; no other node is asked.
    pub async fn replica(&self, topic: &str, queue: u32) -> BrokerResult<ReplicaDescription> {
        let (found, id) = self.find_queue(topic, queue).await?;
        let group = self.local_group(id);
        let group = group.ok_or_else(|| BrokerError::ReplicaNotFound {
            topic: found.name.clone(),
            queue,
            node: self.node_id(),
        })?;
        self.describe_replica(&group).await
    }

    /// All replicas of this node, by Raft group, with what they hold.
    pub async fn replicas(&self) -> BrokerResult<Vec<(u64, String, ReplicaDescription)>> {
        let catalog = self.catalog();
        let mut groups = self.host.groups();
        groups.sort_unstable_by_key(|group| group.id());
        let mut found = Vec::new();
        for group in groups {
            let holds = match catalog.owner(group.id()) {
                Some(GroupOwner::Catalog) => "catalog".to_owned(),
                Some(GroupOwner::Coordinator(number)) => format!("coordinator {number}"),
                Some(GroupOwner::Queue { topic, queue }) => {
                    let topic = catalog.topics.get(&topic);
                    format!("{}/{queue}", topic.map_or("", |t| t.name.as_str()))
                }
                // Deleted a moment ago.
                None => continue,
            };
            let replica = self.describe_replica(&group).await?;
            found.push((group.id().0, holds, replica));
        }
        Ok(found)
    }

    async fn describe_replica(&self, group: &Group) -> BrokerResult<ReplicaDescription> {
        let hash = group.state_hash().await;
        let (applied, state_hash) = hash.map_err(|_| BrokerError::ShuttingDown)?;
        let mut replicas = group.spec().replicas.iter();
        let own = replicas.find(|r| r.node == self.node_id());
        Ok(ReplicaDescription {
            node: self.node_id(),
            replica: own.map_or(0, |r| r.replica),
            applied_index: applied.map_or(0, |id| id.index),
            purged_index: group.log().state().purged.map_or(0, |id| id.index),
            state_hash,
            leads: group.is_leader(),
            wanted: group.replicas().len(),
        })
    }

    /// What this node's replicas know of these groups; none where there is no replica.
    pub(crate) fn describe_here(&self, groups: &[u64]) -> Vec<Option<GroupView>> {
        groups.iter().map(|group| self.view_of(*group)).collect()
    }

    fn view_of(&self, id: u64) -> Option<GroupView> {
        let group = self.local_group(id)?;
        let metrics = group.metrics();
        let mut in_sync = Vec::new();
        if group.is_leader() {
            let last = metrics.last_log_index.unwrap_or(0);
            let near = |matched: Option<u64>| matched.is_some_and(|m| m + IN_SYNC_LAG >= last);
            let others = metrics.matched.iter().filter(|(_, matched)| near(*matched));
            in_sync.push(self.node_id());
            in_sync.extend(
                others
                    .map(|(node, _)| *node)
                    .filter(|n| *n != self.node_id()),
            );
            in_sync.retain(|node| !self.is_down(*node));
            in_sync.sort_unstable();
        }
        let bounds = self.local.queue(id).map(|q| q.shared.bounds());
        Some(GroupView {
            leader: metrics.leader,
            term: metrics.term,
            in_sync,
            earliest: bounds.map_or(0, |b| b.earliest),
            end: bounds.map_or(0, |b| b.end),
        })
    }

    /// Describes groups by their leaders where these answer, else by whoever knows something.
    pub(super) async fn describe(&self, groups: &[u64]) -> HashMap<u64, GroupView> {
        let mut views = HashMap::new();
        for (group, view) in groups.iter().zip(self.describe_here(groups)) {
            if let Some(view) = view {
                views.insert(*group, view);
            }
        }
        // Once for the leaders known here, once for those that the first answers name.
        for _ in 0..2 {
            let mut by_node: HashMap<NodeId, Vec<u64>> = HashMap::new();
            for group in groups {
                if let Some(node) = self.better_source(*group, views.get(group)) {
                    by_node.entry(node).or_default().push(*group);
                }
            }
            if by_node.is_empty() {
                break;
            }
            let asked = by_node.into_iter().map(|(node, groups)| async move {
                let request = PeerRequest::Describe {
                    groups: groups.clone(),
                };
                let answer = self.ask::<Vec<Option<GroupView>>>(node, &request, PATIENCE);
                (groups, answer.await.unwrap_or_default())
            });
            for (groups, answers) in join_all(asked).await {
                for (group, view) in groups.into_iter().zip(answers) {
                    let Some(view) = view else { continue };
                    // Who knows no leader either may know less of the rest.
                    if view.leader.is_some() || !views.contains_key(&group) {
                        views.insert(group, view);
                    }
                }
            }
        }
        views
    }

    /// The node that knows more of a group than `known` says: its leader, if that is another node;
    /// where no leader is known, another replica.
    fn better_source(&self, group: u64, known: Option<&GroupView>) -> Option<NodeId> {
        let can_tell = |node: &NodeId| *node != self.node_id() && !self.is_down(*node);
        match known {
            Some(view) if !view.in_sync.is_empty() => None,
            Some(GroupView {
                leader: Some(leader),
                ..
            }) => Some(*leader).filter(can_tell),
            Some(_) | None => {
                let hint = self.leader_of(group).filter(can_tell);
                let nodes = || self.replica_nodes(&self.catalog(), group).into_iter();
                hint.or_else(|| nodes().find(can_tell))
            }
        }
    }
}
