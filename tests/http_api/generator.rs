//! Topics that make messages of themselves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::support::{Cluster, eventually};

const GENERATOR: &str = "/v1/topics/t/generator";

async fn end(api: &Api) -> u64 {
    let topic = api.get("/v1/topics/t").await.expect(200);
    topic["queues"][0]["end_offset"].as_u64().unwrap()
}

/// Waits until queue 0 has this many messages.
async fn grown(api: &Api, wanted: u64) {
    let what = format!("{wanted} messages");
    eventually(&what, || async {
        let end = end(api).await;
        ensure!(end >= wanted, "{end}");
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn messages_come_at_the_rate_until_it_is_stopped() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 2).await;
    api.get(GENERATOR).await.problem(404, "generator_not_found");
    let begun = Instant::now();
    let body = json!({"rate_per_s": 100, "value": "tick"});
    let set = api.call(Method::PUT, GENERATOR, &body).await.expect(200);
    assert_eq!(set, json!({"rate_per_s": 100.0, "value": "tick"}));
    assert_eq!(api.get(GENERATOR).await.expect(200), set);
    grown(&api, 200).await;
    let took = begun.elapsed().as_secs_f64();
    ensure!(took > 1.8, "200 messages in {took} s");
    let found = api
        .get("/v1/topics/t/queues/0/messages?max_messages=1")
        .await
        .expect(200);
    assert_eq!(found["messages"][0]["value"], "tick");

    let slow = json!({"rate_per_s": 0.001});
    api.call(Method::PUT, GENERATOR, &slow).await.expect(200);
    assert_eq!(api.get(GENERATOR).await.expect(200)["rate_per_s"], 0.001);
    // What was on its way may still come; the slow one has nothing due for a quarter of an hour.
    eventually("the fast one has stopped", || async {
        let before = end(&api).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(end(&api).await == before, "it goes on");
        Ok(())
    })
    .await?;
    for _ in 0..2 {
        api.send(api.request(Method::DELETE, GENERATOR))
            .await
            .expect(204);
    }
    api.get(GENERATOR).await.problem(404, "generator_not_found");
    for rate in ["0", "0.0001", "10000.1", "-1", "1e300"] {
        let body = format!("{{\"rate_per_s\":{rate}}}");
        let request = api.request(Method::PUT, GENERATOR);
        let request = request
            .header("content-type", "application/json")
            .body(body);
        api.send(request).await.problem(400, "invalid_request");
    }
    let large = json!({"rate_per_s": 1, "value": "x".repeat((64 << 10) + 1)});
    api.call(Method::PUT, GENERATOR, &large)
        .await
        .problem(400, "invalid_request");
    let elsewhere = "/v1/topics/none/generator";
    api.call(Method::PUT, elsewhere, &slow)
        .await
        .problem(404, "topic_not_found");
    api.get(elsewhere).await.problem(404, "topic_not_found");
    Ok(())
}

#[tokio::test]
async fn with_a_bounded_backlog_it_is_a_token_bucket() -> Result<()> {
    let api = Api::start().await?;
    let topic = json!({"name": "t", "queues": 1, "backlog": {"max_messages": 5}});
    api.post("/v1/topics", &topic).await.expect(201);
    let body = json!({"rate_per_s": 200, "value": "token"});
    api.call(Method::PUT, GENERATOR, &body).await.expect(200);
    for taken in [0, 3, 8] {
        if taken > 0 {
            let offset = json!({"offsets": [{"topic": "t", "queue": 0, "offset": taken}]});
            api.call(Method::PUT, "/v1/groups/g/offsets", &offset)
                .await
                .expect(200);
        }
        grown(&api, taken + 5).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(end(&api).await, taken + 5, "the bucket is full");
    }
    // Bytes bound it as well.
    let bytes = json!({"backlog": {"max_messages": null, "max_bytes": 2000}});
    api.call(Method::PATCH, "/v1/topics/t", &bytes)
        .await
        .expect(200);
    grown(&api, 15).await;
    Ok(())
}

#[tokio::test]
async fn it_goes_on_under_the_next_leader_without_a_burst() -> Result<()> {
    const RATE: f64 = 50.0;
    let mut cluster = Cluster::start(3).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let urls = cluster.urls();
    cluster.client().create_topic("t", 1).await?;
    let begun = Instant::now();
    let body = json!({"rate_per_s": RATE, "value": "tick"});
    let set = http
        .put(format!("{}{GENERATOR}", urls[1]))
        .json(&body)
        .send()
        .await?;
    ensure!(set.status() == 200, "{}", set.text().await?);
    let queue = |node: usize| {
        let request = http.get(format!("{}/v1/topics/t", urls[node]));
        async move {
            let topic: Value = request.send().await?.json().await?;
            let queue = &topic["queues"][0];
            let end = queue["end_offset"].as_u64().context("end_offset")?;
            Ok::<_, anyhow::Error>((queue["leader"].as_u64().context("no leader")?, end))
        }
    };
    let reached = |node: usize, wanted: u64| {
        let queue = &queue;
        async move {
            eventually("it goes on", || async {
                let (leader, end) = queue(node).await?;
                ensure!(end >= wanted, "{end}");
                Ok((leader, end))
            })
            .await
        }
    };
    let (leader, before) = reached(0, 30).await?;
    cluster.node(leader).kill();
    let other = leader as usize % 3;
    let (successor, after) = reached(other, before + 100).await?;
    ensure!(successor != leader);
    let most = RATE * begun.elapsed().as_secs_f64() + RATE * 0.2 + 2.0;
    ensure!((after as f64) <= most, "{after} messages, at most {most}");
    Ok(())
}
