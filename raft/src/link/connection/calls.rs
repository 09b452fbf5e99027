//! Calls of a connection: asking, being answered, answering.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::{Connection, Hold};
use crate::link::error::{CallError, DisconnectReason, NotSent};
use crate::link::service::ServiceSlot;
use crate::link::wire::{AnswerStatus, Body, HEADER_BYTES, Header, Kind};
use crate::link::writer::{Outgoing, Ticket};

type CallResult = Result<Bytes, CallError>;
/// Id, ticket and answer of a call that was registered.
type Expected = (u64, Arc<Ticket>, oneshot::Receiver<CallResult>);

/// Who waits for the answer.
pub(super) type PendingCall = (Arc<Ticket>, oneshot::Sender<CallResult>);

#[derive(Default)]
pub(super) struct Pending {
    pub(super) calls: HashMap<u64, PendingCall>,
    next: u64,
    /// Set once, by close.
    pub(super) reason: Option<DisconnectReason>,
}

impl Connection {
    pub(crate) async fn call(
        &self,
        class: u8,
        group: u64,
        body: Body,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let deadline = Instant::now() + timeout;
        let body_bytes = body.len();
        if !self.fits(body_bytes) {
            return Err(CallError::NotSent(NotSent::TooLarge));
        }
        // These are small and few, and the budget is what bulk waits for.
        let urgent = self.is_urgent(class, body_bytes);
        let hold = if urgent {
            Hold::None
        } else {
            self.budget(body_bytes, deadline).await?
        };
        let (id, ticket, answer) = self.expect_answer()?;
        let _forget = ForgetCall {
            connection: self,
            id,
        };
        let header = Header {
            kind: Kind::Call,
            class,
            channel: id,
            group,
        };
        let outgoing = Outgoing {
            header,
            body,
            ticket: Some(ticket.clone()),
            hold,
        };
        if self.queue(urgent).send(outgoing).is_err() {
            return Err(CallError::NotSent(NotSent::ConnectionLost));
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CallError::ConnectionLost),
            Err(_) if ticket.withdraw() => Err(CallError::NotSent(NotSent::QueueFull)),
            Err(_) => Err(CallError::Timeout),
        }
    }

    async fn budget(&self, bytes: usize, deadline: Instant) -> Result<Hold, CallError> {
        let permits = (bytes + HEADER_BYTES).min(self.queued_call_bytes_max) as u32;
        let permit = self.call_budget.clone().acquire_many_owned(permits);
        match timeout_at(deadline, permit).await {
            Ok(Ok(permit)) => Ok(Hold::Budget { _permit: permit }),
            Ok(Err(_)) => Err(CallError::NotSent(NotSent::ConnectionLost)),
            Err(_) => Err(CallError::NotSent(NotSent::QueueFull)),
        }
    }

    fn expect_answer(&self) -> Result<Expected, CallError> {
        let mut pending = self.pending.lock();
        if pending.reason.is_some() {
            return Err(CallError::NotConnected);
        }
        let id = pending.next;
        pending.next += 1;
        let ticket = Arc::new(Ticket::default());
        let (answer, receiver) = oneshot::channel();
        pending.calls.insert(id, (ticket.clone(), answer));
        Ok((id, ticket, receiver))
    }

    /// An answer came in. Unknown ids are calls whose callers gave up.
    pub(crate) fn answered(&self, id: u64, status: AnswerStatus, body: Bytes) {
        let Some((_, answer)) = self.pending.lock().calls.remove(&id) else {
            return;
        };
        let result = match status {
            AnswerStatus::Done => Ok(body),
            AnswerStatus::Refused => Err(CallError::Refused),
            AnswerStatus::Failed => Err(CallError::PeerFailed),
        };
        let _ = answer.send(result);
    }

    /// Queues the answer to call `id`; `slot` is held until it is written.
    pub(crate) fn answer(&self, id: u64, body: Option<Bytes>, slot: ServiceSlot) {
        let body = body.filter(|body| self.fits(body.len()));
        let status = if body.is_some() {
            AnswerStatus::Done
        } else {
            AnswerStatus::Failed
        };
        let header = Header {
            class: status as u8,
            channel: id,
            ..Header::of(Kind::Answer)
        };
        let body = Body::One(body.unwrap_or_default());
        let queue = self.queue(self.is_urgent(slot.class(), body.len()));
        // A closed connection has no use for the frame.
        let _ = queue.send(Outgoing {
            header,
            body,
            ticket: None,
            hold: Hold::Service { _slot: slot },
        });
    }

    /// Answers from memory, ahead of the queue; dropped rather than heaped up.
    pub(crate) fn answer_at_once(&self, id: u64, status: AnswerStatus, body: Bytes) {
        let header = Header {
            class: status as u8,
            channel: id,
            ..Header::of(Kind::Answer)
        };
        self.push_droppable(header, Body::One(body));
    }
}

/// Forgets a call whose caller has gone, and takes it out of the queue if it is still there.
struct ForgetCall<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for ForgetCall<'_> {
    fn drop(&mut self) {
        if let Some((ticket, _)) = self.connection.pending.lock().calls.remove(&self.id) {
            ticket.withdraw();
        }
    }
}
