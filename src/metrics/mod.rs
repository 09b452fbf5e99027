//! Prometheus metrics of one node.
//!
//! What happens often is counted where it happens, with plain methods; what merely *is* (leaders,
//! bytes on disk, memory) is read by collectors when someone scrapes, so that nothing runs between
//! scrapes. Label values come from code or from validated names, never raw from a request, and the
//! number of series a client can create is bounded.

mod collectors;
mod sample;
#[cfg(test)]
mod tests;
mod transactions;

use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use sample::{Closure, process_memory};
pub use sample::{NamedSample, Sample};

/// Queues of consumer groups whose lag is kept; further ones are left out of `/metrics`.
const MAX_LAG_SERIES: usize = 10_000;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    method: String,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabels {
    group: String,
    topic: String,
    queue: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ForwarderLabels {
    exchange: String,
    topic: String,
    queue: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    event: &'static str,
}

/// 100 µs to about 26 s, doubling.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 19))
}

/// 1 to about a million, times four.
fn counts() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 4.0, 11))
}

/// 64 bytes to 64 MiB, times four.
fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(64.0, 4.0, 11))
}

/// The node's metrics. All methods are cheap and callable from anywhere.
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    produce_seconds: Histogram,
    fetch_seconds: Histogram,
    commit_seconds: Histogram,
    produced_messages: Counter,
    produced_bytes: Counter,
    fetched_messages: Counter,
    fetched_bytes: Counter,
    delivered_batches: Counter,
    entry_messages: Histogram,
    entry_bytes: Histogram,
    events: Family<EventLabels, Counter>,
    one_way_stored: Counter,
    one_way_lost: Counter,
    group_lag: Family<GroupLabels, Gauge>,
    group_lag_series: Mutex<usize>,
    published_messages: Counter,
    routed_messages: Counter,
    forwarded_messages: Counter,
    forward_skipped_messages: Counter,
    forward_lag: Family<ForwarderLabels, Gauge>,
    connections: Gauge,
    connections_refused: Counter,
    inflight_body_bytes: Gauge,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("quorate")),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(latency),
            produce_seconds: latency(),
            fetch_seconds: latency(),
            commit_seconds: latency(),
            produced_messages: Counter::default(),
            produced_bytes: Counter::default(),
            fetched_messages: Counter::default(),
            fetched_bytes: Counter::default(),
            delivered_batches: Counter::default(),
            entry_messages: counts(),
            entry_bytes: sizes(),
            events: Family::default(),
            one_way_stored: Counter::default(),
            one_way_lost: Counter::default(),
            group_lag: Family::default(),
            group_lag_series: Mutex::new(0),
            published_messages: Counter::default(),
            routed_messages: Counter::default(),
            forwarded_messages: Counter::default(),
            forward_skipped_messages: Counter::default(),
            forward_lag: Family::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            inflight_body_bytes: Gauge::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut guard = self.registry.lock();
        let r = &mut *guard;
        r.register(
            "http_requests",
            "Requests answered, by route template and status",
            self.requests.clone(),
        );
        r.register_with_unit(
            "http_request_duration",
            "Time from request head to answer, long polls included",
            Unit::Seconds,
            self.request_seconds.clone(),
        );
        r.register_with_unit(
            "produce_duration",
            "Time to store a produce request's messages on a majority",
            Unit::Seconds,
            self.produce_seconds.clone(),
        );
        r.register_with_unit(
            "fetch_duration",
            "Time to answer a fetch that did not wait for messages",
            Unit::Seconds,
            self.fetch_seconds.clone(),
        );
        r.register_with_unit(
            "commit_duration",
            "Time to commit consumer offsets on a majority",
            Unit::Seconds,
            self.commit_seconds.clone(),
        );
        r.register(
            "produced_messages",
            "Messages acknowledged through this node",
            self.produced_messages.clone(),
        );
        r.register_with_unit(
            "produced_value",
            "Bytes of values acknowledged through this node",
            Unit::Bytes,
            self.produced_bytes.clone(),
        );
        r.register(
            "fetched_messages",
            "Messages delivered by this node",
            self.fetched_messages.clone(),
        );
        r.register_with_unit(
            "fetched_value",
            "Bytes of values delivered by this node",
            Unit::Bytes,
            self.fetched_bytes.clone(),
        );
        r.register(
            "delivered_batches",
            "Batches of delayed messages that became visible, in queues led here",
            self.delivered_batches.clone(),
        );
        r.register(
            "entry_messages",
            "Messages in one proposed Raft entry",
            self.entry_messages.clone(),
        );
        r.register_with_unit(
            "entry",
            "Size of one proposed Raft entry",
            Unit::Bytes,
            self.entry_bytes.clone(),
        );
        r.register(
            "events",
            "Cluster events seen by this node: elections, nodes up and down",
            self.events.clone(),
        );
        r.register(
            "one_way_stored_messages",
            "Messages produced with ack=none that were stored",
            self.one_way_stored.clone(),
        );
        r.register(
            "one_way_lost_messages",
            "Messages produced with ack=none that were answered 202 and then not stored, or not known to be",
            self.one_way_lost.clone(),
        );
        r.register(
            "group_lag_messages",
            "Messages a consumer group has not consumed, as last asked for",
            self.group_lag.clone(),
        );
        r.register(
            "exchange_published_messages",
            "Messages published to exchanges through this node",
            self.published_messages.clone(),
        );
        r.register(
            "exchange_routed_messages",
            "Copies of those that are to be brought to topics",
            self.routed_messages.clone(),
        );
        r.register(
            "exchange_forwarded_messages",
            "Copies brought to topics by this node's forwarders, repetitions included",
            self.forwarded_messages.clone(),
        );
        r.register(
            "exchange_skipped_messages",
            "Copies not brought anywhere: their topic was deleted, drops them or can never hold them, or they were removed before",
            self.forward_skipped_messages.clone(),
        );
        r.register(
            "exchange_forward_lag_messages",
            "Published messages that a forwarder of this node has not looked at for a topic, per queue of the exchange",
            self.forward_lag.clone(),
        );
        r.register(
            "http_connections",
            "Open client connections",
            self.connections.clone(),
        );
        r.register(
            "http_connections_refused",
            "Connections closed because too many were open",
            self.connections_refused.clone(),
        );
        r.register_with_unit(
            "http_inflight",
            "Request bodies and answers in memory",
            Unit::Bytes,
            self.inflight_body_bytes.clone(),
        );
        r.register_collector(Box::new(Closure(process_memory)));
    }

    /// Has `read` called at each scrape; its names must be its own.
    pub fn register_collector(&self, read: impl Fn() -> Vec<NamedSample> + Send + Sync + 'static) {
        self.registry
            .lock()
            .register_collector(Box::new(Closure(read)));
    }

    /// Everything in the OpenMetrics text format.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 << 10);
        encode(&mut text, &self.registry.lock())?;
        Ok(text)
    }

    /// A request was answered. `route` is the template, never the path.
    pub fn observe_request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let (method, route) = (method.to_owned(), route.to_owned());
        self.requests
            .get_or_create(&RequestLabels {
                method: method.clone(),
                route: route.clone(),
                status,
            })
            .inc();
        self.request_seconds
            .get_or_create(&RouteLabels { method, route })
            .observe(took.as_secs_f64());
    }

    /// `messages` with values of `bytes` together were acknowledged.
    pub fn observe_produce(&self, took: Duration, messages: u64, bytes: u64) {
        self.produce_seconds.observe(took.as_secs_f64());
        self.produced_messages.inc_by(messages);
        self.produced_bytes.inc_by(bytes);
    }

    /// A fetch found `messages`; one that waited for them counts without its time.
    pub fn observe_fetch(&self, took: Option<Duration>, messages: u64, bytes: u64) {
        if let Some(took) = took {
            self.fetch_seconds.observe(took.as_secs_f64());
        }
        self.fetched_messages.inc_by(messages);
        self.fetched_bytes.inc_by(bytes);
    }

    /// Offsets of a consumer group were committed.
    pub fn observe_commit(&self, took: Duration) {
        self.commit_seconds.observe(took.as_secs_f64());
    }

    /// Delayed messages became visible.
    pub fn observe_delivered(&self, batches: u64) {
        self.delivered_batches.inc_by(batches);
    }

    /// One Raft entry was proposed.
    pub fn observe_entry(&self, messages: u64, bytes: u64) {
        self.entry_messages.observe(messages as f64);
        self.entry_bytes.observe(bytes as f64);
    }

    /// What became of a request that was answered before it was stored.
    pub fn observe_one_way(&self, stored: u64, lost: u64) {
        self.one_way_stored.inc_by(stored);
        self.one_way_lost.inc_by(lost);
    }

    /// Something happened in the cluster: `leader_elected`, `node_down`, …
    pub fn count_event(&self, event: &'static str) {
        self.events.get_or_create(&EventLabels { event }).inc();
    }

    /// The lag of a consumer group in one queue, where it became known.
    pub fn set_group_lag(&self, group: &str, topic: &str, queue: u32, lag: u64) {
        let labels = GroupLabels {
            group: group.to_owned(),
            topic: topic.to_owned(),
            queue,
        };
        let lag = i64::try_from(lag).unwrap_or(i64::MAX);
        let mut series = self.group_lag_series.lock();
        if let Some(gauge) = self.group_lag.get(&labels) {
            gauge.set(lag);
            return;
        }
        if *series < MAX_LAG_SERIES {
            *series += 1;
            self.group_lag.get_or_create(&labels).set(lag);
        }
    }

    /// Messages were published to an exchange; together they go to topics `routed` times.
    pub fn count_published(&self, messages: u64, routed: u64) {
        self.published_messages.inc_by(messages);
        self.routed_messages.inc_by(routed);
    }

    /// A forwarder brought messages to a topic.
    pub fn count_forwarded(&self, messages: u64) {
        self.forwarded_messages.inc_by(messages);
    }

    /// A forwarder will never bring messages to where they were to go.
    pub fn count_forward_skipped(&self, messages: u64) {
        self.forward_skipped_messages.inc_by(messages);
    }

    /// How far a forwarder here is behind, for one topic; none when it is no longer its business.
    pub fn set_forward_lag(&self, exchange: &str, topic: &str, queue: u32, lag: Option<u64>) {
        let labels = ForwarderLabels {
            exchange: exchange.to_owned(),
            topic: topic.to_owned(),
            queue,
        };
        match lag {
            Some(lag) => {
                let gauge = self.forward_lag.get_or_create(&labels);
                gauge.set(i64::try_from(lag).unwrap_or(i64::MAX));
            }
            None => drop(self.forward_lag.remove(&labels)),
        }
    }

    pub fn connection_opened(&self) {
        self.connections.inc();
    }

    pub fn connection_closed(&self) {
        self.connections.dec();
    }

    pub fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    pub fn set_inflight_bytes(&self, bytes: usize) {
        self.inflight_body_bytes
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
