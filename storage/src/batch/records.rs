//! Iterating the records of a batch.

use bytes::Bytes;

use super::varint::{read_i32, read_i64};
use super::view::BatchView;
use super::{BATCH_HEADER_BYTES, BatchError, Compression};

/// Length, attributes, two deltas, null key, null value, no headers: one byte each.
pub(super) const MIN_RECORD_BYTES: usize = 7;
/// A header has at least the lengths of its key and value.
const MIN_HEADER_BYTES: usize = 2;

/// One record. Key, value and headers are slices of the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordView {
    /// Offset relative to the batch's base offset; 0, 1, 2, … in a validated batch.
    pub offset_delta: i32,
    /// Milliseconds relative to the base timestamp. Meaningless under LogAppendTime.
    pub timestamp_delta: i64,
    pub key: Option<Bytes>,
    /// `None` is null, which is not the same as empty.
    pub value: Option<Bytes>,
    pub headers: Headers,
}

/// A record's headers, decoded when iterated: a record with a million empty headers costs no
/// more memory than its bytes. Their structure was checked when the record was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    count: u32,
    bytes: Bytes,
}

/// One header. Kafka allows null values; names may repeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderView {
    /// UTF-8 in a validated batch.
    pub key: Bytes,
    pub value: Option<Bytes>,
}

impl Headers {
    pub fn len(&self) -> usize {
        self.count as usize
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn iter(&self) -> HeadersIter {
        HeadersIter {
            left: self.count,
            position: 0,
            bytes: self.bytes.clone(),
        }
    }

    /// The value of the first header called `name`; the inner `None` is a null value.
    pub fn get(&self, name: &str) -> Option<Option<Bytes>> {
        self.iter()
            .find(|header| header.key == name.as_bytes())
            .map(|header| header.value)
    }
}

impl IntoIterator for Headers {
    type Item = HeaderView;
    type IntoIter = HeadersIter;

    fn into_iter(self) -> HeadersIter {
        self.iter()
    }
}

impl IntoIterator for &Headers {
    type Item = HeaderView;
    type IntoIter = HeadersIter;

    fn into_iter(self) -> HeadersIter {
        self.iter()
    }
}

/// Iterator of [`Headers`].
#[derive(Debug, Clone)]
pub struct HeadersIter {
    left: u32,
    position: usize,
    bytes: Bytes,
}

impl Iterator for HeadersIter {
    type Item = HeaderView;

    fn next(&mut self) -> Option<HeaderView> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let (key, value) = header_ranges(&self.bytes, &mut self.position).ok()?;
        Some(HeaderView {
            key: self.bytes.slice(key),
            value: value.map(|range| self.bytes.slice(range)),
        })
    }
}

/// Iterator of [`BatchView::records`].
#[derive(Debug, Clone)]
pub struct Records {
    /// Everything after the batch header.
    bytes: Bytes,
    position: usize,
    done: u32,
    count: u32,
    compression: Compression,
    finished: bool,
}

impl Records {
    pub(super) fn new(view: &BatchView) -> Self {
        Self {
            bytes: view.bytes().slice(BATCH_HEADER_BYTES..),
            position: 0,
            done: 0,
            count: view.record_count(),
            compression: view.compression(),
            finished: false,
        }
    }

    fn read(&mut self) -> Result<RecordView, &'static str> {
        let len = read_i32(&self.bytes, &mut self.position).ok_or("bad record length")?;
        let len = usize::try_from(len).map_err(|_| "negative record length")?;
        if len > self.bytes.len() - self.position {
            return Err("the record is longer than the batch");
        }
        let record = self.bytes.slice(self.position..self.position + len);
        self.position += len;
        decode(&record)
    }
}

impl Iterator for Records {
    type Item = Result<RecordView, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        if self.compression != Compression::None {
            self.finished = true;
            let name = self.compression.name();
            return Some(Err(BatchError::UnsupportedCompression(name)));
        }
        if self.done == self.count {
            self.finished = true;
            let extra = self.bytes.len() - self.position;
            return (extra > 0).then_some(Err(BatchError::TrailingBytes { extra }));
        }
        if self.position == self.bytes.len() {
            self.finished = true;
            return Some(Err(BatchError::RecordCount {
                stated: self.count,
                found: self.done,
            }));
        }
        let record = self.read().map_err(|reason| {
            self.finished = true;
            BatchError::Record {
                record: self.done,
                reason,
            }
        });
        self.done += 1;
        Some(record)
    }
}

/// Decodes the record that fills `bytes` exactly.
fn decode(bytes: &Bytes) -> Result<RecordView, &'static str> {
    // Record attributes: unused by the format.
    let mut position = 1;
    if bytes.is_empty() {
        return Err("empty record");
    }
    let timestamp_delta = read_i64(bytes, &mut position).ok_or("bad timestamp delta")?;
    let offset_delta = read_i32(bytes, &mut position).ok_or("bad offset delta")?;
    let key = nullable_range(bytes, &mut position).ok_or("bad key length")?;
    let value = nullable_range(bytes, &mut position).ok_or("bad value length")?;
    let count = read_i32(bytes, &mut position).ok_or("bad header count")?;
    let count = u32::try_from(count).map_err(|_| "negative header count")?;
    let headers = bytes.slice(position..);
    if count as usize > headers.len() / MIN_HEADER_BYTES {
        return Err("more headers than bytes");
    }
    let mut header_position = 0;
    for _ in 0..count {
        header_ranges(&headers, &mut header_position)?;
    }
    if header_position != headers.len() {
        return Err("bytes are left after the last header");
    }
    Ok(RecordView {
        offset_delta,
        timestamp_delta,
        key: key.map(|range| bytes.slice(range)),
        value: value.map(|range| bytes.slice(range)),
        headers: Headers {
            count,
            bytes: headers,
        },
    })
}

type Range = std::ops::Range<usize>;

fn header_ranges(
    bytes: &[u8],
    position: &mut usize,
) -> Result<(Range, Option<Range>), &'static str> {
    let key = nullable_range(bytes, position)
        .ok_or("bad header name length")?
        .ok_or("null header name")?;
    let value = nullable_range(bytes, position).ok_or("bad header value length")?;
    Ok((key, value))
}

/// Reads a length and skips that many bytes. -1 is null; other negatives, or more bytes than
/// there are, give `None`.
fn nullable_range(bytes: &[u8], position: &mut usize) -> Option<Option<Range>> {
    let len = read_i32(bytes, position)?;
    if len == -1 {
        return Some(None);
    }
    let start = *position;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    if end > bytes.len() {
        return None;
    }
    *position = end;
    Some(Some(start..end))
}
