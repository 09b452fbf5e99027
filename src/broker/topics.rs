//! Topics: create, describe, change, delete. The catalog decides; this waits until it is true here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::partition::queue_of_key;
use super::route::{Backoff, NO_LEADER};
use super::{
    Broker, BrokerError, BrokerResult, Outcome, QueueDescription, TopicConfig, TopicDescription,
    TopicPatch,
};
use crate::catalog::{CATALOG_GROUP, CatalogCommand, CatalogReply, Topic, TopicChange, TopicId};
use crate::peer::GroupView;

/// How long a listing waits for the newest catalog before it shows the one it has.
const FRESHNESS_PATIENCE: Duration = Duration::from_millis(500);

impl Broker {
    /// Creates a topic, or finds the same one there; returns when every queue has a leader.
    pub async fn create_topic(
        &self,
        name: &str,
        config: TopicConfig,
    ) -> BrokerResult<(TopicDescription, bool /* created now */)> {
        check_own_name(name)?;
        let deadline = Instant::now() + self.config.create_timeout;
        let command = CatalogCommand::CreateTopic {
            name: name.to_owned(),
            config,
            avoid: self.dead_nodes(),
        };
        let mut backoff = Backoff::until(deadline);
        let (id, created) = loop {
            match self.change_catalog(&command).await? {
                CatalogReply::Created(id) => break (id, true),
                CatalogReply::Exists(id) => break (id, false),
                CatalogReply::Conflict => {
                    let topic = name.to_owned();
                    return Err(BrokerError::TopicExists { topic });
                }
                CatalogReply::NotReady if backoff.wait().await => {}
                other => return Err(refused(name, other)),
            }
        };
        let (topic, views) = self.settle(id, deadline).await?;
        Ok((description(&topic, &views), created))
    }

    /// The server's own topic of that name, made if it isn't there; its configuration is then the
    /// one it has. Returns when every queue has a leader.
    pub(super) async fn ensure_internal_topic(
        &self,
        name: &str,
        config: TopicConfig,
    ) -> BrokerResult<Arc<Topic>> {
        if let Some(topic) = self.catalog().topic(name) {
            return Ok(topic.clone());
        }
        let deadline = Instant::now() + self.config.create_timeout;
        let command = CatalogCommand::CreateTopic {
            name: name.to_owned(),
            config,
            avoid: self.dead_nodes(),
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Created(id) | CatalogReply::Exists(id) => {
                Ok(self.settle(id, deadline).await?.0)
            }
            // Made by another node meanwhile, or changed by a user since.
            CatalogReply::Conflict => {
                self.catalog_barrier().await?;
                self.catalog().topic(name).cloned().ok_or(NO_LEADER)
            }
            other => Err(refused(name, other)),
        }
    }

    /// All topics that users may see, by name.
    pub async fn topics(&self) -> BrokerResult<Vec<TopicDescription>> {
        self.freshen().await;
        let catalog = self.catalog();
        let shown = |topic: &&Arc<Topic>| crate::names::is_readable_topic(&topic.name);
        let mut topics: Vec<_> = catalog.topics.values().filter(shown).cloned().collect();
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        let groups: Vec<u64> = topics
            .iter()
            .flat_map(|t| t.queues.iter().map(|q| q.group))
            .collect();
        let views = self.describe(&groups).await;
        Ok(topics.iter().map(|t| description(t, &views)).collect())
    }

    pub async fn topic(&self, name: &str) -> BrokerResult<TopicDescription> {
        self.freshen().await;
        let topic = self.find_topic(name).await?;
        Ok(self.describe_topic(&topic).await)
    }

    /// The queue that messages with this key go to.
    pub async fn queue_of_key(&self, name: &str, key: &str) -> BrokerResult<u32> {
        let topic = self.find_topic(name).await?;
        Ok(queue_of_key(key.as_bytes(), topic.config.hash_queues))
    }

    /// Changes a topic; returns when new queues have leaders.
    pub async fn update_topic(
        &self,
        name: &str,
        patch: TopicPatch,
    ) -> BrokerResult<TopicDescription> {
        let topic = self.find_topic(name).await?;
        if patch.flush.is_some_and(|flush| flush != topic.config.flush) {
            let text = "flush is fixed when a topic is created; create another topic";
            return Err(BrokerError::InvalidRequest(text.to_owned()));
        }
        let deadline = Instant::now() + self.config.create_timeout;
        let command = CatalogCommand::UpdateTopic {
            name: name.to_owned(),
            change: TopicChange {
                queues: patch.queues,
                retention: patch.retention,
                max_message_bytes: patch.max_message_bytes,
                backlog: patch.backlog,
                quota: patch.quota,
                ttl_ms: patch.ttl_ms,
                trace: patch.trace,
                flush: patch.flush,
                hash_queues: patch.hash_queues,
            },
            avoid: self.dead_nodes(),
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Exists(id) => {
                let (topic, views) = self.settle(id, deadline).await?;
                Ok(description(&topic, &views))
            }
            other => Err(refused(name, other)),
        }
    }

    /// Deletes a topic with all its messages.
    pub async fn delete_topic(&self, name: &str) -> BrokerResult<()> {
        let command = CatalogCommand::DeleteTopic {
            name: name.to_owned(),
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Done => {
                self.freshen().await;
                Ok(())
            }
            other => Err(refused(name, other)),
        }
    }

    /// Puts a command to the catalog, wherever it is led.
    pub(crate) async fn change_catalog(
        &self,
        command: &CatalogCommand,
    ) -> BrokerResult<CatalogReply> {
        // Plain data into memory: there is no way to fail.
        let body = postcard::to_stdvec(command).unwrap_or_default();
        let reply = self.propose(CATALOG_GROUP.0, body.into()).await?;
        postcard::from_bytes(&reply).map_err(|e| BrokerError::Internal(e.to_string()))
    }

    /// Waits until the topic is in the local catalog and every queue has a leader; gives what was
    /// seen then.
    pub(super) async fn settle(
        &self,
        id: TopicId,
        deadline: Instant,
    ) -> BrokerResult<(Arc<Topic>, HashMap<u64, GroupView>)> {
        let late = BrokerError::NoLeader {
            outcome: Outcome::Unknown,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let catalog = self.local_group(CATALOG_GROUP.0).ok_or(NO_LEADER)?;
        catalog.read_barrier(left).await.map_err(|_| late.clone())?;
        let mut backoff = Backoff::until(deadline);
        loop {
            // Changed or deleted meanwhile: what is there now counts.
            let Some(topic) = self.catalog().topics.get(&id).cloned() else {
                return Err(late);
            };
            let groups: Vec<u64> = topic.queues.iter().map(|q| q.group).collect();
            let views = self.describe(&groups).await;
            // Only the leader itself lists who is in sync.
            let led = |group: &u64| views.get(group).is_some_and(|v| !v.in_sync.is_empty());
            if groups.iter().all(led) {
                return Ok((topic, views));
            }
            if !backoff.wait().await {
                return Err(late);
            }
        }
    }

    async fn describe_topic(&self, topic: &Topic) -> TopicDescription {
        let groups: Vec<u64> = topic.queues.iter().map(|q| q.group).collect();
        description(topic, &self.describe(&groups).await)
    }

    /// Has the local catalog catch up, if that is possible soon.
    pub(super) async fn freshen(&self) {
        if let Some(catalog) = self.local_group(CATALOG_GROUP.0)
            && let Err(error) = catalog.read_barrier(FRESHNESS_PATIENCE).await
        {
            tracing::debug!(%error, "showing the catalog as it is known here");
        }
    }

    pub(super) fn dead_nodes(&self) -> Vec<u64> {
        let nodes = self.catalog();
        nodes
            .nodes
            .keys()
            .copied()
            .filter(|n| self.is_down(*n))
            .collect()
    }
}

/// What users create and write to has a name of theirs.
pub(super) fn check_own_name(name: &str) -> BrokerResult<()> {
    if crate::names::is_valid_name(name) {
        return Ok(());
    }
    let rule = crate::names::NAME_RULE;
    Err(BrokerError::InvalidName(format!(
        "topic name {name:?} is not valid here: a name has {rule}"
    )))
}

fn description(
    topic: &Topic,
    views: &std::collections::HashMap<u64, crate::peer::GroupView>,
) -> TopicDescription {
    let queues = topic.queues.iter().zip(0u32..).map(|(placement, queue)| {
        let view = views.get(&placement.group);
        let mut replicas: Vec<_> = placement.nodes().collect();
        replicas.sort_unstable();
        QueueDescription {
            queue,
            leader: view.and_then(|v| v.leader),
            term: view.map_or(0, |v| v.term),
            replicas,
            in_sync: view.map(|v| v.in_sync.clone()).unwrap_or_default(),
            earliest_offset: view.map_or(0, |v| v.earliest),
            end_offset: view.map_or(0, |v| v.end),
            epoch: placement.epoch,
        }
    });
    TopicDescription {
        name: topic.name.clone(),
        config: topic.config.clone(),
        queues: queues.collect(),
    }
}

fn refused(name: &str, reply: CatalogReply) -> BrokerError {
    match reply {
        CatalogReply::NotFound => BrokerError::TopicNotFound {
            topic: name.to_owned(),
        },
        CatalogReply::NotEnoughNodes {
            available,
            required,
        } => BrokerError::NotEnoughReplicas {
            available: available as usize,
            required: required as usize,
        },
        CatalogReply::Invalid(text) => BrokerError::InvalidRequest(text),
        CatalogReply::NotReady => NO_LEADER,
        other => BrokerError::Internal(format!("unexpected answer of the catalog: {other:?}")),
    }
}
