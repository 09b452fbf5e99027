//! Looking messages up over all queues: by key, by id, by time.

use reqwest::{Method, Url};
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::support::{Cluster, eventually};

const PATH: &str = "/v1/topics/t/messages";

async fn look(api: &Api, query: &[(&str, &str)]) -> Answer {
    let url = Url::parse_with_params(&format!("{}{PATH}", api.url), query);
    api.send(api.http.get(url.expect("a URL"))).await
}

fn values(found: &Value) -> Vec<&str> {
    let messages = found["messages"].as_array().expect("messages").iter();
    messages
        .map(|message| message["value"].as_str().expect("value"))
        .collect()
}

/// Stores one message a request, so that times differ, in turn in each queue, with keys in turn.
async fn filled(api: &Api, count: usize, queues: usize) -> Vec<Value> {
    let mut stored = Vec::new();
    for n in 0..count {
        let body = json!({"messages": [{"value": n.to_string(), "queue": n % queues,
            "key": format!("key-{}", n % 5), "tag": if n % 2 == 0 { "even" } else { "odd" }}]});
        let answer = api.post(PATH, &body).await.expect(200);
        stored.push(answer["results"][0].clone());
    }
    stored
}

#[tokio::test]
async fn by_key_in_the_order_of_time_and_page_by_page() {
    let api = Api::start().await.unwrap();
    api.topic("t", 3).await;
    filled(&api, 30, 3).await;
    let found = look(&api, &[("key", "key-2")]).await.expect(200);
    assert_eq!(values(&found), ["2", "7", "12", "17", "22", "27"]);
    assert_eq!(found["more"], false);
    assert!(found.get("next").is_none());
    let times: Vec<_> = found["messages"].as_array().unwrap().iter().collect();
    assert!(times.is_sorted_by_key(|m| m["timestamp_ms"].as_u64()));
    assert!(times.iter().all(|m| m["key"] == "key-2"));
    let odd = look(&api, &[("key", "key-2"), ("tag", "odd")])
        .await
        .expect(200);
    assert_eq!(values(&odd), ["7", "17", "27"]);
    let high = look(&api, &[("key", "key-2"), ("filter", "offset >= 5")])
        .await
        .expect(200);
    assert_eq!(values(&high), ["17", "22", "27"]);
    let none = look(&api, &[("key", "key-")]).await.expect(200);
    assert_eq!(none, json!({"messages": [], "more": false}));
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let mut query = vec![("key", "key-2"), ("max_messages", "4")];
        query.extend((!after.is_empty()).then_some(("after", after.as_str())));
        let page = look(&api, &query).await.expect(200);
        all.extend(values(&page).into_iter().map(str::to_owned));
        if page["more"] == false {
            break;
        }
        after = page["next"].as_str().expect("next").to_owned();
    }
    assert_eq!(all, ["2", "7", "12", "17", "22", "27"]);
}

#[tokio::test]
async fn the_message_with_an_id() {
    let api = Api::start().await.unwrap();
    api.topic("t", 3).await;
    api.topic("other", 1).await;
    let mut stored = filled(&api, 12, 3).await;
    let batch: Vec<Value> = (12..20)
        .map(|n| json!({"value": n.to_string(), "queue": 1}))
        .collect();
    let answer = api
        .post(PATH, &json!({"messages": batch}))
        .await
        .expect(200);
    stored.extend(answer["results"].as_array().unwrap().iter().cloned());
    for (n, place) in stored.iter().enumerate() {
        let id = place["message_id"].as_str().unwrap();
        let found = look(&api, &[("message_id", id)]).await.expect(200);
        assert_eq!(values(&found), [n.to_string()]);
        let message = &found["messages"][0];
        for field in ["queue", "offset", "message_id"] {
            assert_eq!(message[field], place[field], "{n} {field}");
        }
    }
    let id = stored[0]["message_id"].as_str().unwrap();
    for malformed in ["", "x", &id[1..], &format!("{id}A")] {
        look(&api, &[("message_id", malformed)])
            .await
            .problem(404, "message_not_found");
    }
    let path = format!("/v1/topics/other/messages?message_id={id}");
    api.get(&path).await.problem(404, "message_not_found");
    api.get(&format!("/v1/topics/none/messages?message_id={id}"))
        .await
        .problem(404, "topic_not_found");
    // An id of the queue that no message has: the entry is there, the record isn't.
    let body = json!({"messages": [{"value": "x"}]});
    let foreign = api
        .post("/v1/topics/other/messages", &body)
        .await
        .expect(200);
    let foreign = foreign["results"][0]["message_id"].clone();
    look(&api, &[("message_id", foreign.as_str().unwrap())])
        .await
        .problem(404, "message_not_found");
    look(&api, &[("message_id", id), ("key", "k")])
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn by_time_with_both_ends() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    filled(&api, 20, 2).await;
    let all = look(&api, &[("from_timestamp_ms", "0")]).await.expect(200);
    let in_order: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let times: Vec<u64> = all["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["timestamp_ms"].as_u64().unwrap())
        .collect();
    let mut sorted: Vec<u64> = values(&all).iter().map(|v| v.parse().unwrap()).collect();
    sorted.sort_unstable();
    assert_eq!(sorted.len(), 20, "{in_order:?}");
    assert!(times.is_sorted());
    let (from, to) = (times[5], times[12]);
    let expected = times.iter().filter(|t| (from..=to).contains(t)).count();
    let (from, to) = (from.to_string(), to.to_string());
    let between = [
        ("from_timestamp_ms", from.as_str()),
        ("to_timestamp_ms", &to),
    ];
    let some = look(&api, &between).await.expect(200);
    assert_eq!(values(&some).len(), expected);
    let with_key = [between[0], between[1], ("key", "key-1")];
    let of_key = look(&api, &with_key).await.expect(200);
    assert!(
        of_key["messages"]
            .as_array()
            .unwrap()
            .iter()
            .all(|m| m["key"] == "key-1")
    );
    let mut paged = Vec::new();
    let mut after = None::<String>;
    loop {
        let mut query = vec![("from_timestamp_ms", "0"), ("max_messages", "3")];
        query.extend(after.as_deref().map(|after| ("after", after)));
        let page = look(&api, &query).await.expect(200);
        paged.extend(page["messages"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => break,
        }
    }
    assert_eq!(paged, *all["messages"].as_array().unwrap());
    let future = look(&api, &[("from_timestamp_ms", "99999999999999")])
        .await
        .expect(200);
    assert_eq!(future["messages"], json!([]));
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    for query in [
        vec![],
        vec![("max_messages", "5")],
        vec![("key", "k"), ("max_messages", "1001")],
        vec![("key", "k"), ("max_messages", "0")],
        vec![("key", "k"), ("after", "yesterday")],
        vec![("key", "k"), ("offset", "3")],
        vec![("from_timestamp_ms", "5"), ("to_timestamp_ms", "4")],
        vec![("key", "k"), ("filter", "offset >")],
        vec![("key", "k"), ("encoding", "hex")],
    ] {
        look(&api, &query).await.problem(400, "invalid_request");
    }
    let path = "/v1/topics/none/messages?key=k";
    api.get(path).await.problem(404, "topic_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_answers_also_without_a_replica() {
    let cluster = Cluster::start(3).await.unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = cluster.urls().remove(0);
    let api = Api { cluster, url, http };
    let topic = json!({"name": "t", "queues": 3, "replicas": 1});
    api.cluster.client().create_topic_with(topic).await.unwrap();
    let stored = filled(&api, 9, 3).await;
    let id = stored[4]["message_id"].as_str().unwrap();
    for url in api.cluster.urls() {
        let get = |query: String| {
            let url = format!("{url}{PATH}?{query}");
            let request = api.http.request(Method::GET, url);
            async { api.send(request).await }
        };
        // Another node may hear of the topic a moment later.
        eventually("the node knows the topic", || async {
            let status = get("key=none".to_owned()).await.status;
            anyhow::ensure!(status == 200, "{status}");
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(
            values(&get("key=key-3".to_owned()).await.expect(200)),
            ["3", "8"]
        );
        let found = get(format!("message_id={id}")).await.expect(200);
        assert_eq!(values(&found), ["4"]);
        assert_eq!(
            values(&get("from_timestamp_ms=0".to_owned()).await.expect(200)).len(),
            9
        );
    }
}

#[tokio::test]
async fn a_delayed_message_is_found_by_its_id_once_it_is_visible() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let body = json!({"messages": [{"value": "late", "key": "k", "delay_ms": 5_000}]});
    let answer = api.post(PATH, &body).await.expect(200);
    let id = answer["results"][0]["message_id"]
        .as_str()
        .unwrap()
        .to_owned();
    api.store("t", 0, &["a", "b"]).await;
    look(&api, &[("message_id", &id)])
        .await
        .problem(404, "message_not_found");
    let found = eventually("the message is delivered", || async {
        let answer = look(&api, &[("message_id", &id)]).await;
        anyhow::ensure!(answer.status == 200, "{}", answer.text());
        Ok(answer.json())
    })
    .await
    .unwrap();
    assert_eq!(values(&found), ["late"]);
    assert_eq!(found["messages"][0]["offset"], 2);
    assert_eq!(found["messages"][0]["message_id"], id.as_str());
    let by_key = look(&api, &[("key", "k")]).await.expect(200);
    assert_eq!(by_key["messages"], found["messages"]);
}

#[tokio::test]
async fn what_has_expired_is_not_found() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let body = json!({"messages": [{"value": "short", "key": "k", "ttl_ms": 1},
        {"value": "long", "key": "k", "ttl_ms": 10_000_000}]});
    let answer = api.post(PATH, &body).await.expect(200);
    let id = answer["results"][0]["message_id"].as_str().unwrap();
    eventually("the message expires", || async {
        let by_key = look(&api, &[("key", "k")]).await.expect(200);
        anyhow::ensure!(values(&by_key) == ["long"], "{by_key}");
        Ok(())
    })
    .await
    .unwrap();
    look(&api, &[("message_id", id)])
        .await
        .problem(404, "message_not_found");
}
