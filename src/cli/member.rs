//! `quorate consume --group … --follow`: a member of the group, whose queues are pushed to it.
//!
//! The stream sends the member's heartbeats. What was printed is committed, after it was printed.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Client, Repeat, Request, typed};
use super::error::{CliError, Problem};
use super::out::{Output, count};
use super::sse::{SseEvent, SseParser};

const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What the member is to be.
#[derive(Debug)]
pub struct Membership<'a> {
    pub group: &'a str,
    pub topic: &'a str,
    pub tag: Option<&'a str>,
    pub filter: Option<&'a str>,
    /// In the words of the API.
    pub start: Value,
}

#[derive(Debug, Deserialize)]
struct Joined {
    member_id: String,
    epoch: u64,
}

#[derive(Debug, Deserialize)]
struct Assigned {
    epoch: u64,
    assignment: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Place {
    queue: u32,
    offset: u64,
}

struct Member<'a> {
    client: &'a Client,
    out: Output,
    membership: Membership<'a>,
    /// Of this process: joining again after a lost connection is the same member.
    instance: String,
    id: String,
    epoch: u64,
    /// Printed and not committed yet: by queue, the next offset.
    printed: BTreeMap<u32, u64>,
}

/// Consumes until `print` says false, the process is interrupted, or something is wrong for good.
pub async fn run(
    client: &Client,
    out: Output,
    membership: Membership<'_>,
    print: impl FnMut(&Value) -> Result<bool, CliError>,
) -> Result<(), CliError> {
    let mut member = Member {
        client,
        out,
        membership,
        instance: format!("quorate-{}", uuid::Uuid::new_v4().simple()),
        id: String::new(),
        epoch: 0,
        printed: BTreeMap::new(),
    };
    member.join().await?;
    let ended = tokio::select! {
        ended = member.consume(print) => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    member.leave().await;
    ended
}

impl Member<'_> {
    async fn join(&mut self) -> Result<(), CliError> {
        let mut body = json!({
            "topics": [self.membership.topic],
            "start": self.membership.start,
            "instance_id": self.instance,
        });
        if let Some(tag) = self.membership.tag {
            body["tag"] = json!(tag);
        }
        if let Some(filter) = self.membership.filter {
            body["filter"] = json!(filter);
        }
        let path = ["v1", "groups", self.membership.group, "members"];
        // Joining again as the same instance is joining once.
        let request = Request::new(Method::POST, &path, Repeat::Always).json(&body)?;
        let joined: Joined = self.client.read(request).await?;
        (self.id, self.epoch) = (joined.member_id, joined.epoch);
        Ok(())
    }

    /// So that the others need not wait for the session's end.
    async fn leave(&self) {
        let path = ["v1", "groups", self.membership.group, "members", &self.id];
        let request = Request::new(Method::DELETE, &path, Repeat::Always);
        if self.client.call(request).await.is_err() {
            self.out.note("-- did not leave the group; it will notice");
        }
    }

    async fn consume(
        &mut self,
        mut print: impl FnMut(&Value) -> Result<bool, CliError>,
    ) -> Result<(), CliError> {
        loop {
            match self.stream(&mut print).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(CliError::Problem(problem)) if is_over(&problem) => {
                    self.out.note("-- the membership is over; joining again");
                    self.printed.clear();
                    self.rejoin().await?;
                }
                Err(error) if error.retryable() => self.client.move_on(),
                Err(error) => return Err(error),
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    async fn rejoin(&mut self) -> Result<(), CliError> {
        loop {
            match self.join().await {
                Err(error) if error.retryable() => {
                    self.client.move_on();
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                joined => return joined,
            }
        }
    }

    /// One connection. True: it ended, and another may go on; false: enough was printed.
    async fn stream(
        &mut self,
        print: &mut impl FnMut(&Value) -> Result<bool, CliError>,
    ) -> Result<bool, CliError> {
        let id = self.id.clone();
        let path = [
            "v1",
            "groups",
            self.membership.group,
            "members",
            &id,
            "messages",
        ];
        let request = Request::get(&path).query("epoch", self.epoch);
        let mut response = self.client.send(request.event_stream()).await?;
        let mut parser = SseParser::default();
        while let Ok(Some(bytes)) = response.chunk().await {
            for event in parser.push(&bytes) {
                if !self.take(&event, print)? {
                    self.commit().await?;
                    return Ok(false);
                }
            }
            self.commit().await?;
        }
        Ok(true)
    }

    fn take(
        &mut self,
        event: &SseEvent,
        print: &mut impl FnMut(&Value) -> Result<bool, CliError>,
    ) -> Result<bool, CliError> {
        let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
        match event.event.as_str() {
            "assignment" => {
                let assigned: Assigned = typed(&data)?;
                self.epoch = assigned.epoch;
                let queues = count(assigned.assignment.len(), "queue");
                self.out.note(&format!("-- this member has {queues}"));
                Ok(true)
            }
            "error" => Err(CliError::Problem(Box::new(typed(&data)?))),
            _ => {
                let place: Place = typed(&data)?;
                let more = print(&data)?;
                self.printed.insert(place.queue, place.offset + 1);
                Ok(more)
            }
        }
    }

    /// Commits what was printed. A queue that is another member's by now is that one's to commit.
    async fn commit(&mut self) -> Result<(), CliError> {
        if self.printed.is_empty() {
            return Ok(());
        }
        let topic = self.membership.topic;
        let offsets: Vec<Value> = self
            .printed
            .iter()
            .map(|(queue, offset)| json!({"topic": topic, "queue": queue, "offset": offset}))
            .collect();
        let body = json!({"offsets": offsets, "member": {"id": self.id, "epoch": self.epoch}});
        let path = ["v1", "groups", self.membership.group, "offsets"];
        let request = Request::new(Method::PUT, &path, Repeat::Always).json(&body)?;
        match self.client.call(request).await {
            Ok(_) => self.printed.clear(),
            Err(CliError::Problem(problem)) if !problem.retryable => {
                let text = problem.detail.as_deref().unwrap_or_default();
                self.out.note(&format!("-- not committed: {text}"));
                self.printed.clear();
            }
            Err(error) if error.retryable() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn is_over(problem: &Problem) -> bool {
    matches!(
        problem.code.as_str(),
        "fenced_member" | "member_not_found" | "consumer_group_not_found"
    )
}
