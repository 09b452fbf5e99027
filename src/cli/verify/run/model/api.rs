//! Calls that all workloads make, over whichever node is asked.

use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::super::findings::Kind;
use super::super::load::HEAL;
use super::Scene;
use crate::cli::client::{Repeat, Request};
use crate::cli::error::CliError;
use crate::cli::wire::{FetchAnswer, Message, Topic};

/// One try: a silent node must not eat the whole time.
pub const TRY: Duration = Duration::from_millis(2500);
pub const RETRY_AFTER: Duration = Duration::from_millis(40);
const PAGE: u32 = 1000;

/// One request with a JSON body to the node at `place`.
pub async fn send(
    scene: &Scene,
    place: usize,
    (method, path): (Method, &[&str]),
    body: Option<&Value>,
    idempotency_key: Option<&str>,
) -> Result<Value, CliError> {
    let repeat = match method {
        Method::GET => Repeat::Always,
        _ => Repeat::IfUnsent,
    };
    let mut request = Request::new(method, path, repeat).timeout(TRY);
    if let Some(body) = body {
        request = request.json(body)?;
    }
    if let Some(key) = idempotency_key {
        request = request.header("idempotency-key", key);
    }
    let nodes = &scene.stage.nodes;
    nodes[place % nodes.len()].client.call(request).await
}

/// The code of a problem; none for anything else.
pub fn code(error: &CliError) -> Option<&str> {
    match error {
        CliError::Problem(problem) => Some(&problem.code),
        _ => None,
    }
}

/// Repeats a request that is safe to repeat until it is answered, or long after the end of writing.
pub async fn until_done(
    scene: &Scene,
    mut place: usize,
    call: (Method, &[&str]),
    body: Option<&Value>,
    idempotency_key: Option<&str>,
) -> Result<Value, CliError> {
    let mut give_up = None;
    loop {
        let request = (call.0.clone(), call.1);
        match send(scene, place, request, body, idempotency_key).await {
            Err(error) if error.retryable() || error.outcome_unknown() => {
                if scene.writing.is_cancelled() {
                    let end = *give_up.get_or_insert_with(|| Instant::now() + HEAL);
                    if Instant::now() > end {
                        return Err(error);
                    }
                }
            }
            answer => return answer,
        }
        sleep(RETRY_AFTER).await;
        place += 1;
    }
}

pub async fn create_topic(
    scene: &Scene,
    name: &str,
    queues: u32,
    replicas: u64,
) -> Result<(), CliError> {
    let body = json!({ "name": name, "queues": queues, "replicas": replicas });
    let made = until_done(
        scene,
        0,
        (Method::POST, &["v1", "topics"]),
        Some(&body),
        None,
    );
    made.await.map(drop)
}

/// All messages of a topic, queue by queue. What can't be read in time is a finding.
pub async fn read_topic(scene: &Scene, name: &str) -> Vec<Message> {
    let mut messages = Vec::new();
    for queue in 0..queues_of(scene, name).await {
        let mut next = 0;
        let mut deadline = Instant::now() + HEAL;
        let mut place = 0;
        loop {
            match page(scene, place, name, queue, next).await {
                Ok(answer) => {
                    deadline = Instant::now() + HEAL;
                    next = answer.next_offset;
                    messages.extend(answer.messages);
                    if next >= answer.end_offset {
                        break;
                    }
                }
                Err(error) if Instant::now() > deadline => {
                    let text = format!("{name}/{queue} could not be read: {error}");
                    scene.found(Kind::NotHealed, text);
                    break;
                }
                Err(_) => {
                    place += 1;
                    sleep(RETRY_AFTER).await;
                }
            }
        }
    }
    messages
}

/// Messages from an offset on, with the end of the queue.
pub async fn page(
    scene: &Scene,
    place: usize,
    topic: &str,
    queue: u32,
    offset: u64,
) -> Result<FetchAnswer, CliError> {
    let number = queue.to_string();
    let path = ["v1", "topics", topic, "queues", &number, "messages"];
    let request = Request::get(&path)
        .timeout(TRY)
        .query("offset", offset)
        .query("max_messages", PAGE);
    let nodes = &scene.stage.nodes;
    nodes[place % nodes.len()].client.read(request).await
}

async fn queues_of(scene: &Scene, name: &str) -> u32 {
    let path = ["v1", "topics", name];
    let found = until_done(scene, 0, (Method::GET, &path), None, None).await;
    match found.map(|value| Topic::deserialize(&value)) {
        Ok(Ok(topic)) => topic.queues.len() as u32,
        // Made with the first message: without any, there is nothing in it.
        Err(error) if code(&error) == Some("topic_not_found") => 0,
        other => {
            scene.found(
                Kind::NotHealed,
                format!("{name} is not described: {other:?}"),
            );
            0
        }
    }
}
