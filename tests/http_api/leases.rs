//! Consume by lease: receive, ack, nack, extend, push.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};

/// Longer than any answer that is not to wait takes.
const AT_ONCE: Duration = Duration::from_secs(10);

pub async fn receive(api: &Api, group: &str, more: Value) -> Vec<Value> {
    let mut body = json!({"topics": ["t"]});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    let path = format!("/v1/groups/{group}/receive");
    let answer = api.post(&path, &body).await.expect(200);
    answer["messages"].as_array().unwrap().clone()
}

pub async fn settle(api: &Api, group: &str, how: &str, body: Value) -> Answer {
    api.post(&format!("/v1/groups/{group}/{how}"), &body).await
}

pub fn values(messages: &[Value]) -> Vec<&str> {
    let each = messages.iter();
    each.map(|m| m["value"].as_str().unwrap()).collect()
}

pub fn receipts(messages: &[Value]) -> Vec<Value> {
    messages.iter().map(|m| m["receipt"].clone()).collect()
}

/// Asks until the messages are there.
pub async fn receive_some(api: &Api, group: &str, more: Value) -> Vec<Value> {
    let mut body = more;
    body["wait_ms"] = json!(20_000);
    let found = receive(api, group, body).await;
    assert!(!found.is_empty(), "nothing came");
    found
}

async fn in_flight(api: &Api, group: &str) -> Value {
    let path = format!("/v1/groups/{group}/in_flight");
    api.get(&path).await.expect(200)["queues"][0].clone()
}

#[tokio::test]
async fn leased_messages_are_nobody_elses_until_they_are_done() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b", "c"]).await;
    let first = receive(&api, "g", json!({"max_messages": 2})).await;
    assert_eq!(values(&first), ["a", "b"]);
    assert_eq!(first[0]["delivery_count"], 1);
    assert_eq!(
        (&first[0]["topic"], &first[0]["queue"]),
        (&json!("t"), &json!(0))
    );
    assert_eq!(first[1]["offset"], 1);
    let second = receive(&api, "g", json!({})).await;
    assert_eq!(values(&second), ["c"]);
    assert!(receive(&api, "g", json!({})).await.is_empty());
    // Another group has its own.
    assert_eq!(receive(&api, "h", json!({})).await.len(), 3);

    let done = settle(&api, "g", "ack", json!({"receipts": [first[1]["receipt"]]})).await;
    let done = done.expect(200);
    assert_eq!(done["results"][0]["receipt"], first[1]["receipt"]);
    let place = in_flight(&api, "g").await;
    let counts = |place: &Value| {
        ["offset", "next_offset", "leased", "waiting", "dead"].map(|n| place[n].as_u64().unwrap())
    };
    assert_eq!(counts(&place), [0, 3, 2, 0, 0]);
    let both = json!({"receipts": [first[0]["receipt"], second[0]["receipt"]]});
    settle(&api, "g", "ack", both.clone()).await.expect(200);
    // Again is harmless.
    settle(&api, "g", "ack", both).await.expect(200);
    let offsets = api.get("/v1/groups/g/offsets").await.expect(200);
    assert_eq!(
        (
            &offsets["offsets"][0]["offset"],
            &offsets["offsets"][0]["lag"]
        ),
        (&json!(3), &json!(0))
    );
    assert_eq!(counts(&in_flight(&api, "g").await), [3, 3, 0, 0, 0]);
}

#[tokio::test]
async fn what_ends_without_a_word_comes_again_and_counts() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let first = receive(&api, "g", json!({"lease_ms": 300})).await;
    // Nobody asks; then somebody waits.
    let again = receive_some(&api, "g", json!({"lease_ms": 60_000})).await;
    assert_eq!(again[0]["delivery_count"], 2);
    let late = settle(&api, "g", "ack", json!({"receipts": receipts(&first)})).await;
    late.problem(409, "lease_expired");
    let extended = json!({"receipts": receipts(&first), "lease_ms": 1000});
    let late = settle(&api, "g", "extend", extended).await;
    late.problem(409, "lease_expired");
    // Some work, some don't.
    let mixed = json!({"receipts": [first[0]["receipt"], again[0]["receipt"]]});
    let mixed = settle(&api, "g", "ack", mixed).await.expect(207);
    assert_eq!(mixed["results"][0]["error"]["code"], "lease_expired");
    assert_eq!(mixed["results"][1]["receipt"], again[0]["receipt"]);
}

#[tokio::test]
async fn a_late_ack_counts_while_nobody_else_has_the_message() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let first = receive(&api, "g", json!({"lease_ms": 100})).await;
    crate::support::eventually("the lease is over", || async {
        let place = in_flight(&api, "g").await;
        anyhow::ensure!(place["waiting"] == 1, "{place}");
        Ok(())
    })
    .await
    .unwrap();
    let late = settle(&api, "g", "ack", json!({"receipts": receipts(&first)})).await;
    late.expect(200);
    assert!(receive(&api, "g", json!({})).await.is_empty());
}

#[tokio::test]
async fn an_extended_lease_lasts() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let first = receive(&api, "g", json!({"lease_ms": 5_000})).await;
    let longer = json!({"receipts": receipts(&first), "lease_ms": 60_000});
    settle(&api, "g", "extend", longer).await.expect(200);
    let wait = json!({"wait_ms": 7_000});
    assert!(receive(&api, "g", wait).await.is_empty());
}

#[tokio::test]
async fn a_nack_brings_it_back_after_its_delay() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let first = receive(&api, "g", json!({})).await;
    let begun = Instant::now();
    let back = json!({"receipts": receipts(&first), "delay_ms": 3_000});
    settle(&api, "g", "nack", back).await.expect(200);
    assert!(receive(&api, "g", json!({})).await.is_empty());
    let again = receive_some(&api, "g", json!({})).await;
    assert!(begun.elapsed() >= Duration::from_millis(3_000));
    assert_eq!(again[0]["delivery_count"], 2);
    // Someone who waits gets it at once.
    let (found, _) = tokio::join!(receive_some(&api, "g", json!({})), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let back = json!({"receipts": receipts(&again), "delay_ms": 0});
        settle(&api, "g", "nack", back).await.expect(200);
    });
    assert_eq!(found[0]["delivery_count"], 3);
}

#[tokio::test]
async fn the_retry_policy_says_when() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let path = "/v1/groups/g/retry_policy";
    api.get(path).await.problem(404, "consumer_group_not_found");
    let policy = json!({"max_deliveries": 5, "backoff_ms": [200, 100_000]});
    let set = api.call(Method::PUT, path, &policy).await.expect(200);
    assert_eq!(set, policy);
    assert_eq!(api.get(path).await.expect(200), policy);
    let first = receive(&api, "g", json!({})).await;
    settle(&api, "g", "nack", json!({"receipts": receipts(&first)}))
        .await
        .expect(200);
    let again = receive_some(&api, "g", json!({})).await;
    settle(&api, "g", "nack", json!({"receipts": receipts(&again)}))
        .await
        .expect(200);
    assert!(receive(&api, "g", json!({"wait_ms": 700})).await.is_empty());
    for (wrong, named) in [
        (json!({"max_deliveries": 0}), "1 to 1000"),
        (json!({"backoff_ms": []}), "1 to 100"),
        (json!({"backoff": [1]}), "unknown field"),
    ] {
        let said = api.call(Method::PUT, path, &wrong).await;
        let said = said.problem(400, "invalid_request");
        assert!(said["detail"].as_str().unwrap().contains(named), "{said}");
    }
}

#[tokio::test]
async fn a_long_poll_ends_with_the_first_message() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    assert!(receive(&api, "g", json!({})).await.is_empty());
    let begun = Instant::now();
    let (found, _) = tokio::join!(receive_some(&api, "g", json!({})), async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        api.store("t", 1, &["late"]).await;
    });
    assert_eq!(values(&found), ["late"]);
    assert!(begun.elapsed() < Duration::from_millis(400) + AT_ONCE);
    let begun = Instant::now();
    let wait = json!({"wait_ms": 500});
    assert!(receive(&api, "g", wait).await.is_empty());
    assert!(begun.elapsed() >= Duration::from_millis(500));
}

#[tokio::test]
async fn through_takes_all_that_its_consumer_holds() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b", "c", "d", "e"]).await;
    let mut mine = Vec::new();
    for most in [1, 2] {
        let more = json!({"max_messages": most, "consumer": "me"});
        mine.extend(receive(&api, "g", more).await);
    }
    let other = receive(&api, "g", json!({"max_messages": 1, "consumer": "you"})).await;
    mine.extend(receive(&api, "g", json!({"consumer": "me"})).await);
    assert_eq!(
        (values(&mine), values(&other)),
        (vec!["a", "b", "c", "e"], vec!["d"])
    );
    let through = json!({"through": mine[2]["receipt"]});
    let done = settle(&api, "g", "ack", through).await.expect(200);
    assert_eq!(done["results"][0]["acked"], 3);
    let all = json!({"through": mine[3]["receipt"]});
    let done = settle(&api, "g", "ack", all).await.expect(200);
    assert_eq!(done["results"][0]["acked"], 1);
    assert_eq!(in_flight(&api, "g").await["offset"], 3);
}

#[tokio::test]
async fn messages_of_a_key_come_one_at_a_time() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    for (key, value) in [("k", "k1"), ("l", "l1"), ("k", "k2"), ("l", "l2")] {
        let body = json!({"messages": [{"key": key, "value": value, "queue": 0}]});
        api.post("/v1/topics/t/messages", &body).await.expect(200);
    }
    api.store("t", 0, &["free1", "free2"]).await;
    let ordered = json!({"ordered": true, "max_messages": 10});
    let first = receive(&api, "g", ordered.clone()).await;
    assert_eq!(values(&first), ["k1", "l1", "free1", "free2"]);
    assert!(receive(&api, "g", ordered.clone()).await.is_empty());
    // What fails is in its own key's way only.
    let back = json!({"receipts": [first[0]["receipt"]], "delay_ms": 60_000});
    settle(&api, "g", "nack", back).await.expect(200);
    let done = json!({"receipts": [first[1]["receipt"]]});
    settle(&api, "g", "ack", done).await.expect(200);
    assert_eq!(
        values(&receive_some(&api, "g", ordered.clone()).await),
        ["l2"]
    );
    assert!(receive(&api, "g", ordered).await.is_empty());
}

#[tokio::test]
async fn filters_and_starts() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let messages = json!({"messages": [
        {"value": "1", "tag": "a", "queue": 0}, {"value": "2", "tag": "b", "queue": 0},
        {"value": "3", "tag": "a", "queue": 0}, {"value": "4", "tag": "c", "queue": 0},
    ]});
    api.post("/v1/topics/t/messages", &messages)
        .await
        .expect(200);
    let found = receive(&api, "g", json!({"tag": "a||c", "max_messages": 2})).await;
    assert_eq!(values(&found), ["1", "3"]);
    settle(&api, "g", "ack", json!({"receipts": receipts(&found)}))
        .await
        .expect(200);
    // What was left out is done.
    assert_eq!(in_flight(&api, "g").await["offset"], 3);
    let found = receive(&api, "g", json!({"filter": "tag = 'x'"})).await;
    assert!(found.is_empty());
    assert_eq!(in_flight(&api, "g").await["offset"], 4);

    let latest = json!({"start": "latest"});
    assert!(receive(&api, "h", latest.clone()).await.is_empty());
    api.store("t", 0, &["5"]).await;
    assert_eq!(values(&receive(&api, "h", latest).await), ["5"]);
}

#[tokio::test]
async fn what_is_due_is_found_behind_what_others_want() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let mut messages = vec![json!({"value": "theirs", "tag": "a", "queue": 0}); 300];
    messages.push(json!({"value": "ours", "tag": "b", "queue": 0}));
    let body = json!({ "messages": messages });
    api.post("/v1/topics/t/messages", &body).await.expect(200);
    let all = json!({"max_messages": 301, "lease_ms": 100});
    assert_eq!(receive(&api, "g", all).await.len(), 301);
    let ours = json!({"tag": "b", "max_messages": 1});
    let found = receive_some(&api, "g", ours).await;
    assert_eq!(values(&found), ["ours"]);
    assert_eq!(found[0]["delivery_count"], 2);
}

#[tokio::test]
async fn what_has_expired_is_done() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let messages = json!({"messages": [
        {"value": "over", "ttl_ms": 1, "queue": 0}, {"value": "lasts", "queue": 0},
    ]});
    api.post("/v1/topics/t/messages", &messages)
        .await
        .expect(200);
    let path = "/v1/topics/t/queues/0/messages?offset=0";
    crate::support::eventually("it is over", || async {
        let found = api.get(path).await.json();
        anyhow::ensure!(found["messages"][0]["value"] == "lasts", "{found}");
        Ok(())
    })
    .await
    .unwrap();
    let found = receive(&api, "g", json!({})).await;
    assert_eq!(values(&found), ["lasts"]);
    assert_eq!(in_flight(&api, "g").await["offset"], 1);
}

#[tokio::test]
async fn a_group_works_one_way() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    let offsets = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 1}]});
    let commit = |group: &str| format!("/v1/groups/{group}/offsets");
    api.call(Method::PUT, &commit("committing"), &offsets)
        .await
        .expect(200);
    let wanted = json!({"topics": ["t"]});
    let refused = api.post("/v1/groups/committing/receive", &wanted).await;
    refused.problem(409, "group_mode_conflict");
    let held = receive(&api, "leasing", json!({})).await;
    let of_another = json!({"receipts": receipts(&held)});
    for way in ["ack", "nack", "extend"] {
        settle(&api, "committing", way, of_another.clone())
            .await
            .problem(409, "group_mode_conflict");
    }
    let none = json!({});
    api.post("/v1/groups/committing/dlq/redrive", &none)
        .await
        .problem(409, "group_mode_conflict");
    api.post("/v1/groups/nobody/dlq/redrive", &none)
        .await
        .problem(404, "consumer_group_not_found");
    api.get("/v1/groups/committing/retry_policy")
        .await
        .problem(409, "group_mode_conflict");
    let own = json!({"topics": ["_dlq.leasing"]});
    let refused = api.post("/v1/groups/leasing/receive", &own).await;
    let problem = refused.problem(400, "invalid_request");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("another group")
    );
    api.get("/v1/groups/leasing/messages?topic=_dlq.leasing")
        .await
        .problem(400, "invalid_request");
    let refused = api.call(Method::PUT, &commit("leasing"), &offsets).await;
    refused.problem(409, "group_mode_conflict");
}

#[tokio::test]
async fn a_reset_begins_anew() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b", "c"]).await;
    let found = receive(&api, "g", json!({})).await;
    let done = json!({"receipts": [found[0]["receipt"], found[1]["receipt"]]});
    settle(&api, "g", "ack", done).await.expect(200);
    let reset = json!({"topic": "t", "to": {"offset": 1}});
    let answer = api
        .post("/v1/groups/g/offsets/reset", &reset)
        .await
        .expect(200);
    assert_eq!(answer["results"][0]["previous"], 2);
    let again = receive(&api, "g", json!({})).await;
    assert_eq!(values(&again), ["b", "c"]);
    let late = json!({"receipts": [found[2]["receipt"]]});
    settle(&api, "g", "ack", late)
        .await
        .problem(409, "lease_expired");
}

#[tokio::test]
async fn deleted_topics_vanish_and_new_queues_join() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    receive(&api, "g", json!({})).await;
    api.call(Method::PATCH, "/v1/topics/t", &json!({"queues": 2}))
        .await
        .expect(200);
    api.store("t", 1, &["b"]).await;
    assert_eq!(values(&receive_some(&api, "g", json!({})).await), ["b"]);
    api.call(Method::DELETE, "/v1/topics/t", &Value::Null)
        .await
        .expect(204);
    let gone = api
        .post("/v1/groups/g/receive", &json!({"topics": ["t"]}))
        .await;
    gone.problem(404, "topic_not_found");
    api.topic("t", 1).await;
    api.store("t", 0, &["new"]).await;
    assert_eq!(values(&receive(&api, "g", json!({})).await), ["new"]);
}

#[tokio::test]
async fn what_is_no_receipt() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let found = receive(&api, "g", json!({})).await;
    for how in ["ack", "nack", "extend"] {
        let wrong = settle(&api, how, how, json!({"receipts": receipts(&found)})).await;
        wrong.problem(400, "invalid_request");
        let none = settle(&api, "g", how, json!({"receipts": []})).await;
        none.problem(400, "invalid_request");
        let unknown = settle(&api, "g", how, json!({"receipts": ["x"], "force": true})).await;
        unknown.problem(400, "invalid_request");
    }
}

/// Reads events until so many messages came.
async fn pushed(
    stream: &mut (impl StreamExt<Item = reqwest::Result<bytes::Bytes>> + Unpin),
    count: usize,
) -> Vec<Value> {
    let mut text = String::new();
    loop {
        let found: Vec<Value> = text
            .split("\n\n")
            .filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
            .collect();
        if found.len() >= count {
            return found;
        }
        let piece = tokio::time::timeout(Duration::from_secs(20), stream.next()).await;
        let piece = piece.expect("an event").expect("a stream").unwrap();
        text.push_str(std::str::from_utf8(&piece).unwrap());
    }
}

#[tokio::test]
async fn a_stream_holds_no_more_than_its_prefetch() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b", "c", "d"]).await;
    let path = "/v1/groups/g/messages?topic=t&prefetch=2&lease_ms=60000";
    api.get(path).await.problem(400, "invalid_request");
    let request = api.request(Method::GET, path);
    let response = request
        .header("accept", "text/event-stream")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let mut stream = response.bytes_stream();
    let first = pushed(&mut stream, 2).await;
    assert_eq!(values(&first), ["a", "b"]);
    let more = tokio::time::timeout(Duration::from_millis(3_000), stream.next()).await;
    assert!(more.is_err(), "more than the prefetch");
    settle(&api, "g", "ack", json!({"receipts": receipts(&first)}))
        .await
        .expect(200);
    let second = pushed(&mut stream, 2).await;
    assert_eq!(values(&second), ["c", "d"]);
    assert_eq!(second[0]["delivery_count"], 1);
}
