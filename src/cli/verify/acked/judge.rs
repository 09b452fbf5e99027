//! The judgement itself: acknowledgements and replicas in, findings out. No network.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::super::super::wire::{Acked, Message};

/// Problems after this many of them are counted, not listed.
const PROBLEMS_LISTED: usize = 20;

/// What a queue acknowledged: offset → message. One offset acknowledged for two messages is itself a finding.
#[derive(Debug, Default)]
pub struct QueueAcks {
    messages: Vec<(u64, Fingerprint)>,
}

/// A message by its hashes: the whole log of a long run fits in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    id: u128,
    value: u128,
}

impl QueueAcks {
    pub fn add(&mut self, ack: &Acked) {
        let as_message = Message {
            queue: ack.queue,
            offset: ack.offset,
            message_id: ack.message_id.clone(),
            timestamp_ms: 0,
            key: None,
            tag: None,
            headers: BTreeMap::new(),
            value: ack.value.clone(),
            value_base64: ack.value_base64.clone(),
        };
        self.messages.push((ack.offset, fingerprint(&as_message)));
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.messages.len()
    }
}

fn fingerprint(message: &Message) -> Fingerprint {
    Fingerprint {
        id: xxh3_128(message.message_id.as_bytes()),
        value: xxh3_128(&message.bytes().unwrap_or_default()),
    }
}

/// Everything a reader can see of a message: two replicas must agree on all of it.
fn whole(message: &Message) -> u128 {
    let mut hash = Xxh3::new();
    let headers: Vec<String> = message
        .headers
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let (headers, value) = (headers.join("\u{2}"), message.bytes().unwrap_or_default());
    let parts = [
        message.message_id.as_bytes(),
        message.key.as_deref().unwrap_or("\u{1}").as_bytes(),
        message.tag.as_deref().unwrap_or("\u{1}").as_bytes(),
        &message.timestamp_ms.to_le_bytes(),
        headers.as_bytes(),
        &value,
    ];
    for part in parts {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.digest128()
}

/// One replica's log, as it answered offset by offset.
#[derive(Debug)]
pub struct ReplicaLog {
    pub node: u64,
    first: u64,
    next: u64,
    messages: Vec<(u64, Fingerprint, u128)>,
    /// Offsets that were skipped or came again, as (expected, got).
    jumps: Vec<(u64, u64)>,
}

impl ReplicaLog {
    pub fn new(node: u64) -> Self {
        Self {
            node,
            first: 0,
            next: 0,
            messages: Vec::new(),
            jumps: Vec::new(),
        }
    }

    /// Where retention lets the log begin; counts before the first message only.
    pub fn starts_at(&mut self, earliest: u64) {
        if self.messages.is_empty() {
            (self.first, self.next) = (earliest, earliest);
        }
    }

    pub fn add(&mut self, message: &Message) {
        if message.offset != self.next {
            self.jumps.push((self.next, message.offset));
        }
        self.next = message.offset + 1;
        self.messages
            .push((message.offset, fingerprint(message), whole(message)));
    }

    /// The offset that the next message would get.
    pub fn end(&self) -> u64 {
        self.next
    }

    fn at(&self, offset: u64) -> Option<&(u64, Fingerprint, u128)> {
        let index = self
            .messages
            .binary_search_by_key(&offset, |(offset, ..)| *offset)
            .ok()?;
        self.messages.get(index)
    }
}

/// What was found in all queues so far.
#[derive(Debug, Serialize)]
pub struct Findings {
    pub acknowledged: u64,
    pub found_on_every_replica: u64,
    pub lost: u64,
    /// Below the earliest offset by now: removed by the topic's retention.
    pub expired: u64,
    pub stored: u64,
    pub queues: u64,
    pub replicas_read: u64,
    pub differences: u64,
    pub holes: u64,
    pub duplicates: u64,
    pub problems: Vec<String>,
    #[serde(skip)]
    unique_values: bool,
    #[serde(skip)]
    ids: HashMap<u128, String>,
    #[serde(skip)]
    values: HashMap<u128, String>,
}

impl Findings {
    pub fn new(unique_values: bool) -> Self {
        Self {
            acknowledged: 0,
            found_on_every_replica: 0,
            lost: 0,
            expired: 0,
            stored: 0,
            queues: 0,
            replicas_read: 0,
            differences: 0,
            holes: 0,
            duplicates: 0,
            problems: Vec::new(),
            unique_values,
            ids: HashMap::new(),
            values: HashMap::new(),
        }
    }

    pub fn is_clean(&self) -> bool {
        self.lost + self.differences + self.holes + self.duplicates == 0
    }

    pub fn finish(&mut self) {
        self.ids = HashMap::new();
        self.values = HashMap::new();
    }

    fn problem(&mut self, text: impl FnOnce() -> String) {
        if self.problems.len() < PROBLEMS_LISTED {
            self.problems.push(text());
        }
    }

    pub fn summary(&self) -> String {
        let expired = match self.expired {
            0 => String::new(),
            expired => format!(" ({expired} removed by retention)"),
        };
        format!(
            "{} queues, {} replicas read, {} messages stored; {} differences between replicas, {} holes, {} duplicates\n{} acknowledged, {} found on every replica{expired}, {} acknowledged messages lost",
            self.queues,
            self.replicas_read,
            self.stored,
            self.differences,
            self.holes,
            self.duplicates,
            self.acknowledged,
            self.found_on_every_replica,
            self.lost,
        )
    }
}

/// Judges one queue. Without a replica, everything acknowledged there is lost.
pub fn judge_queue(
    findings: &mut Findings,
    (topic, queue): (&str, u32),
    acks: &QueueAcks,
    logs: &[ReplicaLog],
) {
    let place = |offset: u64| format!("{topic}/{queue} offset {offset}");
    findings.queues += 1;
    findings.replicas_read += logs.len() as u64;
    for (offset, expected) in &acks.messages {
        findings.acknowledged += 1;
        let held = |log: &ReplicaLog| {
            log.at(*offset)
                .is_some_and(|(_, found, _)| found == expected)
        };
        let missing: Vec<u64> = logs
            .iter()
            .filter(|log| !held(log))
            .map(|log| log.node)
            .collect();
        if !logs.is_empty() && logs.iter().all(|log| *offset < log.first) {
            findings.expired += 1;
        } else if logs.is_empty() || !missing.is_empty() {
            findings.lost += 1;
            findings.problem(|| format!("LOST {}: not on nodes {missing:?}", place(*offset)));
        } else {
            findings.found_on_every_replica += 1;
        }
    }
    for log in logs {
        findings.holes += log.jumps.len() as u64;
        for (expected, got) in &log.jumps {
            let node = log.node;
            findings.problem(|| format!("HOLE {} on node {node}: got {got}", place(*expected)));
        }
    }
    let Some((reference, others)) = logs.split_first() else {
        return;
    };
    findings.stored += reference.messages.len() as u64;
    compare_replicas(findings, &place, reference, others);
    find_duplicates(findings, &place, reference);
}

fn compare_replicas(
    findings: &mut Findings,
    place: &impl Fn(u64) -> String,
    reference: &ReplicaLog,
    others: &[ReplicaLog],
) {
    for other in others {
        // Retention and new writes may move either end while we read: compare what both cover.
        let covered = reference.first.max(other.first)..reference.next.min(other.next);
        for offset in covered {
            let (a, b) = (reference.at(offset), other.at(offset));
            if a.map(|(_, _, whole)| whole) != b.map(|(_, _, whole)| whole) {
                findings.differences += 1;
                let (a, b) = (reference.node, other.node);
                findings.problem(|| format!("DIFFERENT {} on nodes {a} and {b}", place(offset)));
            }
        }
    }
}

fn find_duplicates(
    findings: &mut Findings,
    place: &impl Fn(u64) -> String,
    reference: &ReplicaLog,
) {
    for (offset, message, _) in &reference.messages {
        let here = place(*offset);
        let mut twice = findings.ids.insert(message.id, here.clone());
        if findings.unique_values {
            let value = findings.values.insert(message.value, here.clone());
            twice = twice.or(value);
        }
        if let Some(first) = twice {
            findings.duplicates += 1;
            findings.problem(|| format!("TWICE {first} and {here}"));
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
