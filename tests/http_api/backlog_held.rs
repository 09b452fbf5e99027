//! Bounded backlogs: what is held, as delayed messages and halves of transactions, takes room like
//! what is visible.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;
use crate::backlog::{PRODUCE, bounded, commit, delayed, end, many, one};
use crate::support::client::Client;
use crate::support::{Cluster, eventually};

const TRANSACTIONS: &str = "/v1/transactions";
const HOUR_MS: u64 = 3_600_000;

/// Half messages that nobody checks while the test runs.
fn halves(count: usize) -> Value {
    let messages = vec![json!({"topic": "t", "value": "v"}); count];
    json!({"timeout_ms": 600_000, "messages": messages})
}

/// Opens a transaction that finds room.
async fn begin(api: &Api, count: usize) -> String {
    let begun = api.post(TRANSACTIONS, &halves(count)).await.expect(201);
    begun["transaction_id"].as_str().expect("an id").to_owned()
}

/// Ends it, in its queue, too.
async fn finish(api: &Api, transaction: &str, how: &str) {
    let path = format!("{TRANSACTIONS}/{transaction}/{how}");
    let ended = api.send(api.request(Method::POST, &path)).await.expect(200);
    let state = match how {
        "commit" => "committed",
        _ => "rolled_back",
    };
    assert_eq!(ended["state"], state);
}

/// Takes a delayed message back.
async fn cancel(api: &Api, stored: &Value) {
    let id = stored["message_id"].as_str().expect("an id");
    let path = format!("{PRODUCE}/{id}");
    api.send(api.request(Method::DELETE, &path))
        .await
        .expect(204);
}

/// Nothing more fits, whatever it is.
async fn is_full(api: &Api) {
    for (path, body) in [
        (PRODUCE, one()),
        (PRODUCE, delayed(1, HOUR_MS)),
        (TRANSACTIONS, halves(1)),
    ] {
        let problem = api.post(path, &body).await.problem(429, "backlog_full");
        assert_eq!(problem["outcome"], "not_committed", "{body}");
    }
}

#[tokio::test]
async fn open_transactions_take_room_until_they_end() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 2})).await;
    api.post(PRODUCE, &one()).await.expect(200);
    let first = begin(&api, 1).await;
    is_full(&api).await;
    // What was refused was rolled back, and counts for nothing.
    assert_eq!(end(&api).await, 1);
    commit(&api, "g", 1).await;
    let second = begin(&api, 1).await;
    is_full(&api).await;

    // Their room is theirs: a commit is never refused.
    finish(&api, &first, "commit").await;
    is_full(&api).await;
    finish(&api, &second, "commit").await;
    is_full(&api).await;
    assert_eq!(end(&api).await, 3);
    commit(&api, "g", 3).await;
    let (first, second) = (begin(&api, 1).await, begin(&api, 1).await);
    is_full(&api).await;
    for transaction in [first, second] {
        finish(&api, &transaction, "rollback").await;
        api.post(PRODUCE, &one()).await.expect(200);
        finish(&api, &transaction, "rollback").await;
    }
    is_full(&api).await;
    assert_eq!(end(&api).await, 5);
    Ok(())
}

#[tokio::test]
async fn a_transaction_that_does_not_fit_keeps_no_room_anywhere() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 1})).await;
    let other = json!({"name": "u", "queues": 1, "backlog": {"max_messages": 2}});
    api.post("/v1/topics", &other).await.expect(201);
    let of = |topics: &[&str]| {
        let message = |topic: &&str| json!({"topic": topic, "value": "v"});
        let messages: Vec<_> = topics.iter().map(message).collect();
        json!({"timeout_ms": 600_000, "messages": messages})
    };
    api.post(PRODUCE, &one()).await.expect(200);
    let refused = api.post(TRANSACTIONS, &of(&["u", "t"])).await;
    refused.problem(429, "backlog_full");
    // What is added and does not fit is left out.
    let begun = api.post(TRANSACTIONS, &of(&["u"])).await.expect(201);
    let id = begun["transaction_id"].as_str().expect("an id");
    let path = format!("{TRANSACTIONS}/{id}");
    let more = json!({"messages": of(&["t"])["messages"]});
    let extended = api.post(&format!("{path}/messages"), &more).await;
    extended.problem(429, "backlog_full");
    let commit = api.request(Method::POST, &format!("{path}/commit"));
    api.send(commit).await.expect(200);
    eventually("there is room for all but what was committed", || async {
        let answer = api.post("/v1/topics/u/messages", &many(1)).await;
        ensure!(answer.status == 200, "{}", answer.text());
        Ok(())
    })
    .await?;
    let answer = api.post("/v1/topics/u/messages", &many(1)).await;
    answer.problem(429, "backlog_full");
    Ok(())
}

#[tokio::test]
async fn delayed_messages_take_room_until_they_are_consumed_or_taken_back() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 3})).await;
    api.post(PRODUCE, &delayed(4, HOUR_MS))
        .await
        .problem(400, "invalid_request");
    let answer = api.post(PRODUCE, &delayed(2, HOUR_MS)).await.expect(200);
    api.post(PRODUCE, &delayed(2, HOUR_MS))
        .await
        .problem(429, "backlog_full");
    api.post(PRODUCE, &delayed(1, 100)).await.expect(200);
    is_full(&api).await;
    for stored in [&answer["results"][0], &answer["results"][1]] {
        cancel(&api, stored).await;
        cancel(&api, stored).await;
        api.post(PRODUCE, &one()).await.expect(200);
        is_full(&api).await;
    }
    // Once visible it counts as such.
    eventually("the delayed message is visible", || async {
        ensure!(end(&api).await == 3);
        Ok(())
    })
    .await?;
    is_full(&api).await;
    commit(&api, "g", 3).await;
    api.post(PRODUCE, &delayed(3, HOUR_MS)).await.expect(200);
    is_full(&api).await;
    Ok(())
}

#[tokio::test]
async fn every_message_that_is_held_counts_after_a_restart_too() -> Result<()> {
    let mut api = Api::start_with("[raft]\ncheckpoint_every = 16\n").await?;
    bounded(&api, json!({"max_messages": 20})).await;
    let transaction = begin(&api, 7).await;
    let stored = api.post(PRODUCE, &delayed(4, HOUR_MS)).await.expect(200);
    let exactly = async |api: &Api, count: usize| {
        let more = api.post(PRODUCE, &many(count + 1)).await;
        more.problem(429, "backlog_full");
        api.post(PRODUCE, &many(count)).await.expect(200);
        is_full(api).await;
    };
    exactly(&api, 9).await;
    restart(&mut api).await?;
    is_full(&api).await;
    finish(&api, &transaction, "rollback").await;
    exactly(&api, 7).await;
    cancel(&api, &stored["results"][3]).await;
    exactly(&api, 1).await;
    restart(&mut api).await?;
    is_full(&api).await;
    commit(&api, "g", 17).await;
    let transaction = begin(&api, 16).await;
    exactly(&api, 1).await;
    restart(&mut api).await?;
    finish(&api, &transaction, "commit").await;
    is_full(&api).await;
    commit(&api, "g", 34).await;
    exactly(&api, 17).await;
    Ok(())
}

async fn restart(api: &mut Api) -> Result<()> {
    api.cluster.node(1).kill();
    api.cluster.node(1).spawn()?;
    api.cluster.wait_ready().await
}

#[tokio::test]
async fn bytes_that_are_held_bound_a_backlog_as_well() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_bytes": 10_000})).await;
    let kilobyte = |ms: u64| json!({"messages": [{"value": "x".repeat(1000), "delay_ms": ms}]});
    let half = json!({"topic": "t", "value": "x".repeat(1000)});
    let halves = json!({"timeout_ms": 600_000, "messages": [half, half, half]});
    let begun = api.post(TRANSACTIONS, &halves).await.expect(201);
    let transaction = begun["transaction_id"].as_str().expect("an id");
    let fill = async |ms: u64| {
        let mut taken = Vec::new();
        loop {
            let answer = api.post(PRODUCE, &kilobyte(ms)).await;
            if answer.status == 429 {
                return taken;
            }
            taken.push(answer.expect(200)["results"][0].clone());
            assert!(taken.len() < 20);
        }
    };
    let taken = fill(HOUR_MS).await;
    assert_eq!(taken.len(), 6);
    assert_eq!(fill(0).await.len(), 0);
    cancel(&api, &taken[0]).await;
    assert_eq!(fill(0).await.len(), 1);
    finish(&api, transaction, "commit").await;
    assert_eq!(fill(0).await.len(), 0);
    commit(&api, "g", 1).await;
    assert_eq!(fill(0).await.len(), 1);
    // All that is left are five delayed ones.
    commit(&api, "g", 5).await;
    assert_eq!(fill(HOUR_MS).await.len(), 4);
    Ok(())
}

#[tokio::test]
async fn of_all_kinds_at_once_exactly_as_many_are_taken_as_fit() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 20})).await;
    let send = |n: u64| {
        let (path, body) = match n % 3 {
            0 => (PRODUCE, one()),
            // They become visible while others are judged.
            1 => (PRODUCE, delayed(1, n % 50)),
            _ => (TRANSACTIONS, halves(1)),
        };
        let api = &api;
        async move {
            let answer = api.post(path, &body).await;
            if answer.status == 201 {
                let id = answer.json()["transaction_id"].clone();
                finish(api, id.as_str().expect("an id"), "commit").await;
            } else if answer.status != 200 {
                answer.problem(429, "backlog_full");
                return false;
            }
            true
        }
    };
    for round in 1..=3 {
        let sent = join_all((0..60).map(send)).await;
        assert_eq!(sent.into_iter().filter(|taken| *taken).count(), 20);
        eventually("all are visible", || async {
            ensure!(end(&api).await == round * 20);
            Ok(())
        })
        .await?;
        is_full(&api).await;
        commit(&api, "g", round * 20).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_topic_that_drops_takes_delayed_messages_for_others_and_refuses_halves() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 1, "on_full": "drop_newest"})).await;
    let transaction = begin(&api, 1).await;
    let dropped = json!({"queue": 0, "offset": null, "message_id": null, "dropped": true});
    for body in [one(), delayed(1, HOUR_MS)] {
        let answer = api.post(PRODUCE, &body).await.expect(200);
        assert_eq!(answer["results"][0], dropped);
    }
    // A transaction is whole or not at all.
    api.post(TRANSACTIONS, &halves(1))
        .await
        .problem(429, "backlog_full");
    finish(&api, &transaction, "commit").await;
    assert_eq!(end(&api).await, 1);
    Ok(())
}

#[tokio::test]
async fn what_is_held_is_not_old() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_age_ms": 50})).await;
    let transaction = begin(&api, 1).await;
    api.post(PRODUCE, &delayed(1, HOUR_MS)).await.expect(200);
    tokio::time::sleep(Duration::from_millis(200)).await;
    api.post(PRODUCE, &delayed(1, HOUR_MS)).await.expect(200);
    finish(&api, &transaction, "commit").await;
    eventually("what has become visible is too old", || async {
        let answer = api.post(PRODUCE, &one()).await;
        ensure!(answer.status == 429, "{}", answer.text());
        Ok(())
    })
    .await
}

#[tokio::test]
async fn another_leader_counts_what_is_held() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    let topic = json!({"name": "t", "queues": 1, "backlog": {"max_messages": 5}});
    client.create_topic_with(topic).await?;
    let post = async |client: &Client, path: &str, body: &Value| {
        client.request(Method::POST, path, Some(body)).await
    };
    let (status, begun) = post(&client, TRANSACTIONS, &halves(3)).await?;
    ensure!(status == 201, "{begun}");
    let (status, answer) = post(&client, PRODUCE, &delayed(1, HOUR_MS)).await?;
    ensure!(status == 200, "{answer}");
    let leader = client.leader("t", 0).await?;
    let urls = cluster.urls();
    let others = (1..).zip(urls).filter(|(id, _)| *id != leader);
    let others = Client::new(others.map(|(_, url)| url).collect());
    cluster.node(leader).kill();
    eventually("somebody else takes the last one that fits", || async {
        let (_, answer) = post(&others, PRODUCE, &one()).await?;
        let topic = others.topic("t").await?;
        ensure!(topic["queues"][0]["end_offset"] == 1, "{answer}");
        Ok(())
    })
    .await?;
    for _ in 0..3 {
        let (status, answer) = post(&others, PRODUCE, &one()).await?;
        ensure!(status == 429, "{answer}");
    }
    let id = begun["transaction_id"].as_str().expect("an id");
    eventually("the commit is known to all", || async {
        let path = format!("{TRANSACTIONS}/{id}/commit");
        let (status, answer) = post(&others, &path, &json!({})).await?;
        ensure!(status == 200, "{answer}");
        Ok(())
    })
    .await?;
    let (status, answer) = post(&others, PRODUCE, &one()).await?;
    ensure!(status == 429, "{answer}");
    cluster.node(leader).spawn()?;
    cluster.wait_ready().await?;
    cluster.replicas_agree()
}
