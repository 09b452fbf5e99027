//! Requests that nobody should send, to a real node: it says what is wrong with them, and goes on.

use std::cell::Cell;

use quorate_storage::batch::{BatchBuilder, RecordInput};
use serde_json::Value;

use crate::mutate::{Input, directory, fuzz};
use crate::request::{Answer, Request};
use crate::support::Cluster;

/// The codes of the contract that one sound node can give, with their statuses.
const CODES: &[(&str, u16)] = &[
    ("invalid_request", 400),
    ("invalid_name", 400),
    ("not_found", 404),
    ("topic_not_found", 404),
    ("queue_not_found", 404),
    ("replica_not_found", 404),
    ("message_not_found", 404),
    ("member_not_found", 404),
    ("exchange_not_found", 404),
    ("binding_not_found", 404),
    ("unroutable", 404),
    ("transaction_not_found", 404),
    ("generator_not_found", 404),
    ("consumer_group_not_found", 404),
    ("method_not_allowed", 405),
    ("request_timeout", 408),
    ("topic_exists", 409),
    ("fenced_member", 409),
    ("fenced_producer", 409),
    ("out_of_order_sequence", 409),
    ("offset_conflict", 409),
    ("already_delivered", 409),
    ("exchange_exists", 409),
    ("group_has_members", 409),
    ("group_mode_conflict", 409),
    ("lease_expired", 409),
    ("transaction_ended", 409),
    ("transaction_busy", 409),
    ("offset_out_of_range", 416),
    ("message_too_large", 413),
    ("request_too_large", 413),
    ("quota_exceeded", 429),
    ("backlog_full", 429),
    ("no_leader", 503),
    ("not_enough_replicas", 503),
    ("overloaded", 503),
    ("not_ready", 503),
    ("timeout", 504),
];

fn request(text: &str) -> Request {
    Request::parse(text.as_bytes())
}

const ORDERS: &str = "POST /v1/topics\ncontent-type: application/json\n\n\
                      {\"name\":\"orders\",\"queues\":2,\"max_message_bytes\":10000}";

/// An error of the API is a problem with a code of the contract.
fn check_problem(request: &Request, answer: &Answer) {
    let said = String::from_utf8_lossy(&answer.body);
    let context = || format!("{request:?}: {} {said}", answer.status);
    assert_eq!(
        answer.content_type,
        "application/problem+json",
        "{}",
        context()
    );
    let body = answer.json().unwrap_or_else(|| panic!("{}", context()));
    let code = body["code"].as_str().unwrap_or_default();
    let known = CODES.contains(&(code, answer.status));
    assert!(known, "{}", context());
    for field in ["type", "title", "detail"] {
        let text = body[field].as_str().unwrap_or_default();
        assert!(!text.is_empty(), "{field} of {}", context());
    }
}

/// Keeps the node as it was: topics that were made by accident would pile up.
fn undo(address: &str, request: &Request, answer: &Answer) {
    if request.method == b"POST"
        && answer.status == 201
        && let Some(name) = answer
            .json()
            .and_then(|body| Some(body["name"].as_str()?.to_owned()))
    {
        let gone = format!("DELETE /v1/topics/{name}");
        self::request(&gone).send(address);
    }
    if matches!(&request.method[..], b"DELETE" | b"POST") && answer.status < 300 {
        self::request(ORDERS).send(address);
    }
}

#[test]
fn requests_that_lie() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let cluster = runtime
        .block_on(Cluster::start_with(1, ""))
        .expect("a node");
    let url = cluster.urls().remove(0);
    let address = url.trim_start_matches("http://").to_owned();
    let created = request(ORDERS).send(&address).expect("an answer");
    assert_eq!(created.status, 201);
    let (answered, below, good) = (Cell::new(0u32), Cell::new(0u32), Cell::new(0u32));
    fuzz("http", 1500, |Input { bytes, seal }| {
        let mut request = Request::parse(bytes);
        if *seal {
            request.repair_head();
            seal_batch(&mut request.body);
        }
        let Some(answer) = request.send(&address) else {
            return;
        };
        answered.set(answered.get() + 1);
        good.set(good.get() + u32::from(answer.status < 300));
        assert_ne!(answer.status, 500, "{request:?}: {answer:?}");
        let refused_below = answer.body.is_empty() && !request.is_sound();
        below.set(below.get() + u32::from(refused_below));
        if answer.status >= 400 && request.method != b"HEAD" && !refused_below {
            check_problem(&request, &answer);
        }
        undo(&address, &request, &answer);
    });
    let (answered, below, good) = (answered.get(), below.get(), good.get());
    println!("http: {answered} answers, {below} from below the API, {good} good ones");
    assert!(good > 0 && below < answered / 2, "the API was not reached");
    let ready = request("GET /health/ready")
        .send(&address)
        .expect("an answer");
    assert_eq!(ready.status, 200, "{ready:?}");
    let log = std::fs::read_to_string(cluster.nodes[0].log_path()).expect("the node's log");
    assert!(
        !log.contains("panicked"),
        "{}",
        cluster.nodes[0].last_log_lines()
    );
}

/// Gives a body that is a stored batch a right checksum.
fn seal_batch(body: &mut [u8]) {
    if body.len() >= 61 && body[16] == 2 {
        let crc = crc32c_of(&body[21..]);
        body[17..21].copy_from_slice(&crc.to_be_bytes());
    }
}

/// CRC-32C, bit by bit: slow, and of nobody else's code.
fn crc32c_of(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1))
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[test]
#[ignore = "writes the corpus"]
fn write_the_corpus() {
    let dir = directory("http");
    std::fs::create_dir_all(&dir).expect("directory");
    let keep = |name: &str, head: &str, body: &[u8]| {
        let bytes = [head.as_bytes(), b"\n\n", body].concat();
        std::fs::write(dir.join(name), bytes).expect("write");
    };
    let json = "content-type: application/json";
    let produce = "POST /v1/topics/orders/messages";
    for (name, target) in [
        (
            "read",
            "/v1/topics/orders/queues/0/messages?offset=earliest&max_messages=3",
        ),
        (
            "read-wait",
            "/v1/topics/orders/queues/1/messages?offset=2&wait_ms=1",
        ),
        (
            "read-stale",
            "/v1/topics/orders/queues/0/messages?consistency=stale",
        ),
        (
            "offset-at",
            "/v1/topics/orders/queues/0/offset?timestamp_ms=17",
        ),
        (
            "read-filtered",
            "/v1/topics/orders/queues/0/messages?filter=headers.a%20is%20null%20or%20offset%20%3C%209",
        ),
        (
            "lookup",
            "/v1/topics/orders/messages?key=k&from_timestamp_ms=5&max_messages=3&after=5-0-1",
        ),
        (
            "lookup-id",
            "/v1/topics/orders/messages?message_id=gAgBBQAA",
        ),
        ("trace", "/v1/topics/orders/messages/gAgBBQAA/trace"),
        ("topic", "/v1/topics/orders"),
        ("odd-name", "/v1/topics/%2e%2e%2F%00/queues/%31/messages"),
        ("topics", "/v1/topics"),
        ("offsets", "/v1/groups/g/offsets"),
        ("cluster", "/v1/cluster"),
        ("metrics", "/metrics"),
    ] {
        keep(name, &format!("GET {target}"), b"");
    }
    keep(
        "read-batches",
        "GET /v1/topics/orders/queues/0/messages\naccept: application/vnd.quorate.batches",
        b"",
    );
    keep("delete", "DELETE /v1/topics/made", b"");
    let bodies: [(&str, &str, Value); 10] = [
        (
            "create",
            "POST /v1/topics",
            serde_json::json!({"name": "made", "queues": 1}),
        ),
        (
            "update",
            "PATCH /v1/topics/orders",
            serde_json::json!({"ttl_ms": null, "max_message_bytes": 10001}),
        ),
        (
            "produce",
            produce,
            serde_json::json!({"messages": [
            {"key": "k", "value": "é", "tag": "t", "headers": {"a": "b"}},
            {"value_base64": "AAEC", "queue": 1}]}),
        ),
        (
            "numbered",
            produce,
            serde_json::json!({"queue": 0, "messages": [{"value": "v"}],
            "producer": {"id": "8246337208321", "epoch": 0, "sequence": 0}}),
        ),
        (
            "producer",
            "POST /v1/producers",
            serde_json::json!({"name": "p"}),
        ),
        (
            "fetch",
            "POST /v1/fetch",
            serde_json::json!({"queues": [
            {"topic": "orders", "queue": 0, "offset": 0}], "max_bytes": 1000}),
        ),
        (
            "commit",
            "PUT /v1/groups/g/offsets",
            serde_json::json!({"offsets": [
            {"topic": "orders", "queue": 0, "offset": 1}], "allow_rewind": true}),
        ),
        (
            "reset",
            "POST /v1/groups/g/offsets/reset",
            serde_json::json!({"topic": "orders", "to": "earliest"}),
        ),
        (
            "leader",
            "POST /v1/topics/orders/queues/0/leader",
            serde_json::json!({"node_id": 1}),
        ),
        (
            "long-number",
            produce,
            serde_json::json!({"messages": [{"value": 1e300, "key": 7}]}),
        ),
    ];
    for (name, head, body) in bodies {
        keep(
            name,
            &format!("{head}\n{json}"),
            body.to_string().as_bytes(),
        );
    }
    keep(
        "with-key",
        &format!("{produce}\n{json}\nidempotency-key: k-1"),
        br#"{"messages":[{"value":"a"}]}"#,
    );
    keep(
        "lines",
        &format!("{produce}\ncontent-type: application/x-ndjson"),
        b"{\"value\":\"a\"}\n{\"value\":\"b\",\"key\":\"k\"}\n",
    );
    keep(
        "bytes",
        &format!("{produce}?queue=1&tag=t\ncontent-type: application/octet-stream"),
        &[0, 255, 10, 13],
    );
    let mut batch = BatchBuilder::new();
    for number in 0..3u8 {
        batch.push(RecordInput {
            value: Some(&[number; 20]),
            headers: &[("name", b"value")],
            ..RecordInput::default()
        });
    }
    let head = format!("{produce}?queue=0\ncontent-type: application/vnd.quorate.batches");
    keep("batches", &head, &batch.finish());
}
