//! Who leads what: elections after deaths, an even spread, and handing over at shutdown.
//!
//! openraft's timers are off, so an idle group costs nothing and every election is started here.
//! Three things start one:
//!
//! - **A death.** When a majority of the nodes agrees that a node is gone, every survivor voids the
//!   promises its replicas gave to leaders there, tells the others the ends of its logs, and stands
//!   in the groups in which its own log is the longest.
//! - **A group without a leader**, whatever the reason: candidates are tried in turn, the preferred
//!   one first, each a little later than the one before, and with more time each where time was
//!   short (`turns`).
//! - **A better place.** A leader hands over to the preferred node once that node has been up for a
//!   while (`uptime`), holds the log and answers quickly.
//!
//! All of it is about speed and never about safety: votes still need a majority and a log that is
//! up to date, and no read trusts a lease.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use quorate_storage::{LogId, RaftGroupId};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::group::Group;
use crate::host::{RaftEvent, RaftHost};
use crate::link::{PeerEvent, RefuseCode};
use crate::liveness::{LivenessEvent, PeerState};
use crate::serve::Groups;
use crate::tail_guard::{TailReport, TailVerdict, judge};
use crate::turns::{Sight, Turns, growth};
use crate::types::NodeId;
use crate::uptime::Uptime;
use crate::wire::{Answer, ToReplica, class, decode, encode};

/// How often groups are looked over. Deaths do not wait for it.
const SWEEP: Duration = Duration::from_millis(50);
/// How long the others may take to say whether they lead, unless they proved slow.
pub(crate) const ASK_PATIENCE: Duration = Duration::from_millis(200);
/// Elections started at the same time after a death.
const ELECTIONS_AT_ONCE: usize = 256;
/// How long a survivor waits for the others' log ends before it goes by what it has.
const FAILOVER_PATIENCE: Duration = Duration::from_millis(100);
const FIRST_ELECTION_RETRY: Duration = Duration::from_millis(10);
const FIRST_ELECTION_TRIES: usize = 50;
/// Leaderships handed to their preferred node in one second.
const REBALANCE_PER_SECOND: usize = 16;
/// A preferred node this many entries behind is not given the leadership yet.
const REBALANCE_LAG_MAX: u64 = 256;

/// "A majority holds `dead` to be gone; where do your logs of these groups end?"
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FailoverRequest {
    pub(crate) dead: NodeId,
    pub(crate) groups: Vec<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FailoverAnswer {
    pub(crate) ends: Vec<(u64, Option<(u64, u64)>)>,
}

/// Starts the tasks that keep every group led.
pub(crate) fn start(host: &Arc<RaftHost>) {
    tokio::spawn(follow_liveness(host.clone()));
    tokio::spawn(follow_refusals(host.clone()));
    tokio::spawn(sweep(host.clone()));
}

async fn follow_liveness(host: Arc<RaftHost>) {
    let mut events = host.peers.liveness().events();
    loop {
        let event = tokio::select! {
            () = host.stop.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            Ok(LivenessEvent::Dead { node, .. }) => {
                host.events.send(RaftEvent::NodeDown { node }).ok();
                tracing::warn!(node, "a majority agrees that the node is gone");
                tokio::spawn(fail_over(host.clone(), node));
            }
            Ok(LivenessEvent::Alive { node, .. }) => {
                host.events.send(RaftEvent::NodeUp { node }).ok();
                tracing::info!(node, "node is up");
                tokio::spawn(greet(host.clone(), node));
            }
            Ok(LivenessEvent::Suspect { node, .. }) => tracing::info!(node, "node is silent"),
            // The sweep catches whatever was missed here.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// A node has come: what is led here is sent to it at once, and it is asked for what it leads. What
/// an earlier process of it led was given up when that process was found dead.
async fn greet(host: Arc<RaftHost>, node: NodeId) {
    let groups = stream::iter(host.groups());
    groups
        .for_each_concurrent(ELECTIONS_AT_ONCE, |group| async move {
            if group.is_leader() {
                group.reset_backoff(node).await;
            } else if group.leader().is_none() {
                group.ask_who_leads(ASK_PATIENCE).await;
            }
        })
        .await;
}

/// A peer that knows this node's id with another disk will never let it in.
async fn follow_refusals(host: Arc<RaftHost>) {
    let mut events = host.peers.link().events();
    loop {
        let event = tokio::select! {
            () = host.stop.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            Ok(PeerEvent::Refused {
                node,
                code: RefuseCode::KnownIdOtherDisk,
                text: reason,
            }) => {
                host.events.send(RaftEvent::Refused { node, reason }).ok();
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Elects new leaders for all groups that the dead node led.
async fn fail_over(host: Arc<RaftHost>, dead: NodeId) {
    let began = Instant::now();
    let mut orphans = host.groups();
    orphans.retain(|group| group.last_known_leader() == Some(dead));
    join_all(orphans.iter().map(|group| group.void_lease(dead))).await;
    orphans.retain(Group::may_stand);
    if orphans.is_empty() {
        return;
    }
    let request = encode(&FailoverRequest {
        dead,
        groups: orphans.iter().map(|group| group.id().0).collect(),
    });
    let others: Vec<NodeId> = host
        .config
        .nodes
        .iter()
        .map(|(node, _)| *node)
        .filter(|node| *node != dead && *node != host.config.node_id)
        .filter(|node| host.peers.liveness().state(*node) == PeerState::Up)
        .collect();
    let answers = join_all(others.into_iter().map(|node| {
        let (link, request) = (host.peers.link().clone(), request.clone());
        async move {
            let answer = link
                .call(node, class::FAILOVER, 0, request, FAILOVER_PATIENCE)
                .await;
            let answer: FailoverAnswer = decode(&answer.ok()?).ok()?;
            Some((node, answer.ends))
        }
    }))
    .await;
    let mut best: HashMap<u64, (Option<LogId>, NodeId)> = HashMap::new();
    for (node, ends) in answers.into_iter().flatten() {
        for (group, end) in ends {
            let candidate = (end.map(|(term, index)| LogId::new(term, index)), node);
            let entry = best.entry(group).or_insert(candidate);
            if longer(candidate, *entry) {
                *entry = candidate;
            }
        }
    }
    let mine: Vec<Group> = orphans
        .into_iter()
        .filter(|group| {
            let own = (group.last_log(), host.config.node_id);
            best.get(&group.id().0)
                .is_none_or(|other| longer(own, *other))
        })
        .collect();
    let stood = mine.len();
    stream::iter(mine)
        .for_each_concurrent(ELECTIONS_AT_ONCE, |group| async move {
            group.stand_for_election().await
        })
        .await;
    tracing::info!(dead, stood, elapsed = ?began.elapsed(), "stood for election after a death");
}

/// Whether the first candidate's log is longer; between equals the lower node id stands.
fn longer(a: (Option<LogId>, NodeId), b: (Option<LogId>, NodeId)) -> bool {
    (a.0, std::cmp::Reverse(a.1)) > (b.0, std::cmp::Reverse(b.1))
}

/// The other survivor's side: void, then say where the logs end.
pub(crate) async fn answer_failover(groups: &dyn Groups, body: Bytes) -> Bytes {
    let Ok(request) = decode::<FailoverRequest>(&body) else {
        return Bytes::new();
    };
    let found: Vec<Group> = request
        .groups
        .iter()
        .filter_map(|group| groups.find(RaftGroupId(*group)))
        .collect();
    join_all(found.iter().map(|group| group.void_lease(request.dead))).await;
    // A replica that must not stand has no end to offer.
    let end = |group: &Group| {
        let sound = Some(group).filter(|group| group.may_stand())?;
        sound.last_log().map(|id| (id.term, id.index))
    };
    encode(&FailoverAnswer {
        ends: found
            .iter()
            .map(|group| (group.id().0, end(group)))
            .collect(),
    })
}

/// What the sweep remembers of one group.
#[derive(Debug, Default)]
struct Watch {
    leader: Option<(NodeId, u64)>,
    turns: Turns,
    /// Of a replica whose tail is in doubt: it is judged and does not stand.
    leaderless_since: Option<Instant>,
    judged: u32,
    failed: bool,
    /// The attempt to give away a leadership that is of no use.
    stuck: Option<JoinHandle<()>>,
}

async fn sweep(host: Arc<RaftHost>) {
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watches: HashMap<RaftGroupId, Watch> = HashMap::new();
    let mut uptimes: HashMap<NodeId, Uptime> = HashMap::new();
    let mut rebalance_at = Instant::now() + host.config.rebalance_after;
    loop {
        tokio::select! {
            () = host.stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = Instant::now();
        let groups = host.groups();
        watches.retain(|id, _| host.group(*id).is_some());
        for group in &groups {
            let watch = watches.entry(group.id()).or_default();
            note_failure(&host, group, watch);
            note_leader(&host, group, watch);
            if group.is_stuck() {
                if watch.stuck.as_ref().is_none_or(JoinHandle::is_finished) {
                    let group = group.clone();
                    watch.stuck = Some(tokio::spawn(async move { group.give_away().await }));
                }
            } else if watch.leader.is_some() {
                watch.turns.end();
                watch.leaderless_since = None;
                watch.judged = 0;
            } else if group.tail().is_suspect() {
                let since = *watch.leaderless_since.get_or_insert(now);
                if now >= since + host.config.election_retry * (watch.judged + 1) {
                    watch.judged += 1;
                    tokio::spawn(judge_tail(host.clone(), group.clone(), now - since));
                }
            } else if watch.turns.has_come(sight(&host, group, now)) {
                tokio::spawn(attempt(host.clone(), group.clone()));
            }
        }
        for (node, _) in &host.config.nodes {
            let liveness = host.peers.liveness();
            let up = liveness.state(*node) == PeerState::Up;
            let uptime = uptimes.entry(*node);
            let uptime = uptime.or_insert_with(|| Uptime::new(host.config.rebalance_after));
            uptime.note(up, liveness.incarnation(*node), now);
        }
        if now >= rebalance_at {
            rebalance_at = now + Duration::from_secs(1);
            rebalance(&host, &groups, |node| {
                uptimes
                    .get(&node)
                    .is_some_and(|uptime| uptime.is_settled(now))
            });
        }
    }
}

fn note_failure(host: &RaftHost, group: &Group, watch: &mut Watch) {
    if watch.failed {
        return;
    }
    if let Some(reason) = group.failure() {
        tracing::error!(group = %group.id(), reason, "a group ended by itself");
        watch.failed = true;
        let group = group.id();
        host.events.send(RaftEvent::Failed { group, reason }).ok();
    }
}

fn note_leader(host: &RaftHost, group: &Group, watch: &mut Watch) {
    let leader = group.leader().map(|node| (node, group.term()));
    if leader == watch.leader {
        return;
    }
    let event = match (watch.leader, leader) {
        (_, Some((node, term))) => RaftEvent::LeaderElected {
            group: group.id(),
            node,
            term,
        },
        (Some((node, term)), None) => RaftEvent::LeaderLost {
            group: group.id(),
            node,
            term,
        },
        (None, None) => return,
    };
    watch.leader = leader;
    host.events.send(event).ok();
}

/// What this replica's turn depends on. The first candidate waits, too, if only for a sweep: a leader
/// elsewhere may just not be known here yet.
fn sight(host: &RaftHost, group: &Group, now: Instant) -> Sight {
    let preferred = group.spec().preferred;
    let mut order: Vec<NodeId> = group.replicas().iter().map(|r| r.node).collect();
    order.retain(|node| *node == host.config.node_id || host.peers.may_be_alive(*node));
    order.sort_by_key(|node| (*node != preferred, *node));
    let own = order.iter().position(|node| *node == host.config.node_id);
    Sight {
        now,
        term: group.term(),
        turn: host.config.election_retry * grown(group),
        rank: own.unwrap_or(0) as u32,
        candidates: order.len() as u32,
    }
}

fn grown(group: &Group) -> u32 {
    growth(group.term(), group.last_log().map_or(0, |id| id.term))
}

async fn attempt(host: Arc<RaftHost>, group: Group) {
    let term = group.term();
    let led = group.ask_who_leads(ASK_PATIENCE * grown(&group)).await;
    // A new term is another candidate's turn.
    if led.is_some_and(|led| led >= term) || group.leader().is_some() || group.term() != term {
        return;
    }
    if let Some(dead) = group.last_known_leader()
        && !host.peers.may_be_alive(dead)
    {
        group.void_lease(dead).await;
    }
    group.stand_for_election().await;
}

/// A suspect replica's turn: may it go on, because sound ones cannot form a majority any more?
async fn judge_tail(host: Arc<RaftHost>, group: Group, waited: Duration) {
    // A leader has all that was committed, and sends what is missing here.
    let led = group.ask_who_leads(ASK_PATIENCE * grown(&group)).await;
    if led.is_some_and(|term| term >= group.term()) {
        return;
    }
    let own = group.tail_report();
    let replicas = group.voters();
    let others = replicas
        .iter()
        .filter(|r| r.node != host.config.node_id)
        .map(|r| {
            let request = encode(&ToReplica {
                target: r.replica,
                body: (),
            });
            let (link, node, group) = (host.peers.link().clone(), r.node, group.id().0);
            async move {
                let answer = link
                    .call(node, class::TAIL, group, request, FAILOVER_PATIENCE)
                    .await;
                decode::<Answer<TailReport>>(&answer.ok()?).ok()?.ok()
            }
        });
    let reports: Vec<TailReport> = join_all(others).await.into_iter().flatten().collect();
    if let TailVerdict::GoOn { stand } = judge(own, &reports, replicas.len(), waited) {
        tracing::warn!(
            group = %group.id(),
            "the machines of a majority crashed; messages acknowledged without fsync may be lost"
        );
        group.tail().go_on_without();
        if stand {
            group.stand_for_election().await;
        }
    }
}

/// A new group's followers open their replicas at about the same time as its first leader, so its
/// first votes may find nobody at home. Asking again costs a pre-vote, which nobody has to store, and
/// is of no use once there is a candidate: what then goes wrong is the sweep's.
pub(crate) async fn win_first_election(host: Arc<RaftHost>, group: Group) {
    let term = group.term();
    for _ in 0..FIRST_ELECTION_TRIES {
        let elected = group.wait_leader(FIRST_ELECTION_RETRY).await.is_some();
        if elected || host.stop.is_cancelled() || group.term() != term {
            return;
        }
        group.stand_for_election().await;
    }
}

/// Hands leaderships to the nodes that should have them, slowly, and only to nodes that have been
/// up for a while: a node that comes and goes is not given back what it cannot keep. Nor to one that
/// answers late, since nobody can write while leadership is on its way.
fn rebalance(host: &Arc<RaftHost>, groups: &[Group], is_settled: impl Fn(NodeId) -> bool) {
    let misplaced = groups.iter().filter(|group| {
        let preferred = group.spec().preferred;
        preferred != host.config.node_id
            && is_settled(preferred)
            && group.is_leader()
            && holds_log(group, preferred)
            && host.peers.answers_quickly(preferred)
    });
    for group in misplaced.take(REBALANCE_PER_SECOND) {
        let group = group.clone();
        tokio::spawn(async move {
            let to = group.spec().preferred;
            if let Err(error) = group.transfer_leader(to).await {
                tracing::debug!(group = %group.id(), to, %error, "leadership stays for now");
            }
        });
    }
}

fn holds_log(group: &Group, node: NodeId) -> bool {
    let metrics = group.metrics();
    let last = metrics.last_log_index.unwrap_or(0);
    metrics
        .matched
        .iter()
        .any(|(n, matched)| *n == node && matched.is_some_and(|m| m + REBALANCE_LAG_MAX >= last))
}

/// Gives every leadership of this node to the follower that holds the most, and waits for it.
pub(crate) async fn hand_over(host: &RaftHost, patience: Duration) {
    let handed = host
        .groups()
        .into_iter()
        .filter(Group::is_leader)
        .map(|group| async move {
            let mut followers = group.metrics().matched;
            followers.retain(|(node, _)| {
                *node != host.config.node_id && host.peers.liveness().state(*node) == PeerState::Up
            });
            if let Some((to, _)) = followers.into_iter().max_by_key(|(_, matched)| *matched) {
                group.transfer_leader(to).await.ok();
            }
        });
    let all = stream::iter(handed)
        .buffer_unordered(ELECTIONS_AT_ONCE)
        .count();
    if tokio::time::timeout(patience, all).await.is_err() {
        tracing::warn!("not every leadership was handed over in time");
    }
}
