use proptest::prelude::*;

use super::format::{FRAME_HEADER, FrameHeader, SegmentHeader, frame_bytes};
use super::frame::{Content, Frame, MarkKind, Unknown, checksum, interpret, push};
use super::types::EntryKind;
use crate::{LogId, RaftGroupId, Vote};

/// What a reader makes of the bytes of a frame; none if the checksum is wrong.
fn decode(bytes: &[u8]) -> Option<Result<Frame, Unknown>> {
    let mut raw = [0; FRAME_HEADER];
    raw.copy_from_slice(bytes.get(..FRAME_HEADER)?);
    let header = FrameHeader::decode(&raw);
    let body = bytes.get(FRAME_HEADER..FRAME_HEADER + header.length as usize)?;
    (checksum(&raw, body) == header.crc).then(|| interpret(&header))
}

fn contents() -> impl Strategy<Value = Content> {
    let log_id = || (any::<u64>(), any::<u64>()).prop_map(|(t, i)| LogId::new(t, i));
    let kind = || {
        prop_oneof![
            Just(EntryKind::Blank),
            Just(EntryKind::Command),
            Just(EntryKind::Membership)
        ]
    };
    let vote = (any::<u64>(), any::<Option<u64>>(), any::<bool>());
    let mark = prop_oneof![
        Just(MarkKind::Begin),
        Just(MarkKind::Closing),
        Just(MarkKind::Seal)
    ];
    prop_oneof![
        (log_id(), kind()).prop_map(|(log_id, kind)| Content::Entry { log_id, kind }),
        (log_id(), kind()).prop_map(|(log_id, kind)| Content::Relocated { log_id, kind }),
        vote.prop_map(|(term, voted_for, committed)| Content::Vote(Vote {
            term,
            voted_for,
            committed
        })),
        (1..u64::MAX, any::<Option<u64>>()).prop_map(|(from, term)| Content::Truncate {
            from,
            kept: term.map(|term| LogId::new(term, from - 1)),
        }),
        log_id().prop_map(Content::Purge),
        Just(Content::Remove),
        (mark, any::<u64>()).prop_map(|(mark, durable_end)| Content::Mark { mark, durable_end }),
    ]
}

proptest! {
    #[test]
    fn every_frame_comes_back(
        content in contents(),
        epoch: u32,
        position: u64,
        group: u64,
        body in proptest::collection::vec(any::<u8>(), 0..300),
        before in 0_usize..40,
    ) {
        let mut buf = vec![7; before * 8];
        push(&mut buf, epoch, position, RaftGroupId(group), &content, &body);
        let bytes = &buf[before * 8..];
        prop_assert_eq!(bytes.len() as u64, frame_bytes(body.len()));
        prop_assert_eq!(&bytes[FRAME_HEADER..FRAME_HEADER + body.len()], &body[..]);
        let expected = Frame {
            epoch,
            position,
            group: RaftGroupId(group),
            content,
            length: body.len() as u32,
        };
        prop_assert_eq!(decode(bytes), Some(Ok(expected)));
    }

    #[test]
    fn every_flipped_bit_is_noticed(content in contents(), at: prop::sample::Index, bit in 0_u32..8) {
        let mut buf = Vec::new();
        let body = b"a body of thirty-two bytes, full";
        push(&mut buf, 3, 4096, RaftGroupId(9), &content, body);
        let at = at.index(buf.len());
        buf[at] ^= 1_u8 << bit;
        prop_assert_eq!(decode(&buf), None, "byte {}", at);
    }
}

#[test]
fn the_bytes_of_a_frame_are_those_of_the_format() {
    let mut buf = Vec::new();
    let content = Content::Entry {
        log_id: LogId::new(5, 6),
        kind: EntryKind::Membership,
    };
    push(&mut buf, 2, 0x1122, RaftGroupId(4), &content, b"abc");
    let crc = crc32c::crc32c(&buf[8..51]);
    let mut expected = vec![3, 0, 0, 0];
    expected.extend(crc.to_le_bytes());
    expected.extend([1, 1, 2, 0]);
    expected.extend([2, 0, 0, 0]);
    expected.extend([0x22, 0x11, 0, 0, 0, 0, 0, 0]);
    expected.extend([4, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([6, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([b'a', b'b', b'c', 0, 0, 0, 0, 0]);
    assert_eq!(buf, expected);
}

#[test]
fn newer_versions_and_kinds_are_told_from_damage() {
    let header = FrameHeader {
        length: 0,
        crc: 0,
        version: 2,
        kind: 1,
        subkind: 0,
        epoch: 1,
        position: 0,
        group: 0,
        term: 0,
        index: 0,
    };
    assert_eq!(interpret(&header), Err(Unknown::Version(2)));
    let header = FrameHeader {
        version: 1,
        kind: 200,
        ..header
    };
    assert_eq!(interpret(&header), Err(Unknown::Kind(200, 0)));
}

#[test]
fn a_segment_header_comes_back_and_its_damage_is_noticed() {
    let header = SegmentHeader {
        base: 1 << 40,
        capacity: 256 << 20,
    };
    let bytes = header.encode();
    assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
    for at in 0..bytes.len() {
        let mut bad = bytes;
        bad[at] ^= 4;
        assert!(SegmentHeader::decode(&bad).is_err(), "byte {at}");
    }
}
