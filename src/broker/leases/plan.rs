//! What could be leased: looked up and read on the coordinator's leader, decided by apply.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use quorate_storage::batch::{BatchView, RecordView};
use xxhash_rust::xxh3::xxh3_64;

use super::{ReceiveRequest, broken};
use crate::broker::batcher::now_ms;
use crate::broker::fetch::{message, size_of_message, unreadable};
use crate::broker::local::LocalCoordinator;
use crate::broker::queue::QueueBounds;
use crate::broker::route::NO_LEADER;
use crate::broker::selection::Seen;
use crate::broker::soon::all_soon;
use crate::broker::ttl::is_expired;
use crate::broker::{Broker, BrokerError, BrokerResult, Message, StartAt};
use crate::catalog::{Topic, TopicId};
use crate::coordinator::leases::{DueDelivery, MAX_IN_FLIGHT, Pick, QueueLeases};
use crate::peer::{PeerError, PeerResult, Proof, ReadRequest, StoredBatch};

/// Messages of a queue that one plan looks at, when a filter or an order may leave many out.
const SCAN_MESSAGES: u64 = 2048;
const SCAN_BYTES: u64 = 4 << 20;
/// Messages behind others of their key that one plan takes up.
const PARKED_AT_ONCE: usize = 1024;
/// Messages that are due again: those of a queue that one plan looks at when a filter leaves many to
/// other consumers, and those that it asks for at once.
const DUE_LOOKED_AT: usize = 1024;
const DUE_AT_ONCE: usize = 128;
/// How long a turn waits for queues that are slower than the others: all consumers of the group do.
const GRACE: Duration = Duration::from_millis(200);

/// One queue the group leases from.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub topic: Arc<Topic>,
    pub queue: u32,
    pub group: u64,
    pub leases: Option<QueueLeases>,
}

pub(super) type MessagePlace = (TopicId, u32, u64);

/// What one turn would lease.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub picks: Vec<Pick>,
    pub messages: HashMap<MessagePlace, Message>,
    /// Some queue had nobody to answer.
    pub incomplete: bool,
    bytes: usize,
}

/// What one queue has for the group.
struct Offer {
    source: Source,
    bounds: QueueBounds,
    /// The first messages that are due again at `now_ms`.
    due: Vec<DueDelivery>,
    now_ms: u64,
    /// Where the group goes on in the queue.
    next: u64,
}

impl Offer {
    fn has_fresh(&self) -> bool {
        self.next < self.bounds.end && self.room() > 0
    }

    fn room(&self) -> u32 {
        let in_flight = self.source.leases.map_or(0, |leases| leases.in_flight);
        MAX_IN_FLIGHT.saturating_sub(in_flight)
    }

    /// The group never leased from the queue: where it begins is settled at once.
    fn is_new(&self) -> bool {
        self.source.leases.is_none()
    }
}

impl Broker {
    /// The queues of the request's topics, with the group's place in each.
    pub(super) async fn lease_sources(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
    ) -> PeerResult<Vec<Source>> {
        let mut sources = Vec::new();
        for name in &request.topics {
            let topic = self.find_topic(name).await.map_err(PeerError::Broker)?;
            for (queue, placement) in (0u32..).zip(&topic.queues) {
                let leases = local.view.queue_leases(&request.group, topic.id, queue);
                sources.push(Source {
                    topic: topic.clone(),
                    queue,
                    group: placement.group,
                    leases: leases.map_err(|cause| broken(local, cause))?,
                });
            }
        }
        Ok(sources)
    }

    /// Looks for up to `wanted` messages, each queue with something getting its share. With `prove`
    /// a queue has no more only if its leader says so. One that can't be asked is left out, as long as
    /// there are others.
    pub(super) async fn plan(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        sources: Vec<Source>,
        wanted: usize,
        now_ms: u64,
        prove: bool,
    ) -> PeerResult<Plan> {
        let mut offers = Vec::new();
        let (mut failed, mut answered) = (None, false);
        let each = sources.iter().map(|s| self.bounds_for(request, s, prove));
        let found = all_soon(each, self.config.read_timeout, GRACE).await;
        for (source, found) in sources.into_iter().zip(found) {
            let (bounds, next) = match found {
                Ok(found) => found,
                // The others have messages all the same.
                Err(error) => {
                    tracing::debug!(topic = source.topic.name, queue = source.queue, %error, "not received from");
                    failed = Some(error);
                    continue;
                }
            };
            answered = true;
            let (topic, queue) = (source.topic.id, source.queue);
            let due = local.view.due(
                &request.group,
                topic,
                queue,
                now_ms,
                None,
                wanted.min(DUE_AT_ONCE),
            );
            let offer = Offer {
                source,
                bounds,
                due: due.map_err(|cause| broken(local, cause))?,
                now_ms,
                next,
            };
            if offer.is_new() || !offer.due.is_empty() || offer.has_fresh() {
                offers.push(offer);
            }
        }
        let mut plan = Plan::default();
        let mut left = wanted;
        let mut queues_left = offers.len();
        for offer in offers {
            let share = left.div_ceil(queues_left.max(1));
            queues_left -= 1;
            let before = plan.messages.len();
            match self.pick(local, request, offer, share, &mut plan).await {
                Ok(()) => left = left.saturating_sub(plan.messages.len() - before),
                Err(PeerError::Broker(error)) => failed = Some(error),
                Err(other) => return Err(other),
            }
        }
        plan.incomplete = failed.is_some();
        match failed {
            Some(error) if plan.picks.is_empty() && !(answered && error.retryable()) => {
                Err(PeerError::Broker(error))
            }
            _ => Ok(plan),
        }
    }

    /// What the queue holds, and where the group goes on in it.
    async fn bounds_for(
        &self,
        request: &ReceiveRequest,
        source: &Source,
        prove: bool,
    ) -> BrokerResult<(QueueBounds, u64)> {
        if let Some(leases) = source.leases {
            let here = self.local.queue(source.group).map(|q| q.shared.bounds());
            if let Some(bounds) = here.filter(|b| !prove || leases.next < b.end) {
                return Ok((bounds, leases.next));
            }
        }
        if !self.may_be_led(source.group) {
            return Err(NO_LEADER);
        }
        if let Some(leases) = source.leases {
            return Ok((self.proved_bounds(source.group).await?, leases.next));
        }
        let by_time = match request.start {
            StartAt::Timestamp(ms) => Some(self.offset_at_time(source.group, ms).await?),
            _ => None,
        };
        let bounds = self.proved_bounds(source.group).await?;
        let next = match request.start {
            StartAt::Earliest => bounds.earliest,
            StartAt::Latest => bounds.end,
            StartAt::Offset(offset) => offset,
            StartAt::Timestamp(_) => by_time.unwrap_or(bounds.end),
        };
        Ok((bounds, next))
    }

    async fn pick(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        offer: Offer,
        share: usize,
        plan: &mut Plan,
    ) -> PeerResult<()> {
        let mut pick = Pick {
            topic: offer.source.topic.id,
            queue: offer.source.queue,
            from: offer.next,
            through: offer.next,
            fresh: Vec::new(),
            again: Vec::new(),
            gone: Vec::new(),
        };
        let taken = self
            .pick_due(local, request, &offer, share, &mut pick, plan)
            .await?;
        let left = share.saturating_sub(taken);
        if left > 0 && offer.has_fresh() && !self.is_full(request, plan) {
            self.pick_fresh(local, request, &offer, left, &mut pick, plan)
                .await?;
        }
        let looked = pick.through > pick.from || offer.is_new();
        if looked || !pick.again.is_empty() || !pick.gone.is_empty() {
            plan.picks.push(pick);
        }
        Ok(())
    }

    /// Takes up to `wanted` messages that are due again, and says how many.
    async fn pick_due(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        offer: &Offer,
        wanted: usize,
        pick: &mut Pick,
        plan: &mut Plan,
    ) -> PeerResult<usize> {
        let policy = local.view.lease_group(&request.group);
        let policy = policy.map_err(|cause| broken(local, cause))?;
        let most = policy.map_or(u32::MAX, |group| group.policy.max_deliveries);
        let (topic, queue) = (offer.source.topic.id, offer.source.queue);
        let (mut taken, mut looked_at) = (0, 0);
        let mut page = offer.due.clone();
        while let Some(last) = page.last().copied() {
            for due in page {
                looked_at += 1;
                if due.deliveries >= most {
                    // Apply buries it.
                    pick.again.push(due.offset);
                    continue;
                }
                if taken == wanted || self.is_full(request, plan) {
                    return Ok(taken);
                }
                let read = self.read_due(request, &offer.source, due.offset);
                match read.await.map_err(PeerError::Broker)? {
                    Due::Ours(message) => {
                        pick.again.push(due.offset);
                        plan.add(pick, message);
                        taken += 1;
                    }
                    Due::Others => {}
                    Due::Gone => pick.gone.push(due.offset),
                }
            }
            if taken == wanted || looked_at >= DUE_LOOKED_AT {
                break;
            }
            let (now_ms, after) = (offer.now_ms, Some(last));
            let group = &request.group;
            let more = local
                .view
                .due(group, topic, queue, now_ms, after, DUE_AT_ONCE);
            page = more.map_err(|cause| broken(local, cause))?;
        }
        Ok(taken)
    }

    fn is_full(&self, request: &ReceiveRequest, plan: &Plan) -> bool {
        plan.bytes >= request.max_bytes && !plan.messages.is_empty()
    }

    /// Goes on at the cursor until enough was found.
    async fn pick_fresh(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        offer: &Offer,
        wanted: usize,
        pick: &mut Pick,
        plan: &mut Plan,
    ) -> PeerResult<()> {
        let source = &offer.source;
        // What retention took is nobody's any more.
        let start = offer.next.max(offer.bounds.earliest);
        let choosy = request.ordered || !request.selection.is_everything();
        let bytes_left = request.max_bytes.saturating_sub(plan.bytes).max(1) as u64;
        let read = ReadRequest {
            group: source.group,
            start: StartAt::Offset(start),
            max_messages: if choosy { SCAN_MESSAGES } else { wanted as u64 },
            max_bytes: if choosy {
                bytes_left.max(SCAN_BYTES)
            } else {
                bytes_left
            },
            wait_ms: 0,
            proof: Proof::End,
        };
        let slice = match self.read(source.group, &read).await {
            Ok(slice) => slice,
            // Trimmed meanwhile: the next look begins behind it.
            Err(BrokerError::OffsetOutOfRange {
                earliest_offset, ..
            }) if earliest_offset > start => {
                pick.through = earliest_offset;
                return Ok(());
            }
            Err(error) => return Err(PeerError::Broker(error)),
        };
        pick.through = start;
        let most = (wanted + PARKED_AT_ONCE).min(offer.room() as usize);
        let mut found = 0;
        let mut keys = HashSet::new();
        for stored in &slice.batches {
            let view = BatchView::parse_trusted(stored.batch.clone());
            let view = view.map_err(|e| PeerError::Broker(unreadable(e)))?;
            for (record, ordinal) in view.records().zip(0u32..) {
                let record = record.map_err(|e| PeerError::Broker(unreadable(e)))?;
                let offset = stored.place.base_offset + u64::from(ordinal);
                if offset < start {
                    continue;
                }
                let over = is_over(source, stored, &record);
                if over || !takes(request, stored, &record, offset) {
                    pick.through = offset + 1;
                    continue;
                }
                if found == wanted || pick.fresh.len() == most || self.is_full(request, plan) {
                    return Ok(());
                }
                let key = if request.ordered { key_of(&record) } else { 0 };
                let (topic, queue) = (source.topic.id, source.queue);
                let busy = || local.view.is_key_busy(&request.group, topic, queue, key);
                let waits = key != 0
                    && (!keys.insert(key) || busy().map_err(|cause| broken(local, cause))?);
                if !waits {
                    let message = message(source.group, queue, stored, &view, &record, ordinal);
                    plan.add(pick, message.map_err(PeerError::Broker)?);
                    found += 1;
                }
                pick.fresh.push((offset, key));
                pick.through = offset + 1;
            }
        }
        Ok(())
    }

    /// One message that was granted. None: retention took it.
    pub(super) async fn read_one(
        &self,
        source: &Source,
        offset: u64,
    ) -> BrokerResult<Option<Message>> {
        let found = self.read_record(source.group, offset).await?;
        let Some((stored, view, record, ordinal)) = found else {
            return Ok(None);
        };
        let (group, queue) = (source.group, source.queue);
        message(group, queue, &stored, &view, &record, ordinal).map(Some)
    }

    /// A message that is due, if it is still to be had.
    async fn read_due(
        &self,
        request: &ReceiveRequest,
        source: &Source,
        offset: u64,
    ) -> BrokerResult<Due> {
        let found = self.read_record(source.group, offset).await?;
        let Some((stored, view, record, ordinal)) = found else {
            return Ok(Due::Gone);
        };
        if is_over(source, &stored, &record) {
            return Ok(Due::Gone);
        }
        if !takes(request, &stored, &record, offset) {
            return Ok(Due::Others);
        }
        let (group, queue) = (source.group, source.queue);
        message(group, queue, &stored, &view, &record, ordinal).map(Due::Ours)
    }

    /// One stored record. None: retention took it.
    pub(super) async fn read_record(
        &self,
        group: u64,
        offset: u64,
    ) -> BrokerResult<Option<(StoredBatch, BatchView, RecordView, u32)>> {
        let read = ReadRequest {
            group,
            start: StartAt::Offset(offset),
            max_messages: 1,
            max_bytes: 1,
            wait_ms: 0,
            proof: Proof::End,
        };
        let slice = match self.read(group, &read).await {
            Ok(slice) => slice,
            Err(BrokerError::OffsetOutOfRange {
                earliest_offset, ..
            }) if offset < earliest_offset => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(stored) = slice.batches.into_iter().next() else {
            return Err(NO_LEADER);
        };
        let view = BatchView::parse_trusted(stored.batch.clone()).map_err(unreadable)?;
        let ordinal = offset.saturating_sub(stored.place.base_offset);
        let record = view.records().nth(ordinal as usize);
        let Some(record) = record else {
            return Err(BrokerError::Internal(format!(
                "a batch of group {group} ends before offset {offset}"
            )));
        };
        let record = record.map_err(unreadable)?;
        Ok(Some((stored, view, record, ordinal as u32)))
    }
}

impl Plan {
    fn add(&mut self, pick: &Pick, message: Message) {
        self.bytes += size_of_message(&message);
        let place = (pick.topic, pick.queue, message.offset);
        self.messages.insert(place, message);
    }
}

/// What became of a message that is due again.
enum Due {
    Ours(Message),
    /// Left for consumers with another filter.
    Others,
    /// Retention took it, or its time to live is over.
    Gone,
}

/// Whether the consumer wants a message.
fn takes(request: &ReceiveRequest, stored: &StoredBatch, record: &RecordView, offset: u64) -> bool {
    let seen = Seen {
        offset,
        timestamp_ms: stored.timestamp_ms,
    };
    request.selection.takes(record, seen)
}

/// Whether the message's time to live is over.
fn is_over(source: &Source, stored: &StoredBatch, record: &RecordView) -> bool {
    let ttl_ms = source.topic.config.ttl_ms;
    is_expired(record, stored.timestamp_ms, ttl_ms, now_ms())
}

/// What an order goes by. 0: no key, no order.
fn key_of(record: &RecordView) -> u64 {
    record.key.as_ref().map_or(0, |key| xxh3_64(key).max(1))
}
