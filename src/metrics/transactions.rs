//! Transactions, as the coordinators that this node leads know them. Of the whole cluster: the sum
//! over the nodes.

use std::sync::Arc;

use super::{Metrics, NamedSample, Sample};
use crate::broker::local::LocalGroups;
use crate::coordinator::transactions::TransactionCounts;

impl Metrics {
    /// Shows what became of transactions.
    pub fn collect_transactions(&self, groups: Arc<LocalGroups>) {
        self.register_collector(move || samples(&groups));
    }
}

fn samples(groups: &LocalGroups) -> Vec<NamedSample> {
    let mut sum = TransactionCounts::default();
    for (_, coordinator) in groups.coordinators() {
        if !coordinator.group.is_leader() {
            continue;
        }
        // A store that broke is told of elsewhere.
        let counts = coordinator.view.transaction_counts().unwrap_or_default();
        sum.open += counts.open;
        sum.settling += counts.settling;
        sum.committed += counts.committed;
        sum.rolled_back += counts.rolled_back;
        sum.expired += counts.expired;
    }
    // Gauges, since they go to another node with the leadership.
    let gauge = |value: u64| Sample::Gauge(value as f64);
    vec![
        (
            "transactions_open",
            "Transactions neither committed nor rolled back, of the coordinators led here",
            gauge(sum.open),
        ),
        (
            "transactions_settling",
            "Transactions decided and not yet applied by all that take part, of the coordinators led here",
            gauge(sum.settling),
        ),
        (
            "transactions_committed",
            "Transactions committed so far, of the coordinators led here",
            gauge(sum.committed),
        ),
        (
            "transactions_rolled_back",
            "Transactions rolled back so far on request or because they were never prepared, of the coordinators led here",
            gauge(sum.rolled_back),
        ),
        (
            "transactions_expired",
            "Transactions rolled back so far because nobody ended them, of the coordinators led here",
            gauge(sum.expired),
        ),
    ]
}
