//! What was found to be wrong, with the smallest piece of history that shows it.

use std::collections::BTreeMap;

use serde::Serialize;

/// Violations after this many of one kind are counted, not listed.
const LISTED_PER_KIND: u64 = 5;

/// Which promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Acknowledged, and not where it was acknowledged on every replica.
    Lost,
    /// One offset was seen with two messages.
    TwoValues,
    /// An offset without a message before the end.
    Hole,
    /// Seen by a reader, and beyond the end afterwards.
    Vanished,
    /// Stored or acknowledged at two places.
    Twice,
    /// Nobody sent it, or not to this queue.
    NeverSent,
    /// Answered as not committed, and stored all the same.
    RefusedButStored,
    /// Stored before a message whose acknowledgement had come before it was sent.
    Order,
    /// The messages of one request to one queue are not next to each other.
    Torn,
    /// A key's messages lie in two queues.
    KeyMoved,
    /// A reader got something else than the next offset.
    Skipped,
    /// A linearizable read did not show what was there before it began.
    StaleRead,
    /// A committed consumer offset went back, or was never asked for.
    CommittedOffset,
    /// A retry that names its producer or its key was refused for good.
    RetryRefused,
    /// A queue was given to two members in one epoch.
    OwnedTwice,
    /// A member committed for a queue that another had been given.
    NotFenced,
    /// An acknowledged message that no consumer got to the end of.
    NotProcessed,
    /// Delivered again after its acknowledgement.
    AfterAck,
    /// Leased to two at once, or counted wrongly.
    LeasedTwice,
    /// Dead letters stored twice, or of messages that are not dead.
    DeadLetter,
    /// A delayed message before its time, or after it was cancelled.
    Early,
    /// A delayed message long after its time in a whole cluster.
    Late,
    /// A transaction of which only a part counts.
    HalfVisible,
    /// A transaction that was both committed and rolled back.
    BothEnds,
    /// In a topic that the exchange's bindings did not choose.
    Misrouted,
    /// Replicas differ at the same applied index.
    Diverged,
    /// Not healed in time after the last fault.
    NotHealed,
    /// A node ended or panicked without being told to.
    NodeFailed,
    /// The run itself proves too little: a fault did not happen, nothing was stored or read.
    ProvesNothing,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    pub kind: Kind,
    /// `topic/queue`, where it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    pub what: String,
    /// The operations that contradict each other, in the order in which they began.
    pub history: Vec<String>,
}

#[derive(Debug, Default)]
pub struct Findings {
    pub listed: Vec<Violation>,
    pub counts: BTreeMap<Kind, u64>,
}

impl Findings {
    /// The words are only put together for violations that are listed.
    pub fn add(&mut self, kind: Kind, violation: impl FnOnce() -> Violation) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= LISTED_PER_KIND {
            self.listed.push(violation());
        }
    }

    /// One that needs no history.
    pub fn say(&mut self, kind: Kind, what: impl Into<String>) {
        self.add(kind, || Violation {
            kind,
            queue: None,
            what: what.into(),
            history: Vec::new(),
        });
    }

    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }
}
