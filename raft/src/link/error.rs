//! How a call or a stream ends other than well, and what its caller may conclude from it.

use crate::NodeId;

/// Why a call has no answer. The variants are ordered by what is known of the call's fate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No connection, so no byte left this node.
    #[error("the node is not connected")]
    NotConnected,
    /// A connection, but no byte of this call left this node.
    #[error("not sent: {0}")]
    NotSent(NotSent),
    /// The other node is overloaded and answered so: nobody there looked at the call.
    #[error("the node is overloaded and took no notice of the call")]
    Refused,
    /// Sent and not answered in time. Its outcome is unknown.
    #[error("no answer in time")]
    Timeout,
    /// Sent, then the connection was lost. Its outcome is unknown.
    #[error("the connection was lost before the answer")]
    ConnectionLost,
    /// The other node took the call and gave no usable answer. Its outcome is unknown.
    #[error("the node failed while answering")]
    PeerFailed,
}

impl CallError {
    /// Whether nobody can have acted on the call: only then may it be made again.
    pub fn nobody_took_it(&self) -> bool {
        match self {
            CallError::NotConnected | CallError::NotSent(_) | CallError::Refused => true,
            CallError::Timeout | CallError::ConnectionLost | CallError::PeerFailed => false,
        }
    }
}

/// Why no byte of a call left this node although there was a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// The body is larger than `max_frame_bytes` allows.
    #[error("the body is larger than a frame may be")]
    TooLarge,
    /// The time was up while the call was still waiting in this node's queue.
    #[error("the time was up before the connection had room")]
    QueueFull,
    /// The connection was lost while the call was still waiting in this node's queue.
    #[error("the connection was lost first")]
    ConnectionLost,
    /// The peer allows no more streams on one connection.
    #[error("too many streams on this connection")]
    TooManyStreams,
}

/// A frame can't be sent: the stream is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Closed by either side, or its connection was lost.
    #[error("the stream is closed: {0}")]
    Closed(StreamEnd),
    /// The frame is larger than `max_frame_bytes` allows. The stream stays open.
    #[error("the body is larger than a frame may be")]
    TooLarge,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamEnd {
    /// One side dropped it.
    #[error("dropped")]
    Dropped = 0,
    /// The sender sent more than the receiver had given it room for.
    #[error("the receiver's buffer overflowed")]
    Overflow = 1,
    /// The receiver has too many streams on this connection.
    #[error("too many streams")]
    TooMany = 2,
    /// The connection was lost.
    #[error("the connection was lost")]
    ConnectionLost = 3,
}

impl StreamEnd {
    pub(crate) fn from_byte(byte: u8) -> StreamEnd {
        match byte {
            1 => StreamEnd::Overflow,
            2 => StreamEnd::TooMany,
            3 => StreamEnd::ConnectionLost,
            _ => StreamEnd::Dropped,
        }
    }
}

/// Why a connection between two nodes is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct RefuseReason {
    pub code: RefuseCode,
    /// For people: what is wrong and what to do.
    pub text: String,
}

impl RefuseReason {
    pub fn new(code: RefuseCode, text: impl Into<String>) -> RefuseReason {
        RefuseReason {
            code,
            text: text.into(),
        }
    }

    /// The other disk under a known id; see design section 7.
    pub fn known_id_other_disk(node: NodeId, known: uuid::Uuid, shown: uuid::Uuid) -> RefuseReason {
        RefuseReason::new(
            RefuseCode::KnownIdOtherDisk,
            format!(
                "node {node} is known with another disk (uuid {known}, not {shown}): a node whose \
                 data was lost must come back under a new id"
            ),
        )
    }
}

/// A refusal's reason for programs; its number is what travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefuseCode {
    /// Another cluster name.
    WrongCluster = 1,
    /// The node reached is not the one that was meant.
    WrongNodeId = 2,
    /// No protocol version in common.
    ProtocolVersion = 3,
    /// The id is known with another uuid: its disk was lost or swapped.
    KnownIdOtherDisk = 4,
    /// The node reached itself.
    SelfConnection = 5,
    /// The id is not among the configured peers.
    UnknownNode = 6,
    /// The node with the higher id dialed.
    WrongDirection = 7,
    /// The same cluster name, but a cluster of another birth.
    WrongClusterId = 8,
    /// The refusing node could not do its part (its disk failed, it is stopping).
    Internal = 9,
    /// A code of a newer version.
    Other = 255,
}

impl RefuseCode {
    pub(crate) fn from_byte(byte: u8) -> RefuseCode {
        match byte {
            1 => RefuseCode::WrongCluster,
            2 => RefuseCode::WrongNodeId,
            3 => RefuseCode::ProtocolVersion,
            4 => RefuseCode::KnownIdOtherDisk,
            5 => RefuseCode::SelfConnection,
            6 => RefuseCode::UnknownNode,
            7 => RefuseCode::WrongDirection,
            8 => RefuseCode::WrongClusterId,
            9 => RefuseCode::Internal,
            _ => RefuseCode::Other,
        }
    }
}

/// Why a connection that was in use ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DisconnectReason {
    #[error("closed by the peer")]
    Closed,
    #[error("read or write failed: {0}")]
    Io(std::io::ErrorKind),
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    #[error("nothing was heard for too long")]
    Silent,
    #[error("replaced by a newer connection")]
    Replaced,
    #[error("this node is stopping")]
    Shutdown,
    #[error("the peer was removed")]
    Removed,
}
