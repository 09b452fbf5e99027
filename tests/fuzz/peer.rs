//! What brokers ask each other, changed on its way: what can be read is read alike by everybody.

use std::fs;

use bytes::Bytes;
use quorate::broker::StartAt;
use quorate::broker::queue::BatchOutcome;
use quorate::broker::queue::entry::Mark;
use quorate::coordinator::QueueOffset;
use quorate::peer::{
    GroupView, NewBatch, PeerError, PeerRequest, PeerResult, ReadRequest, Slice, decode, encode,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::mutate::{directory, fuzz};

fn stable<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(message) = decode::<T>(bytes) else {
        return;
    };
    let once = encode(&message);
    let again = decode::<T>(&once).map(|message| encode(&message));
    assert_eq!(again.expect("our own bytes"), once);
}

#[test]
fn peer_messages_that_lie() {
    fuzz("peer", 3000, |input| {
        let bytes = &input.bytes;
        stable::<PeerRequest>(bytes);
        stable::<PeerResult<()>>(bytes);
        stable::<PeerResult<Bytes>>(bytes);
        stable::<PeerResult<Slice>>(bytes);
        stable::<PeerResult<u64>>(bytes);
        stable::<PeerResult<Vec<BatchOutcome>>>(bytes);
        stable::<PeerResult<Vec<QueueOffset>>>(bytes);
        stable::<PeerResult<Vec<Option<GroupView>>>>(bytes);
    });
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    let dir = directory("peer");
    fs::create_dir_all(&dir).expect("directory");
    let keep = |name: &str, bytes: Bytes| fs::write(dir.join(name), bytes).expect("write");
    let batch = NewBatch {
        mark: Mark::Key {
            hash: [7; 16],
            fingerprint: 9,
        },
        hold: None,
        batch: Bytes::from_static(b"a batch, which is not looked at here"),
    };
    let produce = PeerRequest::Produce {
        group: 70,
        batches: vec![batch.clone(), batch],
        timeout_ms: 5000,
    };
    keep("produce", encode(&produce));
    let read = ReadRequest {
        group: 70,
        start: StartAt::Earliest,
        max_messages: 10,
        max_bytes: 1 << 20,
        wait_ms: 0,
        stale: false,
    };
    keep("read", encode(&PeerRequest::Read(read)));
    keep(
        "describe",
        encode(&PeerRequest::Describe {
            groups: vec![1, 300, u64::MAX],
        }),
    );
    keep(
        "lowest-offsets",
        encode(&PeerRequest::LowestOffsets {
            coordinator: 3,
            topics: vec![1, 7],
            prove: true,
        }),
    );
    let offsets = PeerRequest::GroupOffsets {
        coordinator: 3,
        consumer_group: "billing".to_owned(),
    };
    keep("offsets", encode(&offsets));
    let view = GroupView {
        leader: Some(2),
        term: 7,
        in_sync: vec![1, 2],
        earliest: 0,
        end: 99,
    };
    keep("views", encode(&PeerResult::Ok(vec![Some(view), None])));
    let elsewhere = PeerError::NotLeader { leader: Some(3) };
    keep("elsewhere", encode(&PeerResult::<()>::Err(elsewhere)));
}
