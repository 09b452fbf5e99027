//! Topics: create, list, describe, change, delete.

use reqwest::Method;
use serde_json::json;

use crate::api::Api;

#[tokio::test]
async fn a_topics_life() {
    let api = Api::start().await.unwrap();
    let answer = api.post("/v1/topics", &json!({"name": "orders"})).await;
    let topic = answer.expect(201);
    assert_eq!(answer.header("location"), "/v1/topics/orders");
    assert_eq!(topic["name"], "orders");
    let expected = json!({"queues": 4, "replicas": 1, "flush": "sync",
        "retention": {"max_age_ms": 259_200_000, "max_bytes": null}, "max_message_bytes": 4_194_304,
        "backlog": {"max_messages": null, "max_bytes": null, "max_age_ms": null, "on_full": "reject"},
        "quota": {"messages_per_s": null, "bytes_per_s": null}, "ttl_ms": null, "hash_queues": 4,
        "trace": false});
    assert_eq!(topic["config"], expected);
    let queues = topic["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 4);
    for (number, queue) in queues.iter().enumerate() {
        assert_eq!(queue["queue"], number);
        assert_eq!(
            queue["leader"], 1,
            "it returns when every queue has a leader"
        );
        assert_eq!(
            (&queue["replicas"], &queue["in_sync"]),
            (&json!([1]), &json!([1]))
        );
        assert_eq!(
            (&queue["earliest_offset"], &queue["end_offset"]),
            (&json!(0), &json!(0))
        );
        assert!(queue["term"].as_u64().unwrap() > 0);
    }

    api.post("/v1/topics", &json!({"name": "orders"}))
        .await
        .expect(200);
    // What a GET shows can be sent back.
    let mut same = topic["config"].clone();
    same["name"] = json!("orders");
    api.post("/v1/topics", &same).await.expect(200);
    let other = json!({"name": "orders", "queues": 5});
    let body = api
        .post("/v1/topics", &other)
        .await
        .problem(409, "topic_exists");
    assert_eq!(body["outcome"], "not_committed");

    let shown = api.get("/v1/topics/orders").await.expect(200);
    assert_eq!(shown["config"], topic["config"]);
    let listed = api.get("/v1/topics").await.expect(200);
    assert_eq!(listed["topics"].as_array().unwrap().len(), 1);
    assert_eq!(listed["topics"][0]["name"], "orders");

    let gone = api
        .send(api.request(Method::DELETE, "/v1/topics/orders"))
        .await;
    assert!(gone.expect(204).is_null() && gone.bytes.is_empty());
    api.get("/v1/topics/orders")
        .await
        .problem(404, "topic_not_found");
    let again = api
        .send(api.request(Method::DELETE, "/v1/topics/orders"))
        .await;
    again.problem(404, "topic_not_found");
    assert_eq!(
        api.get("/v1/topics").await.expect(200),
        json!({"topics": []})
    );
}

#[tokio::test]
async fn a_recreated_name_is_another_topic() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["old"]).await;
    api.send(api.request(Method::DELETE, "/v1/topics/t"))
        .await
        .expect(204);
    api.topic("t", 1).await;
    assert_eq!(api.store("t", 0, &["new"]).await, [0]);
    let found = api.get("/v1/topics/t/queues/0/messages").await.expect(200);
    assert_eq!(found["messages"][0]["value"], "new");
}

#[tokio::test]
async fn a_change_keeps_what_it_does_not_name() {
    let api = Api::start().await.unwrap();
    let body =
        json!({"name": "t", "queues": 2, "retention": {"max_age_ms": 5000, "max_bytes": 90}});
    api.post("/v1/topics", &body).await.expect(201);
    let patch = json!({"queues": 3, "retention": {"max_bytes": null}, "max_message_bytes": 500});
    let changed = api
        .call(Method::PATCH, "/v1/topics/t", &patch)
        .await
        .expect(200);
    assert_eq!(changed["queues"].as_array().unwrap().len(), 3);
    let config = &changed["config"];
    assert_eq!(config["queues"], 3);
    assert_eq!(
        config["retention"],
        json!({"max_age_ms": 5000, "max_bytes": null})
    );
    assert_eq!(config["max_message_bytes"], 500);
    assert_eq!(
        config["hash_queues"], 2,
        "keyed messages stay where they hash to"
    );
    assert_eq!(api.store("t", 2, &["in the new queue"]).await, [0]);
    let same = json!({"name": "t", "queues": 3, "max_message_bytes": 500,
        "retention": {"max_age_ms": 5000, "max_bytes": null}});
    api.post("/v1/topics", &same).await.expect(200);
    for (patch, said) in [
        (json!({"queues": 2}), "only grow"),
        (json!({"replicas": 3}), "unknown field `replicas`"),
        (json!({"ttl_ms": 0}), "ttl_ms is 0"),
        (
            json!({"backlog": {"max_messages": 0}}),
            "backlog.max_messages is 0",
        ),
    ] {
        let answer = api.call(Method::PATCH, "/v1/topics/t", &patch).await;
        let body = answer.problem(400, "invalid_request");
        assert!(body["detail"].as_str().unwrap().contains(said), "{body}");
    }
    let patch = json!({"queues": 9});
    api.call(Method::PATCH, "/v1/topics/none", &patch)
        .await
        .problem(404, "topic_not_found");
}

#[tokio::test]
async fn more_replicas_than_nodes() {
    let api = Api::start().await.unwrap();
    let answer = api
        .post("/v1/topics", &json!({"name": "t", "replicas": 3}))
        .await;
    let body = answer.problem(503, "not_enough_replicas");
    assert_eq!(body["retryable"], true);
    assert_eq!(body["outcome"], "not_committed");
}

#[tokio::test]
async fn an_async_topic_names_its_durability() {
    let api = Api::start().await.unwrap();
    for (flush, durability) in [("async", "majority_written"), ("sync", "majority_fsync")] {
        let topic = json!({"name": flush, "queues": 1, "flush": flush});
        let topic = api.post("/v1/topics", &topic).await.expect(201);
        assert_eq!(topic["queues"][0]["epoch"], 0);
        let path = format!("/v1/topics/{flush}/messages");
        let message = json!({"messages": [{"value": "a"}]});
        let answer = api.post(&path, &message).await.expect(200);
        assert_eq!(answer["durability"], durability);
    }
}
