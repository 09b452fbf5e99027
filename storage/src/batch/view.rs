//! Reading a batch in place.

use bytes::Bytes;

use super::records::{MIN_RECORD_BYTES, Records};
use super::{
    ATTRIBUTE_CONTROL, ATTRIBUTE_LOG_APPEND_TIME, ATTRIBUTE_TRANSACTIONAL, BATCH_HEADER_BYTES,
    BatchError, CRC_START, Compression, LENGTH_PREFIX_BYTES, MAGIC, ProducerStamp,
};

/// One batch whose header has been checked. Cheap to clone; shares the bytes it was made of.
#[derive(Debug, Clone)]
pub struct BatchView {
    bytes: Bytes,
    compression: Compression,
    record_count: u32,
}

impl BatchView {
    /// Checks lengths, magic and checksum of `bytes`, which must be exactly one batch.
    ///
    /// Records are checked as they are iterated; [`BatchView::validate_client`] checks them all.
    pub fn parse(bytes: Bytes) -> Result<Self, BatchError> {
        let view = Self::parse_trusted(bytes)?;
        let stored = u32::from_be_bytes(view.field(17));
        let computed = crc32c::crc32c(&view.bytes[CRC_START..]);
        if stored != computed {
            return Err(BatchError::Checksum { stored, computed });
        }
        Ok(view)
    }

    /// [`BatchView::parse`] without the checksum, for bytes whose frame's checksum has just been
    /// verified. All lengths are still checked.
    pub fn parse_trusted(bytes: Bytes) -> Result<Self, BatchError> {
        check_frame(&bytes)?;
        let attributes = i16::from_be_bytes([bytes[21], bytes[22]]);
        let compression = Compression::from_attributes(attributes)?;
        let mut view = Self {
            bytes,
            compression,
            record_count: 0,
        };
        if view.base_offset() > i64::MAX as u64 {
            return Err(BatchError::Header {
                field: "base offset",
                value: i64::from_be_bytes(view.field(0)),
            });
        }
        let stated = i32::from_be_bytes(view.field(57));
        view.record_count = u32::try_from(stated).map_err(|_| BatchError::Header {
            field: "record count",
            value: i64::from(stated),
        })?;
        let most = (view.bytes.len() - BATCH_HEADER_BYTES) / MIN_RECORD_BYTES;
        if compression == Compression::None && view.record_count as usize > most {
            return Err(BatchError::RecordCount {
                stated: view.record_count,
                found: most as u32,
            });
        }
        Ok(view)
    }

    /// Records in the batch, as its header says. For an uncompressed batch never more than its
    /// bytes can hold.
    pub fn record_count(&self) -> u32 {
        self.record_count
    }

    /// Offset of the first record; 0 until [`super::patch_base_offset`] has written it.
    pub fn base_offset(&self) -> u64 {
        u64::from_be_bytes(self.field(0))
    }

    /// Offset of the last record, relative to the first one's.
    pub fn last_offset_delta(&self) -> i32 {
        i32::from_be_bytes(self.field(23))
    }

    pub fn base_timestamp_ms(&self) -> i64 {
        i64::from_be_bytes(self.field(27))
    }

    /// The stamped time of a stored batch. A client's negative "no timestamp" reads as 0.
    pub fn max_timestamp_ms(&self) -> u64 {
        u64::try_from(i64::from_be_bytes(self.field(35))).unwrap_or(0)
    }

    /// Whether the timestamps are the log's (see [`super::stamp`]) and not the producer's.
    pub fn is_log_append_time(&self) -> bool {
        self.attributes() & ATTRIBUTE_LOG_APPEND_TIME != 0
    }

    pub fn is_transactional(&self) -> bool {
        self.attributes() & ATTRIBUTE_TRANSACTIONAL != 0
    }

    pub fn is_control(&self) -> bool {
        self.attributes() & ATTRIBUTE_CONTROL != 0
    }

    /// The producer's identity and sequence; none when the batch carries no producer id.
    pub fn producer(&self) -> Option<ProducerStamp> {
        let (id, epoch, base_sequence) = self.producer_fields();
        (id >= 0).then_some(ProducerStamp {
            id,
            epoch,
            base_sequence,
        })
    }

    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The records in order. The iterator ends after its first error; it gives an error too when
    /// the bytes hold more or fewer records than the header says, or are compressed.
    pub fn records(&self) -> Records {
        Records::new(self)
    }

    /// The whole batch.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    pub(super) fn attributes(&self) -> i16 {
        i16::from_be_bytes(self.field(21))
    }

    pub(super) fn producer_fields(&self) -> (i64, i16, i32) {
        (
            i64::from_be_bytes(self.field(43)),
            i16::from_be_bytes(self.field(51)),
            i32::from_be_bytes(self.field(53)),
        )
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[at..at + N]);
        field
    }
}

/// Checks that `bytes` has the outer shape of exactly one v2 batch: a whole header, the magic,
/// and a length that matches. Every fixed field can be indexed afterwards.
pub(super) fn check_frame(bytes: &[u8]) -> Result<(), BatchError> {
    let total = frame_len(bytes)?;
    if bytes.len() > total {
        return Err(BatchError::TrailingBytes {
            extra: bytes.len() - total,
        });
    }
    Ok(())
}

/// Length of the batch at the start of `bytes`, all of which is there.
fn frame_len(bytes: &[u8]) -> Result<usize, BatchError> {
    if bytes.len() < BATCH_HEADER_BYTES {
        return Err(BatchError::Truncated {
            needed: BATCH_HEADER_BYTES,
            have: bytes.len(),
        });
    }
    let magic = bytes[16] as i8;
    if magic != MAGIC {
        return Err(BatchError::Magic(magic));
    }
    let length = i32::from_be_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    let total = usize::try_from(length)
        .ok()
        .and_then(|length| length.checked_add(LENGTH_PREFIX_BYTES))
        .filter(|total| *total >= BATCH_HEADER_BYTES)
        .ok_or(BatchError::Header {
            field: "batch length",
            value: i64::from(length),
        })?;
    if bytes.len() < total {
        return Err(BatchError::Truncated {
            needed: total,
            have: bytes.len(),
        });
    }
    Ok(total)
}

/// Cuts concatenated batches apart by their lengths, without copying and without looking inside:
/// each piece still has to go through [`BatchView::parse`]. Ends after the first error.
pub fn split(bytes: Bytes) -> Split {
    Split { rest: bytes }
}

/// Iterator of [`split`].
#[derive(Debug, Clone)]
pub struct Split {
    rest: Bytes,
}

impl Iterator for Split {
    type Item = Result<Bytes, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match frame_len(&self.rest) {
            Ok(len) => Some(Ok(self.rest.split_to(len))),
            Err(error) => {
                self.rest.clear();
                Some(Err(error))
            }
        }
    }
}
