//! A writer of numbered messages: each is repeated under an idempotency key until acknowledged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use reqwest::Method;
use serde_json::{Value, json};

use super::super::findings::Kind;
use super::{Actor, Scene, api};

/// The numbers that were acknowledged, and those whose fate stayed unknown.
#[derive(Debug, Default)]
pub struct Written {
    pub acked: BTreeSet<u64>,
    pub unknown: BTreeSet<u64>,
}

/// The value of message `number` of this run.
pub fn value(scene: &Scene, number: u64) -> String {
    format!("{}:{number}", scene.run)
}

/// The way back; none for anything else.
pub fn number(scene: &Scene, value: Option<&str>) -> Option<u64> {
    let rest = value?.strip_prefix(&scene.run)?.strip_prefix(':')?;
    rest.parse().ok()
}

/// Writes to `topic` until the end of writing, `per_s` messages a second. `fill` may add to each.
pub async fn write(
    mut actor: Actor,
    topic: String,
    per_s: u32,
    written: Arc<Mutex<Written>>,
    fill: impl Fn(u64, &mut Value) + Send + 'static,
) {
    let scene = actor.scene.clone();
    let path = ["v1", "topics", &topic, "messages"];
    let pace = Duration::from_secs(1) / per_s.max(1);
    let mut next = 0;
    while scene
        .pause_writing(pace.mul_f64(actor.rng.random_range(0.5..1.5)))
        .await
    {
        let mut message = json!({ "value": value(&scene, next) });
        fill(next, &mut message);
        let body = json!({ "messages": [message] });
        let key = format!("{topic}-{next}");
        let place = actor.place();
        let call = (Method::POST, &path[..]);
        let answer = api::until_done(&scene, place, call, Some(&body), Some(&key)).await;
        let mut written = written.lock();
        match answer {
            Ok(_) => drop(written.acked.insert(next)),
            Err(error) if error.retryable() || error.outcome_unknown() => {
                written.unknown.insert(next);
                let text = format!("{topic}: message {next} was never acknowledged: {error}");
                scene.found(Kind::NotHealed, text);
            }
            Err(error) => {
                let text = format!("{topic}: message {next} was refused: {error}");
                scene.found(Kind::RetryRefused, text);
            }
        }
        next += 1;
    }
}
