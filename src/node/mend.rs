//! Making damage good without anybody's help.
//!
//! A node that finds damage writes down what it gives up (`quarantine`) and tells the catalog. The
//! catalog places new replicas under new ids where that is safe. This node opens them, empty, and
//! the leader of each group fills them and makes them voters in the lost ones' stead. Every step
//! follows from what the catalog and the groups say, so any of them may be done again, by whoever
//! leads then.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream};
use quorate_raft::{RaftHost, Replica, ReplicaId, Settled};
use quorate_storage::RaftGroupId;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::NodeConfig;
use super::quarantine::Quarantine;
use crate::broker::Broker;
use crate::broker::local::LocalGroups;
use crate::catalog::{
    CATALOG_GROUP, CatalogCommand, CatalogMachine, CatalogReply, CatalogState, GivenUp,
    GroupPlacement, ReplicaState,
};

/// Between two steps while there is something to be made good.
const STEP: Duration = Duration::from_millis(200);
/// Between two looks while there is nothing.
const LOOK: Duration = Duration::from_secs(1);
/// Between two tries to reach the catalog, and two words about that in the log.
const ASK_AGAIN: Duration = Duration::from_millis(500);
const SAY_AGAIN: Duration = Duration::from_secs(30);
/// Groups of which replicas are replaced at the same time: each of them is read and sent as a whole.
const FILLED_AT_ONCE: usize = 16;

/// A group of which this node found its part damaged, and how.
pub(super) type Damage = (RaftGroupId, String);

/// The tasks of one node.
pub(super) struct Mender {
    pub config: NodeConfig,
    pub host: Arc<RaftHost>,
    pub broker: Arc<Broker>,
    pub locals: Arc<LocalGroups>,
    pub quarantine: Arc<Quarantine>,
    pub published: watch::Sender<Arc<CatalogState>>,
    /// Has replicas opened that were closed.
    pub repair: Arc<Notify>,
}

impl Mender {
    pub(super) async fn run(
        self,
        mut damage: mpsc::UnboundedReceiver<Damage>,
        stop: CancellationToken,
        fatal: mpsc::UnboundedSender<String>,
    ) {
        let work = async {
            self.regain_catalog().await?;
            let mut wait = STEP;
            // Found before anyone could say which replica that is.
            let mut unknown: Vec<Damage> = Vec::new();
            loop {
                tokio::select! {
                    found = damage.recv() => match found {
                        Some(found) => unknown.push(found),
                        None => return anyhow::Ok(()),
                    },
                    () = tokio::time::sleep(wait) => {}
                }
                for (group, reason) in std::mem::take(&mut unknown) {
                    match self.replica_here(group) {
                        Some(replica) => self.give_up(group, replica, &reason).await?,
                        None => unknown.push((group, reason)),
                    }
                }
                let state = self.published.borrow().clone();
                let telling = self.tell(&state).await;
                let filling = self.fill(&state).await;
                self.finish(&state)?;
                wait = if telling || filling { STEP } else { LOOK };
            }
        };
        if let Some(Err(error)) = stop.run_until_cancelled(work).await {
            fatal.send(format!("{error:#}")).ok();
        }
    }

    /// Takes a damaged replica out of service, for ever.
    async fn give_up(&self, group: RaftGroupId, replica: ReplicaId, reason: &str) -> Result<()> {
        if !self.can_be_spared(group, replica) {
            return self.keep(group, reason).await;
        }
        if !self.quarantine.give_up(group, replica, reason)? {
            self.quarantine.begin_anew(group);
            return Ok(());
        }
        self.locals.remove(group.0);
        self.host.close_group(group, false).await.ok();
        match group == CATALOG_GROUP {
            true => self.regain_catalog().await,
            false => Ok(()),
        }
    }

    /// Whether the others are a sound majority without this replica. Its bad bytes are gone, but it
    /// has not forgotten what it voted: where nobody could fill it again, it stays.
    fn can_be_spared(&self, group: RaftGroupId, replica: ReplicaId) -> bool {
        let state = self.published.borrow();
        let Some(placement) = state.placement(group).filter(|p| !p.replicas.is_empty()) else {
            return self.config.nodes.len() > 2;
        };
        let others = placement.replicas.iter();
        let sound = others.filter(|r| r.replica != replica && r.state == ReplicaState::Sound);
        sound.count() >= placement.majority()
    }

    /// Lets a damaged replica go on with what is good of it. Meeting the damage again ends it again.
    async fn keep(&self, group: RaftGroupId, reason: &str) -> Result<()> {
        if group == CATALOG_GROUP {
            anyhow::bail!(
                "the catalog's replica here is damaged and no majority of sound ones is left to fill it: {reason}; restore that file"
            );
        }
        tracing::error!(%group, reason, "a replica is damaged and the others are too few to fill it: it goes on with what is good of it; restore the file, or wait until the others are sound");
        self.locals.remove(group.0);
        self.host.close_group(group, false).await.ok();
        self.quarantine.begin_anew(group);
        self.repair.notify_one();
        Ok(())
    }

    fn replica_here(&self, group: RaftGroupId) -> Option<ReplicaId> {
        if let Some(open) = self.host.group(group) {
            return Some(open.replica());
        }
        if group == CATALOG_GROUP {
            return Some(self.quarantine.catalog_replica());
        }
        let state = self.published.borrow();
        let place = state.placement(group)?.replica_on(self.config.node_id)?;
        Some(place.replica)
    }

    /// Has the others place a new replica of the catalog here, if this node has none to open.
    async fn regain_catalog(&self) -> Result<()> {
        let Some(reason) = self.quarantine.lost_catalog() else {
            return Ok(());
        };
        let own = self.config.node_id;
        let catalog = loop {
            let what = self.quarantine.to_regain_catalog();
            let catalog = self.ask_to_give_up(what, &reason).await;
            let place = catalog.replica_on(own);
            if place.is_some_and(|place| place.state != ReplicaState::Lost) {
                break catalog;
            }
            // Another node's replica of the catalog has to be filled first.
            tokio::time::sleep(ASK_AGAIN).await;
        };
        let place = catalog
            .replica_on(own)
            .context("the catalog has no replica on this node")?;
        self.host.close_group(CATALOG_GROUP, true).await?;
        self.quarantine.regained_catalog(place.replica)?;
        self.quarantine.begin_anew(CATALOG_GROUP);
        let spec = super::catalog_spec(&self.config, &replicas_of(&catalog));
        let machine = Box::new(CatalogMachine::new(self.published.clone()));
        self.host
            .open_group(spec, machine)
            .await
            .context("cannot open the new replica of the catalog")?;
        Ok(())
    }

    async fn ask_to_give_up(&self, what: GivenUp, reason: &str) -> GroupPlacement {
        let command = CatalogCommand::GiveUp {
            node: self.config.node_id,
            what,
        };
        let mut said: Option<Instant> = None;
        loop {
            match self.broker.change_catalog(&command).await {
                Ok(CatalogReply::GivenUp { catalog }) => return catalog,
                answer => {
                    if said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                        said = Some(Instant::now());
                        tracing::warn!(
                            ?answer,
                            reason,
                            "this node is damaged and waits for a majority of the others to fill it; if they are damaged too, restore the files named above and start the node again"
                        );
                    }
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Tells the catalog of replicas that it still counts on. True if there are any.
    async fn tell(&self, state: &CatalogState) -> bool {
        let lost = self.quarantine.untold(state);
        if lost.is_empty() {
            return false;
        }
        let command = CatalogCommand::GiveUp {
            node: self.config.node_id,
            what: GivenUp::Some(lost),
        };
        if let Err(error) = self.broker.change_catalog(&command).await {
            tracing::debug!(%error, "the catalog was not told of damage yet");
        }
        true
    }

    /// Does the next step for every group led here that has a replica to be filled. True while
    /// there are any in the cluster.
    async fn fill(&self, state: &CatalogState) -> bool {
        let unfilled: Vec<&GroupPlacement> = state
            .all_placements()
            .filter(|p| p.count(ReplicaState::Filling) > 0)
            .collect();
        stream::iter(&unfilled)
            .for_each_concurrent(FILLED_AT_ONCE, |placement| self.fill_group(placement))
            .await;
        !unfilled.is_empty()
    }

    async fn fill_group(&self, placement: &GroupPlacement) {
        let Some(group) = self.host.group(placement.id()) else {
            return;
        };
        if !group.is_leader() {
            // A quiet group may not have noticed that the replica that led it is the lost one.
            group.check_leader().await;
            return;
        }
        match group.settle_members(&replicas_of(placement)).await {
            Settled::Yes => {}
            settled => {
                tracing::debug!(group = %placement.id(), ?settled, "replicas are not replaced yet");
                return;
            }
        }
        let filling = |r: &&crate::catalog::ReplicaPlace| r.state == ReplicaState::Filling;
        for place in placement.replicas.iter().filter(filling) {
            let command = CatalogCommand::Filled {
                group: placement.group,
                replica: place.replica,
            };
            if let Err(error) = self.broker.change_catalog(&command).await {
                tracing::debug!(%error, "the catalog was not told of a filled replica yet");
            }
        }
    }

    /// Cleans up when what this node gave up was made good.
    fn finish(&self, state: &CatalogState) -> Result<()> {
        let forgot = self.quarantine.forget_succeeded(state)?;
        let own = self.config.node_id;
        let here = state.all_placements().filter_map(|p| p.replica_on(own));
        let mut unsound = here.filter(|place| place.state != ReplicaState::Sound);
        if self.quarantine.gave_up_log()
            && self.quarantine.is_known_to(state)
            && unsound.next().is_none()
        {
            self.quarantine.made_good()?;
        } else if forgot {
            tracing::info!("a damaged replica of this node was replaced");
        }
        Ok(())
    }
}

/// Lost ones included: they are members until their successors are.
pub(super) fn replicas_of(placement: &GroupPlacement) -> Vec<Replica> {
    let replica = |place: &crate::catalog::ReplicaPlace| Replica {
        replica: place.replica,
        node: place.node,
    };
    placement.replicas.iter().map(replica).collect()
}
