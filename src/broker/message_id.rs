//! Message ids: opaque to clients, unique for ever.
//!
//! An id names the Raft entry that holds the message (group, term, index: at most one leader per
//! term, so never two), the batch in it and the record in that. A retry gets the first id again.

use serde::{Deserialize, Serialize};

use super::queue::Place;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The length of the longest id: that of three numbers of 64 bits, one of 16 and one of 32.
pub(super) const MAX_MESSAGE_ID_LEN: usize = 51;

/// What an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessagePlace {
    /// Of the queue's Raft group.
    pub group: u64,
    pub term: u64,
    pub index: u64,
    pub batch: u16,
    pub record: u32,
}

/// Reads an id as [`message_id`] writes it; none for any other text.
pub fn parse_message_id(text: &str) -> Option<MessagePlace> {
    let bytes = unbase64(text)?;
    let mut rest = &bytes[..];
    let place = MessagePlace {
        group: take_varint(&mut rest)?,
        term: take_varint(&mut rest)?,
        index: take_varint(&mut rest)?,
        batch: take_varint(&mut rest)?.try_into().ok()?,
        record: take_varint(&mut rest)?.try_into().ok()?,
    };
    // Nothing behind it, and no other spelling of it: two ids are two messages.
    let again = Place {
        base_offset: 0,
        count: 0,
        term: place.term,
        index: place.index,
        batch: place.batch,
    };
    (message_id(place.group, &again, place.record) == text).then_some(place)
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The id of record `record` of the batch at `place` in the queue with Raft group `group`.
pub fn message_id(group: u64, place: &Place, record: u32) -> String {
    let parts = [
        group,
        place.term,
        place.index,
        u64::from(place.batch),
        u64::from(record),
    ];
    let mut bytes = Vec::with_capacity(16);
    for part in parts {
        put_varint(&mut bytes, part);
    }
    base64(&bytes)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// RFC 4648 base64url without padding.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        let word = word << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            let digit = word >> (18 - 6 * place) & 63;
            text.push(char::from(ALPHABET[digit as usize]));
        }
    }
    text
}

fn unbase64(text: &str) -> Option<Vec<u8>> {
    /// Of five varints.
    const LONGEST: usize = 70;
    if text.len() > LONGEST {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.as_bytes().chunks(4) {
        let mut word = 0u32;
        for byte in chunk {
            let digit = ALPHABET.iter().position(|letter| letter == byte)?;
            word = word << 6 | digit as u32;
        }
        let [_, whole @ ..] = (word << (6 * (4 - chunk.len()))).to_be_bytes();
        bytes.extend_from_slice(whole.get(..chunk.len() - 1)?);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn base64_as_in_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg"),
            ("fo", "Zm8"),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xfe]), "_-_-");
    }

    #[test]
    fn no_id_is_longer_than_the_longest() {
        let place = Place {
            base_offset: 0,
            count: 1,
            term: u64::MAX,
            index: u64::MAX,
            batch: u16::MAX,
        };
        let longest = message_id(u64::MAX, &place, u32::MAX);
        assert_eq!(longest.len(), MAX_MESSAGE_ID_LEN);
    }

    #[test]
    fn every_part_makes_another_id() {
        let mut ids = HashSet::new();
        let edge = [0, 1, 127, 128, 300];
        for group in edge {
            for index in edge {
                for record in edge {
                    let place = Place {
                        base_offset: 0,
                        count: 1,
                        term: 1,
                        index,
                        batch: 0,
                    };
                    let id = message_id(group, &place, record as u32);
                    let read = MessagePlace {
                        group,
                        term: 1,
                        index,
                        batch: 0,
                        record: record as u32,
                    };
                    assert_eq!(parse_message_id(&id), Some(read), "{id}");
                    assert!(ids.insert(id));
                }
            }
        }
    }

    #[test]
    fn only_ids_are_read() {
        let most = Place {
            base_offset: 0,
            count: 1,
            term: u64::MAX,
            index: u64::MAX,
            batch: u16::MAX,
        };
        let longest = message_id(u64::MAX, &most, u32::MAX);
        assert!(parse_message_id(&longest).is_some());
        let place = Place {
            term: 3,
            index: 9,
            batch: 0,
            ..most
        };
        let id = message_id(1024, &place, 0);
        // Of other spellings: more bytes, fewer, padding, unused bits, a long zero.
        for other in [
            format!("{id}A"),
            id[..id.len() - 1].to_owned(),
            format!("{id}="),
            base64(&[0x80, 0x08, 3, 9, 0, 0x80, 0]),
            base64(&[0xff; 60]),
            "nonsense!".to_owned(),
            "ä".to_owned(),
            String::new(),
        ] {
            assert_eq!(parse_message_id(&other), None, "{other}");
        }
    }
}
