//! Produce answers: one result per message, in request order.

use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::broker::{BrokerError, Durability, ProduceAnswer, Stored};
use crate::http::error::Problem;
use crate::http::multi::{Nothing, respond};

/// Where a message was stored.
#[derive(Debug, Serialize, ToSchema)]
pub struct StoredBody<'a> {
    queue: u32,
    /// Null while the message is not visible yet.
    offset: Option<u64>,
    /// Opaque and unique for ever. Null if the message was dropped.
    message_id: Option<&'a str>,
    /// The queue's backlog was full and its topic drops what comes then: nothing was stored.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dropped: bool,
}

impl<'a> From<&'a Stored> for StoredBody<'a> {
    fn from(stored: &'a Stored) -> Self {
        Self {
            queue: stored.queue,
            offset: stored.offset,
            message_id: Some(&stored.message_id),
            dropped: false,
        }
    }
}

/// What is told as an answer and not as an error.
fn told<'a>(
    result: Result<&'a Stored, &'a BrokerError>,
) -> Result<StoredBody<'a>, &'a BrokerError> {
    match result {
        Ok(stored) => Ok(StoredBody::from(stored)),
        Err(BrokerError::Dropped { queue, .. }) => Ok(StoredBody {
            queue: *queue,
            offset: None,
            message_id: None,
            dropped: true,
        }),
        Err(error) => Err(error),
    }
}

/// The answer to a produce request; failed entries are `{"error": {problem}}`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ProduceAnswer)]
pub struct ProduceAnswerBody<'a> {
    results: Vec<StoredBody<'a>>,
    /// `majority_fsync` or `majority_written`.
    durability: &'static str,
}

#[derive(Debug, Serialize)]
struct Extra {
    durability: &'static str,
}

pub fn response(answer: &ProduceAnswer) -> Response {
    let parts = answer.results.iter().map(|result| {
        let told = told(result.as_ref());
        told.map_err(|error| (Nothing {}, error.clone()))
    });
    respond(
        parts,
        Extra {
            durability: answer.durability.as_str(),
        },
        true,
    )
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Line<'a> {
    Stored {
        #[serde(flatten)]
        stored: StoredBody<'a>,
        durability: &'static str,
    },
    Failed {
        error: Box<Problem>,
    },
}

/// Appends one ndjson line.
pub fn write_line(
    buffer: &mut Vec<u8>,
    result: Result<&Stored, &BrokerError>,
    durability: Durability,
) {
    let line = match told(result) {
        Ok(stored) => Line::Stored {
            stored,
            durability: durability.as_str(),
        },
        Err(error) => Line::Failed {
            error: Box::new(Problem::new(&error.clone().into(), true)),
        },
    };
    // A Vec takes everything and the types have string keys: this cannot fail.
    let _ = serde_json::to_writer(&mut *buffer, &line);
    buffer.push(b'\n');
}
