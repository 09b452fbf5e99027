//! `application/x-ndjson`: one message a line, answered line by line while more lines come.
//!
//! Lines that have arrived together are stored together; a client that waits for each answer gets
//! it at once. Each line gets a verdict of its own: what is refused for one of several is tried
//! again line by line. Results leave in the order of the lines, and no more than one body's worth of
//! lines is in memory.
//!
//! Under an idempotency key the lines are divided by their number and size alone, never by how they
//! arrive, and each group has one key made of it: a retry of the same body makes the same groups.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream;

use super::answer::write_line;
use super::wire::MessageBody;
use crate::broker::{
    BrokerError, Durability, NewMessage, Outcome, ProduceAnswer, ProduceRequest, Stored,
};
use crate::http::HttpState;
use crate::http::body::{BodyReader, charge, parse_json};
use crate::http::clients::ClientAddress;
use crate::http::error::{ApiError, Problem};
use crate::http::limits::{BudgetShare, ByteBudget};

/// Most lines stored in one go.
const MAX_GROUP: usize = 1_000;
/// The same of lines under an idempotency key, and of their bytes where there is more than one. To
/// change these makes other groups of a body that is sent again.
const MAX_KEYED_GROUP: usize = 100;
const MAX_KEYED_BYTES: usize = 1 << 20;

/// So many lines in a row that find no room stand for the rest of their group.
const MOST_IN_VAIN: u32 = 16;

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
    /// A line that did not fit the group before it.
    kept: Option<(u64, Bytes)>,
    /// Why the lines after those that were answered can't be read.
    failed: Option<ApiError>,
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

impl Default for Answered {
    fn default() -> Self {
        Self {
            results: Vec::new(),
            durability: Durability::MajorityFsync,
            refused: None,
        }
    }
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
        kept: None,
        failed: None,
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
    fn of(answer: Result<ProduceAnswer, BrokerError>, count: usize) -> Self {
        match answer {
            Ok(answer) => Self {
                results: answer.results,
                durability: answer.durability,
                refused: None,
            },
            Err(error) => Self::refused(count, error),
        }
    }

    fn refused(count: usize, error: BrokerError) -> Self {
        Self {
            results: vec![Err(error.clone()); count],
            refused: Some(error),
            ..Self::default()
        }
    }

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
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let group = self.next_group().await?;
        if group.is_empty() {
            return Ok(None);
        }
        let answered = self.target.store(group).await;
        // What was answered is free again; the beginning of the next line is still held.
        drop(std::mem::take(&mut self.share));
        let kept = self.kept.as_ref().map_or(0, |(_, line)| line.len());
        let held = kept + self.splitter.rest.len();
        // What is stored is answered; the lines after it are what can't be taken.
        self.failed = charge(&self.budget, &mut self.share, held).err();
        Ok(Some(answered))
    }

    /// The lines that have arrived, with their numbers; under a key as many as make a group. Empty
    /// at the end of the body.
    async fn next_group(&mut self) -> Result<Vec<(u64, Bytes)>, ApiError> {
        let is_keyed = self.target.idempotency_key.is_some();
        let (most, most_bytes) = match is_keyed {
            true => (MAX_KEYED_GROUP, MAX_KEYED_BYTES),
            false => (MAX_GROUP, usize::MAX),
        };
        let mut group: Vec<_> = self.kept.take().into_iter().collect();
        let mut bytes = group.iter().map(|(_, line)| line.len()).sum::<usize>();
        loop {
            while group.len() < most
                && let Some((number, line)) = self.next_line()
            {
                bytes += line.len();
                if !group.is_empty() && bytes > most_bytes {
                    self.kept = Some((number, line));
                    return Ok(group);
                }
                group.push((number, line));
            }
            let wants_more = group.is_empty() || is_keyed && group.len() < most;
            if self.ended || !wants_more {
                return Ok(group);
            }
            match self.reader.next().await? {
                Some(piece) => {
                    charge(&self.budget, &mut self.share, piece.len())?;
                    self.splitter.push(&piece);
                }
                None => self.ended = true,
            }
        }
    }

    /// The next whole line with its number from 1. Blank ones carry nothing and get no answer.
    fn next_line(&mut self) -> Option<(u64, Bytes)> {
        loop {
            let line = match self.splitter.next() {
                Some(line) => line,
                None if self.ended && !self.splitter.rest.is_empty() => self.splitter.take_rest(),
                None => return None,
            };
            self.number += 1;
            if !line.trim_ascii().is_empty() {
                return Some((self.number, line));
            }
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

const UNANSWERED: BrokerError = BrokerError::Timeout {
    outcome: Outcome::Unknown,
};

/// Whether an error that several lines share may be the fault of one of them, or of their number:
/// nothing of them is stored, and alone some may be.
fn is_shared(error: &BrokerError) -> bool {
    matches!(
        error,
        BrokerError::MessageTooLarge { .. }
            | BrokerError::RequestTooLarge { .. }
            | BrokerError::InvalidRequest(_)
            | BrokerError::BacklogFull(_)
            | BrokerError::Dropped { .. }
    )
}

fn is_full(error: &BrokerError) -> bool {
    matches!(
        error,
        BrokerError::BacklogFull(_) | BrokerError::Dropped { .. }
    )
}

impl Target {
    async fn store(&self, group: Vec<(u64, Bytes)>) -> Answered {
        let mut errors = Vec::with_capacity(group.len());
        let mut messages = Vec::with_capacity(group.len());
        for (number, line) in &group {
            match parse_line(*number, line) {
                Ok(message) => {
                    messages.push(message);
                    errors.push(None);
                }
                Err(error) => errors.push(Some(error)),
            }
        }
        let mut answered = Answered::default();
        if !messages.is_empty() {
            let first = group.first().map_or(0, |(number, _)| *number);
            let key = self.idempotency_key.as_ref();
            let key = key.map(|key| format!("{key}#{first}"));
            answered = match (
                self.state.clients.take_messages(self.client, &messages),
                key,
            ) {
                (Err(error), _) => Answered::refused(messages.len(), error),
                (Ok(()), None) => self.store_together(messages).await,
                (Ok(()), Some(key)) => self.store_under(key, messages).await,
            };
        }
        let mut stored = std::mem::take(&mut answered.results).into_iter();
        let each = errors.into_iter().map(|error| match error {
            Some(error) => Err(error),
            None => stored.next().unwrap_or(Err(UNANSWERED)),
        });
        answered.results = each.collect();
        answered
    }

    async fn store_together(&self, messages: Vec<NewMessage>) -> Answered {
        let count = messages.len();
        let mut answered = Answered::of(self.produce(messages.clone(), None).await, count);
        if answered.refused.as_ref().is_some_and(is_shared) {
            answered.refused = None;
        }
        if messages.len() == 1 {
            return answered;
        }
        let mut in_vain = 0;
        // What the lines that are left need not be tried for.
        let mut for_all = None;
        for (result, message) in answered.results.iter_mut().zip(messages) {
            if !result.as_ref().is_err_and(is_shared) {
                continue;
            }
            if let Some(error) = &for_all {
                *result = Err(BrokerError::clone(error));
                continue;
            }
            *result = match self.produce(vec![message], None).await {
                Ok(mut answer) => {
                    answered.durability = answer.durability;
                    answer.results.pop().unwrap_or(Err(UNANSWERED))
                }
                Err(error) => Err(error),
            };
            in_vain = match result {
                Err(error) if is_full(error) => in_vain + 1,
                _ => 0,
            };
            // Without a leader, say, nothing of the others is stored. That there is no room is proved
            // anew for each line, which takes its time.
            let is_hopeless = |error: &&BrokerError| {
                in_vain == MOST_IN_VAIN || error.retryable() && !is_shared(error)
            };
            for_all = result.as_ref().err().filter(is_hopeless).cloned();
        }
        answered
    }

    /// Under one key, all or nothing for each queue. Lines that can't be stored at all are left
    /// out; should a retry leave out others, the queue sees that it is not the same request.
    async fn store_under(&self, key: String, messages: Vec<NewMessage>) -> Answered {
        let count = messages.len();
        let answer = self.produce(messages.clone(), Some(key.clone())).await;
        let is_one_lines = |error: &BrokerError| {
            is_shared(error) || matches!(error, BrokerError::QueueNotFound { .. })
        };
        if !answer.as_ref().is_err_and(is_one_lines) {
            return Answered::of(answer, count);
        }
        let mut faults = Vec::with_capacity(count);
        for message in &messages {
            let alone = self.request(vec![message.clone()], Some(key.clone()));
            faults.push(self.state.broker.check_produce(alone).await.err());
        }
        let faultless = messages.into_iter().zip(&faults);
        let faultless: Vec<_> = faultless
            .filter_map(|(message, fault)| fault.is_none().then_some(message))
            .collect();
        let mut answered = match faultless.len() {
            0 => Answered::default(),
            left if left == count => Answered::of(answer, count),
            left => Answered::of(self.produce(faultless, Some(key)).await, left),
        };
        answered.refused = None;
        let mut stored = std::mem::take(&mut answered.results).into_iter();
        let each = faults.into_iter().map(|fault| match fault {
            Some(fault) => Err(fault),
            None => stored.next().unwrap_or(Err(UNANSWERED)),
        });
        answered.results = each.collect();
        answered
    }

    fn request(&self, messages: Vec<NewMessage>, key: Option<String>) -> ProduceRequest {
        ProduceRequest {
            topic: self.topic.clone(),
            messages,
            producer: None,
            idempotency_key: key,
        }
    }

    async fn produce(
        &self,
        messages: Vec<NewMessage>,
        key: Option<String>,
    ) -> Result<ProduceAnswer, BrokerError> {
        let request = self.request(messages, key);
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
