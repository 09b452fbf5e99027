//! What this node answers to the Raft requests of others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest,
};
use quorate_storage::RaftGroupId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::group::Group;
use crate::link::LinkStream;
use crate::pieces::Piece;
use crate::types::{RaftVote, ReplicaId, Snapshot, SnapshotMeta, TypeConfig};
use crate::wire::{
    Answer, StreamHello, ToReplica, WhoLeads, class, decode, decode_append, encode,
    encode_append_answer,
};

/// Finds the replicas that are open on this node.
pub(crate) trait Groups: Send + Sync + 'static {
    fn find(&self, group: RaftGroupId) -> Option<Group>;
}

fn refuse(reason: impl ToString) -> Bytes {
    encode(&Answer::<()>::Err(reason.to_string()))
}

fn answer<T: Serialize, E: ToString>(result: Result<T, E>) -> Bytes {
    encode(&result.map_err(|e| e.to_string()))
}

fn open<T: DeserializeOwned>(group: &Group, body: &[u8]) -> Result<T, Bytes> {
    let request: ToReplica<T> = decode(body).map_err(refuse)?;
    check_target(group, request.target)?;
    Ok(request.body)
}

/// A request meant for an earlier life of this replica must not reach this one.
fn check_target(group: &Group, target: ReplicaId) -> Result<(), Bytes> {
    if group.replica() == target {
        Ok(())
    } else {
        Err(refuse(format!(
            "this node holds replica {} of {}, not {target}",
            group.replica(),
            group.id()
        )))
    }
}

/// Answers one request of the Raft classes.
pub(crate) async fn call(groups: &dyn Groups, class: u8, group: u64, body: Bytes) -> Bytes {
    let Some(group) = groups.find(RaftGroupId(group)) else {
        return refuse(format!("group {group} is not open on this node"));
    };
    serve(&group, class, body)
        .await
        .unwrap_or_else(|refusal| refusal)
}

async fn serve(group: &Group, class: u8, mut body: Bytes) -> Result<Bytes, Bytes> {
    let raft = group.raft();
    if matches!(class, class::VOTE | class::PRE_VOTE) && group.tail().is_suspect() {
        return Err(refuse(
            "this replica may have lost its tail and must not vote yet",
        ));
    }
    Ok(match class {
        class::VOTE => {
            let request: VoteRequest<TypeConfig> = open(group, &body)?;
            answer(raft.vote(request).await)
        }
        class::PRE_VOTE => {
            let request: VoteRequest<TypeConfig> = open(group, &body)?;
            answer(raft.pre_vote(request).await)
        }
        class::APPEND => {
            let (target, rest) = postcard::take_from_bytes::<ReplicaId>(&body).map_err(refuse)?;
            check_target(group, target)?;
            let head = body.len() - rest.len();
            let request = decode_append(body.split_off(head)).map_err(refuse)?;
            check_applied(group, &request).map_err(refuse)?;
            group.heard(request.vote.leader_id().term);
            let watcher = CatchUp::default();
            watcher.saw(&request);
            let prev = request.prev_log_id;
            let appended = raft.append_entries(request).await;
            if let (Ok(AppendEntriesResponse::Success), Some(prev)) = (&appended, prev) {
                watcher.reached(prev.index, group);
            }
            answer(appended)
        }
        class::SNAPSHOT => {
            let (vote, meta, state): (RaftVote, SnapshotMeta, Bytes) = open(group, &body)?;
            let snapshot = Snapshot {
                meta,
                snapshot: state,
            };
            answer(raft.install_full_snapshot(vote, snapshot).await)
        }
        class::SNAPSHOT_PIECE => {
            let piece: Piece = open(group, &body)?;
            answer(group.incoming().add(&piece))
        }
        class::SNAPSHOT_END => {
            let (vote, meta, transfer, length): (RaftVote, SnapshotMeta, u64, u64) =
                open(group, &body)?;
            let snapshot = Snapshot {
                meta,
                snapshot: group.incoming().take(transfer, length).map_err(refuse)?,
            };
            answer(raft.install_full_snapshot(vote, snapshot).await)
        }
        class::TRANSFER_LEADER => {
            let request: TransferLeaderRequest<TypeConfig> = open(group, &body)?;
            answer(raft.handle_transfer_leader(request).await)
        }
        class::READ_INDEX => answer(group.read_index().await),
        class::LEADS => {
            let ask: WhoLeads = open(group, &body)?;
            answer(group.answer_who_leads(ask).await)
        }
        class::TAIL => answer(Ok::<_, String>(group.tail_report())),
        class::LOST_TAIL => {
            group.check_acknowledged(open(group, &body)?).await;
            answer(Ok::<_, String>(()))
        }
        other => refuse(format!("unknown class of request {other}")),
    })
}

/// Serves one append stream until either side ends it.
pub(crate) async fn append_stream(
    groups: Arc<dyn Groups>,
    group: u64,
    hello: Bytes,
    stream: LinkStream,
) {
    let Some(group) = groups.find(RaftGroupId(group)) else {
        return;
    };
    match decode::<StreamHello>(&hello) {
        Ok(hello) if hello.target == group.replica() => {}
        _ => return,
    }
    let sender = Arc::new(stream);
    let receiver = sender.clone();
    let watcher = CatchUp::default();
    // openraft reads the requests in a task of its own, which would hold the stream open.
    let over = CancellationToken::new();
    let _over = over.clone().drop_guard();
    let requests = stream::unfold(
        (receiver, group.clone(), watcher.clone(), over),
        |state| async move {
            let (receiver, group, watcher, over) = state;
            let bytes = over.run_until_cancelled(receiver.recv()).await??;
            let request = decode_append(bytes).map_err(|error| error.to_string());
            match request.and_then(|r| check_applied(&group, &r).map(|()| r)) {
                Ok(request) => {
                    group.heard(request.vote.leader_id().term);
                    if group.tail().is_suspect() {
                        watcher.saw(&request);
                    }
                    Some((request, (receiver, group, watcher, over)))
                }
                Err(error) => {
                    tracing::warn!(%error, "closing an append stream");
                    None
                }
            }
        },
    );
    let mut answers = std::pin::pin!(group.raft().stream_append(requests));
    while let Some(Ok(answer)) = answers.next().await {
        let ended = answer.is_err();
        if let Ok(Some(matched)) = &answer {
            watcher.reached(matched.index, &group);
        }
        if sender.send(encode_append_answer(&answer)).await.is_err() || ended {
            return;
        }
    }
}

/// What is applied here is only ever taken back by a majority that lost its unsynced tail while this
/// replica was away. Its state knows of it, and openraft would take the old entries for the new
/// ones, so it can't go on: the others fill another in its place.
fn check_applied(group: &Group, request: &AppendEntriesRequest<TypeConfig>) -> Result<(), String> {
    let Some(applied) = group.applied() else {
        return Ok(());
    };
    let ids = request.prev_log_id.iter();
    let ids = ids.chain(request.entries.iter().map(|entry| &entry.log_id));
    // Terms never go down along a log, and a later leader's is higher than any before.
    let taken_back = ids
        .take_while(|id| id.index <= applied.index)
        .find(|id| id.committed_leader_id().term > applied.term);
    let Some(other) = taken_back else {
        return Ok(());
    };
    let (index, term) = (other.index, other.committed_leader_id().term);
    let text = format!(
        "{} has applied up to {applied}, and entry {index} is another now, of term {term}: the \
         others have lost what they had acknowledged",
        group.id()
    );
    group.log().report_damage(text.clone());
    Err(text)
}

/// What a leader has committed in its own term, as a suspect replica hears of it.
#[derive(Debug, Clone, Default)]
struct CatchUp(Arc<AtomicU64>);

impl CatchUp {
    fn saw(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let term = request.vote.leader_id().term;
        if let Some(commit) = &request.leader_commit
            && commit.committed_leader_id().term == term
        {
            self.0.fetch_max(commit.index, Ordering::AcqRel);
        }
    }

    /// The replica holds what the leader has, up to here.
    fn reached(&self, matched: u64, group: &Group) {
        let commit = self.0.load(Ordering::Acquire);
        // An entry of a leader's own term is never at index 0, which is the membership.
        if group.tail().is_suspect() && commit > 0 && matched >= commit {
            tracing::info!(group = %group.id(), "an async replica has caught up and may vote again");
            group.tail().caught_up();
        }
    }
}
