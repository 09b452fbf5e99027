//! Snapshots that are too large for one frame: sent in pieces, each one answered, and put together by
//! the receiver before openraft sees them.

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// A larger state is sent in pieces of so many bytes.
pub(crate) const PIECE_BYTES: usize = 8 << 20;

/// A part of a snapshot's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Piece {
    /// Of this sending, chosen by chance.
    pub(crate) transfer: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

/// What has arrived of one snapshot. A new sending takes the place of the one before it.
#[derive(Debug, Default)]
pub(crate) struct Incoming(Mutex<Option<(u64, BytesMut)>>);

impl Incoming {
    /// Adds the next piece.
    pub(crate) fn add(&self, piece: &Piece) -> Result<(), String> {
        let mut slot = self.0.lock();
        if piece.offset == 0 {
            *slot = Some((piece.transfer, BytesMut::new()));
        }
        match &mut *slot {
            Some((transfer, state))
                if *transfer == piece.transfer && state.len() as u64 == piece.offset =>
            {
                state.extend_from_slice(&piece.bytes);
                Ok(())
            }
            _ => Err(format!(
                "the piece at byte {} does not follow; send the snapshot again",
                piece.offset
            )),
        }
    }

    /// The whole state, if these are all its bytes.
    pub(crate) fn take(&self, transfer: u64, length: u64) -> Result<Bytes, String> {
        match self.0.lock().take() {
            Some((found, state)) if found == transfer && state.len() as u64 == length => {
                Ok(state.freeze())
            }
            _ => Err("pieces of the snapshot are missing; send it again".to_owned()),
        }
    }
}

/// A state in pieces.
pub(crate) fn split(transfer: u64, state: &Bytes) -> impl Iterator<Item = Piece> {
    (0..state.len())
        .step_by(PIECE_BYTES)
        .map(move |offset| Piece {
            transfer,
            offset: offset as u64,
            bytes: state.slice(offset..state.len().min(offset + PIECE_BYTES)),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(transfer: u64, offset: u64, text: &'static str) -> Piece {
        Piece {
            transfer,
            offset,
            bytes: Bytes::from_static(text.as_bytes()),
        }
    }

    #[test]
    fn pieces_are_put_together_and_no_others_with_them() {
        let incoming = Incoming::default();
        assert!(incoming.add(&piece(1, 2, "late")).is_err());
        incoming.add(&piece(1, 0, "ab")).expect("the first");
        assert!(incoming.add(&piece(2, 2, "cd")).is_err(), "of another");
        assert!(incoming.add(&piece(1, 3, "cd")).is_err(), "a hole");
        incoming.add(&piece(1, 2, "cd")).expect("the next");
        assert!(incoming.take(1, 5).is_err());
        assert!(incoming.take(1, 4).is_err(), "given up with the first try");
        incoming.add(&piece(3, 0, "ab")).expect("the first");
        incoming.add(&piece(4, 0, "xyz")).expect("a new sending");
        assert_eq!(incoming.take(4, 3), Ok(Bytes::from_static(b"xyz")));
    }

    #[test]
    fn a_state_is_split_without_loss() {
        let state: Bytes = (0..PIECE_BYTES + 5).map(|n| n as u8).collect();
        let incoming = Incoming::default();
        for piece in split(7, &state) {
            incoming.add(&piece).expect("in order");
        }
        assert_eq!(incoming.take(7, state.len() as u64), Ok(state));
    }
}
