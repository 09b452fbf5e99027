//! The duty of whoever leads a coordinator: expel members that were silent for too long, tell groups of
//! what became of their topics, and forget what they have committed in topics that are no more. It
//! sleeps until something is due.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use quorate_raft::RaftEvent;
use quorate_storage::RaftGroupId;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until};

use super::leader::{PROOF, membership, read};
use super::seat::shapes;
use super::sessions::Overdue;
use crate::broker::Broker;
use crate::broker::local::LocalCoordinator;
use crate::catalog::{GroupOwner, TopicId};
use crate::coordinator::{CoordinatorCommand, CoordinatorView, Membership};
use crate::peer::{PeerError, PeerResult};

/// How long one step may wait for a majority.
const PATIENCE: Duration = Duration::from_secs(2);
/// Attempts at the first proof of a new leadership.
const TRIES: u32 = 5;
/// A process that wakes this much later than it wanted to was stopped, and heard nobody meanwhile.
const OVERSLEPT: Duration = Duration::from_secs(1);
/// Between two looks at everything, should an event ever have been missed.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

enum News {
    /// A session may be over.
    Due(Instant),
    Topics,
    /// This node may have begun to lead a coordinator.
    Leads(u32),
    Everything,
    Nothing,
}

/// By coordinator: in which term and after how many deletions nothing was left of deleted topics.
type Forgotten = HashMap<u32, (u64, u64)>;

/// Runs the duty until the broker goes.
pub(in crate::broker) fn start(broker: &Arc<Broker>) {
    let (mut raft, mut catalog) = (broker.host.events(), broker.catalog.clone());
    let (node, sessions) = (broker.node_id(), broker.sessions.clone());
    let broker = Arc::downgrade(broker);
    tokio::spawn(async move {
        let mut look_again = Instant::now() + LOOK_AGAIN;
        let mut forgotten = Forgotten::new();
        loop {
            let due = sessions.next_due();
            let over = async {
                match due {
                    Some(due) => {
                        let due = due.max(Instant::now());
                        sleep_until(due).await;
                        News::Due(due)
                    }
                    None => std::future::pending().await,
                }
            };
            let news = tokio::select! {
                news = over => news,
                () = sessions.wake.notified() => News::Nothing,
                changed = catalog.changed() => match changed {
                    Ok(()) => News::Topics,
                    Err(_) => return,
                },
                event = raft.recv() => match event {
                    Ok(RaftEvent::LeaderElected { group, node: leader, .. }) if leader == node => {
                        coordinator_in(&broker, group).map_or(News::Nothing, News::Leads)
                    }
                    Ok(_) => News::Nothing,
                    Err(RecvError::Lagged(_)) => News::Everything,
                    Err(RecvError::Closed) => return,
                },
                () = sleep_until(look_again) => News::Everything,
            };
            if let News::Everything = news {
                look_again = Instant::now() + LOOK_AGAIN;
            }
            let Some(broker) = broker.upgrade() else {
                return;
            };
            let may_be_more = matches!(news, News::Topics | News::Leads(_) | News::Everything);
            broker.tend_groups(news).await;
            if may_be_more {
                broker.forget_deleted(&mut forgotten).await;
            }
        }
    });
}

fn coordinator_in(broker: &Weak<Broker>, group: RaftGroupId) -> Option<u32> {
    match broker.upgrade()?.catalog().owner(group)? {
        GroupOwner::Coordinator(number) => Some(number),
        _ => None,
    }
}

impl Broker {
    async fn tend_groups(&self, news: News) {
        match news {
            News::Nothing => {}
            News::Due(due) if Instant::now() > due + OVERSLEPT => self.sessions.renew(None),
            News::Due(_) => {
                let overdue = self.sessions.overdue(Instant::now()).into_iter();
                join_all(overdue.map(|overdue| self.expel(overdue))).await;
            }
            News::Topics => {
                let led = self.coordinators_led_here().into_iter();
                join_all(led.map(|number| async move {
                    for group in self.sessions.groups_of(number) {
                        self.show_topics(number, &group).await;
                    }
                }))
                .await;
            }
            News::Leads(number) => self.take_over(number).await,
            News::Everything => {
                let led = self.coordinators_led_here().into_iter();
                let used = led.filter(|number| self.has_members(*number));
                join_all(used.map(|number| self.take_over(number))).await;
            }
        }
    }

    fn coordinators_led_here(&self) -> Vec<u32> {
        let all = self.local.coordinators().into_iter();
        let led = all.filter(|(_, c)| c.group.is_leader());
        led.map(|(number, _)| number).collect()
    }

    fn has_members(&self, number: u32) -> bool {
        let local = self.local.coordinator(number);
        let groups = local.map(|local| read(&local, CoordinatorView::memberships));
        matches!(groups, Some(Ok(groups)) if !groups.is_empty())
    }

    /// Begins the sessions of all members that are not watched yet.
    async fn take_over(&self, number: u32) {
        let mut tries = 0..TRIES;
        let local = loop {
            match self.proved_coordinator(number, PATIENCE).await {
                Ok(local) => break local,
                // A leader that has just begun may need a moment to prove it.
                Err(PeerError::NotLeader { leader: None }) if tries.next().is_some() => {}
                Err(_) => return,
            }
        };
        let Ok(groups) = read(&local, |view| view.memberships()) else {
            return;
        };
        for (group, membership) in groups {
            let term = local.group.term();
            self.sessions.see(number, term, &group, &membership, None);
            self.show_topics(number, &group).await;
        }
    }

    /// Ends the memberships of those that were silent for too long.
    async fn expel(&self, overdue: Overdue) {
        let number = overdue.coordinator;
        let asked = Instant::now();
        let local = match self.proved_coordinator(number, PATIENCE).await {
            Ok(local) => local,
            Err(PeerError::NotLeader { leader: Some(_) }) => {
                self.sessions.forget(number);
                return;
            }
            Err(_) => {
                // Without a majority nobody is answered; that is not the members' fault.
                self.sessions.renew(Some(number));
                return;
            }
        };
        // A majority that was not here for this was not here for the members; nor was this node, if it
        // lost its leadership and has it again.
        if asked.elapsed() > PROOF || local.group.term() != overdue.term {
            self.sessions.renew(Some(number));
            return;
        }
        let Some(Overdue { group, members, .. }) = self.sessions.still(overdue) else {
            return;
        };
        tracing::info!(group, ?members, "members were not heard of in time");
        let command = CoordinatorCommand::RemoveMembers {
            group: group.clone(),
            members,
        };
        let done = self.change(number, &local, &group, &command).await;
        if let Err(error) = done {
            tracing::debug!(group, %error, "expelling members is tried again");
            self.sessions.renew(Some(number));
        }
    }

    /// Tells a group what became of the topics it subscribes to, if it doesn't know yet.
    async fn show_topics(&self, number: u32, group: &str) {
        let shown = async {
            let local = self.proved_coordinator(number, PATIENCE).await?;
            let known = membership(&local, group)?;
            let seen = shapes(&self.catalog(), known.topics.keys());
            let news = known.topics.iter().any(|(name, shape)| {
                let seen = seen.get(name).filter(|s| s.version >= shape.version);
                seen.is_some_and(|s| s.found != shape.found)
            });
            if !news {
                return Ok(());
            }
            let command = CoordinatorCommand::SeeTopics {
                group: group.to_owned(),
                topics: seen,
            };
            self.change(number, &local, group, &command).await
        };
        if let Err(error) = shown.await {
            tracing::debug!(group, %error, "its topics are looked at again later");
        }
    }

    /// Looks through what was committed only where a topic was deleted since the last time.
    async fn forget_deleted(&self, forgotten: &mut Forgotten) {
        let deleted = self.catalog().deleted_topics();
        for number in self.coordinators_led_here() {
            let Some(local) = self.local.coordinator(number) else {
                continue;
            };
            let now = (local.group.term(), deleted);
            if forgotten.get(&number) == Some(&now) {
                continue;
            }
            match self.forget_in(number).await {
                Ok(()) => drop(forgotten.insert(number, now)),
                Err(error) => tracing::debug!(number, %error, "deleted topics are forgotten later"),
            }
        }
    }

    async fn forget_in(&self, number: u32) -> PeerResult<()> {
        let catalog = self.catalog();
        if catalog.deleted_topics() == 0 {
            return Ok(());
        }
        let local = self.proved_coordinator(number, PATIENCE).await?;
        let committed = read(&local, CoordinatorView::committed_topics)?;
        let mut gone: BTreeMap<String, BTreeSet<TopicId>> = BTreeMap::new();
        for (group, topic) in committed {
            if catalog.was_deleted(topic) {
                gone.entry(group).or_default().insert(topic);
            }
        }
        for (group, topics) in gone {
            let command = CoordinatorCommand::ForgetTopics { group, topics };
            self.propose_group(&local, &command, PATIENCE).await?;
        }
        Ok(())
    }

    async fn change(
        &self,
        number: u32,
        local: &LocalCoordinator,
        group: &str,
        command: &CoordinatorCommand,
    ) -> PeerResult<()> {
        self.propose_group(local, command, PATIENCE).await?;
        let now: Membership = membership(local, group)?;
        let term = local.group.term();
        self.sessions.see(number, term, group, &now, None);
        Ok(())
    }
}
