//! The cluster's endpoints and those for operation.

use serde_json::json;

use crate::api::Api;

#[tokio::test]
async fn the_cluster_of_one() {
    let api = Api::start().await.unwrap();
    api.topic("t", 3).await;
    let cluster = api.get("/v1/cluster").await.expect(200);
    assert!(!cluster["cluster_id"].as_str().unwrap().is_empty());
    let node = &cluster["nodes"][0];
    assert_eq!((&node["id"], &node["url"]), (&json!(1), &json!(api.url)));
    assert_eq!(
        (&node["state"], &node["version"]),
        (&json!("up"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert!(node["leaders"].as_u64().unwrap() >= 3, "{node}");
    assert!(node["replicas"].as_u64().unwrap() >= 3, "{node}");
    assert_eq!(cluster["catalog"]["leader"], 1);
    assert!(cluster["catalog"]["term"].as_u64().unwrap() > 0);
    assert_eq!(
        cluster["queues"],
        json!({"total": 3, "leaderless": 0, "under_replicated": 0})
    );
}

#[tokio::test]
async fn leadership_goes_only_to_replicas() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let path = "/v1/topics/t/queues/0/leader";
    let same = api.post(path, &json!({"node_id": 1})).await.expect(200);
    assert_eq!(same, json!({"topic": "t", "queue": 0, "leader": 1}));
    let answer = api.post(path, &json!({"node_id": 9})).await;
    let body = answer.problem(400, "invalid_request");
    assert!(body["detail"].as_str().unwrap().contains('9'), "{body}");
    let none = api
        .post("/v1/topics/t/queues/7/leader", &json!({"node_id": 1}))
        .await;
    none.problem(404, "queue_not_found");
    api.post(path, &json!({"node": 1}))
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn a_replica_tells_how_far_it_is_and_what_it_holds() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let path = "/v1/topics/t/queues/0/replica";
    let before = api.get(path).await.expect(200);
    assert_eq!(
        (&before["node"], &before["role"]),
        (&json!(1), &json!("leader"))
    );
    assert!(before["replica"].as_u64().unwrap() > 0, "{before}");
    api.store("t", 1, &["elsewhere"]).await;
    assert_eq!(api.get(path).await.expect(200), before);
    api.store("t", 0, &["here"]).await;
    let after = api.get(path).await.expect(200);
    let index = |replica: &serde_json::Value| replica["applied_index"].as_u64().unwrap();
    assert_eq!(index(&after), index(&before) + 1);
    assert_ne!(after["state_hash"], before["state_hash"]);
    assert_eq!(after["state_hash"].as_str().unwrap().len(), 16);
    let none = api.get("/v1/topics/t/queues/7/replica").await;
    none.problem(404, "queue_not_found");
    let unknown = api.get(&format!("{path}?node=2")).await;
    unknown.problem(400, "invalid_request");
}

#[tokio::test]
async fn health_metrics_and_reference() {
    let api = Api::start().await.unwrap();
    assert_eq!(
        api.get("/health/live").await.expect(200),
        json!({"status": "live"})
    );
    assert_eq!(
        api.get("/health/ready").await.expect(200),
        json!({"status": "ready"})
    );
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    api.get("/v1/topics/t/queues/0/messages").await.expect(200);
    let offsets = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 1}]});
    api.call(reqwest::Method::PUT, "/v1/groups/g/offsets", &offsets)
        .await
        .expect(200);
    let answer = api.get("/metrics").await;
    assert!(
        answer
            .header("content-type")
            .starts_with("application/openmetrics-text")
    );
    let text = answer.text();
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
            .parse()
            .unwrap()
    };
    assert_eq!(value("quorate_produced_messages_total"), 2.0);
    assert_eq!(value("quorate_produced_value_bytes_total"), 2.0);
    assert_eq!(value("quorate_fetched_messages_total"), 2.0);
    for name in [
        "quorate_produce_duration_seconds_count",
        "quorate_fetch_duration_seconds_count",
        "quorate_commit_duration_seconds_count",
        "quorate_entry_messages_count",
        "quorate_log_fsyncs_total",
        "quorate_log_fsync_duration_seconds_count",
        "quorate_log_written_bytes_total",
        "quorate_raft_leaders",
        "quorate_disk_free_bytes",
        "quorate_process_resident_memory_bytes",
        "quorate_events_total{event=\"leader_elected\"}",
        "quorate_http_requests_total{method=\"POST\",route=\"/v1/topics/{topic}/messages\",status=\"200\"}",
    ] {
        assert!(value(name) > 0.0, "{name}");
    }
    // Names of one metric stand in one place: a scraper refuses a family that comes twice.
    let mut families: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("# TYPE"))
        .collect();
    let count = families.len();
    families.sort_unstable();
    families.dedup();
    assert_eq!(families.len(), count);
    let reference = api.get("/openapi.json").await.expect(200);
    assert!(reference["openapi"].as_str().unwrap().starts_with("3."));
}
