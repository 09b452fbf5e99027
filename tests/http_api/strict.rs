//! Nothing a client sends is ignored: unknown parameters and fields, hostile names, wrong forms.

use reqwest::Method;
use serde_json::{Value, json};

use crate::api::Api;

/// A path of the reference with harmless values in its places.
fn filled(path: &str) -> String {
    path.replace("{topic}", "orders")
        .replace("{queue}", "0")
        .replace("{group}", "g")
        .replace("{member}", "m")
        .replace("{exchange}", "x")
        .replace("{message_id}", "AAAAAAAA")
        .replace("{transaction}", "00000000000000000000000000000000")
}

fn routes(reference: &Value) -> Vec<(Method, String)> {
    let paths = reference["paths"].as_object().expect("paths");
    let routes = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().expect("methods").keys();
        methods.map(move |method| (method.to_uppercase().parse().expect("method"), path.clone()))
    });
    routes.collect()
}

#[tokio::test]
async fn every_endpoint_refuses_what_it_does_not_know() {
    let api = Api::start().await.unwrap();
    api.topic("orders", 1).await;
    let reference = api.get("/openapi.json").await.expect(200);
    let routes = routes(&reference);
    assert!(routes.len() >= 20, "{routes:?}");
    for (method, path) in &routes {
        let request = api.request(method.clone(), &format!("{}?nonsense=1", filled(path)));
        let body = api
            .send(request.json(&json!({})))
            .await
            .problem(400, "invalid_request");
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.contains("nonsense") && detail.contains("allowed here"),
            "{path}: {detail}"
        );
        let write = *method != Method::GET && path != "/v1/fetch";
        assert_eq!(
            body["outcome"] == "not_committed",
            write,
            "{method} {path}: {body}"
        );
    }
    for (method, path) in &routes {
        if *method == Method::GET || *method == Method::DELETE {
            continue;
        }
        let body = json!({"nonsense": 1});
        let body = api
            .call(method.clone(), &filled(path), &body)
            .await
            .problem(400, "invalid_request");
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.contains("`nonsense`")
                && (detail.contains("expected") || detail.contains("there are no fields")),
            "{path}: {detail}"
        );
    }
}

#[tokio::test]
async fn hostile_names_are_refused_everywhere() {
    let api = Api::start().await.unwrap();
    let long = "x".repeat(121);
    for name in [
        "..%2F..%2Fetc%2Fpasswd",
        "_internal",
        ".hidden",
        "a%20b",
        "a%00b",
        "%C3%A4",
        "a%0Ab",
        "a:b",
        "%2A",
        long.as_str(),
    ] {
        for path in [
            format!("/v1/topics/{name}"),
            format!("/v1/topics/{name}/queues/0/messages"),
            format!("/v1/topics/{name}/queues/0/offset?timestamp_ms=1"),
            format!("/v1/groups/{name}/offsets"),
            format!("/v1/groups/{name}/members/m/messages?epoch=1"),
        ] {
            let body = api.get(&path).await.problem(400, "invalid_name");
            assert!(
                body["detail"]
                    .as_str()
                    .unwrap()
                    .contains("1 to 120 characters"),
                "{body}"
            );
        }
    }
    for name in [
        "../x",
        "",
        "_dlq.g",
        "a/b",
        "a\\b",
        "\u{0}",
        "ä",
        long.as_str(),
    ] {
        let answer = api.post("/v1/topics", &json!({"name": name})).await;
        assert_eq!(
            answer.problem(400, "invalid_name")["outcome"],
            "not_committed"
        );
    }
    let body = json!({"offsets": [{"topic": "../x", "queue": 0, "offset": 0}]});
    api.call(Method::PUT, "/v1/groups/g/offsets", &body)
        .await
        .problem(400, "invalid_name");
    let body = json!({"queues": [{"topic": "../x", "queue": 0, "offset": 0}]});
    api.post("/v1/fetch", &body)
        .await
        .problem(400, "invalid_name");
    api.post("/v1/producers", &json!({"name": "../x"}))
        .await
        .problem(400, "invalid_name");
    for queue in ["-1", "x", "99999999999"] {
        let path = format!("/v1/topics/t/queues/{queue}/messages");
        api.get(&path).await.problem(400, "invalid_request");
    }
}

#[tokio::test]
async fn unknown_places_methods_and_forms() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    for path in ["/", "/v1", "/v1/nothing", "/v1/topics/", "/v2/topics"] {
        api.get(path).await.problem(404, "not_found");
    }
    let answer = api.send(api.request(Method::DELETE, "/v1/topics")).await;
    answer.problem(405, "method_not_allowed");
    assert!(
        answer.header("allow").contains("POST"),
        "{:?}",
        answer.headers
    );
    let form = "application/x-www-form-urlencoded";
    for (path, media) in [
        ("/v1/topics", form),
        ("/v1/topics/t/messages", form),
        ("/v1/topics/t/messages", "text/plain"),
        ("/v1/fetch", "application/octet-stream"),
    ] {
        let body = api
            .post_as(path, media, "{}")
            .await
            .problem(400, "invalid_request");
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.contains(media) && detail.contains("application/json"),
            "{detail}"
        );
    }
    for (text, said) in [
        ("{\"name\":", "line 1 column 8"),
        ("[]", "line 1 column"),
        ("", "empty"),
        ("{\"name\":\"t\",\n\"queues\":\"four\"}", "line 2 column"),
    ] {
        let answer = api.post_as("/v1/topics", "application/json", text).await;
        let body = answer.problem(400, "invalid_request");
        assert!(
            body["detail"].as_str().unwrap().contains(said),
            "{text}: {body}"
        );
    }
}

#[tokio::test]
async fn a_request_too_large_is_413_in_every_form() {
    let api = Api::start_with("[limits]\nmax_message_bytes = 20000\n")
        .await
        .unwrap();
    api.topic("t", 1).await;
    let huge = "x".repeat(17 << 20);
    let path = "/v1/topics/t/messages";
    for media in [
        "application/json",
        "application/octet-stream",
        "application/vnd.quorate.batches",
    ] {
        let path = if media.ends_with("batches") {
            format!("{path}?queue=0")
        } else {
            path.to_owned()
        };
        let body = api
            .post_as(&path, media, huge.clone())
            .await
            .problem(413, "request_too_large");
        assert_eq!(body["outcome"], "not_committed");
        assert_eq!(body["retryable"], false);
    }
    // One line without an end is no message either.
    let answer = api.post_as(path, "application/x-ndjson", huge).await;
    answer.problem(413, "request_too_large");
    let body = json!({"name": "u", "max_message_bytes": 20_001});
    api.post("/v1/topics", &body)
        .await
        .problem(400, "invalid_request");
}

#[tokio::test]
async fn a_list_is_no_object() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let lists = [
        (Method::POST, "/v1/topics", json!(["u", 1])),
        (
            Method::POST,
            "/v1/topics/t/messages",
            json!([[{"value": "a"}]]),
        ),
        (
            Method::POST,
            "/v1/topics/t/messages",
            json!({"messages": [["a"]]}),
        ),
        (
            Method::PUT,
            "/v1/groups/g/offsets",
            json!({"offsets": [["t", 0, 0]]}),
        ),
        (Method::POST, "/v1/fetch", json!({"queues": [["t", 0, 0]]})),
        (Method::POST, "/v1/producers", json!(["name"])),
    ];
    for (method, path, body) in lists {
        let answer = api.send(api.request(method, path).json(&body)).await;
        answer.problem(400, "invalid_request");
    }
}
