//! The identifiers every layer shares.

use std::fmt;

/// One Raft group: the catalog, a coordinator, or the log of one queue. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RaftGroupId(pub u64);

impl fmt::Display for RaftGroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// The place of one entry in a Raft group's log. Ordered by term, then index.
///
/// At most one leader exists per term, so `(term, index)` names one entry for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId {
    pub term: u64,
    pub index: u64,
}

impl LogId {
    pub const fn new(term: u64, index: u64) -> Self {
        Self { term, index }
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.term, self.index)
    }
}

/// A replica's vote, as it must be on disk before anyone hears of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vote {
    pub term: u64,
    /// The replica id voted for; none before the first vote of a term.
    pub voted_for: Option<u64>,
    /// True once that replica is known to lead the term.
    pub committed: bool,
}
