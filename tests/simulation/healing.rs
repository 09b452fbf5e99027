//! From the first request to the proof that the cluster is whole again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use quorate::broker::{Consistency, StartAt};
use quorate_raft::{Group, NodeId};
use quorate_storage::LogId;
use tokio::time::sleep;

use crate::model::{Capability, Model};
use crate::node::{Handles, NodeSlot};
use crate::oracle::Queue;
use crate::replicas::{Replicas, states};
use crate::workload::{Client, Stage, fetch, topic_config};

const LOOK_AGAIN: Duration = Duration::from_millis(100);
const STATES_EVERY: Duration = Duration::from_millis(300);

/// Where the run is, for whoever watches over its time.
#[derive(Debug, Default)]
pub struct Progress {
    begun: AtomicBool,
    open: Mutex<String>,
}

impl Progress {
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// What is being waited for.
    pub fn open(&self) -> String {
        self.open.lock().clone()
    }

    fn waits_for(&self, what: impl Into<String>) {
        *self.open.lock() = what.into();
    }
}

pub struct Plan {
    pub stage: Arc<Stage>,
    pub replicas: Arc<Mutex<Replicas>>,
    pub progress: Arc<Progress>,
    pub topics: Vec<(String, u32)>,
    pub clients: u64,
    pub cover: Vec<Capability>,
    pub seed: u64,
}

impl Plan {
    pub async fn run(self) -> turmoil::Result {
        self.make_topics().await;
        let model = Model::new(self.stage.clone(), &self.cover, self.seed);
        let mut model = model.await;
        self.progress.begun.store(true, Ordering::Relaxed);
        let watcher = tokio::spawn(watch_states(self.stage.clone(), self.replicas.clone()));
        let clients = (0..self.clients).map(|id| {
            let client = Client::new(id, self.seed, self.stage.clone());
            tokio::spawn(client.run())
        });
        let clients: Vec<_> = clients.collect();
        model.start();
        for (id, client) in clients.into_iter().enumerate() {
            self.progress.waits_for(format!("client {id}"));
            client.await?;
        }
        model.settle(|open| self.progress.waits_for(open)).await?;
        self.is_whole().await;
        self.take_writes().await;
        self.is_whole().await;
        watcher.abort();
        self.check_queues().await;
        self.progress.waits_for("the message model");
        model.judge().await;
        Ok(())
    }

    async fn make_topics(&self) {
        self.progress.waits_for("the first topics");
        for (topic, queues) in &self.topics {
            loop {
                let (name, config) = (topic.clone(), topic_config(*queues));
                let made = self.stage.nodes[0].ask(|handles| async move {
                    handles.broker.create_topic(&name, config).await.is_ok()
                });
                if made.await == Ok(true) {
                    break;
                }
                sleep(LOOK_AGAIN).await;
            }
        }
    }

    /// Every node is ready, every group has one leader that all agree on, and equal replicas.
    async fn is_whole(&self) {
        while let Err(missing) = self.look().await {
            self.progress.waits_for(missing);
            sleep(LOOK_AGAIN).await;
        }
        self.stage.history.note("whole");
    }

    async fn look(&self) -> Result<(), String> {
        let mut groups: BTreeMap<u64, Vec<View>> = BTreeMap::new();
        for slot in &self.stage.nodes {
            let node = slot.id();
            let looked = slot.ask(move |handles| look(node, handles)).await;
            let views = looked.map_err(|_| format!("node {node} is not there"))??;
            for view in views {
                groups.entry(view.group).or_default().push(view);
            }
        }
        for (group, views) in groups {
            let leads: BTreeSet<_> = views.iter().filter(|v| v.leads).map(|v| v.node).collect();
            let believed: BTreeSet<_> = views.iter().map(|v| v.leader).collect();
            let states: BTreeSet<_> = views.iter().map(|v| (v.applied, v.hash)).collect();
            if views.len() != views[0].replicas
                || leads.len() != 1
                || believed.len() != 1
                || states.len() != 1
            {
                return Err(format!("group {group}: {views:?}"));
            }
        }
        Ok(())
    }

    async fn take_writes(&self) {
        let mut client = Client::new(self.clients, self.seed, self.stage.clone());
        for queue in &self.stage.queues {
            self.progress.waits_for(format!("a write to {queue:?}"));
            client.write_at_last(queue).await;
        }
    }

    async fn check_queues(&self) {
        for slot in &self.stage.nodes {
            for queue in &self.stage.queues {
                let node = slot.id();
                self.progress.waits_for(format!("{queue:?} of node {node}"));
                // A replica may be rebuilding its index after the last failed fsync.
                let values = loop {
                    match whole_queue(slot, queue).await {
                        Ok(values) => break values,
                        Err(error) => self.progress.waits_for(format!("node {node}: {error}")),
                    }
                    sleep(LOOK_AGAIN).await;
                };
                let oracle = &self.stage.oracle;
                oracle.check_whole(queue, &values, &format!("node {node}"));
            }
        }
    }
}

/// A group as one node sees it.
#[derive(Debug)]
struct View {
    node: NodeId,
    group: u64,
    replicas: usize,
    leads: bool,
    leader: Option<NodeId>,
    applied: Option<LogId>,
    hash: u64,
}

async fn look(node: NodeId, handles: Handles) -> Result<Vec<View>, String> {
    if let Some(reason) = handles.broker.not_ready() {
        return Err(format!("node {node}: {reason}"));
    }
    let mut groups = handles.host.groups();
    groups.sort_by_key(Group::id);
    let mut views = Vec::new();
    for group in groups {
        let state = group.state_hash().await;
        let (applied, hash) = state.map_err(|e| format!("node {node}, {}: {e}", group.id()))?;
        views.push(View {
            node,
            group: group.id().0,
            replicas: group.spec().replicas.len(),
            leads: group.is_leader(),
            leader: group.leader(),
            applied,
            hash,
        });
    }
    Ok(views)
}

async fn whole_queue(slot: &NodeSlot, queue: &Queue) -> Result<Vec<String>, String> {
    let mut values = Vec::new();
    loop {
        let start = StartAt::Offset(values.len() as u64);
        let request = fetch(queue, start, Consistency::Stale, 0);
        let asked = slot.ask(|handles| async move { handles.broker.fetch(request).await });
        let answer = asked.await.map_err(|_| "no answer".to_owned())?;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.messages.is_empty() {
            return Ok(values);
        }
        for message in answer.messages {
            if message.offset != values.len() as u64 {
                return Err(format!("a hole before {}", message.offset));
            }
            let value = message.value.as_deref().unwrap_or_default();
            values.push(String::from_utf8_lossy(value).into_owned());
        }
    }
}

/// Compares the states of whoever is up, again and again.
async fn watch_states(stage: Arc<Stage>, replicas: Arc<Mutex<Replicas>>) {
    loop {
        for slot in &stage.nodes {
            if let Ok(states) = slot.ask(states).await {
                replicas.lock().check_states(slot.id(), states);
            }
        }
        sleep(STATES_EVERY).await;
    }
}
