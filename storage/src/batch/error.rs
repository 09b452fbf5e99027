//! Why bytes are not an acceptable batch.

/// A batch was refused. The message is fit to be shown to the client who sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("the batch is cut short: {needed} bytes are needed, {have} are there")]
    Truncated { needed: usize, have: usize },
    #[error("{extra} bytes follow the batch")]
    TrailingBytes { extra: usize },
    #[error("batch format {0} is not supported; only RecordBatch v2 (magic 2) is")]
    Magic(i8),
    #[error("the batch's checksum is {stored:#010x} but its bytes give {computed:#010x}")]
    Checksum { stored: u32, computed: u32 },
    #[error("the batch header's {field} cannot be {value}")]
    Header { field: &'static str, value: i64 },
    #[error("record {record} of the batch is malformed: {reason}")]
    Record { record: u32, reason: &'static str },
    #[error("the batch says it has {stated} records, but {found} were found")]
    RecordCount { stated: u32, found: u32 },
    #[error("the batch has no records")]
    Empty,
    #[error("control batches are not accepted")]
    Control,
    #[error("transactional batches are not accepted; use the transaction API")]
    Transactional,
    #[error(
        "batches compressed with {0} can't be read yet; turn compression off (compression.type=none)"
    )]
    UnsupportedCompression(&'static str),
    #[error("a record has {have} headers; at most {most} are allowed")]
    TooManyHeaders { have: usize, most: usize },
    #[error("{0} is not valid UTF-8")]
    NotUtf8(&'static str),
    #[error("the header name {0:?} is reserved")]
    ReservedHeader(String),
}
