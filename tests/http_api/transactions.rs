//! Transactions: half messages, commit and rollback, check-back, offsets that move with messages.

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use hmac::{Hmac, Mac};
use reqwest::Method;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::api::{Answer, Api};
use crate::support::{PATIENCE, eventually};

const PATH: &str = "/v1/transactions";

fn message(topic: &str, queue: u32, value: &str) -> Value {
    json!({"topic": topic, "queue": queue, "value": value})
}

/// An open transaction that nobody checks while the test runs.
async fn begin(api: &Api, body: Value) -> String {
    let mut body = body;
    if body.get("timeout_ms").is_none() {
        body["timeout_ms"] = json!(600_000);
    }
    let begun = api.post(PATH, &body).await.expect(201);
    assert_eq!(begun["state"], "open", "{begun}");
    begun["transaction_id"].as_str().expect("an id").to_owned()
}

async fn end(api: &Api, id: &str, how: &str) -> Answer {
    let request = api.request(Method::POST, &format!("{PATH}/{id}/{how}"));
    api.send(request).await
}

async fn state(api: &Api, id: &str) -> String {
    let found = api.get(&format!("{PATH}/{id}")).await.expect(200);
    found["state"].as_str().expect("a state").to_owned()
}

async fn until_state(api: &Api, id: &str, wanted: &str) {
    let seen = eventually(wanted, || async {
        let now = state(api, id).await;
        anyhow::ensure!(now == wanted, "it is {now}");
        Ok(())
    });
    seen.await.unwrap();
}

/// The values in a queue.
async fn values(api: &Api, topic: &str, queue: u32) -> Vec<String> {
    let path = format!("/v1/topics/{topic}/queues/{queue}/messages?offset=0");
    let found = api.get(&path).await.expect(200);
    let messages = found["messages"].as_array().expect("messages").iter();
    let values = messages.map(|m| m["value"].as_str().expect("a value").to_owned());
    values.collect()
}

#[tokio::test]
async fn a_commit_shows_messages_of_several_topics_and_says_where() {
    let api = Api::start().await.unwrap();
    api.topic("a", 2).await;
    api.topic("b", 1).await;
    let messages = json!([
        message("b", 0, "1"),
        message("a", 1, "2"),
        message("b", 0, "3")
    ]);
    let id = begin(&api, json!({"producer_group": "p", "messages": messages})).await;
    assert_eq!(values(&api, "a", 1).await, [""; 0]);
    assert_eq!(values(&api, "b", 0).await, [""; 0]);
    // Others are not held up.
    api.store("b", 0, &["between"]).await;
    let more = json!({"messages": [message("a", 0, "4")]});
    let extended = api.post(&format!("{PATH}/{id}/messages"), &more).await;
    let extended = extended.expect(200);
    assert_eq!(
        (&extended["state"], &extended["messages"]),
        (&json!("open"), &json!(4))
    );

    let committed = end(&api, &id, "commit").await.expect(200);
    assert_eq!(committed["state"], "committed");
    let results = committed["results"].as_array().unwrap();
    let places: Vec<_> = results
        .iter()
        .map(|r| {
            (
                r["topic"].as_str().unwrap(),
                r["queue"].as_u64(),
                r["offset"].as_u64(),
            )
        })
        .collect();
    let expected = [
        ("b", Some(0), Some(1)),
        ("a", Some(1), Some(0)),
        ("b", Some(0), Some(2)),
        ("a", Some(0), Some(0)),
    ];
    assert_eq!(places, expected);
    assert_eq!(values(&api, "b", 0).await, ["between", "1", "3"]);
    assert_eq!(values(&api, "a", 1).await, ["2"]);
    assert_eq!(values(&api, "a", 0).await, ["4"]);
    let path = "/v1/topics/b/queues/0/messages?offset=1";
    let read = api.get(path).await.expect(200);
    assert_eq!(read["messages"][0]["message_id"], results[0]["message_id"]);
    assert_eq!(read["messages"][1]["message_id"], results[2]["message_id"]);

    let again = end(&api, &id, "commit").await.expect(200);
    assert_eq!(again, committed);
    let looked_at = api.get(&format!("{PATH}/{id}")).await.expect(200);
    assert_eq!(looked_at, committed);
    end(&api, &id, "rollback")
        .await
        .problem(409, "transaction_ended");
    let late = api.post(&format!("{PATH}/{id}/messages"), &more).await;
    late.problem(409, "transaction_ended");
    assert_eq!(values(&api, "a", 0).await, ["4"]);
}

#[tokio::test]
async fn a_rollback_shows_nothing_ever() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let id = begin(&api, json!({"messages": [message("a", 0, "no")]})).await;
    for _ in 0..2 {
        let ended = end(&api, &id, "rollback").await.expect(200);
        assert_eq!(ended["state"], "rolled_back");
        assert!(ended.get("results").is_none(), "{ended}");
    }
    end(&api, &id, "commit")
        .await
        .problem(409, "transaction_ended");
    assert_eq!(api.store("a", 0, &["yes"]).await, [0]);
    assert_eq!(values(&api, "a", 0).await, ["yes"]);
}

#[tokio::test]
async fn a_transaction_is_synced_on_an_async_topic_too() {
    const ROUNDS: u64 = 20;
    let api = Api::start().await.unwrap();
    let topic = json!({"name": "t", "queues": 1, "flush": "async"});
    api.post("/v1/topics", &topic).await.expect(201);
    let mut before = fsyncs(&api).await;
    for round in 0..ROUNDS {
        let messages = json!([message("t", 0, "1")]);
        let id = begin(&api, json!({"producer_group": "p", "messages": messages})).await;
        // It is recorded, its part is stored, and it is open: one after the other.
        let begun = fsyncs(&api).await;
        assert!(begun >= before + 3, "begin {round}: {before}, {begun}");
        // It is decided, its part is visible, and that is recorded.
        end(&api, &id, "commit").await.expect(200);
        before = fsyncs(&api).await;
        assert!(before >= begun + 3, "commit {round}: {begun}, {before}");
    }
}

/// How often the node has fsynced its log.
async fn fsyncs(api: &Api) -> u64 {
    let metrics = api.get("/metrics").await.text();
    let name = "quorate_log_fsyncs_total ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.expect("the counter").parse().expect("a number")
}

#[tokio::test]
async fn an_empty_transaction_takes_messages_later() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let id = begin(&api, json!({})).await;
    for value in ["1", "2", "3"] {
        let more = json!({"messages": [message("a", 0, value)]});
        let answer = api.post(&format!("{PATH}/{id}/messages"), &more).await;
        answer.expect(200);
    }
    end(&api, &id, "commit").await.expect(200);
    assert_eq!(values(&api, "a", 0).await, ["1", "2", "3"]);
}

#[tokio::test]
async fn what_is_refused_leaves_nothing() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let refused = |body: Value| {
        let api = &api;
        async move { api.post(PATH, &body).await }
    };
    let none = json!({"messages": [message("a", 0, "x"), message("none", 0, "y")]});
    refused(none).await.problem(404, "topic_not_found");
    let queue = json!({"messages": [message("a", 0, "x"), message("a", 7, "y")]});
    refused(queue).await.problem(404, "queue_not_found");
    let large = "x".repeat(20_000);
    let large = json!({"messages": [message("a", 0, "x"), message("a", 0, &large)]});
    refused(large).await.problem(413, "message_too_large");
    let delayed = json!({"messages": [{"topic": "a", "value": "x", "delay_ms": 5}]});
    let problem = refused(delayed).await.problem(400, "invalid_request");
    assert!(
        problem["detail"].as_str().unwrap().contains("delay"),
        "{problem}"
    );
    let unknown = json!({"messages": [], "mesages": []});
    refused(unknown).await.problem(400, "invalid_request");
    let url = json!({"check_url": "http://127.0.0.1:1/"});
    let problem = refused(url).await.problem(400, "invalid_request");
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("webhook_allow"),
        "{problem}"
    );
    let long = json!({"check_interval_ms": 86_400_000, "max_checks": 8});
    refused(long).await.problem(400, "invalid_request");
    let listed = api.get(PATH).await.expect(200);
    assert_eq!(listed, json!({"transactions": []}));
    for id in ["0", "zz", &"0".repeat(32), &"f".repeat(32)] {
        end(&api, id, "commit")
            .await
            .problem(404, "transaction_not_found");
        let found = api.get(&format!("{PATH}/{id}")).await;
        found.problem(404, "transaction_not_found");
    }
    let state = api.get(&format!("{PATH}?state=half")).await;
    state.problem(400, "invalid_request");
    let body = json!({"force": true});
    let path = format!("{PATH}/{}/commit", "0".repeat(32));
    api.post(&path, &body).await.problem(400, "invalid_request");
    assert_eq!(values(&api, "a", 0).await, [""; 0]);
}

#[tokio::test]
async fn check_back_by_polling() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let quiet = begin(
        &api,
        json!({"producer_group": "p", "messages": [message("a", 0, "q")]}),
    )
    .await;
    let poll = |group: &str, wait_ms: u64| {
        let path = format!("{PATH}?producer_group={group}&state=needs_check&wait_ms={wait_ms}");
        let api = &api;
        async move { api.get(&path).await.expect(200)["transactions"].clone() }
    };
    assert_eq!(poll("p", 0).await, json!([]));
    let asked = json!({
        "producer_group": "p", "timeout_ms": 300, "check_interval_ms": 60_000,
        "messages": [message("a", 0, "x")],
    });
    let id = begin(&api, asked).await;
    let begun = std::time::Instant::now();
    let due = poll("p", 30_000).await;
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "the long poll was not woken"
    );
    assert_eq!(due.as_array().unwrap().len(), 1, "{due}");
    assert_eq!(due[0]["transaction_id"], json!(id));
    assert_eq!(
        (&due[0]["state"], &due[0]["checks"]),
        (&json!("needs_check"), &json!(1))
    );
    assert_eq!(poll("other", 0).await, json!([]));
    let all = api
        .get(&format!("{PATH}?state=needs_check"))
        .await
        .expect(200);
    assert_eq!(all["transactions"], due);
    end(&api, &id, "commit").await.expect(200);
    assert_eq!(poll("p", 0).await, json!([]));
    assert_eq!(values(&api, "a", 0).await, ["x"]);
    assert_eq!(state(&api, &quiet).await, "open");
}

#[tokio::test]
async fn nobody_answers_and_it_expires() {
    let api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let unanswered = json!({
        "timeout_ms": 100, "check_interval_ms": 100, "max_checks": 2,
        "messages": [message("a", 0, "x")],
    });
    let id = begin(&api, unanswered).await;
    until_state(&api, &id, "expired").await;
    let found = api.get(&format!("{PATH}/{id}")).await.expect(200);
    assert_eq!(found["checks"], 2);
    let listed = api.get(&format!("{PATH}?state=expired")).await.expect(200);
    assert_eq!(listed["transactions"][0]["transaction_id"], json!(id));
    end(&api, &id, "commit")
        .await
        .problem(409, "transaction_ended");
    assert_eq!(
        end(&api, &id, "rollback").await.expect(200)["state"],
        "expired"
    );
    assert_eq!(values(&api, "a", 0).await, [""; 0]);
    let seen = eventually("the metrics say so", || async {
        let metrics = api.get("/metrics").await.text();
        anyhow::ensure!(
            metrics.contains("quorate_transactions_expired 1"),
            "{metrics}"
        );
        Ok(())
    });
    seen.await.unwrap();
}

#[tokio::test]
async fn offsets_move_with_the_messages_or_not_at_all() {
    let api = Api::start().await.unwrap();
    api.topic("in", 1).await;
    api.topic("out", 1).await;
    api.store("in", 0, &["1", "2", "3"]).await;
    let offset = |offset: u64| json!([{"group": "g", "topic": "in", "queue": 0, "offset": offset}]);
    let committed = || async {
        let found = api.get("/v1/groups/g/offsets?topic=in").await.expect(200);
        found["offsets"][0]["offset"].as_u64()
    };
    let put = |at: u64| {
        let body =
            json!({"offsets": [{"topic": "in", "queue": 0, "offset": at}], "allow_rewind": true});
        let api = &api;
        async move { api.call(Method::PUT, "/v1/groups/g/offsets", &body).await }
    };
    let half = json!({"messages": [message("out", 0, "1+2")], "offsets": offset(2)});
    let id = begin(&api, half.clone()).await;
    assert_eq!(committed().await, None);
    // While it is open nobody else moves the group there.
    put(1).await.problem(409, "offset_conflict");
    let reset = json!({"topic": "in", "to": "latest"});
    let reset = api.post("/v1/groups/g/offsets/reset", &reset).await;
    reset.problem(409, "offset_conflict");
    let second = api.post(PATH, &half).await;
    second.problem(409, "offset_conflict");
    end(&api, &id, "commit").await.expect(200);
    assert_eq!(committed().await, Some(2));
    assert_eq!(values(&api, "out", 0).await, ["1+2"]);

    let id = begin(
        &api,
        json!({"messages": [message("out", 0, "3")], "offsets": offset(3)}),
    )
    .await;
    end(&api, &id, "rollback").await.expect(200);
    assert_eq!(committed().await, Some(2));
    assert_eq!(values(&api, "out", 0).await, ["1+2"]);
    put(3).await.expect(200);

    // Who works at what others have processed meanwhile is told so.
    let mut late = json!({"messages": [message("out", 0, "x")], "offsets": offset(3)});
    late["offsets"][0]["from"] = json!(2);
    api.post(PATH, &late).await.problem(409, "offset_conflict");
    late["offsets"][0]["from"] = json!(3);
    let id = begin(&api, late).await;
    end(&api, &id, "rollback").await.expect(200);

    // What cannot be committed is refused at the beginning, messages and all.
    let behind = json!({"messages": [message("out", 0, "x")], "offsets": offset(1)});
    api.post(PATH, &behind)
        .await
        .problem(409, "offset_conflict");
    let beyond = json!({"messages": [message("out", 0, "x")], "offsets": offset(9)});
    api.post(PATH, &beyond)
        .await
        .problem(416, "offset_out_of_range");
    let mut fenced = json!({"messages": [message("out", 0, "x")], "offsets": offset(3)});
    fenced["offsets"][0]["member"] = json!({"id": "nobody", "epoch": 1});
    api.post(PATH, &fenced).await.problem(409, "fenced_member");
    let twice = json!({"offsets": [offset(3)[0], offset(3)[0]]});
    api.post(PATH, &twice).await.problem(400, "invalid_request");
    put(2).await.expect(200);
    assert_eq!(values(&api, "out", 0).await, ["1+2"]);
    let open = api.get(&format!("{PATH}?state=open")).await.expect(200);
    assert_eq!(open, json!({"transactions": []}));
}

#[tokio::test]
async fn a_member_moves_the_offsets_of_its_own_queues() {
    let api = Api::start().await.unwrap();
    api.topic("in", 1).await;
    api.store("in", 0, &["1", "2"]).await;
    let joined = api
        .post("/v1/groups/g/members", &json!({"topics": ["in"]}))
        .await
        .expect(201);
    let mut body = json!({"offsets": [{"group": "g", "topic": "in", "queue": 0, "offset": 2}]});
    // Not in nobody's name while there are members.
    api.post(PATH, &body).await.problem(409, "fenced_member");
    let member = json!({"id": joined["member_id"], "epoch": joined["epoch"]});
    body["offsets"][0]["member"] = member.clone();
    let id = begin(&api, body.clone()).await;
    let commit = json!({
        "offsets": [{"topic": "in", "queue": 0, "offset": 1}], "member": member,
    });
    let held = api.call(Method::PUT, "/v1/groups/g/offsets", &commit).await;
    held.problem(409, "offset_conflict");
    end(&api, &id, "commit").await.expect(200);
    let found = api.get("/v1/groups/g/offsets?topic=in").await.expect(200);
    assert_eq!(found["offsets"][0]["offset"], 2);
}

#[tokio::test]
async fn an_open_transaction_outlives_its_node() {
    let mut api = Api::start().await.unwrap();
    api.topic("a", 1).await;
    let open = begin(&api, json!({"messages": [message("a", 0, "later")]})).await;
    let done = begin(&api, json!({"messages": [message("a", 0, "before")]})).await;
    let committed = end(&api, &done, "commit").await.expect(200);
    api.cluster.node(1).kill();
    api.cluster.node(1).spawn().unwrap();
    api.cluster.wait_ready().await.unwrap();
    assert_eq!(state(&api, &open).await, "open");
    assert_eq!(end(&api, &done, "commit").await.expect(200), committed);
    assert_eq!(values(&api, "a", 0).await, ["before"]);
    end(&api, &open, "commit").await.expect(200);
    assert_eq!(values(&api, "a", 0).await, ["before", "later"]);
}

const SECRET: &str = "a secret of the tests";

/// What a webhook was sent: the signature and the body.
type Asked = (String, Vec<u8>);

#[derive(Clone)]
struct Producer {
    asked: mpsc::UnboundedSender<Asked>,
    decisions: std::sync::Arc<parking_lot::Mutex<Vec<&'static str>>>,
}

async fn check(
    State(producer): State<Producer>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> String {
    let signature = headers["quorate-signature"].to_str().unwrap().to_owned();
    producer.asked.send((signature, body.to_vec())).unwrap();
    let decision = producer.decisions.lock().pop().unwrap_or("unknown");
    json!({"decision": decision}).to_string()
}

#[tokio::test]
async fn check_back_by_webhook() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/check", listener.local_addr().unwrap());
    let (asked, mut questions) = mpsc::unbounded_channel();
    let producer = Producer {
        asked,
        // From the last to the first.
        decisions: std::sync::Arc::new(parking_lot::Mutex::new(vec![
            "commit", "nonsense", "unknown",
        ])),
    };
    let app = Router::new()
        .route("/check/{of}", post(check))
        .with_state(producer);
    tokio::spawn(async move { axum::serve(listener, app).await });
    let config =
        format!("[transactions]\nwebhook_allow = [{url:?}]\nwebhook_secret = {SECRET:?}\n");
    let api = Api::start_with(&config).await.unwrap();
    api.topic("a", 1).await;
    let elsewhere = json!({"check_url": url.replace("/check", "/other")});
    api.post(PATH, &elsewhere)
        .await
        .problem(400, "invalid_request");
    let body = json!({
        "producer_group": "p", "check_url": format!("{url}/orders"), "timeout_ms": 100,
        "check_interval_ms": 200, "max_checks": 1000, "messages": [message("a", 0, "x")],
    });
    let id = begin(&api, body).await;
    for check in 1..=3 {
        let question = tokio::time::timeout(PATIENCE, questions.recv()).await;
        let (signature, body) = question.expect("it asks in time").unwrap();
        let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
        mac.update(&body);
        let expected = mac.finalize().into_bytes();
        let expected: String = expected.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(signature, format!("sha256={expected}"));
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["transaction_id"], json!(id));
        assert_eq!(
            (&body["producer_group"], &body["check"]),
            (&json!("p"), &json!(check))
        );
    }
    until_state(&api, &id, "committed").await;
    assert_eq!(values(&api, "a", 0).await, ["x"]);
}
