//! openraft's network on the links between nodes: pipelined appends, one stream per replica.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::v2::RaftNetworkV2;
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, stream_append_sequential};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use parking_lot::Mutex;
use quorate_storage::RaftGroupId;
use quorate_storage::mutation::{self, Mutation};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::link::{LinkStream, LinkTable};
use crate::pieces::{self, PIECE_BYTES};
use crate::types::{NodeId, RaftVote, ReplicaId, ReplicaNode, Snapshot, TypeConfig};
use crate::wire::{
    Answer, StreamHello, ToReplica, class, decode, decode_append_answer, encode, encode_append,
};

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

/// Append requests on their way to one replica without an answer yet.
const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// The time for an answer to an append is doubled so many times at most.
const DOUBLED_MAX: u32 = 2;

/// The least time that a snapshot, or a piece of one, gets to be taken in.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(10);

/// Waits between attempts at a replica that cannot be reached. A new topic's follower opens its
/// replica a moment after the leader, so the first waits are short; a dead node's are long, since
/// every group it had a replica of retries. The host resets them when the node returns.
const BACKOFF_MS: [u64; 9] = [2, 5, 10, 20, 50, 100, 200, 1000, 5000];

/// Makes the connections of one group's leader to its followers.
#[derive(Debug, Clone)]
pub(crate) struct NetworkFactory {
    pub(crate) link: Arc<LinkTable>,
    pub(crate) group: RaftGroupId,
    pub(crate) timeout: Duration,
    pub(crate) acknowledged: Arc<Acknowledged>,
}

/// What each replica has acknowledged to this leader in its present term.
///
/// Within a term a follower's log never loses what it acknowledged, unless its disk does: a tail
/// that was zeroed cannot be told from one that was never written. openraft takes that for
/// impossible and panics, so such an answer ends here, and the replica is told to look. Only where
/// openraft was told to expect it, once, does it pass: see [`Acknowledged::excuse`].
#[derive(Debug, Default)]
pub(crate) struct Acknowledged(Mutex<HashMap<ReplicaId, Known>>);

#[derive(Debug)]
struct Known {
    vote: RaftVote,
    index: u64,
    excused: bool,
}

impl Acknowledged {
    fn note(&self, replica: ReplicaId, vote: RaftVote, index: u64) {
        let mut all = self.0.lock();
        let before = all.get(&replica).filter(|known| known.vote == vote);
        let known = Known {
            vote,
            index: before.map_or(index, |known| known.index.max(index)),
            excused: false,
        };
        all.insert(replica, known);
    }

    /// The replica may lack what it acknowledged to the leader of this vote: the next answer that
    /// says so is true, unless it acknowledges more before.
    pub(crate) fn excuse(&self, replica: ReplicaId, vote: RaftVote) {
        if let Some(known) = self.0.lock().get_mut(&replica) {
            known.excused = known.vote == vote;
        }
    }

    /// The index that a replica acknowledged in this term, if it is not below `conflict`. An excuse
    /// is used up, and what it was for is forgotten.
    fn contradicts(&self, replica: ReplicaId, vote: RaftVote, conflict: u64) -> Option<u64> {
        let mut all = self.0.lock();
        let known = all.get(&replica)?;
        if known.vote != vote || known.index < conflict {
            return None;
        }
        if known.excused {
            all.remove(&replica);
            return None;
        }
        Some(known.index)
    }
}

impl NetworkFactory {
    fn network(&self, target: ReplicaId, node: &ReplicaNode, pipelined: bool) -> Network {
        Network {
            link: self.link.clone(),
            group: self.group,
            node: node.node,
            target,
            timeout: self.timeout,
            doubled: AtomicU32::new(0),
            pipelined,
            acknowledged: self.acknowledged.clone(),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: ReplicaId, node: &ReplicaNode) -> Network {
        self.network(target, node, true)
    }

    async fn new_heartbeat_client(&mut self, target: ReplicaId, node: &ReplicaNode) -> Network {
        self.network(target, node, false)
    }
}

/// The way to one replica of one group.
#[derive(Debug)]
pub(crate) struct Network {
    link: Arc<LinkTable>,
    group: RaftGroupId,
    node: NodeId,
    target: ReplicaId,
    timeout: Duration,
    /// How often the time for an answer to an append was doubled: what is sent anew is answered no
    /// sooner by a replica that is slow.
    doubled: AtomicU32,
    /// Heartbeats are single requests; opening a stream for each would cost two frames more.
    pipelined: bool,
    acknowledged: Arc<Acknowledged>,
}

fn unreachable(reason: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(reason))
}

impl Network {
    async fn call<T: Serialize, R: DeserializeOwned>(
        &self,
        class: u8,
        body: T,
        timeout: Duration,
    ) -> RpcResult<R> {
        let request = encode(&ToReplica {
            target: self.target,
            body,
        });
        self.call_raw(class, request, timeout).await
    }

    async fn call_raw<R: DeserializeOwned>(
        &self,
        class: u8,
        request: Bytes,
        timeout: Duration,
    ) -> RpcResult<R> {
        let answer = self
            .link
            .call(self.node, class, self.group.0, request, timeout)
            .await
            .map_err(unreachable)?;
        let answer: Answer<R> = decode(&answer).map_err(unreachable)?;
        answer.map_err(unreachable)
    }

    /// Sends a snapshot, in pieces if it is large. Each piece has the whole time for itself.
    async fn send_snapshot(
        &self,
        vote: RaftVote,
        snapshot: Snapshot,
        timeout: Duration,
    ) -> RpcResult<SnapshotResponse<TypeConfig>> {
        let target = self.target;
        let state = snapshot.snapshot;
        if state.len() <= PIECE_BYTES {
            let body = (vote, snapshot.meta, state);
            let request = encode(&ToReplica { target, body });
            return self.call_raw(class::SNAPSHOT, request, timeout).await;
        }
        let transfer: u64 = rand::random();
        for body in pieces::split(transfer, &state) {
            let request = encode(&ToReplica { target, body });
            let taken = self.call_raw(class::SNAPSHOT_PIECE, request, timeout);
            let () = taken.await?;
        }
        let body = (vote, snapshot.meta, transfer, state.len() as u64);
        let request = encode(&ToReplica { target, body });
        self.call_raw(class::SNAPSHOT_END, request, timeout).await
    }

    fn append_patience(&self) -> Duration {
        self.timeout * (1 << self.doubled.load(Ordering::Relaxed))
    }

    /// Keeps an answer from openraft that contradicts an earlier one of the same replica.
    fn check_conflict(&self, vote: RaftVote, conflict: u64) -> RpcResult<()> {
        let Some(index) = self.acknowledged.contradicts(self.target, vote, conflict) else {
            return Ok(());
        };
        tracing::error!(
            group = %self.group,
            node = self.node,
            replica = self.target,
            acknowledged = index,
            conflict,
            "a replica lost what it had acknowledged"
        );
        let request = encode(&ToReplica {
            target: self.target,
            body: index,
        });
        let (link, node, group, timeout) =
            (self.link.clone(), self.node, self.group.0, self.timeout);
        tokio::spawn(async move {
            let told = link.call(node, class::LOST_TAIL, group, request, timeout);
            told.await.ok();
        });
        Err(unreachable("the replica lost what it had acknowledged"))
    }

    /// The same for the answers of a stream, of which it also notes what they acknowledge.
    fn check_answer(
        &self,
        vote: RaftVote,
        answer: StreamAppendResult<TypeConfig>,
    ) -> RpcResult<StreamAppendResult<TypeConfig>> {
        match &answer {
            Ok(Some(matched)) => self.acknowledged.note(self.target, vote, matched.index),
            Err(StreamAppendError::Conflict(at)) => self.check_conflict(vote, at.index)?,
            Ok(None) | Err(StreamAppendError::HigherVote(_)) => {}
        }
        Ok(answer)
    }
}

/// What the two halves of an append stream know of each other.
#[derive(Debug)]
struct Flight {
    permits: Semaphore,
    unanswered: AtomicUsize,
    sent: Notify,
}

impl Flight {
    fn new() -> Self {
        Self {
            permits: Semaphore::new(APPENDS_IN_FLIGHT_MAX),
            unanswered: AtomicUsize::new(0),
            sent: Notify::new(),
        }
    }

    fn answered(&self) {
        self.unanswered.fetch_sub(1, Ordering::Relaxed);
        self.permits.add_permits(1);
    }
}

/// Sends requests as openraft makes them; answers are read by the other half.
async fn send_appends<S>(mut input: S, sender: Arc<LinkStream>, flight: Arc<Flight>)
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
{
    while let Ok(permit) = flight.permits.acquire().await {
        let Some(request) = input.next().await else {
            return;
        };
        permit.forget();
        flight.unanswered.fetch_add(1, Ordering::Relaxed);
        flight.sent.notify_one();
        if sender.send_parts(encode_append(request)).await.is_err() {
            return;
        }
    }
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let mut request = encode(&self.target).to_vec();
        let (vote, prev) = (rpc.vote, rpc.prev_log_id.map(|id| id.index));
        for part in encode_append(rpc) {
            request.extend_from_slice(&part);
        }
        let request = Bytes::from(request);
        let timeout = option.hard_ttl();
        let answer = self.call_raw(class::APPEND, request, timeout).await?;
        match (&answer, prev) {
            (AppendEntriesResponse::Conflict, Some(prev)) => self.check_conflict(vote, prev)?,
            (AppendEntriesResponse::Success, Some(prev)) => {
                self.acknowledged.note(self.target, vote, prev);
            }
            _ => {}
        }
        Ok(answer)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if !self.pipelined {
            return stream_append_sequential(self, input, option);
        }
        if mutation::on(Mutation::AckBeforeMajority) {
            let last = |r: AppendEntriesRequest<TypeConfig>| {
                let last = r.entries.last().map(|entry| entry.log_id);
                Ok(Ok(last.or(r.prev_log_id)))
            };
            return Box::pin(async move { Ok(Box::pin(input.map(last)) as BoxStream<'s, _>) });
        }
        Box::pin(async move {
            let mut input = input;
            // openraft waits out its backoff in front of the first request. A stream that is opened
            // before would be refused at once by a peer that is not ready, and never wait.
            let Some(first) = input.next().await else {
                return Ok(Box::pin(stream::empty()) as BoxStream<'s, _>);
            };
            // One leader in one term makes all of the stream's requests.
            let vote = first.vote;
            let input = stream::once(std::future::ready(first)).chain(input);
            let hello = encode(&StreamHello {
                target: self.target,
            });
            let stream = self
                .link
                .open_stream(self.node, self.group.0, hello)
                .map_err(unreachable)?;
            let sender = Arc::new(stream);
            let receiver = sender.clone();
            let flight = Arc::new(Flight::new());
            // Whatever the sending half waits for, it ends with the receiving one.
            let done = CancellationToken::new();
            let guard = done.clone().drop_guard();
            let sending = send_appends(input, sender, flight.clone());
            let sending =
                tokio::spawn(async move { done.run_until_cancelled_owned(sending).await });
            let state = Some((receiver, sending, flight, guard));
            let this = &*self;
            let answers = stream::unfold(state, move |state| async move {
                let (receiver, mut sending, flight, guard) = state?;
                // A quiet leader sends nothing and may wait for ever; an unanswered request may not.
                let answer = loop {
                    let unanswered = flight.unanswered.load(Ordering::Relaxed) > 0;
                    let finished = sending.is_finished();
                    if finished && !unanswered {
                        return None;
                    }
                    tokio::select! {
                        answer = receiver.recv() => break answer,
                        _ = &mut sending, if !finished => {}
                        () = flight.sent.notified(), if !unanswered => {}
                        () = tokio::time::sleep(this.append_patience()), if unanswered => {
                            let doubled = this.doubled.load(Ordering::Relaxed) + 1;
                            this.doubled.store(doubled.min(DOUBLED_MAX), Ordering::Relaxed);
                            return Some((Err(unreachable("no answer to an append in time")), None));
                        }
                    }
                };
                let Some(answer) = answer else {
                    return Some((Err(unreachable("the append stream was closed")), None));
                };
                flight.answered();
                let answer = decode_append_answer(&answer).map_err(unreachable);
                match answer.and_then(|answer| this.check_answer(vote, answer)) {
                    Ok(Ok(matched)) => {
                        Some((Ok(Ok(matched)), Some((receiver, sending, flight, guard))))
                    }
                    Ok(Err(refused)) => Some((Ok(Err(refused)), None)),
                    Err(error) => Some((Err(error), None)),
                }
            });
            Ok(Box::pin(answers) as BoxStream<'s, _>)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.call(class::VOTE, rpc, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.call(class::PRE_VOTE, rpc, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let timeout = option.hard_ttl().max(SNAPSHOT_PATIENCE);
        let last = snapshot.meta.last_log_id.map(|id| id.index);
        let answer: SnapshotResponse<TypeConfig> = tokio::select! {
            answer = self.send_snapshot(vote, snapshot, timeout) => answer?,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        if let Some(last) = last.filter(|_| answer.vote == vote) {
            self.acknowledged.note(self.target, vote, last);
        }
        Ok(answer)
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        self.call(class::TRANSFER_LEADER, req, self.timeout).await
    }

    fn backoff(&self) -> Option<Backoff> {
        let last = BACKOFF_MS[BACKOFF_MS.len() - 1];
        let waits = BACKOFF_MS.into_iter().chain(std::iter::repeat(last));
        Some(Backoff::new(waits.map(Duration::from_millis)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excuse_is_good_for_one_answer_of_the_same_term() {
        let vote = |term| RaftVote::new_committed(term, 1);
        let known = Acknowledged::default();
        known.note(2, vote(3), 10);
        assert_eq!(known.contradicts(2, vote(3), 10), Some(10));
        assert_eq!(known.contradicts(2, vote(3), 11), None);
        known.excuse(2, vote(4));
        assert_eq!(known.contradicts(2, vote(3), 10), Some(10));
        known.excuse(2, vote(3));
        known.note(2, vote(3), 9);
        assert_eq!(known.contradicts(2, vote(3), 10), Some(10), "it goes on");
        known.excuse(2, vote(3));
        assert_eq!(known.contradicts(2, vote(3), 10), None);
        known.note(2, vote(3), 7);
        assert_eq!(known.contradicts(2, vote(3), 10), None, "forgotten");
        assert_eq!(known.contradicts(2, vote(3), 7), Some(7));
    }
}
