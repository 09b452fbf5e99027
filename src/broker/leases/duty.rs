//! What must happen to leases though nobody asks: they end, messages die, dead letters move on, and
//! deleted topics are forgotten. For each coordinator that this node leads; asleep until one is due.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::broken;
use crate::broker::Broker;
use crate::broker::batcher::now_ms;
use crate::broker::local::LocalCoordinator;
use crate::coordinator::leases::{LeaseCommand, LeaseReply};
use crate::peer::PeerResult;

/// How soon a coordinator that this node comes to lead is looked after.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// Consumers that wait take what is due themselves; only what they leave needs a command.
const GRACE_MS: u64 = 50;
/// Before what failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Between two looks, however much is due.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// Watches which coordinators this node leads, and looks after those.
pub(in crate::broker) fn start(broker: &Arc<Broker>) {
    let broker = Arc::downgrade(broker);
    tokio::spawn(async move {
        let mut keepers: HashMap<u32, (u64, JoinHandle<()>)> = HashMap::new();
        while let Some(running) = broker.upgrade() {
            let mut led = BTreeSet::new();
            for (number, local) in running.local.coordinators() {
                if !local.group.is_leader() || local.soundness.broken().is_some() {
                    continue;
                }
                led.insert(number);
                let term = local.group.term();
                let kept = keepers.get(&number);
                if kept.is_none_or(|(kept, task)| *kept != term || task.is_finished()) {
                    let keeper = tokio::spawn(keep(broker.clone(), local));
                    if let Some((_, old)) = keepers.insert(number, (term, keeper)) {
                        old.abort();
                    }
                }
            }
            keepers.retain(|number, (_, task)| {
                let leads = led.contains(number);
                if !leads {
                    task.abort();
                }
                leads
            });
            drop(running);
            tokio::time::sleep(LOOK_AROUND).await;
        }
        for (_, task) in keepers.into_values() {
            task.abort();
        }
    });
}

/// Brings the dead letters of a coordinator's groups to their topics, each group's in a task of its
/// own: one group's trouble is not the others'. They end with it.
#[derive(Default)]
struct Forwarders {
    tasks: JoinSet<()>,
    busy: Arc<Mutex<HashSet<String>>>,
}

impl Forwarders {
    fn start(&mut self, broker: &Arc<Broker>, local: &Arc<LocalCoordinator>, group: String) {
        while self.tasks.try_join_next().is_some() {}
        if !self.busy.lock().insert(group.clone()) {
            return;
        }
        let (broker, local) = (Arc::downgrade(broker), local.clone());
        let busy = self.busy.clone();
        self.tasks.spawn(async move {
            while let Some(running) = broker.upgrade() {
                let Err(error) = running.forward_dead_letters(&local, &group).await else {
                    break;
                };
                tracing::debug!(group, %error, "dead letters are forwarded again soon");
                drop(running);
                tokio::time::sleep(RETRY).await;
            }
            busy.lock().remove(&group);
            // Who died after the last look was not begun with as long as this one was busy.
            local.view.signals().alarm(0);
        });
    }
}

/// Looks after one coordinator as long as this node leads it.
async fn keep(broker: Weak<Broker>, local: Arc<LocalCoordinator>) {
    let signals = local.view.signals();
    let mut forwarders = Forwarders::default();
    loop {
        let Some(running) = broker.upgrade() else {
            return;
        };
        if !local.group.is_leader() {
            return;
        }
        // What comes from here on counts anew.
        signals.disarm();
        let retry = match running.look_after(&local, &mut forwarders).await {
            Ok(()) => None,
            Err(error) => {
                tracing::debug!(%error, "leases are looked after again soon");
                Some(Instant::now() + RETRY)
            }
        };
        drop(running);
        tokio::time::sleep(PAUSE).await;
        loop {
            let due_ms = signals.alarm_ms();
            let wait_ms = due_ms.saturating_add(GRACE_MS).saturating_sub(now_ms());
            let wait = Duration::from_millis(wait_ms).min(LONGEST_SLEEP);
            let wake = Instant::now() + if due_ms == 0 { Duration::ZERO } else { wait };
            tokio::select! {
                () = tokio::time::sleep_until(retry.map_or(wake, |retry| retry.min(wake))) => break,
                () = signals.alarmed() => {}
            }
        }
    }
}

impl Broker {
    async fn look_after(
        self: &Arc<Self>,
        local: &Arc<LocalCoordinator>,
        forwarders: &mut Forwarders,
    ) -> PeerResult<()> {
        let fail = |cause| broken(local, cause);
        self.forget_deleted_topics(local).await?;
        let now_ms = now_ms().max(local.view.log_time_ms().map_err(fail)?);
        let overdue_since = now_ms.saturating_sub(GRACE_MS);
        let (overdue, next) = local.view.overdue_groups(overdue_since).map_err(fail)?;
        if let Some(due_ms) = next {
            local.view.signals().arm(due_ms);
        }
        for group in overdue {
            while let LeaseReply::More = self
                .lease_command_here(local, &group, LeaseCommand::Expire)
                .await?
            {}
        }
        let groups = local.view.groups_with_dead_letters().map_err(fail)?;
        for group in groups {
            forwarders.start(self, local, group);
        }
        Ok(())
    }

    async fn forget_deleted_topics(&self, local: &LocalCoordinator) -> PeerResult<()> {
        let catalog = self.catalog();
        let leased = local.view.leased_queues();
        let leased = leased.map_err(|cause| broken(local, cause))?;
        let deleted = leased.into_iter().map(|(group, topic, _)| (group, topic));
        let deleted = deleted.filter(|(_, topic)| catalog.was_deleted(*topic));
        for (group, topic) in deleted.collect::<BTreeSet<_>>() {
            while let LeaseReply::More = self
                .lease_command_here(local, &group, LeaseCommand::ForgetTopic { topic })
                .await?
            {}
        }
        Ok(())
    }
}
