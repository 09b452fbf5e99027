//! With `--acked`: reads every replica and proves what was acknowledged against it.
//!
//! Each node is asked for its own replica (`consistency=stale`), so no node can answer for
//! another. Proved are: every acknowledged message lies at its acknowledged offset with its value
//! on every replica; the replicas of a queue are the same; offsets have no hole; no message is
//! stored twice.

mod judge;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

use super::super::client::{Client, Request};
use super::super::error::CliError;
use super::super::out::{Output, count};
use super::super::wire::{Acked, FetchAnswer, Topic};
use judge::{Findings, QueueAcks, ReplicaLog, judge_queue};

const RETRY_AFTER: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub struct AckedArgs {
    /// Acknowledgements as `quorate produce --acked` writes them; may be repeated.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "duration",
        conflicts_with = "duration"
    )]
    acked: Vec<PathBuf>,
    /// Also refuse values that are stored twice: for producers that number their messages and
    /// never send the same value again.
    #[arg(long, requires = "acked")]
    unique_values: bool,
    /// How long replicas may take to catch up.
    #[arg(long, value_name = "MS", default_value_t = 60_000)]
    wait_ms: u64,
}

pub async fn run(client: &Client, out: Output, command: AckedArgs) -> Result<(), CliError> {
    let acks = read_acks(&command.acked)?;
    let deadline = Instant::now() + Duration::from_millis(command.wait_ms);
    let nodes = nodes(client).await?;
    let mut findings = Findings::new(command.unique_values);
    for (name, mut acked) in acks {
        let topic = client.topic(&name).await?;
        for queue in &topic.queues {
            let acks = acked.remove(&queue.queue).unwrap_or_default();
            let logs = read_replicas(&nodes, &topic, queue.queue, deadline).await?;
            judge_queue(&mut findings, (&name, queue.queue), &acks, &logs);
        }
        for (queue, acks) in acked {
            // The topic has no such queue any more, so what was acknowledged there is gone.
            judge_queue(&mut findings, (&name, queue), &acks, &[]);
        }
    }
    findings.finish();
    if out.is_json() {
        out.json(&findings)?;
    } else {
        for problem in &findings.problems {
            out.line(problem)?;
        }
        out.line(&findings.summary())?;
    }
    match findings.is_clean() {
        true => Ok(()),
        false => Err(CliError::Failed(
            "the log is not what was acknowledged".into(),
        )),
    }
}

type AcksByTopic = BTreeMap<String, BTreeMap<u32, QueueAcks>>;

fn read_acks(paths: &[PathBuf]) -> Result<AcksByTopic, CliError> {
    let mut acks = AcksByTopic::new();
    for path in paths {
        let failed = |error| CliError::io(format!("read {}", path.display()), error);
        let file = BufReader::new(File::open(path).map_err(failed)?);
        for (number, line) in file.lines().enumerate() {
            let ack = parse_ack(path, number + 1, &line.map_err(failed)?)?;
            let queues = acks.entry(ack.topic.clone()).or_default();
            queues.entry(ack.queue).or_default().add(&ack);
        }
    }
    match acks.is_empty() {
        true => Err(CliError::Usage(
            "the files name no acknowledged message".into(),
        )),
        false => Ok(acks),
    }
}

fn parse_ack(path: &Path, line: usize, text: &str) -> Result<Acked, CliError> {
    serde_json::from_str(text).map_err(|error| {
        CliError::Usage(format!(
            "{} line {line} is no acknowledgement: {error}",
            path.display()
        ))
    })
}

/// One client for each node, so that each answers for itself.
async fn nodes(client: &Client) -> Result<BTreeMap<u64, Client>, CliError> {
    let cluster = client.cluster().await?;
    let only = |node: &super::super::wire::Node| Ok((node.id, client.only(&node.url)?));
    cluster.nodes.iter().map(only).collect()
}

/// The queue's log from each of its replicas, once all have what the leader had at the beginning.
async fn read_replicas(
    nodes: &BTreeMap<u64, Client>,
    topic: &Topic,
    queue: u32,
    deadline: Instant,
) -> Result<Vec<ReplicaLog>, CliError> {
    let holders: BTreeSet<u64> = topic
        .queues
        .iter()
        .filter(|entry| entry.queue == queue)
        .flat_map(|entry| entry.replicas.iter().copied())
        .collect();
    let mut logs = Vec::new();
    let mut end = proved_end(nodes, &topic.name, queue, deadline).await?;
    for node in holders {
        let client = nodes.get(&node).ok_or_else(|| {
            CliError::Failed(format!(
                "node {node} holds {}/{queue} and is unknown",
                topic.name
            ))
        })?;
        let log = read_replica(client, &topic.name, queue, node, end, deadline).await?;
        // Writers may still be at work: what one replica has shown committed, all must come to have.
        end = end.max(log.end());
        logs.push(log);
    }
    for log in &mut logs {
        if log.end() < end {
            let client = &nodes[&log.node];
            *log = read_replica(client, &topic.name, queue, log.node, end, deadline).await?;
        }
    }
    Ok(logs)
}

/// Where the queue ends according to its leader, which had to prove that it leads.
async fn proved_end(
    nodes: &BTreeMap<u64, Client>,
    topic: &str,
    queue: u32,
    deadline: Instant,
) -> Result<u64, CliError> {
    loop {
        let mut last = CliError::Failed("the cluster has no nodes".into());
        for client in nodes.values() {
            let number = queue.to_string();
            let path = ["v1", "topics", topic, "queues", &number, "messages"];
            let request = Request::get(&path).query("offset", "latest");
            match client.read::<FetchAnswer>(request).await {
                Ok(answer) => return Ok(answer.end_offset),
                Err(error) => last = error,
            }
        }
        wait_or_fail(last, deadline).await?;
    }
}

/// Reads one replica up to `end` at least; waits for it to get there.
async fn read_replica(
    client: &Client,
    topic: &str,
    queue: u32,
    node: u64,
    end: u64,
    deadline: Instant,
) -> Result<ReplicaLog, CliError> {
    let number = queue.to_string();
    let path = ["v1", "topics", topic, "queues", &number, "messages"];
    let mut log = ReplicaLog::new(node);
    let mut from = "earliest".to_owned();
    loop {
        let request = Request::get(&path)
            .query("offset", &from)
            .query("max_messages", 1000)
            .query("max_bytes", 4 << 20)
            .query("consistency", "stale");
        let stuck = match client.read::<FetchAnswer>(request).await {
            Ok(answer) => {
                log.starts_at(answer.earliest_offset);
                for message in &answer.messages {
                    log.add(message);
                }
                from = answer.next_offset.to_string();
                if !answer.messages.is_empty() {
                    continue;
                }
                if log.end() >= end {
                    return Ok(log);
                }
                let (has, must) = (log.end(), end);
                CliError::Failed(format!(
                    "node {node} has {} of {topic}/{queue}, the leader {must}",
                    count(usize::try_from(has).unwrap_or(usize::MAX), "message")
                ))
            }
            Err(error) => error,
        };
        wait_or_fail(stuck, deadline).await?;
    }
}

async fn wait_or_fail(error: CliError, deadline: Instant) -> Result<(), CliError> {
    let waits = error.retryable() || matches!(error, CliError::Failed(_));
    if !waits || Instant::now() + RETRY_AFTER >= deadline {
        return Err(error);
    }
    tokio::time::sleep(RETRY_AFTER).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ack_file_is_sorted_by_topic_and_queue() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("acked");
        let lines = [
            r#"{"topic":"a","queue":1,"offset":0,"message_id":"m1","value":"x"}"#,
            r#"{"topic":"b","queue":0,"offset":5,"message_id":"m2"}"#,
        ];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let acks = read_acks(&[path]).unwrap();
        assert_eq!(acks["a"][&1].len(), 1);
        assert_eq!(acks["b"][&0].len(), 1);
    }

    #[test]
    fn a_broken_or_empty_file_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("acked");
        std::fs::write(&path, "").unwrap();
        assert!(read_acks(std::slice::from_ref(&path)).is_err());
        std::fs::write(&path, "{}").unwrap();
        let error = read_acks(&[path]).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
