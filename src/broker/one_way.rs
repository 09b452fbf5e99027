//! One-way produce: answered before anything is stored, and never acknowledged.
//!
//! What can be told at once is told: that the topic is there, that the messages are well formed and
//! that this node is not overloaded. What fails afterwards is only counted. One-way requests under
//! way have no order among each other; the sequence of an idempotent producer gives them one.

use std::sync::Arc;

use super::{Broker, BrokerError, BrokerResult, ProduceRequest};

/// One-way requests under way at the same time.
pub(super) const AT_ONCE: usize = 10_000;

impl Broker {
    /// Queues the messages and says how many. `keep` lives until they are stored or lost: the share
    /// of memory that they take.
    pub async fn accept(
        self: &Arc<Self>,
        request: ProduceRequest,
        keep: impl Send + 'static,
    ) -> BrokerResult<usize> {
        let prepared = self.prepare(request).await?;
        for part in &prepared.parts {
            if let Err(error) = &part.batch {
                return Err(error.clone());
            }
        }
        self.refuse_without_room()?;
        let Ok(turn) = self.one_way.clone().try_acquire_owned() else {
            let text = "too many one-way requests are waiting to be stored";
            return Err(BrokerError::Overloaded(text.to_owned()));
        };
        let (broker, count) = (self.clone(), prepared.count);
        tokio::spawn(async move {
            let answer = broker.store_prepared(prepared).await;
            let errors = answer.results.iter().filter_map(|r| r.as_ref().err());
            let (mut lost, mut why) = (0, None);
            for error in errors {
                lost += 1;
                why = Some(error);
            }
            if let Some(error) = why {
                tracing::debug!(lost, %error, "one-way messages were not stored");
            }
            broker.metrics.observe_one_way(count as u64 - lost, lost);
            drop((turn, keep));
        });
        Ok(count)
    }
}
