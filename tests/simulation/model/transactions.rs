//! Transactions: all of it or nothing, as the answers said, and offsets with the messages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::queue::entry::TransactionId;
use quorate::broker::{
    BeginTransaction, BrokerError, Message, NewMessage, TransactionMessage, TransactionOffset,
    transaction_results, transaction_text,
};
use quorate::coordinator::transactions::{
    Decision, Timing, Transaction, TransactionFilter, TransactionState,
};
use rand::Rng;

use super::Work;
use super::actor::{Actor, Scene, Troupe, text};
use crate::workload::Called;

const TOPICS: [&str; 2] = ["tx-one", "tx-two"];
const QUEUES: u32 = 2;
const PRODUCER_GROUP: &str = "tx-producers";
/// What a worker makes of the first queue of the first topic, in one with its own offset there.
const DERIVED: &str = "tx-derived";
/// Consumes, and produces.
const WORKER_GROUP: &str = "tx-worker";
const PRODUCERS: u64 = 2;
const TIMING: Timing = Timing {
    timeout_ms: 800,
    check_interval_ms: 600,
    max_checks: 3,
};

#[derive(Debug)]
pub struct Transactions {
    scene: Arc<Scene>,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    begun: BTreeMap<u64, Begun>,
    ids: BTreeMap<TransactionId, u64>,
    /// What their producers' database says: to commit, to roll back, or nothing, now or ever.
    decided: BTreeMap<TransactionId, Option<bool>>,
    /// Somebody has asked for a commit.
    may_commit: BTreeSet<TransactionId>,
    ends: BTreeMap<TransactionId, End>,
    /// Where the commit's answer says that messages are.
    places: BTreeMap<TransactionId, Vec<(String, u32, u64)>>,
    checked: u64,
    /// What the worker has committed for certain.
    worked: u64,
}

#[derive(Debug, Default)]
struct Begun {
    /// None: the answer never came.
    id: Option<TransactionId>,
    /// It began with so many messages, and got so many more.
    parts: u64,
    more: u64,
    /// Perhaps it got so many more.
    perhaps: u64,
    refused: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Committed,
    RolledBack,
    Expired,
}

impl End {
    fn of(transaction: &Transaction) -> Option<Self> {
        match transaction.decision? {
            Decision::Commit => Some(Self::Committed),
            Decision::Rollback => Some(Self::RolledBack),
            Decision::Expire => Some(Self::Expired),
        }
    }

    fn called(state: &str) -> Option<Self> {
        match state {
            "committed" => Some(Self::Committed),
            "rolled_back" => Some(Self::RolledBack),
            "expired" => Some(Self::Expired),
            _ => None,
        }
    }
}

fn message(topic: &str, value: String, queue: u32) -> TransactionMessage {
    TransactionMessage {
        topic: topic.to_owned(),
        message: NewMessage {
            value: Some(value.into()),
            queue: Some(queue),
            ..NewMessage::default()
        },
    }
}

/// The parts of a transaction go round all queues.
fn parts(number: u64, range: std::ops::Range<u64>) -> Vec<TransactionMessage> {
    let part = |part: u64| {
        let place = number + part;
        let topic = TOPICS[place as usize % TOPICS.len()];
        let queue = (place / TOPICS.len() as u64) as u32 % QUEUES;
        message(topic, format!("{number}:{part}"), queue)
    };
    range.map(part).collect()
}

/// Number and part.
fn read(message: &Message) -> Option<(u64, u64)> {
    let value = text(message);
    let (number, part) = value.split_once(':')?;
    Some((number.parse().ok()?, part.parse().ok()?))
}

impl Transactions {
    pub async fn prepare(scene: Arc<Scene>, actor: &mut Actor) -> Arc<dyn Work> {
        for topic in TOPICS {
            actor.create_topic(topic, QUEUES).await;
        }
        actor.create_topic(DERIVED, 1).await;
        let ledger = Mutex::default();
        Arc::new(Self { scene, ledger })
    }

    async fn produce(self: Arc<Self>, mut actor: Actor, producer: u64) {
        for number in (producer..).step_by(PRODUCERS as usize) {
            actor.pause(50..500).await;
            if self.scene.is_closing() {
                return;
            }
            let count = actor.rng.random_range(1..5);
            let Some(id) = self.begin(&mut actor, number, count).await else {
                continue;
            };
            if actor.rng.random_bool(0.3) {
                self.extend(&mut actor, number, id, count).await;
            }
            actor.pause(0..300).await;
            match actor.rng.random_range(0..10) {
                0..3 => actor.note(format_args!("vanishes from {number}")),
                3..5 => self.end(&mut actor, id, false).await,
                _ => self.end(&mut actor, id, true).await,
            }
        }
    }

    async fn begin(&self, actor: &mut Actor, number: u64, count: u64) -> Option<TransactionId> {
        let begun = Begun {
            parts: count,
            ..Begun::default()
        };
        self.ledger.lock().begun.insert(number, begun);
        let id = self
            .open_one(actor, PRODUCER_GROUP, parts(number, 0..count), Vec::new())
            .await;
        let mut ledger = self.ledger.lock();
        match id {
            Called::Done(id) => {
                let text = transaction_text(&id);
                actor.note(format_args!("begins {number} with {count} parts: {text}"));
                ledger.ids.insert(id, number);
                ledger.begun.entry(number).or_default().id = Some(id);
                Some(id)
            }
            Called::Refused(error) => {
                actor.note(format_args!("begins {number}: {error}"));
                ledger.begun.entry(number).or_default().refused = true;
                None
            }
            Called::NotSent => {
                ledger.begun.entry(number).or_default().refused = true;
                None
            }
            Called::Unknown(why) => {
                actor.note(format_args!("begins {number}: unknown: {why}"));
                None
            }
        }
    }

    async fn open_one(
        &self,
        actor: &mut Actor,
        producer_group: &str,
        messages: Vec<TransactionMessage>,
        offsets: Vec<TransactionOffset>,
    ) -> Called<TransactionId> {
        let request = BeginTransaction {
            producer_group: producer_group.to_owned(),
            timing: TIMING,
            check_url: None,
            messages,
            offsets,
        };
        actor
            .call(|broker| async move { Ok(broker.begin_transaction(request).await?.id) })
            .await
    }

    async fn extend(&self, actor: &mut Actor, number: u64, id: TransactionId, count: u64) {
        let more = actor.rng.random_range(1..3);
        let messages = parts(number, count..count + more);
        self.ledger.lock().begun.entry(number).or_default().perhaps = more;
        let called =
            actor
                .call(move |broker| async move {
                    broker.extend_transaction(&id, messages).await.map(drop)
                })
                .await;
        let mut ledger = self.ledger.lock();
        let begun = ledger.begun.entry(number).or_default();
        let how = match called {
            Called::Done(()) => {
                (begun.more, begun.perhaps) = (more, 0);
                "done".to_owned()
            }
            Called::Refused(error) => {
                begun.perhaps = 0;
                error.to_string()
            }
            Called::NotSent => {
                begun.perhaps = 0;
                "not sent".to_owned()
            }
            Called::Unknown(why) => why,
        };
        actor.note(format_args!("extends {number} by {more}: {how}"));
    }

    /// Asks for an end until it is answered. Another one than asked for may have come first.
    async fn end(&self, actor: &mut Actor, id: TransactionId, commit: bool) {
        let decision = match commit {
            true => Decision::Commit,
            false => Decision::Rollback,
        };
        {
            let mut ledger = self.ledger.lock();
            ledger.decided.insert(id, Some(commit));
            if commit {
                ledger.may_commit.insert(id);
            }
        }
        let answer = actor
            .insist(move |broker| async move { broker.end_transaction(&id, decision).await })
            .await;
        let text = transaction_text(&id);
        match answer {
            Ok(transaction) => {
                let end = End::of(&transaction);
                let state = transaction.state().as_str();
                actor.note(format_args!("{decision:?} of {text}: {state}"));
                let asked = match commit {
                    true => end == Some(End::Committed),
                    false => matches!(end, Some(End::RolledBack | End::Expired)),
                };
                if !asked {
                    let text = format!("{decision:?} of {text} is answered as {state}");
                    self.scene.violation(text);
                }
                self.ended(id, end);
                if transaction.state() == TransactionState::Committed {
                    self.placed(id, &transaction);
                }
            }
            Err(BrokerError::TransactionEnded { state, .. }) => {
                actor.note(format_args!("{decision:?} of {text}: it is {state}"));
                self.ended(id, End::called(&state));
            }
            Err(error) => {
                let text = format!("{decision:?} of {text} is refused: {error}");
                self.scene.violation(text);
            }
        }
    }

    fn ended(&self, id: TransactionId, end: Option<End>) {
        let text = transaction_text(&id);
        let Some(end) = end else {
            let text = format!("{text} ended, and nobody says how");
            return self.scene.violation(text);
        };
        let known = *self.ledger.lock().ends.entry(id).or_insert(end);
        if known != end {
            let text = format!("{text} is answered as {known:?} and as {end:?}");
            self.scene.violation(text);
        }
    }

    fn placed(&self, id: TransactionId, transaction: &Transaction) {
        let results = transaction_results(transaction).into_iter();
        let places = results.filter_map(|result| {
            let (offset, _) = result.stored?;
            Some((result.topic, result.queue, offset))
        });
        let places: Vec<_> = places.collect();
        let mut ledger = self.ledger.lock();
        let known = ledger.places.entry(id).or_insert(places.clone()).clone();
        drop(ledger);
        if known != places {
            let text = format!("{}: {known:?} and {places:?}", transaction_text(&id));
            self.scene.violation(text);
        }
    }

    /// An instance of both producer groups: asks what needs an answer, and gives it.
    async fn check_back(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.is_done() {
            actor.pause(100..500).await;
            let wait_ms = [0, 500][actor.rng.random_range(0..2)];
            let state = Some(TransactionState::NeedsCheck);
            let due = self.listed(&mut actor, state, wait_ms).await;
            for transaction in due.into_iter().flatten() {
                let id = transaction.id;
                // What the worker has not written down was not its to commit.
                let chance = match transaction.producer_group == WORKER_GROUP {
                    true => [Some(false), None],
                    false => [
                        Some(true),
                        [Some(false), None][actor.rng.random_range(0..2)],
                    ],
                };
                let chance = chance[actor.rng.random_range(0..chance.len())];
                let decided = {
                    let mut ledger = self.ledger.lock();
                    ledger.checked += 1;
                    *ledger.decided.entry(id).or_insert(chance)
                };
                let (text, checks) = (transaction_text(&id), transaction.checks);
                actor.note(format_args!("check {checks} of {text}: {decided:?}"));
                if let Some(commit) = decided {
                    self.end(&mut actor, id, commit).await;
                }
            }
        }
    }

    async fn listed(
        &self,
        actor: &mut Actor,
        state: Option<TransactionState>,
        wait_ms: u64,
    ) -> Option<Vec<Transaction>> {
        let filter = TransactionFilter {
            producer_group: None,
            state,
            limit: 10_000,
        };
        let called = actor
            .call(move |broker| async move { broker.transactions(filter, wait_ms).await })
            .await;
        match called {
            Called::Done(listed) => Some(listed),
            _ => None,
        }
    }

    /// Reads the first queue, and writes what it makes of a message together with its own offset. It
    /// begins again from the committed offset whenever it is unsure. An earlier transaction of its own
    /// may move that until the next one holds it: so it looks once more before it commits.
    async fn work(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.is_closing() {
            actor.pause(50..300).await;
            self.step(&mut actor).await;
        }
    }

    async fn step(&self, actor: &mut Actor) -> Option<()> {
        let worked = self.ledger.lock().worked;
        let from = self.committed(actor).await?;
        if from < worked {
            let text = format!("the worker had committed {worked}, and finds {from}");
            self.scene.violation(text);
        }
        let source = (TOPICS[0].to_owned(), 0);
        let (messages, _) = actor.page(&source, from).await?;
        let count = actor.rng.random_range(1..4);
        let offsets: Vec<u64> = messages.iter().take(count).map(|m| m.offset).collect();
        let next = offsets.last()? + 1;
        let derived = offsets.iter();
        let derived = derived.map(|offset| message(DERIVED, offset.to_string(), 0));
        let moved = TransactionOffset {
            group: WORKER_GROUP.to_owned(),
            topic: source.0,
            queue: source.1,
            offset: next,
            from: None,
            member: None,
        };
        let called = self.open_one(actor, WORKER_GROUP, derived.collect(), vec![moved]);
        let Called::Done(id) = called.await else {
            return None;
        };
        let text = transaction_text(&id);
        actor.note(format_args!("works at {from} to {next} in {text}"));
        let moved = self.committed(actor).await != Some(from);
        match actor.rng.random_range(0..10) {
            0 => {}
            _ if moved => self.end(actor, id, false).await,
            // Written down, and nobody was told.
            1 => {
                let mut ledger = self.ledger.lock();
                ledger.decided.insert(id, Some(true));
            }
            2..4 => self.end(actor, id, false).await,
            _ => {
                self.end(actor, id, true).await;
                let mut ledger = self.ledger.lock();
                if ledger.places.contains_key(&id) {
                    ledger.worked = ledger.worked.max(next);
                }
            }
        }
        Some(())
    }

    /// The worker's committed offset.
    async fn committed(&self, actor: &mut Actor) -> Option<u64> {
        let called = actor
            .call(|broker| async move { broker.group_offsets(WORKER_GROUP, Some(TOPICS[0])).await })
            .await;
        let Called::Done(rows) = called else {
            return None;
        };
        let own = rows.iter().find(|row| row.queue == 0);
        Some(own.and_then(|row| row.offset).unwrap_or(0))
    }

    /// Looks again and again at what is there.
    async fn watch(self: Arc<Self>, mut actor: Actor) {
        let mut from: BTreeMap<(String, u32), u64> = BTreeMap::new();
        while !self.scene.is_done() {
            actor.pause(50..300).await;
            let topic = TOPICS[actor.rng.random_range(0..TOPICS.len())];
            let queue = (topic.to_owned(), actor.rng.random_range(0..QUEUES));
            let next = from.entry(queue.clone()).or_default();
            let page = actor.page(&queue, *next).await;
            for message in page.into_iter().flat_map(|(messages, _)| messages) {
                *next = message.offset + 1;
                self.see(&message);
            }
        }
    }

    fn see(&self, message: &Message) {
        let value = text(message);
        let ledger = self.ledger.lock();
        let begun = read(message).and_then(|(number, _)| ledger.begun.get(&number));
        let wrong = match begun {
            None => Some("nobody sent it".to_owned()),
            Some(begun) if begun.refused => Some("its transaction was refused".to_owned()),
            Some(Begun { id: Some(id), .. }) => match ledger.ends.get(id) {
                Some(end) if *end != End::Committed => Some(format!("it ended as {end:?}")),
                _ if !ledger.may_commit.contains(id) => Some("nobody asked for that".to_owned()),
                _ => None,
            },
            Some(_) => None,
        };
        if let Some(why) = wrong {
            let text = format!("{value} of a transaction is visible, and {why}");
            self.scene.violation(text);
        }
    }

    /// What is wrong with what is visible.
    fn wrong(&self, topics: &[Vec<Message>]) -> Vec<String> {
        let mut visible: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let messages = topics.iter().flatten();
        for (number, part) in messages.filter_map(read) {
            visible.entry(number).or_default().push(part);
        }
        let ledger = self.ledger.lock();
        let mut wrong = Vec::new();
        for (number, begun) in &ledger.begun {
            let mut there = visible.remove(number).unwrap_or_default();
            there.sort_unstable();
            let sure = begun.parts + begun.more;
            let most = sure + begun.perhaps;
            let count = there.len() as u64;
            let whole = (count == sure || count == most) && there.iter().copied().eq(0..count);
            let end = begun.id.and_then(|id| ledger.ends.get(&id));
            let fine = match end {
                Some(End::Committed) => whole,
                Some(End::RolledBack | End::Expired) => count == 0,
                None => count == 0 || whole,
            };
            if !fine || (begun.refused && count > 0) {
                let text = format!("{number} ended as {end:?}, {there:?} of {begun:?} are there");
                wrong.push(text);
            }
        }
        for (topic, messages) in TOPICS.iter().zip(topics) {
            for message in messages {
                let number = read(message).map(|(number, _)| number);
                let begun = number.and_then(|number| ledger.begun.get(&number));
                let id = begun.and_then(|begun| begun.id);
                let places = id.and_then(|id| ledger.places.get(&id));
                let place = ((*topic).to_owned(), message.queue, message.offset);
                if places.is_some_and(|places| !places.contains(&place)) {
                    let text = format!("{number:?} is at {place:?} and not in {places:?}");
                    wrong.push(text);
                }
            }
        }
        wrong
    }

    async fn topics(&self, actor: &mut Actor) -> Vec<Vec<Message>> {
        let mut topics = Vec::new();
        for topic in TOPICS {
            topics.push(actor.read(topic, QUEUES).await);
        }
        topics
    }

    /// What the worker wrote is there once for each offset that it has behind it.
    async fn check_worker(&self, actor: &mut Actor) {
        let made = actor.read(DERIVED, 1).await;
        let committed = loop {
            match self.committed(actor).await {
                Some(committed) => break committed,
                None => actor.pause(50..200).await,
            }
        };
        let mut sources: Vec<u64> = made.iter().filter_map(|m| text(m).parse().ok()).collect();
        sources.sort_unstable();
        if !sources.iter().copied().eq(0..committed) {
            let text = format!("{committed} is committed with what was made of {sources:?}");
            self.scene.violation(text);
        }
        actor.note(format_args!("the worker has committed {committed}"));
    }

    /// Every transaction has the end that was answered. Those without an answer get theirs.
    async fn check_ends(&self, actor: &mut Actor) {
        let listed = self.listed_at_last(actor).await;
        for transaction in &listed {
            if transaction.done_ms.is_none() {
                let text = transaction_text(&transaction.id);
                self.scene.violation(format_args!("{text} is open again"));
            }
            self.ended(transaction.id, End::of(transaction));
        }
        let listed: BTreeSet<_> = listed.iter().map(|t| t.id).collect();
        let ledger = self.ledger.lock();
        let known = ledger.ids.keys().chain(ledger.ends.keys());
        for id in known.filter(|id| !listed.contains(*id)) {
            let text = transaction_text(id);
            self.scene
                .violation(format_args!("{text} is not known any more"));
        }
    }

    async fn listed_at_last(&self, actor: &mut Actor) -> Vec<Transaction> {
        loop {
            if let Some(listed) = self.listed(actor, None, 0).await {
                return listed;
            }
            actor.pause(50..200).await;
        }
    }
}

impl Work for Transactions {
    fn start(self: Arc<Self>, troupe: &mut Troupe) {
        for producer in 0..PRODUCERS {
            let actor = troupe.actor(format_args!("tx-producer-{producer}"));
            troupe.start(self.clone().produce(actor, producer));
        }
        let actor = troupe.actor("tx-checker");
        troupe.start(self.clone().check_back(actor));
        let actor = troupe.actor("tx-worker");
        troupe.start(self.clone().work(actor));
        let actor = troupe.actor("tx-watcher");
        troupe.start(self.watch(actor));
    }

    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>> {
        async move {
            let all = self.listed_at_last(actor).await;
            let open = all.iter().filter(|t| t.done_ms.is_none());
            let open: Vec<_> = open.map(|t| transaction_text(&t.id)).collect();
            (!open.is_empty()).then(|| format!("transactions {open:?}"))
        }
        .boxed()
    }

    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()> {
        async move {
            self.check_ends(actor).await;
            let topics = self.topics(actor).await;
            topics.iter().flatten().for_each(|message| self.see(message));
            for text in self.wrong(&topics) {
                self.scene.violation(text);
            }
            self.check_worker(actor).await;
            let ledger = self.ledger.lock();
            let count = |end| ledger.ends.values().filter(|e| **e == end).count();
            let (begun, checked) = (ledger.begun.len(), ledger.checked);
            let (committed, expired) = (count(End::Committed), count(End::Expired));
            let rolled_back = count(End::RolledBack);
            actor.note(format_args!(
                "{begun} begun, {committed} committed, {rolled_back} rolled back, {expired} expired, {checked} checks"
            ));
        }
        .boxed()
    }
}
