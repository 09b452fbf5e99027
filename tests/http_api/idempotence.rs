//! Retries that store nothing twice: producers with sequences, and Idempotency-Key.

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};

const PATH: &str = "/v1/topics/t/messages";

async fn count(api: &Api, queue: u32) -> u64 {
    let path = format!("/v1/topics/t/queues/{queue}/messages?offset=latest");
    api.get(&path).await.expect(200)["end_offset"]
        .as_u64()
        .unwrap()
}

#[tokio::test]
async fn a_producers_retry_is_stored_once() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let me = api
        .post("/v1/producers", &json!({"name": "orders-svc"}))
        .await
        .expect(200);
    let (id, epoch) = (me["id"].as_str().unwrap(), me["epoch"].as_u64().unwrap());
    let request = |epoch: u64, sequence: u64, values: &[&str]| {
        let messages: Vec<Value> = values
            .iter()
            .map(|v| json!({"value": v, "queue": 1}))
            .collect();
        json!({"messages": messages, "producer": {"id": id, "epoch": epoch, "sequence": sequence}})
    };
    let first = api
        .post(PATH, &request(epoch, 0, &["a", "b"]))
        .await
        .expect(200);
    let again = api
        .post(PATH, &request(epoch, 0, &["a", "b"]))
        .await
        .expect(200);
    assert_eq!(first["results"], again["results"]);
    api.post(PATH, &request(epoch, 2, &["c"])).await.expect(200);
    assert_eq!(count(&api, 1).await, 3);
    let found = api.get("/v1/topics/t/queues/1/messages").await.expect(200);
    for (sequence, message) in found["messages"].as_array().unwrap().iter().enumerate() {
        let expected = json!({"id": id, "epoch": epoch, "sequence": sequence});
        assert_eq!(message["producer"], expected);
    }

    let gap = api.post(PATH, &request(epoch, 7, &["x"])).await;
    let body = gap.problem(409, "out_of_order_sequence");
    assert_eq!(body["outcome"], "not_committed");
    let renewed = api
        .post("/v1/producers", &json!({"name": "orders-svc"}))
        .await
        .expect(200);
    assert_eq!(renewed["id"], id);
    let renewed = renewed["epoch"].as_u64().unwrap();
    assert!(renewed > epoch);
    api.post(PATH, &request(renewed, 0, &["d"]))
        .await
        .expect(200);
    api.post(PATH, &request(epoch, 3, &["x"]))
        .await
        .problem(409, "fenced_producer");
    assert_eq!(count(&api, 1).await, 4);
    // Messages of one sequence cannot be in two queues.
    let spread = json!({"messages": [{"queue": 0}, {"queue": 1}],
        "producer": {"id": id, "epoch": renewed, "sequence": 1}});
    api.post(PATH, &spread)
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn producers_without_a_name_are_all_different() {
    let api = Api::start().await.unwrap();
    let one = api.post("/v1/producers", &json!({})).await.expect(200);
    let two = api
        .send(api.request(Method::POST, "/v1/producers"))
        .await
        .expect(200);
    assert_ne!(one["id"], two["id"]);
}

async fn keyed(api: &Api, key: &str, media: &str, body: &str) -> Answer {
    let request = api
        .request(Method::POST, PATH)
        .header("content-type", media);
    api.send(request.header("idempotency-key", key).body(body.to_owned()))
        .await
}

#[tokio::test]
async fn a_retry_with_the_same_key_gets_the_first_answer() {
    let api = Api::start().await.unwrap();
    api.topic("t", 4).await;
    let body = r#"{"messages":[{"value":"a"},{"value":"b"}]}"#;
    let first = keyed(&api, "k-1", "application/json", body)
        .await
        .expect(200);
    let again = keyed(&api, "k-1", "application/json", body)
        .await
        .expect(200);
    assert_eq!(first["results"], again["results"]);
    let other = keyed(&api, "k-2", "application/json", body)
        .await
        .expect(200);
    assert_ne!(first["results"], other["results"]);
    let mut stored = 0;
    for queue in 0..4 {
        stored += count(&api, queue).await;
    }
    assert_eq!(stored, 4);

    let bytes = keyed(&api, "k-3", "application/octet-stream", "x")
        .await
        .expect(200);
    let again = keyed(&api, "k-3", "application/octet-stream", "x")
        .await
        .expect(200);
    assert_eq!(bytes["results"], again["results"]);
    for key in ["", &"x".repeat(256)] {
        keyed(&api, key, "application/json", body)
            .await
            .problem(400, "invalid_request");
    }
}

/// 250 lines; those at `numbers` are too large.
fn many_lines(numbers: &[usize]) -> String {
    let line = |number: usize| match numbers.contains(&number) {
        true => format!("{{\"value\":\"{}\"}}\n", "x".repeat(10_001)),
        false => format!("{{\"value\":\"{number}\"}}\n"),
    };
    (0..250).map(line).collect()
}

#[tokio::test]
async fn lines_under_a_key_are_remembered_by_the_hundred() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let media = "application/x-ndjson";
    let key = "k".repeat(255);
    let body = many_lines(&[]);
    let first = keyed(&api, &key, media, &body).await;
    first.expect(200);
    assert_eq!(first.text().lines().count(), 250);
    // However the retry arrives, it is divided the same way.
    let pieces: Vec<_> = body.as_bytes().chunks(777).map(<[u8]>::to_vec).collect();
    let pieces = pieces.into_iter().map(Ok::<_, std::io::Error>);
    let request = api
        .request(Method::POST, PATH)
        .header("content-type", media)
        .header("idempotency-key", &key);
    let pieces = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    let again = api.send(request.body(pieces)).await;
    assert_eq!(first.text(), again.text());
    assert_eq!(count(&api, 0).await, 250);
    // The first two groups are known, the third is another one.
    let longer = keyed(&api, &key, media, &format!("{body}{{}}\n")).await;
    let (first, longer) = (first.text(), longer.text());
    let both = first.lines().zip(longer.lines());
    assert_eq!(both.take_while(|(a, b)| a == b).count(), 200);
    assert_eq!(longer.matches("\"invalid_request\"").count(), 51);
    assert_eq!(count(&api, 0).await, 250);
}

#[tokio::test]
async fn a_line_that_cannot_be_stored_leaves_the_others_under_its_key() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let media = "application/x-ndjson";
    let body = many_lines(&[3, 77]);
    let first = keyed(&api, "k", media, &body).await;
    first.expect(200);
    let text = first.text();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    for (number, line) in lines.iter().enumerate() {
        match number {
            3 | 77 => assert_eq!(line["error"]["code"], "message_too_large", "{line}"),
            _ => assert!(line["offset"].is_u64(), "{line}"),
        }
    }
    assert_eq!(keyed(&api, "k", media, &body).await.text(), text);
    assert_eq!(count(&api, 0).await, 248);
}
