//! Which nodes get the replicas of new groups. A pure function of the catalog's state.

use std::collections::BTreeMap;

use quorate_raft::NodeId;

use super::state::{CatalogState, GroupPlacement};

#[derive(Debug, Clone, Copy, Default)]
struct Load {
    leaders: usize,
    replicas: usize,
}

/// Places `count` groups of `replicas` replicas each: the leader on the node with the fewest
/// leaders, the others on the nodes with the fewest replicas, next after the leader's where equal.
/// Groups get the ids from `first_group` on; replica ids come from the state's counter.
///
/// The caller has checked that there are at least `replicas` nodes.
pub(super) fn place(
    state: &mut CatalogState,
    first_group: u64,
    count: u32,
    replicas: u32,
    avoid: &[NodeId],
) -> Vec<GroupPlacement> {
    let mut loads: BTreeMap<NodeId, Load> =
        state.nodes.keys().map(|n| (*n, Load::default())).collect();
    for placement in state.placements() {
        if let Some(load) = loads.get_mut(&placement.preferred) {
            load.leaders += 1;
        }
        for node in placement.nodes() {
            if let Some(load) = loads.get_mut(&node) {
                load.replicas += 1;
            }
        }
    }
    let mut placed = Vec::with_capacity(count as usize);
    for number in 0..count {
        let nodes = choose(&mut loads, replicas as usize, avoid);
        if nodes.is_empty() {
            break;
        }
        let founders = nodes.into_iter().map(|node| {
            let replica = state.next_replica;
            state.next_replica += 1;
            (replica, node)
        });
        let group = first_group + u64::from(number);
        placed.push(GroupPlacement::found(group, founders.collect()));
    }
    placed
}

fn choose(loads: &mut BTreeMap<NodeId, Load>, replicas: usize, avoid: &[NodeId]) -> Vec<NodeId> {
    let leader = loads
        .iter()
        .min_by_key(|(node, load)| (avoid.contains(node), load.leaders, load.replicas, **node))
        .map(|(node, _)| *node);
    let Some(leader) = leader else {
        return Vec::new();
    };
    let mut others: Vec<NodeId> = loads.keys().copied().filter(|n| *n != leader).collect();
    // Equal loads go round from the leader on, so that neighbours are not always the same pair.
    others.sort_by_key(|node| {
        let replicas = loads.get(node).map_or(0, |l| l.replicas);
        (avoid.contains(node), replicas, *node < leader, *node)
    });
    let mut nodes = vec![leader];
    nodes.extend(others);
    nodes.truncate(replicas);
    for node in &nodes {
        if let Some(load) = loads.get_mut(node) {
            load.replicas += 1;
            load.leaders += usize::from(*node == leader);
        }
    }
    nodes
}
