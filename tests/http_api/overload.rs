//! Ten times more than the node takes: everyone is answered soon, with a time to come back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use serde_json::json;

use crate::api::{Answer, Api};

/// Bodies of 100 KiB each; the node takes 2 MiB at a time.
const CLIENTS: usize = 200;
/// Messages that each client gets stored before it goes: nobody is left out.
const EACH: u32 = 2;
const LIMITS: &str = "[http]\nmax_request_bytes = 1048576\nmax_inflight_bytes = 2097152\n\n[limits]\nmax_message_bytes = 524288\n";

#[tokio::test]
async fn who_cannot_be_served_is_told_so_at_once() -> Result<()> {
    let api = Api::start_with(LIMITS).await?;
    api.post(
        "/v1/topics",
        &json!({"name": "t", "queues": 2, "max_message_bytes": 524_288}),
    )
    .await
    .expect(201);
    let value = "x".repeat(100 << 10);
    let clients = (0..CLIENTS).map(|_| async {
        let (mut stored, mut refused, mut slowest) = (0, 0, Duration::ZERO);
        while stored < EACH {
            let asked = Instant::now();
            let media = "application/octet-stream";
            let answer = api
                .post_as("/v1/topics/t/messages", media, value.clone())
                .await;
            slowest = slowest.max(asked.elapsed());
            match answer.status.as_u16() {
                200 => stored += 1,
                _ => {
                    told_to_come_back(&answer);
                    refused += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        (stored, refused, slowest)
    });
    let all = join_all(clients).await;
    let stored: u32 = all.iter().map(|(stored, ..)| stored).sum();
    let refused: u32 = all.iter().map(|(_, refused, _)| refused).sum();
    let slowest = all.iter().map(|(.., slowest)| *slowest).max();
    println!("{stored} stored, {refused} refused, slowest {slowest:?}");
    ensure!(refused > 100, "it was not overloaded: {refused} refused");
    // What nobody confirms is given up after 5 s, and would have been answered otherwise. How slow
    // the slowest was is for people to read: the machine may do other things, too.
    // Afterwards all is as before.
    api.store("t", 0, &["after"]).await;
    Ok(())
}

fn told_to_come_back(answer: &Answer) {
    let problem = answer.problem(503, "overloaded");
    assert_eq!(problem["retryable"], true);
    assert_eq!(problem["outcome"], "not_committed");
    assert_eq!(answer.header("retry-after"), "1");
}
