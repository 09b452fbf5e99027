//! A small HTTP client that keeps "refused" and "unknown" apart, as a careful producer must.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::eventually;

/// On a busy machine the leaders of a new topic's queues take their time.
const CREATE_PATIENCE: Duration = Duration::from_secs(60);

/// What became of one produce request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Produced {
    /// Stored: `(queue, offset)` of every message, in order.
    Acked(Vec<(u32, u64)>),
    /// Certainly not stored.
    Refused(String),
    /// Stored or not.
    Unknown(String),
}

/// Talks to all nodes in turn.
#[derive(Debug, Clone)]
pub struct Client {
    pub urls: Vec<String>,
    http: reqwest::Client,
    next: std::sync::Arc<AtomicUsize>,
}

impl Client {
    pub fn new(urls: Vec<String>) -> Self {
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(20))
            .connect_timeout(Duration::from_secs(2))
            .no_proxy()
            .build()
            .expect("a client without TLS always builds");
        Self {
            urls,
            http,
            next: std::sync::Arc::default(),
        }
    }

    /// The same client for one node only.
    pub fn only(&self, url: &str) -> Self {
        Self {
            urls: vec![url.to_owned()],
            ..self.clone()
        }
    }

    fn url(&self) -> &str {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        &self.urls[turn % self.urls.len()]
    }

    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value)> {
        let mut request = self.http.request(method, format!("{}{path}", self.url()));
        if let Some(body) = body {
            request = request.json(body);
        }
        answered(request).await
    }

    pub async fn get(&self, path: &str) -> Result<Value> {
        let (status, value) = self.request(Method::GET, path, None).await?;
        if !status.is_success() {
            bail!("GET {path}: {status} {value}");
        }
        Ok(value)
    }

    pub async fn create_topic(&self, name: &str, queues: u32) -> Result<()> {
        self.create_topic_with(json!({ "name": name, "queues": queues }))
            .await
    }

    /// The same topic asked for again is the same topic: what was not answered in time is repeated.
    pub async fn create_topic_with(&self, topic: Value) -> Result<()> {
        let deadline = Instant::now() + CREATE_PATIENCE;
        loop {
            let asked = self.request(Method::POST, "/v1/topics", Some(&topic));
            let (status, value) = asked.await?;
            if status.is_success() {
                return Ok(());
            }
            if value["retryable"] != true || Instant::now() > deadline {
                bail!("create topic: {status} {value}");
            }
        }
    }

    pub async fn produce(&self, topic: &str, body: &Value) -> Produced {
        self.produce_with(topic, body, None).await
    }

    async fn produce_with(&self, topic: &str, body: &Value, key: Option<&str>) -> Produced {
        let url = format!("{}/v1/topics/{topic}/messages", self.url());
        let mut request = self.http.post(url).json(body);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let (status, value) = match answered(request).await {
            Ok(answer) => answer,
            // Nothing left this process when not even a connection came about.
            Err(error) if is_connect(&error) => return Produced::Refused(format!("{error:#}")),
            Err(error) => return Produced::Unknown(format!("{error:#}")),
        };
        if status == StatusCode::OK {
            let results = value["results"].as_array().cloned().unwrap_or_default();
            let places = results.iter().map(|r| {
                Some((
                    u32::try_from(r["queue"].as_u64()?).ok()?,
                    r["offset"].as_u64()?,
                ))
            });
            return match places.collect() {
                Some(places) => Produced::Acked(places),
                None => Produced::Unknown(format!("200 without places: {value}")),
            };
        }
        match value["outcome"].as_str() {
            Some("not_committed") => Produced::Refused(value.to_string()),
            _ => Produced::Unknown(format!("{status} {value}")),
        }
    }

    /// Stores the messages of one request exactly once, however often it has to be asked: a node that
    /// a busy machine held up costs an answer now and then. Gives `(queue, offset)` of each.
    pub async fn store(&self, topic: &str, body: &Value) -> Result<Vec<(u32, u64)>> {
        let key = Uuid::new_v4().to_string();
        eventually("the messages are stored", || async {
            match self.produce_with(topic, body, Some(&key)).await {
                Produced::Acked(places) => Ok(places),
                other => bail!("not acknowledged: {other:?}"),
            }
        })
        .await
    }

    /// Reads one replica's committed prefix, whoever leads.
    pub async fn read_stale(
        &self,
        url: &str,
        topic: &str,
        queue: u32,
    ) -> Result<Vec<(u64, String)>> {
        self.read_with(url, topic, queue, "stale").await
    }

    pub async fn read_with(
        &self,
        url: &str,
        topic: &str,
        queue: u32,
        consistency: &str,
    ) -> Result<Vec<(u64, String)>> {
        let node = self.only(url);
        let mut messages = Vec::new();
        let mut offset = 0;
        loop {
            let page = node
                .get(&format!(
                    "/v1/topics/{topic}/queues/{queue}/messages?offset={offset}&max_messages=5000&max_bytes=8388608&consistency={consistency}"
                ))
                .await?;
            let found = page["messages"].as_array().cloned().unwrap_or_default();
            if found.is_empty() {
                return Ok(messages);
            }
            for message in &found {
                let offset = message["offset"].as_u64().context("no offset")?;
                let value = message["value"].as_str().context("no value")?;
                messages.push((offset, value.to_owned()));
            }
            offset = page["next_offset"].as_u64().context("no next_offset")?;
        }
    }

    pub async fn topic(&self, name: &str) -> Result<Value> {
        self.get(&format!("/v1/topics/{name}")).await
    }

    /// Who leads a queue, once somebody does.
    pub async fn leader(&self, topic: &str, queue: u32) -> Result<u64> {
        eventually("the queue has a leader", || async {
            let topic = self.topic(topic).await?;
            let leader = &topic["queues"][queue as usize]["leader"];
            leader.as_u64().context("the queue has no leader")
        })
        .await
    }
}

async fn answered(request: RequestBuilder) -> Result<(StatusCode, Value)> {
    let answer = request.send().await?;
    let status = answer.status();
    let bytes = answer.bytes().await?;
    let value = if bytes.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&bytes)
            .with_context(|| format!("{status} with a body that is not JSON"))?
    };
    Ok((status, value))
}

fn is_connect(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<reqwest::Error>()
        .is_some_and(reqwest::Error::is_connect)
}
