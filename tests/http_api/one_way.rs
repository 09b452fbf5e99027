//! One-way produce, and where a key goes.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::api::Api;
use crate::support::eventually;

const PRODUCE: &str = "/v1/topics/t/messages";

async fn metric(api: &Api, name: &str) -> u64 {
    let text = api.get("/metrics").await.text();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.map_or(0, |value| value.trim().parse().expect("a number"))
}

#[tokio::test]
async fn one_way_messages_are_accepted_at_once_and_stored_soon() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let path = format!("{PRODUCE}?ack=none");
    let body = json!({"messages": [{"value": "a"}, {"value": "b"}]});
    assert_eq!(
        api.post(&path, &body).await.expect(202),
        json!({"accepted": 2})
    );
    let bytes = "application/octet-stream";
    let answer = api.post_as(&format!("{path}&queue=0"), bytes, "c").await;
    assert_eq!(answer.expect(202), json!({"accepted": 1}));
    eventually("all three are stored", || async {
        let found = api.get("/v1/topics/t/queues/0/messages").await.expect(200);
        let messages = found["messages"].as_array().map_or(0, Vec::len);
        ensure!(messages == 3, "{found}");
        ensure!(metric(&api, "quorate_one_way_stored_messages_total ").await == 3);
        Ok(())
    })
    .await?;
    assert_eq!(
        metric(&api, "quorate_one_way_lost_messages_total ").await,
        0
    );
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_is_told_at_once_and_what_is_lost_is_counted() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 1).await;
    let one = json!({"messages": [{"value": "a"}]});
    let missing = "/v1/topics/none/messages?ack=none";
    api.post(missing, &one)
        .await
        .problem(404, "topic_not_found");
    let path = format!("{PRODUCE}?ack=none");
    let large = json!({"messages": [{"value": "x".repeat(10_001)}]});
    api.post(&path, &large)
        .await
        .problem(413, "message_too_large");
    let elsewhere = json!({"messages": [{"value": "a", "queue": 7}]});
    api.post(&path, &elsewhere)
        .await
        .problem(404, "queue_not_found");
    let lines = api.post_as(&path, "application/x-ndjson", "{}\n").await;
    lines.problem(400, "invalid_request");
    for ack in ["leader", "1", "two", ""] {
        let answer = api.post(&format!("{PRODUCE}?ack={ack}"), &one).await;
        answer.problem(400, "invalid_request");
    }
    for ack in ["all", "majority"] {
        api.post(&format!("{PRODUCE}?ack={ack}"), &one)
            .await
            .expect(200);
    }
    // A sequence with a gap that nobody fills is refused after the answer was given.
    let producer = api.post("/v1/producers", &json!({})).await.expect(200);
    let mark = json!({"id": producer["id"], "epoch": 0, "sequence": 5});
    let gap = json!({"messages": [{"value": "b"}], "producer": mark});
    api.post(&path, &gap).await.expect(202);
    eventually("the loss is counted", || async {
        ensure!(metric(&api, "quorate_one_way_lost_messages_total ").await == 1);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_key_goes_where_it_is_said_to_go() -> Result<()> {
    let api = Api::start().await?;
    api.topic("t", 5).await;
    for (key, coded) in [
        ("a", "a"),
        ("order-17", "order-17"),
        ("", ""),
        ("ä&", "%C3%A4%26"),
    ] {
        let said = api.get(&format!("/v1/topics/t/queue?key={coded}")).await;
        let said = said.expect(200);
        let body = json!({"messages": [{"value": "v", "key": key}]});
        let stored = api.post(PRODUCE, &body).await.expect(200);
        assert_eq!(said["queue"], stored["results"][0]["queue"], "{key:?}");
    }
    api.get("/v1/topics/t/queue")
        .await
        .problem(400, "invalid_request");
    api.get("/v1/topics/none/queue?key=a")
        .await
        .problem(404, "topic_not_found");
    Ok(())
}
