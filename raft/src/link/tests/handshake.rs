use super::*;
use crate::identity::Identity;

/// Starts node 1, changed, and node 2, and returns both with the refusal one of them meets.
async fn refused(change: impl Fn(&mut LinkConfig)) -> (Node, Node, NodeId, RefuseCode, String) {
    let (bound_1, bound_2) = (listener().await, listener().await);
    let mut config_1 = config(1, vec![(2, addr(&bound_2))]);
    let mut config_2 = config(2, vec![(1, addr(&bound_1))]);
    change(&mut config_1);
    change(&mut config_2);
    let (one, two) = (
        Node::start(config_1, bound_1),
        Node::start(config_2, bound_2),
    );
    let refusal = |event: &PeerEvent| match event {
        PeerEvent::Refused { node, code, text } => Some((*node, *code, text.clone())),
        _ => None,
    };
    let (node, code, text) = tokio::select! {
        refusal = one.event(refusal) => refusal,
        refusal = two.event(refusal) => refusal,
    };
    assert!(!one.table.connected(2) && !two.table.connected(1));
    (one, two, node, code, text)
}

#[tokio::test]
async fn another_cluster_is_refused() {
    let (.., code, text) = refused(|config| config.cluster = format!("c{}", config.node_id)).await;
    assert_eq!(code, RefuseCode::WrongCluster);
    assert!(text.contains("\"c1\"") && text.contains("\"c2\""), "{text}");
}

#[tokio::test]
async fn a_cluster_of_another_birth_is_refused() {
    let id = |config: &mut LinkConfig| {
        config.cluster_id = Some(Uuid::from_u128(config.node_id.into()));
    };
    let (.., code, _) = refused(id).await;
    assert_eq!(code, RefuseCode::WrongClusterId);
}

#[tokio::test]
async fn a_cluster_id_only_one_side_knows_is_no_obstacle() {
    let id = Uuid::from_u128(7);
    let nodes = cluster(2, |config| {
        config.cluster_id = (config.node_id == 1).then_some(id)
    })
    .await;
    assert_eq!(nodes[1].table.cluster_id_of(1), Some(id));
    assert_eq!(nodes[0].table.cluster_id_of(2), None);
}

#[tokio::test]
async fn another_node_under_the_address_is_refused() {
    let bound = listener().await;
    let other = Node::start(
        config(3, vec![(1, "127.0.0.1:1".to_owned())]),
        listener().await,
    );
    drop(other);
    let bound_3 = listener().await;
    let one = Node::start(config(1, vec![(2, addr(&bound_3))]), bound);
    let _three = Node::start(config(3, vec![(1, "127.0.0.1:1".to_owned())]), bound_3);
    let code = one.event(|event| match event {
        PeerEvent::Refused { code, text, .. } => Some((*code, text.clone())),
        _ => None,
    });
    let (code, text) = code.await;
    assert_eq!(code, RefuseCode::WrongNodeId);
    assert!(text.contains("this is node 3, not node 2"), "{text}");
}

#[tokio::test]
async fn a_node_that_is_not_configured_is_refused() {
    let (bound_1, bound_2) = (listener().await, listener().await);
    let one = Node::start(config(1, vec![(2, addr(&bound_2))]), bound_1);
    let _two = Node::start(config(2, vec![]), bound_2);
    let code = one.event(|event| match event {
        PeerEvent::Refused { node: 2, code, .. } => Some(*code),
        _ => None,
    });
    assert_eq!(code.await, RefuseCode::UnknownNode);
    assert_eq!(
        one.table.refusal(2).map(|reason| reason.code),
        Some(RefuseCode::UnknownNode)
    );
}

#[tokio::test]
async fn an_address_that_leads_back_is_refused() {
    let bound = listener().await;
    let one = Node::start(config(1, vec![(2, addr(&bound))]), bound);
    let code = one.event(|event| match event {
        PeerEvent::Refused { node: 2, code, .. } => Some(*code),
        _ => None,
    });
    assert_eq!(code.await, RefuseCode::SelfConnection);
}

/// Knows one uuid for every node.
struct Remembers(Uuid);

impl PeerRegistry for Remembers {
    fn check(&self, node: NodeId, uuid: Uuid) -> Result<(), RefuseReason> {
        match uuid == self.0 {
            true => Ok(()),
            false => Err(RefuseReason::known_id_other_disk(node, self.0, uuid)),
        }
    }

    fn accepted(&self, _node: NodeId, _uuid: Uuid) -> Result<(), RefuseReason> {
        Ok(())
    }
}

#[tokio::test]
async fn a_known_node_with_another_disk_is_told_why_whoever_dials() {
    for (refusing, told) in [(1, 2), (2, 1)] {
        let (one, two, node, code, text) = refused(|config| {
            if config.node_id == refusing {
                config.registry = Arc::new(Remembers(Uuid::from_u128(99)));
            }
        })
        .await;
        assert_eq!((node, code), (refusing, RefuseCode::KnownIdOtherDisk));
        assert!(
            text.contains(&format!("node {told} is known with another disk")),
            "{text}"
        );
        assert!(text.contains("must come back under a new id"), "{text}");
        let told = if told == 1 { &one } else { &two };
        assert_eq!(
            told.table.refusal(refusing).map(|reason| reason.text),
            Some(text)
        );
    }
}

/// Can't remember anything.
struct Forgets;

impl PeerRegistry for Forgets {
    fn check(&self, _node: NodeId, _uuid: Uuid) -> Result<(), RefuseReason> {
        Ok(())
    }

    fn accepted(&self, _node: NodeId, _uuid: Uuid) -> Result<(), RefuseReason> {
        Err(RefuseReason::new(RefuseCode::Internal, "disk full"))
    }
}

#[tokio::test]
async fn a_peer_that_can_not_be_remembered_is_not_used() {
    let (.., node, code, _) = refused(|config| {
        if config.node_id == 1 {
            config.registry = Arc::new(Forgets);
        }
    })
    .await;
    assert_eq!((node, code), (1, RefuseCode::Internal));
}

#[tokio::test]
async fn a_node_whose_data_was_lost_is_told_to_come_back_under_a_new_id() {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = |node, name: &str| {
        Arc::new(Identity::open(&dir.path().join(name), node, "test").expect("usable"))
    };
    let start = |node, identity: Arc<Identity>, peers, bound| {
        let mut config = LinkConfig::new("test", node, identity.uuid(), peers);
        config.registry = identity;
        Node::start(config, bound)
    };
    let (bound_1, bound_2) = (listener().await, listener().await);
    let at_1 = addr(&bound_1);
    let one = start(1, identity(1, "1"), vec![(2, addr(&bound_2))], bound_1);
    let two = start(2, identity(2, "2"), vec![(1, at_1.clone())], bound_2);
    one.connected_to(2).await;
    two.connected_to(1).await;
    two.table.shutdown().await;
    let bound_2 = listener().await;
    one.table.add_peer(2, addr(&bound_2));
    let wiped = start(2, identity(2, "wiped"), vec![(1, at_1.clone())], bound_2);
    let refused = wiped.event(|event| match event {
        PeerEvent::Refused {
            node: 1,
            code,
            text,
        } => Some((*code, text.clone())),
        _ => None,
    });
    let (code, text) = refused.await;
    assert_eq!(code, RefuseCode::KnownIdOtherDisk);
    assert!(text.contains("must come back under a new id"), "{text}");
    wiped.table.shutdown().await;
    // The old disk is still welcome.
    let bound_2 = listener().await;
    one.table.add_peer(2, addr(&bound_2));
    let _two = start(2, identity(2, "2"), vec![(1, at_1)], bound_2);
    one.connected_to(2).await;
}
