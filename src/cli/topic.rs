//! `quorate topic`: topics and where their queues live.

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, Repeat, Request, typed};
use super::error::CliError;
use super::out::{Output, Table, count, list, or_dash};
use super::wire::{Topic, Topics};

#[derive(Debug, Subcommand)]
pub enum TopicCommand {
    /// Create a topic; the same one again is fine.
    Create(CreateArgs),
    /// All topics.
    List,
    /// One topic: who leads each queue, which replicas keep up, which offsets it has.
    Show { topic: String },
    /// Change a topic. Queues can only grow.
    #[command(visible_alias = "alter")]
    Update(UpdateArgs),
    /// Delete a topic and every message in it.
    Delete { topic: String },
    /// Which queue messages with a key go to.
    Queue { topic: String, key: String },
    /// Have a topic generate messages of itself, or stop it.
    Generate(GenerateArgs),
    /// Hand the leadership of a queue to another of its replicas.
    MoveLeader {
        topic: String,
        queue: u32,
        /// The node that shall lead.
        node: u64,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Flush {
    /// Acknowledged when a majority has fsynced.
    Sync,
    /// Acknowledged when a majority has written; safe against killed processes, not lost power.
    Async,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum OnFull {
    Reject,
    DropNewest,
}

/// What can be chosen at creation and changed later. Absent: the server's default, or no change.
#[derive(Debug, Args)]
struct Settings {
    #[arg(long)]
    queues: Option<u32>,
    #[arg(long)]
    flush: Option<Flush>,
    /// Messages older than this may be removed; `none` keeps them.
    #[arg(long, value_name = "MS|none", value_parser = number_or_none)]
    max_age_ms: Option<OrNone>,
    /// The oldest messages of a queue beyond this size may be removed; `none` keeps them.
    #[arg(long, value_name = "BYTES|none", value_parser = number_or_none)]
    max_bytes: Option<OrNone>,
    #[arg(long, value_name = "BYTES")]
    max_message_bytes: Option<u64>,
    /// How many messages a consumer group may be behind before producers feel it.
    #[arg(long, value_name = "MESSAGES|none", value_parser = number_or_none)]
    backlog: Option<OrNone>,
    /// How many bytes of a queue may wait for the slowest consumer group.
    #[arg(long, value_name = "BYTES|none", value_parser = number_or_none)]
    backlog_bytes: Option<OrNone>,
    /// How old the oldest message that waits for the slowest consumer group may be.
    #[arg(long, value_name = "MS|none", value_parser = number_or_none)]
    backlog_age_ms: Option<OrNone>,
    /// What becomes of a message when the backlog is full.
    #[arg(long)]
    on_full: Option<OnFull>,
    /// Messages a second that producers may send, over all queues.
    #[arg(long, value_name = "MESSAGES|none", value_parser = number_or_none)]
    quota_messages: Option<OrNone>,
    /// Bytes a second that producers may send, over all queues.
    #[arg(long, value_name = "BYTES|none", value_parser = number_or_none)]
    quota_bytes: Option<OrNone>,
    /// How long a message can be consumed; `none` for ever.
    #[arg(long, value_name = "MS|none", value_parser = number_or_none)]
    ttl_ms: Option<OrNone>,
    /// Whether it is written down what becomes of each message.
    #[arg(long)]
    trace: Option<bool>,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    topic: String,
    /// How many nodes hold each queue.
    #[arg(long)]
    replicas: Option<u32>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Args)]
pub struct UpdateArgs {
    topic: String,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    topic: String,
    /// Messages a second, 0.001 to 10000; without it the generator is shown.
    #[arg(long, value_name = "RATE", conflicts_with = "stop")]
    rate: Option<f64>,
    /// Of every message.
    #[arg(long, requires = "rate", default_value = "")]
    value: String,
    /// No more of it.
    #[arg(long)]
    stop: bool,
}

/// A number, or the JSON null that says "no limit".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct OrNone(Option<u64>);

fn number_or_none(text: &str) -> Result<OrNone, String> {
    match text {
        "none" => Ok(OrNone(None)),
        _ => match text.parse() {
            Ok(number) => Ok(OrNone(Some(number))),
            Err(_) => Err("expected a whole number or `none`".into()),
        },
    }
}

pub async fn run(client: &Client, out: Output, command: TopicCommand) -> Result<(), CliError> {
    match command {
        TopicCommand::Create(args) => {
            let body = create_body(&args);
            let request = Request::new(Method::POST, &["v1", "topics"], Repeat::Always);
            show(out, client.call(request.json(&body)?).await?)
        }
        TopicCommand::Update(args) => {
            let path = ["v1", "topics", &args.topic];
            let request = Request::new(Method::PATCH, &path, Repeat::Always);
            show(
                out,
                client.call(request.json(&args.settings.body())?).await?,
            )
        }
        TopicCommand::Show { topic } => show(
            out,
            client.call(Request::get(&["v1", "topics", &topic])).await?,
        ),
        TopicCommand::List => list_topics(client, out).await,
        TopicCommand::Delete { topic } => {
            let path = ["v1", "topics", topic.as_str()];
            client
                .call(Request::new(Method::DELETE, &path, Repeat::IfUnsent))
                .await?;
            if !out.is_json() {
                out.line(&format!("deleted topic {topic}"))?;
            }
            Ok(())
        }
        TopicCommand::Queue { topic, key } => {
            let path = ["v1", "topics", &topic, "queue"];
            let answer = client.call(Request::get(&path).query("key", &key)).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            out.line(&answer["queue"].to_string())
        }
        TopicCommand::Generate(args) => generate(client, out, args).await,
        TopicCommand::MoveLeader { topic, queue, node } => {
            let number = queue.to_string();
            let path = ["v1", "topics", &topic, "queues", &number, "leader"];
            let request = Request::new(Method::POST, &path, Repeat::Always);
            let answer = client
                .call(request.json(&json!({ "node_id": node }))?)
                .await?;
            if out.is_json() {
                return out.json(&answer);
            }
            out.line(&format!("node {node} leads {topic}/{queue}"))
        }
    }
}

async fn generate(client: &Client, out: Output, args: GenerateArgs) -> Result<(), CliError> {
    let path = ["v1", "topics", &args.topic, "generator"];
    let request = match (args.rate, args.stop) {
        (_, true) => Request::new(Method::DELETE, &path, Repeat::Always),
        (Some(rate), false) => Request::new(Method::PUT, &path, Repeat::Always)
            .json(&json!({ "rate_per_s": rate, "value": args.value }))?,
        (None, false) => Request::get(&path),
    };
    let answer = client.call(request).await?;
    match (args.stop, out.is_json()) {
        (true, false) => out.line(&format!("{} generates nothing", args.topic)),
        (true, true) => Ok(()),
        (false, true) => out.json(&answer),
        (false, false) => out.line(&format!(
            "{} generates {} messages a second: {}",
            args.topic, answer["rate_per_s"], answer["value"]
        )),
    }
}

fn create_body(args: &CreateArgs) -> Value {
    let mut body = args.settings.body();
    body.insert("name".into(), json!(args.topic));
    if let Some(replicas) = args.replicas {
        body.insert("replicas".into(), json!(replicas));
    }
    Value::Object(body)
}

impl Settings {
    fn body(&self) -> Map<String, Value> {
        let mut body = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(name.into(), value);
            }
        };
        set("queues", self.queues.map(Value::from));
        set("flush", self.flush.as_ref().map(value_name));
        set("retention", self.retention());
        set("max_message_bytes", self.max_message_bytes.map(Value::from));
        set("backlog", self.backlog_body());
        set("quota", self.quota());
        set("ttl_ms", self.ttl_ms.map(|limit| json!(limit.0)));
        set("trace", self.trace.map(|on| json!(on)));
        body
    }

    fn retention(&self) -> Option<Value> {
        let mut retention = Map::new();
        if let Some(OrNone(age)) = self.max_age_ms {
            retention.insert("max_age_ms".into(), json!(age));
        }
        if let Some(OrNone(bytes)) = self.max_bytes {
            retention.insert("max_bytes".into(), json!(bytes));
        }
        (!retention.is_empty()).then_some(Value::Object(retention))
    }

    fn quota(&self) -> Option<Value> {
        let mut quota = Map::new();
        for (name, limit) in [
            ("messages_per_s", self.quota_messages),
            ("bytes_per_s", self.quota_bytes),
        ] {
            if let Some(OrNone(limit)) = limit {
                quota.insert(name.into(), json!(limit));
            }
        }
        (!quota.is_empty()).then_some(Value::Object(quota))
    }

    fn backlog_body(&self) -> Option<Value> {
        let mut backlog = Map::new();
        for (name, limit) in [
            ("max_messages", self.backlog),
            ("max_bytes", self.backlog_bytes),
            ("max_age_ms", self.backlog_age_ms),
        ] {
            if let Some(OrNone(limit)) = limit {
                backlog.insert(name.into(), json!(limit));
            }
        }
        if let Some(on_full) = &self.on_full {
            backlog.insert("on_full".into(), value_name(on_full));
        }
        (!backlog.is_empty()).then_some(Value::Object(backlog))
    }
}

fn value_name(value: &impl ValueEnum) -> Value {
    let name = value
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    Value::from(name.unwrap_or_default())
}

async fn list_topics(client: &Client, out: Output) -> Result<(), CliError> {
    let answer = client.call(Request::get(&["v1", "topics"])).await?;
    if out.is_json() {
        return out.json(&answer);
    }
    let topics: Topics = typed(&answer)?;
    let mut table = Table::new(&[
        "TOPIC",
        "QUEUES",
        "REPLICAS",
        "FLUSH",
        "MESSAGES",
        "LEADERLESS",
    ]);
    for topic in &topics.topics {
        let held = topic
            .queues
            .iter()
            .map(|queue| queue.end_offset.saturating_sub(queue.earliest_offset));
        let leaderless = topic.queues.iter().filter(|queue| queue.leader.is_none());
        table.row(vec![
            topic.name.clone(),
            topic.queues.len().to_string(),
            topic.config.replicas.to_string(),
            topic.config.flush.clone(),
            held.sum::<u64>().to_string(),
            leaderless.count().to_string(),
        ]);
    }
    out.table(&table)
}

fn show(out: Output, answer: Value) -> Result<(), CliError> {
    if out.is_json() {
        return out.json(&answer);
    }
    let topic: Topic = typed(&answer)?;
    let config = &topic.config;
    out.line(&format!(
        "{}: {}, {}, flush {}, messages up to {} bytes, kept {}",
        topic.name,
        count(topic.queues.len(), "queue"),
        count(config.replicas as usize, "replica"),
        config.flush,
        config.max_message_bytes,
        kept(config.retention.max_age_ms, config.retention.max_bytes),
    ))?;
    out.table(&queue_table(&topic))
}

fn kept(max_age_ms: Option<u64>, max_bytes: Option<u64>) -> String {
    let age = max_age_ms.map(|age| format!("{} min", age / 60_000));
    let bytes = max_bytes.map(|bytes| format!("{bytes} bytes a queue"));
    let limits: Vec<String> = age.into_iter().chain(bytes).collect();
    match limits.is_empty() {
        true => "for ever".into(),
        false => limits.join(" and "),
    }
}

fn queue_table(topic: &Topic) -> Table {
    let mut table = Table::new(&[
        "QUEUE", "LEADER", "TERM", "REPLICAS", "IN SYNC", "EARLIEST", "END",
    ]);
    for queue in &topic.queues {
        table.row(vec![
            queue.queue.to_string(),
            or_dash(queue.leader),
            queue.term.to_string(),
            list(&queue.replicas),
            list(&queue.in_sync),
            queue.earliest_offset.to_string(),
            queue.end_offset.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Harness {
        #[command(subcommand)]
        command: TopicCommand,
    }

    fn created(arguments: &[&str]) -> Value {
        let all = ["x", "create"].iter().chain(arguments);
        match Harness::try_parse_from(all).unwrap().command {
            TopicCommand::Create(args) => create_body(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_was_asked_for_is_sent() {
        assert_eq!(created(&["orders"]), json!({"name": "orders"}));
        let body = created(&[
            "orders",
            "--queues",
            "4",
            "--flush",
            "async",
            "--max-age-ms",
            "none",
        ]);
        let expected = json!({"name": "orders", "queues": 4, "flush": "async",
            "retention": {"max_age_ms": null}});
        assert_eq!(body, expected);
    }

    #[test]
    fn the_backlog_is_nested_as_the_api_wants_it() {
        let body = created(&["orders", "--backlog", "10", "--on-full", "drop_newest"]);
        assert_eq!(
            body["backlog"],
            json!({"max_messages": 10, "on_full": "drop_newest"})
        );
    }

    #[test]
    fn bounds_and_quotas_are_nested_as_the_api_wants_them() {
        let bounds = ["--backlog-bytes", "9", "--backlog-age-ms", "none"];
        let quota = ["--quota-messages", "5", "--quota-bytes", "none"];
        let body = created(&[&["orders"], &bounds[..], &quota[..]].concat());
        assert_eq!(
            (&body["backlog"], &body["quota"]),
            (
                &json!({"max_bytes": 9, "max_age_ms": null}),
                &json!({"messages_per_s": 5, "bytes_per_s": null})
            )
        );
    }

    #[test]
    fn a_limit_that_is_no_number_is_refused() {
        assert!(Harness::try_parse_from(["x", "create", "t", "--ttl-ms", "soon"]).is_err());
    }

    #[test]
    fn a_queue_without_a_leader_shows_a_dash() {
        let topic: Topic = serde_json::from_value(json!({"name": "t", "config": {}, "queues": [
            {"queue": 0, "leader": null, "term": 3, "replicas": [1, 2, 3], "in_sync": [1, 2],
             "earliest_offset": 0, "end_offset": 17}]}))
        .unwrap();
        let expected = "QUEUE  LEADER  TERM  REPLICAS  IN SYNC  EARLIEST  END\n    \
                        0       -     3  1,2,3     1,2             0   17\n";
        assert_eq!(queue_table(&topic).render(), expected);
    }
}
