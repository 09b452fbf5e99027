//! When the node or the cluster can't take a write: what is said, and what still works.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder};
use serde_json::json;

use crate::api::{Answer, Api};
use crate::support::Cluster;

const PATH: &str = "/v1/topics/t/messages";

fn keyed(api: &Api, key: &str) -> RequestBuilder {
    let body = json!({"messages": [{"value": key, "queue": 0}]});
    api.request(Method::POST, PATH)
        .header("idempotency-key", key)
        .json(&body)
}

#[tokio::test]
async fn new_keys_are_refused_rather_than_old_ones_forgotten() {
    let api = Api::start_with("[limits]\nidempotency_keys = 2\n")
        .await
        .unwrap();
    api.topic("t", 1).await;
    let first = api.send(keyed(&api, "k1")).await.expect(200);
    api.send(keyed(&api, "k2")).await.expect(200);
    let body = api
        .send(keyed(&api, "k3"))
        .await
        .problem(429, "quota_exceeded");
    assert_eq!(
        (&body["retryable"], &body["outcome"]),
        (&json!(true), &json!("not_committed"))
    );
    let again = api.send(keyed(&api, "k1")).await.expect(200);
    assert_eq!(again["results"], first["results"]);
    api.store("t", 0, &["without a key"]).await;
}

#[tokio::test]
async fn a_full_disk_takes_no_writes_and_answers_reads() {
    let mut api = Api::start_with("[log]\n").await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    api.cluster.node(1).terminate().unwrap();
    // A reserve that no disk has stands in for a disk without room.
    let config = api.cluster.data_dir(1).with_file_name("quorate.toml");
    let mut text = std::fs::read_to_string(&config).unwrap();
    text.push_str("\nreserve_bytes = 1125899906842624\n");
    std::fs::write(&config, text).unwrap();
    api.cluster.node(1).spawn().unwrap();
    api.cluster.wait_ready().await.unwrap();

    let found = api.get("/v1/topics/t/queues/0/messages").await.expect(200);
    assert_eq!(found["messages"][0]["value"], "a");
    let answer = api.post(PATH, &json!({"messages": [{"value": "b"}]})).await;
    let body = answer.problem(503, "disk_full");
    assert_eq!(
        (&body["retryable"], &body["outcome"]),
        (&json!(true), &json!("not_committed"))
    );
    let end = api
        .get("/v1/topics/t/queues/0/messages?offset=latest")
        .await
        .expect(200);
    assert_eq!(end["end_offset"], 1);
    // What makes room is taken.
    let topic = api.request(Method::DELETE, "/v1/topics/t");
    api.send(topic).await.expect(204);
}

/// A cluster whose first node is alone, seen through that node.
async fn without_a_majority() -> Api {
    let cluster = Cluster::start(3).await.unwrap();
    let url = cluster.urls().remove(0);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut api = Api { cluster, url, http };
    api.cluster.client().create_topic("t", 1).await.unwrap();
    api.store("t", 0, &["acknowledged"]).await;
    crate::support::eventually("node 1 has the message", || async {
        let answer = api
            .get("/v1/topics/t/queues/0/messages?consistency=stale")
            .await;
        let count = answer.json()["messages"].as_array().map_or(0, Vec::len);
        if count == 1 {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{count} messages"))
        }
    })
    .await
    .unwrap();
    api.cluster.node(2).kill();
    api.cluster.node(3).kill();
    api
}

fn unavailable(answer: &Answer, write: bool) {
    let body = answer.json();
    let code = body["code"].as_str().unwrap_or_default();
    let body = match answer.status.as_u16() {
        504 => answer.problem(504, "timeout"),
        _ => answer.problem(503, code),
    };
    assert!(
        ["timeout", "no_leader", "not_enough_replicas"].contains(&code),
        "{body}"
    );
    assert_eq!(body["retryable"], true, "{body}");
    let outcomes = [json!("unknown"), json!("not_committed")];
    assert_eq!(
        body.get("outcome").is_some_and(|o| outcomes.contains(o)),
        write,
        "{body}"
    );
    if code == "timeout" && write {
        assert_eq!(body["outcome"], "unknown");
    }
}

#[tokio::test]
async fn without_a_majority_writes_are_answered_in_time_and_stale_reads_work() {
    let mut api = without_a_majority().await;
    let messages = json!({"messages": [{"value": "x"}]});
    let offsets = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 0}]});
    for (method, path, body) in [
        (Method::POST, PATH, &messages),
        (Method::POST, "/v1/topics", &json!({"name": "u"})),
        (Method::PUT, "/v1/groups/g/offsets", &offsets),
    ] {
        let begun = Instant::now();
        unavailable(&api.call(method, path, body).await, true);
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{path}: {:?}",
            begun.elapsed()
        );
    }
    let queue = "/v1/topics/t/queues/0/messages";
    unavailable(&api.get(&format!("{queue}?offset=latest")).await, false);
    let stale = api
        .get(&format!("{queue}?consistency=stale"))
        .await
        .expect(200);
    assert_eq!(stale["messages"][0]["value"], "acknowledged");
    api.get("/health/live").await.expect(200);
    api.get("/v1/cluster").await.expect(200);

    api.cluster.node(2).spawn().unwrap();
    api.cluster.node(3).spawn().unwrap();
    crate::support::eventually("writes work again", || async {
        let answer = api.post(PATH, &messages).await;
        if answer.status.is_success() {
            Ok(())
        } else {
            Err(anyhow::anyhow!(answer.text()))
        }
    })
    .await
    .unwrap();
}
