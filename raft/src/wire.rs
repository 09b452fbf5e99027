//! What travels inside the frames of a link: Raft's requests, as bytes.
//!
//! Small requests are postcard. An append request is a postcard head followed by the entries'
//! bodies as they lie in memory, so that a message's bytes are never copied on their way out and
//! are sliced, not copied, on their way in.

use bytes::Bytes;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use quorate_storage::LogId;
use quorate_storage::commit_log::{Entry as LogEntry, EntryKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::types::{
    RaftEntry, RaftLogId, RaftVote, ReplicaId, TypeConfig, to_log_entry, to_raft_entry,
};

/// The classes of request on a link. The link itself knows them only as numbers.
pub(crate) mod class {
    pub(crate) const VOTE: u8 = 1;
    pub(crate) const PRE_VOTE: u8 = 2;
    pub(crate) const SNAPSHOT: u8 = 3;
    pub(crate) const TRANSFER_LEADER: u8 = 4;
    pub(crate) const READ_INDEX: u8 = 5;
    pub(crate) const FAILOVER: u8 = 6;
    pub(crate) const APPEND: u8 = 7;
    pub(crate) const TAIL: u8 = 8;
    pub(crate) const LEADS: u8 = 9;
    pub(crate) const LOST_TAIL: u8 = 10;
    pub(crate) const SNAPSHOT_PIECE: u8 = 11;
    pub(crate) const SNAPSHOT_END: u8 = 12;
    pub(crate) const BROKER: u8 = 100;

    /// What leadership hangs on. A transfer is not among them: it must not overtake the entries that
    /// the next leader needs.
    pub(crate) const URGENT: &[u8] = &[VOTE, PRE_VOTE, READ_INDEX, FAILOVER, APPEND, TAIL, LEADS];
}

#[derive(Debug, thiserror::Error)]
#[error("a peer sent bytes this version cannot read: {0}")]
pub(crate) struct WireError(String);

/// Opens an append stream to one replica.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StreamHello {
    pub(crate) target: ReplicaId,
}

/// Any small request to one replica.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ToReplica<T> {
    pub(crate) target: ReplicaId,
    pub(crate) body: T,
}

/// Asks a replica whether it leads.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WhoLeads {
    pub(crate) asker: ReplicaId,
    /// The asker's machine crashed before it began, so it may lack what it had acknowledged.
    pub(crate) may_lack_tail: bool,
}

/// A replica's answer, or the reason why it has none.
pub(crate) type Answer<T> = Result<T, String>;

#[derive(Serialize, Deserialize)]
struct AppendHead {
    vote: RaftVote,
    prev: Option<RaftLogId>,
    commit: Option<RaftLogId>,
    entries: Vec<EntryHead>,
}

#[derive(Serialize, Deserialize)]
struct EntryHead {
    term: u64,
    index: u64,
    kind: u8,
    len: u32,
}

/// Encodes small values; maps, integers and bytes in memory have no way to fail.
pub(crate) fn encode<T: Serialize>(value: &T) -> Bytes {
    Bytes::from(postcard::to_stdvec(value).unwrap_or_default())
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    postcard::from_bytes(bytes).map_err(|e| WireError(e.to_string()))
}

/// The pieces of an append request, to be sent one after the other.
pub(crate) fn encode_append(request: AppendEntriesRequest<TypeConfig>) -> Vec<Bytes> {
    let entries: Vec<LogEntry> = request.entries.into_iter().map(to_log_entry).collect();
    let head = encode(&AppendHead {
        vote: request.vote,
        prev: request.prev_log_id,
        commit: request.leader_commit,
        entries: entries
            .iter()
            .map(|entry| EntryHead {
                term: entry.log_id.term,
                index: entry.log_id.index,
                kind: kind_to_u8(entry.kind),
                len: entry.body.len() as u32,
            })
            .collect(),
    });
    let mut parts = Vec::with_capacity(2 + entries.len());
    parts.push(Bytes::copy_from_slice(&(head.len() as u32).to_le_bytes()));
    parts.push(head);
    parts.extend(
        entries
            .into_iter()
            .map(|entry| entry.body)
            .filter(|body| !body.is_empty()),
    );
    parts
}

pub(crate) fn decode_append(
    mut bytes: Bytes,
) -> Result<AppendEntriesRequest<TypeConfig>, WireError> {
    let short = || WireError("an append request ends early".to_owned());
    let len = bytes
        .first_chunk::<4>()
        .map(|len| u32::from_le_bytes(*len) as usize)
        .ok_or_else(short)?;
    let _ = bytes.split_to(4);
    if bytes.len() < len {
        return Err(short());
    }
    let head: AppendHead = decode(&bytes.split_to(len))?;
    let mut entries: Vec<RaftEntry> = Vec::with_capacity(head.entries.len().min(4096));
    for entry in head.entries {
        let len = entry.len as usize;
        if bytes.len() < len {
            return Err(short());
        }
        let entry = LogEntry {
            log_id: LogId::new(entry.term, entry.index),
            kind: kind_from_u8(entry.kind)?,
            body: bytes.split_to(len),
        };
        entries.push(to_raft_entry(entry).map_err(|e| WireError(e.to_string()))?);
    }
    if !bytes.is_empty() {
        return Err(WireError(format!(
            "{} bytes too many in an append request",
            bytes.len()
        )));
    }
    Ok(AppendEntriesRequest {
        vote: head.vote,
        prev_log_id: head.prev,
        entries,
        leader_commit: head.commit,
    })
}

pub(crate) fn encode_append_answer(answer: &StreamAppendResult<TypeConfig>) -> Bytes {
    encode(answer)
}

pub(crate) fn decode_append_answer(
    bytes: &[u8],
) -> Result<StreamAppendResult<TypeConfig>, WireError> {
    decode(bytes)
}

fn kind_to_u8(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Blank => 0,
        EntryKind::Command => 1,
        EntryKind::Membership => 2,
    }
}

fn kind_from_u8(kind: u8) -> Result<EntryKind, WireError> {
    match kind {
        0 => Ok(EntryKind::Blank),
        1 => Ok(EntryKind::Command),
        2 => Ok(EntryKind::Membership),
        other => Err(WireError(format!("unknown entry kind {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::to_raft_log_id;

    fn request(bodies: &[&[u8]]) -> AppendEntriesRequest<TypeConfig> {
        let entries = bodies
            .iter()
            .enumerate()
            .map(|(i, body)| {
                to_raft_entry(LogEntry {
                    log_id: LogId::new(3, 10 + i as u64),
                    kind: EntryKind::Command,
                    body: Bytes::copy_from_slice(body),
                })
                .unwrap()
            })
            .collect();
        AppendEntriesRequest {
            vote: RaftVote::new_committed(3, 7),
            prev_log_id: Some(to_raft_log_id(LogId::new(2, 9))),
            entries,
            leader_commit: None,
        }
    }

    fn joined(parts: &[Bytes]) -> Bytes {
        Bytes::from(parts.concat())
    }

    #[test]
    fn an_append_request_survives_the_link() {
        let bytes = joined(&encode_append(request(&[b"one", b"", b"three"])));
        let back = decode_append(bytes).unwrap();
        assert_eq!(back.entries, request(&[b"one", b"", b"three"]).entries);
        assert_eq!(back.prev_log_id, Some(to_raft_log_id(LogId::new(2, 9))));
        assert_eq!(back.vote, RaftVote::new_committed(3, 7));
    }

    #[test]
    fn every_cut_of_an_append_request_is_refused() {
        let bytes = joined(&encode_append(request(&[b"one", b"two"])));
        for len in 0..bytes.len() {
            assert!(decode_append(bytes.slice(..len)).is_err(), "cut at {len}");
        }
        let mut long = bytes.to_vec();
        long.push(0);
        assert!(decode_append(Bytes::from(long)).is_err());
    }
}
