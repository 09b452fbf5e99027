//! `quorate produce`: arguments, files or the lines of standard input become messages.
//!
//! Lines are joined into requests as they are found waiting, never delayed to fill one. With
//! `--retry` a producer is registered, so that an unknown outcome can be asked again safely.

mod sender;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::Client;
use super::error::CliError;
use super::out::{Output, count, or_dash};
use super::wire::{Acked, NewMessage, Stored};
use sender::{Sender, SenderOptions};

/// Lines read ahead of the network; more would only sit in memory.
const LINES_AHEAD: usize = 1024;

#[derive(Debug, Args)]
pub struct ProduceCommand {
    topic: String,
    /// Values, one message each. Without values and files: the lines of standard input.
    values: Vec<String>,
    /// A file whose whole content is one message; may be repeated.
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    #[arg(long)]
    key: Option<String>,
    #[arg(long)]
    tag: Option<String>,
    /// May be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    header: Vec<(String, String)>,
    #[arg(long)]
    queue: Option<u32>,
    /// Visible only after this time.
    #[arg(long, value_name = "MS")]
    delay_ms: Option<u64>,
    /// Delivered only until this time after it became visible.
    #[arg(long, value_name = "MS")]
    ttl_ms: Option<u64>,
    /// At most this many messages in one request.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Number the messages, and repeat until they are stored, exactly once.
    #[arg(long)]
    retry: bool,
    /// Like --retry, under a name of its own; fences whoever had the name before.
    #[arg(long, value_name = "NAME")]
    producer: Option<String>,
    /// Give up on a request after this time.
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    timeout_ms: u64,
    /// At most this many messages a second.
    #[arg(long, value_name = "PER SECOND", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Append one JSON line for each acknowledged message, for `quorate verify`.
    #[arg(long, value_name = "PATH")]
    acked: Option<PathBuf>,
    /// Print only the summary.
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

pub async fn run(client: &Client, out: Output, command: ProduceCommand) -> Result<(), CliError> {
    let mut journal = Journal::open(&command, out)?;
    let mut source = open_source(&command)?;
    let options = SenderOptions {
        topic: command.topic.clone(),
        queue: command.queue,
        keyed: command.key.is_some(),
        timeout: Duration::from_millis(command.timeout_ms),
    };
    let mut sender = if command.retry || command.producer.is_some() {
        Sender::numbered(client, options, command.producer.as_deref()).await?
    } else {
        Sender::plain(client, options)
    };
    let template = command.template();
    let mut pace = Pace::new(command.rate);
    let mut batch = Vec::new();
    while let Some(first) = source.recv().await {
        batch.push(template.with(first?));
        while batch.len() < command.batch as usize {
            match source.try_recv() {
                Ok(value) => batch.push(template.with(value?)),
                Err(_) => break,
            }
        }
        let sent = sender.send(&mut batch).await;
        for (message, stored) in batch.iter().zip(&sent.stored) {
            if let Some(stored) = stored {
                journal.acknowledged(message, stored)?;
            }
        }
        journal.flush()?;
        if let Some(error) = sent.error {
            journal.summary(sender.durability());
            return Err(error);
        }
        pace.after(batch.len()).await;
        batch.clear();
    }
    journal.summary(sender.durability());
    Ok(())
}

/// What all messages of one command have in common.
struct Template(NewMessage);

impl ProduceCommand {
    fn template(&self) -> Template {
        Template(NewMessage {
            key: self.key.clone(),
            tag: self.tag.clone(),
            headers: self.header.iter().cloned().collect::<BTreeMap<_, _>>(),
            queue: self.queue,
            delay_ms: self.delay_ms,
            ttl_ms: self.ttl_ms,
            ..NewMessage::default()
        })
    }
}

impl Template {
    fn with(&self, value: Vec<u8>) -> NewMessage {
        let mut message = self.0.clone();
        message.set_value(value);
        message
    }
}

type Source = mpsc::Receiver<Result<Vec<u8>, CliError>>;

fn open_source(command: &ProduceCommand) -> Result<Source, CliError> {
    let from_stdin = command.values.is_empty() && command.file.is_empty();
    let given = command.values.len() + command.file.len();
    let (sender, receiver) = mpsc::channel(if from_stdin { LINES_AHEAD } else { given });
    if from_stdin {
        // A thread, since reading a terminal or a pipe blocks. It ends with the input or with us.
        std::thread::spawn(move || read_lines(&sender));
        return Ok(receiver);
    }
    let mut values: Vec<Vec<u8>> = Vec::with_capacity(given);
    values.extend(
        command
            .values
            .iter()
            .map(|value| value.clone().into_bytes()),
    );
    for path in &command.file {
        let read = std::fs::read(path);
        values.push(read.map_err(|error| CliError::io(format!("read {}", path.display()), error))?);
    }
    for value in values {
        // The channel was made for exactly this many.
        let _ = sender.try_send(Ok(value));
    }
    Ok(receiver)
}

fn read_lines(sender: &mpsc::Sender<Result<Vec<u8>, CliError>>) {
    let mut input = std::io::stdin().lock();
    loop {
        let mut line = Vec::new();
        let item = match input.read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {
                if line.last() == Some(&b'\n') {
                    line.pop();
                }
                Ok(line)
            }
            Err(error) => Err(CliError::io("read standard input", error)),
        };
        let failed = item.is_err();
        if sender.blocking_send(item).is_err() || failed {
            return;
        }
    }
}

/// Keeps to a rate over time: a late request is followed sooner by the next.
struct Pace {
    per_message: Option<Duration>,
    due: Instant,
}

impl Pace {
    fn new(rate: Option<u32>) -> Self {
        Self {
            per_message: rate.map(|rate| Duration::from_secs(1) / rate),
            due: Instant::now(),
        }
    }

    async fn after(&mut self, messages: usize) {
        let Some(per_message) = self.per_message else {
            return;
        };
        self.due += per_message * u32::try_from(messages).unwrap_or(u32::MAX);
        // After an outage the lost time is not caught up with in one burst.
        self.due = self.due.max(Instant::now() - Duration::from_secs(1));
        tokio::time::sleep_until(self.due).await;
    }
}

/// Tells of every acknowledgement: on the screen, and in the `--acked` file.
struct Journal {
    out: Output,
    quiet: bool,
    topic: String,
    acked: Option<BufWriter<File>>,
    count: usize,
}

impl Journal {
    fn open(command: &ProduceCommand, out: Output) -> Result<Self, CliError> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map_err(|error| CliError::io(format!("open {}", path.display()), error))
        };
        Ok(Self {
            out,
            quiet: command.quiet,
            topic: command.topic.clone(),
            acked: command
                .acked
                .as_ref()
                .map(open)
                .transpose()?
                .map(BufWriter::new),
            count: 0,
        })
    }

    fn acknowledged(&mut self, message: &NewMessage, stored: &Stored) -> Result<(), CliError> {
        self.count += 1;
        if let (Some(file), Some(offset)) = (&mut self.acked, stored.offset) {
            let line = Acked {
                topic: self.topic.clone(),
                queue: stored.queue,
                offset,
                message_id: stored.message_id.clone(),
                value: message.value.clone(),
                value_base64: message.value_base64.clone(),
            };
            serde_json::to_writer(&mut *file, &line)
                .map_err(std::io::Error::from)
                .and_then(|()| file.write_all(b"\n"))
                .map_err(|error| CliError::io("write the --acked file", error))?;
        }
        if self.quiet {
            return Ok(());
        }
        if self.out.is_json() {
            return self.out.json(stored);
        }
        let (queue, offset) = (stored.queue, or_dash(stored.offset));
        self.out.line(&format!(
            "queue {queue}  offset {offset}  id {}",
            stored.message_id
        ))
    }

    fn flush(&mut self) -> Result<(), CliError> {
        match &mut self.acked {
            Some(file) => file
                .flush()
                .map_err(|error| CliError::io("write the --acked file", error)),
            None => Ok(()),
        }
    }

    fn summary(&self, durability: &str) {
        if self.out.is_json() {
            return;
        }
        let how = if durability.is_empty() {
            String::new()
        } else {
            format!(" ({durability})")
        };
        self.out.note(&format!(
            "{} acknowledged{how}",
            count(self.count, "message")
        ));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Harness {
        #[command(flatten)]
        command: ProduceCommand,
    }

    fn parse(arguments: &[&str]) -> Result<ProduceCommand, clap::Error> {
        let all = ["x"].iter().chain(arguments);
        Harness::try_parse_from(all).map(|harness| harness.command)
    }

    #[test]
    fn every_message_of_a_command_looks_alike() {
        let command = parse(&[
            "t", "a", "--key", "k", "--header", "x=1=2", "--header", "y=", "--queue", "3",
        ])
        .unwrap();
        let message = command.template().with(b"a".to_vec());
        let expected = r#"{"value":"a","key":"k","headers":{"x":"1=2","y":""},"queue":3}"#;
        assert_eq!(serde_json::to_string(&message).unwrap(), expected);
    }

    #[test]
    fn a_header_without_a_name_is_refused() {
        assert!(parse(&["t", "--header", "=1"]).is_err());
        assert!(parse(&["t", "--header", "word"]).is_err());
        assert!(parse(&["t", "--batch", "0"]).is_err());
    }

    #[tokio::test]
    async fn arguments_and_files_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("message");
        std::fs::write(&path, [0xff, b'\n']).unwrap();
        let command = parse(&["t", "a", "b", "--file", path.to_str().unwrap()]).unwrap();
        let mut source = open_source(&command).unwrap();
        let mut values = Vec::new();
        while let Some(value) = source.recv().await {
            values.push(value.unwrap());
        }
        assert_eq!(values, [b"a".to_vec(), b"b".to_vec(), vec![0xff, b'\n']]);
    }
}
