//! The first half: participants are recorded, then prepared. A begin that fails rolls all back; an
//! extension that fails leaves the transaction as it was, without its own messages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::{join, join_all};

use super::end::Telling;
use super::{BeginTransaction, TransactionMessage, TransactionOffset, ended, unexpected};
use crate::broker::encode::encode;
use crate::broker::offsets::check_group_name;
use crate::broker::queue::BatchOutcome;
use crate::broker::queue::entry::TransactionId;
use crate::broker::route::{NO_LEADER, UNKNOWN};
use crate::broker::{
    Broker, BrokerError, BrokerResult, MemberMark, OffsetCommit, Outcome, ProduceRequest,
};
use crate::catalog::Topic;
use crate::coordinator::transactions::{
    Decision, HoldVerdict, MAX_MESSAGES, NewTransaction, OffsetMove, Part, PreparedParts,
    Transaction, TransactionCommand, TransactionReply, new_transaction_id,
};
use crate::coordinator::{CoordinatorCommand, CoordinatorReply, owner_of_name};
use crate::peer::{NewBatch, NewHold};

/// A hold of offsets is refused so much later than the time for preparing, by another
/// coordinator's clock.
const HOLD_SLACK_MS: u64 = 600_000;
/// From its begin on, a transaction that nobody ends is over after this time at the latest.
const MAX_LIFE_MS: u64 = 7 * 24 * 3_600_000;

/// One batch on its way into its queue.
pub(super) struct Prepare {
    topic: Arc<Topic>,
    pub part: Part,
    batch: NewBatch,
}

/// A consumer group's offsets on their way into its coordinator.
pub(super) struct Offsets {
    pub group: String,
    asked: Vec<TransactionOffset>,
    offsets: Vec<OffsetMove>,
    member: Option<MemberMark>,
}

impl Broker {
    /// Records a transaction and prepares all it begins with. When this returns it is open.
    pub async fn begin_transaction(
        self: &Arc<Self>,
        request: BeginTransaction,
    ) -> BrokerResult<Transaction> {
        self.check_begin(&request)?;
        let offsets = self.check_offsets(request.offsets).await?;
        let batches = self.encode_messages(request.messages).await?;
        let coordinators = self.catalog().coordinators.len();
        let coordinator = owner_of_name(&request.producer_group, coordinators);
        let id = new_transaction_id(coordinator, rand::random()).ok_or(NO_LEADER)?;
        let new = NewTransaction {
            producer_group: request.producer_group,
            timing: request.timing,
            check_url: request.check_url,
            parts: batches.iter().map(|b| b.part.clone()).collect(),
            offset_groups: offsets.iter().map(|o| o.group.clone()).collect(),
            prepare_ms: self.prepare_ms(),
        };
        let command = TransactionCommand::Begin { id, new };
        self.record_and_prepare(&id, command, batches, offsets)
            .await
    }

    /// Adds messages to an open transaction.
    pub async fn extend_transaction(
        self: &Arc<Self>,
        id: &TransactionId,
        messages: Vec<TransactionMessage>,
    ) -> BrokerResult<Transaction> {
        let batches = self.encode_messages(messages).await?;
        let parts = batches.iter().map(|b| b.part.clone()).collect();
        let command = TransactionCommand::Extend {
            id: *id,
            parts,
            prepare_ms: self.prepare_ms(),
        };
        self.record_and_prepare(id, command, batches, Vec::new())
            .await
    }

    fn prepare_ms(&self) -> u64 {
        self.config.transaction_prepare.as_millis() as u64
    }

    fn check_begin(&self, request: &BeginTransaction) -> BrokerResult<()> {
        if !crate::names::is_valid_name(&request.producer_group) {
            return Err(BrokerError::InvalidName(format!(
                "producer group {:?} is not valid: a name has {}",
                request.producer_group,
                crate::names::NAME_RULE
            )));
        }
        let timing = request.timing;
        let checks_ms = timing
            .check_interval_ms
            .saturating_mul(timing.max_checks.into());
        if timing.timeout_ms.saturating_add(checks_ms) > MAX_LIFE_MS {
            return Err(BrokerError::InvalidRequest(format!(
                "timeout_ms + max_checks * check_interval_ms must be at most {MAX_LIFE_MS} (7 days): the messages take space until the end"
            )));
        }
        if let Some(url) = &request.check_url {
            let checked = self.config.webhooks.check(url);
            checked.map_err(BrokerError::InvalidRequest)?;
        }
        Ok(())
    }

    /// One batch for each queue the messages go to.
    pub(super) async fn encode_messages(
        &self,
        messages: Vec<TransactionMessage>,
    ) -> BrokerResult<Vec<Prepare>> {
        if messages.len() > MAX_MESSAGES as usize {
            let text = format!("a transaction has at most {MAX_MESSAGES} messages");
            return Err(BrokerError::InvalidRequest(text));
        }
        let mut by_topic: BTreeMap<String, Vec<(u32, _)>> = BTreeMap::new();
        for (number, TransactionMessage { topic, message }) in (0u32..).zip(messages) {
            by_topic.entry(topic).or_default().push((number, message));
        }
        let mut prepares = Vec::new();
        for (name, numbered) in by_topic {
            let topic = self.find_topic(&name).await?;
            let (numbers, messages): (Vec<u32>, Vec<_>) = numbered.into_iter().unzip();
            let count = messages.len() as u32;
            let turn = self.round_robin.fetch_add(count, Ordering::Relaxed);
            let request = ProduceRequest {
                topic: name,
                messages,
                producer: None,
                idempotency_key: None,
            };
            let max_bytes = self.config.max_batch_bytes;
            for part in encode(&topic, &request, None, turn, max_bytes)? {
                let batch = part.batch?;
                let queue = topic.queues.get(part.queue as usize);
                let queue = queue.ok_or_else(|| BrokerError::QueueNotFound {
                    topic: topic.name.clone(),
                    queue: part.queue,
                    queues: topic.config.queues,
                })?;
                let places = part.places.iter();
                prepares.push(Prepare {
                    part: Part {
                        topic: topic.name.clone(),
                        queue: part.queue,
                        queue_group: queue.group,
                        messages: places.filter_map(|p| numbers.get(*p).copied()).collect(),
                        bytes: batch.batch.len() as u64,
                    },
                    topic: topic.clone(),
                    batch,
                });
            }
        }
        Ok(prepares)
    }

    /// Looks at what can be looked at before anything is recorded, and sorts by consumer group.
    pub(super) async fn check_offsets(
        &self,
        asked: Vec<TransactionOffset>,
    ) -> BrokerResult<Vec<Offsets>> {
        let mut groups: Vec<Offsets> = Vec::new();
        for offset in asked {
            check_group_name(&offset.group)?;
            let commit = OffsetCommit {
                topic: offset.topic.clone(),
                queue: offset.queue,
                offset: offset.offset,
            };
            let checked = self.check_commit(&commit).await?;
            let place = match groups.iter().position(|g| g.group == offset.group) {
                Some(place) => place,
                None => {
                    groups.push(Offsets {
                        group: offset.group.clone(),
                        asked: Vec::new(),
                        offsets: Vec::new(),
                        member: offset.member.clone(),
                    });
                    groups.len() - 1
                }
            };
            let group = &mut groups[place];
            let twice = |o: &OffsetMove| (o.to.topic, o.to.queue) == (checked.topic, checked.queue);
            if group.offsets.iter().any(twice) {
                return Err(BrokerError::InvalidRequest(format!(
                    "offsets names queue {} of topic {:?} twice for consumer group {:?}",
                    offset.queue, offset.topic, offset.group
                )));
            }
            if group.member != offset.member {
                return Err(BrokerError::InvalidRequest(format!(
                    "the offsets of consumer group {:?} must all name the same member",
                    offset.group
                )));
            }
            group.offsets.push(OffsetMove {
                to: checked,
                from: offset.from,
            });
            group.asked.push(offset);
        }
        Ok(groups)
    }

    async fn record_and_prepare(
        self: &Arc<Self>,
        id: &TransactionId,
        command: TransactionCommand,
        batches: Vec<Prepare>,
        offsets: Vec<Offsets>,
    ) -> BrokerResult<Transaction> {
        let is_begin = matches!(command, TransactionCommand::Begin { .. });
        let (first, prepare_by_ms) = match self.transact(id, command).await {
            Ok(TransactionReply::Recorded {
                first_part,
                prepare_by_ms,
            }) => (first_part, prepare_by_ms),
            Ok(TransactionReply::Ended(transaction)) => return Err(ended(&transaction)),
            Ok(TransactionReply::NotFound) => return Err(super::not_found(id)),
            Ok(TransactionReply::NotPrepared) => return Err(super::end::busy(id)),
            Ok(other) => return Err(unexpected(&other)),
            // Recorded or not, nothing was prepared: in time the coordinator gives it up.
            Err(BrokerError::Timeout { .. } | BrokerError::AnswerLost) => return Err(NO_LEADER),
            Err(error) => return Err(error),
        };
        let parts = PreparedParts {
            first,
            count: batches.len() as u32,
            offsets: !offsets.is_empty(),
        };
        let numbered = (first..).zip(batches);
        let stored = numbered.map(|(number, prepare)| self.prepare_part(id, number, prepare));
        let until_ms = prepare_by_ms.saturating_add(HOLD_SLACK_MS);
        let held = offsets
            .into_iter()
            .map(|offsets| self.hold_offsets(id, offsets, until_ms));
        let (stored, held) = join(join_all(stored), join_all(held)).await;
        let error = match stored.into_iter().chain(held).find_map(Result::err) {
            // What was not said to be prepared is never committed.
            Some(error) => certain(error),
            None => {
                let command = TransactionCommand::Prepared { id: *id, parts };
                match self.transact(id, command).await {
                    Ok(TransactionReply::Is(transaction)) => return Ok(*transaction),
                    Ok(TransactionReply::Ended(transaction)) => return Err(ended(&transaction)),
                    Ok(TransactionReply::GivenUp) => return Err(LATE),
                    Ok(other) => unexpected(&other),
                    Err(error) => error,
                }
            }
        };
        Err(match is_begin {
            true => self.abandon(id, error).await,
            false => self.give_up(id, parts, error).await,
        })
    }

    pub(super) async fn prepare_part(
        &self,
        id: &TransactionId,
        number: u32,
        prepare: Prepare,
    ) -> BrokerResult<()> {
        let Prepare {
            topic,
            part,
            mut batch,
        } = prepare;
        batch.hold = Some(NewHold::Transaction {
            id: *id,
            part: number,
        });
        let outcomes = self.store(&topic, part.queue, vec![batch], &[None]).await?;
        match outcomes.into_iter().next() {
            Some(BatchOutcome::Held { .. } | BatchOutcome::Duplicate(_)) => Ok(()),
            Some(BatchOutcome::TransactionEnded) => Err(BrokerError::TransactionEnded {
                id: super::transaction_text(id),
                state: "rolled_back".to_owned(),
            }),
            Some(other) => Err(refused(part.queue_group, part.queue, other)),
            None => Err(UNKNOWN),
        }
    }

    pub(super) async fn hold_offsets(
        &self,
        id: &TransactionId,
        offsets: Offsets,
        until_ms: u64,
    ) -> BrokerResult<()> {
        let group = offsets.group;
        let coordinator = owner_of_name(&group, self.catalog().coordinators.len());
        let command = TransactionCommand::HoldOffsets {
            id: *id,
            group: group.clone(),
            offsets: offsets.offsets,
            member: offsets.member.clone(),
            until_ms,
        };
        let command = CoordinatorCommand::Transaction(command);
        let verdicts = match self.coordinate(coordinator, &command).await? {
            CoordinatorReply::Transaction(TransactionReply::Held(verdicts)) => verdicts,
            CoordinatorReply::Transaction(TransactionReply::HoldTooLate) => {
                return Err(BrokerError::TransactionEnded {
                    id: super::transaction_text(id),
                    state: "rolled_back".to_owned(),
                });
            }
            CoordinatorReply::Transaction(TransactionReply::OtherMode(_)) => {
                return Err(BrokerError::GroupModeConflict {
                    group,
                    leased: true,
                });
            }
            CoordinatorReply::Transaction(TransactionReply::Invalid(text))
            | CoordinatorReply::Invalid(text) => return Err(BrokerError::InvalidRequest(text)),
            other => return Err(crate::broker::producers::unexpected(&other)),
        };
        for (verdict, asked) in verdicts.into_iter().zip(offsets.asked) {
            match verdict {
                HoldVerdict::Fine => {}
                HoldVerdict::Moved { committed } => {
                    return Err(BrokerError::OffsetMoved {
                        from: asked.from.unwrap_or(0),
                        committed,
                    });
                }
                HoldVerdict::Behind { committed } => {
                    return Err(BrokerError::OffsetConflict {
                        offset: asked.offset,
                        committed,
                    });
                }
                HoldVerdict::Fenced => {
                    return Err(match offsets.member {
                        Some(member) => BrokerError::FencedMember {
                            group,
                            member: member.id,
                        },
                        None => BrokerError::NotAMember { group },
                    });
                }
                HoldVerdict::HeldByOther => {
                    return Err(BrokerError::OffsetHeld {
                        group,
                        topic: asked.topic,
                        queue: asked.queue,
                    });
                }
            }
        }
        Ok(())
    }

    /// Leaves out what could not be added, and gives the error to answer.
    async fn give_up(
        &self,
        id: &TransactionId,
        parts: PreparedParts,
        error: BrokerError,
    ) -> BrokerError {
        let PreparedParts { first, count, .. } = parts;
        let command = TransactionCommand::GiveUp {
            id: *id,
            first,
            count,
        };
        match self.transact(id, command).await {
            Ok(TransactionReply::Is(_)) => certain(error),
            // A commit may have them, if the coordinator knows that they are prepared.
            Ok(TransactionReply::Ended(transaction))
                if error.outcome() == Outcome::NotCommitted
                    || transaction.decision.is_some_and(|d| !d.is_commit()) =>
            {
                ended(&transaction)
            }
            // In time the coordinator leaves them out, unless it knows that.
            _ => error,
        }
    }

    /// Rolls back what could not be prepared, and gives the error to answer.
    async fn abandon(self: &Arc<Self>, id: &TransactionId, error: BrokerError) -> BrokerError {
        let command = TransactionCommand::Decide {
            id: *id,
            decision: Decision::Rollback,
        };
        match self.transact(id, command).await {
            Ok(TransactionReply::Is(transaction) | TransactionReply::Ended(transaction))
                if transaction.decision.is_some_and(|d| !d.is_commit()) =>
            {
                let broker = self.clone();
                tokio::spawn(async move {
                    broker
                        .settle_transaction(&transaction, Telling::Reachable)
                        .await
                });
                certain(error)
            }
            // What was prepared in time could still be committed by someone else who has the id.
            _ => error,
        }
    }
}

/// It was not done in time, and never will be.
const LATE: BrokerError = BrokerError::Timeout {
    outcome: Outcome::NotCommitted,
};

/// After the rollback nothing of the transaction will ever be seen, and of what was given up neither.
fn certain(error: BrokerError) -> BrokerError {
    match error {
        BrokerError::Timeout { .. } | BrokerError::AnswerLost => LATE,
        other => other,
    }
}

fn refused(group: u64, queue: u32, outcome: BatchOutcome) -> BrokerError {
    let explained = crate::broker::produce::explain(group, queue, outcome, 1, None);
    let error = explained.into_iter().find_map(Result::err);
    error.unwrap_or_else(|| {
        BrokerError::Internal("a part of a transaction was stored without being held".to_owned())
    })
}
