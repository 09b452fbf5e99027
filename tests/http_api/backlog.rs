//! Bounded backlogs: exactly as much is taken as fits, and a commit makes room at once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::api::Api;
use crate::support::{Cluster, PATIENCE, eventually};

pub const PRODUCE: &str = "/v1/topics/t/messages";

pub async fn bounded(api: &Api, backlog: Value) {
    let topic = json!({"name": "t", "queues": 1, "backlog": backlog});
    let made = api.cluster.client().create_topic_with(topic).await;
    made.expect("a topic");
}

pub fn one() -> Value {
    json!({"messages": [{"value": "v"}]})
}

pub async fn commit(api: &Api, group: &str, offset: u64) {
    let body =
        json!({"offsets": [{"topic": "t", "queue": 0, "offset": offset}], "allow_rewind": true});
    let path = format!("/v1/groups/{group}/offsets");
    api.call(Method::PUT, &path, &body).await.expect(200);
}

pub async fn end(api: &Api) -> u64 {
    let topic = api.get("/v1/topics/t").await.expect(200);
    topic["queues"][0]["end_offset"].as_u64().unwrap()
}

pub fn many(count: usize) -> Value {
    json!({"messages": vec![json!({"value": "v"}); count]})
}

pub fn delayed(count: usize, ms: u64) -> Value {
    json!({"messages": vec![json!({"value": "v", "delay_ms": ms}); count]})
}

#[tokio::test]
async fn of_many_at_once_exactly_as_many_are_taken_as_fit() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 10})).await;
    let body = one();
    for fits in [10, 4] {
        let sent = join_all((0..40).map(|_| api.post(PRODUCE, &body))).await;
        let (taken, refused): (Vec<_>, Vec<_>) = sent.iter().partition(|a| a.status == 200);
        assert_eq!(taken.len(), fits);
        for answer in refused {
            let problem = answer.problem(429, "backlog_full");
            assert_eq!(problem["outcome"], "not_committed");
            assert_eq!(problem["retryable"], true);
        }
        // The first group to commit is the slowest there is; the next one makes nothing worse.
        commit(&api, "a", 4).await;
        commit(&api, "b", 9).await;
    }
    assert_eq!(end(&api).await, 14);
    api.post(PRODUCE, &one()).await.problem(429, "backlog_full");
    // One after the other: each commit counts for the message that comes after it.
    for offset in 5..10 {
        commit(&api, "a", offset).await;
        api.post(PRODUCE, &one()).await.expect(200);
        api.post(PRODUCE, &one()).await.problem(429, "backlog_full");
    }
    // A rewind is known within a second.
    commit(&api, "a", 12).await;
    commit(&api, "b", 12).await;
    commit(&api, "b", 0).await;
    eventually("the rewound group counts", || async {
        let answer = api.post(PRODUCE, &one()).await;
        ensure!(answer.status == 429, "{}", answer.text());
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_request_is_taken_whole_or_not_at_all() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 5})).await;
    api.post(PRODUCE, &many(3)).await.expect(200);
    api.post(PRODUCE, &many(3))
        .await
        .problem(429, "backlog_full");
    api.post(PRODUCE, &many(2)).await.expect(200);
    // It would never fit.
    let answer = api.post(PRODUCE, &many(6)).await;
    assert_eq!(answer.problem(400, "invalid_request")["retryable"], false);
    assert_eq!(end(&api).await, 5);

    let none = json!({"backlog": {"max_messages": null}});
    let patched = api
        .call(Method::PATCH, "/v1/topics/t", &none)
        .await
        .expect(200);
    assert_eq!(patched["config"]["backlog"]["max_messages"], Value::Null);
    api.post(PRODUCE, &many(6)).await.expect(200);
    Ok(())
}

#[tokio::test]
async fn of_many_lines_as_many_are_taken_as_fit() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 4})).await;
    let lines: String = (0..10)
        .map(|n| format!("{{\"value\":\"{n}\"}}\n"))
        .collect();
    let answer = api.post_as(PRODUCE, "application/x-ndjson", lines).await;
    answer.expect(200);
    let text = answer.text();
    for (number, line) in text.lines().enumerate() {
        let line: Value = serde_json::from_str(line)?;
        match number < 4 {
            true => assert_eq!(line["offset"], number, "{text}"),
            false => assert_eq!(line["error"]["code"], "backlog_full", "{text}"),
        }
    }
    assert_eq!(text.lines().count(), 10);
    assert_eq!(end(&api).await, 4);
    Ok(())
}

#[tokio::test]
async fn a_topic_that_drops_says_so_for_each_message() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 2, "on_full": "drop_newest"})).await;
    api.store("t", 0, &["a", "b"]).await;
    let dropped = json!({"queue": 0, "offset": null, "message_id": null, "dropped": true});
    let answer = api.post(PRODUCE, &one()).await.expect(200);
    assert_eq!(answer["results"][0], dropped);
    let lines = "{\"value\":\"c\"}\n{\"value\":\"d\"}\n";
    let answer = api.post_as(PRODUCE, "application/x-ndjson", lines).await;
    assert_eq!(answer.text().matches("\"dropped\":true").count(), 2);
    let bytes = "application/octet-stream";
    let answer = api.post_as(PRODUCE, bytes, "e").await.expect(200);
    assert_eq!(answer["results"][0], dropped);
    // More than there is ever room for is dropped like the rest.
    let three = json!({"messages": vec![json!({"value": "v"}); 3]});
    let answer = api.post(PRODUCE, &three).await.expect(200);
    assert_eq!(answer["results"], json!([dropped, dropped, dropped]));
    assert_eq!(end(&api).await, 2);
    let metrics = api.get("/metrics").await.text();
    assert!(
        metrics.contains("quorate_produced_messages_total 2\n"),
        "{metrics}"
    );

    // A message left out would be a gap in the producer's sequence.
    let producer = api.post("/v1/producers", &json!({})).await.expect(200);
    let mark = json!({"id": producer["id"], "epoch": 0, "sequence": 0});
    let marked = json!({"messages": [{"value": "f"}], "producer": mark});
    api.post(PRODUCE, &marked)
        .await
        .problem(429, "backlog_full");
    commit(&api, "g", 1).await;
    let answer = api.post(PRODUCE, &marked).await.expect(200);
    assert_eq!(answer["results"][0]["offset"], 2);

    // Nobody is told that a message was dropped which the same request has stored already.
    let keyed = async || {
        let request = api.request(Method::POST, PRODUCE).json(&one());
        api.send(request.header("idempotency-key", "k")).await
    };
    keyed().await.problem(429, "backlog_full");
    commit(&api, "g", 2).await;
    let first = keyed().await.expect(200);
    assert_eq!(first["results"][0]["offset"], 3);
    keyed().await.problem(429, "backlog_full");
    commit(&api, "g", 3).await;
    assert_eq!(keyed().await.expect(200), first);
    Ok(())
}

#[tokio::test]
async fn bytes_and_age_bound_a_backlog_as_well() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_bytes": 10_000})).await;
    let kilobyte = json!({"messages": [{"value": "x".repeat(1000)}]});
    let mut taken = 0;
    while api.post(PRODUCE, &kilobyte).await.status == 200 {
        taken += 1;
        assert!(taken < 20);
    }
    // A message has its batch's head to itself: 1000 bytes are a little more when stored.
    assert_eq!(taken, 9);
    commit(&api, "g", 3).await;
    for _ in 0..3 {
        api.post(PRODUCE, &kilobyte).await.expect(200);
    }
    api.post(PRODUCE, &kilobyte)
        .await
        .problem(429, "backlog_full");

    let aged = json!({"backlog": {"max_bytes": null, "max_age_ms": 1}});
    api.call(Method::PATCH, "/v1/topics/t", &aged)
        .await
        .expect(200);
    api.post(PRODUCE, &one()).await.problem(429, "backlog_full");
    commit(&api, "g", 12).await;
    // Nothing waits, so nothing is too old.
    api.post(PRODUCE, &one()).await.expect(200);
    eventually("the message has become too old", || async {
        let answer = api.post(PRODUCE, &one()).await;
        ensure!(answer.status == 429, "{}", answer.text());
        Ok(())
    })
    .await
}

#[tokio::test]
async fn in_a_cluster_every_node_says_the_same_and_commits_count_at_once() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let urls = cluster.urls();
    let topic = json!({"name": "t", "queues": 3, "backlog": {"max_messages": 4}});
    cluster.client().create_topic_with(topic).await?;
    let produce = |node: usize, queue: u64, expected: u16| {
        let body = json!({"messages": [{"value": "v", "queue": queue}]});
        let request = http.post(format!("{}{PRODUCE}", urls[node])).json(&body);
        // What a node that was held up did not answer, or refused for want of certainty, is sent
        // again; it is stored once.
        let request = request.header("idempotency-key", Uuid::new_v4().to_string());
        async move {
            let status = eventually("it is answered", || async {
                let request = request.try_clone().context("a body in memory")?;
                let status = request.send().await?.status().as_u16();
                ensure!(status == expected || status == 200, "{status}");
                Ok(status)
            });
            let status = status.await?;
            ensure!(
                status == expected,
                "{status} by node {node} for queue {queue}"
            );
            Ok::<_, anyhow::Error>(())
        }
    };
    // Queues are led by different nodes; whoever is asked, the fifth is refused.
    for queue in 0..3 {
        for n in 0..4 {
            produce(n % 3, queue, 200).await?;
        }
        for node in 0..3 {
            produce(node, queue, 429).await?;
        }
    }
    for round in 1..=6 {
        let node = round % 3;
        let offsets: Vec<_> = (0..3)
            .map(|queue| json!({"topic": "t", "queue": queue, "offset": round}))
            .collect();
        let path = format!("{}/v1/groups/g-{}/offsets", urls[node], 1);
        eventually("the commit is taken", || async {
            let commit = http.put(&path).json(&json!({"offsets": offsets}));
            let answer = commit.send().await?;
            ensure!(answer.status() == 200, "{}", answer.text().await?);
            Ok(())
        })
        .await?;
        for queue in 0..3 {
            produce((node + 1) % 3, queue, 200).await?;
            produce(node, queue, 429).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn members_that_have_committed_nothing_and_broadcast_instances_count() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 4})).await;
    let fill = async || while api.post(PRODUCE, &one()).await.status == 200 {};
    let is_full = async |why: &str| {
        let answer = api.post(PRODUCE, &one()).await;
        assert_eq!(answer.status, 429, "{why}: {}", answer.text());
    };
    let join = async |group: &str, more: Value| {
        let mut body = json!({"topics": ["t"], "session_timeout_ms": 300_000});
        let fields = more.as_object().cloned().unwrap_or_default();
        body.as_object_mut().expect("fields").extend(fields);
        let path = format!("/v1/groups/{group}/members");
        let joined = api.post(&path, &body).await.expect(201);
        let member = json!({"id": joined["member_id"], "epoch": joined["epoch"]});
        let leave = format!("{path}/{}", joined["member_id"].as_str().expect("an id"));
        (member, leave)
    };
    let commit_as = async |group: &str, member: &Value, offset: u64| {
        let place = json!({"topic": "t", "queue": 0, "offset": offset});
        let body = json!({"offsets": [place], "member": member});
        let path = format!("/v1/groups/{group}/offsets");
        api.call(Method::PUT, &path, &body).await.expect(200);
    };
    fill().await;
    let (slow, _) = join("slow", json!({})).await;
    commit(&api, "fast", 4).await;
    is_full("a member begins at the earliest message").await;
    commit_as("slow", &slow, 2).await;
    fill().await;
    assert_eq!(end(&api).await, 6);
    commit_as("slow", &slow, 6).await;
    commit(&api, "fast", 6).await;

    let everything = |instance: &str| json!({"mode": "broadcast", "instance_id": instance});
    let (a, _) = join("all", everything("a")).await;
    let (b, leave) = join("all", everything("b")).await;
    commit_as("all", &a, 6).await;
    is_full("an instance has committed nothing").await;
    commit_as("all", &b, 3).await;
    fill().await;
    assert_eq!(end(&api).await, 7);
    let none = json!({});
    api.call(Method::DELETE, &leave, &none).await.expect(204);
    fill().await;
    assert_eq!(end(&api).await, 10, "who is gone holds nobody up");
    Ok(())
}

#[tokio::test]
async fn nothing_more_is_taken_while_a_restarted_node_reads_its_log() -> Result<()> {
    let mut api = Api::start().await?;
    bounded(&api, json!({"max_messages": 1500})).await;
    // Entries of their own: what was applied of them is lost with the process.
    let fill = async |api: &Api| while api.post(PRODUCE, &one()).await.status == 200 {};
    join_all((0..32).map(|_| fill(&api))).await;
    assert_eq!(end(&api).await, 1500);
    for _ in 0..5 {
        api.cluster.node(1).kill();
        api.cluster.node(1).spawn()?;
        let knock = async |api: &Api| {
            let body = one();
            loop {
                let request = api.request(Method::POST, PRODUCE).json(&body);
                match request.send().await.map(|answer| answer.status().as_u16()) {
                    Ok(429) => return,
                    Ok(200) => panic!("it is full"),
                    Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let knocking = join_all((0..24).map(|_| knock(&api)));
        tokio::time::timeout(PATIENCE, knocking).await?;
        api.cluster.wait_ready().await?;
        assert_eq!(end(&api).await, 1500);
    }
    Ok(())
}

#[tokio::test]
async fn many_lines_that_do_not_fit_are_refused_together() -> Result<()> {
    let api = Api::start().await?;
    bounded(&api, json!({"max_messages": 2})).await;
    let lines = "{\"value\":\"v\"}\n".repeat(1000);
    let sending = api.post_as(PRODUCE, "application/x-ndjson", lines);
    // Asked anew for each line whether there is room, they would take a minute.
    let answer = tokio::time::timeout(Duration::from_secs(30), sending).await?;
    let answers = answer.text();
    let refused = |line: &&str| line.contains("backlog_full");
    assert_eq!(answers.lines().filter(refused).count(), 998);
    assert_eq!(answers.lines().count(), 1000);
    assert_eq!(end(&api).await, 2);
    Ok(())
}
