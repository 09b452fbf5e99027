//! Bytes of a peer that are no frame or no hello, or one that nobody meant.

use std::fs;

use bytes::{BufMut, Bytes, BytesMut};

use super::config;
use crate::link::hello::Greeting;
use crate::link::raw_peer::{Frames, frame};
use crate::link::wire::{self, FrameNumber, HEADER_BYTES, Header, Kind};
use crate::mutate::{Input, directory, fuzz};

const MAX: usize = 4096;

/// Gives every frame in a row of them a right checksum for its number, the first one's being 1.
fn seal(bytes: &mut [u8]) {
    let mut rest = bytes;
    let mut number = 1;
    while let Some(length) = rest.first_chunk().copied().map(u32::from_le_bytes) {
        let total = 4 + length as usize;
        if total < HEADER_BYTES || total > rest.len() {
            return;
        }
        let (frame, after) = rest.split_at_mut(total);
        let crc = crc32c::crc32c_append(crc32c::crc32c_append(number, &frame[..4]), &frame[8..]);
        frame[4..8].copy_from_slice(&crc.to_le_bytes());
        rest = after;
        number += 1;
    }
}

/// Frames are cut from the front, and each one's bytes are the ones it was made of.
fn check(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let (mut taken, mut number) = (0, FrameNumber::FIRST);
    while let Ok(Some(frame)) = wire::decode(&mut buffer, MAX, number) {
        let mut again = BytesMut::new();
        wire::encode_header(
            &frame.header,
            std::slice::from_ref(&frame.body),
            number,
            &mut again,
        );
        again.put_slice(&frame.body);
        assert_eq!(again[..], bytes[taken..taken + again.len()]);
        taken += again.len();
        number = number.next();
    }
    assert_eq!(buffer[..], bytes[taken..], "what is no frame stays");
    let room = buffer.capacity();
    assert!(room <= 2 * MAX.max(bytes.len()), "room for {room} bytes");
    greet(bytes);
    let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    greet(body);
}

/// A hello that can be read is told what is wrong with it, and stays the same on its way.
fn greet(body: &[u8]) {
    let Ok(theirs) = Greeting::decode(body) else {
        return;
    };
    let again = theirs.encode();
    assert_eq!(Greeting::decode(&again).expect("our own"), theirs);
    let ours = Greeting::new(&config(2, vec![]), None, theirs.node);
    if let Err(refused) = ours.judge(&theirs) {
        assert!(!refused.text.is_empty());
    }
}

#[test]
fn frames_that_lie() {
    fuzz(
        "link",
        6000,
        |Input {
             bytes,
             seal: sealed,
         }| {
            let mut bytes = bytes.clone();
            if *sealed {
                seal(&mut bytes);
            }
            check(&bytes);
        },
    );
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    let dir = directory("link");
    fs::create_dir_all(&dir).expect("directory");
    let keep = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).expect("write");
    let hello = Greeting::new(&config(1, vec![]), Some(uuid::Uuid::from_u128(7)), 2);
    let mut frames = Frames::default();
    let mut row = frames.next(Header::of(Kind::Hello), &hello.encode());
    keep("hello", &row);
    row.extend_from_slice(&frames.next(Header::of(Kind::Accept), b""));
    row.extend_from_slice(&frames.next(Header::of(Kind::Ping), &[3; 16]));
    let call = |kind, class, group| Header {
        kind,
        class,
        channel: 9,
        group,
    };
    row.extend_from_slice(&frames.next(call(Kind::Call, 1, 5), &Bytes::from_static(b"question")));
    row.extend_from_slice(&frames.next(call(Kind::Answer, 0, 0), b""));
    for kind in [
        Kind::StreamOpen,
        Kind::StreamData,
        Kind::StreamCredit,
        Kind::StreamClose,
    ] {
        row.extend_from_slice(&frames.next(call(kind, 0, 77), &[1; 40]));
    }
    keep("a-conversation", &row);
    keep(
        "a-full-frame",
        &frame(call(Kind::StreamData, 0, 0), &[0xa5; MAX - HEADER_BYTES]),
    );
    keep(
        "refusal",
        &frame(Header::of(Kind::Refuse), b"\x01wrong cluster"),
    );
}
