//! `quorate audit` against a node, and against one that tells of what no node should have.

use std::process::{Command, Output};

use axum::Router;
use axum::extract::Query;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::IntoResponse;
use axum::routing::get;
use quorate_storage::batch::{BatchBuilder, RecordInput, patch_base_offset};
use serde_json::{Value, json};

use crate::api::Api;

async fn audit(url: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.args(["audit", "--url", url, "--topic", "t"]);
    command.args(arguments);
    let run = tokio::task::spawn_blocking(move || command.output());
    run.await.unwrap().expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_json_where_answers_are() {
    let api = Api::start().await.unwrap();
    let wrong = |arguments: &'static [&'static str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.args(arguments).args(["--json", "--url", &api.url]);
        async move {
            let run = tokio::task::spawn_blocking(move || command.output());
            let output = run.await.unwrap().expect("the program runs");
            let text = text(&output.stderr);
            assert_eq!(text.lines().count(), 1, "{text}");
            let error: Value = serde_json::from_str(&text).expect("JSON");
            assert!(output.stdout.is_empty());
            (output.status.code(), error)
        }
    };
    let (code, error) = wrong(&["topic", "show", "none"]).await;
    assert_eq!((code, &error["code"]), (Some(1), &json!("topic_not_found")));
    assert_eq!(error["status"], 404, "{error}");
    assert!(
        error["type"].is_string() && error["detail"].is_string(),
        "{error}"
    );
    let (code, error) = wrong(&["topic", "shwo"]).await;
    assert_eq!((code, &error["title"]), (Some(2), &json!("Wrong usage")));
}

async fn json_of(url: &str, arguments: &[&str]) -> (Option<i32>, Value) {
    let arguments: Vec<&str> = [&["--json"], arguments].concat();
    let output = audit(url, &arguments).await;
    let value = serde_json::from_slice(&output.stdout);
    (
        output.status.code(),
        value.unwrap_or_else(|_| panic!("{}", text(&output.stderr))),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_topic_has_no_findings() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    for name in ["a", "b", "c"] {
        for epoch in 0..2 {
            let producer = api
                .post("/v1/producers", &json!({"name": name}))
                .await
                .expect(200);
            assert_eq!(producer["epoch"], epoch);
            for sequence in [0, 2, 2, 4] {
                // The second one with sequence 2 is a repetition, and stored once.
                let body = json!({"messages": [{"value": "x", "queue": 0}, {"value": "y", "queue": 0}],
                    "producer": {"id": producer["id"], "epoch": epoch, "sequence": sequence}});
                api.post("/v1/topics/t/messages", &body).await.expect(200);
            }
        }
    }
    api.store("t", 1, &["without", "a producer"]).await;
    let (code, found) = json_of(&api.url, &[]).await;
    assert_eq!(code, Some(0), "{found}");
    assert_eq!(found["findings_total"], 0);
    let first = &found["queues"][0];
    assert_eq!(
        (&first["messages"], &first["numbered"]),
        (&json!(36), &json!(36))
    );
    assert_eq!(
        (&first["producers"], &first["missing"]),
        (&json!(6), &json!(0))
    );
    assert_eq!(found["queues"][1]["messages"], 2);
    assert_eq!(found["queues"][1]["numbered"], 0);
    // Of a group that isn't there, nothing is found out.
    let unknown = audit(&api.url, &["--group", "nobody"]).await;
    let said = text(&unknown.stderr);
    assert_eq!(unknown.status.code(), Some(1), "{said}");
    assert!(said.contains("consumer_group_not_found"), "{said}");
    // From the middle: what comes first there is a producer's start.
    let (code, found) = json_of(&api.url, &["--from-offset", "9", "--queue", "0"]).await;
    assert_eq!(
        (code, &found["queues"][0]["from_offset"]),
        (Some(0), &json!(9))
    );
    let (code, found) = json_of(&api.url, &["--from-timestamp-ms", "0"]).await;
    assert_eq!(
        (code, &found["queues"][0]["messages"]),
        (Some(0), &json!(36))
    );
    let (code, found) = json_of(&api.url, &["--to-timestamp-ms", "1000"]).await;
    assert_eq!(
        (code, &found["queues"][0]["messages"]),
        (Some(0), &json!(0))
    );
    let commit = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 5}]});
    let put = api.call(reqwest::Method::PUT, "/v1/groups/g/offsets", &commit);
    put.await.expect(200);
    let output = audit(&api.url, &["--group", "g"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    assert!(
        table.contains("OFFSET FAULTS") && table.contains("no findings"),
        "{table}"
    );
    let none = Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(["audit", "--url", &api.url, "--topic", "none"])
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(1));
}

/// A batch of one message a sequence, at an offset.
fn batch(offset: u64, producer: Option<(i64, i16, i32)>, count: usize) -> Vec<u8> {
    let mut builder = BatchBuilder::new();
    if let Some((id, epoch, sequence)) = producer {
        builder = builder.producer(id, epoch, sequence);
    }
    for _ in 0..count {
        builder.push(RecordInput::default());
    }
    let mut bytes = builder.finish().to_vec();
    patch_base_offset(&mut bytes, offset);
    bytes
}

/// A node with one queue of these batches.
async fn broken_node(batches: Vec<Vec<u8>>, end: u64, groups: Value) -> String {
    let topic = json!({"name": "t", "config": {}, "queues": [
        {"queue": 0, "leader": 1, "earliest_offset": 0, "end_offset": end}]});
    let messages = move |headers: HeaderMap, Query(query): Query<Vec<(String, String)>>| {
        let wants_batches = headers["accept"] == "application/vnd.quorate.batches";
        let is_latest = query.contains(&("offset".into(), "latest".into()));
        let bytes = batches.concat();
        async move {
            if wants_batches {
                let mut headers = HeaderMap::new();
                headers.insert("quorate-next-offset", HeaderValue::from(end));
                return (headers, bytes).into_response();
            }
            assert!(is_latest, "{query:?}");
            let answer = json!({"messages": [], "next_offset": end, "earliest_offset": 0, "end_offset": end});
            axum::Json(answer).into_response()
        }
    };
    let app = Router::new()
        .route("/v1/topics/t", get(move || async { axum::Json(topic) }))
        .route("/v1/topics/t/queues/0/messages", get(messages))
        .route(
            "/v1/groups/g",
            get(|| async { axum::Json(json!({"group": "g"})) }),
        )
        .route(
            "/v1/groups/g/offsets",
            get(move || async { axum::Json(groups) }),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_node_should_have_is_found() {
    let batches = vec![
        batch(0, Some((7, 0, 0)), 3),
        batch(3, Some((7, 0, 5)), 1), // 3 and 4 are missing
        batch(4, Some((8, 0, 0)), 2),
        batch(6, Some((8, 0, 1)), 1),  // a second time
        batch(9, None, 1),             // no offsets 7 and 8
        batch(10, Some((7, 0, 4)), 1), // late
    ];
    let groups = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 99}]});
    let url = broken_node(batches, 11, groups).await;
    let (code, found) = json_of(&url, &["--group", "g"]).await;
    assert_eq!(code, Some(1), "{found}");
    let kinds: Vec<&str> = found["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| finding["kind"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        ["duplicate", "offset_hole", "gap", "committed_beyond_end"]
    );
    let totals = &found["queues"][0];
    assert_eq!(
        (&totals["missing"], &totals["late"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(found["findings_total"], 4);
    let output = audit(&url, &[]).await;
    assert_eq!(output.status.code(), Some(1));
    let table = text(&output.stdout);
    assert!(table.contains("sequence 3 is missing"), "{table}");
    assert!(text(&output.stderr).contains("3 findings"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_checksum_ends_it() {
    let mut bad = batch(0, None, 1);
    let last = bad.len() - 1;
    bad[last] ^= 1;
    let url = broken_node(vec![bad], 1, json!({"offsets": []})).await;
    let output = audit(&url, &[]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("cannot be read"),
        "{}",
        text(&output.stderr)
    );
}
