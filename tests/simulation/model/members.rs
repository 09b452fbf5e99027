//! A consumer group whose members come, vanish and go: no queue has two owners in one epoch, who
//! lost a queue commits nothing for it, offsets never go back, and every message is processed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::groups::{AssignedQueue, JoinRequest, MemberAnswer};
use quorate::broker::{BrokerError, CommitRequest, MemberMark, OffsetCommit};
use quorate::coordinator::{AssignStrategy, Delivery, GroupStart};
use rand::Rng;
use tokio::time::Instant;

use super::Work;
use super::actor::{Actor, Scene, Troupe, Written, number, write_numbers};
use crate::workload::Called;

const TOPIC: &str = "shared";
const GROUP: &str = "members";
const QUEUES: u32 = 4;
const MEMBERS: u64 = 3;
const SESSION: Duration = Duration::from_secs(2);
const BEAT_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct Members {
    scene: Arc<Scene>,
    written: Written,
    seen: Mutex<Seen>,
    /// Calls and answers in the order in which they happened.
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct Seen {
    processed: BTreeSet<u64>,
    /// By epoch and queue.
    owners: BTreeMap<(u64, u32), String>,
    /// Who was told last to own a queue: epoch, member, and when.
    latest: BTreeMap<u32, (u64, String, u64)>,
    committed: BTreeMap<u32, u64>,
    joins: u64,
    commits: u64,
    fenced: u64,
}

/// What a member believes of itself.
#[derive(Clone)]
struct Member {
    id: String,
    epoch: u64,
    /// The next offset of each queue it owns.
    positions: BTreeMap<u32, u64>,
    /// When the last heartbeat that was answered was sent.
    beaten: Instant,
}

/// How a member ends.
enum Ended {
    Fenced,
    Vanished,
    Left,
}

impl Members {
    pub async fn prepare(scene: Arc<Scene>, actor: &mut Actor) -> Arc<dyn Work> {
        actor.create_topic(TOPIC, QUEUES).await;
        Arc::new(Self {
            scene,
            written: Arc::default(),
            seen: Mutex::default(),
            clock: AtomicU64::new(0),
        })
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    async fn consume(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.is_done() {
            let Some(mut member) = self.join(&mut actor).await else {
                actor.pause(50..300).await;
                continue;
            };
            match self.live(&mut actor, &mut member).await {
                Ended::Fenced => actor.note(format_args!("{} is fenced", member.id)),
                Ended::Left => {
                    let id = member.id.clone();
                    let left = actor
                        .call(|broker| async move { broker.leave_group(GROUP, &id, None).await })
                        .await;
                    let sure = matches!(left, Called::Done(()));
                    actor.note(format_args!("{} leaves: {sure}", member.id));
                }
                Ended::Vanished => {
                    actor.note(format_args!("{} vanishes", member.id));
                    actor.pause(0..4000).await;
                    // It may have been stopped, and not have noticed.
                    for queue in member.positions.keys().copied().collect::<Vec<_>>() {
                        self.process(&mut actor, &mut member, queue).await;
                    }
                }
            }
        }
    }

    async fn join(&self, actor: &mut Actor) -> Option<Member> {
        let before = self.seen.lock().committed.clone();
        let beaten = Instant::now();
        let strategies = [
            AssignStrategy::Sticky,
            AssignStrategy::Range,
            AssignStrategy::RoundRobin,
        ];
        let request = JoinRequest {
            group: GROUP.to_owned(),
            topics: vec![TOPIC.to_owned()],
            tag: None,
            filter: None,
            instance_id: None,
            delivery: Delivery::Cluster,
            start: GroupStart::Earliest,
            session_timeout_ms: SESSION.as_millis() as u64,
            strategy: Some(strategies[actor.rng.random_range(0..3)]),
        };
        let called = actor.call(|broker| async move { broker.join_group(request).await });
        let joined = match called.await {
            Called::Done(joined) => joined,
            Called::Refused(error) if !error.retryable() => {
                let text = format!("nobody may join: {error}");
                self.scene.violation(text);
                return None;
            }
            _ => return None,
        };
        self.seen.lock().joins += 1;
        let mut member = Member {
            id: joined.member_id.clone(),
            epoch: joined.epoch,
            positions: BTreeMap::new(),
            beaten,
        };
        self.told(actor, &mut member, &joined, &before);
        Some(member)
    }

    async fn live(&self, actor: &mut Actor, member: &mut Member) -> Ended {
        let mut beat_at = Instant::now() + BEAT_EVERY;
        while !self.scene.is_done() {
            if Instant::now() >= beat_at {
                beat_at = Instant::now() + BEAT_EVERY;
                if !self.beat(actor, member).await {
                    return Ended::Fenced;
                }
            }
            // Who was not heard for so long may have been replaced.
            if member.beaten.elapsed() < SESSION {
                for queue in member.positions.keys().copied().collect::<Vec<_>>() {
                    if !self.process(actor, member, queue).await {
                        return Ended::Fenced;
                    }
                }
            }
            if !self.scene.is_closing() {
                match actor.rng.random_range(0..100) {
                    0..2 => return Ended::Vanished,
                    2..3 => return Ended::Left,
                    _ => {}
                }
            }
            actor.pause(50..200).await;
        }
        Ended::Left
    }

    /// False when the member is none any more.
    async fn beat(&self, actor: &mut Actor, member: &mut Member) -> bool {
        let before = self.seen.lock().committed.clone();
        let begun = Instant::now();
        let owned = member.positions.keys();
        let owned: Vec<_> = owned.map(|queue| (TOPIC.to_owned(), *queue)).collect();
        let (id, epoch) = (member.id.clone(), member.epoch);
        let called =
            actor
                .call(move |broker| async move {
                    broker.heartbeat(GROUP, &id, epoch, Some(&owned)).await
                })
                .await;
        match called {
            Called::Done(answer) => {
                member.beaten = begun;
                member.epoch = answer.epoch;
                self.told(actor, member, &answer, &before);
                true
            }
            Called::Refused(error) => error.retryable(),
            Called::NotSent | Called::Unknown(_) => true,
        }
    }

    /// Takes over what a member was told to own; `before` was committed before it asked.
    fn told(
        &self,
        actor: &Actor,
        member: &mut Member,
        answer: &MemberAnswer,
        before: &BTreeMap<u32, u64>,
    ) {
        let at = self.tick();
        let mut seen = self.seen.lock();
        let queues: BTreeSet<u32> = answer.assignment.iter().map(|a| a.queue).collect();
        if !member.positions.keys().eq(&queues) {
            let (id, epoch) = (&member.id, member.epoch);
            actor.note(format_args!("{id} has {queues:?} in epoch {epoch}"));
        }
        for AssignedQueue { queue, offset, .. } in &answer.assignment {
            let owner = seen.owners.entry((member.epoch, *queue));
            let owner = owner.or_insert_with(|| member.id.clone()).clone();
            if owner != member.id {
                let (id, epoch) = (&member.id, member.epoch);
                let text = format!("queue {queue} is {owner}'s and {id}'s in epoch {epoch}");
                self.scene.violation(text);
            }
            let latest = seen.latest.get(queue);
            if latest.is_none_or(|(epoch, ..)| *epoch <= member.epoch) {
                let mark = (member.epoch, member.id.clone(), at);
                seen.latest.insert(*queue, mark);
            }
            if let Entry::Vacant(begun) = member.positions.entry(*queue) {
                let committed = before.get(queue).copied().unwrap_or(0);
                if *offset < committed {
                    let text = format!("queue {queue} goes on at {offset} behind {committed}");
                    self.scene.violation(text);
                }
                begun.insert(*offset);
            }
        }
        member.positions.retain(|queue, _| queues.contains(queue));
    }

    /// Reads, processes and commits what is next in a queue. False when the member was fenced.
    async fn process(&self, actor: &mut Actor, member: &mut Member, queue: u32) -> bool {
        let from = member.positions.get(&queue).copied().unwrap_or(0);
        let Some((messages, _)) = actor.page(&(TOPIC.to_owned(), queue), from).await else {
            return true;
        };
        let Some(next) = messages.last().map(|message| message.offset + 1) else {
            return true;
        };
        self.seen
            .lock()
            .processed
            .extend(messages.iter().filter_map(number));
        let begun = self.tick();
        let request = CommitRequest {
            group: GROUP.to_owned(),
            offsets: vec![OffsetCommit {
                topic: TOPIC.to_owned(),
                queue,
                offset: next,
            }],
            member: Some(MemberMark {
                id: member.id.clone(),
                epoch: member.epoch,
            }),
            allow_rewind: false,
        };
        let called = actor
            .call(|broker| async move {
                let result = broker.commit_offsets(request).await?.pop();
                result.map_or(Ok(()), |result| result.map(drop))
            })
            .await;
        let what = format!("{} commits {next} of queue {queue}", member.id);
        match called {
            Called::Done(()) => {
                actor.note(what);
                self.committed(member, queue, next, begun);
                member.positions.insert(queue, next);
                true
            }
            // One of its own that was not answered.
            Called::Refused(BrokerError::OffsetConflict { committed, .. }) => {
                actor.note(format_args!("{what}: {committed} is committed"));
                member.positions.insert(queue, committed);
                true
            }
            Called::Refused(error) if !error.retryable() => {
                actor.note(format_args!("{what}: {error}"));
                self.seen.lock().fenced += 1;
                false
            }
            _ => true,
        }
    }

    fn committed(&self, member: &Member, queue: u32, offset: u64, begun: u64) {
        let mut seen = self.seen.lock();
        seen.commits += 1;
        let other = seen
            .latest
            .get(&queue)
            .filter(|(epoch, id, at)| *id != member.id && *epoch > member.epoch && *at < begun);
        if let Some((epoch, id, _)) = other {
            let (own, was) = (&member.id, member.epoch);
            let text = format!(
                "{own} committed {offset} of queue {queue} in epoch {was}, after {id} had it in {epoch}"
            );
            self.scene.violation(text);
        }
        let last = seen.committed.entry(queue).or_default();
        *last = offset.max(*last);
    }

    /// How many messages are left, where each queue can tell, and the committed offsets, none of them
    /// behind what anybody knew.
    async fn offsets(&self, actor: &mut Actor) -> Option<(Option<u64>, BTreeMap<u32, u64>)> {
        let before = self.seen.lock().committed.clone();
        let called = actor
            .call(|broker| async move { broker.group_offsets(GROUP, Some(TOPIC)).await })
            .await;
        let Called::Done(rows) = called else {
            return None;
        };
        let lag = rows.iter().map(|row| row.behind.map(|behind| behind.lag));
        let lag: Option<u64> = lag.sum();
        let found = rows.iter().map(|row| (row.queue, row.offset.unwrap_or(0)));
        let found: BTreeMap<u32, u64> = found.collect();
        for (queue, committed) in before {
            let now = found.get(&queue).copied().unwrap_or(0);
            if now < committed {
                let text = format!("{committed} was committed of queue {queue}, now it is {now}");
                self.scene.violation(text);
            }
        }
        Some((lag, found))
    }

    async fn watch(self: Arc<Self>, mut actor: Actor) {
        while !self.scene.is_done() {
            actor.pause(300..1500).await;
            if let Some((lag, offsets)) = self.offsets(&mut actor).await {
                actor.note(format_args!("{offsets:?} committed, {lag:?} to go"));
                let mut seen = self.seen.lock();
                for (queue, offset) in offsets {
                    let last = seen.committed.entry(queue).or_default();
                    *last = offset.max(*last);
                }
            }
        }
    }

    fn unprocessed(&self) -> Vec<u64> {
        let (written, seen) = (self.written.lock(), self.seen.lock());
        written.difference(&seen.processed).copied().collect()
    }
}

impl Work for Members {
    fn start(self: Arc<Self>, troupe: &mut Troupe) {
        let writer = troupe.actor("member-writer");
        let acked = self.written.clone();
        troupe.start(write_numbers(writer, TOPIC.to_owned(), 30..200, acked));
        for member in 0..MEMBERS {
            let actor = troupe.actor(format_args!("member-{member}"));
            troupe.start(self.clone().consume(actor));
        }
        let watcher = troupe.actor("member-watcher");
        troupe.start(self.watch(watcher));
    }

    fn open<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, Option<String>> {
        async move {
            let left = self.unprocessed();
            if !left.is_empty() {
                return Some(format!("{left:?} are not processed by any member"));
            }
            match self.offsets(actor).await {
                Some((Some(0), _)) => None,
                offsets => Some(format!("members have to commit: {offsets:?}")),
            }
        }
        .boxed()
    }

    fn judge<'a>(&'a self, actor: &'a mut Actor) -> BoxFuture<'a, ()> {
        async move {
            while self.offsets(actor).await.is_none() {
                actor.pause(50..200).await;
            }
            let (written, seen) = (self.written.lock().len(), self.seen.lock());
            let (processed, joins) = (seen.processed.len(), seen.joins);
            let (commits, fenced) = (seen.commits, seen.fenced);
            actor.note(format_args!(
                "{written} to share, {processed} processed; {joins} joins, {commits} commits, {fenced} fenced"
            ));
        }
        .boxed()
    }
}
