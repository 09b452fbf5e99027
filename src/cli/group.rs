//! `quorate group`: consumer groups, their members, what they have committed, and moving it.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Repeat, Request, typed};
use super::error::CliError;
use super::out::{Output, Table, or_dash};
use super::wire::GroupOffsets;

#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// All consumer groups.
    List,
    /// One group: its members, who has which queue, and how far it is.
    Describe { group: String },
    /// The members of one group.
    Members { group: String },
    /// Forget a group and everything it has committed. It must have no members.
    Delete { group: String },
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
    /// Also while the group has members.
    #[arg(long)]
    force: bool,
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
            "force": self.force,
        });
        if let Some(queue) = self.queue {
            body["queue"] = json!(queue);
        }
        body
    }
}

pub async fn run(client: &Client, out: Output, command: GroupCommand) -> Result<(), CliError> {
    match command {
        GroupCommand::List => {
            let answer = client.call(Request::get(&["v1", "groups"])).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            out.table(&list_table(&answer))
        }
        GroupCommand::Describe { group } => {
            let answer = describe(client, &group).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            let text = |field: &str| answer[field].as_str().unwrap_or("?").to_owned();
            out.line(&format!(
                "{group}: {}, mode {}, {}, epoch {}, lag {}",
                text("state"),
                text("mode"),
                text("strategy"),
                answer["epoch"],
                or_dash(answer["lag"].as_u64()),
            ))?;
            if answer["members"].as_array().is_some_and(|m| !m.is_empty()) {
                out.table(&member_table(&answer))?;
            }
            out.table(&queue_table(&answer))
        }
        GroupCommand::Members { group } => {
            let answer = describe(client, &group).await?;
            if out.is_json() {
                return out.json(&answer["members"]);
            }
            out.table(&member_table(&answer))
        }
        GroupCommand::Delete { group } => {
            let path = ["v1", "groups", &group];
            let request = Request::new(Method::DELETE, &path, Repeat::IfUnsent);
            client.call(request).await?;
            if !out.is_json() {
                out.line(&format!("deleted consumer group {group}"))?;
            }
            Ok(())
        }
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

async fn describe(client: &Client, group: &str) -> Result<Value, CliError> {
    let path = ["v1", "groups", group];
    client.call(Request::get(&path)).await
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or("-").to_owned()
}

fn list_table(answer: &Value) -> Table {
    let mut table = Table::new(&["GROUP", "KIND", "MEMBERS"]);
    for group in answer["groups"].as_array().into_iter().flatten() {
        table.row(vec![
            text_of(&group["group"]),
            text_of(&group["kind"]),
            or_dash(group["members"].as_u64()),
        ]);
    }
    table
}

/// Queues in few words: `orders/0,1,3`.
fn queues_of(list: &Value) -> String {
    let mut topics: Vec<(&str, Vec<String>)> = Vec::new();
    for entry in list.as_array().into_iter().flatten() {
        let topic = entry["topic"].as_str().unwrap_or("?");
        let queue = entry["queue"].to_string();
        match topics.last_mut() {
            Some((last, queues)) if *last == topic => queues.push(queue),
            _ => topics.push((topic, vec![queue])),
        }
    }
    let each = topics.iter();
    let each = each.map(|(topic, queues)| format!("{topic}/{}", queues.join(",")));
    let text = each.collect::<Vec<_>>().join(" ");
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

fn member_table(answer: &Value) -> Table {
    let mut table = Table::new(&[
        "MEMBER",
        "INSTANCE",
        "EPOCH",
        "HEARD MS AGO",
        "QUEUES",
        "GIVES UP",
    ]);
    for member in answer["members"].as_array().into_iter().flatten() {
        table.row(vec![
            text_of(&member["member_id"]),
            text_of(&member["instance_id"]),
            or_dash(member["epoch"].as_u64()),
            or_dash(member["last_heartbeat_age_ms"].as_u64()),
            queues_of(&member["assignment"]),
            queues_of(&member["revoking"]),
        ]);
    }
    table
}

fn queue_table(answer: &Value) -> Table {
    let mut table = Table::new(&[
        "TOPIC",
        "QUEUE",
        "COMMITTED",
        "END",
        "LAG",
        "LAG MS",
        "MEMBER",
    ]);
    for entry in answer["offsets"].as_array().into_iter().flatten() {
        table.row(vec![
            text_of(&entry["topic"]),
            or_dash(entry["queue"].as_u64()),
            or_dash(entry["offset"].as_u64()),
            or_dash(entry["end_offset"].as_u64()),
            or_dash(entry["lag"].as_u64()),
            or_dash(entry["lag_ms"].as_u64()),
            text_of(&entry["member_id"]),
        ]);
    }
    table
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
        let expected = json!({"topic": "t", "queue": 2, "to": {"shift_by": -100}, "dry_run": false, "force": false});
        assert_eq!(body, expected);
        assert_eq!(reset(&["--to-latest"]).unwrap()["to"], "latest");
    }

    #[test]
    fn a_members_queues_are_told_in_few_words() {
        let queue = |topic: &str, queue: u32| json!({"topic": topic, "queue": queue});
        let answer = json!({"members": [{"member_id": "m1", "instance_id": "host-1", "epoch": 3,
            "last_heartbeat_age_ms": 20, "revoking": [queue("b", 2)],
            "assignment": [queue("a", 0), queue("a", 2), queue("b", 1)]}]});
        let expected = "MEMBER  INSTANCE  EPOCH  HEARD MS AGO  QUEUES     GIVES UP\n\
                        m1      host-1        3            20  a/0,2 b/1  b/2\n";
        assert_eq!(member_table(&answer).render(), expected);
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
