//! Raft's events in the broker's words, with the topic and queue they are about.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use quorate_raft::RaftEvent;
use quorate_storage::RaftGroupId;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use super::batcher::now_ms;
use super::{Broker, ClusterEvent, ClusterEventKind};
use crate::catalog::{CatalogState, GroupOwner, Unsound};

impl Broker {
    /// What happens in the cluster from now on, as this node sees it.
    pub fn events(&self) -> broadcast::Receiver<ClusterEvent> {
        self.events.subscribe()
    }
}

/// Translates events until the host or the broker goes.
pub(super) fn start(broker: &Arc<Broker>) {
    let mut raft = broker.host.events();
    let catalog = broker.catalog.clone();
    let broker = Arc::downgrade(broker);
    tokio::spawn(follow_damage(broker.clone(), catalog));
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

/// Tells of damage and of its end, as the catalog comes to know of it: on every node the same.
async fn follow_damage(broker: Weak<Broker>, mut catalog: watch::Receiver<Arc<CatalogState>>) {
    let mut known: BTreeSet<Unsound> = BTreeSet::new();
    while catalog.changed().await.is_ok() {
        let state = catalog.borrow_and_update().clone();
        let unsound: BTreeSet<Unsound> = state.unsound().collect();
        let Some(broker) = broker.upgrade() else {
            return;
        };
        let tell = |event, unsound: &Unsound| {
            let place = name_group(&state, RaftGroupId(unsound.group));
            if let Some((topic, queue)) = place {
                broker.tell(ClusterEvent {
                    event,
                    time_ms: now_ms(),
                    topic: Some(topic),
                    queue,
                    term: None,
                    node: Some(unsound.node),
                });
            }
        };
        for new in unsound.difference(&known) {
            tell(ClusterEventKind::Quarantined, new);
        }
        for over in known.difference(&unsound) {
            tell(ClusterEventKind::MembershipChanged, over);
        }
        known = unsound;
    }
}

impl Broker {
    fn publish(&self, event: RaftEvent) {
        if let RaftEvent::Refused { node, reason } = &event {
            tracing::error!(node, %reason, "a peer refuses this node");
        }
        if let Some(event) = translate(&event, &self.catalog(), now_ms()) {
            self.tell(event);
        }
    }

    fn tell(&self, event: ClusterEvent) {
        self.metrics.count_event(name_of(event.event));
        // Nobody may be listening.
        self.events.send(event).ok();
    }
}

/// Topic and queue of a group; internal groups have names of their own.
fn name_group(catalog: &CatalogState, group: RaftGroupId) -> Option<(String, Option<u32>)> {
    Some(match catalog.owner(group)? {
        GroupOwner::Catalog => ("_catalog".to_owned(), None),
        GroupOwner::Coordinator(number) => ("_coordinator".to_owned(), Some(number)),
        GroupOwner::Queue { topic, queue } => {
            (catalog.topics.get(&topic)?.name.clone(), Some(queue))
        }
    })
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
        let (topic, queue) = name_group(catalog, *group)?;
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
