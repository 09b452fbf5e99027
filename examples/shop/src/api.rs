//! The few requests the shop makes. Any node answers any of them; the next is asked when one does
//! not.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;
use ureq::Agent;

/// Longer than any of the server's own limits for what is asked here, long polls included.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug)]
pub struct Api {
    agent: Agent,
    urls: Vec<String>,
    current: usize,
}

/// An answer below 500: the server knows what became of the request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    pub fn is_done(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

impl Api {
    pub fn new(urls: &[String]) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .timeout_connect(Some(Duration::from_secs(1)))
            .http_status_as_error(false);
        Self {
            agent: config.build().into(),
            urls: urls.to_vec(),
            current: fastrand::usize(..urls.len()),
        }
    }

    pub fn get(&mut self, path: &str) -> Result<Answer> {
        let url = self.url(path);
        let answer = self.agent.get(&url).call();
        self.read(answer)
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let url = self.url(path);
        let answer = self.agent.post(&url).send_json(body);
        self.read(answer)
    }

    pub fn put(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let url = self.url(path);
        let answer = self.agent.put(&url).send_json(body);
        self.read(answer)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.urls[self.current])
    }

    /// An error: nobody knows what became of the request. The next one goes to another node.
    fn read(
        &mut self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Answer> {
        let answer = (|| {
            let mut answer = answer?;
            let status = answer.status().as_u16();
            let body: Value = match answer.body_mut().read_to_string()?.as_str() {
                "" => Value::Null,
                text => serde_json::from_str(text)?,
            };
            if status >= 500 {
                bail!("{status} {body}");
            }
            Ok(Answer { status, body })
        })();
        if answer.is_err() {
            self.current = (self.current + 1) % self.urls.len();
        }
        answer
    }
}
