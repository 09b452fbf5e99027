//! Produce in its four forms, and what a partly failed request says.

use serde_json::{Value, json};

use crate::api::Api;

const PATH: &str = "/v1/topics/t/messages";

async fn messages(api: &Api, queue: u32) -> Vec<Value> {
    let path = format!("/v1/topics/t/queues/{queue}/messages");
    let found = api.get(&path).await.expect(200);
    found["messages"].as_array().expect("messages").clone()
}

#[tokio::test]
async fn what_is_stored_comes_back_as_it_was() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let text = "line\nbreak \"quoted\" \\ ä 🦀 \u{1}";
    let body = json!({"messages": [
        {"value": text, "key": "order-17", "tag": "created", "headers": {"trace": "a1", "b": ""}},
        {"value_base64": "/wAB"},
        {"value_json": {"b": [1, 2.50, null], "a": "x"}},
        {"value_json": null},
        {"value_json": "text"},
        {},
        {"value": ""},
    ]});
    let answer = api.post(PATH, &body).await.expect(200);
    assert_eq!(answer["durability"], "majority_fsync");
    let results = answer["results"].as_array().unwrap();
    let found = messages(&api, 0).await;
    assert_eq!(found.len(), 7);
    for (number, (result, message)) in results.iter().zip(&found).enumerate() {
        assert_eq!(result["queue"], 0);
        assert_eq!(result["offset"], number);
        assert_eq!(result["message_id"], message["message_id"]);
        assert_eq!(message["offset"], number);
        assert!(message["timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
    }
    let mut ids: Vec<_> = results
        .iter()
        .map(|r| r["message_id"].as_str().unwrap())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 7);
    assert_eq!(found[0]["value"], text);
    assert_eq!(
        (&found[0]["key"], &found[0]["tag"]),
        (&json!("order-17"), &json!("created"))
    );
    assert_eq!(found[0]["headers"], json!({"trace": "a1", "b": ""}));
    assert_eq!(found[1]["value_base64"], "/wAB");
    assert!(found[1].get("value").is_none());
    let stored: Value = serde_json::from_str(found[2]["value"].as_str().unwrap()).unwrap();
    assert_eq!(stored, json!({"b": [1, 2.50, null], "a": "x"}));
    assert_eq!(
        (&found[3]["value"], &found[4]["value"]),
        (&json!("null"), &json!("\"text\""))
    );
    assert_eq!(
        (&found[5]["value"], &found[6]["value"]),
        (&json!(""), &json!(""))
    );
    assert_eq!(found[5]["headers"], json!({}));
}

#[tokio::test]
async fn value_json_is_stored_to_the_letter() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let text = "{ \"z\" : 1.00,\n \"a\":12345678901234567890123 }";
    let body = format!("{{\"messages\":[{{\"value_json\": {text} }}]}}");
    api.post_as(PATH, "application/json", body)
        .await
        .expect(200);
    assert_eq!(messages(&api, 0).await[0]["value"], text);
}

#[tokio::test]
async fn queues_are_named_hashed_or_taken_in_turn() {
    let api = Api::start().await.unwrap();
    api.topic("t", 4).await;
    let queue_of = async |message: Value| {
        let body = json!({"messages": [message]});
        api.post(PATH, &body).await.expect(200)["results"][0]["queue"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(queue_of(json!({"queue": 3, "key": "k"})).await, 3);
    let by_key = queue_of(json!({"key": "k"})).await;
    for _ in 0..5 {
        assert_eq!(queue_of(json!({"key": "k"})).await, by_key);
    }
    let mut seen = [false; 4];
    for _ in 0..16 {
        seen[queue_of(json!({})).await as usize] = true;
    }
    assert_eq!(seen, [true; 4], "round robin reaches every queue");
    let body = json!({"messages": [{"queue": 4}]});
    api.post(PATH, &body).await.problem(404, "queue_not_found");
    let body = json!({"messages": [{}]});
    api.post("/v1/topics/none/messages", &body)
        .await
        .problem(404, "topic_not_found");
}

#[tokio::test]
async fn what_fits_is_stored_and_what_does_not_is_said() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let big = "x".repeat(10_001);
    let body = json!({"messages": [{"value": big, "queue": 0}, {"value": "fits", "queue": 1}]});
    let answer = api.post(PATH, &body).await;
    let results = answer.expect(207)["results"].clone();
    assert_eq!(answer.header("content-type"), "application/json");
    let problem = &results[0]["error"];
    assert_eq!(
        (&problem["code"], &problem["status"]),
        (&json!("message_too_large"), &json!(413))
    );
    assert_eq!(problem["outcome"], "not_committed");
    assert_eq!(
        (&results[1]["queue"], &results[1]["offset"]),
        (&json!(1), &json!(0))
    );

    let body = json!({"messages": [{"value": big}]});
    let answer = api.post(PATH, &body).await;
    let body = answer.problem(413, "message_too_large");
    assert_eq!(body["results"][0]["error"]["code"], "message_too_large");
    assert_eq!(messages(&api, 0).await.len(), 0);
}

#[tokio::test]
async fn nothing_of_a_request_that_does_not_fit_is_stored() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    for (message, said) in [
        (json!({"value": "x", "value_base64": "eA=="}), "give one of"),
        (json!({"value_base64": "not base64!"}), "value_base64"),
        (
            json!({"delay_ms": 5000, "deliver_at_ms": 1}),
            "deliver_at_ms",
        ),
        (json!({"ttl_ms": 0}), "ttl_ms is 0"),
        (json!({"partition": 1}), "unknown field `partition`"),
        (json!({"tag": "a||b"}), "||"),
    ] {
        let body = json!({"messages": [{"value": "good"}, message]});
        let body = api.post(PATH, &body).await.problem(400, "invalid_request");
        assert!(body["detail"].as_str().unwrap().contains(said), "{body}");
        assert_eq!(body["outcome"], "not_committed");
    }
    api.post(PATH, &json!({"messages": []}))
        .await
        .problem(400, "invalid_request");
    assert_eq!(messages(&api, 0).await.len(), 0);
}

#[tokio::test]
async fn a_body_as_one_message() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let media = "application/octet-stream";
    let path = format!("{PATH}?key=k%201&tag=created&queue=1");
    let answer = api
        .post_as(&path, media, vec![0xff, 0, 1])
        .await
        .expect(200);
    assert_eq!(answer["results"][0]["queue"], 1);
    api.post_as(&format!("{PATH}?queue=1"), media, "")
        .await
        .expect(200);
    let found = messages(&api, 1).await;
    assert_eq!(found[0]["value_base64"], "/wAB");
    assert_eq!(
        (&found[0]["key"], &found[0]["tag"]),
        (&json!("k 1"), &json!("created"))
    );
    assert_eq!(found[1]["value"], "");
    let delayed = api
        .post_as(&format!("{PATH}?delay_ms=-5"), media, "x")
        .await;
    delayed.problem(400, "invalid_request");
    let large = api.post_as(PATH, media, vec![0; 10_001]).await;
    large.problem(413, "message_too_large");
}

#[tokio::test]
async fn a_message_a_line() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let media = "application/x-ndjson";
    let body = "{\"value\":\"a\"}\n\n{\"valeu\":1}\r\n{\"value\":\"b\",\"tag\":\"x\"}";
    let answer = api.post_as(PATH, media, body).await;
    answer.expect(200);
    assert_eq!(answer.header("content-type"), media);
    let text = answer.text();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(
        (&lines[0]["offset"], &lines[2]["offset"]),
        (&json!(0), &json!(1))
    );
    assert_eq!(lines[0]["durability"], "majority_fsync");
    let problem = &lines[1]["error"];
    assert_eq!(problem["code"], "invalid_request");
    assert!(
        problem["detail"].as_str().unwrap().contains("line 3"),
        "{problem}"
    );
    let found = messages(&api, 0).await;
    let values: Vec<_> = found.iter().map(|m| m["value"].as_str().unwrap()).collect();
    assert_eq!(values, ["a", "b"]);
    let missing = api
        .post_as("/v1/topics/none/messages", media, "{}\n{}\n")
        .await;
    missing.problem(404, "topic_not_found");
    api.post_as(PATH, media, "\n\n")
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn a_line_does_not_share_its_neighbours_fate() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let media = "application/x-ndjson";
    let large = "x".repeat(10_001);
    let year_and_more = 9_999_999_999_999_u64;
    let body = format!(
        "{{\"value\":\"a\"}}\n{{\"value\":\"{large}\"}}\n{{\"deliver_at_ms\":{year_and_more}}}\n\
         {{\"queue\":9}}\n{{\"value\":\"b\"}}\n"
    );
    let answer = api.post_as(PATH, media, body).await;
    answer.expect(200);
    let text = answer.text();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(
        (&lines[0]["offset"], &lines[4]["offset"]),
        (&json!(0), &json!(1))
    );
    let codes: Vec<_> = lines[1..4].iter().map(|l| &l["error"]["code"]).collect();
    assert_eq!(
        codes,
        ["message_too_large", "invalid_request", "queue_not_found"]
    );
}

#[tokio::test]
async fn stored_batches_go_from_one_queue_to_another() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b"]).await;
    api.store("t", 0, &["c"]).await;
    let media = "application/vnd.quorate.batches";
    let fetch = api.request(reqwest::Method::GET, "/v1/topics/t/queues/0/messages");
    let batches = api.send(fetch.header("accept", media)).await;
    batches.expect(200);
    assert_eq!(batches.header("content-type"), media);
    assert_eq!(batches.header("quorate-next-offset"), "3");
    assert_eq!(batches.header("quorate-end-offset"), "3");
    let path = format!("{PATH}?queue=1");
    let answer = api
        .post_as(&path, media, batches.bytes.clone())
        .await
        .expect(200);
    let offsets: Vec<_> = answer["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["offset"].clone())
        .collect();
    assert_eq!(offsets, [0, 1, 2]);
    let copied = messages(&api, 1).await;
    let values: Vec<_> = copied
        .iter()
        .map(|m| m["value"].as_str().unwrap())
        .collect();
    assert_eq!(values, ["a", "b", "c"]);

    api.post_as(PATH, media, batches.bytes.clone())
        .await
        .problem(400, "invalid_request");
    api.post_as(&path, media, "")
        .await
        .problem(400, "invalid_request");
    api.post_as(&path, media, "garbage")
        .await
        .problem(400, "invalid_request");
    let mut damaged = batches.bytes;
    if let Some(last) = damaged.last_mut() {
        *last ^= 1;
    }
    api.post_as(&path, media, damaged)
        .await
        .problem(400, "invalid_request");
    assert_eq!(messages(&api, 1).await.len(), 3);
}
