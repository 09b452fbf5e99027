//! Traces on their way to their topic.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use quorate_storage::batch::{BatchBuilder, MessageRecord};

use super::{About, TRACE_TOPIC, Traced, key_of};
use crate::broker::partition::queue_of_key;
use crate::broker::queue::entry::Mark;
use crate::broker::{Broker, BrokerError, BrokerResult, Retention, TopicConfig};
use crate::peer::NewBatch;

/// The header by which what is about all messages below an offset is found.
pub(super) const BELOW_HEADER: &str = "below";
/// Written in one go.
const AT_ONCE: usize = 256;
const QUEUES: u32 = 4;
const KEPT_MS: u64 = 24 * 3_600_000;
/// Of each queue.
const KEPT_BYTES: u64 = 256 << 20;

/// Writes what the tracer takes, as long as there is a broker.
pub(in crate::broker) fn start(broker: &Arc<Broker>) {
    let Some(mut receiver) = broker.tracer.receiver.lock().take() else {
        return;
    };
    let broker = Arc::downgrade(broker);
    tokio::spawn(async move {
        let mut events = Vec::with_capacity(AT_ONCE);
        while receiver.recv_many(&mut events, AT_ONCE).await > 0 {
            let Some(alive) = broker.upgrade() else {
                return;
            };
            let count = events.len();
            if let Err(error) = alive.write_traces(std::mem::take(&mut events)).await {
                tracing::warn!(count, %error, "traces of messages were not written");
            }
            match alive.tracing_lost() {
                0 => {}
                lost => {
                    tracing::warn!(lost, "traces of messages came faster than they are written")
                }
            }
        }
    });
}

fn config() -> TopicConfig {
    TopicConfig {
        queues: QUEUES,
        hash_queues: QUEUES,
        retention: Retention {
            max_age_ms: Some(KEPT_MS),
            max_bytes: Some(KEPT_BYTES),
        },
        ..TopicConfig::default()
    }
}

impl Broker {
    async fn write_traces(&self, events: Vec<Traced>) -> BrokerResult<()> {
        let topic = self.ensure_internal_topic(TRACE_TOPIC, config()).await?;
        let mut batches: BTreeMap<u32, BatchBuilder> = BTreeMap::new();
        for traced in &events {
            let record = record_of(traced)?;
            let key = record.key.as_deref().unwrap_or_default().as_bytes();
            let queue = queue_of_key(key, topic.config.hash_queues);
            let batch = batches.entry(queue).or_default();
            record
                .encode(batch)
                .map_err(|e| BrokerError::Internal(e.to_string()))?;
        }
        for (queue, mut batch) in batches {
            let batch = NewBatch {
                mark: Mark::None,
                hold: None,
                batch: batch.finish(),
            };
            self.store(&topic, queue, vec![batch], &[]).await?;
        }
        Ok(())
    }
}

fn record_of(traced: &Traced) -> BrokerResult<MessageRecord> {
    let value = serde_json::to_vec(&traced.event);
    let value = value.map_err(|e| BrokerError::Internal(e.to_string()))?;
    let below = match traced.about {
        About::Message(_) => None,
        About::Below(offset) => Some((BELOW_HEADER.to_owned(), Bytes::from(offset.to_string()))),
    };
    Ok(MessageRecord {
        key: Some(key_of(traced.topic, traced.queue, traced.about)),
        value: Some(value.into()),
        headers: below.into_iter().collect(),
        ..MessageRecord::default()
    })
}
