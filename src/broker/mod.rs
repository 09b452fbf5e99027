//! The broker: topics, produce, consume and committed offsets, over Raft groups.
//!
//! Any node answers any request. What a request needs is found in the local copy of the catalog;
//! what needs a leader goes to its node (`route`), and is tried again only where nobody can have
//! taken it.

mod backlog;
mod batcher;
mod cancel;
mod cluster;
mod config;
mod delay;
mod deliver;
mod describe;
mod encode;
mod error;
mod events;
pub(crate) mod exchanges;
mod fetch;
mod fetch_many;
mod generate;
pub mod groups;
pub mod leases;
pub(crate) mod local;
mod lost_tails;
mod message_id;
mod offsets;
mod one_way;
mod partition;
mod produce;
mod producers;
pub mod queue;
pub mod quota;
mod read;
mod reset;
mod retention;
mod route;
mod search;
pub mod selection;
mod soon;
mod topics;
mod trace;
mod transactions;
mod trust;
pub(crate) mod ttl;
mod types;

#[cfg(test)]
mod cluster_tests;
#[cfg(test)]
mod held_tests;
#[cfg(test)]
mod path_tests;
#[cfg(test)]
mod state_path_tests;
#[cfg(test)]
mod testing;

pub use cancel::Cancelled;
pub use config::BrokerConfig;
pub use delay::Delay;
pub use encode::records_in;
pub use error::{BrokerError, Outcome};
pub use exchanges::{
    BindingDescription, ExchangeDescription, PublishAnswer, PublishRequest, Published,
};
pub use message_id::{MessagePlace, message_id, parse_message_id};
pub use search::{Cursor, Found, LookupAnswer, LookupRequest, SearchRequest};
pub use selection::{MAX_FILTER_BYTES, Selection};
pub use trace::{MessageTrace, TraceEvent, TraceKind};
pub use transactions::{
    BeginTransaction, TransactionMessage, TransactionOffset, TransactionQuery, TransactionResult,
    WebhookPolicy, check_webhook_allowed, parse_transaction_id, transaction_results,
    transaction_text,
};
pub use ttl::MAX_TTL_MS;
pub use types::*;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use parking_lot::Mutex;
use quorate_raft::RaftHost;
use quorate_storage::commit_log::CommitLog;
use tokio::sync::{Semaphore, broadcast, watch};

use crate::catalog::{CATALOG_GROUP, CatalogState};
use crate::metrics::Metrics;
use backlog::Positions;
use leases::Turns;
use local::LocalGroups;
use producers::AttachCache;
use quota::TopicQuotas;

pub type BrokerResult<T> = Result<T, BrokerError>;

/// Cluster events kept for a subscriber that is slow.
const EVENT_BACKLOG: usize = 1024;

/// What a broker stands on; made by [`crate::node::Node`].
#[derive(Debug, Clone)]
pub struct BrokerParts {
    pub host: Arc<RaftHost>,
    pub log: CommitLog,
    pub catalog: watch::Receiver<Arc<CatalogState>>,
    pub local: Arc<LocalGroups>,
    pub config: BrokerConfig,
    pub metrics: Arc<Metrics>,
}

/// One node's broker. Any node answers any request: what needs a leader is forwarded inside.
pub struct Broker {
    host: Arc<RaftHost>,
    log: CommitLog,
    catalog: watch::Receiver<Arc<CatalogState>>,
    local: Arc<LocalGroups>,
    config: Arc<BrokerConfig>,
    metrics: Arc<Metrics>,
    events: broadcast::Sender<ClusterEvent>,
    /// Who was last seen to lead a group that has no replica here.
    hints: Mutex<HashMap<u64, NodeId>>,
    attached: AttachCache,
    sessions: Arc<groups::Sessions>,
    round_robin: AtomicU32,
    lease_turns: Turns,
    redrive_turns: Turns,
    positions: Positions,
    trust: Arc<trust::CatalogTrust>,
    quotas: TopicQuotas,
    /// One-way requests under way.
    one_way: Arc<Semaphore>,
    tracer: trace::Tracer,
    unreachable: transactions::Unreachable,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Broker(node {})", self.host.node_id())
    }
}

impl Broker {
    /// A broker over groups that the node opens and closes beside it.
    pub fn new(parts: BrokerParts) -> Arc<Self> {
        let broker = Arc::new(Self {
            host: parts.host,
            log: parts.log,
            catalog: parts.catalog,
            local: parts.local,
            config: Arc::new(parts.config),
            metrics: parts.metrics,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            hints: Mutex::default(),
            attached: AttachCache::default(),
            sessions: Arc::default(),
            round_robin: AtomicU32::new(0),
            lease_turns: Turns::default(),
            redrive_turns: Turns::default(),
            positions: Positions::default(),
            trust: Arc::default(),
            quotas: TopicQuotas::default(),
            one_way: Arc::new(Semaphore::new(one_way::AT_ONCE)),
            tracer: trace::Tracer::default(),
            unreachable: transactions::Unreachable::default(),
        });
        events::start(&broker);
        groups::start(&broker);
        broker.metrics.collect_groups(broker.sessions.clone());
        leases::duty::start(&broker);
        deliver::start(&broker);
        tokio::spawn(transactions::run_duty(Arc::downgrade(&broker)));
        trace::start(&broker);
        generate::start(&broker);
        if let Some(catalog) = broker.local_group(CATALOG_GROUP.0) {
            let recovered = catalog.log().state().last.map(|id| id.index);
            broker.local.bring_up(catalog, recovered);
        }
        broker
    }

    fn catalog(&self) -> Arc<CatalogState> {
        self.catalog.borrow().clone()
    }

    fn node_id(&self) -> NodeId {
        self.host.node_id()
    }
}
