//! Committed offsets of a consumer group.

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};

const PATH: &str = "/v1/groups/g/offsets";

fn at(queue: u32, offset: u64) -> Value {
    json!({"topic": "t", "queue": queue, "offset": offset})
}

async fn commit(api: &Api, body: &Value) -> Answer {
    api.call(Method::PUT, PATH, body).await
}

#[tokio::test]
async fn commit_and_lag() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b", "c"]).await;
    let before = api.get(&format!("{PATH}?topic=t")).await.expect(200);
    let place = &before["offsets"][0];
    assert_eq!(
        (&place["topic"], &place["queue"], &place["offset"]),
        (&json!("t"), &json!(0), &Value::Null)
    );
    assert_eq!(
        (&place["end_offset"], &place["lag"]),
        (&json!(3), &json!(3))
    );
    assert_eq!(before["offsets"].as_array().unwrap().len(), 2);

    let answer = commit(&api, &json!({"offsets": [at(0, 2)]}))
        .await
        .expect(200);
    assert_eq!(answer, json!({"results": [at(0, 2)]}));
    let after = api.get(&format!("{PATH}?topic=t")).await.expect(200);
    let place = &after["offsets"][0];
    assert_eq!((&place["offset"], &place["lag"]), (&json!(2), &json!(1)));
    assert!(place["lag_ms"].is_u64());
    let caught_up = commit(&api, &json!({"offsets": [at(0, 3), at(1, 0)]}))
        .await
        .expect(200);
    assert_eq!(caught_up["results"].as_array().unwrap().len(), 2);
    let place = api.get(&format!("{PATH}?topic=t")).await.expect(200)["offsets"][0].clone();
    assert_eq!((&place["lag"], &place["lag_ms"]), (&json!(0), &json!(0)));
    let metrics = api.get("/metrics").await.text();
    let line = "quorate_group_lag_messages{group=\"g\",topic=\"t\",queue=\"0\"} 0";
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn what_a_commit_may_not_do() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b", "c"]).await;
    commit(&api, &json!({"offsets": [at(0, 2)]}))
        .await
        .expect(200);
    let back = commit(&api, &json!({"offsets": [at(0, 1)]})).await;
    let body = back.problem(409, "offset_conflict");
    assert!(
        body["detail"].as_str().unwrap().contains("allow_rewind"),
        "{body}"
    );
    let allowed = json!({"offsets": [at(0, 1)], "allow_rewind": true});
    commit(&api, &allowed).await.expect(200);
    let body = commit(&api, &json!({"offsets": [at(0, 4)]}))
        .await
        .problem(416, "offset_out_of_range");
    assert_eq!(
        (&body["earliest_offset"], &body["end_offset"]),
        (&json!(0), &json!(3))
    );

    let mixed = commit(&api, &json!({"offsets": [at(0, 3), at(1, 9)]}))
        .await
        .expect(207);
    assert_eq!(mixed["results"][0], at(0, 3));
    let failed = &mixed["results"][1];
    assert_eq!(
        (&failed["topic"], &failed["queue"]),
        (&json!("t"), &json!(1))
    );
    assert_eq!(failed["error"]["code"], "offset_out_of_range");

    let none = json!({"offsets": [{"topic": "none", "queue": 0, "offset": 0}]});
    commit(&api, &none).await.problem(404, "topic_not_found");
    commit(&api, &json!({"offsets": [at(7, 0)]}))
        .await
        .problem(404, "queue_not_found");
    commit(&api, &json!({"offsets": []}))
        .await
        .problem(400, "invalid_request");
    let member = json!({"offsets": [at(0, 3)], "member": {"id": "nobody", "epoch": 3}});
    commit(&api, &member).await.problem(409, "fenced_member");
}

#[tokio::test]
async fn every_reset() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b", "c", "d"]).await;
    commit(&api, &json!({"offsets": [at(0, 2)]}))
        .await
        .expect(200);
    let reset = async |to: Value, dry_run: bool| {
        let body = json!({"topic": "t", "queue": 0, "to": to, "dry_run": dry_run});
        api.post(&format!("{PATH}/reset"), &body).await
    };
    let mut previous = 2;
    for (to, offset) in [
        (json!("latest"), 4),
        (json!("earliest"), 0),
        (json!({"offset": 3}), 3),
        (json!({"shift_by": -2}), 1),
        (json!({"shift_by": -100}), 0),
        (json!({"timestamp_ms": 99_999_999_999_999_u64}), 4),
        (json!({"timestamp_ms": 0}), 0),
    ] {
        let tried = reset(to.clone(), true).await.expect(200);
        assert_eq!(tried["dry_run"], true);
        let expected = json!([{"topic": "t", "queue": 0, "previous": previous, "offset": offset}]);
        assert_eq!(tried["results"], expected, "{to}");
        assert_eq!(
            reset(to.clone(), false).await.expect(200)["results"],
            expected,
            "{to}"
        );
        let now = api.get(&format!("{PATH}?topic=t")).await.expect(200);
        assert_eq!(now["offsets"][0]["offset"], offset, "{to}");
        previous = offset;
    }
    let body = json!({"topic": "t", "to": "latest"});
    let all = api.post(&format!("{PATH}/reset"), &body).await.expect(200);
    assert_eq!(all["results"].as_array().unwrap().len(), 2);
    reset(json!("middle"), false)
        .await
        .problem(400, "invalid_request");
    let body = json!({"topic": "none", "to": "latest"});
    api.post(&format!("{PATH}/reset"), &body)
        .await
        .problem(404, "topic_not_found");
}
