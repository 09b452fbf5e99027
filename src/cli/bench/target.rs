//! A worker's way to the cluster: one connection at a time, another node after a failure.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use super::super::error::Problem;
use super::connection::Connection;

/// What became of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Everything in it was acknowledged.
    Acknowledged,
    /// Some or all of it was not; codes of the API, or `connection` and `timeout`.
    Failed(String),
}

#[derive(Debug)]
pub struct Target<'a> {
    /// `host:port` of every node.
    addresses: &'a [String],
    current: usize,
    connection: Option<Connection>,
    limit: Duration,
}

impl<'a> Target<'a> {
    /// Begins at the node with this number, counted around.
    pub fn new(addresses: &'a [String], first: usize, limit: Duration) -> Self {
        Self {
            addresses,
            current: first,
            connection: None,
            limit,
        }
    }

    /// Sends one request. After a failure the next one goes to another node.
    pub async fn send(&mut self, request: &[u8]) -> Outcome {
        let outcome = match self.try_send(request).await {
            Ok(outcome) => outcome,
            Err(error) => {
                self.connection = None;
                let timed_out = error.kind() == io::ErrorKind::TimedOut;
                Outcome::Failed(if timed_out { "timeout" } else { "connection" }.into())
            }
        };
        if outcome != Outcome::Acknowledged {
            self.connection = None;
            self.current = self.current.wrapping_add(1);
        }
        outcome
    }

    async fn try_send(&mut self, request: &[u8]) -> io::Result<Outcome> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => {
                let address = &self.addresses[self.current % self.addresses.len()];
                self.connection
                    .insert(Connection::open(address, self.limit).await?)
            }
        };
        let reply = connection.exchange(request, self.limit).await?;
        let last = reply.last;
        let outcome = match reply.status {
            200 => Outcome::Acknowledged,
            status => Outcome::Failed(code(status, reply.body)),
        };
        if last {
            self.connection = None;
        }
        Ok(outcome)
    }
}

/// The problem's code; of a partly failed answer, that of the first failed entry.
fn code(status: u16, body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Entry {
        error: Option<Problem>,
    }
    #[derive(serde::Deserialize)]
    struct Partly {
        results: Vec<Entry>,
    }
    let named = if status == 207 {
        serde_json::from_slice::<Partly>(body)
            .ok()
            .and_then(|partly| partly.results.into_iter().find_map(|entry| entry.error))
            .map(|problem| problem.code)
    } else {
        serde_json::from_slice::<Problem>(body)
            .ok()
            .map(|problem| problem.code)
    };
    match named {
        Some(code) if !code.is_empty() => code,
        _ => format!("http_{status}"),
    }
}

/// How often each code came.
#[derive(Debug, Clone, Default, serde::Serialize)]
#[serde(transparent)]
pub struct Failures(BTreeMap<String, u64>);

impl Failures {
    pub fn count(&mut self, code: String) {
        *self.0.entry(code).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (code, count) in &other.0 {
            *self.0.entry(code.clone()).or_default() += count;
        }
    }

    /// `none`, or `no_leader 3, timeout 1`.
    pub fn describe(&self) -> String {
        if self.0.is_empty() {
            return "none".into();
        }
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|(code, n)| format!("{code} {n}"))
            .collect();
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_named_by_its_code() {
        assert_eq!(
            code(503, br#"{"code":"no_leader","status":503}"#),
            "no_leader"
        );
        assert_eq!(code(502, b"<html>"), "http_502");
        let partly = br#"{"results":[{"queue":1,"offset":2,"message_id":"m"},{"error":{"code":"timeout"}}]}"#;
        assert_eq!(code(207, partly), "timeout");
    }
}
