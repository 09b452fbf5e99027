//! What the broker reads of a coordinator's transactions.

use quorate_storage::StorageError;
use serde::{Deserialize, Serialize};

use super::records::{
    COUNTS_KEY, Class, DUE_PREFIX, ENDED_PREFIX, LISTED_PREFIX, listed_id, listed_prefix,
    read_timed, transaction_key,
};
use super::{KEPT_MS, Transaction, TransactionCounts, TransactionState};
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::records::CoordinatorView;

/// Keys looked at in one go.
const PAGE: usize = 256;

/// Which transactions are listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionFilter {
    pub producer_group: Option<String>,
    pub state: Option<TransactionState>,
    pub limit: u32,
}

impl CoordinatorView {
    pub fn transaction(&self, id: &TransactionId) -> Result<Option<Transaction>, StorageError> {
        let stored = self.records().get(&transaction_key(id))?;
        Ok(stored.and_then(|bytes| postcard::from_bytes(&bytes).ok()))
    }

    pub fn transactions(
        &self,
        filter: &TransactionFilter,
    ) -> Result<Vec<Transaction>, StorageError> {
        let prefix = match &filter.producer_group {
            Some(group) => listed_prefix(group, filter.state.map(Class::from)),
            None => LISTED_PREFIX.to_vec(),
        };
        let limit = filter.limit as usize;
        let mut found = Vec::new();
        let mut after = None;
        while found.len() < limit {
            let page = self.records().scan_page(&prefix, after.as_deref(), PAGE)?;
            for (key, _) in &page {
                let listed = listed_id(key).map(|id| self.transaction(&id)).transpose()?;
                let wanted = |t: &Transaction| filter.state.is_none_or(|s| s == t.state());
                found.extend(listed.flatten().filter(wanted));
            }
            if page.len() < PAGE {
                break;
            }
            after = page.last().map(|(key, _)| key.to_vec());
        }
        found.truncate(limit);
        Ok(found)
    }

    pub fn transaction_counts(&self) -> Result<TransactionCounts, StorageError> {
        let stored = self.records().get(COUNTS_KEY)?;
        let counts = stored.and_then(|bytes| postcard::from_bytes(&bytes).ok());
        Ok(counts.unwrap_or_default())
    }

    /// The transactions that something has to be done about first, with the times for it.
    pub fn due_transactions(
        &self,
        limit: usize,
    ) -> Result<Vec<(u64, TransactionId)>, StorageError> {
        let found = self.records().scan_page(DUE_PREFIX, None, limit)?;
        let read = found.iter().filter_map(|(key, _)| read_timed(key));
        Ok(read.collect())
    }

    /// When the first ended transaction may be forgotten.
    pub fn forget_transactions_at(&self) -> Result<Option<u64>, StorageError> {
        let found = self.records().scan_page(ENDED_PREFIX, None, 1)?;
        let read = found.first().and_then(|(key, _)| read_timed(key));
        Ok(read.map(|(done_ms, _)| done_ms.saturating_add(KEPT_MS)))
    }
}
