//! Messages that fail too often, and their way back.

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::leases::{receipts, receive, receive_some, settle, values};
use crate::support::eventually;

async fn policy(api: &Api, max_deliveries: u32) {
    let policy = json!({"max_deliveries": max_deliveries, "backoff_ms": [0]});
    let path = "/v1/groups/g/retry_policy";
    api.call(Method::PUT, path, &policy).await.expect(200);
}

/// The dead letters of group `g`, once there are so many.
async fn dead(api: &Api, count: usize) -> Vec<Value> {
    let path = "/v1/topics/_dlq.g/queues/0/messages?offset=0&wait_ms=1000";
    eventually("the dead letters are there", || async {
        let answer = api.get(path).await;
        let found = answer.json()["messages"].as_array().cloned();
        let found = found.unwrap_or_default();
        anyhow::ensure!(found.len() >= count, "{}", answer.text());
        Ok(found)
    })
    .await
    .unwrap()
}

async fn fail_all(api: &Api) {
    let found = receive_some(api, "g", json!({})).await;
    let back = json!({"receipts": receipts(&found), "delay_ms": 0});
    settle(api, "g", "nack", back).await.expect(200);
}

#[tokio::test]
async fn after_its_last_delivery_a_message_is_a_dead_letter() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    policy(&api, 2).await;
    let message = json!({"messages": [
        {"value": "v", "key": "k", "tag": "x", "headers": {"trace": "1"}, "queue": 0}
    ]});
    let stored = api
        .post("/v1/topics/t/messages", &message)
        .await
        .expect(200);
    fail_all(&api).await;
    fail_all(&api).await;
    let dead = dead(&api, 1).await;
    assert_eq!(dead.len(), 1);
    let letter = &dead[0];
    assert_eq!(
        (&letter["value"], &letter["key"], &letter["tag"]),
        (&json!("v"), &json!("k"), &json!("x"))
    );
    let headers = &letter["headers"];
    let header = |name: &str| headers[format!("quorate.dlq.{name}")].as_str().unwrap();
    assert_eq!(headers["trace"], "1");
    assert_eq!(
        ["topic", "queue", "offset", "reason", "deliveries"].map(header),
        ["t", "0", "0", "nacked", "2"]
    );
    assert_eq!(header("message_id"), stored["results"][0]["message_id"]);
    assert!(header("dead_at_ms").parse::<u64>().unwrap() > 0);
    eventually("it is done for the group", || async {
        let offsets = api.get("/v1/groups/g/offsets").await.json();
        anyhow::ensure!(offsets["offsets"][0]["offset"] == 1, "{offsets}");
        Ok(())
    })
    .await
    .unwrap();
    assert!(receive(&api, "g", json!({})).await.is_empty());
}

#[tokio::test]
async fn a_lease_that_ends_kills_though_nobody_asks() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    policy(&api, 1).await;
    api.store("t", 0, &["a"]).await;
    let found = receive(&api, "g", json!({"lease_ms": 100})).await;
    let dead = dead(&api, 1).await;
    assert_eq!(dead[0]["headers"]["quorate.dlq.reason"], "lease_expired");
    let late = json!({"receipts": receipts(&found)});
    let late = settle(&api, "g", "nack", late).await;
    assert_eq!(late.status.as_u16(), 409, "{}", late.text());
}

#[tokio::test]
async fn dead_letters_are_read_listed_and_deleted_but_not_written() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    policy(&api, 1).await;
    api.store("t", 0, &["a"]).await;
    fail_all(&api).await;
    dead(&api, 1).await;
    let topics = api.get("/v1/topics").await.expect(200);
    let names = topics["topics"].as_array().unwrap().iter();
    let names: Vec<_> = names.map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["_dlq.g", "t"]);
    let described = api.get("/v1/topics/_dlq.g").await.expect(200);
    assert_eq!(described["config"]["queues"], 1);
    let message = json!({"messages": [{"value": "x"}]});
    let refused = api.post("/v1/topics/_dlq.g/messages", &message).await;
    refused.problem(400, "invalid_name");
    let generator = json!({"rate_per_s": 1, "value": "x"});
    let path = "/v1/topics/_dlq.g/generator";
    let refused = api.call(Method::PUT, path, &generator).await;
    refused.problem(400, "invalid_name");
    let create = api.post("/v1/topics", &json!({"name": "_dlq.x"})).await;
    create.problem(400, "invalid_name");
    api.get("/v1/topics/_other")
        .await
        .problem(400, "invalid_name");
    // Dead letters can be consumed as anything else.
    let found = receive(&api, "repair", json!({"topics": ["_dlq.g"]})).await;
    assert_eq!(values(&found), ["a"]);
    api.call(Method::DELETE, "/v1/topics/_dlq.g", &Value::Null)
        .await
        .expect(204);
    // The next one makes it anew.
    api.store("t", 0, &["b"]).await;
    fail_all(&api).await;
    assert_eq!(values(&dead(&api, 1).await), ["b"]);
}

#[tokio::test]
async fn dead_letters_go_back_once() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.topic("u", 1).await;
    policy(&api, 1).await;
    let message =
        json!({"messages": [{"value": "a", "key": "k", "headers": {"h": "1"}, "queue": 1}]});
    api.post("/v1/topics/t/messages", &message)
        .await
        .expect(200);
    fail_all(&api).await;
    dead(&api, 1).await;
    api.store("u", 0, &["lost"]).await;
    let found = receive_some(&api, "g", json!({"topics": ["u"]})).await;
    settle(&api, "g", "nack", json!({"receipts": receipts(&found)}))
        .await
        .expect(200);
    dead(&api, 2).await;
    api.call(Method::DELETE, "/v1/topics/u", &Value::Null)
        .await
        .expect(204);

    let path = "/v1/groups/g/dlq/redrive";
    let done = api
        .post(path, &json!({"max_messages": 10}))
        .await
        .expect(200);
    assert_eq!(done["redriven"], 1);
    assert_eq!(done["skipped"][0]["offset"], 1);
    let why = done["skipped"][0]["reason"].as_str().unwrap();
    assert!(why.contains("deleted"), "{why}");
    let back = api
        .get("/v1/topics/t/queues/1/messages?offset=1")
        .await
        .expect(200);
    let back = &back["messages"][0];
    assert_eq!((&back["value"], &back["key"]), (&json!("a"), &json!("k")));
    assert_eq!(back["headers"], json!({"h": "1"}));
    let again = api.post(path, &json!({})).await.expect(200);
    assert_eq!(again, json!({"redriven": 0, "skipped": []}));
    let found = receive_some(&api, "g", json!({})).await;
    assert_eq!(
        (values(&found), &found[0]["delivery_count"]),
        (vec!["a"], &json!(1))
    );
    api.post("/v1/groups/nobody/dlq/redrive", &json!({}))
        .await
        .problem(404, "consumer_group_not_found");
}

#[tokio::test]
async fn a_dead_message_is_out_of_its_keys_way() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    policy(&api, 1).await;
    for value in ["bad", "good"] {
        let body = json!({"messages": [{"key": "k", "value": value, "queue": 0}]});
        api.post("/v1/topics/t/messages", &body).await.expect(200);
    }
    let ordered = json!({"ordered": true});
    let found = receive(&api, "g", ordered.clone()).await;
    assert_eq!(values(&found), ["bad"]);
    settle(&api, "g", "nack", json!({"receipts": receipts(&found)}))
        .await
        .expect(200);
    assert_eq!(values(&receive_some(&api, "g", ordered).await), ["good"]);
}
