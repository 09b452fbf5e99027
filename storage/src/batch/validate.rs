//! What a batch that comes from a client has to satisfy before it is proposed.

use super::message::utf8;
use super::view::BatchView;
use super::{ATTRIBUTE_COMPRESSION, ATTRIBUTE_LOG_APPEND_TIME, BatchError, RecordView, TAG_HEADER};

/// Headers one record may have. Ours to choose; bounds the memory of decoded messages.
pub const MAX_RECORD_HEADERS: usize = 1024;

impl BatchView {
    /// Checks all that a client could get wrong, so that a stored batch needs no further doubt:
    /// no control or transactional batch, no unknown attribute, at least one record, offset
    /// deltas 0, 1, …, n-1, a producer that is wholly there or wholly absent, and names that
    /// are UTF-8. Length, magic and checksum were checked by [`BatchView::parse`].
    pub fn validate_client(&self) -> Result<(), BatchError> {
        if self.is_control() {
            return Err(BatchError::Control);
        }
        if self.is_transactional() {
            return Err(BatchError::Transactional);
        }
        let unknown = self.attributes() & !(ATTRIBUTE_COMPRESSION | ATTRIBUTE_LOG_APPEND_TIME);
        if unknown != 0 {
            return Err(BatchError::Header {
                field: "attributes",
                value: i64::from(self.attributes()),
            });
        }
        if self.record_count() == 0 {
            return Err(BatchError::Empty);
        }
        if i64::from(self.last_offset_delta()) != i64::from(self.record_count()) - 1 {
            return Err(BatchError::Header {
                field: "last offset delta",
                value: i64::from(self.last_offset_delta()),
            });
        }
        self.validate_producer()?;
        for (place, record) in (0u32..).zip(self.records()) {
            validate_record(&record?, place)?;
        }
        Ok(())
    }

    fn validate_producer(&self) -> Result<(), BatchError> {
        let (id, epoch, base_sequence) = self.producer_fields();
        let known = id >= 0;
        for (field, value, fits) in [
            ("producer id", id, id >= -1),
            (
                "producer epoch",
                i64::from(epoch),
                epoch >= -1 && (epoch >= 0) == known,
            ),
            (
                "base sequence",
                i64::from(base_sequence),
                base_sequence >= -1 && (base_sequence >= 0) == known,
            ),
        ] {
            if !fits {
                return Err(BatchError::Header { field, value });
            }
        }
        Ok(())
    }
}

fn validate_record(record: &RecordView, place: u32) -> Result<(), BatchError> {
    if i64::from(record.offset_delta) != i64::from(place) {
        return Err(BatchError::Record {
            record: place,
            reason: "its offset delta is not its place in the batch",
        });
    }
    if record.headers.len() > MAX_RECORD_HEADERS {
        return Err(BatchError::TooManyHeaders {
            have: record.headers.len(),
            most: MAX_RECORD_HEADERS,
        });
    }
    if let Some(key) = &record.key {
        utf8(key, "a record's key")?;
    }
    for header in &record.headers {
        utf8(&header.key, "a header's name")?;
        if header.key == TAG_HEADER.as_bytes()
            && let Some(tag) = &header.value
        {
            utf8(tag, "a record's tag")?;
        }
    }
    Ok(())
}
