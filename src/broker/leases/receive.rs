//! Receiving, on the coordinator's leader: look, lease, and wait where there is nothing.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use xxhash_rust::xxh3::xxh3_64;

use super::plan::{Plan, Source};
use super::{LeasedMessage, ReceiveAnswer, ReceiveRequest, broken};
use crate::broker::batcher::now_ms;
use crate::broker::local::LocalCoordinator;
use crate::broker::offsets::check_group_name;
use crate::broker::producers::unexpected;
use crate::broker::route::NO_LEADER;
use crate::broker::{Broker, BrokerError, BrokerResult, Outcome, StartAt};
use crate::coordinator::CoordinatorReply;
use crate::coordinator::leases::{
    Granted, Interest, Lease, LeaseCommand, LeaseReply, MAX_IN_FLIGHT, Receipt,
};
use crate::peer::{PeerError, PeerRequest, PeerResult, Proof, ReadRequest};

/// A receive that waits looks anew at least this often, and at its leadership more often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
const LEADERSHIP: Duration = Duration::from_millis(500);
/// How long the leader's node is asked to wait. A consumer that went away takes no messages after.
const WAIT_AT_ONCE: Duration = Duration::from_secs(3);
/// Between two looks where the first could not take what is due.
const PAUSE: Duration = Duration::from_millis(100);
/// A receive that was not asked to wait goes past what a filter leaves out for so long.
const SCAN_AT_LEAST: Duration = Duration::from_secs(1);

/// What one turn came to.
enum Turn {
    Leased(ReceiveAnswer),
    /// Something was looked at, nothing leased: there may be more. With what the consumer still holds.
    Moved(Vec<Receipt>),
    /// There is nothing, as far as is known.
    Nothing(Idle),
}

/// What is known of a turn that found nothing.
struct Idle {
    sources: Vec<Source>,
    /// What the consumer still holds.
    held: Vec<Receipt>,
    /// When it was looked: what was due by then is left to other consumers.
    looked_ms: u64,
    /// When it is looked again, whatever happens.
    again: Duration,
}

impl Broker {
    /// Leases messages to a consumer; waits for the first one if it is told to.
    pub async fn receive(&self, request: ReceiveRequest) -> BrokerResult<ReceiveAnswer> {
        check_group_name(&request.group)?;
        for topic in &request.topics {
            self.find_topic(topic).await?;
        }
        let (coordinator, raft_group) = self.lease_coordinator(&request.group)?;
        let grace = self.config.write_timeout;
        let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
        loop {
            let here = |left: Duration| {
                let request = ReceiveRequest {
                    wait_ms: millis(left.saturating_sub(grace)),
                    ..request.clone()
                };
                async move { Ok(self.receive_here(coordinator, &request, left).await?) }
            };
            let there = |left_ms: u64| PeerRequest::Receive {
                coordinator,
                request: ReceiveRequest {
                    wait_ms: left_ms.saturating_sub(millis(grace)),
                    ..request.clone()
                },
                timeout_ms: left_ms,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.min(WAIT_AT_ONCE);
            match self.write(raft_group, left + grace, here, there).await {
                Ok(answer) if answer.messages.is_empty() && Instant::now() < deadline => {}
                // What was leased and lost on the way comes back when its lease ends.
                Err(
                    BrokerError::Timeout {
                        outcome: Outcome::Unknown,
                    }
                    | BrokerError::AnswerLost,
                ) if Instant::now() < deadline => {}
                answer => return answer,
            }
        }
    }

    /// The same where this node leads the coordinator. After `patience` nobody waits for the answer.
    pub(crate) async fn receive_here(
        &self,
        coordinator: u32,
        request: &ReceiveRequest,
        patience: Duration,
    ) -> PeerResult<ReceiveAnswer> {
        let patience = Instant::now() + patience;
        let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
        let local = self.led_coordinator(coordinator)?;
        let signals = local.view.signals();
        let interest = match request.held.is_empty() {
            true => Interest::Free,
            false => Interest::Settled,
        };
        let mut changed = signals.subscribe(&request.group, interest);
        let mut proved = false;
        let scan_until = deadline.max(Instant::now() + SCAN_AT_LEAST);
        loop {
            changed.mark_unchanged();
            let turn = match self.take_turn(&local, request, proved, patience).await {
                // A queue is between two leaders.
                Err(PeerError::Broker(error))
                    if error.retryable()
                        && error.outcome() == Outcome::NotCommitted
                        && Instant::now() < deadline =>
                {
                    sleep_until(deadline.min(Instant::now() + LEADERSHIP)).await;
                    self.led_coordinator(coordinator)?;
                    continue;
                }
                turn => turn?,
            };
            match turn {
                Turn::Leased(answer) => return Ok(answer),
                Turn::Moved(_) if Instant::now() < scan_until => {}
                Turn::Moved(held) => {
                    return Ok(ReceiveAnswer {
                        messages: Vec::new(),
                        held,
                    });
                }
                Turn::Nothing(_) if !proved => {
                    let patience = Instant::now() + self.config.read_timeout;
                    let proof = self.barrier(&local.group, patience).await;
                    proof.map_err(PeerError::Broker)?;
                    proved = true;
                }
                Turn::Nothing(mut idle) => {
                    let full = idle.held.len() >= request.max_messages;
                    if Instant::now() >= deadline {
                        return Ok(ReceiveAnswer {
                            messages: Vec::new(),
                            held: idle.held,
                        });
                    }
                    if full {
                        idle.sources.clear();
                    }
                    let until = deadline.min(Instant::now() + idle.again);
                    self.wait_for_messages(&local, request, idle, &mut changed, until)
                        .await?;
                }
            }
        }
    }

    /// Looks, proposes, and gathers what was granted; one consumer of a group at a time.
    async fn take_turn(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        prove: bool,
        patience: Instant,
    ) -> PeerResult<Turn> {
        let until = patience.min(Instant::now() + self.config.write_timeout);
        let turn = self.lease_turns.of(&request.group);
        let Ok(mut first) = timeout_at(until, turn.lock()).await else {
            return Err(PeerError::Broker(BrokerError::Overloaded(
                "too many consumers of the group receive at once".to_owned(),
            )));
        };
        let fail = |cause| broken(local, cause);
        let now_ms = now_ms().max(local.view.log_time_ms().map_err(fail)?);
        let mut held = Vec::new();
        for receipt in &request.held {
            if local
                .view
                .is_held(&request.group, receipt, now_ms)
                .map_err(fail)?
            {
                held.push(*receipt);
            }
        }
        let mut sources = self.lease_sources(local, request).await?;
        let count = sources.len().max(1);
        sources.rotate_left(*first % count);
        *first = (*first + 1) % count;
        let wanted = request.max_messages.saturating_sub(held.len());
        let known = local.view.lease_group(&request.group).map_err(fail)?;
        let mut idle = Idle {
            sources,
            held,
            looked_ms: now_ms,
            again: LOOK_AGAIN,
        };
        if wanted == 0 {
            return Ok(Turn::Nothing(idle));
        }
        let sources = idle.sources.clone();
        let plan = self
            .plan(local, request, sources, wanted, now_ms, prove)
            .await?;
        if plan.incomplete {
            idle.again = LEADERSHIP;
        }
        if plan.picks.is_empty() && known.is_some() {
            return Ok(Turn::Nothing(idle));
        }
        // Who asked has gone: what is leased now is delivered to nobody, and counts.
        if Instant::now() >= patience {
            return Err(PeerError::Broker(NO_LEADER));
        }
        let Idle { sources, held, .. } = idle;
        let token = match uuid::Uuid::new_v4().as_u64_pair().0 {
            0 => 1,
            token => token,
        };
        let lease = Lease {
            token,
            consumer: request
                .consumer
                .as_ref()
                .map_or(token, |name| xxh3_64(name.as_bytes())),
            lease_ms: request.lease_ms,
            ordered: request.ordered,
            max: wanted as u32,
            picks: plan.picks.clone(),
        };
        let consumer = lease.consumer;
        let command = LeaseCommand::Lease(lease);
        let reply = self.lease_command_here(local, &request.group, command);
        let granted = match reply.await? {
            LeaseReply::Granted(granted) => granted,
            other => {
                let unexpected = unexpected(&CoordinatorReply::Leases(other));
                return Err(PeerError::Broker(unexpected));
            }
        };
        drop(first);
        if granted.leases.is_empty() {
            return Ok(Turn::Moved(held));
        }
        let messages = self.gather(&sources, plan, &granted, token, consumer).await;
        self.trace_delivered(&request.group, request.consumer.as_ref(), &messages);
        Ok(Turn::Leased(ReceiveAnswer { messages, held }))
    }

    /// The messages that were granted.
    async fn gather(
        &self,
        sources: &[Source],
        mut plan: Plan,
        granted: &Granted,
        token: u64,
        consumer: u64,
    ) -> Vec<LeasedMessage> {
        let mut messages = Vec::with_capacity(granted.leases.len());
        for grant in &granted.leases {
            let of_grant = |s: &&Source| s.topic.id == grant.topic && s.queue == grant.queue;
            let Some(source) = sources.iter().find(of_grant) else {
                continue;
            };
            let place = (grant.topic, grant.queue, grant.offset);
            let message = match plan.messages.remove(&place) {
                Some(message) => message,
                // Its key came free after it was passed over.
                None => match self.read_one(source, grant.offset).await {
                    Ok(Some(message)) => message,
                    Ok(None) => continue,
                    // The others are leased all the same; this one's lease ends.
                    Err(error) => {
                        let topic = &source.topic.name;
                        tracing::debug!(topic, queue = source.queue, offset = grant.offset, %error, "granted and not read");
                        continue;
                    }
                },
            };
            messages.push(LeasedMessage {
                topic: source.topic.name.clone(),
                message,
                receipt: Receipt {
                    topic: grant.topic,
                    queue: grant.queue,
                    offset: grant.offset,
                    token,
                    consumer,
                },
                delivery_count: grant.deliveries,
            });
        }
        messages
    }

    /// Returns when there may be something: a new message, one that is due, a signal of apply, a
    /// change of the catalog; or at `until`.
    async fn wait_for_messages(
        &self,
        local: &LocalCoordinator,
        request: &ReceiveRequest,
        idle: Idle,
        changed: &mut watch::Receiver<u64>,
        until: Instant,
    ) -> PeerResult<()> {
        let mut catalog = self.catalog.clone();
        catalog.mark_unchanged();
        let mut until = until;
        let mut arrivals = FuturesUnordered::new();
        for source in idle.sources {
            let (topic, queue) = (source.topic.id, source.queue);
            let due = local
                .view
                .next_due_ms(&request.group, topic, queue, idle.looked_ms);
            if let Some(due_ms) = due.map_err(|cause| broken(local, cause))? {
                let wait = Duration::from_millis(due_ms.saturating_sub(now_ms()));
                until = until.min(Instant::now() + wait.max(PAUSE));
            }
            if let Some(leases) = source.leases.filter(|l| l.in_flight < MAX_IN_FLIGHT) {
                arrivals.push(self.arrival(source.group, leases.next, until));
            }
        }
        loop {
            tokio::select! {
                () = sleep_until(until) => return Ok(()),
                _ = changed.changed() => return Ok(()),
                _ = catalog.changed() => return Ok(()),
                Some(()) = arrivals.next(), if !arrivals.is_empty() => return Ok(()),
                () = tokio::time::sleep(LEADERSHIP) => {}
            }
            if !local.group.is_leader() {
                let leader = local.group.leader().filter(|n| *n != self.node_id());
                return Err(PeerError::NotLeader { leader });
            }
        }
    }

    /// Ends when the queue has a message at `next`.
    async fn arrival(&self, group: u64, next: u64, until: Instant) {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let read = ReadRequest {
                group,
                start: StartAt::Offset(next),
                max_messages: 1,
                max_bytes: 1,
                wait_ms: millis(left).max(1),
                proof: Proof::End,
            };
            match self.read(group, &read).await {
                Ok(slice) if !slice.batches.is_empty() => return,
                // Retention was faster: the next look goes on behind it.
                Err(BrokerError::OffsetOutOfRange {
                    earliest_offset, ..
                }) if earliest_offset > next => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(group, %error, "a queue is not waited for");
                    tokio::time::sleep(LEADERSHIP).await;
                }
            }
            if Instant::now() >= until {
                // The waiter has its own clock.
                std::future::pending::<()>().await;
            }
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
