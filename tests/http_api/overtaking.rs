//! An idempotent producer with several requests under way: they may arrive in any order.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::Cluster;

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
            let api = &api;
            async move { api.post(PRODUCE, &body).await }
        });
        for (n, answer) in parts.iter().zip(join_all(sent).await) {
            assert_eq!(offset(&answer), first + 2 * n, "{parts:?}");
        }
    }
    // The worst order, each sent only when the one before it has surely arrived.
    let late = [4, 3, 2, 1, 0].map(|n| {
        let (body, api) = (part(&id, 200 + n, 1), &api);
        async move {
            tokio::time::sleep(Duration::from_millis(30 * (4 - n))).await;
            (n, api.post(PRODUCE, &body).await)
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
    let http = reqwest::Client::builder().no_proxy().build()?;
    let urls = cluster.urls();
    let post = |node: usize, path: &str, body: Value| {
        let request = http.post(format!("{}{path}", urls[node])).json(&body);
        async move {
            let answer = request.send().await?;
            let status = answer.status();
            let body: Value = answer.json().await?;
            ensure!(status.is_success(), "{status}: {body}");
            Ok(body)
        }
    };
    post(0, "/v1/topics", json!({"name": "t", "queues": 1})).await?;
    let made = post(1, "/v1/producers", json!({"name": "p"})).await?;
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
    Ok(())
}
