//! The cluster as this node sees it, moving leaders, and whether this node is ready.

use std::collections::HashMap;

use quorate_raft::{NodeLiveness, TransferError};

use super::route::UNKNOWN;
use super::{
    Broker, BrokerError, BrokerResult, ClusterDescription, NodeDescription, NodeId, NodeState,
};
use crate::catalog::{CATALOG_GROUP, GroupPlacement, ReplicaState};
use crate::peer::{PeerError, PeerRequest, PeerResult};

impl Broker {
    /// Nodes, leaders and replicas of queues.
    pub async fn cluster(&self) -> BrokerResult<ClusterDescription> {
        let catalog = self.catalog();
        let groups: Vec<u64> = catalog.queue_groups.keys().copied().collect();
        let here = groups
            .iter()
            .copied()
            .filter(|g| self.local_group(*g).is_some());
        let mut leaders: HashMap<u64, NodeId> =
            here.filter_map(|g| Some((g, self.leader_of(g)?))).collect();
        let elsewhere: Vec<u64> = groups
            .iter()
            .copied()
            .filter(|g| self.local_group(*g).is_none())
            .collect();
        let views = self.describe(&elsewhere).await;
        leaders.extend(views.iter().filter_map(|(g, v)| Some((*g, v.leader?))));

        let placements = || catalog.topics.values().flat_map(|t| t.queues.iter());
        let nodes = self.host.nodes().into_iter().map(|status| {
            let entry = catalog.nodes.get(&status.node);
            NodeDescription {
                id: status.node,
                url: entry.map_or(String::new(), |e| e.url.clone()),
                state: match status.liveness {
                    NodeLiveness::Up => NodeState::Up,
                    NodeLiveness::Suspect => NodeState::Suspect,
                    NodeLiveness::Down => NodeState::Down,
                },
                leaders: leaders.values().filter(|n| **n == status.node).count(),
                replicas: placements().filter(|p| p.on(status.node)).count(),
                quarantined: catalog.unsound().filter(|u| u.node == status.node).count(),
                version: entry.map_or(String::new(), |e| e.version.clone()),
            }
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by_key(|n| n.id);
        let down: Vec<NodeId> = nodes
            .iter()
            .filter(|n| n.state == NodeState::Down)
            .map(|n| n.id)
            .collect();
        let under = placements()
            .filter(|p| p.nodes().any(|n| down.contains(&n)) || !p.is_sound())
            .count();
        let own = self.local_group(CATALOG_GROUP.0);
        Ok(ClusterDescription {
            cluster_id: catalog.cluster_id.clone().unwrap_or_default(),
            nodes,
            catalog_leader: own.as_ref().and_then(|g| g.leader()),
            catalog_term: own.as_ref().map_or(0, |g| g.term()),
            queues_total: groups.len(),
            queues_leaderless: groups.len() - leaders.len(),
            queues_under_replicated: under,
        })
    }

    /// Moves a queue's leadership to another of its nodes.
    pub async fn transfer_leader(&self, topic: &str, queue: u32, to: NodeId) -> BrokerResult<()> {
        let (topic, group) = self.find_queue(topic, queue).await?;
        let has_replica = topic.queues.get(queue as usize).is_some_and(|p| p.on(to));
        if !has_replica {
            let name = &topic.name;
            let text = format!("node {to} has no replica of queue {queue} of topic {name:?}");
            return Err(BrokerError::InvalidRequest(text));
        }
        let here = |_| async move { Ok(self.transfer_leader_here(group, to).await?) };
        let request = |_| PeerRequest::TransferLeader { group, to };
        self.write(group, self.config.write_timeout, here, request)
            .await
    }

    /// The same on the node that leads.
    pub(crate) async fn transfer_leader_here(&self, group: u64, to: NodeId) -> PeerResult<()> {
        let Some(replica) = self.local_group(group) else {
            return Err(PeerError::NotHere);
        };
        if !replica.is_leader() {
            let leader = replica.leader().filter(|n| *n != self.node_id());
            return Err(PeerError::NotLeader { leader });
        }
        if to == self.node_id() {
            return Ok(());
        }
        match replica.transfer_leader(to).await {
            Ok(()) => Ok(()),
            Err(TransferError::NotLeader { leader }) => Err(PeerError::NotLeader { leader }),
            Err(TransferError::Refused(reason)) => {
                Err(PeerError::Broker(BrokerError::CannotLead {
                    node: to,
                    reason,
                }))
            }
            Err(TransferError::NotTaken(reason)) => {
                tracing::debug!(group, to, %reason, "leadership was not taken over");
                Err(PeerError::Broker(UNKNOWN))
            }
        }
    }

    /// Why this node is not ready to serve, or None when it is.
    pub fn not_ready(&self) -> Option<String> {
        let catalog = self.catalog();
        if catalog.cluster_id.is_none() {
            let full = match self.log.disk_has_room() {
                true => "",
                false => "; less than log.reserve_bytes is free on this node's disk",
            };
            return Some(format!("the catalog is not known yet{full}"));
        }
        let own = self.local_group(CATALOG_GROUP.0);
        if own.is_none_or(|group| group.leader().is_none()) {
            return Some("the catalog has no leader".to_owned());
        }
        // A damaged replica does not keep the node from serving: the others answer for it.
        let is_here = |p: &&GroupPlacement| {
            let place = p.replica_on(self.node_id());
            place.is_some_and(|place| place.state == ReplicaState::Sound)
        };
        let here = catalog.placements().filter(is_here);
        let closed = here.filter(|p| !self.local.has(p.group)).count();
        if closed > 0 {
            return Some(format!("{closed} replicas are not open yet"));
        }
        let behind = self.local.behind();
        let first = behind.first()?;
        Some(format!(
            "{} replicas have not caught up with their own log yet, one of them: {first}",
            behind.len()
        ))
    }
}
