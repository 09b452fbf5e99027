//! The message model on top of records: key, value, tag and user headers.
//!
//! The record's key is the message's key, its headers are the user's headers, and the tag is a
//! record header with the reserved name [`TAG_HEADER`], which is never shown among the user's. So is
//! its time to live, [`TTL_HEADER`].

use bytes::Bytes;

use super::{BatchBuilder, BatchError, MAX_RECORD_HEADERS, RecordInput, RecordView};

/// The record header that holds a message's tag. Users can't send a header of this name.
pub const TAG_HEADER: &str = "quorate.tag";
/// The record header that holds a message's time to live: milliseconds in decimal digits.
pub const TTL_HEADER: &str = "quorate.ttl_ms";

/// One message as its producer gave it, without its place in a queue.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MessageRecord {
    pub key: Option<String>,
    /// `None` is null, which is not the same as empty.
    pub value: Option<Bytes>,
    pub tag: Option<String>,
    /// How long after it became visible it is delivered.
    pub ttl_ms: Option<u64>,
    /// In the producer's order; names may repeat.
    pub headers: Vec<(String, Bytes)>,
}

impl MessageRecord {
    /// Adds the message to a batch. Fails, adding nothing, when a header has a reserved name
    /// or there are too many.
    pub fn encode(&self, batch: &mut BatchBuilder) -> Result<(), BatchError> {
        let ttl = self.ttl_ms.map(|ms| ms.to_string());
        let mut headers: Vec<(&str, &[u8])> = Vec::with_capacity(self.headers.len() + 2);
        if let Some(tag) = &self.tag {
            headers.push((TAG_HEADER, tag.as_bytes()));
        }
        if let Some(ttl) = &ttl {
            headers.push((TTL_HEADER, ttl.as_bytes()));
        }
        for (name, value) in &self.headers {
            if name == TAG_HEADER || name == TTL_HEADER {
                return Err(BatchError::ReservedHeader(name.clone()));
            }
            headers.push((name, value));
        }
        if headers.len() > MAX_RECORD_HEADERS {
            return Err(BatchError::TooManyHeaders {
                have: headers.len(),
                most: MAX_RECORD_HEADERS,
            });
        }
        batch.push(RecordInput {
            key: self.key.as_deref().map(str::as_bytes),
            value: self.value.as_deref(),
            headers: &headers,
            timestamp_delta: 0,
        });
        Ok(())
    }

    /// Reads a message back. The value and the headers' values are slices of the batch. A null
    /// header value, which only Kafka clients send, reads as empty; of several tags the first
    /// counts. Fails only for names that are not UTF-8, which a validated batch doesn't have.
    pub fn decode(record: &RecordView) -> Result<Self, BatchError> {
        let key = record
            .key
            .as_ref()
            .map(|key| utf8(key, "a record's key").map(str::to_owned))
            .transpose()?;
        let mut tag = None;
        let mut headers = Vec::new();
        for header in &record.headers {
            if header.key == TAG_HEADER.as_bytes() {
                if let (None, Some(value)) = (&tag, &header.value) {
                    tag = Some(utf8(value, "a record's tag")?.to_owned());
                }
                continue;
            }
            if header.key == TTL_HEADER.as_bytes() {
                continue;
            }
            let name = utf8(&header.key, "a header's name")?.to_owned();
            headers.push((name, header.value.unwrap_or_default()));
        }
        Ok(Self {
            key,
            value: record.value.clone(),
            tag,
            ttl_ms: record.ttl_ms(),
            headers,
        })
    }
}

impl RecordView {
    /// The message's tag, without decoding the rest: what a tag filter looks at.
    pub fn tag(&self) -> Option<Bytes> {
        self.headers
            .iter()
            .filter(|header| header.key == TAG_HEADER.as_bytes())
            .find_map(|header| header.value)
    }

    /// The message's time to live, without decoding the rest.
    pub fn ttl_ms(&self) -> Option<u64> {
        self.headers
            .iter()
            .filter(|header| header.key == TTL_HEADER.as_bytes())
            .find_map(|header| parse_ttl(header.value.as_deref()?))
    }
}

/// Reads the value of a [`TTL_HEADER`]; none if it is not a number of milliseconds above 0.
pub fn parse_ttl(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|ms| digits && *ms > 0)
}

/// `bytes` as text; `what` names them in the error.
pub(super) fn utf8<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, BatchError> {
    std::str::from_utf8(bytes).map_err(|_| BatchError::NotUtf8(what))
}
