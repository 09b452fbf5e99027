//! What must hold between the replicas at every moment, seen from outside.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quorate_raft::{Group, LogRetention, NodeId};
use quorate_storage::LogId;
use quorate_storage::commit_log::Entry;
use xxhash_rust::xxh3::xxh3_64;

use crate::history::History;
use crate::node::{Handles, NodeSlot};

const READ_BYTES: usize = 64 << 10;

/// How far one replica has been looked at in one life of its node.
#[derive(Debug)]
struct Looked {
    /// As it was opened.
    group: Group,
    applied: u64,
    /// Last entry compared; behind `applied` nothing was.
    compared: u64,
    term: u64,
}

impl Looked {
    fn none_of(group: &Group) -> Self {
        Self {
            group: group.clone(),
            applied: 0,
            compared: 0,
            term: 0,
        }
    }
}

#[derive(Debug)]
pub struct Replicas {
    history: Arc<History>,
    leaders: BTreeMap<(u64, u64), NodeId>,
    /// Term and body's hash of every entry that some replica has applied.
    applied: BTreeMap<(u64, u64), (u64, u64)>,
    looked: BTreeMap<(NodeId, u64), Looked>,
    hashes: Mutex<BTreeMap<(u64, LogId), u64>>,
}

impl Replicas {
    pub fn new(history: Arc<History>) -> Self {
        Self {
            history,
            leaders: BTreeMap::new(),
            applied: BTreeMap::new(),
            looked: BTreeMap::new(),
            hashes: Mutex::default(),
        }
    }

    /// A node's process has ended; the next one is looked at from the beginning.
    pub fn ended(&mut self, node: NodeId) {
        self.looked.retain(|(of, _), _| *of != node);
    }

    /// At most one leader in a term.
    pub fn check_leaders(&mut self, nodes: &[Arc<NodeSlot>]) {
        for (node, handles) in running(nodes) {
            for group in handles.host.groups() {
                if !group.is_leader() {
                    continue;
                }
                let (id, term) = (group.id().0, group.term());
                match self.leaders.get(&(id, term)) {
                    None => {
                        self.leaders.insert((id, term), node);
                        let text = format!("node {node} leads {} in term {term}", group.id());
                        self.history.note(text);
                    }
                    Some(other) if *other != node => self.history.violation(format!(
                        "nodes {other} and {node} both lead {} in term {term}",
                        group.id()
                    )),
                    Some(_) => {}
                }
            }
        }
    }

    /// Applied entries are the same everywhere, and nothing goes back within one life, but for an
    /// index that has to be made anew.
    pub fn check_logs(&mut self, nodes: &[Arc<NodeSlot>]) {
        for slot in nodes {
            let Some(handles) = slot.handles() else {
                continue;
            };
            let mut groups = handles.host.groups();
            groups.sort_by_key(Group::id);
            for group in groups {
                self.check_log(slot, &group);
            }
        }
        for slot in nodes {
            if let Some(quarantine) = slot.machine.quarantine() {
                let node = slot.id();
                self.history.violation(format_args!(
                    "node {node} takes its disk for damaged: {quarantine}"
                ));
            }
            for text in slot.machine.votes.take_broken() {
                self.history
                    .violation(format!("node {}: {text}", slot.id()));
            }
        }
    }

    fn check_log(&mut self, slot: &NodeSlot, group: &Group) {
        let (node, id) = (slot.id(), group.id().0);
        let (applied, term) = (group.applied().map_or(0, |id| id.index), group.term());
        let looked = self.looked.remove(&(node, id));
        let mut looked = looked.unwrap_or_else(|| Looked::none_of(group));
        if looked.group.is_closed() && may_begin_anew(slot, group) {
            looked = Looked::none_of(group);
        }
        if applied < looked.applied {
            let before = looked.applied;
            self.history.violation(format!(
                "node {node}: group {id} has applied {before}, and then {applied}"
            ));
        }
        if term < looked.term {
            let before = looked.term;
            self.history.violation(format!(
                "node {node}: group {id} was in term {before}, and then in {term}"
            ));
        }
        (looked.applied, looked.term) = (applied, term);
        looked.group = group.clone();
        let state = group.log().state();
        let purged = state.purged.map_or(0, |id| id.index);
        let mut next = looked.compared.max(purged) + 1;
        while next <= applied {
            // A poisoned log serves nothing.
            let Ok(entries) = group.log().read(next, applied + 1, READ_BYTES) else {
                break;
            };
            if entries.is_empty() {
                // Installed from a snapshot, and the log begins behind it.
                break;
            }
            for entry in &entries {
                self.compare(node, id, entry);
            }
            next += entries.len() as u64;
        }
        looked.compared = next - 1;
        self.looked.insert((node, id), looked);
    }

    fn compare(&mut self, node: NodeId, group: u64, entry: &Entry) {
        let index = entry.log_id.index;
        let found = (entry.log_id.term, xxh3_64(&entry.body));
        let known = *self.applied.entry((group, index)).or_insert(found);
        if known != found {
            self.history.violation(format!(
                "node {node}: entry {index} of group {group} is of term {}, elsewhere of {}",
                found.0, known.0
            ));
        }
    }

    /// Equal states at equal indexes. `states` are one node's.
    pub fn check_states(&self, node: NodeId, states: Vec<(u64, LogId, u64)>) {
        let mut hashes = self.hashes.lock();
        for (group, at, hash) in states {
            let known = *hashes.entry((group, at)).or_insert(hash);
            if known != hash {
                self.history.violation(format!(
                    "node {node}: the state of group {group} at {at} differs from another's"
                ));
            }
        }
    }
}

/// A queue whose index failed to become durable is opened again, and makes its index anew.
fn may_begin_anew(slot: &NodeSlot, group: &Group) -> bool {
    slot.machine.is_excused() && group.spec().retention == LogRetention::Messages
}

fn running(nodes: &[Arc<NodeSlot>]) -> impl Iterator<Item = (NodeId, Handles)> {
    nodes
        .iter()
        .filter_map(|slot| Some((slot.id(), slot.handles()?)))
}

/// The hashes of all states of a node, to be asked of it.
pub async fn states(handles: Handles) -> Vec<(u64, LogId, u64)> {
    let mut groups = handles.host.groups();
    groups.sort_by_key(Group::id);
    let mut states = Vec::new();
    for group in groups {
        if let Ok((Some(at), hash)) = group.state_hash().await {
            states.push((group.id().0, at, hash));
        }
    }
    states
}
