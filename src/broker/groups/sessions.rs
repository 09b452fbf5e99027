//! When each member was last heard of, as the leader of its coordinator remembers it.
//!
//! Only in memory: whoever leads next starts every session anew, so a change of leader expels
//! nobody.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::coordinator::{Member, Membership};

/// All sessions that this node watches over.
#[derive(Debug, Default)]
pub struct Sessions {
    watched: Mutex<Watched>,
    /// A session began that may end before all others.
    pub(super) wake: Notify,
}

#[derive(Debug, Default)]
struct Watched {
    /// By coordinator and name.
    groups: BTreeMap<(u32, String), Group>,
    rebalances: u64,
}

#[derive(Debug)]
struct Group {
    /// Of the coordinator's leadership in which the members were heard.
    term: u64,
    epoch: u64,
    sessions: HashMap<String, Session>,
}

#[derive(Debug, Clone, Copy)]
struct Session {
    joined: u64,
    heard: Instant,
    timeout: Duration,
}

impl Session {
    fn begin(member: &Member, now: Instant) -> Self {
        Self {
            joined: member.joined,
            heard: now,
            timeout: Duration::from_millis(member.session_timeout_ms),
        }
    }

    fn due(&self) -> Instant {
        self.heard + self.timeout
    }
}

/// The members of one group that were silent for too long, each with the epoch it joined in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overdue {
    pub coordinator: u32,
    pub group: String,
    /// In which they were not heard.
    pub term: u64,
    pub members: Vec<(String, u64)>,
}

impl Sessions {
    /// Takes over who is a member, as known in this term of the coordinator. New members, new lives
    /// and, in a new term, all members begin a session. `who` was heard of right now.
    pub(super) fn see(
        &self,
        coordinator: u32,
        term: u64,
        name: &str,
        membership: &Membership,
        who: Option<&str>,
    ) {
        let now = Instant::now();
        let mut watched = self.watched.lock();
        let key = (coordinator, name.to_owned());
        if membership.members.is_empty() {
            watched.groups.remove(&key);
            return;
        }
        let known = watched.groups.remove(&key).filter(|g| g.term == term);
        let mut begun = false;
        let members = membership.members.iter().map(|(id, member)| {
            let session = known.as_ref().and_then(|g| g.sessions.get(id).copied());
            let session = session.filter(|s| s.joined == member.joined);
            begun |= session.is_none();
            let mut session = session.unwrap_or_else(|| Session::begin(member, now));
            if who == Some(id.as_str()) {
                session.heard = now;
            }
            (id.clone(), session)
        });
        let group = Group {
            term,
            epoch: membership.epoch,
            sessions: members.collect(),
        };
        if known.is_some_and(|known| known.epoch != membership.epoch) {
            watched.rebalances += 1;
        }
        watched.groups.insert(key, group);
        if begun {
            self.wake.notify_one();
        }
    }

    /// A member knocks, with this epoch. It is heard from here on, though it may take a while to prove
    /// that this node is the one to answer.
    pub(super) fn hear(&self, coordinator: u32, group: &str, member: &str, epoch: u64) {
        let mut watched = self.watched.lock();
        let group = watched.groups.get_mut(&(coordinator, group.to_owned()));
        let session = group.and_then(|group| group.sessions.get_mut(member));
        // An earlier life of the member says nothing for this one.
        if let Some(session) = session.filter(|session| session.joined <= epoch) {
            session.heard = Instant::now();
        }
    }

    /// When the next session is over, if nothing is heard before.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let watched = self.watched.lock();
        let sessions = watched.groups.values().flat_map(|g| g.sessions.values());
        sessions.map(Session::due).min()
    }

    pub(super) fn overdue(&self, now: Instant) -> Vec<Overdue> {
        let watched = self.watched.lock();
        let groups = watched.groups.iter().map(|((coordinator, name), group)| {
            let silent = group.sessions.iter().filter(|(_, s)| s.due() <= now);
            Overdue {
                coordinator: *coordinator,
                group: name.clone(),
                term: group.term,
                members: silent.map(|(id, s)| (id.clone(), s.joined)).collect(),
            }
        });
        groups.filter(|o| !o.members.is_empty()).collect()
    }

    /// Of these members, those that are silent still.
    pub(super) fn still(&self, overdue: Overdue) -> Option<Overdue> {
        let now = self.overdue(Instant::now()).into_iter();
        let mut same = now.filter(|o| o.coordinator == overdue.coordinator);
        let now = same.find(|o| o.group == overdue.group && o.term == overdue.term)?;
        let mut still = overdue;
        still.members.retain(|member| now.members.contains(member));
        (!still.members.is_empty()).then_some(still)
    }

    /// Begins every session of a coordinator anew, or of all: nobody could have been heard.
    pub(super) fn renew(&self, coordinator: Option<u32>) {
        let now = Instant::now();
        let mut watched = self.watched.lock();
        let groups = watched.groups.iter_mut();
        let groups = groups.filter(|((c, _), _)| coordinator.is_none_or(|only| *c == only));
        for session in groups.flat_map(|(_, g)| g.sessions.values_mut()) {
            session.heard = now;
        }
    }

    /// This node doesn't lead the coordinator.
    pub(super) fn forget(&self, coordinator: u32) {
        let mut watched = self.watched.lock();
        watched.groups.retain(|(c, _), _| *c != coordinator);
    }

    /// The groups of a coordinator that have members.
    pub(super) fn groups_of(&self, coordinator: u32) -> Vec<String> {
        let watched = self.watched.lock();
        let keys = watched.groups.keys().filter(|(c, _)| *c == coordinator);
        keys.map(|(_, name)| name.clone()).collect()
    }

    /// How long ago each member was heard of, in ms.
    pub(super) fn ages(&self, coordinator: u32, group: &str) -> BTreeMap<String, u64> {
        let watched = self.watched.lock();
        let group = watched.groups.get(&(coordinator, group.to_owned()));
        let sessions = group.into_iter().flat_map(|g| &g.sessions);
        let age = |heard: Instant| heard.elapsed().as_millis() as u64;
        sessions.map(|(id, s)| (id.clone(), age(s.heard))).collect()
    }

    /// Groups with members, their members, and changes of assignments seen so far.
    pub fn counts(&self) -> (usize, usize, u64) {
        let watched = self.watched.lock();
        let members = watched.groups.values().map(|g| g.sessions.len()).sum();
        (watched.groups.len(), members, watched.rebalances)
    }
}
