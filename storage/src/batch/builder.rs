//! Making a batch.

use bytes::{BufMut, Bytes, BytesMut};

use super::varint;
use super::{ATTRIBUTE_LOG_APPEND_TIME, BATCH_HEADER_BYTES, CRC_START, LENGTH_PREFIX_BYTES, MAGIC};

/// One record to be added to a batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecordInput<'a> {
    pub key: Option<&'a [u8]>,
    /// `None` is null, which is not the same as empty.
    pub value: Option<&'a [u8]>,
    pub headers: &'a [(&'a str, &'a [u8])],
    /// Milliseconds relative to the base timestamp. Meaningless under LogAppendTime.
    pub timestamp_delta: i64,
}

/// Builds one uncompressed batch: base offset 0, timestamps 0 (the leader's [`super::stamp`]
/// fills them in), LogAppendTime.
#[derive(Debug, Clone)]
pub struct BatchBuilder {
    buffer: BytesMut,
    count: u32,
    producer: (i64, i16, i32),
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    pub fn new() -> Self {
        Self {
            buffer: BytesMut::zeroed(BATCH_HEADER_BYTES),
            count: 0,
            producer: (-1, -1, -1),
        }
    }

    /// Names the idempotent producer; `base_sequence` is the sequence of the first record.
    pub fn producer(mut self, id: i64, epoch: i16, base_sequence: i32) -> Self {
        self.producer = (id, epoch, base_sequence);
        self
    }

    /// Adds a record; its offset delta is its place in the batch.
    ///
    /// # Panics
    /// When the batch would pass 2 GiB, which its length field can't express: the limits on
    /// message and request sizes lie far below.
    pub fn push(&mut self, record: RecordInput<'_>) -> &mut Self {
        let offset_delta = i64::from(self.count);
        let mut body = 1 + varint::len(record.timestamp_delta) + varint::len(offset_delta);
        body += nullable_len(record.key) + nullable_len(record.value);
        body += varint::len(record.headers.len() as i64);
        for (name, value) in record.headers {
            body += nullable_len(Some(name.as_bytes())) + nullable_len(Some(value));
        }
        let total = self.buffer.len() + varint::len(body as i64) + body;
        assert!(total <= i32::MAX as usize, "a batch is limited to 2 GiB");

        let out = &mut self.buffer;
        out.reserve(total - out.len());
        varint::write_i64(out, body as i64);
        out.put_u8(0);
        varint::write_i64(out, record.timestamp_delta);
        varint::write_i64(out, offset_delta);
        put_nullable(out, record.key);
        put_nullable(out, record.value);
        varint::write_i64(out, record.headers.len() as i64);
        for (name, value) in record.headers {
            put_nullable(out, Some(name.as_bytes()));
            put_nullable(out, Some(value));
        }
        self.count += 1;
        self
    }

    /// Records added so far.
    pub fn record_count(&self) -> u32 {
        self.count
    }

    /// Bytes the finished batch would have now.
    pub fn size_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// The finished batch. The builder is empty afterwards, without a producer.
    pub fn finish(&mut self) -> Bytes {
        let mut batch = std::mem::take(self).buffer_with_header();
        let crc = crc32c::crc32c(&batch[CRC_START..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
        batch.freeze()
    }

    fn buffer_with_header(self) -> BytesMut {
        let (id, epoch, base_sequence) = self.producer;
        // `push` keeps both within i32: a record takes at least 7 of at most 2^31 bytes.
        let length = (self.buffer.len() - LENGTH_PREFIX_BYTES) as i32;
        let count = self.count as i32;
        let mut batch = self.buffer;
        let mut header = &mut batch[..BATCH_HEADER_BYTES];
        header.put_i64(0);
        header.put_i32(length);
        header.put_i32(-1);
        header.put_i8(MAGIC);
        header.put_u32(0);
        header.put_i16(ATTRIBUTE_LOG_APPEND_TIME);
        header.put_i32(count - 1);
        header.put_i64(0);
        header.put_i64(0);
        header.put_i64(id);
        header.put_i16(epoch);
        header.put_i32(base_sequence);
        header.put_i32(count);
        batch
    }
}

fn nullable_len(bytes: Option<&[u8]>) -> usize {
    match bytes {
        None => 1,
        Some(bytes) => varint::len(bytes.len() as i64) + bytes.len(),
    }
}

fn put_nullable(out: &mut BytesMut, bytes: Option<&[u8]>) {
    match bytes {
        None => varint::write_i64(out, -1),
        Some(bytes) => {
            varint::write_i64(out, bytes.len() as i64);
            out.put_slice(bytes);
        }
    }
}
