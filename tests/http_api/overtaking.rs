//! An idempotent producer with several requests under way: they may arrive in any order.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::{Cluster, eventually};

const PRODUCE: &str = "/v1/topics/t/messages";

async fn producer(api: &Api) -> String {
    let made = api.post("/v1/producers", &json!({})).await.expect(200);
    made["id"].as_str().expect("id").to_owned()
}

fn part(id: &str, sequence: u64, count: u64) -> Value {
    let messages =
        (sequence..sequence + count).map(|n| json!({"value": n.to_string(), "queue": 0}));
    json!({"messages": messages.collect::<Vec<_>>(),
        "producer": {"id": id, "epoch": 0, "sequence": sequence}})
}

/// So many of a hundred requests may have to be sent again: a machine that stalls longer than the
/// leader waits is no failure. If it did not wait, more than half would be refused.
const MAY_BE_LATE: u32 = 25;

/// Sends one part until it is not too early any more, as a producer does.
async fn send(api: &Api, body: &Value, again: &AtomicU32) -> Answer {
    loop {
        let answer = api.post(PRODUCE, body).await;
        if answer.status != 409 {
            return answer;
        }
        answer.problem(409, "out_of_order_sequence");
        again.fetch_add(1, Ordering::Relaxed);
    }
}

fn offset(answer: &Answer) -> u64 {
    answer.expect(200)["results"][0]["offset"]
        .as_u64()
        .expect("offset")
}

#[tokio::test]
async fn five_requests_under_way_are_stored_in_order_whichever_comes_first() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let id = producer(&api).await;
    let again = AtomicU32::new(0);
    for round in 0..20 {
        let first = round * 10;
        // Each round in another order, and not all of them one apart.
        let order = [(4 + round) % 5, (2 * round + 1) % 5, (3 * round + 3) % 5];
        let mut parts: Vec<u64> = (0..5).collect();
        for (at, swap) in order.into_iter().enumerate() {
            parts.swap(at, swap as usize);
        }
        let sent = parts.iter().map(|n| {
            let body = part(&id, first + 2 * n, 2);
            let (api, again) = (&api, &again);
            async move { send(api, &body, again).await }
        });
        for (n, answer) in parts.iter().zip(join_all(sent).await) {
            assert_eq!(offset(&answer), first + 2 * n, "{parts:?}");
        }
    }
    let late = again.load(Ordering::Relaxed);
    assert!(late < MAY_BE_LATE, "{late} of 100 were refused at first");
    // The worst order, each sent only when the one before it has surely arrived.
    let late = [4, 3, 2, 1, 0].map(|n| {
        let (body, api, again) = (part(&id, 200 + n, 1), &api, &again);
        async move {
            tokio::time::sleep(Duration::from_millis(30 * (4 - n))).await;
            (n, send(api, &body, again).await)
        }
    });
    for (n, answer) in join_all(late).await {
        assert_eq!(offset(&answer), 200 + n);
    }
    // Again, as a retry of each: the first answers.
    for n in 0..5 {
        assert_eq!(
            offset(&api.post(PRODUCE, &part(&id, 200 + n, 1)).await),
            200 + n
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_request_follows_one_of_several_batches() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    // A slow machine may wait for too long with the first, so there are several attempts.
    for _ in 0..10 {
        let id = producer(&api).await;
        let mut first = part(&id, 0, 3);
        first["messages"][1]["delay_ms"] = 1.into();
        let (api, next) = (&api, part(&id, 3, 1));
        let late = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            api.post(PRODUCE, &first).await
        };
        let (next, first) = tokio::join!(api.post(PRODUCE, &next), late);
        first.expect(200);
        if next.status == 200 {
            return Ok(());
        }
        next.problem(409, "out_of_order_sequence");
    }
    anyhow::bail!("whoever comes too early stays so");
}

#[tokio::test]
async fn a_gap_that_nobody_fills_is_told_soon() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let id = producer(&api).await;
    assert_eq!(offset(&api.post(PRODUCE, &part(&id, 0, 1)).await), 0);
    let begun = Instant::now();
    let gaps = (2..10).map(|n| {
        let (body, api) = (part(&id, n, 1), &api);
        async move { api.post(PRODUCE, &body).await }
    });
    for answer in join_all(gaps).await {
        let problem = answer.problem(409, "out_of_order_sequence");
        assert_eq!(problem["outcome"], "not_committed");
    }
    ensure!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(offset(&api.post(PRODUCE, &part(&id, 1, 1)).await), 1);
    let late = api.post(PRODUCE, &part("1", 1 << 31, 1)).await;
    late.problem(400, "invalid_request");
    Ok(())
}

#[tokio::test]
async fn requests_through_different_nodes_are_put_in_order_by_the_leader() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    cluster.client().create_topic("t", 1).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let urls = cluster.urls();
    let again = AtomicU32::new(0);
    let post = |node: usize, path: &'static str, body: Value| {
        let (http, again) = (&http, &again);
        let url = format!("{}{path}", urls[node]);
        async move {
            // What is refused or unknown is sent again, as a producer does: it is stored once.
            eventually(path, || async {
                let answer = http.post(&url).json(&body).send().await?;
                let status = answer.status();
                again.fetch_add(u32::from(status == 409), Ordering::Relaxed);
                let body: Value = answer.json().await?;
                ensure!(status.is_success(), "{status}: {body}");
                Ok(body)
            })
            .await
        }
    };
    let made = post(1, "/v1/producers", json!({})).await?;
    let id = made["id"].as_str().expect("id");
    for round in 0..20_u64 {
        let sent = (0..5).map(|n| {
            let n = (n * 3 + round) % 5;
            let sequence = round * 5 + n;
            let sent = post((n % 3) as usize, PRODUCE, part(id, sequence, 1));
            async move { Ok::<_, anyhow::Error>((sequence, sent.await?)) }
        });
        for answer in join_all(sent).await {
            let (sequence, answer) = answer?;
            assert_eq!(answer["results"][0]["offset"], sequence);
        }
    }
    let late = again.into_inner();
    ensure!(late < MAY_BE_LATE, "{late} of 100 were refused at first");
    Ok(())
}
