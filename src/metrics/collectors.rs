//! What is read when someone scrapes: the commit log, the disk below it, the Raft groups.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use quorate_raft::{NodeId, NodeLiveness, RaftHost};
use quorate_storage::commit_log::{CommitLog, CommitLogStats, FSYNC_BUCKETS_NS};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;

use tokio::sync::watch;

use super::{Metrics, NamedSample, Sample};
use crate::broker::groups::Sessions;
use crate::broker::local::LocalGroups;
use crate::catalog::CatalogState;
use crate::node::Scrubbed;

const NS_PER_S: f64 = 1e9;

impl Metrics {
    /// Shows the commit log's counters.
    pub fn collect_commit_log(&self, log: CommitLog) {
        self.register_collector(move || commit_log_samples(&log.stats()));
    }

    /// Shows the free space of the file system that holds `dir`.
    pub fn collect_disk(&self, dir: PathBuf) {
        self.register_collector(move || {
            let free = OsVfs.free_space(&dir).ok();
            free.map(|bytes| {
                let help = "Bytes still free on the file system of the data directory";
                ("disk_free_bytes", help, Sample::Gauge(bytes as f64))
            })
            .into_iter()
            .collect()
        });
    }

    /// Shows how many of a node's replicas wait to be filled again after damage.
    pub fn collect_damage(&self, node: NodeId, catalog: watch::Receiver<Arc<CatalogState>>) {
        self.register_collector(move || {
            let state = catalog.borrow().clone();
            let here = state.unsound().filter(|unsound| unsound.node == node);
            let help = "Replicas damaged on this node that are not filled again yet";
            vec![(
                "replicas_quarantined",
                help,
                Sample::Gauge(here.count() as f64),
            )]
        });
    }

    /// Shows the members of consumer groups whose coordinators this node leads.
    pub fn collect_groups(&self, sessions: Arc<Sessions>) {
        self.register_collector(move || {
            let (groups, members, rebalances) = sessions.counts();
            vec![
                (
                    "groups_with_members",
                    "Consumer groups with members that this node watches over",
                    Sample::Gauge(groups as f64),
                ),
                (
                    "group_members",
                    "Members of consumer groups that this node watches over",
                    Sample::Gauge(members as f64),
                ),
                (
                    "group_rebalances",
                    "Changes of assignments in consumer groups seen by this node",
                    Sample::Counter(rebalances),
                ),
            ]
        });
    }

    /// Shows how much of the log was read in search of damage.
    pub fn collect_scrub(&self, scrubbed: Arc<Scrubbed>) {
        self.register_collector(move || {
            let count = |of: &AtomicU64| Sample::Counter(of.load(Ordering::Relaxed));
            vec![
                (
                    "log_scrubs",
                    "Times that the whole log was read in search of damage",
                    count(&scrubbed.passes),
                ),
                (
                    "log_scrubbed_bytes",
                    "Bytes of entries read in search of damage",
                    count(&scrubbed.bytes),
                ),
            ]
        });
    }

    /// Shows how many batches the replicas here hold that are not visible yet.
    pub fn collect_held(&self, local: &Arc<LocalGroups>) {
        let local = Arc::downgrade(local);
        self.register_collector(move || {
            let queues = local.upgrade().map(|local| local.queues());
            let held = queues.unwrap_or_default();
            let held: u64 = held.iter().map(|queue| queue.shared.held().batches).sum();
            let help =
                "Delayed messages and parts of open transactions in the replicas of this node";
            vec![("held_batches", help, Sample::Gauge(held as f64))]
        });
    }

    /// Shows the node's Raft groups and the other nodes. Does not keep the host alive.
    pub fn collect_raft(&self, host: &Arc<RaftHost>) {
        let host = Arc::downgrade(host);
        self.register_collector(move || raft_samples(&host));
    }
}

fn commit_log_samples(stats: &CommitLogStats) -> Vec<NamedSample> {
    let gauge = |value: u64| Sample::Gauge(value as f64);
    vec![
        (
            "log_fsyncs",
            "fsyncs of the commit log",
            Sample::Counter(stats.fsyncs),
        ),
        (
            "log_fsync_duration_seconds",
            "Time of one fsync of the commit log",
            fsync_histogram(stats),
        ),
        (
            "log_fsync_max_seconds",
            "Slowest fsync since the start",
            Sample::Gauge(stats.fsync_max_ns as f64 / NS_PER_S),
        ),
        (
            "log_writes",
            "Writes of the commit log, each of all that was queued",
            Sample::Counter(stats.writes),
        ),
        (
            "log_written_bytes",
            "Bytes written to the commit log",
            Sample::Counter(stats.written_bytes),
        ),
        (
            "log_frames",
            "Frames written to the commit log",
            Sample::Counter(stats.frames),
        ),
        (
            "log_entries",
            "Raft entries written to the commit log",
            Sample::Counter(stats.entries),
        ),
        (
            "log_queued_bytes",
            "Bytes that wait to be written",
            gauge(stats.queued_bytes),
        ),
        ("log_segments", "Segment files", gauge(stats.segments)),
        (
            "log_disk_bytes",
            "Bytes the segment files take",
            gauge(stats.disk_bytes),
        ),
        (
            "log_cached_bytes",
            "Bytes of the newest entries in memory",
            gauge(stats.cached_bytes),
        ),
        (
            "log_disk_reads",
            "Reads that the cache could not answer",
            Sample::Counter(stats.disk_reads),
        ),
        (
            "log_disk_read_bytes",
            "Bytes read from segment files",
            Sample::Counter(stats.disk_read_bytes),
        ),
        (
            "log_cleaned_segments",
            "Segments removed by cleaning",
            Sample::Counter(stats.cleaned_segments),
        ),
        (
            "log_poisoned",
            "1 after a failed write or fsync: the node stops",
            gauge(u64::from(stats.poisoned.is_some())),
        ),
    ]
}

fn fsync_histogram(stats: &CommitLogStats) -> Sample {
    let bounds = FSYNC_BUCKETS_NS
        .iter()
        .map(|ns| *ns as f64 / NS_PER_S)
        .chain([f64::INFINITY]);
    Sample::Histogram {
        sum: stats.fsync_sum_ns as f64 / NS_PER_S,
        count: stats.fsync_buckets.iter().sum(),
        buckets: bounds.zip(stats.fsync_buckets).collect(),
    }
}

fn raft_samples(host: &Weak<RaftHost>) -> Vec<NamedSample> {
    let Some(host) = host.upgrade() else {
        return Vec::new();
    };
    let groups = host.groups();
    let leaders = groups.iter().filter(|group| group.is_leader()).count();
    let leaderless = groups
        .iter()
        .filter(|group| group.leader().is_none())
        .count();
    let node = host.node_id();
    let nodes = host.nodes();
    let peers_up = nodes
        .iter()
        .filter(|peer| peer.node != node && peer.liveness == NodeLiveness::Up)
        .count();
    let gauge = |value: usize| Sample::Gauge(value as f64);
    vec![
        (
            "raft_groups",
            "Raft groups with a replica on this node",
            gauge(groups.len()),
        ),
        (
            "raft_leaders",
            "Raft groups that this node leads",
            gauge(leaders),
        ),
        (
            "raft_leaderless",
            "Raft groups of this node without a known leader",
            gauge(leaderless),
        ),
        (
            "peers_up",
            "Other nodes that are connected and answer",
            gauge(peers_up),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use quorate_storage::commit_log::CommitLogConfig;

    use super::*;

    #[test]
    fn the_logs_counters_and_the_disk_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = CommitLog::open(Arc::new(OsVfs), dir.path(), CommitLogConfig::default()).unwrap();
        let metrics = Metrics::new();
        metrics.collect_commit_log(log.clone());
        metrics.collect_disk(dir.path().to_owned());
        let (done, written) = std::sync::mpsc::channel();
        let vote = quorate_storage::Vote {
            term: 1,
            voted_for: Some(1),
            committed: false,
        };
        let group = log.group(quorate_storage::RaftGroupId(7));
        group
            .save_vote(vote, Box::new(move |result| done.send(result).unwrap()))
            .unwrap();
        written.recv().unwrap().unwrap();
        let text = metrics.render().unwrap();
        let value = |name: &str| -> f64 {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
                .parse()
                .unwrap()
        };
        assert!(value("quorate_log_fsyncs_total") >= 1.0);
        assert!(value("quorate_log_written_bytes_total") > 0.0);
        assert!(value("quorate_log_fsync_duration_seconds_count") >= 1.0);
        assert!(value("quorate_disk_free_bytes") > 0.0);
        assert_eq!(value("quorate_log_poisoned"), 0.0);
        let all = "quorate_log_fsync_duration_seconds_bucket{le=\"+Inf\"}";
        assert_eq!(
            value(all),
            value("quorate_log_fsync_duration_seconds_count")
        );
        log.close().unwrap();
    }
}
