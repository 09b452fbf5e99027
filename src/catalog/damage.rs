//! What becomes of replicas that their nodes gave up after damage. Pure functions of the state.
//!
//! A lost replica may have acknowledged what it no longer holds, so it is never opened again: a new
//! one takes its place under a new id, empty, and is filled by its group's leader. That is safe
//! only while the sound replicas are a majority of the group, because then they hold everything
//! that was committed. Where they are none, the lost ones stay lost and the group stands still
//! until their files are restored: nothing here guesses what they knew.

use quorate_raft::{NodeId, ReplicaId};

use super::command::GivenUp;
use super::state::{CatalogState, GroupPlacement, ReplicaState};

/// Marks what a node gives up, and places what can take its place. True if that changed anything.
pub(super) fn give_up(state: &mut CatalogState, node: NodeId, what: &GivenUp) -> bool {
    if let GivenUp::All { id } = what {
        let Some(entry) = state.nodes.get_mut(&node) else {
            return false;
        };
        if entry.quarantine.as_ref() == Some(id) {
            return false;
        }
        entry.quarantine = Some(id.clone());
    }
    let marked = state.change_placements(|placement, _| {
        let group = placement.group;
        let mut lost = placement.replicas.iter_mut().filter(|r| r.node == node);
        let given_up = |replica| match what {
            GivenUp::All { .. } => true,
            GivenUp::Some(some) => some.contains(&(group, replica)),
        };
        match lost.find(|r| given_up(r.replica) && r.state != ReplicaState::Lost) {
            Some(replica) => {
                replica.state = ReplicaState::Lost;
                true
            }
            None => false,
        }
    });
    let replaced = replace_lost(state);
    marked || replaced || matches!(what, GivenUp::All { .. })
}

/// A replacement is as good as the others now. True if that is news.
pub(super) fn filled(state: &mut CatalogState, group: u64, replica: ReplicaId) -> bool {
    let settled = state.change_placements(|placement, _| {
        let is_it =
            |r: &&mut super::ReplicaPlace| r.replica == replica && r.state == ReplicaState::Filling;
        let mut replicas = placement.replicas.iter_mut();
        match replicas.find(is_it).filter(|_| placement.group == group) {
            Some(place) => {
                place.state = ReplicaState::Sound;
                true
            }
            None => false,
        }
    });
    // Another one of the same group may have waited for this.
    if settled {
        replace_lost(state);
    }
    settled
}

fn replace_lost(state: &mut CatalogState) -> bool {
    state.change_placements(|placement: &mut GroupPlacement, next| {
        if placement.count(ReplicaState::Sound) < placement.majority() {
            return false;
        }
        let lost = placement
            .replicas
            .iter_mut()
            .filter(|r| r.state == ReplicaState::Lost);
        let mut replaced = false;
        for place in lost {
            place.replica = *next;
            place.state = ReplicaState::Filling;
            *next += 1;
            replaced = true;
        }
        replaced
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::catalog::{CATALOG_GROUP, NodeEntry, Topic};

    fn state(replicas: u64) -> CatalogState {
        let mut state = CatalogState::default();
        for node in 1..=3 {
            let entry = NodeEntry {
                url: String::new(),
                peer_addr: String::new(),
                uuid: String::new(),
                version: String::new(),
                quarantine: None,
            };
            state.nodes.insert(node, entry);
        }
        state.catalog = GroupPlacement::found(CATALOG_GROUP.0, vec![(1, 1), (2, 2), (3, 3)]);
        state.next_replica = 2000;
        let founders = (1..=replicas).map(|node| (1500 + node, node)).collect();
        let topic = Topic {
            id: 1,
            name: "t".to_owned(),
            config: Default::default(),
            queues: vec![GroupPlacement::found(1024, founders)],
        };
        state.topics.insert(1, Arc::new(topic));
        state
    }

    fn queue(state: &CatalogState) -> &GroupPlacement {
        &state.topics[&1].queues[0]
    }

    fn all(id: &str) -> GivenUp {
        GivenUp::All { id: id.to_owned() }
    }

    #[test]
    fn everything_of_a_node_is_replaced_once() {
        let mut state = state(3);
        assert!(give_up(&mut state, 2, &all("a")));
        let expected = |place: super::super::ReplicaPlace, replica, state| {
            assert_eq!((place.replica, place.state), (replica, state));
        };
        use ReplicaState::{Filling, Sound};
        expected(state.catalog.replica_on(2).unwrap(), 2000, Filling);
        expected(queue(&state).replica_on(2).unwrap(), 2001, Filling);
        expected(queue(&state).replica_on(1).unwrap(), 1501, Sound);
        assert_eq!(queue(&state).founders[1], (1502, 2), "history stays");
        assert!(!give_up(&mut state, 2, &all("a")), "asked again");
        assert_eq!(queue(&state).replica_on(2).unwrap().replica, 2001);
        assert!(filled(&mut state, 1024, 2001));
        assert!(!filled(&mut state, 1024, 2001));
        expected(queue(&state).replica_on(2).unwrap(), 2001, Sound);
    }

    #[test]
    fn one_replica_is_replaced_if_it_is_still_that_one() {
        let mut state = state(3);
        let one = GivenUp::Some(vec![(1024, 1502)]);
        assert!(give_up(&mut state, 2, &one));
        assert_eq!(queue(&state).replica_on(2).unwrap().replica, 2000);
        assert_eq!(state.catalog.count(ReplicaState::Sound), 3);
        assert!(!give_up(&mut state, 2, &one), "that life is over");
    }

    #[test]
    fn the_second_waits_for_the_first() {
        let mut state = state(3);
        give_up(&mut state, 2, &all("a"));
        give_up(&mut state, 3, &all("b"));
        let third = queue(&state).replica_on(3).unwrap();
        assert_eq!((third.replica, third.state), (1503, ReplicaState::Lost));
        assert!(!queue(&state).is_beyond_repair());
        let second = queue(&state).replica_on(2).unwrap().replica;
        filled(&mut state, 1024, second);
        let third = queue(&state).replica_on(3).unwrap();
        assert_eq!(third.state, ReplicaState::Filling);
    }

    #[test]
    fn without_a_sound_majority_nothing_is_replaced() {
        let mut alone = state(1);
        give_up(&mut alone, 1, &all("a"));
        assert_eq!(queue(&alone).count(ReplicaState::Lost), 1);
        assert!(queue(&alone).is_beyond_repair());
        let mut pair = state(2);
        give_up(&mut pair, 1, &all("a"));
        assert_eq!(queue(&pair).count(ReplicaState::Lost), 1);
        assert!(queue(&pair).is_beyond_repair(), "two need both");
    }
}
