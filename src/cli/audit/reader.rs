//! One queue's stored batches, piece by piece, through elections and restarts of nodes.

use std::time::Duration;

use bytes::Bytes;
use quorate_storage::batch::{BatchView, split};
use reqwest::Response;
use serde::Deserialize;

use super::judge::Batch;
use crate::broker::parse_message_id;
use crate::cli::client::{Client, Request};
use crate::cli::error::CliError;
use crate::cli::wire::FetchAnswer;

const BATCHES: &str = "application/vnd.quorate.batches";
const PIECE_MESSAGES: u32 = 10_000;
const PIECE_BYTES: u32 = 4 << 20;
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// A cluster that is between two leaders for longer than all of these is down.
const ATTEMPTS: u32 = 60;

#[derive(Debug)]
pub struct Reader<'a> {
    client: &'a Client,
    topic: &'a str,
    queue: String,
    /// As the last answer had it.
    pub earliest: u64,
}

/// Batches in a row.
#[derive(Debug)]
pub struct Piece {
    /// What was asked for; higher if retention had removed that.
    pub from: u64,
    pub batches: Vec<Batch>,
    pub next_offset: u64,
}

#[derive(Deserialize)]
struct OffsetAt {
    offset: u64,
}

impl<'a> Reader<'a> {
    pub fn new(client: &'a Client, topic: &'a str, queue: u32) -> Self {
        Self {
            client,
            topic,
            queue: queue.to_string(),
            earliest: 0,
        }
    }

    /// Where the queue ends now.
    pub async fn end(&mut self) -> Result<u64, CliError> {
        let answer: FetchAnswer = self.ask(&[("offset", "latest".into())], "messages").await?;
        self.earliest = answer.earliest_offset;
        Ok(answer.end_offset)
    }

    /// The first offset at or after a time.
    pub async fn offset_at(&mut self, timestamp_ms: u64) -> Result<u64, CliError> {
        self.end().await?;
        let time = [("timestamp_ms", timestamp_ms.to_string())];
        let answer: OffsetAt = self.ask(&time, "offset").await?;
        Ok(answer.offset)
    }

    /// The index of the entry that holds the message at an offset, as its id says; none if it is not
    /// shown any more.
    pub async fn entry_of(&self, offset: u64) -> Result<Option<u64>, CliError> {
        let one = [("offset", offset.to_string()), ("max_messages", "1".into())];
        let found: Result<FetchAnswer, CliError> = self.ask(&one, "messages").await;
        let message = match found {
            Ok(answer) => answer.messages.into_iter().next(),
            Err(CliError::Problem(problem)) if problem.status == 416 => None,
            Err(error) => return Err(error),
        };
        let message = message.filter(|message| message.offset == offset);
        Ok(message
            .and_then(|message| parse_message_id(&message.message_id))
            .map(|place| place.index))
    }

    /// The batches from the one with `offset` on, or from where the queue begins by now.
    pub async fn read(&mut self, offset: u64) -> Result<Piece, CliError> {
        let mut from = offset;
        let mut attempt = 0;
        loop {
            let path = self.path("messages");
            let request = Request::get(&path)
                .query("offset", from)
                .query("max_messages", PIECE_MESSAGES)
                .query("max_bytes", PIECE_BYTES)
                .header("accept", BATCHES);
            let answer = async {
                let response = self.client.send(request).await?;
                let next_offset = number(&response, "quorate-next-offset")?;
                let url = response.url().to_string();
                let body = response.bytes().await;
                let body = body.map_err(|error| CliError::NoAnswer {
                    url: url.clone(),
                    reason: error.to_string(),
                })?;
                let batches = batches_of(body, &url)?;
                Ok(Piece {
                    from,
                    batches,
                    next_offset,
                })
            };
            match answer.await {
                Err(CliError::Problem(problem)) if problem.status == 416 => {
                    match problem.earliest_offset {
                        Some(earliest) if earliest > from => from = earliest,
                        _ => return Err(CliError::Problem(problem)),
                    }
                }
                Err(error) if error.retryable() && attempt < ATTEMPTS => {
                    attempt += 1;
                    self.client.move_on();
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                answer => return answer,
            }
        }
    }

    fn path(&self, last: &'a str) -> [&str; 6] {
        ["v1", "topics", self.topic, "queues", &self.queue, last]
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        query: &[(&'static str, String)],
        last: &'a str,
    ) -> Result<T, CliError> {
        let mut attempt = 0;
        loop {
            let path = self.path(last);
            let request = query
                .iter()
                .fold(Request::get(&path), |request, (n, v)| request.query(n, v));
            match self.client.read(request).await {
                Err(error) if error.retryable() && attempt < ATTEMPTS => {
                    attempt += 1;
                    self.client.move_on();
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                answer => return answer,
            }
        }
    }
}

fn number(response: &Response, header: &str) -> Result<u64, CliError> {
    let value = response.headers().get(header).and_then(|v| v.to_str().ok());
    let number = value.and_then(|text| text.parse().ok());
    number.ok_or_else(|| CliError::Protocol {
        url: response.url().to_string(),
        reason: format!("the header {header} is missing"),
    })
}

/// What the judge looks at; a batch whose checksum is wrong ends the audit.
fn batches_of(body: Bytes, url: &str) -> Result<Vec<Batch>, CliError> {
    let views = split(body).map(|bytes| BatchView::parse(bytes?));
    let batches = views.map(|view| {
        let view = view?;
        Ok(Batch {
            base_offset: view.base_offset(),
            count: view.record_count(),
            timestamp_ms: view.max_timestamp_ms(),
            producer: view.producer(),
        })
    });
    let batches: Result<_, quorate_storage::batch::BatchError> = batches.collect();
    batches.map_err(|error| CliError::Protocol {
        url: url.to_owned(),
        reason: format!("a stored batch cannot be read: {error}"),
    })
}
