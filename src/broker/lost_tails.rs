//! Telling readers that an async-flush queue may have lost what it had acknowledged.

use std::time::Duration;

use super::Broker;
use crate::catalog::{CatalogCommand, CatalogReply};

/// Between two looks at the queues led here.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Broker {
    /// Raises the visible epoch of every queue led here whose majority lost its tail, for as long
    /// as the node runs.
    pub async fn announce_lost_tails(&self) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            for queue in self.local.queues() {
                let group = &queue.group;
                if group.tail_lost() && group.is_leader() && self.raise_epoch(group.id().0).await {
                    group.tail_loss_told();
                }
            }
        }
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
