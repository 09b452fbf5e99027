//! Committed offsets of consumer groups: commit, and how far behind a group is.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::batcher::now_ms;
use super::route::NO_LEADER;
use super::soon::all_soon;
use super::{
    Behind, Broker, BrokerError, BrokerResult, CommitRequest, GroupOffset, OffsetCommit, StartAt,
};
use crate::coordinator::{
    CommitVerdict, CoordinatorCommand, CoordinatorReply, QueueOffset, owner_of_name,
};
use crate::peer::{PeerError, PeerRequest, PeerResult, Proof, ReadRequest};

/// How long an answer about many queues waits for those that are slower than the others.
const GRACE: Duration = Duration::from_secs(1);

impl Broker {
    /// Commits offsets for a consumer group; one result for each, in order.
    pub async fn commit_offsets(
        &self,
        request: CommitRequest,
    ) -> BrokerResult<Vec<BrokerResult<OffsetCommit>>> {
        check_group_name(&request.group)?;
        let checked = join_all(request.offsets.iter().map(|o| self.check_commit(o))).await;
        let offsets: Vec<QueueOffset> = checked.iter().flatten().copied().collect();
        let member = request.member.clone();
        let verdicts = if offsets.is_empty() {
            Vec::new()
        } else {
            let command = CoordinatorCommand::Commit {
                group: request.group.clone(),
                offsets,
                allow_rewind: request.allow_rewind,
                member: request.member,
            };
            self.commit(&request.group, &command).await?
        };
        let mut verdicts = verdicts.into_iter();
        let results = request
            .offsets
            .into_iter()
            .zip(checked)
            .map(|(commit, checked)| {
                checked?;
                match verdicts.next() {
                    Some(CommitVerdict::Done) => {
                        let member = member.as_ref().map(|m| m.id.as_str());
                        self.trace_passed(&request.group, member, &commit);
                        Ok(commit)
                    }
                    Some(CommitVerdict::Conflict { committed }) => {
                        Err(BrokerError::OffsetConflict {
                            offset: commit.offset,
                            committed,
                        })
                    }
                    Some(CommitVerdict::Held) => Err(BrokerError::OffsetHeld {
                        group: request.group.clone(),
                        topic: commit.topic,
                        queue: commit.queue,
                    }),
                    Some(CommitVerdict::Fenced) => Err(match &member {
                        Some(member) => BrokerError::FencedMember {
                            group: request.group.clone(),
                            member: member.id.clone(),
                        },
                        None => BrokerError::NotAMember {
                            group: request.group.clone(),
                        },
                    }),
                    None => Err(BrokerError::Internal(
                        "a commit without a verdict".to_owned(),
                    )),
                }
            });
        Ok(results.collect())
    }

    /// Puts a commit to the consumer group's coordinator.
    pub(super) async fn commit(
        &self,
        group: &str,
        command: &CoordinatorCommand,
    ) -> BrokerResult<Vec<CommitVerdict>> {
        let coordinator = self.coordinator_of(group);
        match self.coordinate(coordinator, command).await? {
            CoordinatorReply::Committed(verdicts) => Ok(verdicts),
            CoordinatorReply::OtherMode(_) => Err(BrokerError::GroupModeConflict {
                group: group.to_owned(),
                leased: true,
            }),
            CoordinatorReply::GroupHasMembers(members) => Err(BrokerError::GroupHasMembers {
                group: group.to_owned(),
                members,
            }),
            CoordinatorReply::Invalid(text) => Err(BrokerError::InvalidRequest(text)),
            other => Err(super::producers::unexpected(&other)),
        }
    }

    pub(super) fn coordinator_of(&self, group: &str) -> u32 {
        owner_of_name(group, self.catalog().coordinators.len())
    }

    /// The queue must exist and the offset must not be beyond its end.
    pub(super) async fn check_commit(&self, commit: &OffsetCommit) -> BrokerResult<QueueOffset> {
        let (topic, group) = self.find_queue(&commit.topic, commit.queue).await?;
        let checked = QueueOffset {
            topic: topic.id,
            queue: commit.queue,
            offset: commit.offset,
        };
        // What is committed here needs no proof; only "beyond the end" does.
        let local = self.local.queue(group);
        if local.is_some_and(|q| commit.offset <= q.shared.bounds().end) {
            return Ok(checked);
        }
        let bounds = self.proved_bounds(group).await?;
        if commit.offset <= bounds.end {
            return Ok(checked);
        }
        Err(BrokerError::OffsetOutOfRange {
            offset: commit.offset,
            earliest_offset: bounds.earliest,
            end_offset: bounds.end,
        })
    }

    /// Where a consumer group is, in one topic or in all that it has committed for.
    pub async fn group_offsets(
        &self,
        group: &str,
        topic: Option<&str>,
    ) -> BrokerResult<Vec<GroupOffset>> {
        check_group_name(group)?;
        let Some(topic) = topic else {
            return self.all_offsets(group).await;
        };
        let topic = self.find_topic(topic).await?;
        let committed = self.committed(group).await?;
        let rows = (0u32..).zip(&topic.queues).map(|(queue, placement)| {
            let known = |o: &&QueueOffset| o.topic == topic.id && o.queue == queue;
            let offset = committed.iter().find(known).map(|o| o.offset);
            (queue, placement.group, offset)
        });
        let rows: Vec<_> = rows.collect();
        let places = rows.iter().map(|(_, id, offset)| (*id, *offset));
        let behind = self.behind(places.collect()).await;
        let rows = rows.iter().zip(behind).map(|(row, behind)| GroupOffset {
            topic: topic.name.clone(),
            queue: row.0,
            offset: row.2,
            behind,
        });
        let rows: Vec<GroupOffset> = rows.collect();
        self.show_lag(group, &rows);
        Ok(rows)
    }

    /// How far behind the ends of these Raft groups' queues one is that goes on at these offsets. None
    /// where that can't be told now: the others are told all the same.
    pub(super) async fn behind(&self, places: Vec<(u64, Option<u64>)>) -> Vec<Option<Behind>> {
        let places = places.into_iter();
        let each = places.map(|(id, offset)| self.behind_end(id, offset));
        let found = all_soon(each, self.config.read_timeout, GRACE).await;
        found.into_iter().map(Result::ok).collect()
    }

    /// By the queue's proved end. What retention removed before a group had it is left, too.
    async fn behind_end(&self, id: u64, offset: Option<u64>) -> BrokerResult<Behind> {
        if !self.may_be_led(id) {
            return Err(NO_LEADER);
        }
        loop {
            let bounds = self.proved_bounds(id).await?;
            let next = offset.unwrap_or(0).max(bounds.earliest);
            let mut behind = Behind {
                end_offset: bounds.end,
                lag: bounds.end.saturating_sub(offset.unwrap_or(next)),
                lag_ms: 0,
            };
            if next >= bounds.end {
                return Ok(behind);
            }
            let request = ReadRequest {
                group: id,
                start: StartAt::Offset(next),
                max_messages: 1,
                max_bytes: 1,
                wait_ms: 0,
                proof: Proof::End,
            };
            let slice = match self.read(id, &request).await {
                // Trimmed meanwhile.
                Err(BrokerError::OffsetOutOfRange { .. }) => continue,
                slice => slice?,
            };
            let stamp_ms = slice.batches.first().map_or(u64::MAX, |b| b.timestamp_ms);
            behind.lag_ms = now_ms().saturating_sub(stamp_ms);
            return Ok(behind);
        }
    }

    /// Shows what is known in the metrics.
    pub(super) fn show_lag<'a>(
        &self,
        group: &str,
        places: impl IntoIterator<Item = &'a GroupOffset>,
    ) {
        for place in places {
            if let Some(behind) = place.behind {
                self.metrics
                    .set_group_lag(group, &place.topic, place.queue, behind.lag);
            }
        }
    }

    /// Everything a consumer group has committed, proved to be the newest.
    pub(super) async fn committed(&self, group: &str) -> BrokerResult<Vec<QueueOffset>> {
        let coordinator = self.coordinator_of(group);
        match self.group_offsets_here(coordinator, group).await {
            Ok(offsets) => return Ok(offsets),
            Err(PeerError::Broker(error)) => return Err(error),
            Err(_) => {}
        }
        let catalog = self.catalog();
        let Some(placement) = catalog.coordinators.get(coordinator as usize) else {
            return Err(NO_LEADER);
        };
        let request = PeerRequest::GroupOffsets {
            coordinator,
            consumer_group: group.to_owned(),
        };
        self.ask_replicas(placement.group, &request, Duration::ZERO)
            .await
    }

    /// The same from this node's replica of the coordinator.
    pub(crate) async fn group_offsets_here(
        &self,
        coordinator: u32,
        group: &str,
    ) -> PeerResult<Vec<QueueOffset>> {
        let Some(local) = self.local.coordinator(coordinator) else {
            return Err(PeerError::NotHere);
        };
        if local.soundness.broken().is_some() {
            return Err(PeerError::NotHere);
        }
        let deadline = Instant::now() + self.config.read_timeout;
        let proof = self.barrier(&local.group, deadline).await;
        proof.map_err(PeerError::Broker)?;
        local.view.offsets(group).map_err(|cause| {
            local.soundness.set_broken(cause);
            PeerError::NotHere
        })
    }
}

pub(super) fn check_group_name(group: &str) -> BrokerResult<()> {
    if crate::names::is_valid_name(group) {
        return Ok(());
    }
    let rule = crate::names::NAME_RULE;
    Err(BrokerError::InvalidName(format!(
        "consumer group name {group:?} is not valid: a name has {rule}"
    )))
}
