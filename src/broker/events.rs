//! Raft's events in the broker's words, with the topic and queue they are about.

use std::sync::{Arc, Weak};

use quorate_raft::RaftEvent;
use quorate_storage::RaftGroupId;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::batcher::now_ms;
use super::{Broker, ClusterEvent, ClusterEventKind};
use crate::catalog::{CatalogState, GroupOwner};

impl Broker {
    /// What happens in the cluster from now on, as this node sees it.
    pub fn events(&self) -> broadcast::Receiver<ClusterEvent> {
        self.events.subscribe()
    }
}

/// Translates events until the host or the broker goes.
pub(super) fn start(broker: &Arc<Broker>) {
    let mut raft = broker.host.events();
    let broker = Arc::downgrade(broker);
    tokio::spawn(async move {
        loop {
            match raft.recv().await {
                Ok(event) => {
                    let Some(broker) = Weak::upgrade(&broker) else {
                        return;
                    };
                    broker.publish(event);
                }
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "cluster events came faster than they were told");
                }
                Err(RecvError::Closed) => return,
            }
        }
    });
}

impl Broker {
    fn publish(&self, event: RaftEvent) {
        if let RaftEvent::Refused { node, reason } = &event {
            tracing::error!(node, %reason, "a peer refuses this node");
        }
        if let Some(event) = translate(&event, &self.catalog(), now_ms()) {
            self.metrics.count_event(name_of(event.event));
            // Nobody may be listening.
            self.events.send(event).ok();
        }
    }
}

fn name_of(kind: ClusterEventKind) -> &'static str {
    match kind {
        ClusterEventKind::LeaderElected => "leader_elected",
        ClusterEventKind::LeaderLost => "leader_lost",
        ClusterEventKind::NodeUp => "node_up",
        ClusterEventKind::NodeDown => "node_down",
        ClusterEventKind::MembershipChanged => "membership_changed",
        ClusterEventKind::Quarantined => "quarantined",
    }
}

/// None for what concerns no topic, coordinator or node that is known.
fn translate(event: &RaftEvent, catalog: &CatalogState, time_ms: u64) -> Option<ClusterEvent> {
    let about_group = |event, group: &RaftGroupId, node, term| {
        let (topic, queue) = match catalog.owner(*group)? {
            GroupOwner::Catalog => ("_catalog".to_owned(), None),
            GroupOwner::Coordinator(number) => ("_coordinator".to_owned(), Some(number)),
            GroupOwner::Queue { topic, queue } => {
                (catalog.topics.get(&topic)?.name.clone(), Some(queue))
            }
        };
        Some(ClusterEvent {
            event,
            time_ms,
            topic: Some(topic),
            queue,
            term: Some(term),
            node: Some(node),
        })
    };
    let about_node = |event, node| {
        Some(ClusterEvent {
            event,
            time_ms,
            topic: None,
            queue: None,
            term: None,
            node: Some(node),
        })
    };
    match event {
        RaftEvent::LeaderElected { group, node, term } => {
            about_group(ClusterEventKind::LeaderElected, group, *node, *term)
        }
        RaftEvent::LeaderLost { group, node, term } => {
            about_group(ClusterEventKind::LeaderLost, group, *node, *term)
        }
        RaftEvent::NodeUp { node } => about_node(ClusterEventKind::NodeUp, *node),
        RaftEvent::NodeDown { node } => about_node(ClusterEventKind::NodeDown, *node),
        RaftEvent::Refused { .. } | RaftEvent::Failed { .. } => None,
    }
}
