//! What became of single messages, of topics that are traced.

use anyhow::ensure;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::support::eventually;

async fn trace(api: &Api, id: &str) -> Value {
    let path = format!("/v1/topics/t/messages/{id}/trace");
    api.get(&path).await.expect(200)
}

fn kinds(trace: &Value) -> Vec<&str> {
    let events = trace["events"].as_array().expect("events").iter();
    events
        .map(|event| event["event"].as_str().expect("event"))
        .collect()
}

/// Waits for the writer, which nobody else waits for.
async fn traced(api: &Api, id: &str, expected: &[&str]) -> Value {
    eventually("everything is written", || async {
        let path = format!("/v1/topics/t/messages/{id}/trace");
        let answer = api.get(&path).await;
        // The topic of traces is being made.
        ensure!(answer.status != 503, "{}", answer.text());
        let trace = answer.expect(200);
        ensure!(kinds(&trace) == expected, "{trace}");
        Ok(trace)
    })
    .await
    .unwrap()
}

async fn produce(api: &Api, count: usize) -> Vec<String> {
    let messages: Vec<Value> = (0..count)
        .map(|n| json!({"value": n.to_string()}))
        .collect();
    let body = json!({"messages": messages});
    let answer = api.post("/v1/topics/t/messages", &body).await.expect(200);
    let results = answer["results"].as_array().unwrap().iter();
    results
        .map(|r| r["message_id"].as_str().unwrap().to_owned())
        .collect()
}

async fn receive(api: &Api, consumer: &str, max: usize) -> Vec<String> {
    let body = json!({"topics": ["t"], "max_messages": max, "wait_ms": 5000, "lease_ms": 60000,
        "consumer": consumer});
    let answer = api.post("/v1/groups/g/receive", &body).await.expect(200);
    let messages = answer["messages"].as_array().unwrap().iter();
    messages
        .map(|m| m["receipt"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_leased_messages() {
    let api = Api::start().await.unwrap();
    let topic = json!({"name": "t", "queues": 1, "trace": true});
    let topic = api.post("/v1/topics", &topic).await.expect(201);
    assert_eq!(topic["config"]["trace"], true);
    let policy = json!({"max_deliveries": 1, "backoff_ms": [0]});
    let put = api.call(Method::PUT, "/v1/groups/g/retry_policy", &policy);
    assert!(put.await.status.is_success());
    let ids = produce(&api, 3).await;
    assert_eq!(kinds(&trace(&api, &ids[0]).await), ["stored"]);
    let receipts = receive(&api, "worker-7", 3).await;
    let ack = json!({"receipts": [receipts[0]]});
    api.post("/v1/groups/g/ack", &ack).await.expect(200);
    let nack = json!({"receipts": [receipts[1]]});
    api.post("/v1/groups/g/nack", &nack).await.expect(200);
    let through = json!({"receipts": [], "through": receipts[2]});
    api.post("/v1/groups/g/ack", &through).await.expect(200);
    let acked = traced(&api, &ids[0], &["stored", "delivered", "acked"]).await;
    let events = &acked["events"];
    assert!(events[0]["term"].as_u64().unwrap() > 0, "{acked}");
    assert_eq!(events[1]["group"], "g");
    assert_eq!(events[1]["consumer"], "worker-7");
    assert_eq!(events[1]["delivery_count"], 1);
    assert_eq!(events[1]["node"], 1);
    assert_eq!(
        (&acked["offset"], &acked["traced"], &acked["more"]),
        (&json!(0), &json!(true), &json!(false))
    );
    let last = traced(&api, &ids[2], &["stored", "delivered", "acked_through"]).await;
    assert_eq!(last["events"][2]["group"], "g");
    let dead = eventually("the death is written", || async {
        let trace = trace(&api, &ids[1]).await;
        let dead = trace["events"].as_array().unwrap().iter();
        let dead = dead.clone().find(|event| event["event"] == "dead").cloned();
        ensure!(
            dead.is_some() && kinds(&trace).contains(&"nacked"),
            "{trace}"
        );
        Ok(dead.unwrap_or_default())
    })
    .await
    .unwrap();
    assert_eq!(
        (&dead["reason"], &dead["delivery_count"]),
        (&json!("nacked"), &json!(1))
    );
    // The topic of traces is the server's own.
    let topics = api.get("/v1/topics").await.expect(200).to_string();
    assert!(!topics.contains("_trace"), "{topics}");
    api.get("/v1/topics/_trace/messages?key=x")
        .await
        .problem(400, "invalid_name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_commits_offsets_passes_messages() {
    let api = Api::start().await.unwrap();
    api.post("/v1/topics", &json!({"name": "t", "queues": 1}))
        .await
        .expect(201);
    let ids = produce(&api, 4).await;
    let commit = |group: &str, offset: u64| {
        let path = format!("/v1/groups/{group}/offsets");
        let body = json!({"offsets": [{"topic": "t", "queue": 0, "offset": offset}]});
        let api = &api;
        async move { api.call(Method::PUT, &path, &body).await.expect(200) }
    };
    commit("before", 4).await;
    let patch = |on: bool| {
        let (api, body) = (&api, json!({"trace": on}));
        async move {
            api.call(Method::PATCH, "/v1/topics/t", &body)
                .await
                .expect(200)
        }
    };
    assert_eq!(patch(true).await["config"]["trace"], true);
    commit("a", 1).await;
    commit("a", 3).await;
    commit("b", 4).await;
    // What was committed while the topic was not traced is not known.
    let third = traced(&api, &ids[2], &["stored", "passed", "passed"]).await;
    let groups: Vec<&Value> = third["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["group"])
        .collect();
    assert!(
        groups.contains(&&json!("a")) && groups.contains(&&json!("b")),
        "{third}"
    );
    let last = traced(&api, &ids[3], &["stored", "passed"]).await;
    assert_eq!(last["events"][1]["group"], "b");
    patch(false).await;
    assert_eq!(trace(&api, &ids[3]).await["traced"], false);
    let path = format!("/v1/topics/t/messages/{}/trace", &ids[0][1..]);
    api.get(&path).await.problem(404, "message_not_found");
}
