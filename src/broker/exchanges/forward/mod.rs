//! The duty of forwarding: one task for each queue of an exchange that is led by this node.

mod bring;
mod chunk;
mod forwarder;
mod lanes;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use quorate_raft::RaftEvent;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use super::super::Broker;
use forwarder::{Forwarder, Source};

/// Between two looks, while there are exchanges: a queue may be led before it is open for use.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Before a task that ended is started again.
const PAUSE: Duration = Duration::from_millis(100);

impl Broker {
    /// Forwards what this node's queues of exchanges hold, for as long as it is polled.
    pub(crate) async fn forward_exchanges(self: Arc<Self>) {
        let mut events = self.host.events();
        let mut catalog = self.catalog.clone();
        let mut tasks = JoinSet::new();
        let mut running: HashMap<u64, AbortHandle> = HashMap::new();
        loop {
            let any = self.look_after_forwarders(&mut tasks, &mut running);
            loop {
                tokio::select! {
                    event = events.recv() => match event {
                        Ok(RaftEvent::LeaderElected { .. } | RaftEvent::LeaderLost { .. })
                            if any => break,
                        Ok(_) => {}
                        Err(RecvError::Lagged(_)) => break,
                        Err(RecvError::Closed) => return,
                    },
                    changed = catalog.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    Some(_) = tasks.join_next() => {
                        sleep(PAUSE).await;
                        break;
                    }
                    () = sleep(LOOK_AGAIN), if any => break,
                }
            }
        }
    }

    /// Starts and ends tasks; true when there are exchanges at all.
    fn look_after_forwarders(
        self: &Arc<Self>,
        tasks: &mut JoinSet<()>,
        running: &mut HashMap<u64, AbortHandle>,
    ) -> bool {
        let catalog = self.catalog();
        let mut wanted = HashMap::new();
        for exchange in catalog.exchanges.values() {
            let Some(store) = catalog.topics.get(&exchange.store) else {
                continue;
            };
            for (number, placement) in (0..).zip(&store.queues) {
                let local = self.local.queue(placement.group);
                if let Some(local) = local.filter(|queue| queue.group.is_leader()) {
                    let source = Source {
                        exchange: exchange.name.clone(),
                        store: store.id,
                        queue: number,
                    };
                    wanted.insert(placement.group, (local, source));
                }
            }
        }
        running.retain(|group, task| {
            // What it has under way is known to the queues it writes to.
            if !wanted.contains_key(group) {
                task.abort();
            }
            !task.is_finished() && wanted.contains_key(group)
        });
        for (group, (local, source)) in wanted {
            running.entry(group).or_insert_with(|| {
                let forwarder = Forwarder::new(self.clone(), local, source);
                tasks.spawn(forwarder.run())
            });
        }
        !catalog.exchanges.is_empty()
    }
}
