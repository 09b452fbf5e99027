//! Linearizable reads on any replica.

use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use tokio::time::{sleep, timeout};

use super::{Group, RETRY};
use crate::error::ReadError;
use crate::wire::{Answer, ToReplica, class, decode, encode};

impl Group {
    /// ReadIndex: when this returns Ok, this replica has applied everything that was committed
    /// when it was called. Works on any replica; concurrent callers share rounds.
    pub async fn read_barrier(&self, patience: Duration) -> Result<(), ReadError> {
        let attempts = async {
            loop {
                let (answer, drive) = self.inner.rounds.join();
                if drive {
                    let group = self.clone();
                    tokio::spawn(async move { group.inner.rounds.run(|| group.round()).await });
                }
                let result = answer.await.unwrap_or(Err(ReadError::Closed));
                match result {
                    Ok(()) | Err(ReadError::Closed) => return result,
                    Err(error) => tracing::trace!(group = %self.id(), %error, "read barrier"),
                }
                sleep(RETRY).await;
            }
        };
        match timeout(patience, attempts).await {
            Ok(result) => result,
            Err(_) if self.leader().is_none() => Err(ReadError::NoLeader),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    /// One proof of leadership, asked of whoever leads.
    async fn round(&self) -> Result<(), ReadError> {
        let index = if self.is_leader() {
            match self.read_index().await {
                Ok(index) => index,
                Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => {
                    return Err(ReadError::NoLeader);
                }
                Err(RaftError::APIError(_)) => return Err(ReadError::NoQuorum),
                Err(RaftError::Fatal(_)) => return Err(ReadError::Closed),
            }
        } else {
            self.ask_leader_for_read_index().await?
        };
        let mut applied = self.inner.applied.clone();
        let reached = applied.wait_for(|id| id.is_some_and(|id| id.index >= index));
        match timeout(self.inner.peers.timeout(), reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ReadError::Closed),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    async fn ask_leader_for_read_index(&self) -> Result<u64, ReadError> {
        let leader = self.leader().ok_or(ReadError::NoLeader)?;
        let target = self.replica_of(leader).ok_or(ReadError::NoLeader)?;
        let request = encode(&ToReplica { target, body: () });
        let peers = &self.inner.peers;
        // The leader's own round is one of three ways.
        let patience = peers.timeout() * 3;
        let answer = peers
            .link()
            .call(leader, class::READ_INDEX, self.id().0, request, patience)
            .await
            .map_err(|e| ReadError::Unreachable(e.to_string()))?;
        let answer: Answer<u64> =
            decode(&answer).map_err(|e| ReadError::Unreachable(e.to_string()))?;
        if answer.is_err() {
            self.check_leader().await;
        }
        answer.map_err(ReadError::Unreachable)
    }
}
