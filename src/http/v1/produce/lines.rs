//! `application/x-ndjson`: one message a line, answered line by line while more lines come.
//!
//! Lines that have arrived together are stored together; a client that waits for each answer gets
//! it at once. A line that is no message gets an error of its own and the others go on. Results
//! leave in the order of the lines, and no more than one body's worth of lines is in memory.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream;

use super::answer::write_line;
use super::wire::MessageBody;
use crate::broker::{BrokerError, Durability, NewMessage, Outcome, ProduceRequest, Stored};
use crate::http::HttpState;
use crate::http::body::{BodyReader, charge, parse_json};
use crate::http::clients::ClientAddress;
use crate::http::error::{ApiError, Problem};
use crate::http::limits::{BudgetShare, ByteBudget};

/// Most lines stored in one go.
const MAX_GROUP: usize = 1_000;

/// Where the messages of the lines go and how retries are recognised.
#[derive(Debug)]
struct Target {
    state: HttpState,
    client: ClientAddress,
    topic: String,
    idempotency_key: Option<String>,
}

/// Takes pieces of a body and gives whole lines.
#[derive(Debug, Default)]
struct LineSplitter {
    rest: BytesMut,
    /// Bytes at the front of `rest` known to hold no line end.
    searched: usize,
}

impl LineSplitter {
    fn push(&mut self, piece: &[u8]) {
        self.rest.extend_from_slice(piece);
    }

    fn next(&mut self) -> Option<Bytes> {
        let found = self.rest[self.searched..]
            .iter()
            .position(|byte| *byte == b'\n');
        let Some(at) = found else {
            self.searched = self.rest.len();
            return None;
        };
        let line = self.rest.split_to(self.searched + at).freeze();
        self.rest.advance(1);
        self.searched = 0;
        Some(line)
    }

    /// What stands after the last line end.
    fn take_rest(&mut self) -> Bytes {
        self.searched = 0;
        self.rest.split().freeze()
    }
}

#[derive(Debug)]
struct Lines {
    reader: BodyReader,
    budget: ByteBudget,
    splitter: LineSplitter,
    target: Target,
    number: u64,
    ended: bool,
    /// What the unanswered lines take of the budget.
    share: BudgetShare,
}

type LineResult = Result<Stored, BrokerError>;

/// The results of a group of lines, in their order.
struct Answered {
    results: Vec<LineResult>,
    durability: Durability,
    /// Why none of the group's messages could even be tried, as for a topic that isn't there.
    refused: Option<BrokerError>,
}

pub async fn produce_lines(
    state: &HttpState,
    client: ClientAddress,
    reader: BodyReader,
    topic: String,
    idempotency_key: Option<String>,
) -> Result<Response, ApiError> {
    let mut lines = Lines {
        reader,
        budget: state.budget.clone(),
        splitter: LineSplitter::default(),
        target: Target {
            state: state.clone(),
            client,
            topic,
            idempotency_key,
        },
        number: 0,
        ended: false,
        share: BudgetShare::default(),
    };
    // The first answers come before the status: a topic that isn't there is still a 404.
    let Some(first) = lines.next_answers().await? else {
        return Err(ApiError::invalid(
            "the body has no line; send one message object a line",
        ));
    };
    if let Some(error) = first.refused {
        return Err(error.into());
    }
    let first = first.to_lines();
    let rest = stream::unfold(Some(lines), |lines| async move {
        let mut lines = lines?;
        match lines.next_answers().await {
            Ok(Some(answered)) => Some((answered.to_lines(), Some(lines))),
            Ok(None) => None,
            Err(error) => Some((error_line(&error), None)),
        }
    });
    let all = futures_util::StreamExt::chain(stream::iter([first]), rest);
    let body = Body::from_stream(futures_util::StreamExt::map(
        all,
        Ok::<_, std::convert::Infallible>,
    ));
    Ok((
        StatusCode::OK,
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        body,
    )
        .into_response())
}

/// The last line of an answer that can't go on: the lines after it were not read.
fn error_line(error: &ApiError) -> Vec<u8> {
    let line = serde_json::json!({ "error": Problem::new(error, true) });
    let mut bytes = line.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

impl Answered {
    fn to_lines(&self) -> Vec<u8> {
        let mut lines = Vec::with_capacity(self.results.len() * 96);
        for result in &self.results {
            write_line(&mut lines, result.as_ref(), self.durability);
        }
        lines
    }
}

impl Lines {
    /// The answers to the lines at hand, waiting for at least one; None after the last.
    async fn next_answers(&mut self) -> Result<Option<Answered>, ApiError> {
        let group = self.next_group().await?;
        if group.is_empty() {
            return Ok(None);
        }
        let answered = self.target.store(group).await;
        // What was answered is free again; the beginning of the next line is still held.
        drop(std::mem::take(&mut self.share));
        charge(&self.budget, &mut self.share, self.splitter.rest.len())?;
        Ok(Some(answered))
    }

    /// The lines that have arrived, with their numbers from 1; empty at the end of the body.
    async fn next_group(&mut self) -> Result<Vec<(u64, Bytes)>, ApiError> {
        let mut group = Vec::new();
        loop {
            while group.len() < MAX_GROUP
                && let Some(line) = self.splitter.next()
            {
                self.add(&mut group, line);
            }
            if !group.is_empty() || self.ended {
                return Ok(group);
            }
            match self.reader.next().await? {
                Some(piece) => {
                    charge(&self.budget, &mut self.share, piece.len())?;
                    self.splitter.push(&piece);
                }
                None => {
                    self.ended = true;
                    let rest = self.splitter.take_rest();
                    self.add(&mut group, rest);
                }
            }
        }
    }

    fn add(&mut self, group: &mut Vec<(u64, Bytes)>, line: Bytes) {
        self.number += 1;
        // Blank lines carry nothing and get no answer.
        if !line.trim_ascii().is_empty() {
            group.push((self.number, line));
        }
    }
}

fn parse_line(number: u64, line: &Bytes) -> Result<NewMessage, BrokerError> {
    let parsed = match parse_json::<MessageBody<'_>>(line) {
        Ok(message) => message.into_message(line),
        Err(ApiError::Broker(error)) => Err(error.to_string()),
        Err(_) => Err("it cannot be read".to_owned()),
    };
    parsed.map_err(|why| BrokerError::InvalidRequest(format!("line {number}: {why}")))
}

impl Target {
    async fn store(&self, group: Vec<(u64, Bytes)>) -> Answered {
        let parsed = group
            .iter()
            .map(|(number, line)| (*number, parse_line(*number, line)));
        if self.idempotency_key.is_some() {
            self.store_each(parsed.collect()).await
        } else {
            self.store_together(parsed.map(|(_, line)| line).collect())
                .await
        }
    }

    async fn store_together(&self, lines: Vec<Result<NewMessage, BrokerError>>) -> Answered {
        let mut errors = Vec::with_capacity(lines.len());
        let mut messages = Vec::with_capacity(lines.len());
        for line in lines {
            match line {
                Ok(message) => {
                    messages.push(message);
                    errors.push(None);
                }
                Err(error) => errors.push(Some(error)),
            }
        }
        let mut durability = Durability::MajorityFsync;
        let (mut stored, mut refused) = (Vec::new(), None);
        if !messages.is_empty() {
            match self.produce(messages, None).await {
                Ok(answer) => {
                    durability = answer.durability;
                    stored = answer.results;
                }
                Err(error) => refused = Some(error),
            }
        }
        let mut stored = stored.into_iter();
        let unanswered = refused.clone().unwrap_or(BrokerError::Timeout {
            outcome: Outcome::Unknown,
        });
        let results = errors
            .into_iter()
            .map(|error| match error {
                Some(error) => Err(error),
                None => stored.next().unwrap_or_else(|| Err(unanswered.clone())),
            })
            .collect();
        Answered {
            results,
            durability,
            refused,
        }
    }

    /// One line after the other, each with a key of its own, so that a retry that arrives in other
    /// pieces still finds each line's first answer.
    async fn store_each(&self, lines: Vec<(u64, Result<NewMessage, BrokerError>)>) -> Answered {
        let mut answered = Answered {
            results: Vec::with_capacity(lines.len()),
            durability: Durability::MajorityFsync,
            refused: None,
        };
        for (number, line) in lines {
            let message = match line {
                Ok(message) => message,
                Err(error) => {
                    answered.results.push(Err(error));
                    continue;
                }
            };
            let result = match self.produce(vec![message], Some(number)).await {
                Ok(mut answer) => {
                    answered.durability = answer.durability;
                    answer.results.pop().unwrap_or(Err(BrokerError::Timeout {
                        outcome: Outcome::Unknown,
                    }))
                }
                Err(error) => {
                    // Only where nothing before it was stored does it speak for the whole group.
                    if answered.results.iter().all(Result::is_err) {
                        answered.refused.get_or_insert_with(|| error.clone());
                    }
                    Err(error)
                }
            };
            if result.is_ok() {
                answered.refused = None;
            }
            answered.results.push(result);
        }
        answered
    }

    async fn produce(
        &self,
        messages: Vec<NewMessage>,
        line: Option<u64>,
    ) -> Result<crate::broker::ProduceAnswer, BrokerError> {
        let key = self
            .idempotency_key
            .as_ref()
            .zip(line)
            .map(|(key, line)| format!("{key}#{line}"));
        let request = ProduceRequest {
            topic: self.topic.clone(),
            messages,
            producer: None,
            idempotency_key: key,
        };
        let clients = &self.state.clients;
        clients.take_messages(self.client, &request.messages)?;
        super::measured(&self.state.metrics, &self.state.broker, request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_being_cut_anywhere() {
        let text = b"{\"value\":\"a\"}\n\n{\"value\":\"b\"}\r\nlast";
        for cut in 0..text.len() {
            let mut splitter = LineSplitter::default();
            let mut lines = Vec::new();
            for piece in [&text[..cut], &text[cut..]] {
                splitter.push(piece);
                while let Some(line) = splitter.next() {
                    lines.push(line);
                }
            }
            lines.push(splitter.take_rest());
            assert_eq!(
                lines,
                ["{\"value\":\"a\"}", "", "{\"value\":\"b\"}\r", "last"],
                "{cut}"
            );
        }
    }

    #[test]
    fn a_line_that_is_no_message_says_which_and_why() {
        let error = parse_line(7, &Bytes::from_static(b"{\"valeu\":1}"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 7") && error.contains("valeu"),
            "{error}"
        );
        let message = parse_line(1, &Bytes::from_static(b"{\"value\":\"x\"}\r")).unwrap();
        assert_eq!(message.value.as_deref(), Some(&b"x"[..]));
    }
}
