//! One node and plain requests to it: what the tests of the HTTP contract stand on.

use std::time::Duration;

use anyhow::{Result, ensure};
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::support::{Cluster, eventually};

/// A node of its own for one test.
pub struct Api {
    pub cluster: Cluster,
    pub url: String,
    pub http: reqwest::Client,
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    /// The body as JSON; null where it isn't.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// Checks the status and gives the body.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text());
        self.json()
    }

    /// Checks that this is the problem of the contract with this status and code.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str) -> Value {
        let body = self.expect(status);
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["status"], status, "{body}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        for field in ["type", "title", "detail"] {
            assert!(
                body[field].as_str().is_some_and(|text| !text.is_empty()),
                "{field}: {body}"
            );
        }
        assert!(body["retryable"].is_boolean(), "{body}");
        assert_eq!(
            self.headers.contains_key("retry-after"),
            matches!(status, 429 | 503),
            "{body}"
        );
        body
    }
}

impl Api {
    pub async fn start() -> Result<Self> {
        Self::start_with("").await
    }

    /// `more` goes into the node's configuration file.
    pub async fn start_with(more: &str) -> Result<Self> {
        let cluster = Cluster::start_with(1, more).await?;
        let url = cluster.urls().remove(0);
        let http = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { cluster, url, http })
    }

    /// Runs the command line against the node and gives what it printed.
    pub async fn quorate(&self, arguments: &[&str]) -> String {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.args(arguments).args(["--url", &self.url]);
        let run = tokio::time::timeout(Duration::from_secs(30), command.output());
        let output = run.await.expect("in time").expect("it starts");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let response = request.send().await.expect("the node answers");
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response
            .bytes()
            .await
            .expect("the answer is whole")
            .to_vec();
        Answer {
            status,
            headers,
            bytes,
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn call(&self, method: Method, path: &str, body: &Value) -> Answer {
        self.send(self.request(method, path).json(body)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.call(Method::POST, path, body).await
    }

    /// Sends `body` as it is, under this content type.
    pub async fn post_as(&self, path: &str, media: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self
            .request(Method::POST, path)
            .header("content-type", media);
        self.send(request.body(body)).await
    }

    /// Creates a topic of `queues` queues and waits for its leaders.
    pub async fn topic(&self, name: &str, queues: u32) {
        let body = serde_json::json!({"name": name, "queues": queues, "max_message_bytes": 10_000});
        // The same topic asked for again is the same topic: on a busy machine its leaders take their
        // time.
        eventually("the topic is made", || async {
            let answer = self.post("/v1/topics", &body).await;
            ensure!(answer.status.is_success(), "{}", answer.text());
            Ok(())
        })
        .await
        .expect("a topic");
    }

    /// Stores texts in one queue and gives their offsets.
    pub async fn store(&self, topic: &str, queue: u32, values: &[&str]) -> Vec<u64> {
        let messages: Vec<Value> = values
            .iter()
            .map(|value| serde_json::json!({"value": value, "queue": queue}))
            .collect();
        let body = serde_json::json!({"messages": messages});
        let answer = self
            .post(&format!("/v1/topics/{topic}/messages"), &body)
            .await
            .expect(200);
        let results = answer["results"].as_array().expect("results").iter();
        results
            .map(|result| result["offset"].as_u64().expect("offset"))
            .collect()
    }
}
