//! What a run is asked to do: its arguments, checked, and the command that repeats it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::super::super::bench::duration;
use super::super::super::error::CliError;

/// What can be done to a cluster.
///
/// A new kind is added here, planned in `schedule` and carried out in `faults`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// SIGKILL, and a new start later.
    Kill,
    /// SIGKILL of all nodes at once.
    KillAll,
    /// SIGSTOP, and SIGCONT later.
    Pause,
    /// SIGTERM, and a new start.
    Restart,
    /// Nodes that can't hear each other, in different shapes, silently or with closed connections.
    Partition,
    /// Frames between nodes take longer.
    Delay,
    /// A frame between two nodes comes twice.
    Duplicate,
    /// Two frames between two nodes change places.
    Reorder,
    /// SIGKILL, bits of its log turned over, and a new start: the others fill it again.
    Damage,
}

impl FaultKind {
    pub fn name(self) -> String {
        // Every kind has a name: none is skipped.
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What of the message model is used beside the log itself, which always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Members that come, crash and go; offsets committed under their epochs.
    Groups,
    /// Messages leased to several consumers, given back, and dead in the end.
    Leases,
    /// Delayed messages, some cancelled.
    Delays,
    /// Half messages with check-back; read, process and write in one.
    Transactions,
    /// A topic exchange over three topics.
    Exchanges,
}

impl Workload {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Make load and faults for this long, then judge everything seen: `30s`, `5m`. Without --url
    /// a cluster of its own is started for it.
    #[arg(long, value_parser = duration)]
    pub duration: Option<Duration>,
    /// Seed of the faults and the load; printed, so that a run can be repeated.
    #[arg(long, requires = "duration")]
    seed: Option<u64>,
    /// Kinds of faults, each of which must happen at least once. Without it: all of them, and none
    /// where --url names a cluster. `--faults=` for none.
    #[arg(
        long,
        value_name = "KIND,KIND",
        value_delimiter = ',',
        requires = "duration"
    )]
    faults: Option<Vec<String>>,
    /// What of the message model is used too. Without it: all of it. `--cover=` for the log alone.
    #[arg(
        long,
        value_name = "PART,PART",
        value_delimiter = ',',
        requires = "duration"
    )]
    cover: Option<Vec<String>>,
    /// A delayed message may be so late once the cluster is whole.
    #[arg(long, default_value = "1s", value_parser = duration, requires = "duration")]
    late: Duration,
    /// Nodes of the cluster that is started.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9), requires = "duration")]
    nodes: u64,
    /// How many nodes may be broken at a time: fewer than half.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=4), requires = "duration")]
    faulty: u64,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8), requires = "duration")]
    topics: u32,
    /// Queues of each topic.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32), requires = "duration")]
    queues: u32,
    /// Messages sent in a second, by all producers together.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(8..=20_000), requires = "duration")]
    rate: u64,
    /// Where the nodes' data and logs go, and stay. Without it: a temporary directory that is kept
    /// only if something is wrong.
    #[arg(long, value_name = "DIR", requires = "duration")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub duration: Duration,
    pub seed: u64,
    pub faults: Vec<FaultKind>,
    pub cover: Vec<Workload>,
    pub late: Duration,
    pub nodes: u64,
    pub faulty: u64,
    pub topics: u32,
    pub queues: u32,
    pub rate: u64,
    pub dir: Option<PathBuf>,
    /// Marks what belongs to this run: no other run has these values.
    pub run: String,
}

impl Plan {
    /// `own` says that the run starts its cluster itself.
    pub fn new(args: RunArgs, duration: Duration, own: bool) -> Result<Self, CliError> {
        let faults = match &args.faults {
            Some(names) => parse_list(names, "fault")?,
            None if own => FaultKind::value_variants().to_vec(),
            None => Vec::new(),
        };
        let plan = Self {
            duration,
            seed: args.seed.unwrap_or_else(|| rand::random::<u32>().into()),
            faults,
            cover: match &args.cover {
                Some(names) => parse_list(names, "part of the message model")?,
                None => Workload::value_variants().to_vec(),
            },
            late: args.late,
            nodes: args.nodes,
            faulty: args.faulty,
            topics: args.topics,
            queues: args.queues,
            rate: args.rate,
            dir: args.dir,
            run: format!("v{:08x}", rand::random::<u32>()),
        };
        plan.check(own)?;
        Ok(plan)
    }

    fn check(&self, own: bool) -> Result<(), CliError> {
        let usage = |text: String| Err(CliError::Usage(text));
        if self.duration < Duration::from_secs(1) {
            return usage("--duration must be at least 1s".into());
        }
        if !own && !self.faults.is_empty() {
            let names: Vec<String> = self.faults.iter().map(|kind| kind.name()).collect();
            let names = names.join(", ");
            return usage(format!(
                "{names}: faults can only be done to a cluster that the run starts itself; leave out --url (or QUORATE_URL) or --faults"
            ));
        }
        if !own && self.dir.is_some() {
            return usage("--dir is for the data of a cluster that the run starts itself".into());
        }
        if !self.faults.is_empty() && self.faulty * 2 >= self.nodes {
            let (faulty, nodes) = (self.faulty, self.nodes);
            return usage(format!(
                "--faulty {faulty} of --nodes {nodes} leaves no majority; {} can be broken at a time",
                nodes.saturating_sub(1) / 2
            ));
        }
        Ok(())
    }

    /// Replicas of each queue: enough that the faulty ones are a minority of them.
    pub fn replicas(&self) -> u64 {
        (self.faulty * 2 + 1).min(self.nodes)
    }

    /// What repeats this run.
    pub fn command(&self, url: Option<&str>) -> String {
        let mut command = format!(
            "quorate verify --duration {}ms --seed {}",
            self.duration.as_millis(),
            self.seed
        );
        match url {
            Some(url) => command.push_str(&format!(" --url {url}")),
            None => {
                let names: Vec<String> = self.faults.iter().map(|kind| kind.name()).collect();
                let (nodes, faulty, names) = (self.nodes, self.faulty, names.join(","));
                command.push_str(&format!(
                    " --nodes {nodes} --faulty {faulty} --faults={names}"
                ));
            }
        }
        let Self {
            topics,
            queues,
            rate,
            ..
        } = self;
        command.push_str(&format!(
            " --topics {topics} --queues {queues} --rate {rate}"
        ));
        let names: Vec<String> = self.cover.iter().map(|part| part.name()).collect();
        let late_ms = self.late.as_millis();
        command.push_str(&format!(" --cover={} --late {late_ms}ms", names.join(",")));
        command
    }
}

fn parse_list<T: ValueEnum + PartialEq>(names: &[String], what: &str) -> Result<Vec<T>, CliError> {
    let mut kinds = Vec::new();
    for name in names.iter().filter(|name| !name.is_empty()) {
        let kind = T::from_str(name, false).map_err(|_| {
            let known = T::value_variants().iter();
            let known: Vec<String> = known
                .filter_map(|kind| Some(kind.to_possible_value()?.get_name().to_owned()))
                .collect();
            let known = known.join(", ");
            CliError::Usage(format!("there is no {what} {name:?}; there are {known}"))
        })?;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}
