//! Who gets which queue: pure functions of who subscribes to what, and of how it was before.
//!
//! Members and topics are numbers here, in an order that every replica agrees on; where several
//! choices are as good, the lower number wins.

use serde::{Deserialize, Serialize};

/// How a consumer group shares its queues out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum AssignStrategy {
    /// As even as it gets, and of all such shares the one that moves the fewest queues.
    #[default]
    Sticky,
    /// Topic by topic, each subscriber a run of neighbouring queues.
    Range,
    /// All queues of all topics dealt out in turn.
    RoundRobin,
}

/// One topic's queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicShare {
    /// Members that subscribe to it, ascending.
    pub subscribers: Vec<usize>,
    /// By queue: who had it.
    pub previous: Vec<Option<usize>>,
}

/// By topic and queue: who gets it; nobody where nobody subscribes.
pub type Shares = Vec<Vec<Option<usize>>>;

/// Gives every queue that has subscribers to exactly one of them.
pub fn assign(strategy: AssignStrategy, members: usize, topics: &[TopicShare]) -> Shares {
    match strategy {
        AssignStrategy::Sticky => sticky(members, topics),
        AssignStrategy::Range => topics.iter().map(range).collect(),
        AssignStrategy::RoundRobin => round_robin(members, topics),
    }
}

fn range(topic: &TopicShare) -> Vec<Option<usize>> {
    let (queues, takers) = (topic.previous.len(), topic.subscribers.len());
    let mut shares = Vec::with_capacity(queues);
    for (turn, member) in topic.subscribers.iter().enumerate() {
        // The first ones take what doesn't divide.
        let run = queues / takers + usize::from(turn < queues % takers);
        shares.extend(std::iter::repeat_n(Some(*member), run));
    }
    shares.resize(queues, None);
    shares
}

fn round_robin(members: usize, topics: &[TopicShare]) -> Shares {
    let mut next = 0;
    let mut deal = |topic: &TopicShare| {
        let turns = (0..members).map(|turn| (next + turn) % members);
        let mut takers = turns.filter(|m| topic.subscribers.binary_search(m).is_ok());
        let taker = takers.next();
        if let Some(taker) = taker {
            next = taker + 1;
        }
        taker
    };
    let each = topics.iter();
    each.map(|topic| topic.previous.iter().map(|_| deal(topic)).collect())
        .collect()
}

fn sticky(members: usize, topics: &[TopicShare]) -> Shares {
    let mut hands = Hands {
        load: vec![0; members],
        held: vec![vec![Vec::new(); topics.len()]; members],
    };
    let mut free = Vec::new();
    for (t, topic) in topics.iter().enumerate() {
        for (queue, previous) in topic.previous.iter().enumerate() {
            let stays = previous.filter(|m| topic.subscribers.binary_search(m).is_ok());
            match stays {
                Some(member) => hands.give(member, t, queue),
                None => free.push((t, queue)),
            }
        }
    }
    for (t, queue) in free {
        if let Some(member) = hands.least(&topics[t]) {
            hands.give(member, t, queue);
        }
    }
    while hands.even_out(topics) {}
    hands.shares(topics)
}

/// What each member holds while queues are being shared out.
struct Hands {
    load: Vec<usize>,
    /// By member and topic.
    held: Vec<Vec<Vec<usize>>>,
}

impl Hands {
    fn give(&mut self, member: usize, topic: usize, queue: usize) {
        self.load[member] += 1;
        self.held[member][topic].push(queue);
    }

    /// The subscriber that holds the fewest queues.
    fn least(&self, topic: &TopicShare) -> Option<usize> {
        let subscribers = topic.subscribers.iter().copied();
        subscribers.min_by_key(|m| (self.load[*m], *m))
    }

    /// Moves one queue from a member to one that has at least two fewer; false when there is none.
    /// It is taken from the fullest, so that no move is made that another would have spared. Each
    /// move makes the sum of the squares of the loads smaller, so there is an end.
    fn even_out(&mut self, topics: &[TopicShare]) -> bool {
        let least: Vec<Option<usize>> = topics.iter().map(|topic| self.least(topic)).collect();
        let mut fullest: Vec<usize> = (0..self.load.len()).collect();
        fullest.sort_by_key(|m| (std::cmp::Reverse(self.load[*m]), *m));
        for from in fullest {
            let held = self.held[from].iter().enumerate();
            let moves = held.filter(|(_, queues)| !queues.is_empty());
            let moves = moves.filter_map(|(t, _)| Some((self.load[least[t]?], least[t]?, t)));
            let Some((load, to, t)) = moves.min() else {
                continue;
            };
            if load + 1 < self.load[from]
                && let Some(queue) = self.held[from][t].pop()
            {
                self.load[from] -= 1;
                self.give(to, t, queue);
                return true;
            }
        }
        false
    }

    fn shares(&self, topics: &[TopicShare]) -> Shares {
        let nobody = |topic: &TopicShare| vec![None; topic.previous.len()];
        let mut shares: Shares = topics.iter().map(nobody).collect();
        for (member, held) in self.held.iter().enumerate() {
            for (t, queues) in held.iter().enumerate() {
                for queue in queues {
                    shares[t][*queue] = Some(member);
                }
            }
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [AssignStrategy; 3] = [
        AssignStrategy::Sticky,
        AssignStrategy::Range,
        AssignStrategy::RoundRobin,
    ];

    fn topic(subscribers: &[usize], queues: usize) -> TopicShare {
        TopicShare {
            subscribers: subscribers.to_vec(),
            previous: vec![None; queues],
        }
    }

    fn loads(members: usize, shares: &Shares) -> Vec<usize> {
        let mut loads = vec![0; members];
        for member in shares.iter().flatten().flatten() {
            loads[*member] += 1;
        }
        loads
    }

    #[test]
    fn range_gives_runs_and_round_robin_deals() {
        let topics = [topic(&[0, 1, 2], 7), topic(&[1, 2], 3)];
        let some = |list: &[usize]| list.iter().copied().map(Some).collect::<Vec<_>>();
        assert_eq!(
            assign(AssignStrategy::Range, 3, &topics),
            [some(&[0, 0, 0, 1, 1, 2, 2]), some(&[1, 1, 2])]
        );
        assert_eq!(
            assign(AssignStrategy::RoundRobin, 3, &topics),
            [some(&[0, 1, 2, 0, 1, 2, 0]), some(&[1, 2, 1])]
        );
    }

    #[test]
    fn nobody_subscribes_or_nobody_is_there() {
        for strategy in ALL {
            let topics = [topic(&[], 2), topic(&[0], 1)];
            assert_eq!(
                assign(strategy, 1, &topics),
                [vec![None, None], vec![Some(0)]],
                "{strategy:?}"
            );
            assert_eq!(assign(strategy, 0, &[topic(&[], 1)]), [[None]]);
        }
    }

    fn any_topics() -> impl Strategy<Value = (usize, Vec<TopicShare>)> {
        (1..7usize).prop_flat_map(|members| {
            let one = (
                proptest::collection::btree_set(0..members, 0..=members),
                proptest::collection::vec(proptest::option::of(0..members + 2), 0..9),
            );
            let topics = proptest::collection::vec(one, 0..4);
            topics.prop_map(move |topics| {
                let topics = topics
                    .into_iter()
                    .map(|(subscribers, previous)| TopicShare {
                        subscribers: subscribers.into_iter().collect(),
                        previous,
                    });
                (members, topics.collect())
            })
        })
    }

    fn equal_topics() -> impl Strategy<Value = (usize, Vec<TopicShare>)> {
        any_topics().prop_map(|(members, mut topics)| {
            for topic in &mut topics {
                topic.subscribers = (0..members).collect();
            }
            (members, topics)
        })
    }

    proptest! {
        #[test]
        fn every_queue_has_one_owner_that_subscribes((members, topics) in any_topics()) {
            for strategy in ALL {
                let shares = assign(strategy, members, &topics);
                prop_assert_eq!(shares.len(), topics.len());
                for (share, topic) in shares.iter().zip(&topics) {
                    prop_assert_eq!(share.len(), topic.previous.len());
                    for owner in share {
                        match owner {
                            Some(owner) => prop_assert!(topic.subscribers.contains(owner)),
                            None => prop_assert!(topic.subscribers.is_empty()),
                        }
                    }
                }
            }
        }

        #[test]
        fn equal_subscribers_have_as_much_within_one((members, topics) in equal_topics()) {
            for strategy in [AssignStrategy::Sticky, AssignStrategy::RoundRobin] {
                let loads = loads(members, &assign(strategy, members, &topics));
                let (min, max) = (loads.iter().min(), loads.iter().max());
                prop_assert!(max.unwrap() - min.unwrap() <= 1, "{:?}: {:?}", strategy, loads);
            }
            for (share, topic) in assign(AssignStrategy::Range, members, &topics).iter().zip(&topics) {
                let loads = loads(members, &vec![share.clone()]);
                let floor = topic.previous.len() / members;
                prop_assert!(loads.iter().all(|l| (floor..=floor + 1).contains(l)));
            }
        }

        #[test]
        fn no_single_move_would_be_fairer((members, topics) in any_topics()) {
            let shares = assign(AssignStrategy::Sticky, members, &topics);
            let loads = loads(members, &shares);
            for (share, topic) in shares.iter().zip(&topics) {
                for owner in share.iter().flatten() {
                    for other in &topic.subscribers {
                        prop_assert!(loads[*other] + 1 >= loads[*owner]);
                    }
                }
            }
        }

        /// What had an owner moves only as often as any even share demands.
        #[test]
        fn sticky_moves_no_more_than_it_must((members, topics) in equal_topics()) {
            let shares = assign(AssignStrategy::Sticky, members, &topics);
            let (mut before, mut moved, mut free, mut total) = (vec![0; members], 0, 0, 0);
            for (share, topic) in shares.iter().zip(&topics) {
                for (now, previous) in share.iter().zip(&topic.previous) {
                    total += 1;
                    match previous.filter(|m| *m < members) {
                        Some(member) => {
                            before[member] += 1;
                            moved += usize::from(*now != Some(member));
                        }
                        None => free += 1,
                    }
                }
            }
            let floor = total / members;
            let ceiling = total.div_ceil(members);
            let excess: usize = before.iter().map(|b: &usize| b.saturating_sub(ceiling)).sum();
            let missing: usize = before.iter().map(|b| floor.saturating_sub(*b)).sum();
            prop_assert_eq!(moved, excess.max(missing.saturating_sub(free)));
        }

        #[test]
        fn an_even_share_stays_as_it_is((members, topics) in equal_topics()) {
            let first = assign(AssignStrategy::Sticky, members, &topics);
            let again: Vec<TopicShare> = topics.iter().zip(&first).map(|(topic, share)| TopicShare {
                previous: share.clone(),
                ..topic.clone()
            }).collect();
            prop_assert_eq!(assign(AssignStrategy::Sticky, members, &again), first);
        }
    }
}
