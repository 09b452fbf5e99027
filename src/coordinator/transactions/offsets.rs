//! Offsets as participants of transactions, in the coordinator of their consumer group.
//!
//! A held offset was checked and nobody else moves the group there, so committing it cannot fail.
//! After a rollback a mark stays until no late hold can come any more. After a commit none can come:
//! it was decided when the hold was known to be applied, and what may be applied is never sent again.

use quorate_storage::StorageError;
use quorate_storage::mutation::{self, Mutation};

use super::records::{
    HeldOffset, MARK_TIME_PREFIX, hold_key, hold_prefix, mark_key, mark_time_key, read_hold,
    read_mark_time,
};
use super::{HoldVerdict, OffsetMove, TransactionReply};
use crate::broker::MemberMark;
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::GroupMode;
use crate::coordinator::machine::CoordinatorMachine;
use crate::coordinator::membership::Delivery;
use crate::coordinator::offsets::may_commit;
use crate::coordinator::records::offset_key;
use crate::names::MAX_NAME_CHARS;

/// A hold is refused minutes after its transaction's time
/// for preparing at the latest. The mark outlives that by far, so clocks may differ by minutes.
const MARK_KEPT_MS: u64 = 3_600_000;
/// Old marks that one command removes: more than it makes.
const MARKS_AT_ONCE: usize = 3;
/// Offsets that one transaction may hold in one consumer group.
const MAX_HELD: usize = 10_000;

impl CoordinatorMachine {
    pub(super) fn hold_offsets(
        &mut self,
        id: &TransactionId,
        group: &str,
        offsets: &[OffsetMove],
        member: Option<&MemberMark>,
        until_ms: u64,
    ) -> Result<TransactionReply, StorageError> {
        if group.len() > MAX_NAME_CHARS || offsets.len() > MAX_HELD {
            let text = format!("a consumer group's name or more than {MAX_HELD} offsets of it");
            return Ok(TransactionReply::Invalid(text));
        }
        let over = self.records.get(&mark_key(group, id))?.is_some();
        if over || self.now_ms()? > until_ms {
            return Ok(TransactionReply::HoldTooLate);
        }
        if let Some(other) = self.claim_mode(group, GroupMode::Offsets)? {
            return Ok(TransactionReply::OtherMode(other));
        }
        let membership = self.membership(group)?;
        if membership.delivery == Delivery::Broadcast {
            let text = format!(
                "consumer group {group:?} is a broadcast group: each of its members counts for itself, so its offsets cannot be part of a transaction"
            );
            return Ok(TransactionReply::Invalid(text));
        }
        let each = offsets
            .iter()
            .map(|offset| match may_commit(&membership, member, offset.to) {
                true => self.judge_hold(id, group, offset),
                false => Ok(HoldVerdict::Fenced),
            });
        let verdicts = each.collect::<Result<Vec<_>, StorageError>>()?;
        if verdicts.iter().all(|v| *v == HoldVerdict::Fine) {
            for OffsetMove { to, .. } in offsets {
                let held = HeldOffset {
                    transaction: *id,
                    offset: to.offset,
                };
                let key = hold_key(group, to.topic, to.queue);
                self.records.store(key, &held);
            }
        }
        Ok(TransactionReply::Held(verdicts))
    }

    fn judge_hold(
        &self,
        id: &TransactionId,
        group: &str,
        offset: &OffsetMove,
    ) -> Result<HoldVerdict, StorageError> {
        let OffsetMove { to, from } = *offset;
        let hold = self.hold_on(group, to.topic, to.queue)?;
        if hold.is_some_and(|hold| hold.transaction != *id) {
            return Ok(HoldVerdict::HeldByOther);
        }
        Ok(match self.committed_offset(group, to.topic, to.queue)? {
            Some(committed) if from.is_some_and(|from| from != committed) => {
                HoldVerdict::Moved { committed }
            }
            Some(committed) if to.offset < committed => HoldVerdict::Behind { committed },
            _ => HoldVerdict::Fine,
        })
    }

    fn committed_offset(
        &self,
        group: &str,
        topic: u64,
        queue: u32,
    ) -> Result<Option<u64>, StorageError> {
        let known = self.records.get(&offset_key(group, topic, queue))?;
        Ok(known.and_then(|v| Some(u64::from_be_bytes(v.try_into().ok()?))))
    }

    /// What a transaction holds of a group's offset in a queue: nobody else may move it.
    pub(in crate::coordinator) fn hold_on(
        &self,
        group: &str,
        topic: u64,
        queue: u32,
    ) -> Result<Option<HeldOffset>, StorageError> {
        self.records.read(&hold_key(group, topic, queue))
    }

    pub(super) fn settle_offsets(
        &mut self,
        id: &TransactionId,
        group: &str,
        commit: bool,
    ) -> Result<TransactionReply, StorageError> {
        if group.len() > MAX_NAME_CHARS {
            let text = "the consumer group's name is too long".to_owned();
            return Ok(TransactionReply::Invalid(text));
        }
        let moves = commit && !mutation::on(Mutation::LeaveOffsetsBehind);
        for (key, value) in self.records.scan(&hold_prefix(group), None, usize::MAX)? {
            let held: Option<HeldOffset> = postcard::from_bytes(&value).ok();
            let Some(held) = held.filter(|held| held.transaction == *id) else {
                continue;
            };
            if let Some((topic, queue)) = read_hold(group, &key).filter(|_| moves) {
                // Nothing moved it since it was held; were it so, it would not go back.
                let known = self.committed_offset(group, topic, queue)?;
                let offset = held.offset.max(known.unwrap_or(0)).to_be_bytes();
                self.records
                    .put(offset_key(group, topic, queue), offset.to_vec());
            }
            self.records.remove(key);
        }
        self.forget_marks()?;
        if !commit {
            self.mark_over(id, group)?;
        }
        Ok(TransactionReply::OffsetsSettled)
    }

    /// Of a group that is deleted: transactions no longer hold anything of it. That they are over
    /// here, where they are, stays known. Gives how many offsets were let go, at most `limit`.
    pub(in crate::coordinator) fn let_go_of_offsets(
        &mut self,
        group: &str,
        limit: usize,
    ) -> Result<usize, StorageError> {
        let held = self.records.scan(&hold_prefix(group), None, limit)?;
        let count = held.len();
        held.into_iter()
            .for_each(|(key, _)| self.records.remove(key));
        Ok(count)
    }

    fn forget_marks(&mut self) -> Result<(), StorageError> {
        let now_ms = self.now_ms()?;
        for (key, _) in self.records.scan(MARK_TIME_PREFIX, None, MARKS_AT_ONCE)? {
            match read_mark_time(&key) {
                Some((forget_ms, _)) if forget_ms > now_ms => break,
                Some((_, mark)) => self.records.remove(mark),
                None => {}
            }
            self.records.remove(key);
        }
        Ok(())
    }

    fn mark_over(&mut self, id: &TransactionId, group: &str) -> Result<(), StorageError> {
        let mark = mark_key(group, id);
        if self.records.get(&mark)?.is_none() {
            self.records.put(mark, Vec::new());
            let forget_ms = self.now_ms()?.saturating_add(MARK_KEPT_MS);
            self.records
                .put(mark_time_key(forget_ms, group, id), Vec::new());
        }
        Ok(())
    }
}
