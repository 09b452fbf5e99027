//! What becomes of held batches: delivered when they are due, settled with their transaction, or
//! taken back.

use quorate_storage::mutation::{self, Mutation};
use quorate_storage::{LogId, StorageError};

use super::entry::TransactionId;
use super::held::PartSpot;
use super::reply::{QueueReply, Settled};
use super::{Place, QueueMachine};

impl QueueMachine {
    /// Makes what is due at `by_ms` visible, `max_batches` at most. By the stamp as the leader gave
    /// it, and not by the log's time, which another leader's faster clock may have set.
    pub(super) fn deliver(
        &mut self,
        log_id: LogId,
        by_ms: u64,
        max_batches: u16,
    ) -> Result<QueueReply, StorageError> {
        let by_ms = match mutation::on(Mutation::DeliverByLogTime) {
            false => by_ms,
            true => self.state.stamp_ms,
        };
        let due = self.held.take_due(by_ms, max_batches.into())?;
        for (key, batch) in &due {
            let spot = PartSpot {
                index: key.index,
                batch: key.batch,
                term: batch.term,
                count: batch.count,
                bytes: batch.bytes,
            };
            self.show(&spot);
        }
        self.held.commit(log_id, due.len())?;
        // No more than `max_batches`.
        Ok(QueueReply::Delivered(due.len() as u32))
    }

    /// Ends a transaction here, unless it has ended before. Parts that were given up may be here all
    /// the same: whoever stored them did not live to say so.
    pub(super) fn settle(
        &mut self,
        log_id: LogId,
        id: &TransactionId,
        commit: bool,
        given_up: &[u32],
    ) -> Result<QueueReply, StorageError> {
        let now_ms = self.state.stamp_ms;
        if let Some(first) = self.held.settled(id, now_ms)? {
            return Ok(QueueReply::Settled(first));
        }
        let held = self.held.take_parts(id)?;
        let taken = held.len();
        let shows = commit || mutation::on(Mutation::ShowRolledBack);
        let held = held.into_iter();
        let each = held.filter(|(part, _)| shows && !given_up.contains(part));
        let parts = each.map(|(part, spot)| (part, self.show(&spot))).collect();
        let settled = Settled { commit, parts };
        self.held.settle(log_id, id, settled.clone(), now_ms);
        self.held.commit(log_id, taken)?;
        Ok(QueueReply::Settled(settled))
    }

    /// Takes a delayed batch back.
    pub(super) fn cancel(
        &mut self,
        log_id: LogId,
        stored: LogId,
        batch: u16,
    ) -> Result<QueueReply, StorageError> {
        let now_ms = self.state.stamp_ms;
        let verdict = self.held.cancel(log_id, stored, batch, now_ms)?;
        self.held.commit(log_id, 1)?;
        // It may have been the next one due.
        self.held.find_next_due()?;
        Ok(QueueReply::Cancelled(verdict))
    }

    /// Gives a held batch its offsets.
    fn show(&mut self, spot: &PartSpot) -> Place {
        let place = spot.place(self.state.next_offset);
        self.state.late.add(place.base_offset, place.index);
        self.make_visible(place, spot.bytes.into());
        place
    }
}
