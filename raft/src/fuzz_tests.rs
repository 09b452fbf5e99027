//! Requests and answers of a peer that are not what they should be.
//!
//! What can be read means the same after it was written and read again: otherwise two replicas
//! could understand one message in two ways.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use bytes::Bytes;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use openraft::{EntryPayload, Membership, StoredMembership};
use quorate_storage::LogId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::elections::{FailoverAnswer, FailoverRequest};
use crate::mutate::{directory, fuzz};
use crate::pieces::Piece;
use crate::tail_guard::TailReport;
use crate::types::{
    Command, RaftEntry, RaftStoredMembership, RaftVote, ReplicaId, ReplicaNode, SnapshotMeta,
    TypeConfig, decode_membership, encode_membership, to_raft_log_id,
};
use crate::wire::{
    Answer, StreamHello, ToReplica, WhoLeads, decode, decode_append, encode, encode_append,
};

/// Reads `bytes` as a message, if they are one, and again what it is written as.
fn stable<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(message) = decode::<T>(bytes) else {
        return;
    };
    let once = encode(&message);
    let again = decode::<T>(&once).map(|message| encode(&message));
    assert_eq!(again.expect("our own bytes"), once);
}

/// Every message is tried on every input: a frame's class may lie too.
fn messages(bytes: &[u8]) {
    stable::<StreamHello>(bytes);
    stable::<ToReplica<()>>(bytes);
    stable::<ToReplica<WhoLeads>>(bytes);
    stable::<ToReplica<u64>>(bytes);
    stable::<ToReplica<VoteRequest<TypeConfig>>>(bytes);
    stable::<ToReplica<TransferLeaderRequest<TypeConfig>>>(bytes);
    stable::<ToReplica<(RaftVote, SnapshotMeta, Bytes)>>(bytes);
    stable::<ToReplica<Piece>>(bytes);
    stable::<ToReplica<(RaftVote, SnapshotMeta, u64, u64)>>(bytes);
    stable::<FailoverRequest>(bytes);
    stable::<FailoverAnswer>(bytes);
    stable::<Answer<()>>(bytes);
    stable::<Answer<Option<u64>>>(bytes);
    stable::<Answer<TailReport>>(bytes);
    stable::<Answer<VoteResponse<TypeConfig>>>(bytes);
    stable::<Answer<SnapshotResponse<TypeConfig>>>(bytes);
    stable::<Answer<AppendEntriesResponse<TypeConfig>>>(bytes);
    stable::<StreamAppendResult<TypeConfig>>(bytes);
    if let Ok(membership) = decode_membership(bytes) {
        let once = encode_membership(&membership);
        assert_eq!(decode_membership(&once).expect("our own bytes"), membership);
    }
}

fn append(bytes: Bytes) {
    let size = bytes.len();
    let Ok(request) = decode_append(bytes) else {
        return;
    };
    // The smallest entry takes four bytes, and bodies are slices.
    assert!(request.entries.len() <= size / 4);
    let once = Bytes::from(encode_append(request).concat());
    let again = decode_append(once.clone()).expect("our own bytes");
    assert_eq!(encode_append(again).concat(), once);
}

#[test]
fn append_requests_that_lie() {
    fuzz("append", 4000, |input| {
        append(Bytes::from(input.bytes.clone()));
        if let Ok((_, rest)) = postcard::take_from_bytes::<ReplicaId>(&input.bytes) {
            append(Bytes::copy_from_slice(rest));
        }
    });
}

#[test]
fn messages_that_lie() {
    fuzz("messages", 4000, |input| messages(&input.bytes));
}

fn membership() -> Membership<ReplicaId, ReplicaNode> {
    let node = |id: u64| (id, ReplicaNode { node: id % 10 });
    let nodes: BTreeMap<_, _> = [11, 12, 13].into_iter().map(node).collect();
    let voters = BTreeSet::from([11, 12]);
    Membership::new(vec![voters], nodes).expect("sound")
}

fn entry(index: u64, payload: EntryPayload<Command, ReplicaId, ReplicaNode>) -> RaftEntry {
    RaftEntry {
        log_id: to_raft_log_id(LogId::new(3, index)),
        payload,
    }
}

fn keep(target: &str, name: &str, bytes: &[u8]) {
    let dir = directory(target);
    fs::create_dir_all(&dir).expect("directory");
    fs::write(dir.join(name), bytes).expect("write");
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    let vote = RaftVote::new_committed(3, 11);
    let before = Some(to_raft_log_id(LogId::new(2, 9)));
    let request = |entries: Vec<RaftEntry>| {
        let parts = encode_append(AppendEntriesRequest::<TypeConfig> {
            vote,
            prev_log_id: before,
            entries,
            leader_commit: before,
        });
        parts.concat()
    };
    let command = |body: &'static [u8]| EntryPayload::Normal(Command(Bytes::from_static(body)));
    keep("append", "heartbeat", &request(vec![]));
    let every_kind = vec![
        entry(10, EntryPayload::Blank),
        entry(11, command(b"one")),
        entry(12, EntryPayload::Membership(membership())),
        entry(13, command(b"")),
    ];
    keep("append", "every-kind", &request(every_kind));
    keep(
        "append",
        "long",
        &request(vec![entry(10, command(&[7; 700]))]),
    );

    let to = |body| ToReplica { target: 12, body };
    let ask = VoteRequest::<TypeConfig>::new(RaftVote::new(4, 12), before);
    keep("messages", "vote", &encode(&to(ask)));
    let who = ToReplica {
        target: 12,
        body: WhoLeads {
            asker: 13,
            may_lack_tail: true,
        },
    };
    keep("messages", "who-leads", &encode(&who));
    let stored: RaftStoredMembership = StoredMembership::new(before, membership());
    keep("messages", "membership", &encode_membership(&stored));
    let meta = SnapshotMeta {
        last_log_id: before,
        last_membership: stored,
    };
    let snapshot = ToReplica {
        target: 12,
        body: (vote, meta, Bytes::from_static(b"state")),
    };
    keep("messages", "snapshot", &encode(&snapshot));
    let failover = FailoverRequest {
        dead: 1,
        groups: vec![1, 300, u64::MAX],
    };
    keep("messages", "failover", &encode(&failover));
    let ends = vec![(1, None), (300, Some((3, 9)))];
    keep("messages", "ends", &encode(&FailoverAnswer { ends }));
    let report = TailReport {
        suspect: true,
        last: Some((3, 9)),
    };
    keep("messages", "tail", &encode(&Answer::Ok(report)));
    let refusal = Answer::<()>::Err("group 7 is not open on this node".to_owned());
    keep("messages", "refusal", &encode(&refusal));
    let matched: StreamAppendResult<TypeConfig> = Ok(before);
    keep("messages", "append-answer", &encode(&matched));
    keep("messages", "stream", &encode(&StreamHello { target: 12 }));
}
