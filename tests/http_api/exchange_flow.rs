//! Exchanges and topics that don't take what is for them: each delays only itself.

use anyhow::ensure;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::exchanges::{bind, content, exchange, publish, wait_for};
use crate::support::eventually;

/// A topic with one queue that is bound to `x` beside `a`, which takes everything.
async fn beside_another(api: &Api, name: &str, backlog: Value) {
    let topic = json!({"name": name, "queues": 1, "backlog": backlog});
    api.post("/v1/topics", &topic).await.expect(201);
    api.topic("a", 2).await;
    exchange(api, "x", "fanout").await;
    for topic in [name, "a"] {
        bind(api, "x", topic, &json!({})).await.expect(201);
    }
}

async fn count_of(api: &Api, metric: &str) -> u64 {
    let metrics = api.get("/metrics").await.text();
    let line = metrics.lines().find(|line| line.starts_with(metric));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn a_full_topic_gets_the_rest_when_it_has_room_and_holds_up_only_itself() {
    let api = Api::start().await.unwrap();
    beside_another(&api, "small", json!({"max_messages": 10})).await;
    let first = json!({"offsets": [{"topic": "small", "queue": 0, "offset": 0}]});
    api.call(Method::PUT, "/v1/groups/g/offsets", &first)
        .await
        .expect(200);
    let expected: Vec<String> = (100..125).map(|n| n.to_string()).collect();
    let messages: Vec<Value> = expected
        .iter()
        .map(|n| json!({"value": n, "key": "k"}))
        .collect();
    publish(&api, "x", messages.into()).await.expect(200);
    wait_for(&api, "a", 25).await;
    wait_for(&api, "small", 10).await;
    for consumed in [4, 14, 20] {
        let so_far = json!({"offsets": [{"topic": "small", "queue": 0, "offset": consumed}]});
        api.call(Method::PUT, "/v1/groups/g/offsets", &so_far)
            .await
            .expect(200);
        wait_for(&api, "small", (consumed + 10).min(25)).await;
    }
    let found = content(&api, "small").await;
    let found: Vec<_> = found.iter().map(|m| m["value"].as_str().unwrap()).collect();
    assert_eq!(found, expected, "in order");
}

#[tokio::test]
async fn a_full_topic_that_drops_holds_up_only_itself() {
    let api = Api::start().await.unwrap();
    let backlog = json!({"max_messages": 1, "on_full": "drop_newest"});
    beside_another(&api, "drops", backlog).await;
    // All in one queue of the exchange, in more pieces than are read at once.
    let count = 2_000;
    for first in (0..count).step_by(400) {
        let each = first..first + 400;
        let messages = each.map(|n: u64| json!({"value": n.to_string(), "key": "k"}));
        publish(&api, "x", messages.collect()).await.expect(200);
    }
    eventually("the other topic has them all", || async {
        let topic = api.get("/v1/topics/a").await.expect(200);
        let queues = topic["queues"].as_array().unwrap().iter();
        let has = queues.filter_map(|queue| queue["end_offset"].as_u64());
        let has: u64 = has.sum();
        ensure!(has == count, "{has} of {count}");
        Ok(())
    })
    .await
    .unwrap();
    // What is dropped is counted, and one that finds room later is taken.
    let skipped = "quorate_exchange_skipped_messages_total";
    eventually("the rest is dropped", || async {
        let dropped = count_of(&api, skipped).await;
        ensure!(dropped == count - 1, "{dropped} of {count}");
        Ok(())
    })
    .await
    .unwrap();
    let consumed = json!({"offsets": [{"topic": "drops", "queue": 0, "offset": 1}]});
    api.call(Method::PUT, "/v1/groups/g/offsets", &consumed)
        .await
        .expect(200);
    publish(&api, "x", json!([{"value": "later", "key": "k"}]))
        .await
        .expect(200);
    let found = wait_for(&api, "drops", 2).await;
    assert_eq!(
        (&found[0]["value"], &found[1]["value"]),
        (&json!("0"), &json!("later"))
    );
}

#[tokio::test]
async fn a_message_larger_than_a_topics_backlog_stops_nothing() {
    let api = Api::start().await.unwrap();
    let backlog = json!({"max_messages": 1, "max_bytes": 10_000});
    beside_another(&api, "small", backlog).await;
    let message = |bytes: usize| json!({"value": "v".repeat(bytes), "key": "k"});
    // It could never be brought to all topics that it is for.
    let mixed = publish(&api, "x", json!([message(9_950), message(1)])).await;
    let mixed = mixed.expect(207);
    assert_eq!(mixed["results"][0]["error"]["code"], "invalid_request");
    assert_eq!(mixed["results"][1]["routed"], json!(["small", "a"]));
    wait_for(&api, "small", 1).await;
    // What is to come is made impossible when it is on its way already.
    publish(&api, "x", json!([message(5_000), message(2)]))
        .await
        .expect(200);
    wait_for(&api, "a", 3).await;
    let tighter = json!({"backlog": {"max_messages": null, "max_bytes": 2_000}});
    api.call(Method::PATCH, "/v1/topics/small", &tighter)
        .await
        .expect(200);
    let found = wait_for(&api, "small", 2).await;
    assert_eq!(found[1]["value"], "vv");
    let skipped = "quorate_exchange_skipped_messages_total";
    assert_eq!(count_of(&api, skipped).await, 1);
}
