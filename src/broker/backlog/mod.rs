//! Bounded backlogs: what a queue takes that its slowest consumer group has not consumed. What is
//! stored and not visible yet counts, too, so that its room is there when its time comes.
//!
//! Judged on the queue's leader before anything is proposed. What is on its way through the batcher
//! counts, so of messages that come together exactly as many are taken as fit. Invariants:
//!
//! - In-flight load is read before the queue's end: a message that is applied in between counts
//!   twice for a moment, never not at all. What becomes visible counts once at every moment.
//! - Nobody is refused on a guess: not before the coordinators were asked with proof after the
//!   message came, and not for the sake of others in flight before those have their answers
//!   (for [`IN_FLIGHT_PATIENCE`] at most).

mod positions;
mod sizes;

pub(super) use positions::Positions;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quorate_storage::RaftGroupId;
use quorate_storage::mutation::{self, Mutation};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::batcher::{now_ms, producer_of};
use super::encode::records_in;
use super::local::LocalQueue;
use super::queue::entry::Mark;
use super::read::unreadable;
use super::{Backlog, Broker, BrokerError, BrokerResult, OnFull};
use crate::catalog::{GroupOwner, Topic, TopicId};
use crate::peer::{NewBatch, NewHold};
use sizes::Sizes;

/// How long a message waits for what others have in flight before it is turned away.
const IN_FLIGHT_PATIENCE: Duration = Duration::from_millis(500);

impl Backlog {
    pub fn is_bounded(&self) -> bool {
        self.max_messages.is_some() || self.max_bytes.is_some() || self.max_age_ms.is_some()
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub messages: u64,
    pub bytes: u64,
}

impl Load {
    const ANY: Self = Self {
        messages: u64::MAX,
        bytes: u64::MAX,
    };

    fn of(batches: &[NewBatch]) -> Self {
        let messages = batches.iter().map(|b| u64::from(records_in(&b.batch)));
        let bytes = batches.iter().map(|b| b.batch.len() as u64);
        Self {
            messages: messages.sum(),
            bytes: bytes.sum(),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            messages: self.messages + other.messages,
            bytes: self.bytes + other.bytes,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            messages: self.messages.saturating_sub(other.messages),
            bytes: self.bytes.saturating_sub(other.bytes),
        }
    }

    fn within(self, limits: &Backlog) -> bool {
        limits.max_messages.is_none_or(|max| self.messages <= max)
            && limits.max_bytes.is_none_or(|max| self.bytes <= max)
    }
}

/// What is stored in a queue and not consumed.
#[derive(Debug, Clone, Copy, Default)]
struct Unconsumed {
    load: Load,
    /// Of what is visible: what waits for its time is not old.
    oldest_age_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fits,
    /// It would fit but for what is in flight.
    InFlight,
    Full,
}

fn judge(limits: &Backlog, stored: Unconsumed, in_flight: Load, new: Load) -> Verdict {
    let too_old = |max| stored.load.messages > 0 && stored.oldest_age_ms > max;
    if limits.max_age_ms.is_some_and(too_old) || !stored.load.plus(new).within(limits) {
        return Verdict::Full;
    }
    let in_flight = match mutation::on(Mutation::IgnoreInFlight) {
        false => in_flight,
        true => Load::default(),
    };
    match stored.load.plus(in_flight).plus(new).within(limits) {
        true => Verdict::Fits,
        false => Verdict::InFlight,
    }
}

/// Of one queue that is led here. It can be lost at any time: it is made anew from the log.
#[derive(Debug, Default)]
pub(super) struct BacklogGate {
    state: Mutex<State>,
    released: Notify,
}

#[derive(Debug, Default)]
struct State {
    in_flight: Load,
    sizes: Sizes,
}

/// Messages that were let in and are not applied yet; no longer in flight when dropped.
#[derive(Debug)]
pub(super) struct Admission {
    queue: Arc<LocalQueue>,
    load: Load,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let gate = &self.queue.backlog;
        let mut state = gate.state.lock();
        state.in_flight = state.in_flight.minus(self.load);
        drop(state);
        gate.released.notify_waiters();
    }
}

impl Broker {
    /// The topic and the number of the queue with this Raft group.
    pub(super) fn queue_of(&self, group: u64) -> Option<(Arc<Topic>, u32)> {
        let catalog = self.catalog();
        match catalog.owner(RaftGroupId(group))? {
            GroupOwner::Queue { topic, queue } => {
                Some((catalog.topics.get(&topic)?.clone(), queue))
            }
            _ => None,
        }
    }

    /// Lets batches in, or says why not. None: the topic has no bounds.
    pub(super) async fn admit(
        &self,
        queue: &Arc<LocalQueue>,
        topic: &Topic,
        number: u32,
        batches: &[NewBatch],
    ) -> BrokerResult<Option<Admission>> {
        let limits = &topic.config.backlog;
        if !limits.is_bounded() {
            return Ok(None);
        }
        let new = Load::of(batches);
        // A message left out would be a gap in its producer's sequence, or be missing in its
        // transaction. One that is known by its key may be stored already.
        let may_drop = |b: &NewBatch| {
            let is_half = matches!(b.hold, Some(NewHold::Transaction { .. }));
            let is_keyed = matches!(b.mark, Mark::Key { .. });
            producer_of(&b.batch).is_none() && !is_half && !is_keyed
        };
        let dropped = || BrokerError::Dropped {
            topic: topic.name.clone(),
            queue: number,
        };
        let drops = limits.on_full == OnFull::DropNewest && batches.iter().all(may_drop);
        if !new.within(limits) {
            if drops {
                return Err(dropped());
            }
            return Err(BrokerError::InvalidRequest(format!(
                "{} messages of {} bytes for one queue are more than the topic's backlog may ever \
                 hold; send fewer at a time",
                new.messages, new.bytes
            )));
        }
        let came = Instant::now();
        self.know_all_stored(queue).await?;
        self.positions_of_late().await;
        loop {
            let mut released = std::pin::pin!(queue.backlog.released.notified());
            released.as_mut().enable();
            let slowest = self.positions.slowest(topic.id, number);
            let judged = self.judge_backlog(queue, limits, slowest, new).await?;
            let verdict = match judged {
                Ok(admission) => return Ok(Some(admission)),
                Err(verdict) => verdict,
            };
            let is_guess = !self.positions.proved_since(came);
            if is_guess && !mutation::on(Mutation::RefuseOnAGuess) {
                self.prove_positions(came).await;
                continue;
            }
            let patience = came + IN_FLIGHT_PATIENCE;
            if verdict == Verdict::InFlight && timeout_at(patience, released).await.is_ok() {
                continue;
            }
            return Err(match drops {
                true => dropped(),
                false => BrokerError::BacklogFull(format!(
                    "queue {number} of topic {:?} holds as much as its consumers may leave \
                     unread; try again when they have consumed more",
                    topic.name
                )),
            });
        }
    }

    /// A leader has applied what others had acknowledged before it once it has applied an entry of
    /// its own term. Until then it would judge by an older state, after a restart a much older one.
    async fn know_all_stored(&self, queue: &LocalQueue) -> BrokerResult<()> {
        let term = queue.group.term();
        if queue.group.applied().is_some_and(|id| id.term == term) {
            return Ok(());
        }
        let deadline = Instant::now() + self.config.write_timeout;
        self.barrier(&queue.group, deadline).await
    }

    /// How much more fits now, as far as is known here.
    pub(super) async fn backlog_room(
        &self,
        queue: &Arc<LocalQueue>,
        topic: &Topic,
        number: u32,
    ) -> BrokerResult<Load> {
        let limits = &topic.config.backlog;
        if !limits.is_bounded() {
            return Ok(Load::ANY);
        }
        self.know_all_stored(queue).await?;
        self.positions_of_late().await;
        match self.room_as_known(queue, limits, topic.id, number).await? {
            Load { messages: 0, .. } => {
                self.prove_positions(Instant::now()).await;
                self.room_as_known(queue, limits, topic.id, number).await
            }
            room => Ok(room),
        }
    }

    async fn room_as_known(
        &self,
        queue: &Arc<LocalQueue>,
        limits: &Backlog,
        topic: TopicId,
        number: u32,
    ) -> BrokerResult<Load> {
        let slowest = self.positions.slowest(topic, number);
        let from = self.measured_from(queue, limits, slowest).await?;
        let mut state = queue.backlog.state.lock();
        let in_flight = state.in_flight;
        let stored = state.unconsumed(queue, limits, from)?;
        Ok(match judge(limits, stored, in_flight, Load::default()) {
            Verdict::Fits => {
                let taken = stored.load.plus(in_flight);
                let left = |limit: Option<u64>, taken| limit.unwrap_or(u64::MAX) - taken;
                Load {
                    messages: left(limits.max_messages, taken.messages),
                    bytes: left(limits.max_bytes, taken.bytes),
                }
            }
            _ => Load::default(),
        })
    }

    async fn judge_backlog(
        &self,
        queue: &Arc<LocalQueue>,
        limits: &Backlog,
        slowest: Option<u64>,
        new: Load,
    ) -> BrokerResult<Result<Admission, Verdict>> {
        let from = self.measured_from(queue, limits, slowest).await?;
        let mut state = queue.backlog.state.lock();
        let in_flight = state.in_flight;
        let stored = state.unconsumed(queue, limits, from)?;
        Ok(match judge(limits, stored, in_flight, new) {
            Verdict::Fits => {
                state.in_flight = in_flight.plus(new);
                let queue = queue.clone();
                Ok(Admission { queue, load: new })
            }
            other => Err(other),
        })
    }

    /// Where the backlog begins; the sizes of what is in it are known up to nearly the end.
    async fn measured_from(
        &self,
        queue: &Arc<LocalQueue>,
        limits: &Backlog,
        slowest: Option<u64>,
    ) -> BrokerResult<u64> {
        let bounds = queue.shared.bounds();
        // Without a consumer group all counts that is there.
        let from = slowest.unwrap_or(bounds.earliest).max(bounds.earliest);
        let from = from.min(bounds.end);
        if let Some(max_bytes) = limits.max_bytes {
            sizes::catch_up(queue, from, max_bytes).await?;
        }
        Ok(from)
    }
}

impl State {
    fn unconsumed(
        &mut self,
        queue: &LocalQueue,
        limits: &Backlog,
        from: u64,
    ) -> BrokerResult<Unconsumed> {
        let (bounds, held) = queue.shared.bounds_and_held();
        let end = bounds.end;
        let from = from.min(end);
        let bytes = match limits.max_bytes {
            Some(max_bytes) => self.sizes.measure(queue, from, end, max_bytes)?,
            None => 0,
        };
        let oldest = match limits.max_age_ms {
            Some(_) if from < end => queue.shared.index().find(from),
            _ => Ok(None),
        };
        let oldest = oldest.map_err(|error| unreadable(queue, error))?;
        let visible = Load {
            messages: end - from,
            bytes,
        };
        let held = Load {
            messages: held.messages,
            bytes: held.bytes,
        };
        Ok(Unconsumed {
            load: visible.plus(held),
            oldest_age_ms: oldest.map_or(0, |record| now_ms().saturating_sub(record.timestamp_ms)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(messages: Option<u64>, bytes: Option<u64>, age: Option<u64>) -> Backlog {
        Backlog {
            max_messages: messages,
            max_bytes: bytes,
            max_age_ms: age,
            on_full: OnFull::Reject,
        }
    }

    fn load(messages: u64, bytes: u64) -> Load {
        Load { messages, bytes }
    }

    #[test]
    fn the_last_one_that_fits_is_taken_and_the_next_is_not() {
        let ten = limits(Some(10), None, None);
        let stored = |messages| Unconsumed {
            load: load(messages, 0),
            oldest_age_ms: 0,
        };
        assert_eq!(
            judge(&ten, stored(7), load(2, 9), load(1, 9)),
            Verdict::Fits
        );
        assert_eq!(
            judge(&ten, stored(7), load(3, 9), load(1, 9)),
            Verdict::InFlight
        );
        assert_eq!(
            judge(&ten, stored(10), load(0, 0), load(1, 9)),
            Verdict::Full
        );
        assert_eq!(
            judge(&ten, stored(9), load(0, 0), load(2, 9)),
            Verdict::Full
        );
    }

    #[test]
    fn bytes_and_age_count_where_they_are_bounded() {
        let stored = Unconsumed {
            load: load(3, 90),
            oldest_age_ms: 50,
        };
        let bytes = limits(None, Some(100), None);
        assert_eq!(
            judge(&bytes, stored, load(0, 0), load(1, 10)),
            Verdict::Fits
        );
        assert_eq!(
            judge(&bytes, stored, load(1, 1), load(1, 10)),
            Verdict::InFlight
        );
        assert_eq!(
            judge(&bytes, stored, load(0, 0), load(1, 11)),
            Verdict::Full
        );
        let age = |max| {
            judge(
                &limits(None, None, Some(max)),
                stored,
                load(9, 9),
                load(9, 9),
            )
        };
        assert_eq!((age(50), age(49)), (Verdict::Fits, Verdict::Full));
        let empty = Unconsumed {
            load: load(0, 0),
            ..stored
        };
        let young = limits(None, None, Some(1));
        assert_eq!(judge(&young, empty, load(0, 0), load(1, 1)), Verdict::Fits);
    }
}
