//! Every kind of file × place × kind of damage, on one node of three. The short form takes one cell
//! of each kind; `QUORATE_DAMAGE=all` takes all of them and prints the whole table, another value
//! those whose name contains it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::json;

use super::files::{At, Spoil, list, segments, spoil};
use super::support::client::{Client, Produced};
use super::support::{Cluster, eventually};

pub const CONFIG: &str = "[limits]\nmax_message_bytes = 524288\n\n[log]\nsegment_bytes = 2097152\n\n[raft]\ncheckpoint_every = 32\n";
/// A topic whose messages fit into small segments.
pub fn topic(queues: u32) -> serde_json::Value {
    json!({"name": "t", "queues": queues, "max_message_bytes": 524_288})
}

const MESSAGES: usize = 220;
const VALUE_BYTES: usize = 16 << 10;
/// More values than a segment holds.
const SEGMENT_FULL: usize = 160;
const NODE: u64 = 2;
const CATALOG_CHANGES: usize = 600;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum File {
    /// A segment before the last one.
    SealedSegment,
    /// The segment that is written to.
    ActiveSegment,
    Sidecar,
    QueueIndex,
    Derived,
    QueueSnapshot,
    CatalogSnapshot,
    Identity,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The node made it anew from its own log.
    Rebuilt,
    /// That replica was given up, and filled again by the others.
    ReplicaFilled,
    /// All replicas of the node were.
    NodeFilled,
    /// The log ends earlier. The leader that had the lost entries acknowledged notices; one elected
    /// since then sends them again.
    EndCut,
    /// The node does not start, and says why.
    Refused,
}

struct Cell(File, At, Spoil, Outcome);

const fn cell(file: File, at: At, spoil: Spoil, outcome: Outcome) -> Cell {
    Cell(file, at, spoil, outcome)
}

/// The first cell of each kind of file and outcome is in the short form.
const CELLS: &[Cell] = {
    use At::*;
    use File::*;
    use Outcome::*;
    use Spoil::*;
    &[
        cell(SealedSegment, MiddleFrame, FlipBit, ReplicaFilled),
        cell(SealedSegment, FirstFrame, FlipBit, ReplicaFilled),
        cell(SealedSegment, LastFrame, FlipBit, ReplicaFilled),
        cell(SealedSegment, FirstFrame, ZeroPage, ReplicaFilled),
        cell(SealedSegment, MiddleFrame, ZeroPage, ReplicaFilled),
        cell(SealedSegment, LastFrame, ZeroPage, ReplicaFilled),
        cell(SealedSegment, FirstFrame, Truncate, NodeFilled),
        cell(SealedSegment, MiddleFrame, Truncate, NodeFilled),
        cell(SealedSegment, LastFrame, Truncate, NodeFilled),
        cell(SealedSegment, Header, FlipBit, NodeFilled),
        cell(SealedSegment, Whole, Remove, NodeFilled),
        cell(SealedSegment, Whole, Swap, NodeFilled),
        cell(ActiveSegment, MiddleFrame, FlipBit, NodeFilled),
        cell(ActiveSegment, FirstFrame, FlipBit, NodeFilled),
        cell(ActiveSegment, LastFrame, FlipBit, NodeFilled),
        cell(ActiveSegment, FirstFrame, ZeroPage, NodeFilled),
        cell(ActiveSegment, MiddleFrame, ZeroPage, NodeFilled),
        // Without a later mark, bytes at the very end are as if they had never been written.
        cell(ActiveSegment, LastFrame, ZeroPage, EndCut),
        cell(ActiveSegment, Header, FlipBit, NodeFilled),
        cell(ActiveSegment, Whole, Swap, NodeFilled),
        cell(Sidecar, Header, FlipBit, Rebuilt),
        cell(Sidecar, Middle, FlipBit, Rebuilt),
        cell(Sidecar, Middle, ZeroPage, Rebuilt),
        cell(Sidecar, Middle, Truncate, Rebuilt),
        cell(Sidecar, Whole, Remove, Rebuilt),
        cell(Sidecar, Whole, Swap, Rebuilt),
        cell(QueueIndex, Middle, FlipBit, Rebuilt),
        cell(QueueIndex, Header, FlipBit, Rebuilt),
        cell(QueueIndex, Middle, ZeroPage, Rebuilt),
        cell(QueueIndex, Middle, Truncate, Rebuilt),
        cell(QueueIndex, Whole, Remove, Rebuilt),
        cell(QueueIndex, Whole, Swap, Rebuilt),
        cell(Derived, Whole, Remove, Rebuilt),
        cell(Derived, Middle, FlipBit, Rebuilt),
        cell(Derived, Middle, ZeroPage, Rebuilt),
        cell(Derived, Middle, Truncate, Rebuilt),
        cell(QueueSnapshot, Middle, FlipBit, Rebuilt),
        cell(QueueSnapshot, Header, ZeroPage, Rebuilt),
        cell(QueueSnapshot, Middle, Truncate, Rebuilt),
        cell(QueueSnapshot, Whole, Remove, Rebuilt),
        cell(CatalogSnapshot, Middle, FlipBit, ReplicaFilled),
        cell(CatalogSnapshot, Middle, Truncate, ReplicaFilled),
        cell(CatalogSnapshot, Whole, Remove, ReplicaFilled),
        cell(Identity, Middle, FlipBit, Refused),
        cell(Identity, Middle, Truncate, Refused),
        cell(Identity, Whole, Remove, Refused),
    ]
};

/// The files a cell is about.
fn targets(data: &Path, file: File) -> Result<Vec<PathBuf>> {
    let snapshots = |group: u64| {
        list(
            &data.join("snapshots").join(format!("{group:020}")),
            ".snap",
        )
    };
    Ok(match file {
        File::SealedSegment | File::ActiveSegment => {
            let mut newest_first = segments(data)?;
            newest_first.reverse();
            if file == File::SealedSegment {
                newest_first.remove(0);
            }
            newest_first
        }
        File::Sidecar => list(&data.join("log"), ".idx")?,
        File::QueueIndex => list(&data.join("queues"), ".index")?,
        File::Derived => list(&data.join("derived"), "db")?,
        File::QueueSnapshot => snapshots(1024)?,
        File::CatalogSnapshot => snapshots(1)?,
        File::Identity => vec![data.join("identity.json")],
    })
}

/// A cluster with messages on it, and what was acknowledged.
struct Bed {
    cluster: Cluster,
    client: Client,
    acked: HashMap<u32, Vec<(u64, String)>>,
    unknown: HashSet<String>,
    sent: usize,
}

impl Bed {
    async fn new() -> Result<Self> {
        let cluster = Cluster::start_small_segments(3, CONFIG).await?;
        let client = cluster.client();
        client.create_topic_with(topic(2)).await?;
        let mut bed = Self {
            cluster,
            client,
            acked: HashMap::new(),
            unknown: HashSet::new(),
            sent: 0,
        };
        bed.produce(MESSAGES, VALUE_BYTES).await?;
        Ok(bed)
    }

    /// What the group has done of queue 0.
    fn done(&self) -> u64 {
        self.acked.get(&0).map_or(0, |acked| acked.len() as u64)
    }

    async fn produce(&mut self, count: usize, bytes: usize) -> Result<()> {
        for _ in 0..count {
            let queue = (self.sent % 2) as u32;
            let (place, value) = loop {
                let value = format!("{:0>bytes$}", self.sent);
                self.sent += 2;
                let body = json!({"messages": [{"value": value, "queue": queue}]});
                match self.client.produce("t", &body).await {
                    Produced::Acked(places) => break (places[0], value),
                    Produced::Refused(_) => {
                        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    }
                    // The node that was asked, or led, has just been killed.
                    Produced::Unknown(_) => drop(self.unknown.insert(value)),
                }
            };
            ensure!(place.0 == queue);
            self.acked.entry(queue).or_default().push((place.1, value));
            self.sent += 1;
        }
        let path = "/v1/groups/g/offsets";
        let offsets = json!({"offsets": [{"topic": "t", "queue": 0, "offset": self.done()}]});
        eventually("the offset is committed", || async {
            let put = self.client.request(Method::PUT, path, Some(&offsets));
            let (status, answer) = put.await?;
            ensure!(status.is_success(), "{status} {answer}");
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// So often that its log is cut behind a snapshot.
    async fn change_the_catalog(&self) -> Result<()> {
        for n in 0..CATALOG_CHANGES {
            let change = json!({"retention": {"max_age_ms": 86_400_000 + n, "max_bytes": null}});
            eventually("the topic is changed", || async {
                let path = "/v1/topics/t";
                let patched = self.client.request(Method::PATCH, path, Some(&change));
                let (status, answer) = patched.await?;
                ensure!(status.is_success(), "{status} {answer}");
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Every replica holds what was acknowledged, and nothing waits to be filled.
    async fn is_whole(&self) -> Result<()> {
        let url = self.cluster.urls()[NODE as usize - 1].clone();
        eventually("the node holds everything again", || async {
            for (queue, acked) in &self.acked {
                let mut read = self.client.read_stale(&url, "t", *queue).await?;
                // What is unknown may be there or not.
                read.retain(|(_, value)| !self.unknown.contains(value));
                ensure!(read == *acked, "queue {queue}: {} messages", read.len());
            }
            for url in self.cluster.urls() {
                let cluster = self.client.only(&url).get("/v1/cluster").await?;
                let nodes = cluster["nodes"].as_array().context("no nodes")?;
                let waiting = nodes.iter().map(|node| node["quarantined"].as_u64());
                ensure!(waiting.sum::<Option<u64>>() == Some(0), "{cluster}");
                ensure!(cluster["queues"]["under_replicated"] == 0, "{cluster}");
            }
            let offsets = self.client.get("/v1/groups/g/offsets?topic=t").await?;
            ensure!(offsets["offsets"][0]["offset"] == self.done(), "{offsets}");
            Ok(())
        })
        .await
        .with_context(|| self.cluster.nodes[NODE as usize - 1].last_log_lines())
    }

    async fn run(&mut self, Cell(file, at, how, expected): &Cell) -> Result<Outcome> {
        // With small values, so that every cell has new entries in the active segment.
        self.produce(24, 100).await?;
        if *file == File::SealedSegment {
            // One that holds entries of the replicas that are alive now.
            self.produce(SEGMENT_FULL, VALUE_BYTES).await?;
        }
        if *file == File::CatalogSnapshot {
            self.change_the_catalog().await?;
        }
        let data = self.cluster.data_dir(NODE);
        let node = self.cluster.node(NODE);
        node.kill();
        let logged = fs::read_to_string(node.log_path())?.len();
        let targets = targets(&data, *file)?;
        let first = targets.first().context("no such file")?;
        let backup = fs::read(first)?;
        // A group has several snapshots; one sound one is enough to hide the damage of another.
        let all = *file == File::CatalogSnapshot;
        for target in targets.iter().take(if all { usize::MAX } else { 1 }) {
            spoil(target, *at, *how, targets.get(1).map(PathBuf::as_path))?;
        }
        self.produce(6, 100).await?;
        self.cluster.node(NODE).spawn()?;
        if *file == File::Identity {
            let refused = self.refuses(logged).await;
            fs::write(first, backup)?;
            self.cluster.node(NODE).kill();
            self.cluster.node(NODE).spawn()?;
            self.is_whole().await?;
            return refused;
        }
        self.is_whole().await?;
        let said = fs::read_to_string(self.cluster.node(NODE).log_path())?;
        let said = &said[logged..];
        Ok(if *expected == Outcome::EndCut {
            Outcome::EndCut
        } else if said.contains("this node's log is damaged") {
            Outcome::NodeFilled
        } else if said.contains("a replica is damaged") {
            Outcome::ReplicaFilled
        } else {
            Outcome::Rebuilt
        })
    }

    async fn refuses(&mut self, logged: usize) -> Result<Outcome> {
        let node = std::sync::Mutex::new(self.cluster.node(NODE));
        eventually("the node ends and says why", || async {
            let mut node = node.lock().unwrap();
            ensure!(!node.is_running(), "it runs");
            let said = fs::read_to_string(node.log_path())?;
            let said = &said[logged..];
            let why = said.contains("is damaged") || said.contains("refuses this node");
            ensure!(why && said.contains("new"), "{said}");
            Ok(Outcome::Refused)
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_one_node_is_noticed_and_made_good() -> Result<()> {
    let asked = std::env::var("QUORATE_DAMAGE").ok();
    let mut bed = Bed::new().await?;
    let mut seen: Vec<(File, Outcome)> = Vec::new();
    let mut wrong = Vec::new();
    for cell in CELLS {
        let Cell(file, at, how, expected) = cell;
        let name = format!("{file:?} | {at:?} | {how:?}");
        let wanted = match asked.as_deref() {
            None => !seen.contains(&(*file, *expected)),
            Some("all") => true,
            Some(part) => name.contains(part),
        };
        if !wanted {
            continue;
        }
        seen.push((*file, *expected));
        let began = std::time::Instant::now();
        let outcome = bed.run(cell).await.with_context(|| name.clone())?;
        println!("| {name} | {outcome:?} | {:.1?} |", began.elapsed());
        if outcome != *expected {
            wrong.push(format!("{name}: {outcome:?}, expected {expected:?}"));
        }
    }
    ensure!(!seen.is_empty(), "QUORATE_DAMAGE names no cell");
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}
