//! Message ids: opaque to clients, unique for ever.
//!
//! An id names the Raft entry that holds the message (group, term, index: at most one leader per
//! term, so never two), the batch in it and the record in that. A retry gets the first id again.

use super::queue::Place;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

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
                    assert!(ids.insert(message_id(group, &place, record as u32)));
                }
            }
        }
    }
}
