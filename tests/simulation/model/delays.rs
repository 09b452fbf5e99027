//! Delayed messages: never early, once, and not at all when cancelled.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::{BrokerError, Message, NewMessage};
use rand::Rng;

use super::Work;
use super::actor::{Actor, Scene, Troupe, delay, now_ms, put, put_one, text};
use crate::workload::Called;

const TOPIC: &str = "delayed";
const QUEUES: u32 = 2;
const LONGEST_MS: u64 = 4_000;

#[derive(Debug)]
pub struct Delays {
    scene: Arc<Scene>,
    sent: Mutex<BTreeMap<String, Sent>>,
}

#[derive(Debug)]
struct Sent {
    /// Not visible before this time.
    due_ms: u64,
    stored: Stored,
    cancelled: Cancelled,
    /// Somebody has seen it.
    seen: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Stored {
    Yes,
    Perhaps,
    No,
}

#[derive(Debug, PartialEq, Eq)]
enum Cancelled {
    Yes,
    Perhaps,
    No,
    /// It was too late, as the answer said.
    Delivered,
}

impl Delays {
    pub async fn prepare(scene: Arc<Scene>, actor: &mut Actor) -> Arc<dyn Work> {
        actor.create_topic(TOPIC, QUEUES).await;
        let sent = Mutex::default();
        Arc::new(Self { scene, sent })
    }

    async fn write(self: Arc<Self>, mut actor: Actor, writer: u64) {
        for number in 0u64.. {
            actor.pause(20..250).await;
            if self.scene.is_closing() {
                return;
            }
            let value = format!("{writer}-{number}");
            let id = self.send(&mut actor, &value).await;
            if let Some(id) = id
                && actor.rng.random_bool(0.4)
            {
                actor.pause(0..LONGEST_MS / 2).await;
                for _ in 0..actor.rng.random_range(1..4) {
                    self.cancel(&mut actor, &value, &id).await;
                }
            }
        }
    }

    /// Sends one message, and gives its id where that is known.
    async fn send(&self, actor: &mut Actor, value: &str) -> Option<String> {
        let delay_ms = actor.rng.random_range(1..LONGEST_MS);
        let due_ms = now_ms() + delay_ms;
        let sent = Sent {
            due_ms,
            stored: Stored::Perhaps,
            cancelled: Cancelled::No,
            seen: false,
        };
        self.sent.lock().insert(value.to_owned(), sent);
        let message = NewMessage {
            value: Some(value.to_owned().into()),
            delay: delay(delay_ms),
            ..NewMessage::default()
        };
        let insists = actor.rng.random_bool(0.7);
        let key = insists.then(|| format!("delayed {value}"));
        let request = put(TOPIC, message, key);
        let answer = match insists {
            true => actor.insist(move |b| put_one(b, request.clone())).await,
            false => match actor.call(|b| put_one(b, request)).await {
                Called::Done(stored) => Ok(stored),
                Called::Refused(error) => Err(error),
                Called::NotSent => Err(BrokerError::ShuttingDown),
                Called::Unknown(why) => {
                    actor.note(format_args!("delay {value} to {due_ms}: {why}"));
                    return None;
                }
            },
        };
        let how = answer.as_ref().map(|stored| stored.queue);
        actor.note(format_args!("delay {value} to {due_ms}: {how:?}"));
        let mut sent = self.sent.lock();
        let sent = sent.get_mut(value)?;
        match answer {
            Ok(stored) => {
                sent.stored = Stored::Yes;
                Some(stored.message_id)
            }
            Err(error) => {
                sent.stored = Stored::No;
                if sent.seen || insists {
                    let text =
                        format!("delayed {value} was refused: {error} (seen: {})", sent.seen);
                    self.scene.violation(text);
                }
                None
            }
        }
    }

    async fn cancel(&self, actor: &mut Actor, value: &str, id: &str) {
        let own = id.to_owned();
        let called = actor
            .call(|broker| async move { broker.cancel_message(TOPIC, &own).await })
            .await;
        let mut sent = self.sent.lock();
        let Some(sent) = sent.get_mut(value) else {
            return;
        };
        let (how, wrong) = match called {
            Called::Done(()) => {
                let wrong = sent.seen || sent.cancelled == Cancelled::Delivered;
                sent.cancelled = Cancelled::Yes;
                ("done".to_owned(), wrong)
            }
            Called::Refused(error @ BrokerError::AlreadyDelivered { .. }) => {
                let wrong = sent.cancelled == Cancelled::Yes || now_ms() < sent.due_ms;
                sent.cancelled = Cancelled::Delivered;
                (error.to_string(), wrong)
            }
            Called::Refused(error) => (error.to_string(), !error.retryable()),
            Called::NotSent => ("not sent".to_owned(), false),
            Called::Unknown(why) => {
                if sent.cancelled == Cancelled::No {
                    sent.cancelled = Cancelled::Perhaps;
                }
                (why, false)
            }
        };
        actor.note(format_args!("cancel {value}: {how}"));
        if wrong {
            let text = format!("cancelling {value} of which is known {sent:?}: {how}");
            self.scene.violation(text);
        }
    }

    /// Looks again and again at what is there.
    async fn watch(self: Arc<Self>, mut actor: Actor) {
        let mut from = [0; QUEUES as usize];
        while !self.scene.is_done() {
            actor.pause(100..500).await;
            let queue = actor.rng.random_range(0..QUEUES);
            let next = &mut from[queue as usize];
            let page = actor.page(&(TOPIC.to_owned(), queue), *next).await;
            for message in page.into_iter().flat_map(|(messages, _)| messages) {
                *next = message.offset + 1;
                self.see(&message);
            }
        }
    }

    fn see(&self, message: &Message) {
        let value = text(message);
        let mut sent = self.sent.lock();
        let Some(sent) = sent.get_mut(&value) else {
            let text = format!("{value} was never sent and is visible");
            return self.scene.violation(text);
        };
        sent.seen = true;
        let at_ms = message.timestamp_ms.min(now_ms());
        if at_ms < sent.due_ms || sent.cancelled == Cancelled::Yes || sent.stored == Stored::No {
            let text = format!("delayed {value} is visible since {at_ms}, but {sent:?}");
            self.scene.violation(text);
        }
    }

    /// Those that must be visible, and are not among these.
    fn missing(&self, messages: &[Message]) -> Vec<String> {
        let sent = self.sent.lock();
        let visible: Vec<String> = messages.iter().map(text).collect();
        let due = sent.iter().filter(|(value, sent)| {
            sent.stored == Stored::Yes
                && matches!(sent.cancelled, Cancelled::No | Cancelled::Delivered)
                && !visible.contains(value)
        });
        due.map(|(value, _)| value.clone()).collect()
    }
}

impl Work for Delays {
    fn start(self: Arc<Self>, troupe: &mut Troupe) {
        for writer in 0..2 {
            let actor = troupe.actor(format_args!("delayer-{writer}"));
            troupe.start(self.clone().write(actor, writer));
        }
        let watcher = troupe.actor("delay-watcher");
        troupe.start(self.watch(watcher));
    }

    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>> {
        async move {
            let missing = self.missing(&actor.read(TOPIC, QUEUES).await);
            (!missing.is_empty()).then(|| format!("delayed messages {missing:?}"))
        }
        .boxed()
    }

    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()> {
        async move {
            let messages = actor.read(TOPIC, QUEUES).await;
            messages.iter().for_each(|message| self.see(message));
            let mut values: Vec<String> = messages.iter().map(text).collect();
            values.sort();
            for twice in values.windows(2).filter(|pair| pair[0] == pair[1]) {
                let text = format!("delayed {} is visible twice", twice[0]);
                self.scene.violation(text);
            }
            let missing = self.missing(&messages);
            if !missing.is_empty() {
                let text = format!("delayed messages are gone again: {missing:?}");
                self.scene.violation(text);
            }
            let sent = self.sent.lock();
            let (all, visible) = (sent.len(), values.len());
            let cancelled = sent.values().filter(|s| s.cancelled == Cancelled::Yes);
            let cancelled = cancelled.count();
            actor.note(format_args!(
                "{all} delayed, {cancelled} cancelled, {visible} visible"
            ));
        }
        .boxed()
    }
}
