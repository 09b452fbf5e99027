//! `quorate bench`: closed-loop load with percentiles, with `--gap` what a failover costs, or with
//! `--delayed` how late delayed messages are.
//!
//! The figures are the client's: from the first byte of a request to the last of its answer, on a
//! machine that it may share with the servers.

mod connection;
mod delayed;
mod gap;
mod load;
mod request;
mod target;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use reqwest::{Method, Url};
use serde_json::{Value, json};

use super::client::{Client, Repeat, Request};
use super::error::CliError;
use super::out::Output;
use super::wire::ProducerIdentity;
use gap::GapPlan;
use load::LoadPlan;
use request::{Format, Prepared, RequestSpec};

#[derive(Debug, Args)]
pub struct BenchCommand {
    /// Write to this topic, which is created if it is missing, and kept. Without it: a new one,
    /// deleted afterwards.
    #[arg(long)]
    topic: Option<String>,
    /// Queues of the topic; the load is spread over them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    queues: u32,
    #[arg(long)]
    replicas: Option<u32>,
    /// `sync` or `async`.
    #[arg(long)]
    flush: Option<String>,
    /// Requests under way at once, each on a connection of its own.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,
    /// Messages in one request, all for one queue.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Bytes of one message's value.
    #[arg(long, value_name = "BYTES", default_value_t = 1024)]
    size: usize,
    /// How long to measure: `10s`, `500ms`, `2m`.
    #[arg(long, default_value = "10s", value_parser = duration)]
    duration: Duration,
    /// How long to run before measuring.
    #[arg(long, default_value = "1s", value_parser = duration)]
    warmup: Duration,
    /// Spread the connections over these nodes. Without it: over the --url given.
    #[arg(long, value_name = "URL,URL", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Send to the leader of each queue, as a client that has asked for the leaders does. Without
    /// it the nodes are taken in turns, and forward what they don't lead.
    #[arg(long, conflicts_with_all = ["nodes", "gap"])]
    to_leaders: bool,
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
    /// How long to wait for one answer; 1s with --gap, where the next node is asked then.
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
    /// One retrying client a queue; report the longest time without an acknowledgement.
    #[arg(long, conflicts_with_all = ["in_flight", "batch", "format", "warmup"])]
    gap: bool,
    /// With --gap: wait between an acknowledgement and the next message.
    #[arg(long, default_value = "0ms", value_parser = duration, requires = "gap")]
    pause: Duration,
    /// With --gap: list gaps from this length on.
    #[arg(long, default_value = "100ms", value_parser = duration, requires = "gap")]
    threshold: Duration,
    /// Store so many delayed messages; report how late each became visible.
    #[arg(long, value_name = "MESSAGES", conflicts_with_all = ["gap", "format", "warmup", "duration", "to_leaders"])]
    delayed: Option<u64>,
    /// With --delayed: the first is due so long after the start.
    #[arg(long, default_value = "30s", value_parser = duration, requires = "delayed")]
    after: Duration,
    /// With --delayed: the last is due so long after the first.
    #[arg(long, default_value = "30s", value_parser = duration, requires = "delayed")]
    over: Duration,
}

/// `10s`, `500ms`, `2m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number
        .parse()
        .map_err(|_| "expected something like 10s or 500ms")?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        _ => Err("the unit is ms, s or m".into()),
    }
}

pub async fn run(client: &Client, out: Output, command: BenchCommand) -> Result<(), CliError> {
    if command.format == Format::Bytes && command.batch > 1 {
        let reason = "--format bytes carries one message a request; use json or batches";
        return Err(CliError::Usage(reason.into()));
    }
    let mut addresses = command.addresses(client)?;
    let name = command.topic.clone().unwrap_or_else(fresh_name);
    let queues = command.create_topic(client, &name).await?;
    if command.to_leaders {
        addresses = leaders(client, &name).await?;
    }
    let result = match (command.delayed, command.gap) {
        (Some(messages), _) => run_delayed(client, out, &command, &name, queues, messages).await,
        (None, true) => run_gap(client, out, &command, addresses, &name, queues).await,
        (None, false) => run_load(out, &command, addresses, &name, queues).await,
    };
    if command.topic.is_none() {
        let path = ["v1", "topics", name.as_str()];
        let deleted = client
            .call(Request::new(Method::DELETE, &path, Repeat::Always))
            .await;
        if let Err(error) = deleted {
            out.note(&format!("the topic {name} is left behind: {error}"));
        }
    }
    result
}

async fn run_load(
    out: Output,
    command: &BenchCommand,
    addresses: Vec<String>,
    topic: &str,
    queues: u32,
) -> Result<(), CliError> {
    let requests =
        (0..command.in_flight).map(|worker| command.prepare(topic, worker % queues, None));
    let report = load::run(LoadPlan {
        requests: requests.collect(),
        addresses,
        messages_per_request: command.batch as usize,
        size_bytes: command.size,
        warmup: command.warmup,
        duration: command.duration,
        timeout: command.timeout.unwrap_or(Duration::from_secs(30)),
    })
    .await?;
    if out.is_json() {
        let settings = json!({ "queues": queues, "in_flight": command.in_flight,
            "batch": command.batch, "size_bytes": command.size });
        return out.json(&json!({ "settings": settings, "result": report }));
    }
    report.print(out)
}

async fn run_delayed(
    client: &Client,
    out: Output,
    command: &BenchCommand,
    topic: &str,
    queues: u32,
    messages: u64,
) -> Result<(), CliError> {
    let plan = delayed::DelayedPlan {
        topic: topic.to_owned(),
        queues,
        messages,
        batch: command.batch,
        in_flight: command.in_flight,
        size_bytes: command.size,
        after: command.after,
        over: command.over,
    };
    let report = delayed::run(client, out, &plan).await?;
    if out.is_json() {
        return out.json(&report);
    }
    report.print(out)
}

async fn run_gap(
    client: &Client,
    out: Output,
    command: &BenchCommand,
    addresses: Vec<String>,
    topic: &str,
    queues: u32,
) -> Result<(), CliError> {
    let request = Request::new(Method::POST, &["v1", "producers"], Repeat::Always);
    let identity: ProducerIdentity = client.read(request.json(&json!({}))?).await?;
    let requests = (0..queues).map(|queue| command.prepare(topic, queue, Some(&identity)));
    let report = gap::run(GapPlan {
        requests: requests.collect(),
        addresses,
        duration: command.duration,
        timeout: command.timeout.unwrap_or(Duration::from_secs(1)),
        pause: command.pause,
        threshold: command.threshold,
    })
    .await;
    if out.is_json() {
        return out.json(&report);
    }
    report.print(out)
}

impl BenchCommand {
    fn prepare(&self, topic: &str, queue: u32, producer: Option<&ProducerIdentity>) -> Prepared {
        Prepared::new(&RequestSpec {
            topic,
            queue,
            messages: self.batch as usize,
            size_bytes: self.size,
            format: self.format,
            producer,
        })
    }

    /// `host:port` of the nodes to load.
    fn addresses(&self, client: &Client) -> Result<Vec<String>, CliError> {
        let urls = if self.nodes.is_empty() {
            client.urls()
        } else {
            self.nodes.clone()
        };
        urls.iter().map(|url| address(url)).collect()
    }

    /// Makes sure of the topic; returns how many queues it has.
    async fn create_topic(&self, client: &Client, name: &str) -> Result<u32, CliError> {
        let mut body = json!({ "name": name, "queues": self.queues });
        let settings = [
            ("replicas", self.replicas.map(Value::from)),
            ("flush", self.flush.as_deref().map(Value::from)),
        ];
        for (key, value) in settings {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        let request = Request::new(Method::POST, &["v1", "topics"], Repeat::Always);
        let topic: super::wire::Topic = client.read(request.json(&body)?).await?;
        u32::try_from(topic.queues.len())
            .map_err(|_| CliError::Usage(format!("{name} has too many queues")))
    }
}

/// The `host:port` of the leader of each queue.
async fn leaders(client: &Client, topic: &str) -> Result<Vec<String>, CliError> {
    let cluster = client.call(Request::get(&["v1", "cluster"])).await?;
    let topic = client.call(Request::get(&["v1", "topics", topic])).await?;
    let url_of = |node: &Value| {
        let nodes = cluster["nodes"].as_array()?;
        nodes.iter().find(|n| n["id"] == *node)?["url"].as_str()
    };
    let queues = topic["queues"].as_array().into_iter().flatten();
    queues
        .map(|queue| match url_of(&queue["leader"]) {
            Some(url) => address(url),
            None => Err(CliError::Usage(format!(
                "queue {} has no leader now; try again",
                queue["queue"]
            ))),
        })
        .collect()
}

fn address(url: &str) -> Result<String, CliError> {
    let wrong = || CliError::Usage(format!("{url:?} is not a node's URL"));
    let full = if url.contains("://") {
        url.to_owned()
    } else {
        format!("http://{url}")
    };
    let url = Url::parse(&full).map_err(|_| wrong())?;
    match (url.scheme(), url.host_str()) {
        ("http", Some(host)) => Ok(format!("{host}:{}", url.port().unwrap_or(80))),
        _ => Err(wrong()),
    }
}

fn fresh_name() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("bench-{}", now.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("10").is_err());
        assert!(duration("s").is_err());
    }

    #[test]
    fn an_address_is_what_a_socket_connects_to() {
        assert_eq!(address("http://127.0.0.1:8081").unwrap(), "127.0.0.1:8081");
        assert_eq!(address("http://[::1]:8081/").unwrap(), "[::1]:8081");
        assert_eq!(address("node").unwrap(), "node:80");
        assert!(address("https://h").is_err());
    }
}
