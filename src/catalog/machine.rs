//! The catalog's state machine.

use std::sync::Arc;

use bytes::Bytes;
use quorate_raft::StateMachine;
use quorate_storage::{LogId, StorageError};
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::command::{CatalogCommand, CatalogReply, GivenUp, TopicChange};
use super::placement::place;
use super::state::{CatalogState, GroupPlacement, NodeEntry, Topic};
use super::{CATALOG_GROUP, FIRST_COORDINATOR_GROUP, MAX_COORDINATORS, damage, exchanges};
use crate::broker::queue::QueueLimits;
use crate::broker::{Generator, TopicConfig};
use crate::exchange::{ExchangeKind, store_of};

const DEFAULT_REPLICAS: u32 = 3;
/// Queues one topic may have.
pub const MAX_QUEUES: u32 = 4096;
pub const MAX_REPLICAS: u32 = 7;
/// A batch with one message of this size still fits every buffer on its way.
pub const MAX_MESSAGE_BYTES: u64 = 16 << 20;

/// Applies commands and publishes what they made after each run of them.
#[derive(Debug)]
pub struct CatalogMachine {
    state: CatalogState,
    published: watch::Sender<Arc<CatalogState>>,
}

impl CatalogMachine {
    pub fn new(published: watch::Sender<Arc<CatalogState>>) -> Self {
        Self {
            state: CatalogState::default(),
            published,
        }
    }

    fn publish(&self) {
        let version = self.state.version;
        self.published.send_if_modified(|last| {
            // A new replica of the catalog begins with nothing, and is no reason to forget.
            let moved = last.version < version;
            if moved {
                *last = Arc::new(self.state.clone());
            }
            moved
        });
    }

    fn execute(&mut self, command: CatalogCommand) -> CatalogReply {
        match command {
            CatalogCommand::Bootstrap {
                cluster_id,
                nodes,
                coordinators,
                limits,
            } => self.bootstrap(cluster_id, nodes, coordinators, limits),
            CatalogCommand::RegisterNode {
                node,
                url,
                peer_addr,
                uuid,
                version,
            } => self.register(
                node,
                NodeEntry {
                    url,
                    peer_addr,
                    uuid,
                    version,
                    quarantine: None,
                },
            ),
            CatalogCommand::CreateTopic {
                name,
                config,
                avoid,
            } => self.create(name, config, &avoid),
            CatalogCommand::UpdateTopic {
                name,
                change,
                avoid,
            } => self.update(&name, &change, &avoid),
            CatalogCommand::SetGenerator { name, generator } => {
                self.set_generator(&name, generator)
            }
            CatalogCommand::DeleteTopic { name } => self.delete(&name),
            CatalogCommand::RaiseEpoch { group, from } => self.raise_epoch(group, from),
            CatalogCommand::GiveUp { node, what } => self.give_up(node, &what),
            CatalogCommand::Filled { group, replica } => {
                self.state.version += u64::from(damage::filled(&mut self.state, group, replica));
                CatalogReply::Done
            }
            CatalogCommand::PutExchange { name, kind, avoid } => {
                self.put_exchange(name, kind, &avoid)
            }
            CatalogCommand::DeleteExchange { name } => self.delete_exchange(&name),
            CatalogCommand::PutBinding {
                exchange,
                topic,
                binding,
            } => exchanges::bind(&mut self.state, &exchange, &topic, binding),
            CatalogCommand::DeleteBinding { exchange, topic } => {
                exchanges::unbind(&mut self.state, &exchange, &topic)
            }
        }
    }

    fn bootstrap(
        &mut self,
        cluster_id: String,
        nodes: Vec<(u64, String)>,
        coordinators: u32,
        limits: QueueLimits,
    ) -> CatalogReply {
        if self.state.cluster_id.is_some() {
            return CatalogReply::Done;
        }
        if nodes.is_empty() || coordinators == 0 || coordinators > MAX_COORDINATORS {
            return CatalogReply::Invalid(format!(
                "a cluster needs a node and 1 to {MAX_COORDINATORS} coordinators"
            ));
        }
        for (node, peer_addr) in nodes {
            let entry = NodeEntry {
                url: String::new(),
                peer_addr,
                uuid: String::new(),
                version: String::new(),
                quarantine: None,
            };
            self.state.nodes.insert(node, entry);
        }
        let own = self.state.nodes.keys().map(|node| (*node, *node));
        self.state.catalog = GroupPlacement::found(CATALOG_GROUP.0, own.collect());
        let replicas = DEFAULT_REPLICAS.min(self.node_count());
        self.state.coordinators = place(
            &mut self.state,
            FIRST_COORDINATOR_GROUP,
            coordinators,
            replicas,
            &[],
        );
        self.state.cluster_id = Some(cluster_id);
        self.state.limits = limits;
        self.state.version += 1;
        CatalogReply::Done
    }

    fn register(&mut self, node: u64, mut entry: NodeEntry) -> CatalogReply {
        if self.state.cluster_id.is_none() {
            return CatalogReply::NotReady;
        }
        if let Some(known) = self.state.nodes.get(&node) {
            if !known.uuid.is_empty() && known.uuid != entry.uuid {
                return CatalogReply::OtherDisk {
                    known: known.uuid.clone(),
                };
            }
            entry.quarantine.clone_from(&known.quarantine);
            if *known == entry {
                return CatalogReply::Done;
            }
        }
        self.state.nodes.insert(node, entry);
        self.state.version += 1;
        CatalogReply::Done
    }

    fn create(&mut self, name: String, mut config: TopicConfig, avoid: &[u64]) -> CatalogReply {
        if self.state.cluster_id.is_none() {
            return CatalogReply::NotReady;
        }
        let available = self.node_count();
        let known = self.state.topic(&name);
        if config.replicas == 0 {
            config.replicas = known.map_or(DEFAULT_REPLICAS.min(available), |t| t.config.replicas);
        }
        if config.hash_queues == 0 {
            config.hash_queues = known.map_or(config.queues, |t| t.config.hash_queues);
        }
        if let Some(known) = known {
            return match known.config == config {
                true => CatalogReply::Exists(known.id),
                false => CatalogReply::Conflict,
            };
        }
        if let Err(reason) = check(&config) {
            return CatalogReply::Invalid(reason);
        }
        if config.replicas > available {
            return CatalogReply::NotEnoughNodes {
                available,
                required: config.replicas,
            };
        }
        let id = self.state.next_topic;
        self.state.next_topic += 1;
        let mut topic = Topic {
            id,
            name: name.clone(),
            queues: Vec::new(),
            config,
        };
        self.grow(&mut topic, avoid);
        self.state.topics.insert(id, Arc::new(topic));
        self.state.names.insert(name, id);
        self.state.version += 1;
        CatalogReply::Created(id)
    }

    /// Places the queues that the configuration asks for beyond those that are there.
    fn grow(&mut self, topic: &mut Topic, avoid: &[u64]) {
        let have = topic.queues.len() as u32;
        let more = topic.config.queues.saturating_sub(have);
        let first = self.state.next_group;
        self.state.next_group += u64::from(more);
        let placed = place(&mut self.state, first, more, topic.config.replicas, avoid);
        for (queue, placement) in (have..).zip(&placed) {
            let owner = (topic.id, queue);
            self.state.queue_groups.insert(placement.group, owner);
        }
        topic.queues.extend(placed);
    }

    fn update(&mut self, name: &str, change: &TopicChange, avoid: &[u64]) -> CatalogReply {
        let Some(known) = self.state.topic(name) else {
            return CatalogReply::NotFound;
        };
        let mut topic = Topic::clone(known);
        let config = &mut topic.config;
        if let Some(queues) = change.queues {
            if queues < config.queues {
                return CatalogReply::Invalid(format!(
                    "queues can only grow: the topic has {}, {queues} were asked for",
                    config.queues
                ));
            }
            config.queues = queues;
        }
        config.retention = change.retention.unwrap_or(config.retention);
        config.max_message_bytes = change.max_message_bytes.unwrap_or(config.max_message_bytes);
        config.backlog = change.backlog.unwrap_or(config.backlog);
        config.quota = change.quota.unwrap_or(config.quota);
        config.ttl_ms = change.ttl_ms.unwrap_or(config.ttl_ms);
        config.trace = change.trace.unwrap_or(config.trace);
        config.flush = change.flush.unwrap_or(config.flush);
        config.hash_queues = change.hash_queues.unwrap_or(config.hash_queues);
        if let Err(reason) = check(config) {
            return CatalogReply::Invalid(reason);
        }
        if topic == **known {
            return CatalogReply::Exists(topic.id);
        }
        self.grow(&mut topic, avoid);
        let id = topic.id;
        self.state.topics.insert(id, Arc::new(topic));
        self.state.version += 1;
        CatalogReply::Exists(id)
    }

    fn set_generator(&mut self, name: &str, generator: Option<Generator>) -> CatalogReply {
        let Some(id) = self.state.names.get(name).copied() else {
            return CatalogReply::NotFound;
        };
        let Some(generator) = generator else {
            let removed = self.state.generators.remove(&id);
            self.state.version += u64::from(removed.is_some());
            return CatalogReply::Done;
        };
        let bytes = generator.value.len();
        if !Generator::RATES_PER_1000_S.contains(&generator.per_1000_s)
            || bytes > Generator::MAX_VALUE_BYTES
        {
            return CatalogReply::Invalid(format!(
                "a generator makes 0.001 to 10000 messages a second of at most {} bytes",
                Generator::MAX_VALUE_BYTES
            ));
        }
        if self.state.generators.get(&id) != Some(&generator) {
            self.state.generators.insert(id, generator);
            self.state.version += 1;
        }
        CatalogReply::Done
    }

    fn delete(&mut self, name: &str) -> CatalogReply {
        let Some(id) = self.state.names.remove(name) else {
            return CatalogReply::NotFound;
        };
        self.state.generators.remove(&id);
        if let Some(topic) = self.state.topics.remove(&id) {
            for placement in &topic.queues {
                self.state.queue_groups.remove(&placement.group);
            }
        }
        exchanges::forget_topic(&mut self.state, id);
        self.state.version += 1;
        CatalogReply::Done
    }

    fn put_exchange(&mut self, name: String, kind: ExchangeKind, avoid: &[u64]) -> CatalogReply {
        if let Some(known) = self.state.exchanges.get(&name) {
            return match known.kind == kind {
                true => CatalogReply::Exists(known.store),
                false => CatalogReply::Conflict,
            };
        }
        let created = self.create(store_of(&name), exchanges::store_config(), avoid);
        if let CatalogReply::Created(store) = created {
            exchanges::add(&mut self.state, name, kind, store);
        }
        created
    }

    /// The exchange with what was published to it and not brought to the bound topics yet.
    fn delete_exchange(&mut self, name: &str) -> CatalogReply {
        if self.state.exchanges.remove(name).is_none() {
            return CatalogReply::ExchangeNotFound;
        }
        self.delete(&store_of(name))
    }

    fn raise_epoch(&mut self, group: u64, from: u64) -> CatalogReply {
        let owner = self.state.queue_groups.get(&group).copied();
        let topic = owner.and_then(|(topic, _)| self.state.topics.get_mut(&topic));
        let Some(topic) = topic else {
            return CatalogReply::NotFound;
        };
        let mut queues = topic.queues.iter().filter(|queue| queue.group == group);
        if queues.any(|queue| queue.epoch == from) {
            let queues = &mut Arc::make_mut(topic).queues;
            for queue in queues.iter_mut().filter(|queue| queue.group == group) {
                queue.epoch += 1;
            }
            self.state.version += 1;
        }
        CatalogReply::Done
    }

    fn give_up(&mut self, node: u64, what: &GivenUp) -> CatalogReply {
        if self.state.cluster_id.is_none() {
            return CatalogReply::NotReady;
        }
        self.state.version += u64::from(damage::give_up(&mut self.state, node, what));
        CatalogReply::GivenUp {
            catalog: self.state.catalog.clone(),
        }
    }

    fn node_count(&self) -> u32 {
        self.state.nodes.len() as u32
    }

    fn encode(&self) -> Vec<u8> {
        // Maps and numbers into memory: there is no way to fail.
        postcard::to_stdvec(&self.state).unwrap_or_default()
    }

    fn load(&mut self, state: Option<&[u8]>) -> Result<(), StorageError> {
        self.state = match state {
            None => CatalogState::default(),
            Some(bytes) => postcard::from_bytes(bytes).map_err(|e| {
                StorageError::InvalidArgument(format!("the catalog's state cannot be read: {e}"))
            })?,
        };
        self.publish();
        Ok(())
    }
}

/// Says which bound a topic's configuration breaks.
fn check(config: &TopicConfig) -> Result<(), String> {
    let within = |what: &str, value: u64, low: u64, high: u64| match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(format!(
            "{what} must lie between {low} and {high}, not {value}"
        )),
    };
    within("queues", config.queues.into(), 1, MAX_QUEUES.into())?;
    within("replicas", config.replicas.into(), 1, MAX_REPLICAS.into())?;
    let most = config.queues.into();
    within("hash_queues", config.hash_queues.into(), 1, most)?;
    within(
        "max_message_bytes",
        config.max_message_bytes,
        1,
        MAX_MESSAGE_BYTES,
    )
}

impl StateMachine for CatalogMachine {
    fn apply(&mut self, log_id: LogId, body: &Bytes) -> Bytes {
        let reply = match postcard::from_bytes(body) {
            Ok(command) => self.execute(command),
            Err(error) => {
                tracing::error!(%log_id, %error, "a catalog command that cannot be read");
                CatalogReply::Invalid("the command cannot be read".to_owned())
            }
        };
        postcard::to_stdvec(&reply).unwrap_or_default().into()
    }

    fn applied_batch(&mut self, _applied: LogId) {
        self.publish();
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, StorageError> {
        Ok(self.encode())
    }

    fn restore(&mut self, _last: Option<LogId>, state: Option<&[u8]>) -> Result<(), StorageError> {
        self.load(state)
    }

    fn install(&mut self, _last: LogId, state: &[u8]) -> Result<(), StorageError> {
        self.load(Some(state))
    }

    fn state_hash(&self) -> u64 {
        xxh3_64(&self.encode())
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
