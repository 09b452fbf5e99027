//! What brokers ask each other, changed on its way: what can be read is read alike by everybody.

use std::fs;

use bytes::Bytes;
use quorate::broker::groups::{GroupAnswer, GroupQuestion, Seat};
use quorate::broker::queue::BatchOutcome;
use quorate::broker::queue::entry::Mark;
use quorate::broker::{
    Found, Message, MessagePlace, SearchRequest, Selection, StartAt, TransactionQuery,
};
use quorate::coordinator::{GroupStart, QueueId, QueueOffset};
use quorate::peer::{
    GroupView, NewBatch, PeerError, PeerRequest, PeerResult, Proof, ReadRequest, Slice, decode,
    encode,
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
        stable::<PeerResult<GroupAnswer>>(bytes);
        stable::<PeerResult<Found>>(bytes);
        stable::<PeerResult<Option<Message>>>(bytes);
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
        proof: Proof::All,
    };
    keep("read", encode(&PeerRequest::Read(read)));
    let search = SearchRequest {
        group: 70,
        queue: 3,
        key: Some("order-17".to_owned()),
        selection: Selection::parse(Some("a||b"), Some("offset > 3")).expect("a selection"),
        start: StartAt::Timestamp(5),
        to_timestamp_ms: Some(9),
        max_messages: 100,
        max_bytes: 1 << 20,
        ttl_ms: None,
    };
    keep("search", encode(&PeerRequest::Search(search)));
    keep(
        "describe",
        encode(&PeerRequest::Describe {
            groups: vec![1, 300, u64::MAX],
        }),
    );
    let place = MessagePlace {
        group: 1,
        term: 2,
        index: 3,
        batch: 4,
        record: 0,
    };
    let cancel = PeerRequest::Cancel {
        place,
        timeout_ms: 500,
    };
    keep("cancel", encode(&cancel));
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
    let transactions = PeerRequest::Transactions {
        coordinator: 3,
        query: TransactionQuery::One([3; 16]),
    };
    keep("transactions", encode(&transactions));
    let heartbeat = PeerRequest::Group {
        coordinator: 3,
        question: GroupQuestion::Heartbeat {
            group: "billing".to_owned(),
            member: "m".to_owned(),
            epoch: 4,
            owned: Some(vec![QueueId { topic: 1, queue: 2 }]),
        },
        timeout_ms: 5000,
    };
    keep("heartbeat", encode(&heartbeat));
    let seat = GroupAnswer::Seat(Seat {
        member_id: "m".to_owned(),
        epoch: 4,
        session_timeout_ms: 10_000,
        start: GroupStart::Timestamp(9),
        tag: None,
        filter: Some("offset > 3".to_owned()),
        instance: Some("host".to_owned()),
        queues: vec![(QueueId { topic: 1, queue: 2 }, Some(7))],
    });
    keep("seat", encode(&PeerResult::Ok(seat)));
    let catalog = PeerRequest::AwaitCatalog {
        version: 300,
        timeout_ms: 1000,
    };
    keep("catalog", encode(&catalog));
    let redrive = PeerRequest::Redrive {
        coordinator: 3,
        consumer_group: "packing".to_owned(),
        max_messages: 100,
    };
    keep("redrive", encode(&redrive));
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
