//! Filter expressions on fetch, event streams and fetches over many queues.

use anyhow::Result;
use reqwest::Url;
use serde_json::{Value, json};

use crate::api::Api;

const PATH: &str = "/v1/topics/t/queues/0/messages";

fn values(found: &Value) -> Vec<&str> {
    let messages = found["messages"].as_array().expect("messages").iter();
    messages
        .map(|message| message["value"].as_str().expect("value"))
        .collect()
}

/// Messages 0 to 19: even ones from the EU, amount = 1.5 times the number, tags in turn.
async fn filled() -> Api {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let message = |n: usize| {
        let (tag, region) = (["created", "paid", "draft"][n % 3], ["eu", "us"][n % 2]);
        json!({"value": n.to_string(), "queue": 0, "key": format!("order-{n}"),
            "tag": tag,
            "headers": {"region": region, "amount": (n as f64 * 1.5).to_string()}})
    };
    let mut messages: Vec<Value> = (0..20).map(message).collect();
    messages.push(json!({"value": "bare", "queue": 0}));
    let body = json!({"messages": messages});
    api.post("/v1/topics/t/messages", &body).await.expect(200);
    api
}

fn request(api: &Api, query: &[(&str, &str)]) -> reqwest::RequestBuilder {
    let url = Url::parse_with_params(&format!("{}{PATH}", api.url), query);
    api.http.get(url.expect("a URL"))
}

async fn fetch(api: &Api, query: &[(&str, &str)]) -> crate::api::Answer {
    api.send(request(api, query)).await
}

#[tokio::test]
async fn a_fetch_gives_what_the_filter_takes_and_moves_past_the_rest() {
    let api = filled().await;
    for (filter, tag, expected) in [
        (
            "headers.region = 'eu' and headers.amount between 3 and 9",
            None,
            vec!["2", "4", "6"],
        ),
        ("headers.amount > 25", None, vec!["17", "18", "19"]),
        ("not headers.amount <= 25", None, vec!["17", "18", "19"]),
        ("headers.amount is null", None, vec!["bare"]),
        (
            "key like 'order-1_' and offset >= 18",
            None,
            vec!["18", "19"],
        ),
        (
            "headers.region = 'us'",
            Some("paid||draft"),
            vec!["1", "5", "7", "11", "13", "17", "19"],
        ),
        (
            "tag not in ('created', 'paid') and value_bytes = 1",
            None,
            vec!["2", "5", "8"],
        ),
        ("headers.none = 'x'", None, vec![]),
    ] {
        let mut query = vec![("filter", filter)];
        query.extend(tag.map(|tag| ("tag", tag)));
        let found = fetch(&api, &query).await.expect(200);
        assert_eq!(values(&found), expected, "{filter}");
        assert_eq!(found["next_offset"], 21, "{filter}");
    }
    let query = [("filter", "headers.region = 'us'"), ("max_messages", "2")];
    let some = fetch(&api, &query).await.expect(200);
    assert_eq!(values(&some), ["1", "3"]);
    let next = some["next_offset"].to_string();
    let query = [
        ("filter", "headers.region = 'us'"),
        ("max_messages", "2"),
        ("offset", &next),
    ];
    assert_eq!(values(&fetch(&api, &query).await.expect(200)), ["5", "7"]);
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_with_its_place() {
    let api = filled().await;
    for (filter, said) in [
        ("headers.region == 'eu'", "character 17"),
        ("region = 'eu'", "fields are headers.NAME"),
        ("headers.a = ", "expected a field"),
        (&"key = 'a' or ".repeat(400), "4096"),
    ] {
        let problem = fetch(&api, &[("filter", filter)])
            .await
            .problem(400, "invalid_request");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(said), "{detail}");
    }
    let request = request(&api, &[("filter", "offset > 3")])
        .header("accept", "application/vnd.quorate.batches");
    api.send(request).await.problem(400, "invalid_request");
}

#[tokio::test]
async fn every_queue_of_a_fetch_over_many_has_its_own() {
    let api = filled().await;
    api.store("t", 1, &["x", "y"]).await;
    let from = |queue: u32, more: Value| {
        let mut from = json!({"topic": "t", "queue": queue, "offset": 0});
        from.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        from
    };
    let queues = [
        from(0, json!({"filter": "headers.amount < 3", "tag": "paid"})),
        from(0, json!({"filter": "headers.amount > 28"})),
        from(1, json!({})),
    ];
    let found = api
        .post("/v1/fetch", &json!({"queues": queues}))
        .await
        .expect(200);
    let results = found["results"].as_array().unwrap();
    assert_eq!(values(&results[0]), ["1"]);
    assert_eq!(values(&results[1]), ["19"]);
    assert_eq!(values(&results[2]), ["x", "y"]);
    let bad = json!({"queues": [from(0, json!({"filter": "offset = 'a'"}))]});
    api.post("/v1/fetch", &bad)
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn a_stream_gives_only_what_the_filter_takes() -> Result<()> {
    let api = filled().await;
    let request =
        request(&api, &[("filter", "headers.amount > 25")]).header("accept", "text/event-stream");
    let mut response = request.send().await?;
    assert_eq!(response.status(), 200);
    let late = json!({"messages": [
        {"value": "small", "queue": 0, "headers": {"amount": "1"}},
        {"value": "large", "queue": 0, "headers": {"amount": "100"}}]});
    api.post("/v1/topics/t/messages", &late).await.expect(200);
    let mut text = String::new();
    while !text.contains("\"large\"") {
        let piece = tokio::time::timeout(crate::support::PATIENCE, response.chunk()).await??;
        text.push_str(std::str::from_utf8(&piece.expect("the stream goes on"))?);
    }
    let ids: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .collect();
    assert_eq!(ids, ["17", "18", "19", "22"]);
    Ok(())
}

#[tokio::test]
async fn the_command_line_takes_a_filter_whether_it_reads_or_is_a_member() {
    let api = filled().await;
    let filter = ["--filter", "headers.region = 'us' and headers.amount > 24"];
    let read = ["consume", "t", "--format", "value"];
    let printed = api.quorate(&[&read[..], &filter].concat()).await;
    assert_eq!(printed, "17\n19\n");
    let member = ["--group", "g", "--follow", "--max", "2"];
    let printed = api.quorate(&[&read[..], &filter, &member].concat()).await;
    assert_eq!(printed, "17\n19\n");
}
