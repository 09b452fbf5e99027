//! Exchanges: made, bound, published to, and their messages brought to the bound topics.
//!
//! A message is stored once, in a queue of the exchange's internal topic, together with its routes:
//! that is what a publisher waits for. The forwarder of that queue, on its leader, brings it to
//! each topic; the queue there knows what it has of each source, so a repetition is never stored.

mod forward;
mod publish;
mod routes;

pub use publish::{PublishAnswer, PublishRequest, Published};

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::route::{Backoff, NO_LEADER};
use super::{Broker, BrokerError, BrokerResult};
use crate::catalog::{CatalogCommand, CatalogReply, CatalogState, TopicId};
use crate::exchange::{Binding, Exchange, ExchangeKind};
use crate::peer::{PeerRequest, PeerResult};

/// How long a change of bindings waits for the other nodes to know of it.
const ANNOUNCE_PATIENCE: Duration = Duration::from_secs(1);

/// An exchange as it is told to users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExchangeDescription {
    pub name: String,
    pub kind: ExchangeKind,
    /// By the topics' names.
    pub bindings: Vec<BindingDescription>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindingDescription {
    pub topic: String,
    pub binding: Binding,
}

impl Broker {
    /// Creates an exchange, or finds the same one there; true when it was created now.
    pub async fn put_exchange(
        &self,
        name: &str,
        kind: ExchangeKind,
    ) -> BrokerResult<(ExchangeDescription, bool)> {
        check_exchange_name(name)?;
        let deadline = Instant::now() + self.config.create_timeout;
        let command = CatalogCommand::PutExchange {
            name: name.to_owned(),
            kind,
            avoid: self.dead_nodes(),
        };
        let mut backoff = Backoff::until(deadline);
        let (store, created) = loop {
            match self.change_catalog(&command).await? {
                CatalogReply::Created(id) => break (id, true),
                CatalogReply::Exists(id) => break (id, false),
                CatalogReply::NotReady if backoff.wait().await => {}
                other => return Err(refused(name, "", other)),
            }
        };
        self.settle(store, deadline).await?;
        Ok((self.exchange(name).await?, created))
    }

    /// Deletes an exchange with what was published to it and is not brought to its topics yet.
    pub async fn delete_exchange(&self, name: &str) -> BrokerResult<()> {
        check_exchange_name(name)?;
        let known = self.find_exchange(name).await.ok();
        let command = CatalogCommand::DeleteExchange {
            name: name.to_owned(),
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Done => {
                self.announce().await;
                if let Some(exchange) = known {
                    self.forget_progress(&exchange).await;
                }
                Ok(())
            }
            other => Err(refused(name, "", other)),
        }
    }

    /// What stays behind where this fails is small and in nobody's way.
    async fn forget_progress(&self, deleted: &Exchange) {
        match self.forget_group(&progress_group(deleted.store)).await {
            Ok(()) | Err(BrokerError::ConsumerGroupNotFound { .. }) => {}
            Err(error) => {
                tracing::debug!(%error, "the progress of a deleted exchange is not forgotten");
            }
        }
    }

    /// All exchanges, by name.
    pub async fn exchanges(&self) -> Vec<ExchangeDescription> {
        self.freshen().await;
        let catalog = self.catalog();
        let exchanges = catalog.exchanges.values();
        exchanges.map(|e| description(&catalog, e)).collect()
    }

    pub async fn exchange(&self, name: &str) -> BrokerResult<ExchangeDescription> {
        self.freshen().await;
        let exchange = self.find_exchange(name).await?;
        Ok(description(&self.catalog(), &exchange))
    }

    /// Binds a topic, or replaces its binding; true when it was not bound before.
    pub async fn bind(
        &self,
        exchange: &str,
        topic: &str,
        binding: Binding,
    ) -> BrokerResult<(BindingDescription, bool)> {
        check_exchange_name(exchange)?;
        // Before the catalog is asked, for the name's sake.
        self.find_topic(topic).await?;
        let command = CatalogCommand::PutBinding {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
            binding: binding.clone(),
        };
        let created = match self.change_catalog(&command).await? {
            CatalogReply::Created(_) => true,
            CatalogReply::Exists(_) => false,
            other => return Err(refused(exchange, topic, other)),
        };
        self.announce().await;
        let topic = topic.to_owned();
        Ok((BindingDescription { topic, binding }, created))
    }

    pub async fn binding(&self, exchange: &str, topic: &str) -> BrokerResult<BindingDescription> {
        self.find_topic(topic).await?;
        let bindings = self.exchange(exchange).await?.bindings;
        let found = bindings.into_iter().find(|bound| bound.topic == topic);
        found.ok_or_else(|| BrokerError::BindingNotFound {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
        })
    }

    pub async fn unbind(&self, exchange: &str, topic: &str) -> BrokerResult<()> {
        check_exchange_name(exchange)?;
        let command = CatalogCommand::DeleteBinding {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
        };
        match self.change_catalog(&command).await? {
            CatalogReply::Done => {
                self.announce().await;
                Ok(())
            }
            other => Err(refused(exchange, topic, other)),
        }
    }

    /// The exchange of that name; its absence is proved before it is told.
    async fn find_exchange(&self, name: &str) -> BrokerResult<Arc<Exchange>> {
        check_exchange_name(name)?;
        self.trust_catalog().await;
        if let Some(exchange) = self.catalog().exchanges.get(name) {
            return Ok(exchange.clone());
        }
        self.catalog_barrier().await?;
        let found = self.catalog().exchanges.get(name).cloned();
        found.ok_or_else(|| not_found(name))
    }

    /// Waits until the nodes that are up know what this one knows of the catalog: whoever saw a
    /// binding acknowledged may publish through any of them. A node that can't be reached now
    /// learns it later.
    async fn announce(&self) {
        if let Err(error) = self.catalog_barrier().await {
            tracing::debug!(%error, "a change of bindings is not announced");
            return;
        }
        let catalog = self.catalog();
        let version = catalog.version;
        let others = catalog.nodes.keys().copied();
        let others = others.filter(|node| *node != self.node_id() && !self.is_down(*node));
        let request = PeerRequest::AwaitCatalog {
            version,
            timeout_ms: ANNOUNCE_PATIENCE.as_millis() as u64,
        };
        join_all(others.map(|node| {
            let request = &request;
            async move {
                let answer: PeerResult<()> = self.ask(node, request, ANNOUNCE_PATIENCE).await;
                if let Err(error) = answer {
                    tracing::debug!(node, %error, "a node may not know the newest bindings");
                }
            }
        }))
        .await;
    }

    /// Returns when this node knows that version of the catalog, or the time is over.
    pub(crate) async fn await_catalog_here(&self, version: u64, patience: Duration) {
        let mut catalog = self.catalog.clone();
        let known = catalog.wait_for(|state| state.version >= version);
        timeout(patience, known).await.ok();
    }
}

/// The internal consumer group under which the forwarders of an exchange save how far they are.
fn progress_group(store: TopicId) -> String {
    format!("_exchange.{store}")
}

fn description(catalog: &CatalogState, exchange: &Exchange) -> ExchangeDescription {
    let bindings = exchange.bindings.iter().filter_map(|(topic, binding)| {
        Some(BindingDescription {
            topic: catalog.topics.get(topic)?.name.clone(),
            binding: binding.clone(),
        })
    });
    let mut bindings: Vec<_> = bindings.collect();
    bindings.sort_by(|a, b| a.topic.cmp(&b.topic));
    ExchangeDescription {
        name: exchange.name.clone(),
        kind: exchange.kind,
        bindings,
    }
}

fn check_exchange_name(name: &str) -> BrokerResult<()> {
    if crate::names::is_valid_name(name) {
        return Ok(());
    }
    let rule = crate::names::NAME_RULE;
    Err(BrokerError::InvalidName(format!(
        "exchange name {name:?} is not valid: a name has {rule}"
    )))
}

fn not_found(exchange: &str) -> BrokerError {
    BrokerError::ExchangeNotFound {
        exchange: exchange.to_owned(),
    }
}

fn refused(exchange: &str, topic: &str, reply: CatalogReply) -> BrokerError {
    let (exchange, topic) = (exchange.to_owned(), topic.to_owned());
    match reply {
        CatalogReply::Conflict => BrokerError::ExchangeExists { exchange },
        CatalogReply::ExchangeNotFound => BrokerError::ExchangeNotFound { exchange },
        CatalogReply::BindingNotFound => BrokerError::BindingNotFound { exchange, topic },
        CatalogReply::NotFound => BrokerError::TopicNotFound { topic },
        CatalogReply::Invalid(text) => BrokerError::InvalidRequest(text),
        CatalogReply::NotReady => NO_LEADER,
        other => BrokerError::Internal(format!("unexpected answer of the catalog: {other:?}")),
    }
}
