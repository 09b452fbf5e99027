//! `quorate consume`: read queues to their end, or follow them for ever.
//!
//! To the end: queue after queue, so that each queue's order is plain to see. Following: all
//! queues at once by long poll, or, with `--group`, as a member of that group. With `--group`, what
//! was printed is committed, after it was printed.

use std::time::Duration;

use clap::{Args, ValueEnum};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::client::{Client, Repeat, Request, typed};
use super::error::CliError;
use super::member::Membership;
use super::out::{Output, clock_time};
use super::wire::{FetchAnswer, GroupOffsets, Message};

const WAIT_MS: u64 = 30_000;
const RETRY_AFTER: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub struct ConsumeCommand {
    topic: String,
    /// Only these queues; may be repeated. Without it, all of them.
    #[arg(long)]
    queue: Vec<u32>,
    /// `earliest`, `latest` or an offset. With --group, only where nothing was committed yet.
    #[arg(long, default_value = "earliest", value_parser = start)]
    from: Start,
    /// The first message at or after this Unix time in milliseconds.
    #[arg(long, value_name = "MS", conflicts_with = "from")]
    from_timestamp_ms: Option<u64>,
    /// Stay, and print what comes.
    #[arg(long, short)]
    follow: bool,
    /// Stop after this many messages.
    #[arg(long, value_name = "MESSAGES")]
    max: Option<u64>,
    /// Only messages with this tag, or one of several: `created||paid`.
    #[arg(long)]
    tag: Option<String>,
    /// Only messages of which this is true: `headers.region = 'eu' and headers.amount > 10`.
    #[arg(long, value_name = "EXPRESSION")]
    filter: Option<String>,
    /// Begin where this consumer group has committed, and commit what was printed. With --follow
    /// and without --queue: as a member of the group, which shares the queues with the others.
    #[arg(long)]
    group: Option<String>,
    /// Ask the addressed node's own replica; it may lag behind.
    #[arg(long)]
    stale: bool,
    /// What to print of each message.
    #[arg(long, value_enum, default_value_t = Format::Full)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Place, time, key, tag and value.
    Full,
    /// Only the value.
    Value,
}

/// Where to begin, in the words of the API's query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Earliest,
    Latest,
    Offset(u64),
    Timestamp(u64),
}

fn start(text: &str) -> Result<Start, String> {
    match text {
        "earliest" => Ok(Start::Earliest),
        "latest" => Ok(Start::Latest),
        _ => match text.parse() {
            Ok(offset) => Ok(Start::Offset(offset)),
            Err(_) => Err("expected `earliest`, `latest` or an offset".into()),
        },
    }
}

impl Start {
    fn query(self) -> (&'static str, String) {
        match self {
            Self::Earliest => ("offset", "earliest".into()),
            Self::Latest => ("offset", "latest".into()),
            Self::Offset(offset) => ("offset", offset.to_string()),
            Self::Timestamp(time) => ("from_timestamp_ms", time.to_string()),
        }
    }
}

pub async fn run(client: &Client, out: Output, command: ConsumeCommand) -> Result<(), CliError> {
    let mut printer = Printer {
        client,
        out,
        command: &command,
        left: command.max.unwrap_or(u64::MAX),
    };
    if let Some(membership) = membership(&command) {
        return super::member::run(client, out, membership, |raw| printer.print_one(raw)).await;
    }
    let queues = match command.queue.is_empty() {
        true => {
            let topic = client.topic(&command.topic).await?;
            topic.queues.iter().map(|queue| queue.queue).collect()
        }
        false => command.queue.clone(),
    };
    let mut readers = Vec::new();
    for queue in queues {
        readers.push(Reader {
            client,
            command: &command,
            queue,
            next: starting_point(client, &command, queue).await?,
        });
    }
    if command.follow {
        return follow(readers, &mut printer).await;
    }
    for mut reader in readers {
        loop {
            let answer = reader.fetch(0).await?;
            let done = answer.messages.is_empty() && answer.next_offset >= answer.end_offset;
            if !printer.print(reader.queue, answer).await? {
                return Ok(());
            }
            if done {
                break;
            }
        }
    }
    Ok(())
}

/// Who follows all queues for a group does so as a member of it.
fn membership(command: &ConsumeCommand) -> Option<Membership<'_>> {
    if !command.follow || !command.queue.is_empty() || command.stale {
        return None;
    }
    let start = match command
        .from_timestamp_ms
        .map_or(command.from, Start::Timestamp)
    {
        Start::Earliest => json!("earliest"),
        Start::Latest => json!("latest"),
        Start::Timestamp(time) => json!({"timestamp_ms": time}),
        Start::Offset(_) => return None,
    };
    Some(Membership {
        group: command.group.as_deref()?,
        topic: &command.topic,
        tag: command.tag.as_deref(),
        filter: command.filter.as_deref(),
        start,
    })
}

/// The committed offset where there is one, else what `--from` says.
async fn starting_point(
    client: &Client,
    command: &ConsumeCommand,
    queue: u32,
) -> Result<Start, CliError> {
    if let Some(group) = &command.group {
        let path = ["v1", "groups", group, "offsets"];
        let offsets: GroupOffsets = client
            .read(Request::get(&path).query("topic", &command.topic))
            .await?;
        let of_queue = |entry: &&super::wire::GroupOffset| {
            entry.topic == command.topic && entry.queue == queue
        };
        if let Some(offset) = offsets
            .offsets
            .iter()
            .find(of_queue)
            .and_then(|entry| entry.offset)
        {
            return Ok(Start::Offset(offset));
        }
    }
    Ok(command
        .from_timestamp_ms
        .map_or(command.from, Start::Timestamp))
}

async fn follow(readers: Vec<Reader<'_>>, printer: &mut Printer<'_>) -> Result<(), CliError> {
    let (sender, mut receiver) = mpsc::channel(readers.len().max(1));
    let reading = readers
        .into_iter()
        .map(|reader| reader.follow(sender.clone()));
    let reading = futures_util::future::try_join_all(reading);
    drop(sender);
    let printing = async {
        while let Some((queue, answer)) = receiver.recv().await {
            if !printer.print(queue, answer).await? {
                break;
            }
        }
        Ok(())
    };
    tokio::select! {
        failed = reading => failed.map(|_| ()),
        printed = printing => printed,
    }
}

type Answer = FetchAnswer<Value>;

struct Reader<'a> {
    client: &'a Client,
    command: &'a ConsumeCommand,
    queue: u32,
    next: Start,
}

impl Reader<'_> {
    async fn fetch(&mut self, wait_ms: u64) -> Result<Answer, CliError> {
        let queue = self.queue.to_string();
        let path = [
            "v1",
            "topics",
            &self.command.topic,
            "queues",
            &queue,
            "messages",
        ];
        let (name, value) = self.next.query();
        let mut request = Request::get(&path)
            .query(name, value)
            .query("max_messages", 500)
            .query("wait_ms", wait_ms)
            .timeout(Duration::from_millis(wait_ms) + Duration::from_secs(15));
        if let Some(tag) = &self.command.tag {
            request = request.query("tag", tag);
        }
        if let Some(filter) = &self.command.filter {
            request = request.query("filter", filter);
        }
        if self.command.stale {
            request = request.query("consistency", "stale");
        }
        let answer: Answer = self.client.read(request).await?;
        self.next = Start::Offset(answer.next_offset);
        Ok(answer)
    }

    /// Long polls for ever; a cluster between two leaders is waited for.
    async fn follow(mut self, sender: mpsc::Sender<(u32, Answer)>) -> Result<(), CliError> {
        loop {
            match self.fetch(WAIT_MS).await {
                Ok(answer) => {
                    if sender.send((self.queue, answer)).await.is_err() {
                        return Ok(());
                    }
                }
                Err(error) if error.retryable() => {
                    self.client.move_on();
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

struct Printer<'a> {
    client: &'a Client,
    out: Output,
    command: &'a ConsumeCommand,
    left: u64,
}

impl Printer<'_> {
    /// Prints, then commits; false when `--max` is reached.
    async fn print(&mut self, queue: u32, answer: Answer) -> Result<bool, CliError> {
        let mut committable = answer.next_offset;
        let moved = !answer.messages.is_empty();
        for raw in answer.messages {
            let message: Message = typed(&raw)?;
            if self.left == 0 {
                committable = message.offset;
                break;
            }
            self.print_one(&raw)?;
        }
        if let (Some(group), true) = (&self.command.group, moved) {
            self.commit(group, queue, committable).await?;
        }
        Ok(self.left > 0)
    }

    /// Prints; false when that was the last of `--max`.
    fn print_one(&mut self, raw: &Value) -> Result<bool, CliError> {
        if self.left == 0 {
            return Ok(false);
        }
        self.left -= 1;
        if self.out.is_json() {
            self.out.json(raw)?;
        } else {
            let message: Message = typed(raw)?;
            self.out.line(&render(&message, self.command.format))?;
        }
        Ok(self.left > 0)
    }

    async fn commit(&self, group: &str, queue: u32, offset: u64) -> Result<(), CliError> {
        let path = ["v1", "groups", group, "offsets"];
        let body = json!({"offsets": [
            {"topic": self.command.topic, "queue": queue, "offset": offset}]});
        // The same offset again says the same.
        let request = Request::new(Method::PUT, &path, Repeat::Always).json(&body)?;
        let answer = self.client.call(request).await?;
        match answer["results"][0].get("error") {
            Some(problem) => Err(CliError::Problem(Box::new(typed(problem)?))),
            None => Ok(()),
        }
    }
}

fn render(message: &Message, format: Format) -> String {
    let bytes = message.bytes().unwrap_or_default();
    let value = String::from_utf8_lossy(&bytes);
    if format == Format::Value {
        return value.into_owned();
    }
    let time = clock_time(message.timestamp_ms);
    let mut line = format!("{}/{}  {time}", message.queue, message.offset);
    for (name, text) in [("key", &message.key), ("tag", &message.tag)] {
        if let Some(text) = text {
            line.push_str(&format!("  {name}={text}"));
        }
    }
    format!("{line}  {value}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_word_or_an_offset() {
        assert_eq!(start("earliest"), Ok(Start::Earliest));
        assert_eq!(start("17"), Ok(Start::Offset(17)));
        assert!(start("soon").is_err());
        assert!(start("-1").is_err());
        assert_eq!(
            Start::Timestamp(5).query(),
            ("from_timestamp_ms", "5".into())
        );
    }

    #[test]
    fn a_message_is_one_line() {
        let message: Message = serde_json::from_value(json!({"queue": 1, "offset": 7,
            "message_id": "m", "timestamp_ms": 1_700_000_000_123_u64, "key": "k", "headers": {},
            "value": "text"}))
        .unwrap();
        assert_eq!(
            render(&message, Format::Full),
            "1/7  22:13:20.123  key=k  text"
        );
        assert_eq!(render(&message, Format::Value), "text");
    }
}
