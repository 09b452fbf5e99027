//! Commands of leases, executed: granting here, what comes after in `settle`.

use quorate_storage::StorageError;
use quorate_storage::mutation::{self, Mutation};
use xxhash_rust::xxh3::xxh3_64;

use super::command::{DeathReason, Grant, Granted, Lease, LeaseCommand, LeaseReply, Pick};
use super::records::{Delivery, DeliveryState, LeaseGroup, Place, QueueLeases};
use super::{MAX_IN_FLIGHT, ReceiptVerdict, RetryPolicy};
use crate::coordinator::command::{CoordinatorReply, GroupMode};
use crate::coordinator::machine::CoordinatorMachine;
use crate::names::MAX_NAME_CHARS;

/// What one command grants, all of it the same way.
struct Granting<'a> {
    lease: &'a Lease,
    now_ms: u64,
    until_ms: u64,
    left: u32,
    granted: Granted,
}

impl CoordinatorMachine {
    pub(in crate::coordinator) fn leases(
        &mut self,
        group: &str,
        command: LeaseCommand,
    ) -> Result<CoordinatorReply, StorageError> {
        if group.len() > MAX_NAME_CHARS {
            let text = "the consumer group's name is too long".to_owned();
            return Ok(CoordinatorReply::Invalid(text));
        }
        let founds = matches!(
            command,
            LeaseCommand::Lease(_) | LeaseCommand::SetPolicy(_) | LeaseCommand::Seek { .. }
        );
        let other = match founds {
            true => self.claim_mode(group, GroupMode::Leases)?,
            false => self.mode_of(group)?.filter(|m| *m != GroupMode::Leases),
        };
        if let Some(other) = other {
            return Ok(CoordinatorReply::OtherMode(other));
        }
        let known = self.lease_group(group)?;
        let mut state = match known.clone() {
            Some(state) => state,
            None if founds => self.found_group(group, &command)?,
            None => {
                let receipts = match &command {
                    LeaseCommand::Ack { receipts, through } => {
                        receipts.len() + usize::from(through.is_some())
                    }
                    LeaseCommand::Nack { receipts, .. } | LeaseCommand::Extend { receipts, .. } => {
                        receipts.len()
                    }
                    _ => return Ok(CoordinatorReply::Leases(LeaseReply::NoGroup)),
                };
                let verdicts = vec![ReceiptVerdict::Ended; receipts];
                return Ok(CoordinatorReply::Leases(LeaseReply::Receipts(verdicts)));
            }
        };
        self.news.about(group);
        let reply = match command {
            LeaseCommand::Lease(lease) => {
                LeaseReply::Granted(self.grant(group, &lease, &mut state)?)
            }
            LeaseCommand::Ack { receipts, through } => {
                LeaseReply::Receipts(self.ack(group, &receipts, through.as_ref())?)
            }
            LeaseCommand::Nack { receipts, delay_ms } => {
                LeaseReply::Receipts(self.nack(group, &receipts, delay_ms, &mut state)?)
            }
            LeaseCommand::Extend { receipts, lease_ms } => {
                LeaseReply::Receipts(self.extend(group, &receipts, lease_ms)?)
            }
            LeaseCommand::Expire => self.expire(group, &mut state)?,
            // Said of an earlier group of this name.
            LeaseCommand::DeadLettered { life, .. } | LeaseCommand::Redriven { life, .. }
                if life != state.life =>
            {
                LeaseReply::Done
            }
            LeaseCommand::DeadLettered { through, .. } => self.dead_lettered(group, through)?,
            LeaseCommand::SetPolicy(policy) => {
                state.policy = policy;
                LeaseReply::Done
            }
            LeaseCommand::Redriven { topic, next, .. } => {
                state.redriven = Some((topic, next));
                LeaseReply::Done
            }
            LeaseCommand::Seek { offsets } => self.seek(group, &offsets)?,
            LeaseCommand::ForgetTopic { topic } => self.forget_topic(group, topic)?,
        };
        if known.as_ref() != Some(&state) {
            self.store_lease_group(group, &state);
        }
        Ok(CoordinatorReply::Leases(reply))
    }

    fn found_group(&self, group: &str, command: &LeaseCommand) -> Result<LeaseGroup, StorageError> {
        let life = match command {
            LeaseCommand::Lease(lease) => lease.token,
            // The log's time may stand still between two lives of one name; its places don't repeat.
            _ => {
                let made = (group, self.now_ms()?, self.log_index);
                // Plain data into memory: there is no way to fail.
                xxh3_64(&postcard::to_stdvec(&made).unwrap_or_default())
            }
        };
        Ok(LeaseGroup {
            life,
            policy: RetryPolicy::default(),
            next_dead: 0,
            redriven: None,
        })
    }

    fn grant(
        &mut self,
        group: &str,
        lease: &Lease,
        state: &mut LeaseGroup,
    ) -> Result<Granted, StorageError> {
        let now_ms = self.now_ms()?;
        let mut granting = Granting {
            lease,
            now_ms,
            until_ms: now_ms.saturating_add(lease.lease_ms).max(1),
            left: lease.max,
            granted: Granted::default(),
        };
        for pick in &lease.picks {
            let place = Place {
                group,
                topic: pick.topic,
                queue: pick.queue,
            };
            let known = self.queue_leases(&place)?;
            let mut queue = known.unwrap_or(QueueLeases {
                next: pick.from,
                in_flight: 0,
            });
            self.drop_gone(&place, pick, now_ms, &mut queue)?;
            for offset in &pick.again {
                self.grant_again(&place, *offset, &mut granting, state)?;
            }
            if queue.next == pick.from {
                self.grant_fresh(&place, pick, &mut granting, &mut queue)?;
            } else {
                granting.granted.moved = true;
            }
            self.settle_queue(&place, &queue)?;
        }
        Ok(granting.granted)
    }

    fn drop_gone(
        &mut self,
        place: &Place<'_>,
        pick: &Pick,
        now_ms: u64,
        queue: &mut QueueLeases,
    ) -> Result<(), StorageError> {
        for offset in &pick.gone {
            if let Some(delivery) = self.delivery(place, *offset)?
                && delivery.due_ms().is_some_and(|due_ms| due_ms <= now_ms)
            {
                self.remove_delivery(place, *offset, &delivery, queue)?;
            }
        }
        Ok(())
    }

    /// Leases a message again, if it still may be.
    fn grant_again(
        &mut self,
        place: &Place<'_>,
        offset: u64,
        granting: &mut Granting<'_>,
        state: &mut LeaseGroup,
    ) -> Result<(), StorageError> {
        let Some(delivery) = self.delivery(place, offset)? else {
            return Ok(());
        };
        let is_due = delivery
            .due_ms()
            .is_some_and(|due_ms| due_ms <= granting.now_ms);
        if !is_due && !mutation::on(Mutation::LeaseTwice) {
            return Ok(());
        }
        if delivery.deliveries >= state.policy.max_deliveries {
            let reason = match delivery.state {
                DeliveryState::Waiting { .. } => DeathReason::Nacked,
                _ => DeathReason::LeaseExpired,
            };
            return self.bury(place, offset, &delivery, reason, state);
        }
        // Where unordered consumers took part, a later message of the key may be free first.
        if granting.lease.ordered
            && delivery.key != 0
            && self.first_of_key(place, delivery.key)? != Some(offset)
        {
            let parked = Delivery {
                state: DeliveryState::Parked,
                ..delivery
            };
            self.put_delivery(place, offset, Some(&delivery), parked);
            return Ok(());
        }
        if granting.left > 0 {
            let leased = granting.lease_of(place, offset, delivery.deliveries, delivery.key);
            self.put_delivery(place, offset, Some(&delivery), leased);
        }
        Ok(())
    }

    /// Takes what the cursor goes past, as far as there is room in flight.
    fn grant_fresh(
        &mut self,
        place: &Place<'_>,
        pick: &Pick,
        granting: &mut Granting<'_>,
        queue: &mut QueueLeases,
    ) -> Result<(), StorageError> {
        let mut next = pick.through.max(pick.from);
        for (offset, key) in &pick.fresh {
            if !(queue.next..next).contains(offset) {
                continue;
            }
            if queue.in_flight >= MAX_IN_FLIGHT {
                next = *offset;
                break;
            }
            let key = if granting.lease.ordered { *key } else { 0 };
            let waits = key != 0 && self.first_of_key(place, key)?.is_some();
            let delivery = if waits && !mutation::on(Mutation::IgnoreEarlierOfKey) {
                unleased(DeliveryState::Parked, key)
            } else if granting.left > 0 {
                granting.lease_of(place, *offset, 0, key)
            } else {
                unleased(DeliveryState::Free, key)
            };
            self.add_delivery(place, *offset, delivery, queue);
        }
        queue.next = next;
        Ok(())
    }
}

fn unleased(state: DeliveryState, key: u64) -> Delivery {
    Delivery {
        state,
        deliveries: 0,
        key,
        token: 0,
        consumer: 0,
    }
}

impl Granting<'_> {
    /// Notes one grant, and gives the delivery as it is now.
    fn lease_of(&mut self, place: &Place<'_>, offset: u64, before: u32, key: u64) -> Delivery {
        self.left -= 1;
        let deliveries = before.saturating_add(1);
        self.granted.leases.push(Grant {
            topic: place.topic,
            queue: place.queue,
            offset,
            deliveries,
        });
        Delivery {
            state: DeliveryState::Leased {
                until_ms: self.until_ms,
            },
            deliveries,
            key,
            token: self.lease.token,
            consumer: self.lease.consumer,
        }
    }
}
