//! `quorate cluster`: the nodes, and elections as they happen.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::client::{Client, Request, typed};
use super::error::CliError;
use super::out::{Output, Table, clock_time, count, or_dash};
use super::replicas;
use super::sse::{SseEvent, SseParser};
use super::wire::{Cluster, ClusterEvent};

const RECONNECT_AFTER: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Nodes, how many queues each leads, and what is wrong.
    Status,
    /// One line an event, as it happens: elections, nodes coming and going.
    Watch,
    /// Compare all replicas of all Raft groups, internal ones too, by a hash of what they hold.
    Replicas(ReplicasArgs),
}

#[derive(Debug, Args)]
pub struct ReplicasArgs {
    /// How long replicas may take to come to the same entry, in seconds. While messages are
    /// written they hardly ever are at the same one.
    #[arg(long, default_value_t = 30)]
    wait_s: u64,
}

pub async fn run(client: &Client, out: Output, command: ClusterCommand) -> Result<(), CliError> {
    match command {
        ClusterCommand::Status => status(client, out).await,
        ClusterCommand::Watch => watch(client, out).await,
        ClusterCommand::Replicas(args) => compare(client, out, args).await,
    }
}

async fn status(client: &Client, out: Output) -> Result<(), CliError> {
    let answer = client.call(Request::get(&["v1", "cluster"])).await?;
    if out.is_json() {
        return out.json(&answer);
    }
    let cluster: Cluster = typed(&answer)?;
    out.table(&node_table(&cluster))?;
    out.line(&summary(&cluster))
}

/// Every node of the cluster is asked: what is true of some says nothing of the others.
async fn compare(client: &Client, out: Output, args: ReplicasArgs) -> Result<(), CliError> {
    let cluster: Cluster = client.read(Request::get(&["v1", "cluster"])).await?;
    let nodes = cluster.nodes.iter().map(|node| client.only(&node.url));
    let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
    let nodes: Vec<&Client> = nodes.iter().collect();
    let seen = replicas::compare(&nodes, Duration::from_secs(args.wait_s)).await?;
    if out.is_json() {
        out.json(&json!({"nodes": nodes.len(), "same": seen.is_same(), "seen": seen}))?;
    } else {
        for difference in &seen.differing {
            out.line(&format!("DIFFERENT  {difference}"))?;
        }
        for group in &seen.apart {
            out.line(&format!("NOT YET    {group}"))?;
        }
        out.line(&format!(
            "{} in {} on {}: {}",
            count(seen.replicas, "replica"),
            count(seen.groups, "Raft group"),
            count(nodes.len(), "node"),
            match seen.is_same() {
                true => "all of a group the same",
                false => "not the same",
            }
        ))?;
    }
    match seen.is_same() {
        true => Ok(()),
        false => Err(CliError::Failed(format!(
            "{} with different states, {} whose replicas were not all at one index within {} s",
            count(seen.differing.len(), "group"),
            count(seen.apart.len(), "group"),
            args.wait_s,
        ))),
    }
}

fn node_table(cluster: &Cluster) -> Table {
    let mut table = Table::new(&["NODE", "STATE", "LEADS", "REPLICAS", "URL", "VERSION"]);
    for node in &cluster.nodes {
        table.row(vec![
            node.id.to_string(),
            node.state.clone(),
            node.leaders.to_string(),
            node.replicas.to_string(),
            node.url.clone(),
            node.version.clone(),
        ]);
    }
    table
}

fn summary(cluster: &Cluster) -> String {
    let queues = &cluster.queues;
    format!(
        "cluster {}; catalog led by node {} in term {}; {} queues, {} without a leader, {} under-replicated",
        cluster.cluster_id,
        or_dash(cluster.catalog.leader),
        cluster.catalog.term,
        queues.total,
        queues.leaderless,
        queues.under_replicated,
    )
}

/// Follows the events of one node, and moves to the next one when it goes away.
async fn watch(client: &Client, out: Output) -> Result<(), CliError> {
    let mut connected_once = false;
    loop {
        let request = Request::get(&["v1", "cluster", "events"]).event_stream();
        match client.send(request).await {
            Ok(mut response) => {
                out.note(&format!("-- watching {}", response.url()));
                connected_once = true;
                let mut parser = SseParser::default();
                while let Ok(Some(bytes)) = response.chunk().await {
                    for event in parser.push(&bytes) {
                        print_event(out, &event)?;
                    }
                }
                out.note("-- the connection ended; going on elsewhere");
                client.move_on();
            }
            Err(error) if !(connected_once && error.retryable()) => return Err(error),
            Err(_) => tokio::time::sleep(RECONNECT_AFTER).await,
        }
    }
}

fn print_event(out: Output, event: &SseEvent) -> Result<(), CliError> {
    if out.is_json() {
        return out.line(&event.data);
    }
    match serde_json::from_str::<ClusterEvent>(&event.data) {
        Ok(event) => out.line(&event_line(&event)),
        // An event newer than this client is shown as it is rather than not at all.
        Err(_) => out.line(&format!("{} {}", event.event, event.data)),
    }
}

fn event_line(event: &ClusterEvent) -> String {
    let mut line = format!("{}  {:<18}", clock_time(event.time_ms), event.event);
    if let Some(topic) = &event.topic {
        let queue = event
            .queue
            .map_or_else(String::new, |queue| format!("/{queue}"));
        line.push_str(&format!("  {topic}{queue}"));
    }
    if let Some(node) = event.node {
        line.push_str(&format!("  node {node}"));
    }
    if let Some(term) = event.term {
        line.push_str(&format!("  term {term}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_election_is_one_line() {
        let event: ClusterEvent = serde_json::from_value(json!({"event": "leader_elected",
            "time_ms": 1_700_000_000_123_u64, "topic": "orders", "queue": 2, "term": 5, "node": 3}))
        .unwrap();
        let expected = "22:13:20.123  leader_elected      orders/2  node 3  term 5";
        assert_eq!(event_line(&event), expected);
    }

    #[test]
    fn a_node_event_has_no_queue() {
        let event: ClusterEvent = serde_json::from_value(
            json!({"event": "node_down", "time_ms": 1_700_000_000_123_u64, "node": 3}),
        )
        .unwrap();
        assert_eq!(
            event_line(&event),
            "22:13:20.123  node_down           node 3"
        );
    }

    #[test]
    fn the_summary_names_what_is_wrong() {
        let cluster: Cluster = serde_json::from_value(json!({"cluster_id": "c", "nodes": [],
            "catalog": {"leader": null, "term": 7},
            "queues": {"total": 4, "leaderless": 1, "under_replicated": 2}}))
        .unwrap();
        let text = summary(&cluster);
        assert!(text.contains("node - in term 7"), "{text}");
        assert!(
            text.contains("4 queues, 1 without a leader, 2 under-replicated"),
            "{text}"
        );
    }
}
