//! What the broker reads of a coordinator's transactions.

use quorate_storage::StorageError;
use serde::{Deserialize, Serialize};

use super::records::{
    COUNTS_KEY, Duty, ENDED_PREFIX, listed_prefix, read_listed, read_timed, transaction_key,
};
use super::{KEPT_MS, Transaction, TransactionCounts, TransactionState};
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::records::CoordinatorView;

/// Which transactions are listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionFilter {
    pub producer_group: Option<String>,
    pub state: Option<TransactionState>,
    pub limit: u32,
}

impl CoordinatorView {
    pub fn transaction(&self, id: &TransactionId) -> Result<Option<Transaction>, StorageError> {
        let stored = self.records.get(&transaction_key(id))?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }

    /// Up to the filter's limit of them, the oldest first.
    pub fn transactions(
        &self,
        filter: &TransactionFilter,
    ) -> Result<Vec<Transaction>, StorageError> {
        let states = match &filter.state {
            Some(state) => std::slice::from_ref(state),
            None => &TransactionState::ALL,
        };
        let limit = filter.limit as usize;
        // The keys of one producer group are in the order of creation, those of all are not.
        let at_most = match filter.producer_group {
            Some(_) => limit,
            None => usize::MAX,
        };
        let mut listed = Vec::new();
        for state in states {
            let prefix = listed_prefix(*state, filter.producer_group.as_deref());
            let page = self.records.scan_page(&prefix, None, at_most)?;
            listed.extend(page.iter().filter_map(|(key, _)| read_listed(key)));
        }
        listed.sort_unstable();
        // One that changes meanwhile is met in two states.
        listed.dedup();
        listed.truncate(limit);
        let mut found = Vec::with_capacity(listed.len());
        for (_, id) in listed {
            // Read beside apply: it may be in another state by now.
            let wanted = |t: &Transaction| filter.state.is_none_or(|s| s == t.state());
            found.extend(self.transaction(&id)?.filter(wanted));
        }
        Ok(found)
    }

    pub fn transaction_counts(&self) -> Result<TransactionCounts, StorageError> {
        let stored = self.records.get(COUNTS_KEY)?;
        let counts = stored.and_then(|bytes| postcard::from_bytes(&bytes).ok());
        Ok(counts.unwrap_or_default())
    }

    /// The transactions that a duty comes first for, with the times for it; those `after` one of
    /// them.
    pub fn due_transactions(
        &self,
        duty: Duty,
        after: Option<(u64, TransactionId)>,
        limit: usize,
    ) -> Result<Vec<(u64, TransactionId)>, StorageError> {
        let after = after.map(|(due_ms, id)| duty.key(due_ms, &id));
        let found = self
            .records
            .scan_page(duty.prefix(), after.as_deref(), limit)?;
        let read = found.iter().filter_map(|(key, _)| read_timed(key));
        Ok(read.collect())
    }

    /// When the first ended transaction may be forgotten.
    pub fn forget_transactions_at(&self) -> Result<Option<u64>, StorageError> {
        let found = self.records.scan_page(ENDED_PREFIX, None, 1)?;
        let read = found.first().and_then(|(key, _)| read_timed(key));
        Ok(read.map(|(done_ms, _)| done_ms.saturating_add(KEPT_MS)))
    }
}
