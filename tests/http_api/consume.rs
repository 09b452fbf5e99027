//! Fetch: where it starts, what it filters, how it waits, and many queues at once.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;

const PATH: &str = "/v1/topics/t/queues/0/messages";

fn values(found: &Value) -> Vec<&str> {
    let messages = found["messages"].as_array().expect("messages").iter();
    messages
        .map(|message| message["value"].as_str().expect("value"))
        .collect()
}

#[tokio::test]
async fn every_start() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let empty = api.get(&format!("{PATH}?offset=0")).await.expect(200);
    let expected = json!({"messages": [], "next_offset": 0, "earliest_offset": 0, "end_offset": 0});
    assert_eq!(empty, expected);
    api.store("t", 0, &["a", "b"]).await;
    api.store("t", 0, &["c"]).await;
    let found = api.get(&format!("{PATH}?offset=1")).await.expect(200);
    assert_eq!(values(&found), ["b", "c"]);
    assert_eq!(
        (&found["next_offset"], &found["end_offset"]),
        (&json!(3), &json!(3))
    );
    for query in ["", "?offset=earliest", "?offset=0", "?from_timestamp_ms=0"] {
        let found = api.get(&format!("{PATH}{query}")).await.expect(200);
        assert_eq!(values(&found), ["a", "b", "c"], "{query}");
    }
    let found = api.get(&format!("{PATH}?offset=latest")).await.expect(200);
    assert_eq!(
        (values(&found).len(), &found["next_offset"]),
        (0, &json!(3))
    );
    let at_end = api.get(&format!("{PATH}?offset=3")).await.expect(200);
    assert_eq!(at_end["messages"], json!([]));
    let body = api
        .get(&format!("{PATH}?offset=4"))
        .await
        .problem(416, "offset_out_of_range");
    assert_eq!(
        (&body["earliest_offset"], &body["end_offset"]),
        (&json!(0), &json!(3))
    );
    assert!(
        body.get("outcome").is_none(),
        "a read has no outcome: {body}"
    );
    // The local replica's prefix: what is beyond its end may just not be here yet.
    let beyond = api
        .get(&format!("{PATH}?offset=4&consistency=stale"))
        .await
        .expect(200);
    assert_eq!(beyond["messages"], json!([]));
    let stale = api
        .get(&format!("{PATH}?consistency=stale"))
        .await
        .expect(200);
    assert_eq!(values(&stale), ["a", "b", "c"]);
    api.get("/v1/topics/t/queues/1/messages")
        .await
        .problem(404, "queue_not_found");
    api.get("/v1/topics/none/queues/0/messages")
        .await
        .problem(404, "topic_not_found");
}

#[tokio::test]
async fn times_become_offsets() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    for value in ["a", "b", "c"] {
        api.store("t", 0, &[value]).await;
        // Three messages with three times: the next one is stored in a later millisecond.
        let stored = Instant::now();
        while stored.elapsed() < Duration::from_millis(3) {
            tokio::task::yield_now().await;
        }
    }
    let all = api.get(PATH).await.expect(200);
    for (offset, message) in all["messages"].as_array().unwrap().iter().enumerate() {
        let time = message["timestamp_ms"].as_u64().unwrap();
        let path = format!("/v1/topics/t/queues/0/offset?timestamp_ms={time}");
        assert_eq!(api.get(&path).await.expect(200), json!({"offset": offset}));
        let found = api
            .get(&format!("{PATH}?from_timestamp_ms={time}"))
            .await
            .expect(200);
        assert_eq!(found["messages"][0]["offset"], offset);
    }
    let future = "/v1/topics/t/queues/0/offset?timestamp_ms=99999999999999";
    assert_eq!(api.get(future).await.expect(200), json!({"offset": 3}));
    let missing = api.get("/v1/topics/t/queues/0/offset").await;
    missing.problem(400, "invalid_request");
}

#[tokio::test]
async fn tags_filter_and_the_offset_moves_past_the_rest() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let messages: Vec<Value> = ["created", "paid", "sent", "created", "lost"]
        .iter()
        .enumerate()
        .map(|(n, tag)| json!({"value": n.to_string(), "tag": tag}))
        .collect();
    api.post("/v1/topics/t/messages", &json!({"messages": messages}))
        .await
        .expect(200);
    api.store("t", 0, &["untagged"]).await;
    let found = api
        .get(&format!("{PATH}?tag=created%7C%7Cpaid"))
        .await
        .expect(200);
    assert_eq!(values(&found), ["0", "1", "3"]);
    assert_eq!(found["next_offset"], 6);
    let found = api
        .get(&format!("{PATH}?tag=created%7C%7Cpaid&max_messages=2"))
        .await
        .expect(200);
    assert_eq!(values(&found), ["0", "1"]);
    let next = found["next_offset"].as_u64().unwrap();
    assert!((2..=3).contains(&next), "no match is skipped: {next}");
    let none = api.get(&format!("{PATH}?tag=unheard")).await.expect(200);
    assert_eq!((values(&none).len(), &none["next_offset"]), (0, &json!(6)));
}

#[tokio::test]
async fn bounds_hide_no_first_message() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let big = "x".repeat(5_000);
    api.store("t", 0, &[&big, "b"]).await;
    api.store("t", 0, &["c"]).await;
    let found = api.get(&format!("{PATH}?max_bytes=1")).await.expect(200);
    assert_eq!(values(&found), [big.as_str()]);
    assert_eq!(found["next_offset"], 1);
    let found = api.get(&format!("{PATH}?max_messages=2")).await.expect(200);
    assert_eq!(found["next_offset"], 2);
    let forced = api
        .get(&format!("{PATH}?offset=2&encoding=base64"))
        .await
        .expect(200);
    assert_eq!(forced["messages"][0]["value_base64"], "Yw==");
    for query in [
        "max_messages=0",
        "max_messages=10001",
        "max_bytes=16777217",
        "wait_ms=60001",
    ] {
        api.get(&format!("{PATH}?{query}"))
            .await
            .problem(400, "invalid_request");
    }
}

#[tokio::test]
async fn a_long_poll_waits_for_a_message_or_the_end_of_its_time() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let begun = Instant::now();
    let empty = api.get(&format!("{PATH}?wait_ms=300")).await.expect(200);
    assert_eq!(empty["messages"], json!([]));
    assert!(
        begun.elapsed() >= Duration::from_millis(290),
        "{:?}",
        begun.elapsed()
    );

    let begun = Instant::now();
    let path = format!("{PATH}?wait_ms=30000");
    let (found, _) = tokio::join!(api.get(&path), async {
        // The poll is parked by then or it isn't: it must find the message either way.
        let pause = Duration::from_millis(200);
        while begun.elapsed() < pause {
            tokio::task::yield_now().await;
        }
        api.store("t", 0, &["now"]).await
    });
    assert_eq!(values(&found.expect(200)), ["now"]);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    // And at once where there is one.
    let begun = Instant::now();
    assert_eq!(values(&api.get(&path).await.expect(200)), ["now"]);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn many_queues_in_one_request() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.topic("u", 1).await;
    api.store("t", 1, &["a", "b"]).await;
    api.store("u", 0, &["c"]).await;
    let from = |topic: &str, queue: u32, offset: u64| json!({"topic": topic, "queue": queue, "offset": offset});
    let body =
        json!({"queues": [from("t", 0, 0), from("t", 1, 1), from("u", 0, 0)], "wait_ms": 1000});
    let found = api.post("/v1/fetch", &body).await.expect(200);
    let results = found["results"].as_array().unwrap();
    assert_eq!(results.len(), 3);
    assert_eq!(
        (&results[1]["topic"], &results[1]["queue"]),
        (&json!("t"), &json!(1))
    );
    assert_eq!(values(&results[0]).len(), 0);
    assert_eq!(values(&results[1]), ["b"]);
    assert_eq!(results[1]["next_offset"], 2);
    assert_eq!(values(&results[2]), ["c"]);

    let named = |queue: u32, offset: Value| json!({"topic": "t", "queue": queue, "offset": offset});
    let body = json!({"queues": [named(1, json!("earliest")), named(1, json!("latest"))]});
    let found = api.post("/v1/fetch", &body).await.expect(200);
    assert_eq!(values(&found["results"][0]), ["a", "b"]);
    assert_eq!(values(&found["results"][1]).len(), 0);
    assert_eq!(found["results"][1]["next_offset"], 2);
    for wrong in [json!("newest"), json!(-1), json!(null)] {
        let body = json!({"queues": [named(1, wrong)]});
        let problem = api.post("/v1/fetch", &body).await;
        let problem = problem.problem(400, "invalid_request");
        assert!(problem["detail"].as_str().unwrap().contains("latest"));
    }

    let body = json!({"queues": [from("t", 1, 0), from("none", 0, 0), from("t", 1, 99)]});
    let found = api.post("/v1/fetch", &body).await.expect(207);
    assert_eq!(values(&found["results"][0]), ["a", "b"]);
    assert_eq!(found["results"][1]["error"]["code"], "topic_not_found");
    assert_eq!(found["results"][1]["topic"], "none");
    assert_eq!(found["results"][2]["error"]["code"], "offset_out_of_range");
    let body = json!({"queues": [from("none", 0, 0)]});
    api.post("/v1/fetch", &body)
        .await
        .problem(404, "topic_not_found");

    let media = "application/vnd.quorate.batches";
    let body = json!({"queues": [from("t", 0, 0), from("t", 1, 0)], "wait_ms": 1000});
    let request = api
        .request(Method::POST, "/v1/fetch")
        .header("accept", media)
        .json(&body);
    let answer = api.send(request).await;
    answer.expect(200);
    let described = answer.header("quorate-queues");
    let own = format!("t/1;bytes={};next_offset=2", answer.bytes.len());
    assert!(
        described.contains("t/0;bytes=0") && described.contains(&own),
        "{described}"
    );
}
