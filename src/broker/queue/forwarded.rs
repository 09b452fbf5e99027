//! How far each forwarder has come.
//!
//! A forwarder brings messages of one source in the order of that source's own sequence, and begins
//! again somewhere before its last one after a crash. One number per source is enough to store each
//! of them once, however late the repetition.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The last sequence of each source. Never forgotten: there are as many as places that forward here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SourceTable(BTreeMap<[u8; 16], u64>);

impl SourceTable {
    /// Whether the message was brought before.
    pub(super) fn has(&self, source: &[u8; 16], sequence: u64) -> bool {
        self.0.get(source).is_some_and(|last| sequence <= *last)
    }

    pub(super) fn record(&mut self, source: [u8; 16], sequence: u64) {
        self.0.insert(source, sequence);
    }
}
