//! Streams: messages and cluster events as they happen, and how they end with the node.

use std::time::Duration;

use anyhow::{Result, bail};
use reqwest::{Method, Response};
use serde_json::Value;

use crate::api::Api;
use crate::support::PATIENCE;

const PATH: &str = "/v1/topics/t/queues/0/messages";

/// Reads a stream of server-sent events piece by piece.
pub struct Events {
    response: Response,
    text: String,
}

impl Events {
    pub async fn open(api: &Api, path: &str, last_event_id: Option<&str>) -> Self {
        let mut request = api
            .request(Method::GET, path)
            .header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            response,
            text: String::new(),
        }
    }

    /// The next block that is an event or a comment; None when the stream has ended.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                return Ok(Some(block));
            }
            match tokio::time::timeout(PATIENCE, self.response.chunk()).await {
                Err(_) => bail!("no event came"),
                Ok(piece) => match piece? {
                    None => return Ok(None),
                    Some(piece) => self.text.push_str(std::str::from_utf8(&piece)?),
                },
            }
        }
    }

    /// The next event's name and data.
    pub async fn named(&mut self) -> (String, Value) {
        loop {
            let block = self.next().await.unwrap().expect("the stream goes on");
            let field = |name: &str| {
                let line = block.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().to_owned()
            };
            if !block.starts_with(':') {
                let data = serde_json::from_str(&field("data: ")).unwrap();
                return (field("event: "), data);
            }
        }
    }

    /// The next event's id and data.
    async fn message(&mut self) -> (String, Value) {
        loop {
            let block = self.next().await.unwrap().expect("the stream goes on");
            if block.starts_with(':') {
                continue;
            }
            let field = |name: &str| {
                let line = block.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().to_owned()
            };
            return (
                field("id: "),
                serde_json::from_str(&field("data: ")).unwrap(),
            );
        }
    }
}

#[tokio::test]
async fn messages_as_they_come_and_where_it_left_off() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    let mut events = Events::open(&api, PATH, None).await;
    for (offset, value) in [("0", "a"), ("1", "b")] {
        let (id, message) = events.message().await;
        assert_eq!(
            (id.as_str(), &message["value"]),
            (offset, &Value::from(value))
        );
    }
    api.store("t", 0, &["c\nd"]).await;
    let (id, message) = events.message().await;
    assert_eq!(
        (id.as_str(), &message["value"]),
        ("2", &Value::from("c\nd"))
    );
    drop(events);

    let mut resumed = Events::open(&api, PATH, Some("0")).await;
    assert_eq!(resumed.message().await.0, "1");
    let mut live = Events::open(&api, &format!("{PATH}?offset=latest"), None).await;
    api.store("t", 0, &["e"]).await;
    assert_eq!(live.message().await.0, "3");

    let request = |id: &str| {
        let request = api
            .request(Method::GET, PATH)
            .header("accept", "text/event-stream");
        request.header("last-event-id", id.to_owned())
    };
    api.send(request("x")).await.problem(400, "invalid_request");
    api.send(request("9"))
        .await
        .problem(416, "offset_out_of_range");
    let missing = api.request(Method::GET, "/v1/topics/none/queues/0/messages");
    api.send(missing.header("accept", "text/event-stream"))
        .await
        .problem(404, "topic_not_found");
}

#[tokio::test]
async fn a_stream_of_a_deleted_topic_says_so_and_ends() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let mut events = Events::open(&api, PATH, None).await;
    api.send(api.request(Method::DELETE, "/v1/topics/t"))
        .await
        .expect(204);
    loop {
        match events.next().await.unwrap() {
            Some(block) if block.starts_with(':') => {}
            Some(block) => {
                assert!(block.starts_with("event: error"), "{block}");
                assert!(block.contains("topic_not_found"), "{block}");
            }
            None => break,
        }
    }
}

#[tokio::test]
async fn a_stream_does_not_go_on_in_another_topic_of_the_same_name() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    let mut events = Events::open(&api, PATH, None).await;
    for value in ["a", "b"] {
        assert_eq!(events.message().await.1["value"], value);
    }
    api.send(api.request(Method::DELETE, "/v1/topics/t"))
        .await
        .expect(204);
    api.topic("t", 1).await;
    api.store("t", 0, &["x", "y", "z"]).await;
    loop {
        match events.next().await.unwrap() {
            Some(block) if block.starts_with(':') => {}
            Some(block) => assert!(block.contains("topic_not_found"), "{block}"),
            None => break,
        }
    }
}

#[tokio::test]
async fn elections_are_told() {
    let api = Api::start().await.unwrap();
    let mut events = Events::open(&api, "/v1/cluster/events", None).await;
    api.topic("t", 1).await;
    loop {
        let (_, event) = events.message().await;
        if event["event"] == "leader_elected" && event["topic"] == "t" {
            assert_eq!(
                (&event["queue"], &event["node"]),
                (&Value::from(0), &Value::from(1))
            );
            assert!(event["term"].as_u64().unwrap() > 0 && event["time_ms"].as_u64().unwrap() > 0);
            break;
        }
    }
}

#[tokio::test]
async fn the_end_of_the_node_ends_streams_and_answers_long_polls() {
    let mut api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a"]).await;
    let mut messages = Events::open(&api, PATH, None).await;
    assert_eq!(messages.message().await.0, "0");
    let mut events = Events::open(&api, "/v1/cluster/events", None).await;
    let poll = api
        .request(Method::GET, &format!("{PATH}?offset=1&wait_ms=60000"))
        .send();
    let poll = tokio::spawn(poll);
    crate::support::eventually("three connections", || async {
        let text = api.get("/metrics").await.text();
        let open = text
            .lines()
            .find_map(|line| line.strip_prefix("quorate_http_connections "));
        match open.and_then(|count| count.parse::<u32>().ok()) {
            Some(count) if count >= 4 => Ok(()),
            other => bail!("{other:?}"),
        }
    })
    .await
    .unwrap();
    // It is counted when it is accepted; what was asked on it is read a moment later.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (code, took) = api.cluster.node(1).terminate().unwrap();
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(10), "{took:?}");
    while messages.next().await.is_ok_and(|block| block.is_some()) {}
    while events.next().await.is_ok_and(|block| block.is_some()) {}
    let answer = poll.await.unwrap().unwrap();
    assert!(
        matches!(answer.status().as_u16(), 200 | 503),
        "{}",
        answer.status()
    );
    let body: Value = answer.json().await.unwrap();
    assert!(
        body["next_offset"] == 1 || body["retryable"] == true,
        "{body}"
    );
}
