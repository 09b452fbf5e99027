//! What became of single messages, of the topics that want it: who got them, who said they were done.
//!
//! Nothing waits for a trace. What is seen to happen is put into a bounded channel, and written from
//! there to a topic of the server's own; what does not fit, or fails, is left out and counted in the
//! log. That a message was stored needs no trace: its id says under which leader's term.

mod read;
mod write;

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::batcher::now_ms;
use super::leases::LeasedMessage;
use super::{Broker, NodeId, OffsetCommit};
use crate::catalog::TopicId;
use crate::coordinator::leases::{DeadLetter, Receipt};

pub use read::MessageTrace;
pub(super) use write::start;

const TRACE_TOPIC: &str = "_trace";
/// Events that wait to be written.
const WAITING: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceKind {
    /// Became visible; `term` is that of the leader that stored it.
    Stored,
    /// Leased to a consumer.
    Delivered,
    Acked,
    /// By an ack of everything its consumer held up to a later message.
    AckedThrough,
    Nacked,
    /// It is in the group's topic of dead letters.
    Dead,
    /// The group committed an offset behind it.
    Passed,
}

/// Something that happened to a message. What is not known of it is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceEvent {
    pub event: TraceKind,
    pub time_ms: u64,
    /// Which node did it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery_count: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Tells consumers without a name apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
}

/// Which messages an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Message(u64),
    /// All below.
    Below(u64),
}

#[derive(Debug, Clone)]
struct Traced {
    topic: TopicId,
    queue: u32,
    about: About,
    event: TraceEvent,
}

/// Takes events from whoever sees them.
#[derive(Debug)]
pub(super) struct Tracer {
    sender: mpsc::Sender<Traced>,
    receiver: Mutex<Option<mpsc::Receiver<Traced>>>,
    dropped: AtomicU64,
}

impl Default for Tracer {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
            dropped: AtomicU64::new(0),
        }
    }
}

impl Tracer {
    fn send(&self, traced: Traced) {
        if self.sender.try_send(traced).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Under which key of the topic an event is found.
fn key_of(topic: TopicId, queue: u32, about: About) -> String {
    match about {
        About::Message(offset) => format!("{topic}/{queue}/{offset}"),
        About::Below(_) => format!("{topic}/{queue}"),
    }
}

/// Consumers without a name are told apart by their lease.
fn holder_of(receipt: &Receipt) -> String {
    format!("{:016x}", receipt.consumer)
}

impl Broker {
    fn traces(&self, topic: TopicId) -> bool {
        let catalog = self.catalog.borrow();
        catalog
            .topics
            .get(&topic)
            .is_some_and(|topic| topic.config.trace)
    }

    fn event(&self, event: TraceKind, group: &str) -> TraceEvent {
        TraceEvent {
            event,
            time_ms: now_ms(),
            node: Some(self.node_id()),
            term: None,
            group: Some(group.to_owned()),
            consumer: None,
            delivery_count: None,
            reason: None,
            holder: None,
        }
    }

    /// Messages were leased to a consumer, and are on their way to it.
    pub(super) fn trace_delivered(
        &self,
        group: &str,
        consumer: Option<&String>,
        messages: &[LeasedMessage],
    ) {
        for leased in messages {
            let receipt = &leased.receipt;
            if self.traces(receipt.topic) {
                let event = TraceEvent {
                    consumer: consumer.cloned(),
                    delivery_count: Some(leased.delivery_count),
                    holder: Some(holder_of(receipt)),
                    ..self.event(TraceKind::Delivered, group)
                };
                self.tracer.send(Traced {
                    topic: receipt.topic,
                    queue: receipt.queue,
                    about: About::Message(receipt.offset),
                    event,
                });
            }
        }
    }

    /// A consumer said something of what it holds, and that was taken.
    pub(super) fn trace_settled(&self, kind: TraceKind, group: &str, receipt: &Receipt) {
        if !self.traces(receipt.topic) {
            return;
        }
        let about = match kind {
            TraceKind::AckedThrough => About::Below(receipt.offset.saturating_add(1)),
            _ => About::Message(receipt.offset),
        };
        let event = TraceEvent {
            holder: Some(holder_of(receipt)),
            ..self.event(kind, group)
        };
        self.tracer.send(Traced {
            topic: receipt.topic,
            queue: receipt.queue,
            about,
            event,
        });
    }

    pub(super) fn trace_dead(&self, group: &str, letter: &DeadLetter) {
        if !self.traces(letter.topic) {
            return;
        }
        let event = TraceEvent {
            time_ms: letter.dead_at_ms,
            delivery_count: Some(letter.deliveries),
            reason: Some(letter.reason.as_str().to_owned()),
            ..self.event(TraceKind::Dead, group)
        };
        self.tracer.send(Traced {
            topic: letter.topic,
            queue: letter.queue,
            about: About::Message(letter.offset),
            event,
        });
    }

    /// A consumer group committed an offset.
    pub(super) fn trace_passed(&self, group: &str, member: Option<&str>, commit: &OffsetCommit) {
        let topic = self.catalog.borrow().topic(&commit.topic).cloned();
        let Some(topic) = topic.filter(|topic| topic.config.trace) else {
            return;
        };
        let event = TraceEvent {
            consumer: member.map(str::to_owned),
            ..self.event(TraceKind::Passed, group)
        };
        self.tracer.send(Traced {
            topic: topic.id,
            queue: commit.queue,
            about: About::Below(commit.offset),
            event,
        });
    }

    pub(super) fn tracing_lost(&self) -> u64 {
        self.tracer.dropped.swap(0, Ordering::Relaxed)
    }
}
