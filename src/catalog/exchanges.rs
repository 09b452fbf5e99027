//! Exchanges in the catalog. Changes of its state, which [`super::machine`] applies.
//!
//! An exchange lives and dies with the internal topic that keeps what is published to it; a binding
//! with the topic that it leads to.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::command::CatalogReply;
use super::state::{CatalogState, TopicId};
use crate::broker::{Retention, TopicConfig};
use crate::exchange::{Binding, Exchange, ExchangeKind};

/// Queues of an exchange's internal topic: so much is forwarded side by side.
const STORE_QUEUES: u32 = 4;

/// What is published stays until every topic has it, however long one of them can't take it.
pub(super) fn store_config() -> TopicConfig {
    TopicConfig {
        queues: STORE_QUEUES,
        replicas: 0,
        hash_queues: 0,
        retention: Retention {
            max_age_ms: None,
            max_bytes: None,
        },
        // The topics' own limits are what counts.
        max_message_bytes: super::machine::MAX_MESSAGE_BYTES,
        ..TopicConfig::default()
    }
}

pub(super) fn add(state: &mut CatalogState, name: String, kind: ExchangeKind, store: TopicId) {
    let exchange = Exchange {
        name: name.clone(),
        kind,
        store,
        bindings: BTreeMap::new(),
        narrowed: false,
    };
    state.exchanges.insert(name, Arc::new(exchange));
    state.version += 1;
}

pub(super) fn bind(
    state: &mut CatalogState,
    exchange: &str,
    topic: &str,
    binding: Binding,
) -> CatalogReply {
    let topic = state.names.get(topic).copied();
    let Some(exchange) = state.exchanges.get_mut(exchange) else {
        return CatalogReply::ExchangeNotFound;
    };
    let Some(topic) = topic else {
        return CatalogReply::NotFound;
    };
    if let Err(reason) = binding.check(exchange.kind) {
        return CatalogReply::Invalid(reason);
    }
    let known = exchange.bindings.get(&topic);
    if known == Some(&binding) {
        return CatalogReply::Exists(topic);
    }
    let replaced = known.is_some();
    let exchange = Arc::make_mut(exchange);
    exchange.narrowed |= replaced;
    exchange.bindings.insert(topic, binding);
    state.version += 1;
    match replaced {
        true => CatalogReply::Exists(topic),
        false => CatalogReply::Created(topic),
    }
}

pub(super) fn unbind(state: &mut CatalogState, exchange: &str, topic: &str) -> CatalogReply {
    let topic = state.names.get(topic).copied();
    let Some(exchange) = state.exchanges.get_mut(exchange) else {
        return CatalogReply::ExchangeNotFound;
    };
    let Some(topic) = topic else {
        return CatalogReply::NotFound;
    };
    if !exchange.bindings.contains_key(&topic) {
        return CatalogReply::BindingNotFound;
    }
    let exchange = Arc::make_mut(exchange);
    exchange.bindings.remove(&topic);
    exchange.narrowed = true;
    state.version += 1;
    CatalogReply::Done
}

/// A deleted topic is bound to nothing. One made later under its name is another.
pub(super) fn forget_topic(state: &mut CatalogState, topic: TopicId) {
    for exchange in state.exchanges.values_mut() {
        if exchange.bindings.contains_key(&topic) {
            let exchange = Arc::make_mut(exchange);
            exchange.bindings.remove(&topic);
            exchange.narrowed = true;
        }
    }
}
