//! From a member's seat to what it is told: names of topics, and the offsets to begin with.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::leader::Seat;
use super::{AssignedQueue, MemberAnswer};
use crate::broker::route::NO_LEADER;
use crate::broker::soon::all_soon;
use crate::broker::{Broker, BrokerResult};
use crate::catalog::CatalogState;
use crate::coordinator::{
    CoordinatorCommand, CoordinatorReply, GroupStart, QueueId, QueueOffset, TopicShape,
};

/// How much of a session the search for a start may take: one part in so many.
const SHARE_OF_A_SESSION: u64 = 5;

/// A queue on its way into an answer.
struct Place {
    id: QueueId,
    topic: String,
    /// The queue's Raft group.
    group: u64,
    committed: Option<u64>,
}

impl Broker {
    /// What the catalog says of topics. One that is not known here may have been made a moment ago.
    pub(super) async fn topic_shapes(&self, names: &[String]) -> BTreeMap<String, TopicShape> {
        let unknown = |name: &String| self.catalog().topic(name).is_none();
        if names.iter().any(unknown) && self.catalog_barrier().await.is_err() {
            tracing::debug!("the catalog can't be asked; the next look will find what is missing");
        }
        shapes(&self.catalog(), names)
    }

    /// The ids of queues; those that don't exist any more are nobody's.
    pub(super) async fn queue_ids(&self, named: &[(String, u32)]) -> BrokerResult<Vec<QueueId>> {
        let unknown = |(name, _): &(String, u32)| self.catalog().topic(name).is_none();
        if named.iter().any(unknown) {
            self.catalog_barrier().await?;
        }
        let catalog = self.catalog();
        let known = named.iter().filter_map(|(name, queue)| {
            let topic = catalog.topic(name)?.id;
            let queue = *queue;
            Some(QueueId { topic, queue })
        });
        Ok(known.collect())
    }

    /// Tells a member its queues, each with the offset to begin with.
    pub(super) async fn answer_member(
        &self,
        group: &str,
        seat: Seat,
    ) -> BrokerResult<MemberAnswer> {
        let mut places = self.places(&seat).await?;
        let mut offsets = self.earliest(&places).await;
        let begun = self.begin(group, &seat, &mut places).await?;
        offsets.extend(begun);
        let mut assignment: Vec<AssignedQueue> = places
            .into_iter()
            .map(|place| {
                let known = offsets.get(&place.id).copied().unwrap_or(0);
                AssignedQueue {
                    topic: place.topic,
                    queue: place.id.queue,
                    // What was committed may be gone by now.
                    offset: place.committed.unwrap_or(0).max(known),
                }
            })
            .collect();
        assignment.sort();
        Ok(MemberAnswer {
            member_id: seat.member_id,
            epoch: seat.epoch,
            assignment,
            session_timeout_ms: seat.session_timeout_ms,
            tag: seat.tag,
            filter: seat.filter,
            missing_topics: Vec::new(),
        })
    }

    async fn places(&self, seat: &Seat) -> BrokerResult<Vec<Place>> {
        let missing = |(id, _): &(QueueId, Option<u64>)| {
            let catalog = self.catalog();
            let topic = catalog.topics.get(&id.topic);
            topic.is_none_or(|t| t.queues.len() <= id.queue as usize)
        };
        if seat.queues.iter().any(missing) {
            self.catalog_barrier().await?;
        }
        let catalog = self.catalog();
        // A topic that is gone is nobody's to consume; the group will hear of it.
        let known = seat.queues.iter().filter_map(|(id, committed)| {
            let topic = catalog.topics.get(&id.topic)?;
            Some(Place {
                id: *id,
                topic: topic.name.clone(),
                group: topic.queues.get(id.queue as usize)?.group,
                committed: *committed,
            })
        });
        Ok(known.collect())
    }

    /// Where the queues begin, as far as known without proof: they only ever begin later.
    async fn earliest(&self, places: &[Place]) -> HashMap<QueueId, u64> {
        let elsewhere: Vec<u64> = places
            .iter()
            .map(|place| place.group)
            .filter(|group| self.local.queue(*group).is_none())
            .collect();
        let views = match elsewhere.is_empty() {
            true => HashMap::new(),
            false => self.describe(&elsewhere).await,
        };
        let earliest = |place: &Place| {
            let here = self.local.queue(place.group);
            let here = here.map(|queue| queue.shared.bounds().earliest);
            let there = || views.get(&place.group).map(|view| view.earliest);
            (place.id, here.or_else(there).unwrap_or(0))
        };
        places.iter().map(earliest).collect()
    }

    /// Finds where a start at the end or at a time is, and commits it: whoever gets the queue next
    /// goes on from there, and nothing that came after the first start is passed over. A queue that
    /// can't tell is taken out of the places: the member hears of it in a later heartbeat.
    async fn begin(
        &self,
        group: &str,
        seat: &Seat,
        places: &mut Vec<Place>,
    ) -> BrokerResult<Vec<(QueueId, u64)>> {
        if seat.start == GroupStart::Earliest {
            return Ok(Vec::new());
        }
        let fresh = places.iter().filter(|place| place.committed.is_none());
        let found = fresh.map(|place| async move {
            if !self.may_be_led(place.group) {
                return Err(NO_LEADER);
            }
            let offset = match seat.start {
                GroupStart::Timestamp(ms) => self.offset_at_time(place.group, ms).await?,
                _ => self.proved_bounds(place.group).await?.end,
            };
            Ok(QueueOffset {
                topic: place.id.topic,
                queue: place.id.queue,
                offset,
            })
        });
        // A member that waits for its answer sends no heartbeat.
        let patience = Duration::from_millis(seat.session_timeout_ms / SHARE_OF_A_SESSION);
        let found = all_soon(found, patience, patience).await.into_iter();
        let offsets: Vec<QueueOffset> = found.filter_map(Result::ok).collect();
        let ids = offsets.iter().map(|o| QueueId {
            topic: o.topic,
            queue: o.queue,
        });
        let ids: Vec<QueueId> = ids.collect();
        let begun: HashSet<QueueId> = ids.iter().copied().collect();
        places.retain(|place| place.committed.is_some() || begun.contains(&place.id));
        if offsets.is_empty() {
            return Ok(Vec::new());
        }
        let command = CoordinatorCommand::Begin {
            group: group.to_owned(),
            instance: seat.instance.clone(),
            offsets,
        };
        match self
            .coordinate(self.coordinator_of(group), &command)
            .await?
        {
            CoordinatorReply::Begun(offsets) => Ok(ids.into_iter().zip(offsets).collect()),
            CoordinatorReply::UnknownGroup => Ok(Vec::new()),
            other => Err(super::unexpected(&other)),
        }
    }
}

/// What this version of the catalog says of topics.
pub(super) fn shapes<'a>(
    catalog: &CatalogState,
    names: impl IntoIterator<Item = &'a String>,
) -> BTreeMap<String, TopicShape> {
    let shape = |name: &String| {
        let topic = catalog.topic(name);
        let shape = TopicShape {
            version: catalog.version,
            // A topic has at most some thousand queues.
            found: topic.map(|t| (t.id, t.queues.len() as u32)),
        };
        (name.clone(), shape)
    };
    names.into_iter().map(shape).collect()
}
