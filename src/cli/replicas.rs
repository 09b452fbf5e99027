//! Replicas side by side: all of a Raft group that have applied the same entries hold the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::client::{Client, Request};
use super::error::CliError;

const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// A node hashes the whole state of each of its replicas to answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What one node says of one of its replicas.
#[derive(Debug, Clone, Deserialize)]
struct Replica {
    /// Raft group.
    group: u64,
    holds: String,
    replicas_wanted: usize,
    node: u64,
    applied_index: u64,
    state_hash: String,
}

#[derive(Debug, Deserialize)]
struct Answer {
    replicas: Vec<Replica>,
}

/// All replicas of the nodes that were asked, group by group.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    pub groups: usize,
    pub replicas: usize,
    /// Groups whose replicas have not come to one index, or are not all there.
    pub apart: Vec<String>,
    /// Replicas of one group at one index that do not hold the same. It must never happen.
    pub differing: Vec<String>,
}

impl Comparison {
    fn of(replicas: Vec<Replica>) -> Self {
        let mut comparison = Self {
            replicas: replicas.len(),
            ..Self::default()
        };
        let mut groups: BTreeMap<u64, Vec<Replica>> = BTreeMap::new();
        for replica in replicas {
            groups.entry(replica.group).or_default().push(replica);
        }
        comparison.groups = groups.len();
        for (group, replicas) in groups {
            let name = || format!("{} (group {group})", replicas[0].holds);
            let mut at: BTreeMap<u64, Vec<&Replica>> = BTreeMap::new();
            for replica in &replicas {
                at.entry(replica.applied_index).or_default().push(replica);
            }
            if at.len() > 1 {
                let places = replicas
                    .iter()
                    .map(|r| format!("node {} at {}", r.node, r.applied_index));
                let places: Vec<String> = places.collect();
                let text = format!("{}: {}", name(), places.join(", "));
                comparison.apart.push(text);
            }
            let (found, wanted) = (replicas.len(), replicas[0].replicas_wanted);
            if found < wanted {
                let text = format!("{}: {found} of {wanted} replicas", name());
                comparison.apart.push(text);
            }
            for (index, replicas) in at {
                let hashes: BTreeSet<&str> =
                    replicas.iter().map(|r| r.state_hash.as_str()).collect();
                if hashes.len() > 1 {
                    let states = replicas
                        .iter()
                        .map(|r| format!("node {} has {}", r.node, r.state_hash));
                    let states: Vec<String> = states.collect();
                    let text = format!("{} at index {index}: {}", name(), states.join(", "));
                    comparison.differing.push(text);
                }
            }
        }
        comparison
    }

    pub fn is_same(&self) -> bool {
        self.apart.is_empty() && self.differing.is_empty()
    }
}

/// Asks each node until all replicas of each group are at one index, a difference is seen, or the
/// time is over. Clients must ask one node each.
pub async fn compare(nodes: &[&Client], time: Duration) -> Result<Comparison, CliError> {
    let deadline = Instant::now() + time;
    loop {
        let seen = look(nodes).await;
        let settled = match &seen {
            Ok(seen) => seen.apart.is_empty() || !seen.differing.is_empty(),
            Err(_) => false,
        };
        if settled || Instant::now() > deadline {
            return seen;
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn look(nodes: &[&Client]) -> Result<Comparison, CliError> {
    let mut replicas = Vec::new();
    for node in nodes {
        let request = Request::get(&["v1", "cluster", "replicas"]).timeout(TIMEOUT);
        replicas.extend(node.read::<Answer>(request).await?.replicas);
    }
    Ok(Comparison::of(replicas))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(group: u64, node: u64, applied_index: u64, state_hash: &str) -> Replica {
        Replica {
            group,
            holds: format!("orders/{group}"),
            replicas_wanted: 2,
            node,
            applied_index,
            state_hash: state_hash.to_owned(),
        }
    }

    #[test]
    fn equal_replicas_are_counted() {
        let seen = Comparison::of(vec![
            replica(1, 1, 7, "a"),
            replica(2, 1, 7, "b"),
            replica(1, 2, 7, "a"),
            replica(2, 2, 7, "b"),
        ]);
        assert!(seen.is_same());
        assert_eq!((seen.groups, seen.replicas), (2, 4));
    }

    #[test]
    fn a_missing_replica_is_not_the_same() {
        let seen = Comparison::of(vec![replica(1, 1, 7, "a")]);
        assert_eq!(seen.apart, ["orders/1 (group 1): 1 of 2 replicas"]);
    }

    #[test]
    fn a_replica_behind_is_no_difference() {
        let seen = Comparison::of(vec![replica(1, 1, 7, "a"), replica(1, 2, 6, "b")]);
        assert_eq!(seen.apart, ["orders/1 (group 1): node 1 at 7, node 2 at 6"]);
        assert!(seen.differing.is_empty() && !seen.is_same());
    }

    #[test]
    fn a_difference_is_seen_although_another_replica_is_behind() {
        let seen = Comparison::of(vec![
            replica(1, 1, 6, "a"),
            replica(1, 2, 7, "b"),
            replica(1, 3, 7, "c"),
        ]);
        let expected = "orders/1 (group 1) at index 7: node 2 has b, node 3 has c";
        assert_eq!(seen.differing, [expected]);
    }
}
