//! Delayed messages: never early, in the order of their times, exactly once, and taken back.

use std::collections::BTreeSet;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::PATIENCE;

const HOUR_MS: u64 = 3_600_000;
const YEAR_MS: u64 = 365 * 24 * HOUR_MS;

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock after 1970").as_millis() as u64
}

async fn produce(api: &Api, topic: &str, body: Value) -> Answer {
    api.post(&format!("/v1/topics/{topic}/messages"), &body)
        .await
}

/// Stores one message with what else it says, and gives its result.
async fn produce_one(api: &Api, topic: &str, message: Value) -> Value {
    let answer = produce(api, topic, json!({ "messages": [message] })).await;
    answer.expect(200)["results"][0].clone()
}

/// Queue 0 from its beginning, once it has `count` messages.
async fn read(api: &Api, topic: &str, count: usize) -> Vec<Value> {
    let mut found: Vec<Value> = Vec::new();
    while found.len() < count {
        let offset = found.len();
        let path = format!("/v1/topics/{topic}/queues/0/messages?offset={offset}&wait_ms=30000");
        let page = api.get(&path).await.expect(200);
        let messages = page["messages"].as_array().cloned().unwrap_or_default();
        assert!(!messages.is_empty(), "{found:?} of {count}");
        found.extend(messages);
    }
    found
}

/// What queue 0 has at this moment.
async fn values(api: &Api, topic: &str) -> Vec<String> {
    let path = format!("/v1/topics/{topic}/queues/0/messages?offset=0");
    let page = api.get(&path).await.expect(200);
    let messages = page["messages"].as_array().cloned().unwrap_or_default();
    let text = |m: &Value| m["value"].as_str().unwrap_or_default().to_owned();
    messages.iter().map(text).collect()
}

async fn cancel(api: &Api, topic: &str, message_id: &Value) -> Answer {
    let id = message_id.as_str().expect("an id");
    let path = format!("/v1/topics/{topic}/messages/{id}");
    api.send(api.request(Method::DELETE, &path)).await
}

/// The id of the next message in the same batch.
fn second_of(message_id: &Value) -> Value {
    let id = message_id.as_str().expect("an id");
    let mut bytes = URL_SAFE_NO_PAD.decode(id).expect("base64");
    *bytes.last_mut().expect("some bytes") += 1;
    json!(URL_SAFE_NO_PAD.encode(bytes))
}

#[tokio::test]
async fn they_come_in_the_order_of_their_times_never_early_and_keep_their_ids() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let begun = now_ms();
    let messages = json!([
        {"value": "late", "delay_ms": 5_000, "queue": 0},
        {"value": "a", "queue": 0},
        {"value": "soon", "deliver_at_ms": begun + 3_000, "queue": 0},
        {"value": "b", "delay_ms": 0, "queue": 0},
        {"value": "past", "deliver_at_ms": begun - HOUR_MS, "queue": 0},
    ]);
    let answer = produce(&api, "t", json!({ "messages": messages })).await;
    let results = answer.expect(200)["results"].clone();
    let offsets: Vec<_> = (0..5).map(|n| results[n]["offset"].as_u64()).collect();
    assert_eq!(offsets, [None, Some(0), None, Some(1), Some(2)]);
    assert_eq!(results[2]["deliver_at_ms"], begun + 3_000);
    assert!(results[0]["deliver_at_ms"].as_u64() >= Some(begun + 5_000));
    assert_eq!(results[1].get("deliver_at_ms"), None);

    let found = read(&api, "t", 5).await;
    let all: Vec<_> = found.iter().map(|m| m["value"].as_str().unwrap()).collect();
    assert_eq!(all, ["a", "b", "past", "soon", "late"]);
    for (message, stored) in [(3, 2), (4, 0)] {
        assert_eq!(found[message]["message_id"], results[stored]["message_id"]);
        let due = results[stored]["deliver_at_ms"].as_u64();
        let visible = found[message]["timestamp_ms"].as_u64();
        assert!(visible >= due, "{visible:?} is before {due:?}");
        let late = visible.unwrap() - due.unwrap();
        assert!(late < 30_000, "{late} ms late");
    }
    let offsets: Vec<_> = found.iter().map(|m| m["offset"].as_u64()).collect();
    assert_eq!(offsets, (0..5).map(Some).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn every_form_takes_a_delay_and_says_what_is_wrong_with_it() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let bytes = api
        .post_as(
            "/v1/topics/t/messages?delay_ms=3000&queue=0",
            "application/octet-stream",
            "bytes",
        )
        .await
        .expect(200);
    assert_eq!(bytes["results"][0]["offset"], Value::Null);
    let lines = "{\"value\":\"line\",\"delay_ms\":100}\n{\"value\":\"now\"}\n";
    let lines = api
        .post_as("/v1/topics/t/messages", "application/x-ndjson", lines)
        .await;
    let first: Value = serde_json::from_str(lines.text().lines().next().unwrap())?;
    assert_eq!(first["offset"], Value::Null, "{first}");
    assert!(first["deliver_at_ms"].is_u64(), "{first}");
    read(&api, "t", 3).await;
    assert_eq!(values(&api, "t").await, ["now", "line", "bytes"]);

    let too_late = now_ms() + YEAR_MS + HOUR_MS;
    for refused in [
        json!({"value": "x", "delay_ms": 5, "deliver_at_ms": 5}),
        json!({"value": "x", "delay_ms": YEAR_MS + 1}),
        json!({"value": "x", "deliver_at_ms": too_late}),
        json!({"value": "x", "delay_ms": -1}),
    ] {
        let answer = produce(&api, "t", json!({ "messages": [refused] })).await;
        answer.problem(400, "invalid_request");
    }
    let both = "/v1/topics/t/messages?delay_ms=5&deliver_at_ms=5";
    let answer = api.post_as(both, "application/octet-stream", "x").await;
    answer.problem(400, "invalid_request");
    let far = produce_one(&api, "t", json!({"value": "x", "delay_ms": YEAR_MS})).await;
    assert_eq!(far["offset"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn a_retry_gets_the_first_answer_before_and_after_the_delivery() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let body = json!({"messages": [
        {"value": "k1", "delay_ms": 3_000, "queue": 0},
        {"value": "k2", "queue": 0},
        {"value": "k3", "delay_ms": 4_000, "queue": 0},
    ]});
    let keyed = || async {
        let request = api.request(Method::POST, "/v1/topics/t/messages");
        let request = request.header("idempotency-key", "a").json(&body);
        api.send(request).await.expect(200)["results"].clone()
    };
    let identity = api.post("/v1/producers", &json!({})).await.expect(200);
    let numbered = || async {
        let producer = json!({"id": identity["id"], "epoch": identity["epoch"], "sequence": 0});
        let messages = json!([
            {"value": "p0", "queue": 0},
            {"value": "p1", "delay_ms": 5_000, "queue": 0},
            {"value": "p2", "queue": 0},
        ]);
        let body = json!({"messages": messages, "producer": producer});
        produce(&api, "t", body).await.expect(200)["results"].clone()
    };
    let first = (keyed().await, numbered().await);
    let same = |again: &(Value, Value)| {
        for (first, again) in [(&first.0, &again.0), (&first.1, &again.1)] {
            for n in 0..3 {
                assert_eq!(first[n]["message_id"], again[n]["message_id"]);
                assert_eq!(first[n]["offset"], again[n]["offset"]);
            }
        }
    };
    same(&(keyed().await, numbered().await));
    read(&api, "t", 6).await;
    same(&(keyed().await, numbered().await));
    let found = values(&api, "t").await;
    assert_eq!(found, ["k2", "p0", "p2", "k1", "k3", "p1"]);

    let other = json!({"messages": [{"value": "k1", "delay_ms": 3_001, "queue": 0}]});
    let request = api.request(Method::POST, "/v1/topics/t/messages");
    let request = request.header("idempotency-key", "a").json(&other);
    api.send(request).await.problem(400, "invalid_request");
    let many: Vec<_> = (0..6).map(|n| json!({"delay_ms": 1000 + n})).collect();
    let producer = json!({"id": identity["id"], "epoch": 0, "sequence": 3});
    let body = json!({"messages": many, "producer": producer});
    produce(&api, "t", body)
        .await
        .problem(400, "invalid_request");
    Ok(())
}

#[tokio::test]
async fn a_cancelled_message_is_never_delivered_and_a_delivered_one_never_cancelled() -> Result<()>
{
    let api = Api::start().await?;
    api.topic("t", 1).await;
    api.topic("other", 1).await;
    let kept = produce_one(&api, "t", json!({"value": "kept", "delay_ms": 3_000})).await;
    let gone = produce_one(&api, "t", json!({"value": "gone", "delay_ms": HOUR_MS})).await;
    let now = produce_one(&api, "t", json!({"value": "now"})).await;
    for _ in 0..2 {
        let answer = cancel(&api, "t", &gone["message_id"]).await;
        assert_eq!(
            (answer.status.as_u16(), answer.text()),
            (204, String::new())
        );
    }
    let answer = cancel(&api, "t", &now["message_id"]).await;
    answer.problem(409, "already_delivered");
    for (topic, id) in [
        ("other", kept["message_id"].clone()),
        ("t", json!("nonsense")),
        ("t", json!("AQIDBAU")),
    ] {
        let answer = cancel(&api, topic, &id).await;
        answer.problem(404, "message_not_found");
    }
    // Of a batch of one there is no second message, nor is the first one taken back for it.
    let answer = cancel(&api, "t", &second_of(&kept["message_id"])).await;
    answer.problem(404, "message_not_found");
    let answer = cancel(&api, "absent", &kept["message_id"]).await;
    answer.problem(404, "topic_not_found");

    read(&api, "t", 2).await;
    let answer = cancel(&api, "t", &kept["message_id"]).await;
    answer.problem(409, "already_delivered");
    assert_eq!(cancel(&api, "t", &gone["message_id"]).await.status, 204);
    assert_eq!(values(&api, "t").await, ["now", "kept"]);
    Ok(())
}

#[tokio::test]
async fn cancelling_races_with_delivery_and_one_of_them_wins() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let deadline = Instant::now() + PATIENCE;
    let (mut cancelled, mut delivered) = (BTreeSet::new(), BTreeSet::new());
    let mut round = 0;
    // How far apart the delays must be depends on the machine.
    while round < 6 || cancelled.is_empty() || delivered.is_empty() {
        assert!(Instant::now() < deadline, "one side always wins");
        let spread = 1 << (round % 6);
        let name = |n: u64| format!("{round}-{n}");
        let messages: Vec<_> = (0..60)
            .map(|n| json!({"value": name(n), "delay_ms": 1 + spread * n, "queue": 0}))
            .collect();
        let answer = produce(&api, "t", json!({ "messages": messages })).await;
        let results = answer.expect(200)["results"].clone();
        // The last first: those that are due meanwhile are delivered.
        for n in (0..60).rev() {
            let answer = cancel(&api, "t", &results[n as usize]["message_id"]).await;
            match answer.status.as_u16() {
                204 => cancelled.insert(name(n)),
                409 => delivered.insert(name(n)),
                other => panic!("{other}: {}", answer.text()),
            };
        }
        round += 1;
    }
    produce_one(&api, "t", json!({"value": "end"})).await;
    delivered.insert("end".to_owned());
    let found = read(&api, "t", delivered.len()).await;
    let found: Vec<_> = found.iter().map(|m| m["value"].as_str().unwrap()).collect();
    let expected: BTreeSet<_> = delivered.iter().map(String::as_str).collect();
    assert_eq!(found.iter().copied().collect::<BTreeSet<_>>(), expected);
    assert_eq!(found.len(), expected.len(), "none twice");
    Ok(())
}

#[tokio::test]
async fn a_queue_holds_so_many_and_refuses_more_until_some_are_delivered() -> Result<()> {
    let api = Api::start_with("[limits]\nheld_batches = 2\n").await?;
    api.topic("t", 1).await;
    for delay_ms in [5_000, HOUR_MS] {
        produce_one(&api, "t", json!({"value": "x", "delay_ms": delay_ms})).await;
    }
    let held = api.get("/metrics").await.text();
    assert!(held.contains("\nquorate_held_batches 2"), "{held}");
    let more = json!({"messages": [{"value": "more", "delay_ms": HOUR_MS}]});
    produce(&api, "t", more.clone())
        .await
        .problem(429, "backlog_full");
    produce_one(&api, "t", json!({"value": "now"})).await;
    read(&api, "t", 2).await;
    produce(&api, "t", more).await.expect(200);
    let delivered = api.get("/metrics").await.text();
    assert!(
        delivered.contains("\nquorate_delivered_batches_total 1"),
        "{delivered}"
    );
    Ok(())
}

#[tokio::test]
async fn a_request_may_have_more_of_them_than_an_entry_has_batches() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let count = 5_000;
    let message = |n: usize| json!({"value": n.to_string(), "queue": 0, "delay_ms": 1_000});
    let messages: Vec<Value> = (0..count).map(message).collect();
    let answer = produce(&api, "t", json!({ "messages": messages })).await;
    let results = answer.expect(200)["results"].clone();
    assert_eq!(results.as_array().map(Vec::len), Some(count));
    let found = read(&api, "t", count).await;
    let mut found: Vec<usize> = found
        .iter()
        .map(|m| m["value"].as_str().unwrap().parse().unwrap())
        .collect();
    found.sort_unstable();
    assert!(found.into_iter().eq(0..count));
    Ok(())
}
