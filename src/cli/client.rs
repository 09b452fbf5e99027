//! A small typed client of the HTTP API: any node will do, and the next is tried when one is gone.
//!
//! Invariant: a request whose repetition could store something twice is never sent again once a
//! byte of it may have left. Such a failure surfaces as [`CliError::NoAnswer`], and only callers
//! that carry a producer's sequence repeat it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::{Method, Response, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::{CliError, Problem};
use super::wire;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longer than the server's own bound, so that its answer, which knows more, comes first.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// Reading, or a write that says the same twice: after any lost connection, ask the next node.
    Always,
    /// Only if no connection came about, so that nobody can have taken it.
    IfUnsent,
}

#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    nodes: Vec<Url>,
    /// The node that answered last; the next request starts there.
    current: AtomicUsize,
}

/// One request, before it is known which node will answer it.
#[derive(Debug)]
pub struct Request<'a> {
    method: Method,
    path: &'a [&'a str],
    query: Vec<(&'static str, String)>,
    body: Option<Vec<u8>>,
    headers: Vec<(&'static str, String)>,
    timeout: Option<Duration>,
    repeat: Repeat,
}

impl<'a> Request<'a> {
    pub fn get(path: &'a [&'a str]) -> Self {
        Self::new(Method::GET, path, Repeat::Always)
    }

    pub fn new(method: Method, path: &'a [&'a str], repeat: Repeat) -> Self {
        Self {
            method,
            path,
            query: Vec::new(),
            body: None,
            headers: Vec::new(),
            timeout: Some(REQUEST_TIMEOUT),
            repeat,
        }
    }

    pub fn query(mut self, name: &'static str, value: impl ToString) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    pub fn json(mut self, body: &impl Serialize) -> Result<Self, CliError> {
        let bytes = serde_json::to_vec(body)
            .map_err(|error| CliError::Usage(format!("this cannot be written as JSON: {error}")))?;
        self.body = Some(bytes);
        Ok(self)
    }

    pub fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// An answer without an end: no time limit on the whole.
    pub fn event_stream(mut self) -> Self {
        self.timeout = None;
        self.header("accept", "text/event-stream")
    }
}

impl Client {
    pub fn new(urls: &[String]) -> Result<Self, CliError> {
        let nodes = urls
            .iter()
            .map(|url| parse_node(url))
            .collect::<Result<Vec<_>, _>>()?;
        if nodes.is_empty() {
            return Err(CliError::Usage("give at least one --url".into()));
        }
        // Straight to the nodes: a proxy made for the outside would only be in the way.
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .build()
            .map_err(|error| CliError::Usage(format!("the HTTP client does not start: {error}")))?;
        Ok(Self {
            http,
            nodes,
            current: AtomicUsize::new(0),
        })
    }

    /// The same client, asking only this node.
    pub fn only(&self, url: &str) -> Result<Self, CliError> {
        Ok(Self {
            http: self.http.clone(),
            nodes: vec![parse_node(url)?],
            current: AtomicUsize::new(0),
        })
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes
            .iter()
            .map(|url| url.as_str().trim_end_matches('/').to_owned())
            .collect()
    }

    /// Lets the next request begin at another node, after one that gave no useful answer.
    pub fn move_on(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    /// Sends to one node after the other until one answers; an error status is an error.
    pub async fn send(&self, request: Request<'_>) -> Result<Response, CliError> {
        let mut attempts = Vec::new();
        for _ in 0..self.nodes.len() {
            let node = &self.nodes[self.current.load(Ordering::Relaxed) % self.nodes.len()];
            let url = address(node, request.path, &request.query)?;
            let mut builder = self.http.request(request.method.clone(), url);
            if let Some(body) = &request.body {
                builder = builder
                    .header("content-type", "application/json")
                    .body(body.clone());
            }
            for (name, value) in &request.headers {
                builder = builder.header(*name, value);
            }
            if let Some(timeout) = request.timeout {
                builder = builder.timeout(timeout);
            }
            match builder.send().await {
                Ok(response) => return check_status(node, response).await,
                Err(error) => {
                    self.move_on();
                    let reason = innermost(&error);
                    let unsent = error.is_connect();
                    if !unsent && request.repeat == Repeat::IfUnsent {
                        let url = node.to_string();
                        return Err(CliError::NoAnswer { url, reason });
                    }
                    attempts.push(format!("{node} ({reason})"));
                }
            }
        }
        let attempts = attempts.join(", ");
        Err(CliError::Unreachable { attempts })
    }

    /// Sends and reads the answer as JSON; `null` for an answer without a body.
    pub async fn call(&self, request: Request<'_>) -> Result<Value, CliError> {
        self.read(request).await
    }

    pub async fn read<T: DeserializeOwned>(&self, request: Request<'_>) -> Result<T, CliError> {
        let write = request.repeat == Repeat::IfUnsent;
        let response = self.send(request).await?;
        let url = response.url().to_string();
        let bytes = match response.bytes().await {
            Ok(bytes) => bytes,
            Err(error) if write => {
                let reason = innermost(&error);
                return Err(CliError::NoAnswer { url, reason });
            }
            Err(error) => {
                let attempts = format!("{url} ({})", innermost(&error));
                return Err(CliError::Unreachable { attempts });
            }
        };
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| {
            let reason = error.to_string();
            match write {
                true => CliError::NoAnswer { url, reason },
                false => CliError::Protocol { url, reason },
            }
        })
    }

    pub async fn topic(&self, name: &str) -> Result<wire::Topic, CliError> {
        self.read(Request::get(&["v1", "topics", name])).await
    }

    pub async fn cluster(&self) -> Result<wire::Cluster, CliError> {
        self.read(Request::get(&["v1", "cluster"])).await
    }
}

/// Reads a JSON value that was already received as one of the [`wire`] types.
pub fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, CliError> {
    T::deserialize(value).map_err(|error| CliError::Protocol {
        url: "the node".into(),
        reason: error.to_string(),
    })
}

async fn check_status(node: &Url, response: Response) -> Result<Response, CliError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.bytes().await.unwrap_or_default();
    let mut problem = serde_json::from_slice::<Problem>(&body).unwrap_or_default();
    problem.status = status.as_u16();
    if problem.title.is_empty() {
        let reason = status.canonical_reason().unwrap_or("error");
        problem.title = format!("{node} answered {reason} without an explanation");
    }
    Err(CliError::Problem(Box::new(problem)))
}

fn parse_node(text: &str) -> Result<Url, CliError> {
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    match Url::parse(&full) {
        Ok(url) if url.scheme() == "http" && url.has_host() => Ok(url),
        _ => Err(CliError::Usage(format!(
            "{text:?} is not a node's URL; it looks like http://127.0.0.1:8081"
        ))),
    }
}

/// Each path part becomes exactly one segment, whatever characters a name has.
fn address(node: &Url, path: &[&str], query: &[(&'static str, String)]) -> Result<Url, CliError> {
    let mut url = node.clone();
    if let Some(part) = path.iter().find(|part| matches!(**part, "" | "." | "..")) {
        return Err(CliError::Usage(format!("{part:?} is not a name")));
    }
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.clear().extend(path);
    }
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query);
    }
    Ok(url)
}

/// The innermost cause: "connection refused" says more than "error sending request".
fn innermost(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".into();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_path_segment() {
        let node = parse_node("127.0.0.1:8081").unwrap();
        let url = address(
            &node,
            &["v1", "topics", "a/../b c"],
            &[("tag", "x||y".into())],
        )
        .unwrap();
        assert_eq!(
            url.as_str(),
            "http://127.0.0.1:8081/v1/topics/a%2F..%2Fb%20c?tag=x%7C%7Cy"
        );
    }

    #[test]
    fn dots_are_no_names() {
        let node = parse_node("http://h:1").unwrap();
        assert!(address(&node, &["v1", "topics", ".."], &[]).is_err());
    }

    #[test]
    fn only_http_urls_are_nodes() {
        assert!(parse_node("https://h").is_err());
        assert!(parse_node("http://").is_err());
        assert!(parse_node("h:8081").is_ok());
    }

    use super::super::testing::{Act, ScriptedNode, nobody};

    const PATH: &[&str] = &["v1", "topics"];

    #[tokio::test]
    async fn the_next_node_is_asked_when_nobody_listens() {
        let node = ScriptedNode::start(vec![Act::Answer(200, "{}"), Act::Answer(200, "{}")]).await;
        let client = Client::new(&[nobody().await, node.url.clone()]).unwrap();
        client
            .call(Request::new(Method::POST, PATH, Repeat::IfUnsent))
            .await
            .unwrap();
        client.call(Request::get(PATH)).await.unwrap();
        assert_eq!(node.requests().len(), 2);
    }

    #[tokio::test]
    async fn a_write_whose_answer_is_missing_is_not_sent_again() {
        let first = ScriptedNode::start(vec![Act::Hang]).await;
        let second = ScriptedNode::start(vec![Act::Answer(200, "{}")]).await;
        let client = Client::new(&[first.url.clone(), second.url.clone()]).unwrap();
        let write = Request::new(Method::POST, PATH, Repeat::IfUnsent);
        let error = client.call(write).await.unwrap_err();
        assert!(error.outcome_unknown(), "{error}");
        assert_eq!((first.requests().len(), second.requests().len()), (1, 0));
    }

    #[tokio::test]
    async fn a_read_whose_answer_is_missing_is_asked_elsewhere() {
        let first = ScriptedNode::start(vec![Act::Hang]).await;
        let second = ScriptedNode::start(vec![Act::Answer(200, r#"{"a":1}"#)]).await;
        let client = Client::new(&[first.url.clone(), second.url.clone()]).unwrap();
        let value = client.call(Request::get(PATH)).await.unwrap();
        assert_eq!(value["a"], 1);
    }

    #[tokio::test]
    async fn an_error_answer_is_final_and_keeps_the_servers_words() {
        let body = r#"{"title":"topic not found","status":404,"code":"topic_not_found","detail":"create it"}"#;
        let first = ScriptedNode::start(vec![Act::Answer(404, body)]).await;
        let second = ScriptedNode::start(vec![Act::Answer(200, "{}")]).await;
        let client = Client::new(&[first.url.clone(), second.url.clone()]).unwrap();
        let error = client.call(Request::get(PATH)).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "topic not found: create it [404 topic_not_found]"
        );
        assert_eq!(second.requests().len(), 0);
    }
}
