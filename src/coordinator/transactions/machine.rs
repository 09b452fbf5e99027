//! The life of a transaction, decided here, in apply, by the log's time.
//!
//! Invariants: the decision never changes once it is recorded; a commit is recorded only when all
//! recorded participants are prepared, or are parts that were given up; participants are recorded,
//! and parts given up, only before the decision. Once a transaction was told to be open, nothing but
//! a decision that somebody asked for, or its expiry, ends it.

use quorate_storage::StorageError;
use quorate_storage::mutation::{self, Mutation};

use super::records::{
    COUNTS_KEY, ENDED_PREFIX, count_key, due_key, ended_key, listed_key, read_timed,
    transaction_key,
};
use super::{
    Decision, KEPT_MS, MAX_BYTES, MAX_ENDED, MAX_MESSAGES, MAX_OFFSET_GROUPS, MAX_OPEN,
    MAX_OPEN_PER_GROUP, NewTransaction, OffsetsRecord, Part, PartRecord, PartState, PreparedParts,
    Transaction, TransactionCommand, TransactionCounts, TransactionReply, TransactionState,
};
use crate::broker::queue::Place;
use crate::broker::queue::entry::TransactionId;
use crate::coordinator::machine::CoordinatorMachine;
use crate::names::MAX_NAME_CHARS;

/// Ended transactions that one command forgets.
const FORGET_AT_ONCE: usize = 100;
const MAX_URL_BYTES: usize = 2_048;

type Answer = Result<TransactionReply, StorageError>;

impl CoordinatorMachine {
    pub(in crate::coordinator) fn transact(&mut self, command: TransactionCommand) -> Answer {
        match command {
            TransactionCommand::Begin { id, new } => self.begin_transaction(id, new),
            TransactionCommand::Extend {
                id,
                parts,
                prepare_ms,
            } => self.change_transaction(&id, |found, now_ms| {
                extend(found, parts, now_ms.saturating_add(prepare_ms))
            }),
            TransactionCommand::Prepared { id, parts } => {
                self.change_transaction(&id, |found, now_ms| prepared(found, parts, now_ms))
            }
            TransactionCommand::GiveUp { id, first, count } => {
                self.change_transaction(&id, |found, _| give_up(found, first, count))
            }
            TransactionCommand::Decide { id, decision } => {
                self.change_transaction(&id, |found, now_ms| decide(found, decision, now_ms))
            }
            TransactionCommand::Due { id } => self.change_transaction(&id, due),
            TransactionCommand::Settled {
                id,
                queues,
                offset_groups,
            } => self.change_transaction(&id, |found, now_ms| {
                settled(found, &queues, &offset_groups, now_ms)
            }),
            TransactionCommand::Forget => self.forget_transactions(),
            TransactionCommand::HoldOffsets {
                id,
                group,
                offsets,
                member,
                until_ms,
            } => self.hold_offsets(&id, &group, &offsets, member.as_ref(), until_ms),
            TransactionCommand::SettleOffsets { id, group, commit } => {
                self.settle_offsets(&id, &group, commit)
            }
        }
    }

    fn begin_transaction(&mut self, id: TransactionId, new: NewTransaction) -> Answer {
        let key = transaction_key(&id);
        if self.records.get(&key)?.is_some() {
            return Ok(TransactionReply::Invalid(
                "a transaction with this id exists".to_owned(),
            ));
        }
        let long = |name: &String| name.len() > MAX_NAME_CHARS;
        let url_bytes = new.check_url.as_ref().map_or(0, String::len);
        if long(&new.producer_group) || new.offset_groups.iter().any(long) {
            return Ok(TransactionReply::Invalid("a name is too long".to_owned()));
        }
        if url_bytes > MAX_URL_BYTES || new.offset_groups.len() > MAX_OFFSET_GROUPS {
            let text = format!(
                "a transaction has a check_url of at most {MAX_URL_BYTES} bytes and offsets of at most {MAX_OFFSET_GROUPS} consumer groups"
            );
            return Ok(TransactionReply::Invalid(text));
        }
        let of_group = self.transactions_of(&new.producer_group)?;
        let counts = self.transaction_counts()?;
        if of_group >= MAX_OPEN_PER_GROUP.into() || counts.open + counts.settling >= MAX_OPEN {
            return Ok(TransactionReply::TooMany(format!(
                "{of_group} transactions of producer group {:?} wait to be committed or rolled back, or for a queue to apply it; end some of them first",
                new.producer_group
            )));
        }
        let now_ms = self.now_ms()?;
        let mut transaction = Transaction {
            id,
            producer_group: new.producer_group,
            timing: new.timing,
            check_url: new.check_url,
            created_ms: now_ms,
            parts: Vec::new(),
            recorded: 0,
            bytes: 0,
            offsets: new
                .offset_groups
                .into_iter()
                .map(|group| OffsetsRecord {
                    group,
                    prepared: false,
                    settled: false,
                })
                .collect(),
            settled_queues: Default::default(),
            opened: false,
            prepare_by_ms: None,
            checks: 0,
            next_check_ms: now_ms.saturating_add(new.timing.timeout_ms),
            decision: None,
            decided_ms: 0,
            done_ms: None,
        };
        let prepare_by_ms = now_ms.saturating_add(new.prepare_ms);
        let reply = match add_parts(&mut transaction, new.parts, prepare_by_ms) {
            Ok(reply) => reply,
            Err(refused) => return Ok(refused),
        };
        settle_preparation(&mut transaction);
        self.keep_transaction(None, &transaction)?;
        Ok(reply)
    }

    /// Changes a transaction by one of the functions below.
    fn change_transaction(
        &mut self,
        id: &TransactionId,
        change: impl FnOnce(&mut Transaction, u64) -> TransactionReply,
    ) -> Answer {
        let Some(before) = self.records.read::<Transaction>(&transaction_key(id))? else {
            return Ok(TransactionReply::NotFound);
        };
        let mut after = before.clone();
        let reply = change(&mut after, self.now_ms()?);
        if after != before {
            self.keep_transaction(Some(&before), &after)?;
        }
        Ok(reply)
    }

    /// Stores a transaction with all that says where to find it.
    fn keep_transaction(
        &mut self,
        before: Option<&Transaction>,
        after: &Transaction,
    ) -> Result<(), StorageError> {
        let id = &after.id;
        let (old_due, due) = (before.and_then(due_key), due_key(after));
        if old_due != due {
            old_due.into_iter().for_each(|key| self.records.remove(key));
            due.into_iter()
                .for_each(|key| self.records.put(key, Vec::new()));
        }
        let old_listed = before.map(listed_key);
        let listed = listed_key(after);
        if old_listed.as_ref() != Some(&listed) {
            old_listed
                .into_iter()
                .for_each(|key| self.records.remove(key));
            self.records.put(listed, Vec::new());
        }
        self.records.store(transaction_key(id), after);
        self.count_transaction(before.map(Transaction::state), after)
    }

    fn count_transaction(
        &mut self,
        before: Option<TransactionState>,
        after: &Transaction,
    ) -> Result<(), StorageError> {
        use TransactionState as S;
        let is_open = |s: S| matches!(s, S::Preparing | S::Open | S::NeedsCheck);
        let state = after.state();
        let was_open = before.is_some_and(is_open);
        let mut counts = self.transaction_counts()?;
        let known = counts;
        let (was_settling, is_settling) = (
            before.is_some() && !was_open,
            after.decision.is_some() && after.done_ms.is_none(),
        );
        counts.open = moved(counts.open, was_open, is_open(state));
        counts.settling = moved(counts.settling, was_settling, is_settling);
        let (was_there, is_there) = (before.is_some(), after.done_ms.is_none());
        if was_there != is_there {
            let of_group = self.transactions_of(&after.producer_group)?;
            let key = count_key(&after.producer_group);
            match moved(of_group, was_there, is_there) {
                0 => self.records.remove(key),
                of_group => self.records.store(key, &of_group),
            }
        }
        if was_open {
            match after.decision {
                Some(Decision::Commit) => counts.committed += 1,
                Some(Decision::Rollback) => counts.rolled_back += 1,
                Some(Decision::Expire) => counts.expired += 1,
                None => {}
            }
        }
        // Done happens once: nothing changes a transaction after it.
        if let Some(done_ms) = after.done_ms {
            self.records.put(ended_key(done_ms, &after.id), Vec::new());
            counts.ended += 1;
            while counts.ended > MAX_ENDED {
                let Some((_, oldest)) = self.oldest_ended_transactions(1)?.pop() else {
                    break;
                };
                self.forget_transaction(&oldest)?;
                counts.ended -= 1;
            }
        }
        if counts != known {
            self.records.store(COUNTS_KEY.to_vec(), &counts);
        }
        Ok(())
    }

    fn transaction_counts(&self) -> Result<TransactionCounts, StorageError> {
        Ok(self.records.read(COUNTS_KEY)?.unwrap_or_default())
    }

    /// How many of a producer group are not over.
    fn transactions_of(&self, producer_group: &str) -> Result<u64, StorageError> {
        let found = self.records.read(&count_key(producer_group))?;
        Ok(found.unwrap_or(0))
    }

    fn oldest_ended_transactions(
        &self,
        limit: usize,
    ) -> Result<Vec<(u64, TransactionId)>, StorageError> {
        let found = self.records.scan(ENDED_PREFIX, None, limit)?;
        let read = found.iter().filter_map(|(key, _)| read_timed(key));
        Ok(read.collect())
    }

    fn forget_transaction(&mut self, id: &TransactionId) -> Result<(), StorageError> {
        let key = transaction_key(id);
        if let Some(transaction) = self.records.read::<Transaction>(&key)? {
            self.records.remove(listed_key(&transaction));
            if let Some(done_ms) = transaction.done_ms {
                self.records.remove(ended_key(done_ms, id));
            }
        }
        self.records.remove(key);
        Ok(())
    }

    fn forget_transactions(&mut self) -> Answer {
        let now_ms = self.now_ms()?;
        let old = self.oldest_ended_transactions(FORGET_AT_ONCE)?;
        let mut old = old
            .into_iter()
            .take_while(|(done_ms, _)| done_ms.saturating_add(KEPT_MS) <= now_ms);
        let mut forgotten = 0;
        for (_, id) in &mut old {
            self.forget_transaction(&id)?;
            forgotten += 1;
        }
        if forgotten > 0 {
            let mut counts = self.transaction_counts()?;
            counts.ended = counts.ended.saturating_sub(forgotten);
            self.records.store(COUNTS_KEY.to_vec(), &counts);
        }
        Ok(TransactionReply::Forgot {
            more: forgotten == FORGET_AT_ONCE as u64,
        })
    }
}

/// A count after one more, or one less, counts.
fn moved(count: u64, counted: bool, counts: bool) -> u64 {
    match (counted, counts) {
        (true, false) => count.saturating_sub(1),
        (false, true) => count.saturating_add(1),
        _ => count,
    }
}

fn now_is(transaction: &Transaction) -> TransactionReply {
    TransactionReply::Is(Box::new(transaction.clone()))
}

fn ended(transaction: &Transaction) -> TransactionReply {
    TransactionReply::Ended(Box::new(transaction.clone()))
}

/// Records participants. All of them, or none and why.
fn add_parts(
    transaction: &mut Transaction,
    parts: Vec<Part>,
    prepare_by_ms: u64,
) -> Result<TransactionReply, TransactionReply> {
    let count: usize = parts.iter().map(|p| p.messages.len()).sum();
    let bytes = parts
        .iter()
        .fold(0u64, |sum, p| sum.saturating_add(p.bytes));
    let sound = |p: &Part| {
        let in_order = |number: &u32| (*number as usize) < count;
        p.topic.len() <= MAX_NAME_CHARS && !p.messages.is_empty() && p.messages.iter().all(in_order)
    };
    if !parts.iter().all(sound) {
        let text = "a part's messages or its topic are not sound".to_owned();
        return Err(TransactionReply::Invalid(text));
    }
    let room = MAX_MESSAGES.saturating_sub(transaction.recorded) as usize;
    if count > room || transaction.bytes.saturating_add(bytes) > MAX_BYTES {
        return Err(TransactionReply::Invalid(format!(
            "a transaction takes at most {MAX_MESSAGES} messages and {MAX_BYTES} bytes of them; it would have {} with {}",
            count + transaction.recorded as usize,
            transaction.bytes.saturating_add(bytes),
        )));
    }
    // Each part has a message, so there are no more parts than messages.
    let first_part = transaction.parts.len() as u32;
    let first_message = transaction.recorded;
    transaction.recorded += count as u32;
    transaction.bytes += bytes;
    transaction.parts.extend(parts.into_iter().map(|mut part| {
        part.messages.iter_mut().for_each(|n| *n += first_message);
        PartRecord {
            part,
            state: PartState::Recorded,
            prepare_by_ms,
            place: None,
        }
    }));
    transaction.prepare_by_ms = Some(prepare_by_ms);
    Ok(TransactionReply::Recorded {
        first_part,
        prepare_by_ms,
    })
}

fn is_waited_for(part: &PartRecord) -> bool {
    part.state == PartState::Recorded
}

/// After participants were recorded, prepared or given up: is there still something to wait for?
fn settle_preparation(transaction: &mut Transaction) {
    if transaction.is_prepared() {
        transaction.prepare_by_ms = None;
        transaction.opened = true;
    } else if transaction.opened {
        // Each request has its own time: one that nobody goes on with does not wait for others.
        let waiting = transaction.parts.iter().filter(|p| is_waited_for(p));
        transaction.prepare_by_ms = waiting.map(|p| p.prepare_by_ms).min();
    }
}

fn extend(transaction: &mut Transaction, parts: Vec<Part>, prepare_by_ms: u64) -> TransactionReply {
    if transaction.decision.is_some() {
        return ended(transaction);
    }
    if !transaction.opened {
        return TransactionReply::NotPrepared;
    }
    match add_parts(transaction, parts, prepare_by_ms) {
        Ok(reply) => {
            settle_preparation(transaction);
            reply
        }
        Err(refused) => refused,
    }
}

/// The parts that one request brought.
fn of_request(transaction: &mut Transaction, first: u32, count: u32) -> &mut [PartRecord] {
    let all = transaction.parts.len();
    let first = all.min(first as usize);
    let end = all.min(first.saturating_add(count as usize));
    &mut transaction.parts[first..end]
}

fn prepared(transaction: &mut Transaction, done: PreparedParts, _now_ms: u64) -> TransactionReply {
    if transaction.decision.is_some() {
        return ended(transaction);
    }
    let parts = of_request(transaction, done.first, done.count);
    if parts.iter().any(|p| p.state == PartState::GivenUp) {
        return TransactionReply::GivenUp;
    }
    parts.iter_mut().for_each(|p| p.state = PartState::Prepared);
    if done.offsets {
        transaction
            .offsets
            .iter_mut()
            .for_each(|o| o.prepared = true);
    }
    settle_preparation(transaction);
    now_is(transaction)
}

/// Leaves out what an extension brought, and the rest as it is.
fn give_up(transaction: &mut Transaction, first: u32, count: u32) -> TransactionReply {
    if transaction.decision.is_some() {
        return ended(transaction);
    }
    if !transaction.opened {
        // What it began with goes with all of it.
        return TransactionReply::NotPrepared;
    }
    of_request(transaction, first, count)
        .iter_mut()
        .for_each(|p| p.state = PartState::GivenUp);
    settle_preparation(transaction);
    now_is(transaction)
}

fn decide(transaction: &mut Transaction, decision: Decision, now_ms: u64) -> TransactionReply {
    if let Some(known) = transaction.decision
        && !mutation::on(Mutation::DecideAgain)
    {
        return match known.is_commit() == decision.is_commit() {
            true => now_is(transaction),
            false => ended(transaction),
        };
    }
    let is_ready = transaction.is_prepared() || mutation::on(Mutation::CommitUnprepared);
    if decision.is_commit() && !is_ready {
        return TransactionReply::NotPrepared;
    }
    transaction.decision = Some(decision);
    transaction.decided_ms = now_ms;
    transaction.prepare_by_ms = None;
    finish(transaction, now_ms);
    now_is(transaction)
}

/// What time alone brings about.
fn due(transaction: &mut Transaction, now_ms: u64) -> TransactionReply {
    if transaction.decision.is_some() {
        return now_is(transaction);
    }
    if transaction.prepare_by_ms.is_some_and(|by| by <= now_ms) {
        if !transaction.opened {
            return decide(transaction, Decision::Rollback, now_ms);
        }
        // Nobody was told that these are there: the transaction stays what it was told to be.
        let parts = transaction.parts.iter_mut();
        let late = parts.filter(|p| is_waited_for(p) && p.prepare_by_ms <= now_ms);
        late.for_each(|p| p.state = PartState::GivenUp);
        settle_preparation(transaction);
    }
    if transaction.opened && transaction.next_check_ms <= now_ms {
        let timing = transaction.timing;
        if transaction.checks >= timing.max_checks {
            return decide(transaction, Decision::Expire, now_ms);
        }
        transaction.checks += 1;
        transaction.next_check_ms = now_ms.saturating_add(timing.check_interval_ms.max(1));
    }
    now_is(transaction)
}

fn settled(
    transaction: &mut Transaction,
    queues: &[(u64, Vec<(u32, Place)>)],
    offset_groups: &[String],
    now_ms: u64,
) -> TransactionReply {
    let Some(decision) = transaction.decision else {
        let text = "a transaction is settled after it was decided".to_owned();
        return TransactionReply::Invalid(text);
    };
    if transaction.done_ms.is_some() {
        return now_is(transaction);
    }
    for (group, places) in queues {
        let takes_part = |p: &PartRecord| p.part.queue_group == *group;
        if !transaction.parts.iter().any(takes_part) || !transaction.settled_queues.insert(*group) {
            continue;
        }
        for (number, place) in places {
            let part = transaction.parts.get_mut(*number as usize);
            let is_seen = |p: &PartRecord| decision.is_commit() && p.state == PartState::Prepared;
            if let Some(part) = part.filter(|p| takes_part(p) && is_seen(p)) {
                part.place = Some(*place);
            }
        }
    }
    for offsets in &mut transaction.offsets {
        offsets.settled |= offset_groups.contains(&offsets.group);
    }
    finish(transaction, now_ms);
    now_is(transaction)
}

/// Notes the end when the last participant has applied the decision.
fn finish(transaction: &mut Transaction, now_ms: u64) {
    let all = transaction.unsettled_queues().is_empty()
        && transaction.unsettled_offsets().next().is_none();
    if all {
        transaction.done_ms = Some(now_ms);
    }
}
