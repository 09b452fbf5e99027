//! `quorate group`: what consumer groups have committed, and moving it.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Repeat, Request, typed};
use super::error::CliError;
use super::out::{Output, Table, or_dash};
use super::wire::GroupOffsets;

#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// Committed offsets and lag of one group.
    Offsets {
        group: String,
        #[arg(long)]
        topic: Option<String>,
    },
    /// Move what a group has committed, forwards or back.
    Reset(ResetArgs),
}

#[derive(Debug, Args)]
pub struct ResetArgs {
    group: String,
    #[arg(long)]
    topic: String,
    /// Only this queue; without it, all queues of the topic.
    #[arg(long)]
    queue: Option<u32>,
    #[command(flatten)]
    to: ResetTo,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ResetTo {
    #[arg(long)]
    to_earliest: bool,
    #[arg(long)]
    to_latest: bool,
    #[arg(long, value_name = "OFFSET")]
    to_offset: Option<u64>,
    /// The first message at or after this Unix time in milliseconds.
    #[arg(long, value_name = "MS")]
    to_timestamp_ms: Option<u64>,
    /// Forwards, or back with a negative number.
    #[arg(long, value_name = "MESSAGES", allow_negative_numbers = true)]
    shift_by: Option<i64>,
}

impl ResetTo {
    fn body(&self) -> Value {
        match self {
            Self {
                to_earliest: true, ..
            } => json!("earliest"),
            Self {
                to_latest: true, ..
            } => json!("latest"),
            Self {
                to_offset: Some(offset),
                ..
            } => json!({ "offset": offset }),
            Self {
                to_timestamp_ms: Some(time),
                ..
            } => json!({ "timestamp_ms": time }),
            Self { shift_by, .. } => json!({ "shift_by": shift_by.unwrap_or(0) }),
        }
    }
}

impl ResetArgs {
    fn body(&self) -> Value {
        let mut body = json!({
            "topic": self.topic,
            "to": self.to.body(),
            "dry_run": self.dry_run,
        });
        if let Some(queue) = self.queue {
            body["queue"] = json!(queue);
        }
        body
    }
}

pub async fn run(client: &Client, out: Output, command: GroupCommand) -> Result<(), CliError> {
    match command {
        GroupCommand::Offsets { group, topic } => {
            let path = ["v1", "groups", &group, "offsets"];
            let mut request = Request::get(&path);
            if let Some(topic) = topic {
                request = request.query("topic", topic);
            }
            let answer = client.call(request).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            out.table(&offset_table(&typed(&answer)?))
        }
        GroupCommand::Reset(args) => {
            let path = ["v1", "groups", &args.group, "offsets", "reset"];
            let request = Request::new(Method::POST, &path, Repeat::IfUnsent).json(&args.body())?;
            let answer = client.call(request).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            if args.dry_run {
                out.note("dry run: nothing was moved");
            }
            out.table(&reset_table(&answer))
        }
    }
}

fn offset_table(answer: &GroupOffsets) -> Table {
    let mut table = Table::new(&["TOPIC", "QUEUE", "COMMITTED", "END", "LAG", "LAG MS"]);
    for entry in &answer.offsets {
        table.row(vec![
            entry.topic.clone(),
            entry.queue.to_string(),
            or_dash(entry.offset),
            or_dash(entry.end_offset),
            or_dash(entry.lag),
            or_dash(entry.lag_ms),
        ]);
    }
    table
}

fn reset_table(answer: &Value) -> Table {
    let mut table = Table::new(&["TOPIC", "QUEUE", "BEFORE", "NOW"]);
    let entries = answer["results"]
        .as_array()
        .or_else(|| answer["offsets"].as_array());
    for entry in entries.into_iter().flatten() {
        table.row(vec![
            entry["topic"].as_str().unwrap_or("?").to_owned(),
            or_dash(entry["queue"].as_u64()),
            or_dash(entry["previous"].as_u64()),
            or_dash(entry["offset"].as_u64()),
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
        command: GroupCommand,
    }

    fn reset(arguments: &[&str]) -> Result<Value, clap::Error> {
        let all = ["x", "reset", "g", "--topic", "t"].iter().chain(arguments);
        Harness::try_parse_from(all).map(|harness| match harness.command {
            GroupCommand::Reset(args) => args.body(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn a_reset_names_exactly_one_place() {
        assert!(reset(&[]).is_err());
        assert!(reset(&["--to-earliest", "--to-offset", "5"]).is_err());
        let body = reset(&["--shift-by", "-100", "--queue", "2"]).unwrap();
        let expected =
            json!({"topic": "t", "queue": 2, "to": {"shift_by": -100}, "dry_run": false});
        assert_eq!(body, expected);
        assert_eq!(reset(&["--to-latest"]).unwrap()["to"], "latest");
    }

    #[test]
    fn what_was_never_committed_is_a_dash() {
        let answer: GroupOffsets = serde_json::from_value(json!({"offsets": [
            {"topic": "t", "queue": 0, "offset": null, "end_offset": 9, "lag": 9, "lag_ms": 4}]}))
        .unwrap();
        let expected = "TOPIC  QUEUE  COMMITTED  END  LAG  LAG MS\n\
                        t          0          -    9    9       4\n";
        assert_eq!(offset_table(&answer).render(), expected);
    }
}
