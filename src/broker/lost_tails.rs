//! Telling readers that an async-flush queue may have lost what it had acknowledged.

use std::time::Duration;

use super::Broker;
use crate::catalog::{CatalogCommand, CatalogReply};

/// Between two looks at the queues.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Broker {
    /// Raises the visible epoch of every queue whose majority lost its tail, for as long as the node
    /// runs. Each replica that had to go on without its tail says so, whoever leads now.
    pub async fn announce_lost_tails(&self) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            for queue in self.local.queues() {
                let group = &queue.group;
                if group.tail_lost() && self.raise_epoch(group.id().0).await {
                    group.tail_loss_told();
                }
            }
        }
    }

    /// Whether every replica that should be here is, and no tail of theirs is in doubt.
    pub fn tails_are_settled(&self) -> bool {
        let queues = self.local.queues();
        self.not_ready().is_none() && !queues.iter().any(|queue| queue.group.tail_unsettled())
    }

    async fn raise_epoch(&self, group: u64) -> bool {
        let catalog = self.catalog();
        let Some(placement) = catalog.placements().find(|p| p.group == group) else {
            return false;
        };
        let command = CatalogCommand::RaiseEpoch {
            group,
            from: placement.epoch,
        };
        match self.change_catalog(&command).await {
            Ok(CatalogReply::Done) => {
                tracing::warn!(
                    group,
                    epoch = placement.epoch + 1,
                    "acknowledged messages may be lost"
                );
                true
            }
            // Unknown or not yet: with the same `from`, or the one it led to, on the next look.
            _ => false,
        }
    }
}
