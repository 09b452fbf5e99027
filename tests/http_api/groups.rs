//! Consumer groups with members: join, share out, commit, leave, and what is told of them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::{Answer, Api};
use crate::live::Events;
use crate::support::{PATIENCE, eventually};

const MEMBERS: &str = "/v1/groups/g/members";

/// A member as a client knows itself.
struct Member {
    id: String,
    epoch: u64,
    assignment: Vec<Value>,
}

impl Member {
    async fn join(api: &Api, more: Value) -> Self {
        let mut body = json!({"topics": ["t"]});
        let fields = more.as_object().cloned().unwrap_or_default();
        body.as_object_mut().unwrap().extend(fields);
        let answer = api.post(MEMBERS, &body).await.expect(201);
        Self {
            id: answer["member_id"].as_str().unwrap().to_owned(),
            epoch: answer["epoch"].as_u64().unwrap(),
            assignment: answer["assignment"].as_array().unwrap().clone(),
        }
    }

    fn path(&self) -> String {
        format!("{MEMBERS}/{}", self.id)
    }

    fn queues(&self) -> Vec<u64> {
        let each = self.assignment.iter();
        each.map(|q| q["queue"].as_u64().unwrap()).collect()
    }

    fn owned(&self) -> Vec<Value> {
        let each = self.assignment.iter();
        each.map(|q| json!({"topic": q["topic"], "queue": q["queue"]}))
            .collect()
    }

    async fn send_beat(&self, api: &Api) -> Answer {
        let body = json!({"epoch": self.epoch, "owned": self.owned()});
        api.post(&format!("{}/heartbeat", self.path()), &body).await
    }

    async fn beat(&mut self, api: &Api) -> Vec<u64> {
        let answer = self.send_beat(api).await.expect(200);
        self.epoch = answer["epoch"].as_u64().unwrap();
        self.assignment = answer["assignment"].as_array().unwrap().clone();
        self.queues()
    }

    async fn commit(&self, api: &Api, queue: u64, offset: u64) -> Answer {
        let body = json!({
            "offsets": [{"topic": "t", "queue": queue, "offset": offset}],
            "member": {"id": self.id, "epoch": self.epoch},
        });
        api.call(Method::PUT, "/v1/groups/g/offsets", &body).await
    }
}

#[tokio::test]
async fn queues_are_shared_out_and_change_hands_in_turn() {
    let api = Api::start().await.unwrap();
    api.topic("t", 4).await;
    api.store("t", 3, &["a", "b"]).await;
    let mut first = Member::join(&api, json!({})).await;
    assert_eq!(first.queues(), [0, 1, 2, 3]);
    assert_eq!(
        first.assignment[0],
        json!({"topic": "t", "queue": 0, "offset": 0})
    );
    first.commit(&api, 3, 1).await.expect(200);
    let mut second = Member::join(&api, json!({})).await;
    assert_eq!(second.queues(), [0u64; 0], "the first has not stopped yet");
    let described = api.get("/v1/groups/g").await.expect(200);
    assert_eq!(described["state"], "rebalancing", "{described}");

    let before = first.epoch;
    assert_eq!(first.beat(&api).await, [0, 1]);
    assert!(first.epoch > before);
    assert_eq!(second.beat(&api).await, [0u64; 0], "it was only told");
    // Until then what it did can be committed.
    first.commit(&api, 3, 2).await.expect(200);
    first.beat(&api).await;
    assert_eq!(second.beat(&api).await, [2, 3]);
    assert_eq!(second.assignment[1]["offset"], 2);
    let fenced = first.commit(&api, 3, 2).await;
    fenced.problem(409, "fenced_member");
    second.commit(&api, 3, 2).await.expect(200);

    let described = api.get("/v1/groups/g").await.expect(200);
    assert_eq!(
        (&described["state"], &described["mode"], &described["kind"]),
        (&json!("stable"), &json!("cluster"), &json!("offsets"))
    );
    let members = described["members"].as_array().unwrap();
    assert_eq!(members.len(), 2, "{described}");
    for member in members {
        assert_eq!(member["assignment"].as_array().unwrap().len(), 2);
        assert!(member["last_heartbeat_age_ms"].as_u64().unwrap() < 10_000);
    }
    let place = &described["offsets"][3];
    assert_eq!(
        (&place["member_id"], &place["offset"], &place["lag"]),
        (&json!(second.id), &json!(2), &json!(0))
    );
    let metrics = api.get("/metrics").await.text();
    assert!(metrics.contains("quorate_group_members 2"), "{metrics}");
    let listed = api.get("/v1/groups").await.expect(200);
    assert_eq!(
        listed,
        json!({"groups": [{"group": "g", "kind": "offsets", "members": 2}]})
    );

    // Who leaves is replaced at once.
    api.send(api.request(Method::DELETE, &second.path()))
        .await
        .expect(204);
    assert_eq!(first.beat(&api).await, [0, 1, 2, 3]);
    second
        .send_beat(&api)
        .await
        .problem(404, "member_not_found");
    api.send(api.request(Method::DELETE, &second.path()))
        .await
        .problem(404, "member_not_found");
}

#[tokio::test]
async fn a_silent_member_is_replaced_in_time_and_fenced() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a"]).await;
    let silent = std::time::Instant::now();
    let gone = Member::join(&api, json!({"session_timeout_ms": 1000})).await;
    let mut other = Member::join(&api, json!({})).await;
    let queues = async |other: &mut Member| {
        let queues = other.beat(&api).await;
        if queues != [0, 1] {
            bail!("{queues:?}");
        }
        anyhow::Ok(())
    };
    while queues(&mut other).await.is_err() {
        assert!(silent.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = silent.elapsed();
    assert!(took > Duration::from_millis(1000), "{took:?}");
    println!("a member with a session of 1 s was replaced after {took:?}");
    gone.commit(&api, 0, 1).await.problem(409, "fenced_member");
    gone.send_beat(&api).await.problem(404, "member_not_found");
}

#[tokio::test]
async fn the_same_instance_is_the_same_member() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let first = Member::join(&api, json!({"instance_id": "host-3"})).await;
    let again = Member::join(&api, json!({"instance_id": "host-3"})).await;
    assert_eq!(first.id, again.id);
    assert!(again.epoch > first.epoch);
    assert_eq!(again.queues(), [0, 1]);
    first.send_beat(&api).await.problem(409, "fenced_member");
    first.commit(&api, 0, 0).await.problem(409, "fenced_member");
    let former = format!("{}?epoch={}", first.path(), first.epoch);
    api.send(api.request(Method::DELETE, &former))
        .await
        .problem(409, "fenced_member");
    again.commit(&api, 0, 0).await.expect(200);
}

#[tokio::test]
async fn a_group_begins_where_it_says_unless_it_has_committed() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    let mut member = Member::join(&api, json!({"start": "latest"})).await;
    assert_eq!(member.assignment[0]["offset"], 2);
    api.store("t", 0, &["c"]).await;
    member.beat(&api).await;
    assert_eq!(member.assignment[0]["offset"], 2, "nothing is passed over");
    member.commit(&api, 0, 3).await.expect(200);
    let path = member.path();
    api.send(api.request(Method::DELETE, &path))
        .await
        .expect(204);
    let member = Member::join(&api, json!({"start": "earliest"})).await;
    assert_eq!(
        member.assignment[0]["offset"], 3,
        "what was committed counts"
    );
    let body = json!({"topics": ["t"], "start": {"timestamp_ms": 0}});
    let by_time = api.post("/v1/groups/h/members", &body).await.expect(201);
    assert_eq!(by_time["assignment"][0]["offset"], 0);
}

#[tokio::test]
async fn topics_that_grow_go_or_come_are_noticed() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let body = json!({"topics": ["later", "t"]});
    let joined = api.post(MEMBERS, &body).await.expect(201);
    assert_eq!(joined["missing_topics"], json!(["later"]));
    let mut member = Member {
        id: joined["member_id"].as_str().unwrap().to_owned(),
        epoch: joined["epoch"].as_u64().unwrap(),
        assignment: joined["assignment"].as_array().unwrap().clone(),
    };
    assert_eq!(member.queues(), [0]);
    let mut has = async |expected: Value| {
        let mut last = Value::Null;
        for _ in 0..500 {
            member.beat(&api).await;
            last = json!(member.owned());
            if last == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{last} is not {expected}");
    };
    api.call(Method::PATCH, "/v1/topics/t", &json!({"queues": 2}))
        .await
        .expect(200);
    let queue = |topic: &str, queue: u32| json!({"topic": topic, "queue": queue});
    has(json!([queue("t", 0), queue("t", 1)])).await;
    api.topic("later", 1).await;
    has(json!([queue("later", 0), queue("t", 0), queue("t", 1)])).await;
    api.send(api.request(Method::DELETE, "/v1/topics/t"))
        .await
        .expect(204);
    has(json!([queue("later", 0)])).await;
}

#[tokio::test]
async fn in_broadcast_everybody_gets_everything_and_has_offsets_of_their_own() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b"]).await;
    let everything = |instance: &str| json!({"mode": "broadcast", "instance_id": instance});
    let one = Member::join(&api, everything("one")).await;
    let two = Member::join(&api, everything("two")).await;
    assert_eq!((one.queues(), two.queues()), (vec![0, 1], vec![0, 1]));
    one.commit(&api, 0, 2).await.expect(200);
    two.commit(&api, 0, 1).await.expect(200);
    let described = api.get("/v1/groups/g").await.expect(200);
    let offsets: BTreeMap<(String, u64), Value> = described["offsets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| {
            let instance = o["instance_id"].as_str().unwrap().to_owned();
            (
                (instance, o["queue"].as_u64().unwrap()),
                o["offset"].clone(),
            )
        })
        .collect();
    assert_eq!(offsets[&("one".to_owned(), 0)], 2);
    assert_eq!(offsets[&("two".to_owned(), 0)], 1);
    let again = Member::join(&api, everything("two")).await;
    assert_eq!(again.assignment[0]["offset"], 1);
    let nameless = json!({"topics": ["t"], "mode": "broadcast"});
    api.post(MEMBERS, &nameless)
        .await
        .problem(400, "invalid_request");
    api.post(MEMBERS, &json!({"topics": ["t"], "mode": "cluster"}))
        .await
        .problem(409, "group_mode_conflict");
}

#[tokio::test]
async fn what_is_refused_while_there_are_members() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    api.store("t", 0, &["a", "b"]).await;
    let member = Member::join(&api, json!({})).await;
    let offsets = json!({"offsets": [{"topic": "t", "queue": 0, "offset": 1}]});
    api.call(Method::PUT, "/v1/groups/g/offsets", &offsets)
        .await
        .problem(409, "fenced_member");
    let reset = "/v1/groups/g/offsets/reset";
    let latest = json!({"topic": "t", "to": "latest"});
    api.post(reset, &latest)
        .await
        .problem(409, "group_has_members");
    let tried = json!({"topic": "t", "to": "latest", "dry_run": true});
    api.post(reset, &tried).await.expect(200);
    let forced = json!({"topic": "t", "to": "latest", "force": true});
    let moved = api.post(reset, &forced).await.expect(200);
    assert_eq!(moved["results"][0]["offset"], 2);
    let beyond = json!({"topic": "t", "to": {"offset": 3}, "force": true});
    let problem = api.post(reset, &beyond).await;
    let problem = problem.problem(416, "offset_out_of_range");
    assert_eq!(problem["end_offset"], 2);

    let group = || api.request(Method::DELETE, "/v1/groups/g");
    api.send(group()).await.problem(409, "group_has_members");
    api.send(api.request(Method::DELETE, &member.path()))
        .await
        .expect(204);
    assert_eq!(api.get("/v1/groups/g").await.expect(200)["state"], "empty");
    api.send(group()).await.expect(204);
    api.send(group())
        .await
        .problem(404, "consumer_group_not_found");
    api.get("/v1/groups/g")
        .await
        .problem(404, "consumer_group_not_found");
    member
        .send_beat(&api)
        .await
        .problem(404, "consumer_group_not_found");
    assert_eq!(
        api.get("/v1/groups").await.expect(200),
        json!({"groups": []})
    );
}

#[tokio::test]
async fn a_group_is_known_by_its_members_alone() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a"]).await;
    api.get("/v1/groups/g/offsets")
        .await
        .problem(404, "consumer_group_not_found");
    Member::join(&api, json!({})).await;
    let offsets = api.get("/v1/groups/g/offsets").await.expect(200);
    let place = &offsets["offsets"][0];
    assert_eq!((&place["offset"], &place["lag"]), (&Value::Null, &json!(1)));
}

#[tokio::test]
async fn a_members_stream_follows_its_queues_and_waits_for_commits() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b", "c", "d"]).await;
    let mut member = Member::join(&api, json!({"session_timeout_ms": 5000})).await;
    let path = |member: &Member| {
        format!(
            "{}/messages?epoch={}&prefetch=2",
            member.path(),
            member.epoch
        )
    };
    let mut events = Events::open(&api, &path(&member), None).await;
    let (kind, assignment) = events.named().await;
    assert_eq!(
        (kind.as_str(), &assignment["epoch"]),
        ("assignment", &json!(member.epoch))
    );
    for value in ["a", "b"] {
        let (kind, message) = events.named().await;
        assert_eq!(
            (kind.as_str(), &message["value"]),
            ("message", &json!(value))
        );
        assert_eq!(
            (&message["topic"], &message["queue"]),
            (&json!("t"), &json!(0))
        );
    }
    // The queue is paused, the other one is not.
    api.store("t", 1, &["x"]).await;
    assert_eq!(events.named().await.1["value"], "x");
    member.commit(&api, 0, 1).await.expect(200);
    assert_eq!(events.named().await.1["value"], "c");

    // Connected longer than its session, it is a member still; the stream gives up what it must.
    let mut other = Member::join(&api, json!({})).await;
    let (kind, assignment) = events.named().await;
    assert_eq!(kind, "assignment", "{assignment}");
    assert_eq!(assignment["assignment"].as_array().unwrap().len(), 1);
    member.epoch = assignment["epoch"].as_u64().unwrap();
    let mut last = Vec::new();
    for _ in 0..500 {
        last = other.beat(&api).await;
        if last.len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(last, [1]);
    // Its end ends the stream.
    api.send(api.request(Method::DELETE, &member.path()))
        .await
        .expect(204);
    let (kind, problem) = events.named().await;
    assert_eq!(
        (kind.as_str(), &problem["code"]),
        ("error", &json!("member_not_found"))
    );
    while events.next().await.unwrap().is_some() {}
    let late = api
        .request(Method::GET, &path(&member))
        .header("accept", "text/event-stream");
    api.send(late).await.problem(404, "member_not_found");
    api.get(&path(&other)).await.problem(400, "invalid_request");
}

#[tokio::test]
async fn a_members_stream_goes_on_behind_what_its_tag_leaves_out() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let message = |n: usize| {
        let tag = ["wanted", "other", "other"][n % 3];
        json!({"value": n.to_string(), "queue": 0, "tag": tag})
    };
    let messages: Vec<Value> = (0..12).map(message).collect();
    api.post("/v1/topics/t/messages", &json!({"messages": messages}))
        .await
        .expect(200);
    let member = Member::join(&api, json!({"tag": "wanted"})).await;
    let path = format!(
        "{}/messages?epoch={}&prefetch=1",
        member.path(),
        member.epoch
    );
    let mut events = Events::open(&api, &path, None).await;
    assert_eq!(events.named().await.0, "assignment");
    for offset in [0, 3, 6, 9] {
        let (_, message) = events.named().await;
        assert_eq!(message["offset"], offset);
        member.commit(&api, 0, offset + 1).await.expect(200);
    }
    api.post("/v1/topics/t/messages", &json!({"messages": [message(12)]}))
        .await
        .expect(200);
    assert_eq!(events.named().await.1["offset"], 12);
}

#[tokio::test]
async fn what_a_members_stream_has_scanned_is_not_scanned_again() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    let message = |queue: u32, a: &str| json!({"queue": queue, "headers": {"a": a}});
    let others: Vec<Value> = (0..5_000).map(|_| message(0, "other")).collect();
    let store = async |messages: &[Value]| {
        let body = json!({"messages": messages});
        api.post("/v1/topics/t/messages", &body).await.expect(200);
    };
    store(&[message(1, "100")]).await;
    // More than a server scans between two looks at the other, paused queue.
    for _ in 0..6 {
        store(&others).await;
    }
    store(&[message(0, "100")]).await;
    let wanted: Vec<String> = (0..200).map(|n| format!("headers.a='{n}'")).collect();
    let member = Member::join(&api, json!({"filter": wanted.join(" or ")})).await;
    let path = format!(
        "{}/messages?epoch={}&prefetch=1",
        member.path(),
        member.epoch
    );
    let mut events = Events::open(&api, &path, None).await;
    assert_eq!(events.named().await.0, "assignment");
    for queue in [1, 0] {
        let next = tokio::time::timeout(PATIENCE, events.named()).await;
        let (_, message) = next.expect("it is found");
        assert_eq!(message["queue"], queue, "{message}");
    }
}

#[tokio::test]
async fn a_members_stream_has_its_filter() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let filter = "headers.region = 'eu' and headers.amount > 2";
    let wrong = json!({"topics": ["t"], "filter": "headers.region =="});
    api.post(MEMBERS, &wrong)
        .await
        .problem(400, "invalid_request");
    let member = Member::join(&api, json!({"filter": filter, "tag": "paid"})).await;
    let described = api.get("/v1/groups/g").await.expect(200);
    assert_eq!(described["members"][0]["filter"], filter);
    let path = format!(
        "{}/messages?epoch={}&prefetch=1",
        member.path(),
        member.epoch
    );
    let mut events = Events::open(&api, &path, None).await;
    assert_eq!(events.named().await.0, "assignment");
    let message = |n: usize| {
        let (region, tag) = (["eu", "us"][n % 2], ["paid", "draft"][n / 2 % 2]);
        json!({"queue": 0, "tag": tag, "headers": {"region": region, "amount": n.to_string()}})
    };
    let messages: Vec<Value> = (0..12).map(message).collect();
    api.post("/v1/topics/t/messages", &json!({"messages": messages}))
        .await
        .expect(200);
    for offset in [4, 8] {
        let (_, message) = events.named().await;
        assert_eq!(message["offset"], offset);
        member.commit(&api, 0, offset + 1).await.expect(200);
    }
}

#[tokio::test]
async fn a_client_that_is_gone_sends_no_heartbeats() {
    let api = Api::start().await.unwrap();
    api.topic("t", 1).await;
    let member = Member::join(&api, json!({"session_timeout_ms": 5000})).await;
    let path = format!("{}/messages?epoch={}", member.path(), member.epoch);
    let mut events = Events::open(&api, &path, None).await;
    events.named().await;
    drop(events);
    let gone = || async {
        let described = api.get("/v1/groups/g").await.expect(200);
        match described["state"].as_str() {
            Some("empty") => Result::<()>::Ok(()),
            _ => bail!("{described}"),
        }
    };
    eventually("the member is expelled", gone).await.unwrap();
}

#[tokio::test]
async fn groups_on_the_command_line() {
    let api = Api::start().await.unwrap();
    api.topic("t", 2).await;
    api.store("t", 0, &["a", "b"]).await;
    api.store("t", 1, &["x"]).await;
    let consume = ["consume", "t", "--group", "g", "--follow", "--max", "2"];
    let printed = api
        .quorate(&[&consume[..], &["--format", "value"]].concat())
        .await;
    assert_eq!(printed.lines().count(), 2, "{printed}");
    // It has committed and left.
    let group = api.get("/v1/groups/g").await.expect(200);
    assert_eq!(
        (&group["state"], &group["lag"]),
        (&json!("empty"), &json!(1))
    );
    let printed = api
        .quorate(&["consume", "t", "--group", "g", "--follow", "--max", "1"])
        .await;
    assert_eq!(printed.lines().count(), 1, "{printed}");
    assert_eq!(api.get("/v1/groups/g").await.expect(200)["lag"], 0);

    let member = Member::join(&api, json!({"instance_id": "host-1"})).await;
    let listed = api.quorate(&["group", "list"]).await;
    assert!(listed.contains("g      offsets        1"), "{listed}");
    let described = api.quorate(&["group", "describe", "g"]).await;
    assert!(
        described.starts_with("g: stable, mode cluster, sticky"),
        "{described}"
    );
    assert!(
        described.contains("host-1") && described.contains("t/0,1"),
        "{described}"
    );
    let members = api.quorate(&["group", "members", "g", "--json"]).await;
    let members: Value = serde_json::from_str(&members).unwrap();
    assert_eq!(members[0]["member_id"], json!(member.id));
    let reset = [
        "group",
        "reset",
        "g",
        "--topic",
        "t",
        "--to-earliest",
        "--force",
    ];
    assert!(api.quorate(&reset).await.contains("BEFORE"));
    api.send(api.request(Method::DELETE, &member.path()))
        .await
        .expect(204);
    assert_eq!(
        api.quorate(&["group", "delete", "g"]).await,
        "deleted consumer group g\n"
    );
}
