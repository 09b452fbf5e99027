use std::collections::BTreeSet;

use clap::ValueEnum;

use super::*;

fn plan(nodes: u64, faulty: u64, seed: u64) -> Plan {
    Plan {
        duration: Duration::from_secs(60),
        seed,
        faults: FaultKind::value_variants().to_vec(),
        cover: Vec::new(),
        late: Duration::from_secs(1),
        nodes,
        faulty,
        topics: 1,
        queues: 4,
        rate: 100,
        dir: None,
        run: "r".into(),
    }
}

#[test]
fn one_seed_is_one_schedule() {
    let steps = |seed| -> Vec<Step> { Schedule::new(&plan(5, 2, seed)).take(50).collect() };
    assert_eq!(steps(7), steps(7));
    assert_ne!(steps(7), steps(8));
}

#[test]
fn each_kind_comes_once_before_any_comes_again() {
    for seed in 0..20 {
        let plan = plan(3, 1, seed);
        let first = Schedule::new(&plan).take(plan.faults.len());
        let kinds: BTreeSet<FaultKind> = first.map(|step| step.faults[0].kind()).collect();
        assert_eq!(kinds.len(), plan.faults.len(), "seed {seed}");
    }
}

#[test]
fn every_shape_of_a_partition_comes() {
    let steps = Schedule::new(&plan(5, 2, 1)).take(400);
    let faults = steps.flat_map(|step| step.faults);
    let shapes: BTreeSet<&str> = faults
        .filter_map(|fault| match fault {
            Fault::Partition { shape, .. } => Some(shape.name()),
            _ => None,
        })
        .collect();
    assert_eq!(shapes.len(), 8, "{shapes:?}");
}

/// Nodes that a node still hears and is heard by, itself included.
fn reach(shape: &Shape, node: u64, nodes: u64) -> u64 {
    let isolated = 1;
    (1..=nodes)
        .filter(|other| {
            *other == node
                || (!shape.cuts(node, *other, isolated) && !shape.cuts(*other, node, isolated))
        })
        .count() as u64
}

#[test]
fn a_majority_stays_whole_except_when_everything_is_broken() {
    for (nodes, faulty) in [(3, 1), (5, 1), (5, 2)] {
        for step in Schedule::new(&plan(nodes, faulty, 3)).take(500) {
            let stopped = step.faults.iter().filter(|fault| {
                matches!(fault, Fault::Kill(_) | Fault::Pause(_) | Fault::Restart(_))
            });
            assert!(stopped.count() as u64 <= faulty, "{step:?}");
            for fault in &step.faults {
                let outage = match fault {
                    Fault::KillAll => true,
                    Fault::Partition { shape, .. } => {
                        let most = (1..=nodes).map(|node| reach(shape, node, nodes)).max();
                        let whole = most > Some(nodes / 2);
                        assert_eq!(whole, *shape != Shape::Total, "{shape:?}");
                        !whole
                    }
                    _ => false,
                };
                assert!(!outage || step.hold <= OUTAGE_MAX, "{step:?}");
                assert!(!outage || step.faults.len() == 1, "{step:?}");
            }
        }
    }
}

#[test]
fn shapes_cut_what_their_names_say() {
    let cut = |shape: &Shape, isolated| -> Vec<(u64, u64)> {
        let pairs = (1..=5).flat_map(|a| (1..=5).map(move |b| (a, b)));
        pairs
            .filter(|(a, b)| a < b && shape.cuts(*a, *b, isolated) && shape.cuts(*b, *a, isolated))
            .collect()
    };
    let order = vec![1, 2, 3, 4, 5];
    assert_eq!(
        cut(&Shape::Ring(order.clone()), 1),
        [(1, 3), (1, 4), (2, 4), (2, 5), (3, 5)]
    );
    assert_eq!(
        cut(&Shape::Bridge(order), 1),
        [(2, 4), (2, 5), (3, 4), (3, 5)]
    );
    assert_eq!(cut(&Shape::Bridge(vec![1, 2, 3]), 1)[0], (2, 3));
    assert_eq!(
        cut(&Shape::Isolated(Target::LeaderOf(0)), 4),
        [(1, 4), (2, 4), (3, 4), (4, 5)]
    );
    assert_eq!(cut(&Shape::Mute(2), 1), []);
    assert!(Shape::Mute(2).cuts(2, 1, 1) && !Shape::Mute(2).cuts(1, 2, 1));
    assert!(Shape::Deaf(2).cuts(1, 2, 1) && !Shape::Deaf(2).cuts(2, 1, 1));
}
