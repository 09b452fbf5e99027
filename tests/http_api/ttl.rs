//! Time to live: readers pass over what has expired, offsets stay dense.

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::support::eventually;

const FETCH: &str = "/v1/topics/t/queues/0/messages";
const PRODUCE: &str = "/v1/topics/t/messages";

fn values(answer: &Value) -> Vec<&str> {
    let messages = answer["messages"].as_array().expect("messages").iter();
    messages.filter_map(|m| m["value"].as_str()).collect()
}

/// Waits until a fetch from the beginning gives these values.
async fn left(api: &Api, expected: &[&str]) -> Value {
    let what = format!("{expected:?} are left");
    eventually(&what, || async {
        let answer = api.get(FETCH).await.expect(200);
        ensure!(values(&answer) == expected, "{answer}");
        Ok(answer)
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn expired_messages_are_skipped_by_every_reader() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let body = json!({"messages": [{"value": "a"}, {"value": "b", "ttl_ms": 1},
        {"value": "c", "ttl_ms": 3_600_000}, {"value": "d", "ttl_ms": 1}]});
    let stored = api.post(PRODUCE, &body).await.expect(200);
    assert_eq!(stored["results"][3]["offset"], 3);

    let answer = left(&api, &["a", "c"]).await;
    assert_eq!(answer["messages"][1]["offset"], 2);
    assert_eq!(answer["messages"][1]["headers"], json!({}));
    assert_eq!(
        (&answer["next_offset"], &answer["end_offset"]),
        (&json!(4), &json!(4))
    );
    let one = api
        .get(&format!("{FETCH}?max_messages=1&offset=1"))
        .await
        .expect(200);
    assert_eq!((values(&one), &one["next_offset"]), (vec!["c"], &json!(4)));
    let none = api.get(&format!("{FETCH}?offset=3")).await.expect(200);
    assert_eq!((values(&none), &none["next_offset"]), (vec![], &json!(4)));

    let many = json!({"queues": [{"topic": "t", "queue": 0, "offset": 0}]});
    let many = api.post("/v1/fetch", &many).await.expect(200);
    assert!(
        many.to_string().contains("\"c\"") && !many.to_string().contains("\"d\""),
        "{many}"
    );

    // A long poll on nothing but expired messages goes on waiting for one that isn't.
    let poll = api
        .request(Method::GET, &format!("{FETCH}?offset=3&wait_ms=60000"))
        .send();
    let poll = tokio::spawn(poll);
    api.post(PRODUCE, &json!({"messages": [{"value": "e"}]}))
        .await
        .expect(200);
    let polled: Value = poll.await??.json().await?;
    assert_eq!(values(&polled), ["e"]);
    Ok(())
}

#[tokio::test]
async fn every_form_of_produce_takes_a_time_to_live() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let bytes = "application/octet-stream";
    api.post_as(&format!("{PRODUCE}?ttl_ms=1"), bytes, "gone")
        .await
        .expect(200);
    api.post_as(&format!("{PRODUCE}?ttl_ms=3600000"), bytes, "here")
        .await
        .expect(200);
    let lines = "{\"value\":\"gone\",\"ttl_ms\":1}\n{\"value\":\"there\"}\n";
    api.post_as(PRODUCE, "application/x-ndjson", lines)
        .await
        .expect(200);
    left(&api, &["here", "there"]).await;

    for ttl in ["0", "-1", "9007199254740993"] {
        let path = format!("{PRODUCE}?ttl_ms={ttl}");
        api.post_as(&path, bytes, "x")
            .await
            .problem(400, "invalid_request");
    }
    let zero = json!({"messages": [{"value": "x", "ttl_ms": 0}]});
    api.post(PRODUCE, &zero)
        .await
        .problem(400, "invalid_request");
    Ok(())
}

#[tokio::test]
async fn a_topics_time_to_live_counts_for_what_is_there_and_can_be_taken_back() -> Result<()> {
    let api = Api::start().await?;
    let topic = json!({"name": "t", "queues": 1, "ttl_ms": 3_600_000});
    let made = api.post("/v1/topics", &topic).await.expect(201);
    assert_eq!(made["config"]["ttl_ms"], 3_600_000);
    api.store("t", 0, &["a", "b"]).await;
    left(&api, &["a", "b"]).await;

    let patch = |ttl: Value| {
        let body = json!({"ttl_ms": ttl});
        let api = &api;
        async move { api.call(Method::PATCH, "/v1/topics/t", &body).await }
    };
    patch(json!(1)).await.expect(200);
    let answer = left(&api, &[]).await;
    assert_eq!(answer["next_offset"], 2);
    patch(json!(null)).await.expect(200);
    left(&api, &["a", "b"]).await;
    patch(json!(0)).await.problem(400, "invalid_request");
    Ok(())
}
