//! Quotas of topics and of client addresses.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::{Cluster, eventually};

const PRODUCE: &str = "/v1/topics/t/messages";

/// Checks a refusal and gives the time after which to try again.
fn refused(answer: &Answer) -> Duration {
    let problem = answer.problem(429, "quota_exceeded");
    assert_eq!(problem["outcome"], "not_committed");
    let ms = problem["retry_after_ms"].as_u64().expect("retry_after_ms");
    let seconds: u64 = answer.header("retry-after").parse().expect("seconds");
    assert_eq!(seconds, ms.div_ceil(1000).max(1));
    Duration::from_millis(ms)
}

/// Sends until it is refused: on a slow machine there is room again between two requests.
async fn refusal(api: &Api, body: &Value) -> Result<Duration> {
    eventually("a refusal", || async {
        let answer = api.post(PRODUCE, body).await;
        ensure!(answer.status == 429, "{}", answer.status);
        Ok(refused(&answer))
    })
    .await
}

#[tokio::test]
async fn a_topic_takes_its_rate_and_tells_the_truth_about_when() -> Result<()> {
    let api = Api::start().await?;
    let topic = json!({"name": "t", "queues": 3, "quota": {"messages_per_s": 10}});
    let made = api.post("/v1/topics", &topic).await.expect(201);
    assert_eq!(
        made["config"]["quota"],
        json!({"messages_per_s": 10, "bytes_per_s": null})
    );
    let batch = |n: usize| json!({"messages": vec![json!({"value": "v", "queue": 0}); n]});
    api.post(PRODUCE, &batch(10)).await.expect(200);
    let wait = refusal(&api, &batch(10)).await?;
    let asked = Instant::now();
    ensure!(wait <= Duration::from_secs(1), "{wait:?}");
    tokio::time::sleep_until((asked + wait).into()).await;
    api.post(PRODUCE, &batch(10)).await.expect(200);
    // More than a second's worth goes when there is a second's worth, and is paid for later.
    eventually("a large request", || async {
        ensure!(api.post(PRODUCE, &batch(300)).await.status == 200);
        Ok(())
    })
    .await?;
    let debt = refusal(&api, &batch(1)).await?;
    ensure!(debt > Duration::from_secs(10), "{debt:?}");

    let patch = json!({"quota": {"messages_per_s": null, "bytes_per_s": 10_000}});
    let patched = api
        .call(Method::PATCH, "/v1/topics/t", &patch)
        .await
        .expect(200);
    assert_eq!(
        patched["config"]["quota"],
        json!({"messages_per_s": null, "bytes_per_s": 10_000})
    );
    for _ in 0..5 {
        api.post(PRODUCE, &batch(30)).await.expect(200);
    }
    let large = json!({"messages": [{"value": "x".repeat(9_000), "queue": 0}]});
    refusal(&api, &large).await?;
    Ok(())
}

#[tokio::test]
async fn a_line_is_not_told_what_is_wrong_with_another() -> Result<()> {
    let api = Api::start().await?;
    let topic = json!({"name": "t", "queues": 1, "max_message_bytes": 10,
        "quota": {"messages_per_s": 1}});
    api.post("/v1/topics", &topic).await.expect(201);
    let line = |value: &str| format!("{}\n", json!({"value": value}));
    let lines = [line("a"), line("b"), line(&"too long".repeat(2)), line("c")].concat();
    let answer = api.post_as(PRODUCE, "application/x-ndjson", lines).await;
    answer.expect(200);
    let text = answer.text();
    let answers: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    // On a slow machine another one is due before the last is tried.
    let last = &answers[3];
    assert!(
        last["offset"].is_u64() || last["error"]["code"] == "quota_exceeded",
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn a_client_address_has_a_quota_where_the_server_says_so() -> Result<()> {
    let limits = "[limits]\nclient_messages_per_s = 5\nclient_bytes_per_s = 100000\n";
    let api = Api::start_with(limits).await?;
    api.topic("t", 1).await;
    let begun = Instant::now();
    let mut taken = 0.0;
    // On a slow machine some are due again before the last is sent.
    loop {
        let answer = api.post_as(PRODUCE, "application/octet-stream", "v").await;
        if answer.status != 200 {
            refused(&answer);
            break;
        }
        taken += 1.0;
    }
    let most = 5.0 * (begun.elapsed().as_secs_f64() + 1.0);
    ensure!((5.0..=most).contains(&taken), "{taken} of {most}");
    let (lines, one_way) = ("{}\n{}\n{}\n", format!("{PRODUCE}?ack=none"));
    let three = json!({"messages": [{}, {}, {}]});
    eventually("lines are refused", || async {
        let answer = api.post_as(PRODUCE, "application/x-ndjson", lines).await;
        ensure!(answer.status == 429, "{}", answer.status);
        Ok(refused(&answer))
    })
    .await?;
    eventually("one-way messages are refused", || async {
        let answer = api.post(&one_way, &three).await;
        ensure!(answer.status == 429, "{}", answer.status);
        Ok(refused(&answer))
    })
    .await?;
    let transaction = json!({"messages": [{"topic": "t"}]});
    let opened = api.post("/v1/transactions", &json!({})).await.expect(201);
    let id = opened["transaction_id"].as_str().expect("an id");
    let more = format!("/v1/transactions/{id}/messages");
    for path in ["/v1/transactions", &more] {
        eventually("messages of transactions are refused", || async {
            let answer = api.post(path, &transaction).await;
            ensure!(answer.status == 429, "{}", answer.status);
            Ok(refused(&answer))
        })
        .await?;
    }
    // Reading is free.
    for _ in 0..20 {
        api.get("/v1/topics/t/queues/0/messages").await.expect(200);
    }
    Ok(())
}

#[tokio::test]
async fn the_nodes_of_a_cluster_together_never_give_more_than_the_quota() -> Result<()> {
    const RATE: u64 = 60;
    let cluster = Cluster::start(3).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let urls = cluster.urls();
    let topic = json!({"name": "t", "queues": 3, "quota": {"messages_per_s": RATE}});
    cluster.client().create_topic_with(topic).await?;
    let begun = Instant::now();
    let until = begun + Duration::from_secs(3);
    let producers = (0..3).map(|n| {
        let (http, url) = (&http, format!("{}{PRODUCE}", urls[n]));
        async move {
            let mut taken = 0;
            while Instant::now() < until {
                let body = json!({"messages": [{"value": "v"}]});
                let answer = http.post(&url).json(&body).send().await?;
                match answer.status().as_u16() {
                    200 => taken += 1,
                    // A node that was held up costs an answer now and then.
                    503 | 504 => {}
                    429 => tokio::time::sleep(Duration::from_millis(5)).await,
                    other => anyhow::bail!("{other}: {}", answer.text().await?),
                }
            }
            Ok(taken)
        }
    });
    let taken: Vec<u64> = join_all(producers)
        .await
        .into_iter()
        .collect::<Result<_>>()?;
    let (taken, passed) = (taken.iter().sum::<u64>(), begun.elapsed().as_secs_f64());
    // A second's worth may be there at the beginning; leaders may settle while it runs.
    let most = RATE as f64 * (passed + 1.0) + 3.0;
    ensure!((taken as f64) <= most, "{taken} in {passed} s");
    // How much of it a slow machine gets through is its own affair.
    ensure!(taken > 0, "nothing in {passed} s");
    Ok(())
}
