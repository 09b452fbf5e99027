//! Frames between two nodes: their bytes, their checksum, their decoder.
//!
//! All integers are little-endian. A frame is a header of 28 bytes and a body.
//!
//! | at | bytes | field | meaning |
//! |---:|------:|-------|---------|
//! | 0  | 4 | length  | bytes after this field: 24 + body |
//! | 4  | 4 | crc     | CRC-32C over bytes 0..4 and 8..end, begun with the frame's number |
//! | 8  | 1 | kind    | see [`Kind`] |
//! | 9  | 1 | flags   | none defined, must be 0 |
//! | 10 | 1 | class   | call: its class; answer: its [`AnswerStatus`]; stream close: its [`StreamEnd`] |
//! | 11 | 1 | reserved | must be 0 |
//! | 12 | 8 | channel | call and answer: request id; stream frames: stream id; else 0 |
//! | 20 | 8 | group   | call and stream open: Raft group; stream credit: bytes given back; else 0 |
//! | 28 | … | body    | |
//!
//! **Numbers.** Frames of the handshake have number 0, those behind it count from 1 in each
//! direction. The number is not sent: it is what the checksum begins with, so a frame that comes
//! twice, in another's place or after one that is missing has a wrong checksum. TCP never does
//! that to a connection; a middle box that rewrites streams may. A call would be executed twice.
//!
//! Invariant: [`decode`] never panics, never asks for more than `max_frame_bytes`, and after an
//! error the byte stream can't be trusted any more: the connection has to be closed.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of a frame's header, the length field included.
pub(crate) const HEADER_BYTES: usize = 28;
/// Bytes of the length field, which the length itself does not count.
const LENGTH_BYTES: usize = 4;
/// How far from the number that was due a frame's own is looked for, to say what happened.
const NUMBERS_TRIED: u32 = 64;
/// The length of a frame without body.
const LENGTH_MIN: usize = HEADER_BYTES - LENGTH_BYTES;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Handshake: who I am and whom I mean to reach.
    Hello = 1,
    /// Handshake, last step of the dialing side: the connection is in use from here on.
    Accept = 2,
    /// Handshake: no, and why. The connection closes.
    Refuse = 3,
    /// In place of a hello: "I am here without a connection, dial me". The connection closes.
    Knock = 4,
    /// A request that wants one answer.
    Call = 5,
    /// The answer to a call.
    Answer = 6,
    /// A new ordered stream; the body is its greeting.
    StreamOpen = 7,
    /// One frame of a stream.
    StreamData = 8,
    /// The receiver has consumed so many bytes: the sender may send as many again.
    StreamCredit = 9,
    /// The stream is over, in both directions.
    StreamClose = 10,
    /// Are you there? Body: sender's incarnation u64, sender's clock u64 (nanoseconds).
    Ping = 11,
    /// Yes. Body: answerer's incarnation u64, the ping's clock u64.
    Pong = 12,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Accept,
            3 => Kind::Refuse,
            4 => Kind::Knock,
            5 => Kind::Call,
            6 => Kind::Answer,
            7 => Kind::StreamOpen,
            8 => Kind::StreamData,
            9 => Kind::StreamCredit,
            10 => Kind::StreamClose,
            11 => Kind::Ping,
            12 => Kind::Pong,
            _ => return None,
        })
    }
}

/// What became of a call on the other side; travels in an answer's class byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnswerStatus {
    /// The body is the handler's answer.
    Done = 0,
    /// Too much is in service: the handler never saw the call.
    Refused = 1,
    /// The handler saw the call and gave no usable answer (it panicked, or answered too much).
    Failed = 2,
}

impl AnswerStatus {
    pub(crate) fn from_byte(byte: u8) -> Option<AnswerStatus> {
        match byte {
            0 => Some(AnswerStatus::Done),
            1 => Some(AnswerStatus::Refused),
            2 => Some(AnswerStatus::Failed),
            _ => None,
        }
    }
}

/// A frame's header without its length and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub class: u8,
    pub channel: u64,
    pub group: u64,
}

impl Header {
    pub(crate) fn of(kind: Kind) -> Header {
        Header {
            kind,
            class: 0,
            channel: 0,
            group: 0,
        }
    }
}

/// What the first bytes of a frame say of its length, those bytes included: for whoever passes
/// frames on without being a node. None while there are too few.
pub fn frame_bytes(front: &[u8]) -> Option<usize> {
    let mut length_bytes = front.get(..LENGTH_BYTES)?;
    Some(LENGTH_BYTES + length_bytes.get_u32_le() as usize)
}

/// The place of a frame among those of its direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameNumber(u32);

impl FrameNumber {
    /// Of every frame of the handshake.
    pub(crate) const HANDSHAKE: FrameNumber = FrameNumber(0);
    /// Of the first frame behind it.
    pub(crate) const FIRST: FrameNumber = FrameNumber(1);

    /// Begins again after 2^32 frames.
    pub(crate) fn next(self) -> FrameNumber {
        FrameNumber(self.0.wrapping_add(1))
    }
}

/// A decoded frame. The body shares the read buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub header: Header,
    pub body: Bytes,
}

/// A body to be sent: one frame, from one piece or many, never concatenated.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    One(Bytes),
    Parts(Vec<Bytes>),
}

impl Body {
    pub(crate) const EMPTY: Body = Body::One(Bytes::new());

    pub(crate) fn parts(&self) -> &[Bytes] {
        match self {
            Body::One(part) => std::slice::from_ref(part),
            Body::Parts(parts) => parts,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.parts().iter().map(Bytes::len).sum()
    }
}

/// Why bytes are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a frame of {length} bytes is outside {LENGTH_MIN}..={max}")]
    Length { length: usize, max: usize },
    #[error("frame checksum {found:08x}, computed {computed:08x}")]
    Checksum { found: u32, computed: u32 },
    #[error("frame number {found} where {due} was due: lost, repeated or out of order")]
    Number { found: u32, due: u32 },
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("flags {flags:02x} or reserved byte {reserved:02x} set")]
    Flags { flags: u8, reserved: u8 },
}

/// Puts the header of a frame with this body; the caller puts the body after it.
pub(crate) fn encode_header(
    header: &Header,
    body: &[Bytes],
    number: FrameNumber,
    into: &mut BytesMut,
) {
    let body_bytes: usize = body.iter().map(Bytes::len).sum();
    // Senders check a body against max_frame_bytes, which `LinkConfig::validate` keeps below 2^31.
    let length = (LENGTH_MIN + body_bytes) as u32;
    let mut fields = [0u8; HEADER_BYTES];
    fields[0..4].copy_from_slice(&length.to_le_bytes());
    fields[8] = header.kind as u8;
    fields[10] = header.class;
    fields[12..20].copy_from_slice(&header.channel.to_le_bytes());
    fields[20..28].copy_from_slice(&header.group.to_le_bytes());
    let begun = crc32c::crc32c_append(number.0, &fields[0..4]);
    let head = crc32c::crc32c_append(begun, &fields[8..]);
    let crc = body
        .iter()
        .fold(head, |crc, part| crc32c::crc32c_append(crc, part));
    fields[4..8].copy_from_slice(&crc.to_le_bytes());
    into.put_slice(&fields);
}

/// The checksum of a whole frame that has this number.
fn checksum(frame: &[u8], number: u32) -> u32 {
    let begun = crc32c::crc32c_append(number, &frame[0..4]);
    crc32c::crc32c_append(begun, &frame[8..])
}

/// Why the frame's checksum is not what it should be: another number, or other bytes.
fn wrong_checksum(frame: &[u8], found: u32, due: FrameNumber) -> WireError {
    let near = (1..=NUMBERS_TRIED).flat_map(|by| [due.0.wrapping_sub(by), due.0.wrapping_add(by)]);
    match near.into_iter().find(|n| checksum(frame, *n) == found) {
        Some(number) => WireError::Number {
            found: number,
            due: due.0,
        },
        None => WireError::Checksum {
            found,
            computed: checksum(frame, due.0),
        },
    }
}

/// Takes one frame from the front of `buffer`, which must have this number; `Ok(None)` when it is not all there yet, with room
/// reserved for the rest.
pub(crate) fn decode(
    buffer: &mut BytesMut,
    max_frame_bytes: usize,
    number: FrameNumber,
) -> Result<Option<Frame>, WireError> {
    let Some(mut length_bytes) = buffer.get(..LENGTH_BYTES) else {
        return Ok(None);
    };
    let length = length_bytes.get_u32_le() as usize;
    if length < LENGTH_MIN || length + LENGTH_BYTES > max_frame_bytes {
        return Err(WireError::Length {
            length,
            max: max_frame_bytes,
        });
    }
    let total = LENGTH_BYTES + length;
    if buffer.len() < total {
        buffer.reserve(total - buffer.len());
        return Ok(None);
    }
    let found = (&buffer[4..8]).get_u32_le();
    if checksum(&buffer[..total], number.0) != found {
        return Err(wrong_checksum(&buffer[..total], found, number));
    }
    let kind = Kind::from_byte(buffer[8]).ok_or(WireError::Kind(buffer[8]))?;
    if buffer[9] != 0 || buffer[11] != 0 {
        return Err(WireError::Flags {
            flags: buffer[9],
            reserved: buffer[11],
        });
    }
    let header = Header {
        kind,
        class: buffer[10],
        channel: (&buffer[12..20]).get_u64_le(),
        group: (&buffer[20..28]).get_u64_le(),
    };
    let mut frame = buffer.split_to(total);
    frame.advance(HEADER_BYTES);
    Ok(Some(Frame {
        header,
        body: frame.freeze(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 1 << 16;

    fn encoded(header: Header, parts: &[Bytes], number: FrameNumber) -> BytesMut {
        let mut bytes = BytesMut::new();
        encode_header(&header, parts, number, &mut bytes);
        parts.iter().for_each(|part| bytes.put_slice(part));
        bytes
    }

    fn header() -> impl Strategy<Value = Header> {
        (1u8..=12, any::<u8>(), any::<u64>(), any::<u64>()).prop_map(
            |(kind, class, channel, group)| Header {
                kind: Kind::from_byte(kind).expect("in range"),
                class,
                channel,
                group,
            },
        )
    }

    fn parts() -> impl Strategy<Value = Vec<Bytes>> {
        prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from),
            0..4,
        )
    }

    #[test]
    fn the_bytes_of_a_frame_do_not_change() {
        let header = Header {
            kind: Kind::Call,
            class: 7,
            channel: 2,
            group: 3,
        };
        let bytes = encoded(
            header,
            &[Bytes::from_static(b"quorate")],
            FrameNumber::HANDSHAKE,
        );
        let mut expected = vec![31, 0, 0, 0];
        expected.extend_from_slice(&bytes[4..8]);
        expected.extend_from_slice(&[5, 0, 7, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(b"quorate");
        assert_eq!(&bytes[..], &expected[..]);
        let mut summed = vec![31, 0, 0, 0];
        summed.extend_from_slice(&expected[8..]);
        assert_eq!(bytes[4..8], crc32c::crc32c(&summed).to_le_bytes());
    }

    #[test]
    fn a_frame_that_is_repeated_swapped_or_lost_is_noticed() {
        let parts = [Bytes::from_static(b"write this once")];
        let frame = |number| encoded(Header::of(Kind::Call), &parts, FrameNumber(number));
        let read = |numbers: &[u32]| {
            let mut bytes = BytesMut::new();
            numbers
                .iter()
                .for_each(|n| bytes.extend_from_slice(&frame(*n)));
            let (mut due, mut taken) = (FrameNumber::FIRST, 0);
            loop {
                match decode(&mut bytes, MAX, due) {
                    Ok(Some(_)) => (due, taken) = (due.next(), taken + 1),
                    Ok(None) => return Ok(taken),
                    Err(error) => return Err((taken, error)),
                }
            }
        };
        let wrong = |found, due| WireError::Number { found, due };
        assert_eq!(read(&[1, 2, 3]), Ok(3));
        assert_eq!(read(&[1, 2, 2, 3]), Err((2, wrong(2, 3))));
        assert_eq!(read(&[2, 1, 3]), Err((0, wrong(2, 1))));
        assert_eq!(read(&[1, 3]), Err((1, wrong(3, 2))));
        let far = read(&[1, 5000]);
        assert!(
            matches!(far, Err((1, WireError::Checksum { .. }))),
            "{far:?}"
        );
    }

    #[test]
    fn the_front_of_a_frame_tells_its_length() {
        let parts = [Bytes::from_static(b"quorate")];
        let bytes = encoded(Header::of(Kind::Call), &parts, FrameNumber::FIRST);
        assert_eq!(frame_bytes(&bytes[..4]), Some(bytes.len()));
        assert_eq!(frame_bytes(&bytes[..3]), None);
    }

    #[test]
    fn an_oversize_length_is_refused_before_its_bytes_arrive() {
        let mut bytes = BytesMut::from(&(MAX as u32).to_le_bytes()[..]);
        assert!(matches!(
            decode(&mut bytes, MAX, FrameNumber::FIRST),
            Err(WireError::Length { .. })
        ));
        let mut short = BytesMut::from(&23u32.to_le_bytes()[..]);
        assert!(matches!(
            decode(&mut short, MAX, FrameNumber::FIRST),
            Err(WireError::Length { .. })
        ));
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            frames in prop::collection::vec((header(), parts()), 1..6),
            step in 1usize..97,
        ) {
            let mut stream = BytesMut::new();
            let mut number = FrameNumber::FIRST;
            for (header, parts) in &frames {
                stream.extend_from_slice(&encoded(*header, parts, number));
                number = number.next();
            }
            number = FrameNumber::FIRST;
            let (mut buffer, mut decoded) = (BytesMut::new(), Vec::new());
            for piece in stream.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decode(&mut buffer, MAX, number).expect("valid frames") {
                    number = number.next();
                    decoded.push(frame);
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(decoded.len(), frames.len());
            for (frame, (header, parts)) in decoded.iter().zip(&frames) {
                prop_assert_eq!(frame.header, *header);
                prop_assert_eq!(&frame.body[..], &parts.concat()[..]);
            }
        }

        #[test]
        fn one_changed_bit_is_noticed(
            header in header(), parts in parts(), at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let mut bytes = encoded(header, &parts, FrameNumber::FIRST);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            // A longer length only waits for more; everything else is an error.
            if let Ok(Some(frame)) = decode(&mut bytes, MAX, FrameNumber::FIRST) {
                prop_assert!(false, "decoded {:?}", frame);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer, MAX, FrameNumber::FIRST) {}
        }
    }
}
