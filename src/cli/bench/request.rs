//! Produce requests as bytes, made before the measurement begins.

use clap::ValueEnum;
use quorate_storage::batch::{BatchBuilder, RecordInput};
use rand::Rng;
use rand::distr::Alphanumeric;
use serde_json::{Value, json};

use super::super::wire::ProducerIdentity;

/// How a request carries its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `{"messages":[…]}`
    Json,
    /// `application/octet-stream`: one message, nothing around it.
    Bytes,
    /// `application/vnd.quorate.batches`: RecordBatch v2, stored as it is.
    Batches,
}

/// Width of the place for a sequence: any u64 in decimal.
const SEQUENCE_WIDTH: usize = 20;

#[derive(Debug, Clone)]
pub struct RequestSpec<'a> {
    pub topic: &'a str,
    pub queue: u32,
    pub messages: usize,
    pub size_bytes: usize,
    pub format: Format,
    pub producer: Option<&'a ProducerIdentity>,
}

/// A request ready to be sent again and again; only the producer's sequence changes in it.
#[derive(Debug, Clone)]
pub struct Prepared {
    bytes: Vec<u8>,
    sequence_at: Option<usize>,
}

impl Prepared {
    pub fn new(spec: &RequestSpec<'_>) -> Self {
        let (path_query, content_type, body) = match spec.format {
            Format::Json => (String::new(), "application/json", json_body(spec)),
            Format::Bytes => {
                let body = payload(spec.size_bytes).into_bytes();
                (
                    format!("?queue={}", spec.queue),
                    "application/octet-stream",
                    body,
                )
            }
            Format::Batches => {
                let query = format!("?queue={}", spec.queue);
                (query, "application/vnd.quorate.batches", batch_body(spec))
            }
        };
        let head = format!(
            "POST /v1/topics/{}/messages{path_query} HTTP/1.1\r\nhost: quorate\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
            spec.topic,
            body.len(),
        );
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&body);
        let sequence_at = spec.producer.and_then(|_| find_sequence(&bytes));
        Self { bytes, sequence_at }
    }

    /// JSON allows space before a number, so the length stays the same.
    pub fn set_sequence(&mut self, sequence: u64) {
        if let Some(at) = self.sequence_at {
            let text = format!("{sequence:>SEQUENCE_WIDTH$}");
            self.bytes[at..at + SEQUENCE_WIDTH].copy_from_slice(text.as_bytes());
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn payload(size_bytes: usize) -> String {
    let random = rand::rng().sample_iter(Alphanumeric);
    random.take(size_bytes).map(char::from).collect()
}

fn json_body(spec: &RequestSpec<'_>) -> Vec<u8> {
    let message = |_| json!({ "queue": spec.queue, "value": payload(spec.size_bytes) });
    let messages: Vec<Value> = (0..spec.messages).map(message).collect();
    let messages = Value::from(messages);
    let producer = spec.producer.map_or_else(String::new, |producer| {
        let (id, epoch) = (json!(producer.id), producer.epoch);
        let room = " ".repeat(SEQUENCE_WIDTH - 1);
        format!(r#""producer":{{"id":{id},"epoch":{epoch},"sequence":{room}0}},"#)
    });
    format!(r#"{{{producer}"messages":{messages}}}"#).into_bytes()
}

/// The place of the sequence's digits: the producer stands before all values, so the first find is it.
fn find_sequence(bytes: &[u8]) -> Option<usize> {
    let name = br#""sequence":"#;
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)?;
    Some(at + name.len())
}

fn batch_body(spec: &RequestSpec<'_>) -> Vec<u8> {
    let mut batch = BatchBuilder::new();
    for _ in 0..spec.messages {
        batch.push(RecordInput {
            key: None,
            value: Some(payload(spec.size_bytes).as_bytes()),
            headers: &[],
            timestamp_delta: 0,
        });
    }
    batch.finish().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(format: Format, producer: Option<&ProducerIdentity>) -> Prepared {
        Prepared::new(&RequestSpec {
            topic: "t",
            queue: 3,
            messages: 2,
            size_bytes: 10,
            format,
            producer,
        })
    }

    fn body(prepared: &Prepared) -> (String, Vec<u8>) {
        let bytes = prepared.bytes();
        let end = bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap()
            + 4;
        (
            String::from_utf8(bytes[..end].to_vec()).unwrap(),
            bytes[end..].to_vec(),
        )
    }

    #[test]
    fn the_sequence_changes_in_place() {
        let identity = ProducerIdentity {
            id: "p\"x".into(),
            epoch: 7,
        };
        let mut prepared = prepared(Format::Json, Some(&identity));
        for sequence in [0, 41, u64::MAX] {
            prepared.set_sequence(sequence);
            let (head, body) = body(&prepared);
            assert!(
                head.contains(&format!("content-length: {}\r\n", body.len())),
                "{head}"
            );
            let value: Value = serde_json::from_slice(&body).unwrap();
            let expected = json!({"id": "p\"x", "epoch": 7, "sequence": sequence});
            assert_eq!(value["producer"], expected);
            assert_eq!(value["messages"][1]["queue"], 3);
            assert_eq!(value["messages"][1]["value"].as_str().unwrap().len(), 10);
        }
    }

    #[test]
    fn batches_are_record_batches_for_one_queue() {
        let (head, body) = body(&prepared(Format::Batches, None));
        assert!(
            head.starts_with("POST /v1/topics/t/messages?queue=3 HTTP/1.1\r\n"),
            "{head}"
        );
        let view = quorate_storage::batch::BatchView::parse(body.into()).unwrap();
        assert_eq!(view.record_count(), 2);
    }

    #[test]
    fn bytes_are_the_message_and_nothing_else() {
        let (_, body) = body(&prepared(Format::Bytes, None));
        assert_eq!(body.len(), 10);
    }
}
