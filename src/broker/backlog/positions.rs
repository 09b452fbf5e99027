//! What this node knows of how far the slowest consumer groups are.
//!
//! Coordinators are asked only for topics with a bounded backlog, and by whoever is about to store
//! something in one. What is known serves until [`STALE_AFTER`]. Before a producer is turned away
//! the coordinators are asked again, with proof, so that a commit that was acknowledged before the
//! message came has made room for it; askers share the answer, and it is asked for at most every
//! [`PAUSE`].

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::super::{Broker, BrokerResult};
use crate::catalog::TopicId;
use crate::coordinator::QueueOffset;
use crate::peer::{PeerError, PeerRequest, PeerResult};

const STALE_AFTER: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(50);
/// A coordinator that does not answer for this long is taken as it was known before.
const PATIENCE: Duration = Duration::from_millis(300);
/// The same where a producer would be turned away without its answer.
const PROOF_PATIENCE: Duration = Duration::from_secs(1);

type Lowest = HashMap<(TopicId, u32), u64>;

#[derive(Debug, Default)]
pub(in crate::broker) struct Positions {
    known: RwLock<Known>,
    /// One asks at a time; who only wants to know of late does not wait for who wants proof.
    asking: Mutex<()>,
    proving: Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    /// When the last question began, and the last with proof.
    asked: Option<Instant>,
    proved: Option<Instant>,
    /// By coordinator number.
    lowest: Vec<Lowest>,
}

impl Positions {
    /// How far the slowest consumer group is in a queue, if there is one.
    pub(super) fn slowest(&self, topic: TopicId, queue: u32) -> Option<u64> {
        let known = self.known.read();
        let each = known.lowest.iter();
        each.filter_map(|lowest| lowest.get(&(topic, queue)).copied())
            .min()
    }

    /// Whether what is known was proved at `since` or later.
    pub(super) fn proved_since(&self, since: Instant) -> bool {
        self.known.read().proved.is_some_and(|at| at >= since)
    }

    fn asked_since(&self, since: Instant) -> bool {
        self.known.read().asked.is_some_and(|at| at >= since)
    }
}

impl Broker {
    /// Sees to it that what is known is not older than [`STALE_AFTER`].
    pub(super) async fn positions_of_late(&self) {
        let now = Instant::now();
        let late = now.checked_sub(STALE_AFTER).unwrap_or(now);
        if !self.positions.asked_since(late) {
            self.ask_positions(late, false).await;
        }
    }

    /// Sees to it that what is known was proved at `since` or later, as far as that is possible.
    pub(super) async fn prove_positions(&self, since: Instant) {
        if !self.positions.proved_since(since) {
            self.ask_positions(since, true).await;
        }
    }

    async fn ask_positions(&self, since: Instant, prove: bool) {
        let alone = match prove {
            true => &self.positions.proving,
            false => &self.positions.asking,
        };
        let _alone = alone.lock().await;
        let done = match prove {
            true => self.positions.proved_since(since),
            false => self.positions.asked_since(since),
        };
        if done {
            return;
        }
        let last = self.positions.known.read().proved;
        if prove && let Some(last) = last {
            tokio::time::sleep_until(last + PAUSE).await;
        }
        let begun = Instant::now();
        let catalog = self.catalog();
        let bounded = catalog.topics.values();
        let bounded = bounded.filter(|topic| topic.config.backlog.is_bounded());
        let topics: Vec<TopicId> = bounded.map(|topic| topic.id).collect();
        let patience = match prove {
            true => PROOF_PATIENCE,
            false => PATIENCE,
        };
        let each = (0..).zip(&catalog.coordinators).map(|(number, placement)| {
            let topics = &topics;
            async move {
                let ask = self.positions_of(number, placement.group, topics, prove);
                tokio::time::timeout(patience, ask).await.ok()?.ok()
            }
        });
        let answers = join_all(each).await;
        let mut known = self.positions.known.write();
        if !prove && known.proved.is_some_and(|at| at > begun) {
            return; // what was proved meanwhile is newer
        }
        known.lowest.resize_with(answers.len(), Lowest::default);
        for (lowest, answer) in known.lowest.iter_mut().zip(answers) {
            let Some(answer) = answer else {
                continue;
            };
            let each = answer.into_iter();
            *lowest = each.map(|o| ((o.topic, o.queue), o.offset)).collect();
        }
        known.asked = known.asked.max(Some(begun));
        if prove {
            known.proved = Some(begun);
        }
    }

    async fn positions_of(
        &self,
        coordinator: u32,
        group: u64,
        topics: &[TopicId],
        prove: bool,
    ) -> BrokerResult<Vec<QueueOffset>> {
        match self.positions_here(coordinator, topics, prove).await {
            Ok(offsets) => return Ok(offsets),
            Err(PeerError::Broker(error)) => return Err(error),
            Err(_) => {}
        }
        let request = PeerRequest::LowestOffsets {
            coordinator,
            topics: topics.to_vec(),
            prove,
        };
        self.ask_replicas(group, &request, Duration::ZERO).await
    }

    /// From this node's replica of the coordinator.
    pub(crate) async fn positions_here(
        &self,
        coordinator: u32,
        topics: &[TopicId],
        prove: bool,
    ) -> PeerResult<Vec<QueueOffset>> {
        let local = self.local.coordinator(coordinator);
        let local = local.filter(|local| local.soundness.broken().is_none());
        let local = local.ok_or(PeerError::NotHere)?;
        if prove {
            let proof = self
                .barrier(&local.group, Instant::now() + PROOF_PATIENCE)
                .await;
            proof.map_err(PeerError::Broker)?;
        }
        local.view.lowest_offsets(topics).map_err(|cause| {
            local.soundness.set_broken(cause);
            PeerError::NotHere
        })
    }
}
