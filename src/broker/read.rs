//! Reading a queue's stored batches on a node that has a replica of it.
//!
//! A linearizable read begins with the proof that this replica has applied all that was acknowledged
//! before: one read barrier, shared by all that wait for it. Those who read on and on, and miss
//! nothing in the end, ask for it only where there is nothing more ([`Proof::End`]).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quorate_storage::batch::BatchView;
use quorate_storage::commit_log::{Entry, EntryKind};
use quorate_storage::mutation::{self, Mutation};
use quorate_storage::queue_index::IndexRecord;
use quorate_storage::{RaftGroupId, StorageError};
use tokio::time::{Instant, timeout_at};

use super::local::LocalQueue;
use super::queue::entry::{self, EntryBody};
use super::queue::{Place, QueueBounds};
use super::{Broker, BrokerError, BrokerResult, StartAt};
use crate::catalog::ReplicaState;
use crate::peer::{PeerError, PeerRequest, PeerResult, Proof, ReadRequest, Slice, StoredBatch};

/// Index records looked up at a time.
const RECORDS_PER_LOOK: usize = 256;
/// Entries read for nothing between two that are wanted, rather than looking for the next one anew.
const MOST_BETWEEN: u64 = 8;
/// Reads that begin further behind the end than this go to the blocking pool: they are likely to
/// wait for the disk.
const NEAR_THE_END: u64 = 4096;

impl Broker {
    /// Stored batches of a queue, read here if there is a replica here, else on another node.
    pub(super) async fn read(&self, group: u64, request: &ReadRequest) -> BrokerResult<Slice> {
        match self.read_here(request).await {
            Ok(slice) => return Ok(slice),
            Err(PeerError::Broker(error)) if !error.retryable() => return Err(error),
            // Only another node can help: this one has no replica, or can't reach the leader.
            Err(PeerError::Broker(error)) if self.local.queue(group).is_some() => {
                return Err(error);
            }
            Err(_) => {}
        }
        let catalog = self.catalog();
        if let Some(placement) = catalog.placement(RaftGroupId(group)) {
            let here = placement.replica_on(self.node_id());
            let is_lost = here.is_some_and(|place| place.state != ReplicaState::Sound);
            let stale = request.proof == Proof::None;
            if (stale && is_lost) || placement.is_beyond_repair() {
                return Err(BrokerError::Quarantined);
            }
            // Who asks a node for its own replica is not answered by another.
            if stale && here.is_some() {
                let text = "its replica of the queue is not open at the moment";
                return Err(BrokerError::Overloaded(text.to_owned()));
            }
        }
        let wait = Duration::from_millis(request.wait_ms);
        self.ask_replicas(group, &PeerRequest::Read(request.clone()), wait)
            .await
    }

    /// Reads this node's replica.
    pub(crate) async fn read_here(&self, request: &ReadRequest) -> PeerResult<Slice> {
        let Some(queue) = self.local.queue(request.group) else {
            return Err(PeerError::NotHere);
        };
        if let Some(error) = queue.shared.soundness().broken() {
            tracing::debug!(group = request.group, %error, "a broken replica is not read");
            return Err(PeerError::NotHere);
        }
        let read = self.read_queue(&queue, request).await;
        match read {
            Ok(slice) if slice.batches.is_empty() && queue.shared.is_closed() => {
                Err(PeerError::NotHere)
            }
            read => read.map_err(|error| fault_of(&queue, error)),
        }
    }

    async fn read_queue(
        &self,
        queue: &Arc<LocalQueue>,
        request: &ReadRequest,
    ) -> BrokerResult<Slice> {
        let mut wake = queue.shared.subscribe();
        wake.mark_unchanged();
        if request.proof == Proof::All {
            self.prove(queue).await?;
        }
        let mut start = match self.find_start(queue, request.start)? {
            Some(start) => start,
            // The end is asked for, so the end it is, for as long as this read waits.
            None => {
                if request.proof == Proof::End {
                    self.prove(queue).await?;
                }
                let found = self.find_start(queue, request.start)?;
                found.unwrap_or(queue.shared.bounds().end)
            }
        };
        if request.proof == Proof::All && start > queue.shared.bounds().end {
            return Err(out_of_range(start, queue.shared.bounds()));
        }
        let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
        let mut proved = request.proof != Proof::End;
        loop {
            let bounds = queue.shared.bounds();
            // Trimmed since it was looked up; an offset that was asked for by name is not replaced.
            if start < bounds.earliest && !matches!(request.start, StartAt::Offset(_)) {
                start = bounds.earliest;
            }
            if start < bounds.earliest {
                return Err(out_of_range(start, bounds));
            }
            if start >= bounds.end && mutation::on(Mutation::ReadPastCommit) {
                let batches = uncommitted(queue, bounds.end);
                let taken: u64 = batches.iter().map(|b| u64::from(b.place.count)).sum();
                if start < bounds.end + taken {
                    return Ok(Slice {
                        start,
                        batches,
                        earliest: bounds.earliest,
                        end: bounds.end + taken,
                    });
                }
            }
            if start < bounds.end {
                match self.read_batches(queue, start, bounds, request).await? {
                    Some(slice) => return Ok(slice),
                    // Retention went on while it was read.
                    None => continue,
                }
            }
            if !proved {
                self.prove(queue).await?;
                proved = true;
                if start > queue.shared.bounds().end {
                    return Err(out_of_range(start, queue.shared.bounds()));
                }
                continue;
            }
            let woken = timeout_at(deadline, wake.changed()).await;
            if !matches!(woken, Ok(Ok(()))) || queue.shared.is_closed() {
                // The time is over, or the replica is being closed.
                let bounds = queue.shared.bounds();
                return Ok(Slice {
                    start,
                    batches: Vec::new(),
                    earliest: bounds.earliest,
                    end: bounds.end,
                });
            }
        }
    }

    /// When this returns, the replica has applied all that was committed before.
    async fn prove(&self, queue: &LocalQueue) -> BrokerResult<()> {
        let deadline = Instant::now() + self.config.read_timeout;
        self.barrier(&queue.group, deadline).await
    }

    /// The offset to begin with, if it is certain without proof.
    fn find_start(&self, queue: &LocalQueue, start: StartAt) -> BrokerResult<Option<u64>> {
        match start {
            StartAt::Offset(offset) => Ok(Some(offset)),
            StartAt::Earliest => Ok(Some(queue.shared.bounds().earliest)),
            StartAt::Latest => Ok(None),
            // Log time never goes back, so the first message found here is the first there is.
            StartAt::Timestamp(ms) => {
                let found = queue.shared.index().offset_at_time(ms);
                found.map_err(|error| unreadable(queue, error))
            }
        }
    }

    async fn read_batches(
        &self,
        queue: &Arc<LocalQueue>,
        start: u64,
        bounds: QueueBounds,
        request: &ReadRequest,
    ) -> BrokerResult<Option<Slice>> {
        let max_messages = usize::try_from(request.max_messages).unwrap_or(usize::MAX);
        let max_bytes = usize::try_from(request.max_bytes).unwrap_or(usize::MAX);
        let batches = if bounds.end - start <= NEAR_THE_END {
            collect(queue, start, max_messages, max_bytes)
        } else {
            let queue = queue.clone();
            let far = move || collect(&queue, start, max_messages, max_bytes);
            let joined = quorate_raft::blocking::on_pool(far).await;
            joined.map_err(|e| BrokerError::Internal(e.to_string()))?
        };
        // Taken anew: what was read may have been applied after the bounds were looked at.
        let bounds = queue.shared.bounds();
        let begins = |batches: &[StoredBatch]| batches.first().map(|b| b.place.base_offset);
        let batches = match batches {
            Ok(batches) if begins(&batches).is_some_and(|first| first <= start) => batches,
            _ if start < bounds.earliest => return Ok(None),
            Ok(batches) => {
                // A snapshot is being installed, and the bounds are the older ones still.
                let found = begins(&batches);
                tracing::debug!(start, ?found, "read while the replica is replaced");
                let text = "its replica of the queue is being replaced at the moment";
                return Err(BrokerError::Overloaded(text.to_owned()));
            }
            Err(error) => return Err(unreadable(queue, error)),
        };
        Ok(Some(Slice {
            start,
            batches,
            earliest: bounds.earliest,
            end: bounds.end,
        }))
    }

    /// The first offset at or after a time; the proved end if there is none.
    pub(crate) async fn offset_at_here(&self, group: u64, timestamp_ms: u64) -> PeerResult<u64> {
        let queue = self.local.queue(group).ok_or(PeerError::NotHere)?;
        let find = || self.find_start(&queue, StartAt::Timestamp(timestamp_ms));
        if let Some(offset) = find().map_err(PeerError::Broker)? {
            return Ok(offset);
        }
        self.prove(&queue).await.map_err(PeerError::Broker)?;
        let found = find().map_err(PeerError::Broker)?;
        Ok(found.unwrap_or_else(|| queue.shared.bounds().end))
    }

    /// Where the queue begins and ends, proved.
    pub(super) async fn proved_bounds(&self, group: u64) -> BrokerResult<QueueBounds> {
        let request = ReadRequest {
            group,
            start: StartAt::Latest,
            max_messages: 1,
            max_bytes: 1,
            wait_ms: 0,
            proof: Proof::End,
        };
        let slice = self.read(group, &request).await?;
        Ok(QueueBounds {
            earliest: slice.earliest,
            end: slice.end,
        })
    }
}

fn out_of_range(offset: u64, bounds: QueueBounds) -> BrokerError {
    BrokerError::OffsetOutOfRange {
        offset,
        earliest_offset: bounds.earliest,
        end_offset: bounds.end,
    }
}

/// What is wrong with this replica alone is for another one to answer.
pub(super) fn fault_of(queue: &LocalQueue, error: BrokerError) -> PeerError {
    match error {
        BrokerError::Quarantined => PeerError::NotHere,
        BrokerError::Internal(_) if queue.shared.soundness().broken().is_some() => {
            PeerError::NotHere
        }
        error => PeerError::Broker(error),
    }
}

pub(super) fn unreadable(queue: &LocalQueue, error: StorageError) -> BrokerError {
    if let StorageError::Purged { .. } = error {
        tracing::debug!(group = %queue.group.id(), %error, "read before a trim is applied");
        return BrokerError::Quarantined;
    }
    tracing::error!(%error, "a queue cannot be read");
    match &error {
        StorageError::Damaged { path, .. } if path == queue.shared.index().path() => {
            queue.shared.soundness().set_broken(error.clone());
            BrokerError::Internal(error.to_string())
        }
        // The log's own readers have told of it: this replica is on its way out.
        StorageError::Damaged { .. } => BrokerError::Quarantined,
        _ => BrokerError::Internal(error.to_string()),
    }
}

/// The batches from the one that holds `start` on, at least one, then as many as the bounds allow.
pub(super) fn collect(
    queue: &LocalQueue,
    start: u64,
    max_messages: usize,
    max_bytes: usize,
) -> Result<Vec<StoredBatch>, StorageError> {
    let mut found: Vec<StoredBatch> = Vec::new();
    let (mut bytes, mut offset) = (0, start);
    loop {
        let wanted = max_messages.clamp(1, RECORDS_PER_LOOK);
        let mut records = queue.shared.index().find_from(offset, wanted)?;
        if let Some(enough) = enough(&records, start, max_messages) {
            records.truncate(enough);
        }
        let full_look = records.len() == wanted;
        let mut rest = &records[..];
        while !rest.is_empty() {
            let run = run_along_log(rest);
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                break;
            };
            let left = max_bytes.saturating_sub(bytes).max(1);
            let entries = queue
                .group
                .log()
                .read(first.log_index, last.log_index + 1, left)?;
            let before = rest.len();
            for entry in &entries {
                let here = rest
                    .iter()
                    .take_while(|r| r.log_index == entry.log_id.index)
                    .count();
                let (wanted, after) = rest.split_at(here);
                rest = after;
                for batch in batches_of(queue, entry, wanted)? {
                    if !found.is_empty() && bytes + batch.batch.len() > max_bytes {
                        return Ok(found);
                    }
                    bytes += batch.batch.len();
                    offset = batch.place.base_offset + u64::from(batch.place.count);
                    found.push(batch);
                }
            }
            if rest.len() == before {
                // A replica that begins with an old state shows what was trimmed later, until it has
                // applied that trim.
                let purged = queue.group.log().state().purged;
                return Err(match purged.filter(|id| first.log_index <= id.index) {
                    Some(_) => StorageError::Purged {
                        index: first.log_index,
                    },
                    None => missing(queue, first),
                });
            }
        }
        let messages = offset.saturating_sub(start);
        if !full_look || messages >= max_messages as u64 || bytes >= max_bytes {
            return Ok(found);
        }
    }
}

/// What only [`Mutation::ReadPastCommit`] serves: batches behind the applied end of the log.
fn uncommitted(queue: &LocalQueue, end: u64) -> Vec<StoredBatch> {
    let log = queue.group.log();
    let from = queue.group.applied().map_or(0, |id| id.index + 1);
    let entries = log.read(from, u64::MAX, usize::MAX).unwrap_or_default();
    let mut base_offset = end;
    let mut found = Vec::new();
    for stored in entries.iter().filter(|e| e.kind == EntryKind::Command) {
        let Ok(decoded) = entry::decode(&stored.body) else {
            continue;
        };
        let EntryBody::Append(batches) = decoded.body else {
            continue;
        };
        for (ordinal, batch) in (0..).zip(batches).filter(|(_, batch)| batch.hold.is_none()) {
            let view = BatchView::parse_trusted(batch.batch.clone());
            let count = view.map_or(0, |view| view.record_count());
            found.push(StoredBatch {
                place: Place {
                    base_offset,
                    count,
                    term: stored.log_id.term,
                    index: stored.log_id.index,
                    batch: ordinal,
                },
                timestamp_ms: decoded.stamp_ms,
                batch: batch.batch,
            });
            base_offset += u64::from(count);
        }
    }
    found
}

/// How many of the records hold `max_messages` messages from `start` on; none if too few.
fn enough(records: &[IndexRecord], start: u64, max_messages: usize) -> Option<usize> {
    let until = start.saturating_add(max_messages as u64);
    let place = records.iter().position(|r| r.end_offset() >= until)?;
    Some(place + 1)
}

/// How many of the first records can be read in one go: they lie along the log, with little between
/// that is not wanted. What was delivered late points back, each batch to where it was stored.
fn run_along_log(records: &[IndexRecord]) -> &[IndexRecord] {
    let follows = |pair: &&[IndexRecord]| {
        let (here, next) = (pair[0].log_index, pair[1].log_index);
        (here..=here.saturating_add(MOST_BETWEEN)).contains(&next)
    };
    let run = records.windows(2).take_while(follows).count() + 1;
    &records[..run.min(records.len())]
}

/// The batches of one entry that the index records name.
fn batches_of(
    queue: &LocalQueue,
    entry: &Entry,
    records: &[IndexRecord],
) -> Result<Vec<StoredBatch>, StorageError> {
    let Some(first) = records.first() else {
        return Ok(Vec::new());
    };
    let decoded = (entry.kind == EntryKind::Command).then(|| entry::decode(&entry.body));
    let Some(Ok(EntryBody::Append(batches))) = decoded.map(|d| d.map(|e| e.body)) else {
        return Err(missing(queue, first));
    };
    let stored = records.iter().map(|record| {
        let batch = batches.get(usize::from(record.batch));
        let batch: &Bytes = &batch.ok_or_else(|| missing(queue, record))?.batch;
        Ok(StoredBatch {
            place: Place {
                base_offset: record.base_offset,
                count: record.count,
                term: entry.log_id.term,
                index: entry.log_id.index,
                batch: record.batch,
            },
            timestamp_ms: record.timestamp_ms,
            batch: batch.clone(),
        })
    });
    stored.collect()
}

fn missing(queue: &LocalQueue, record: &IndexRecord) -> StorageError {
    StorageError::Damaged {
        path: queue.shared.index().path().to_path_buf(),
        position: record.base_offset,
        reason: format!(
            "the index names batch {} of entry {}, which the log does not have",
            record.batch, record.log_index
        ),
    }
}
