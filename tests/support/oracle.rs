//! What was acknowledged, and whether all replicas agree with it.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Result, bail};

use super::client::Client;
use super::{Cluster, eventually};

/// The acknowledgements of a run. An unknown write may be there or not.
#[derive(Debug, Default)]
pub struct Oracle {
    pub acked: BTreeMap<(u32, u64), String>,
    pub unknown: HashSet<String>,
    pub refused: u64,
    sent: HashSet<String>,
}

/// What a check found.
#[derive(Debug)]
pub struct Verdict {
    pub acked: usize,
    pub unknown: usize,
    pub unknown_stored: usize,
    pub stored: usize,
    pub lost: usize,
}

impl Oracle {
    pub fn sent(&mut self, value: &str) {
        self.sent.insert(value.to_owned());
    }

    pub fn acked(&mut self, place: (u32, u64), value: &str) -> Result<()> {
        if let Some(other) = self.acked.insert(place, value.to_owned()) {
            bail!("{place:?} was acknowledged for {other:?} and for {value:?}");
        }
        Ok(())
    }

    pub fn merge(&mut self, other: Oracle) -> Result<()> {
        for (place, value) in other.acked {
            self.acked(place, &value)?;
        }
        self.unknown.extend(other.unknown);
        self.refused += other.refused;
        self.sent.extend(other.sent);
        Ok(())
    }

    /// Compares every replica with the acknowledgements and with the other replicas.
    ///
    /// # Errors
    /// On a lost or moved message, a hole, a message nobody sent, one stored twice, or two replicas
    /// that differ.
    pub async fn check(
        &self,
        cluster: &Cluster,
        client: &Client,
        topic: &str,
        queues: u32,
    ) -> Result<Verdict> {
        let mut stored: HashMap<String, (u32, u64)> = HashMap::new();
        let mut lost = 0;
        for queue in 0..queues {
            let logs = eventually("all replicas hold the same log", || async {
                // A replica that has just started holds what it has not applied yet: without
                // this proof of the end, three replicas could agree on nothing.
                let urls = cluster.urls();
                let mut logs = vec![
                    client
                        .read_with(&urls[0], topic, queue, "linearizable")
                        .await?,
                ];
                for url in &urls {
                    logs.push(client.read_stale(url, topic, queue).await?);
                }
                if let Some(node) = logs.iter().position(|log| log != &logs[0]) {
                    bail!(
                        "queue {queue}: {} messages are committed, node {node} has {}, first difference at {:?}",
                        logs[0].len(),
                        logs[node].len(),
                        logs[0].iter().zip(&logs[node]).find(|(a, b)| a != b)
                    );
                }
                Ok(logs)
            })
            .await?;
            for (expected, (offset, value)) in logs[0].iter().enumerate() {
                if *offset != expected as u64 {
                    bail!("queue {queue}: offset {offset} where {expected} was due");
                }
                if !self.sent.contains(value) {
                    bail!("queue {queue} offset {offset} holds {value:?}, which nobody sent");
                }
                if let Some(first) = stored.insert(value.clone(), (queue, *offset)) {
                    bail!(
                        "{value:?} is stored twice: at {first:?} and at {:?}",
                        (queue, offset)
                    );
                }
            }
            for ((_, offset), value) in self.acked.range((queue, 0)..=(queue, u64::MAX)) {
                match logs[0].get(*offset as usize) {
                    Some((_, found)) if found == value => {}
                    found => {
                        lost += 1;
                        eprintln!(
                            "queue {queue} offset {offset}: acknowledged {value:?}, found {found:?}"
                        );
                    }
                }
            }
        }
        if lost > 0 {
            bail!("{lost} acknowledged messages lost");
        }
        let unknown_stored = self
            .unknown
            .iter()
            .filter(|v| stored.contains_key(*v))
            .count();
        Ok(Verdict {
            acked: self.acked.len(),
            unknown: self.unknown.len(),
            unknown_stored,
            stored: stored.len(),
            lost,
        })
    }
}
