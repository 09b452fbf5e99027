//! Exchanges: kinds, bindings, publishing, and that every bound topic gets each message once.

use std::collections::BTreeMap;

use anyhow::bail;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::eventually;

pub async fn exchange(api: &Api, name: &str, kind: &str) {
    let path = format!("/v1/exchanges/{name}");
    api.call(Method::PUT, &path, &json!({"kind": kind}))
        .await
        .expect(201);
}

pub async fn bind(api: &Api, exchange: &str, topic: &str, binding: &Value) -> Answer {
    let path = format!("/v1/exchanges/{exchange}/bindings/{topic}");
    api.call(Method::PUT, &path, binding).await
}

async fn delete(api: &Api, path: &str) -> Answer {
    api.send(api.request(Method::DELETE, path)).await
}

pub async fn publish(api: &Api, exchange: &str, messages: Value) -> Answer {
    let path = format!("/v1/exchanges/{exchange}/messages");
    api.post(&path, &json!({"messages": messages})).await
}

/// The topics that a message is routed to.
async fn routed(api: &Api, exchange: &str, message: Value) -> Vec<String> {
    let answer = publish(api, exchange, json!([message])).await;
    if answer.status == 404 {
        answer.problem(404, "unroutable");
        return Vec::new();
    }
    let results = answer.expect(200)["results"].clone();
    assert!(results[0]["message_id"].is_string(), "{results}");
    let routed = results[0]["routed"].as_array().unwrap().iter();
    routed.map(|t| t.as_str().unwrap().to_owned()).collect()
}

/// All messages of a topic, queue by queue.
pub async fn content(api: &Api, topic: &str) -> Vec<Value> {
    let queues = api.get(&format!("/v1/topics/{topic}")).await.expect(200)["queues"]
        .as_array()
        .unwrap()
        .len();
    let mut found = Vec::new();
    for queue in 0..queues {
        let path = format!("/v1/topics/{topic}/queues/{queue}/messages?offset=earliest");
        let page = api.get(&format!("{path}&max_messages=1000")).await;
        found.extend(page.expect(200)["messages"].as_array().unwrap().clone());
    }
    found
}

/// Waits until a topic has so many messages.
pub async fn wait_for(api: &Api, topic: &str, count: usize) -> Vec<Value> {
    eventually(&format!("{topic} has {count} messages"), || async {
        let found = content(api, topic).await;
        match found.len() == count {
            true => Ok(found),
            false => bail!("{} of {count}", found.len()),
        }
    })
    .await
    .unwrap()
}

fn values(messages: &[Value]) -> Vec<&str> {
    let mut values: Vec<_> = messages
        .iter()
        .map(|m| m["value"].as_str().unwrap())
        .collect();
    values.sort_unstable();
    values
}

#[tokio::test]
async fn made_listed_bound_and_deleted() {
    let api = Api::start().await.unwrap();
    api.topic("orders", 1).await;
    api.topic("audit", 1).await;
    exchange(&api, "shop", "topic").await;
    let again = json!({"kind": "topic"});
    let found = api
        .call(Method::PUT, "/v1/exchanges/shop", &again)
        .await
        .expect(200);
    assert_eq!(
        found,
        json!({"name": "shop", "kind": "topic", "bindings": []})
    );
    api.call(
        Method::PUT,
        "/v1/exchanges/shop",
        &json!({"kind": "fanout"}),
    )
    .await
    .problem(409, "exchange_exists");
    exchange(&api, "all", "fanout").await;

    let key = json!({"routing_key": "order.*.created"});
    bind(&api, "shop", "orders", &key).await.expect(201);
    let same = bind(&api, "shop", "orders", &key).await.expect(200);
    let bound = json!({"topic": "orders", "routing_key": "order.*.created"});
    assert_eq!(same, bound);
    let keys = json!({"routing_keys": ["order.#", "points.#"]});
    bind(&api, "shop", "audit", &keys).await.expect(201);
    let audit = json!({"topic": "audit", "routing_keys": ["order.#", "points.#"]});
    let shop = api.get("/v1/exchanges/shop").await.expect(200);
    assert_eq!(shop["bindings"], json!([audit, bound]));
    let one = api
        .get("/v1/exchanges/shop/bindings/audit")
        .await
        .expect(200);
    assert_eq!(one, audit);
    let both = api.get("/v1/exchanges/shop/bindings").await.expect(200);
    assert_eq!(both["bindings"], shop["bindings"]);
    let all = api.get("/v1/exchanges").await.expect(200)["exchanges"].clone();
    let names: Vec<_> = all.as_array().unwrap().iter().map(|e| &e["name"]).collect();
    assert_eq!(names, ["all", "shop"]);

    delete(&api, "/v1/exchanges/shop/bindings/orders")
        .await
        .expect(204);
    delete(&api, "/v1/exchanges/shop/bindings/orders")
        .await
        .problem(404, "binding_not_found");
    api.get("/v1/exchanges/shop/bindings/orders")
        .await
        .problem(404, "binding_not_found");
    // A deleted topic is bound no more, nor is another one of its name.
    delete(&api, "/v1/topics/audit").await.expect(204);
    api.topic("audit", 1).await;
    let shop = api.get("/v1/exchanges/shop").await.expect(200);
    assert_eq!(shop["bindings"], json!([]));
    delete(&api, "/v1/exchanges/shop").await.expect(204);
    delete(&api, "/v1/exchanges/shop")
        .await
        .problem(404, "exchange_not_found");
    // Deleted, its name is free for another kind.
    exchange(&api, "shop", "headers").await;
}

#[tokio::test]
async fn what_is_refused() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    exchange(&api, "x", "direct").await;
    let put = |path: &'static str, body: Value| {
        let api = &api;
        async move { api.call(Method::PUT, path, &body).await }
    };
    put("/v1/exchanges/_x", json!({"kind": "fanout"}))
        .await
        .problem(400, "invalid_name");
    put("/v1/exchanges/y", json!({"kind": "round"}))
        .await
        .problem(400, "invalid_request");
    put(
        "/v1/exchanges/y",
        json!({"kind": "fanout", "durable": true}),
    )
    .await
    .problem(400, "invalid_request");
    let key = json!({"routing_key": "a"});
    bind(&api, "y", "t", &key)
        .await
        .problem(404, "exchange_not_found");
    bind(&api, "x", "none", &key)
        .await
        .problem(404, "topic_not_found");
    bind(&api, "x", "_exchange.x", &key)
        .await
        .problem(400, "invalid_name");
    for binding in [
        json!({}),
        json!({"headers": {}}),
        json!({"routing_key": "x".repeat(256)}),
    ] {
        bind(&api, "x", "t", &binding)
            .await
            .problem(400, "invalid_request");
    }
    api.get("/v1/exchanges/y")
        .await
        .problem(404, "exchange_not_found");
    publish(&api, "y", json!([{"value": "a"}]))
        .await
        .problem(404, "exchange_not_found");
    bind(&api, "x", "t", &key).await.expect(201);
    for messages in [
        json!([]),
        json!([{"routing_key": "a", "queue": 0}]),
        json!([{"routing_key": "x".repeat(256)}]),
        json!([{"routing_key": 1}]),
    ] {
        publish(&api, "x", messages)
            .await
            .problem(400, "invalid_request");
    }
    // The topic's own limit counts.
    let large = json!([{"routing_key": "a", "value": "x".repeat(10_001)}]);
    publish(&api, "x", large)
        .await
        .problem(413, "message_too_large");
    // A topic has no routing keys, nor its users the exchange's store.
    let message = json!({"messages": [{"value": "a", "routing_key": "a"}]});
    api.post("/v1/topics/t/messages", &message)
        .await
        .problem(400, "invalid_request");
    api.post(
        "/v1/topics/_exchange.x/messages",
        &json!({"messages": [{}]}),
    )
    .await
    .problem(400, "invalid_name");
}

#[tokio::test]
async fn each_kind_routes_in_its_way() {
    let api = Api::start().await.unwrap();
    for topic in ["a", "b"] {
        api.topic(topic, 2).await;
    }
    for kind in ["fanout", "direct", "topic", "headers"] {
        exchange(&api, kind, kind).await;
    }
    for topic in ["a", "b"] {
        bind(&api, "fanout", topic, &json!({})).await.expect(201);
    }
    assert_eq!(routed(&api, "fanout", json!({})).await, ["a", "b"]);

    bind(&api, "direct", "a", &json!({"routing_key": "x"}))
        .await
        .expect(201);
    let keys = json!({"routing_keys": ["x", "y"]});
    bind(&api, "direct", "b", &keys).await.expect(201);
    let key = |key: &str| json!({"value": key, "routing_key": key});
    assert_eq!(routed(&api, "direct", key("x")).await, ["a", "b"]);
    assert_eq!(routed(&api, "direct", key("y")).await, ["b"]);
    assert_eq!(routed(&api, "direct", key("z")).await, [""; 0]);

    bind(
        &api,
        "topic",
        "a",
        &json!({"routing_key": "order.*.created"}),
    )
    .await
    .expect(201);
    bind(&api, "topic", "b", &json!({"routing_key": "order.#"}))
        .await
        .expect(201);
    assert_eq!(
        routed(&api, "topic", key("order.7.created")).await,
        ["a", "b"]
    );
    assert_eq!(routed(&api, "topic", key("order")).await, ["b"]);
    assert_eq!(
        routed(&api, "topic", key("orders.7.created")).await,
        [""; 0]
    );

    let wanted = json!({"headers": {"format": "pdf", "vip": null}});
    bind(&api, "headers", "a", &wanted).await.expect(201);
    let any = json!({"headers": {"format": "pdf", "vip": null}, "match": "any"});
    bind(&api, "headers", "b", &any).await.expect(201);
    let with = |headers: Value| json!({"headers": headers});
    let both = with(json!({"format": "pdf", "vip": "yes"}));
    assert_eq!(routed(&api, "headers", both).await, ["a", "b"]);
    assert_eq!(
        routed(&api, "headers", with(json!({"vip": ""}))).await,
        ["b"]
    );
    assert_eq!(
        routed(&api, "headers", with(json!({"format": "zip"}))).await,
        [""; 0]
    );

    // What was routed arrives.
    wait_for(&api, "a", 4).await;
    wait_for(&api, "b", 7).await;
}

#[tokio::test]
async fn topics_get_the_message_as_it_was_published() {
    let api = Api::start().await.unwrap();
    api.topic("a", 4).await;
    exchange(&api, "x", "direct").await;
    bind(&api, "x", "a", &json!({"routing_key": "k"}))
        .await
        .expect(201);
    let message = json!({"value_base64": "/wA=", "key": "order-17", "tag": "created",
        "headers": {"trace": "a1"}, "routing_key": "k"});
    let answer = publish(&api, "x", json!([message])).await.expect(200);
    assert_eq!(answer["durability"], "majority_fsync");
    let found = wait_for(&api, "a", 1).await.remove(0);
    assert_eq!(found["value_base64"], "/wA=");
    assert_eq!(
        (&found["key"], &found["tag"]),
        (&json!("order-17"), &json!("created"))
    );
    let headers = json!({"trace": "a1", "quorate.exchange.name": "x",
        "quorate.exchange.routing_key": "k",
        "quorate.exchange.message_id": answer["results"][0]["message_id"]});
    assert_eq!(found["headers"], headers);
    // Its queue is the one that a producer's message with that key goes to.
    let produced = json!({"messages": [{"key": "order-17"}]});
    let produced = api
        .post("/v1/topics/a/messages", &produced)
        .await
        .expect(200);
    assert_eq!(produced["results"][0]["queue"], found["queue"]);
}

#[tokio::test]
async fn a_key_keeps_its_order_in_every_topic() {
    let api = Api::start().await.unwrap();
    api.topic("a", 3).await;
    api.topic("b", 1).await;
    exchange(&api, "x", "fanout").await;
    for topic in ["a", "b"] {
        bind(&api, "x", topic, &json!({})).await.expect(201);
    }
    let count = 200;
    for first in (0..count).step_by(20) {
        let messages = (first..first + 20)
            .map(|n: u64| json!({"key": format!("k{}", n % 7), "value": n.to_string()}));
        publish(&api, "x", messages.collect()).await.expect(200);
    }
    for topic in ["a", "b"] {
        let found = wait_for(&api, topic, count as usize).await;
        let mut by_key: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for message in &found {
            let value = message["value"].as_str().unwrap().parse().unwrap();
            by_key
                .entry(message["key"].as_str().unwrap())
                .or_default()
                .push(value);
        }
        assert_eq!(by_key.len(), 7);
        for (key, values) in by_key {
            assert!(values.is_sorted(), "{topic} {key}: {values:?}");
        }
    }
}

#[tokio::test]
async fn messages_that_no_binding_takes_fail_alone() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    exchange(&api, "x", "direct").await;
    let lost = publish(&api, "x", json!([{"routing_key": "k"}])).await;
    let problem = lost.problem(404, "unroutable");
    assert_eq!(problem["outcome"], "not_committed");
    assert_eq!(problem["retryable"], false);
    bind(&api, "x", "a", &json!({"routing_key": "k"}))
        .await
        .expect(201);
    let messages = json!([{"routing_key": "k", "value": "1"}, {"routing_key": "no"},
        {"routing_key": "k", "value": "2"}]);
    let mixed = publish(&api, "x", messages).await.expect(207);
    assert_eq!(mixed["results"][0]["routed"], json!(["a"]));
    assert_eq!(mixed["results"][1]["error"]["code"], "unroutable");
    assert_eq!(mixed["results"][2]["routed"], json!(["a"]));
    let found = wait_for(&api, "a", 2).await;
    assert_eq!(values(&found), ["1", "2"]);
}

#[tokio::test]
async fn a_retry_is_stored_once_and_gets_the_first_answer() {
    let api = Api::start().await.unwrap();
    api.topic("a", 2).await;
    api.topic("b", 2).await;
    exchange(&api, "x", "direct").await;
    bind(&api, "x", "a", &json!({"routing_key": "k"}))
        .await
        .expect(201);
    let body = json!({"messages": [{"routing_key": "k", "value": "1"}, {"routing_key": "k", "value": "2"}]});
    let keyed = |body: Value| {
        let request = api.request(Method::POST, "/v1/exchanges/x/messages");
        api.send(request.header("idempotency-key", "one").json(&body))
    };
    let first = keyed(body.clone()).await.expect(200);
    assert_eq!(first["results"][0]["routed"], json!(["a"]));
    // Whatever was bound meanwhile.
    bind(&api, "x", "b", &json!({"routing_key": "k"}))
        .await
        .expect(201);
    assert_eq!(keyed(body).await.expect(200), first);
    let other = json!({"messages": [{"routing_key": "k", "value": "3"}]});
    keyed(other).await.problem(400, "invalid_request");

    let producer = api.post("/v1/producers", &json!({})).await.expect(200);
    let numbered = |sequence: u64| {
        let mark = json!({"id": producer["id"], "epoch": producer["epoch"], "sequence": sequence});
        let messages = json!([{"routing_key": "k", "value": format!("p{sequence}")}]);
        json!({"messages": messages, "producer": mark})
    };
    let path = "/v1/exchanges/x/messages";
    let stored = api.post(path, &numbered(0)).await.expect(200);
    assert_eq!(stored["results"][0]["routed"], json!(["a", "b"]));
    assert_eq!(api.post(path, &numbered(0)).await.expect(200), stored);
    api.post(path, &numbered(2))
        .await
        .problem(409, "out_of_order_sequence");
    api.post(path, &numbered(1)).await.expect(200);
    let found = wait_for(&api, "a", 4).await;
    assert_eq!(values(&found), ["1", "2", "p0", "p1"]);
    let found = wait_for(&api, "b", 2).await;
    assert_eq!(values(&found), ["p0", "p1"]);

    // A request under a key is taken or refused as a whole. Where bindings were taken away, nobody
    // can tell whether the first of its like had one.
    let mixed = json!([{"routing_key": "k"}, {"routing_key": "no"}]);
    let request = api
        .request(Method::POST, path)
        .header("idempotency-key", "two");
    let refused = api.send(request.json(&json!({"messages": mixed}))).await;
    assert_eq!(
        refused.problem(404, "unroutable")["outcome"],
        "not_committed"
    );
    delete(&api, "/v1/exchanges/x/bindings/b").await.expect(204);
    let request = api
        .request(Method::POST, path)
        .header("idempotency-key", "two");
    let refused = api.send(request.json(&json!({"messages": mixed}))).await;
    assert_eq!(refused.problem(404, "unroutable")["outcome"], "unknown");
    assert_eq!(content(&api, "a").await.len(), 4);
}

#[tokio::test]
async fn restarts_bring_nothing_twice_and_lose_nothing() {
    let mut api = Api::start().await.unwrap();
    api.topic("a", 3).await;
    exchange(&api, "x", "fanout").await;
    bind(&api, "x", "a", &json!({})).await.expect(201);
    let mut expected = Vec::new();
    for round in 0..3 {
        let messages: Vec<Value> = (0..300)
            .map(|n| json!({"value": format!("{round}-{n}")}))
            .collect();
        expected.extend((0..300).map(|n| format!("{round}-{n}")));
        publish(&api, "x", messages.into()).await.expect(200);
        // At once: while it is being forwarded.
        api.cluster.node(1).kill();
        api.cluster.node(1).spawn().unwrap();
        api.cluster.wait_ready().await.unwrap();
    }
    expected.sort_unstable();
    let found = wait_for(&api, "a", expected.len()).await;
    assert_eq!(values(&found), expected);
    // Nothing comes after it: what is published next is the next that arrives.
    publish(&api, "x", json!([{"value": "last"}]))
        .await
        .expect(200);
    let found = wait_for(&api, "a", expected.len() + 1).await;
    assert!(values(&found).contains(&"last"));
    let metrics = api.get("/metrics").await.text();
    assert!(
        metrics.contains("quorate_exchange_published_messages_total 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn what_was_for_a_deleted_topic_goes_nowhere() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    api.topic("b", 1).await;
    exchange(&api, "x", "fanout").await;
    for topic in ["a", "b"] {
        bind(&api, "x", topic, &json!({})).await.expect(201);
    }
    publish(&api, "x", json!([{"value": "1"}]))
        .await
        .expect(200);
    wait_for(&api, "b", 1).await;
    delete(&api, "/v1/topics/b").await.expect(204);
    api.topic("b", 1).await;
    let answer = publish(&api, "x", json!([{"value": "2"}]))
        .await
        .expect(200);
    assert_eq!(answer["results"][0]["routed"], json!(["a"]));
    wait_for(&api, "a", 2).await;
    assert_eq!(content(&api, "b").await.len(), 0);
}

#[tokio::test]
async fn a_time_to_live_goes_on_in_the_topic() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    exchange(&api, "x", "fanout").await;
    bind(&api, "x", "a", &json!({})).await.expect(201);
    let messages = json!([{"value": "short", "ttl_ms": 8_000}, {"value": "long"}]);
    publish(&api, "x", messages).await.expect(200);
    let found = wait_for(&api, "a", 2).await;
    assert_eq!(values(&found), ["long", "short"]);
    let found = wait_for(&api, "a", 1).await;
    assert_eq!(values(&found), ["long"]);
}

#[tokio::test]
async fn more_messages_than_an_entry_has_batches_arrive_in_order() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    exchange(&api, "x", "fanout").await;
    bind(&api, "x", "a", &json!({})).await.expect(201);
    let count = 5_000;
    let messages = (0..count).map(|n| json!({"key": "k", "value": n.to_string()}));
    publish(&api, "x", messages.collect()).await.expect(200);
    let path = "/v1/topics/a/queues/0/messages?max_messages=10000";
    let found = eventually("all of them arrive", || async {
        let page = api.get(path).await.expect(200);
        let found = page["messages"].as_array().unwrap().clone();
        match found.len() == count {
            true => Ok(found),
            false => bail!("{} of {count}", found.len()),
        }
    });
    for (n, message) in found.await.unwrap().iter().enumerate() {
        assert_eq!(message["value"], n.to_string());
    }
}

#[tokio::test]
async fn how_far_an_exchange_is_is_no_group_of_its_users() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    exchange(&api, "x", "fanout").await;
    bind(&api, "x", "a", &json!({})).await.expect(201);
    publish(&api, "x", json!([{"value": "1"}]))
        .await
        .expect(200);
    wait_for(&api, "a", 1).await;
    // The progress is saved some time after that.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(3);
    while std::time::Instant::now() < until {
        let groups = api.get("/v1/groups").await.expect(200);
        assert_eq!(groups, json!({"groups": []}));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    delete(&api, "/v1/exchanges/x").await.expect(204);
}
