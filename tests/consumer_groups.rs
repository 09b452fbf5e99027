//! Consumer groups on a real cluster: leaders die and nobody is expelled; consumers die and nothing
//! is left behind.
//!
//! `QUORATE_GROUPS_SECONDS=300` makes the second one longer; figures are printed (`--nocapture`).

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use quorate::coordinator::owner_of_name;
use rand::Rng;
use rand::seq::IndexedRandom;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::client::{Client, Produced};
use support::{Cluster, eventually};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

const QUEUES: u32 = 8;
const CONSUMERS: usize = 10;
const SESSION_MS: u64 = 2_000;
/// How many there are where the configuration doesn't say.
const COORDINATORS: usize = 16;

async fn post(client: &Client, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
    client.request(Method::POST, path, Some(body)).await
}

fn number(value: &Value, field: &str) -> Result<u64> {
    value[field]
        .as_u64()
        .with_context(|| format!("no {field} in {value}"))
}

fn queues_of(assignment: &Value) -> Vec<Value> {
    let each = assignment.as_array().into_iter().flatten();
    each.map(|q| json!({"topic": q["topic"], "queue": q["queue"]}))
        .collect()
}

/// A member that only lives: its heartbeats tell it what it has.
async fn beat(client: &Client, id: &str, epoch: u64, assignment: &Value) -> Result<Value> {
    let body = json!({"epoch": epoch, "owned": queues_of(assignment)});
    let path = format!("/v1/groups/g/members/{id}/heartbeat");
    let (status, answer) = post(client, &path, &body).await?;
    ensure!(status == StatusCode::OK, "{status} {answer}");
    Ok(answer)
}

/// Whichever node dies: the one that leads the group's coordinator, the one that leads the catalog,
/// or another, the members stay, with the same epochs and queues.
#[tokio::test(flavor = "multi_thread")]
async fn no_leaders_death_moves_a_queue() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 4).await?;
    let mut members = Vec::new();
    for _ in 0..2 {
        let body = json!({"topics": ["t"], "session_timeout_ms": 30_000});
        let (status, joined) = post(&client, "/v1/groups/g/members", &body).await?;
        ensure!(status == StatusCode::CREATED, "{status} {joined}");
        let id = joined["member_id"].as_str().context("no id")?.to_owned();
        members.push((id, number(&joined, "epoch")?, joined["assignment"].clone()));
    }
    // Two rounds: the first tells, the second gives.
    for _ in 0..3 {
        for (id, epoch, assignment) in &mut members {
            let answer = beat(&client, id, *epoch, assignment).await?;
            *epoch = number(&answer, "epoch")?;
            *assignment = answer["assignment"].clone();
        }
    }
    for (_, _, assignment) in &members {
        ensure!(
            assignment.as_array().is_some_and(|a| a.len() == 2),
            "{assignment}"
        );
    }
    for node in 1..=3 {
        cluster.node(node).kill();
        let left: Vec<String> = cluster
            .nodes
            .iter()
            .filter(|n| n.id != node)
            .map(|n| n.url.clone())
            .collect();
        let client = Client::new(left);
        for (id, epoch, assignment) in &members {
            let answer = eventually("a heartbeat is answered", || {
                beat(&client, id, *epoch, assignment)
            })
            .await?;
            ensure!(number(&answer, "epoch")? == *epoch, "{answer}");
            ensure!(answer["assignment"] == *assignment, "{answer}");
            // What was committed counts as before, and can be committed on.
            let queue = assignment[0]["queue"].clone();
            let body = json!({
                "offsets": [{"topic": "t", "queue": queue, "offset": 0}],
                "member": {"id": id, "epoch": epoch},
            });
            eventually("a commit is taken", || async {
                let path = "/v1/groups/g/offsets";
                let (status, answer) = client.request(Method::PUT, path, Some(&body)).await?;
                ensure!(status == StatusCode::OK, "{status} {answer}");
                Ok(())
            })
            .await?;
        }
        cluster.node(node).spawn()?;
        cluster.wait_ready().await?;
    }
    Ok(())
}

/// Who leads the coordinator that owns the group, by the nodes' own account.
async fn leader_for(cluster: &Cluster, group: &str) -> Result<u64> {
    let holds = format!("coordinator {}", owner_of_name(group, COORDINATORS));
    for node in &cluster.nodes {
        let client = cluster.client().only(&node.url);
        let held = client.get("/v1/cluster/replicas").await?;
        let mut held = held["replicas"].as_array().into_iter().flatten();
        if held.any(|r| r["holds"] == holds && r["role"] == "leader") {
            return Ok(node.id);
        }
    }
    bail!("nobody leads {holds}")
}

/// Heartbeats at a steady pace, whether the earlier ones are answered or not.
struct Steady {
    beating: JoinHandle<()>,
    answered: Arc<AtomicUsize>,
    /// Answers that say it is no member, or another one than it was.
    refused: Arc<Mutex<Vec<Value>>>,
}

impl Steady {
    fn begin(client: Client, id: String, epoch: u64, assignment: Value) -> Self {
        let answered: Arc<AtomicUsize> = Arc::default();
        let refused: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (heard, wrong) = (answered.clone(), refused.clone());
        let beating = tokio::spawn(async move {
            let owned = queues_of(&assignment);
            loop {
                let body = json!({"epoch": epoch, "owned": owned});
                let path = format!("/v1/groups/g/members/{id}/heartbeat");
                let client = client.clone();
                let (heard, wrong) = (heard.clone(), wrong.clone());
                tokio::spawn(async move {
                    match post(&client, &path, &body).await {
                        Ok((StatusCode::OK, answer)) if answer["epoch"] == epoch => {
                            heard.fetch_add(1, Ordering::SeqCst);
                        }
                        Ok((status, answer)) if !status.is_server_error() => {
                            wrong.lock().push(answer);
                        }
                        _ => {}
                    }
                });
                sleep(Duration::from_millis(250)).await;
            }
        });
        Self {
            beating,
            answered,
            refused,
        }
    }

    async fn is_answered(&self) -> Result<()> {
        let before = self.answered.load(Ordering::SeqCst);
        let refused = eventually("a heartbeat is answered", || async {
            let refused = self.refused.lock().clone();
            let answered = self.answered.load(Ordering::SeqCst) > before;
            ensure!(answered || !refused.is_empty());
            Ok(refused)
        });
        let refused = refused.await?;
        ensure!(refused.is_empty(), "{refused:?}");
        Ok(())
    }
}

/// Most nodes sleep for longer than the sessions last, and one of them comes back at this moment or
/// that. The members went on all the time, and stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_majority_is_not_the_members_fault() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 4).await?;
    let body = json!({"topics": ["t"], "session_timeout_ms": 4_500});
    let (status, joined) = post(&client, "/v1/groups/g/members", &body).await?;
    ensure!(status == StatusCode::CREATED, "{status} {joined}");
    let id = joined["member_id"].as_str().context("no id")?;
    let epoch = number(&joined, "epoch")?;
    // What became of the member is asked from the end of its session on, for some seconds.
    for asleep_ms in [5_000, 5_600] {
        let leader = eventually("it is led", || leader_for(&cluster, "g")).await?;
        let awake = cluster.nodes.iter().find(|node| node.id == leader);
        let at_leader = client.only(&awake.context("a node")?.url);
        let assignment = joined["assignment"].clone();
        let steady = Steady::begin(at_leader, id.to_owned(), epoch, assignment);
        steady.is_answered().await?;
        let others = cluster.nodes.iter().filter(|node| node.id != leader);
        let others: Vec<_> = others.collect();
        for node in &others {
            node.pause()?;
        }
        sleep(Duration::from_millis(asleep_ms)).await;
        for node in &others {
            node.resume()?;
            let answered = steady.is_answered().await;
            answered.with_context(|| format!("after {asleep_ms} ms"))?;
        }
        cluster.wait_ready().await?;
        steady.is_answered().await?;
        steady.beating.abort();
    }
    Ok(())
}

/// Where a queue can't tell its end, a member that begins there gets the others, and once it can, that
/// one too.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_a_replica_keeps_nobody_out_of_the_others() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    let topic = json!({"name": "t", "queues": 3, "replicas": 1});
    client.create_topic_with(topic).await?;
    let described = client.get("/v1/topics/t").await?;
    let on = |queue: u64| described["queues"][queue as usize]["replicas"][0].as_u64();
    let dead = on(0).context("no replica")?;
    let alive: Vec<u64> = (0..3).filter(|queue| on(*queue) != Some(dead)).collect();
    cluster.node(dead).kill();
    let left = cluster.nodes.iter().filter(|node| node.id != dead);
    let survivors = Client::new(left.map(|node| node.url.clone()).collect());
    eventually("the coordinator has a leader again", || async {
        let (status, answer) = survivors.request(Method::GET, "/v1/groups", None).await?;
        ensure!(status == StatusCode::OK, "{status} {answer}");
        Ok(())
    })
    .await?;
    let body = json!({"topics": ["t"], "start": "latest", "session_timeout_ms": 60_000});
    let (status, joined) = post(&survivors, "/v1/groups/g/members", &body).await?;
    ensure!(status == StatusCode::CREATED, "{status} {joined}");
    let numbers = |assignment: &Value| -> Vec<u64> {
        let each = assignment.as_array().into_iter().flatten();
        each.filter_map(|q| q["queue"].as_u64()).collect()
    };
    ensure!(numbers(&joined["assignment"]) == alive, "{joined}");
    let group = survivors.get("/v1/groups/g").await?;
    ensure!(
        group["members"]
            .as_array()
            .is_some_and(|all| all.len() == 1),
        "{group}"
    );
    let offsets = survivors.get("/v1/groups/g/offsets?topic=t").await?;
    for place in [&group["offsets"], &offsets["offsets"]] {
        let known = place.as_array().into_iter().flatten();
        let known = known.filter(|q| q["end_offset"].is_u64() && q["lag"].is_u64());
        let known: Vec<u64> = known.filter_map(|q| q["queue"].as_u64()).collect();
        ensure!(known == alive, "{place}");
    }

    cluster.node(dead).spawn()?;
    cluster.wait_ready().await?;
    let id = joined["member_id"].as_str().context("no id")?;
    let epoch = number(&joined, "epoch")?;
    eventually("the queue is back", || async {
        let answer = beat(&survivors, id, epoch, &joined["assignment"]).await?;
        ensure!(numbers(&answer["assignment"]) == [0, 1, 2], "{answer}");
        Ok(())
    })
    .await
}

/// What all consumers did, as the test sees it.
#[derive(Default)]
struct Tally {
    /// How often each message was processed.
    seen: BTreeMap<(u64, u64), u32>,
    /// By queue: who has it, and since when.
    owners: BTreeMap<u64, (usize, Instant)>,
}

struct Consumer {
    number: usize,
    client: Client,
    tally: Arc<Mutex<Tally>>,
    id: String,
    epoch: u64,
    interval: Duration,
    /// By queue: the next offset.
    lanes: BTreeMap<u64, u64>,
}

impl Consumer {
    async fn join(number: usize, client: Client, tally: Arc<Mutex<Tally>>) -> Result<Self> {
        let mut consumer = Self {
            number,
            client,
            tally,
            id: String::new(),
            epoch: 0,
            interval: Duration::ZERO,
            lanes: BTreeMap::new(),
        };
        consumer.join_again().await?;
        Ok(consumer)
    }

    async fn join_again(&mut self) -> Result<()> {
        let body = json!({
            "topics": ["t"],
            "session_timeout_ms": SESSION_MS,
            "instance_id": format!("consumer-{}", self.number),
        });
        let (status, joined) = post(&self.client, "/v1/groups/g/members", &body).await?;
        ensure!(status == StatusCode::CREATED, "{status} {joined}");
        self.id = joined["member_id"].as_str().context("no id")?.to_owned();
        self.interval = Duration::from_millis(number(&joined, "heartbeat_interval_ms")?);
        self.lanes.clear();
        self.follow(&joined)
    }

    fn follow(&mut self, answer: &Value) -> Result<()> {
        self.epoch = number(answer, "epoch")?;
        let mut lanes = BTreeMap::new();
        for assigned in answer["assignment"].as_array().into_iter().flatten() {
            let (queue, offset) = (number(assigned, "queue")?, number(assigned, "offset")?);
            let known = self.lanes.get(&queue).copied();
            if known.is_none() {
                let mut tally = self.tally.lock();
                tally.owners.insert(queue, (self.number, Instant::now()));
            }
            lanes.insert(queue, known.unwrap_or(offset));
        }
        self.lanes = lanes;
        Ok(())
    }

    /// Consumes until it is aborted, like a process that is killed.
    async fn run(mut self) {
        let mut beat_at = Instant::now() + self.interval;
        loop {
            if Instant::now() >= beat_at {
                beat_at = Instant::now() + self.interval;
                self.heartbeat().await;
            }
            if self.lanes.is_empty() {
                sleep_until(beat_at).await;
            } else if self.work().await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn heartbeat(&mut self) {
        let owned: Vec<Value> = self
            .lanes
            .keys()
            .map(|queue| json!({"topic": "t", "queue": queue}))
            .collect();
        let body = json!({"epoch": self.epoch, "owned": owned});
        let path = format!("/v1/groups/g/members/{}/heartbeat", self.id);
        let fenced = match post(&self.client, &path, &body).await {
            Ok((StatusCode::OK, answer)) => self.follow(&answer).is_err(),
            Ok((StatusCode::NOT_FOUND | StatusCode::CONFLICT, _)) => true,
            _ => false,
        };
        if fenced {
            self.join_again().await.ok();
        }
    }

    async fn work(&mut self) -> Result<()> {
        let queues: Vec<Value> = self
            .lanes
            .iter()
            .map(|(queue, offset)| json!({"topic": "t", "queue": queue, "offset": offset}))
            .collect();
        let body = json!({"queues": queues, "max_messages": 50, "wait_ms": 100});
        let (status, answer) = post(&self.client, "/v1/fetch", &body).await?;
        ensure!(status == StatusCode::OK, "{status}");
        let mut offsets = Vec::new();
        for found in answer["results"].as_array().into_iter().flatten() {
            let queue = number(found, "queue")?;
            let messages = found["messages"].as_array().context("no messages")?;
            if messages.is_empty() {
                continue;
            }
            // Work takes time; who dies in it leaves what is processed and not committed.
            sleep(Duration::from_millis(2)).await;
            let mut tally = self.tally.lock();
            for message in messages {
                let place = (queue, number(message, "offset")?);
                *tally.seen.entry(place).or_default() += 1;
            }
            let next = number(found, "next_offset")?;
            offsets.push(json!({"topic": "t", "queue": queue, "offset": next}));
            self.lanes.insert(queue, next);
        }
        if offsets.is_empty() {
            return Ok(());
        }
        let body = json!({"offsets": offsets, "member": {"id": self.id, "epoch": self.epoch}});
        let path = "/v1/groups/g/offsets";
        let (status, answer) = self.client.request(Method::PUT, path, Some(&body)).await?;
        if status != StatusCode::OK {
            bail!("{status} {answer}");
        }
        Ok(())
    }
}

/// Ten consumers share eight queues. Again and again three of them are killed, the others take over,
/// and the three come back; every message is processed.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_die_and_every_message_is_processed() -> Result<()> {
    let long = std::env::var("QUORATE_GROUPS_SECONDS").ok();
    let measured = long.is_some();
    let seconds = match long {
        Some(text) => text.parse().context("QUORATE_GROUPS_SECONDS")?,
        None => 12,
    };
    let cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", QUEUES).await?;
    let tally: Arc<Mutex<Tally>> = Arc::default();
    let mut consumers: BTreeMap<usize, JoinHandle<()>> = BTreeMap::new();
    for number in 0..CONSUMERS {
        let consumer = Consumer::join(number, client.clone(), tally.clone()).await?;
        consumers.insert(number, tokio::spawn(consumer.run()));
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let producing = tokio::spawn(produce(client.clone(), until));
    let (mut kills, mut rebalances) = (0, Vec::new());
    while Instant::now() < until {
        eventually("every queue has a living owner", || async {
            ensure!(tally.lock().owners.len() == QUEUES as usize);
            Ok(())
        })
        .await?;
        let victims: Vec<usize> = {
            let all: Vec<usize> = consumers.keys().copied().collect();
            all.choose_multiple(&mut rand::rng(), 3).copied().collect()
        };
        let killed_at = Instant::now();
        let owners = tally.lock().owners.clone();
        for victim in &victims {
            consumers.remove(victim).context("alive")?.abort();
            kills += 1;
        }
        let lost = owners
            .iter()
            .filter(|(_, (owner, _))| victims.contains(owner));
        for queue in lost.map(|(queue, _)| *queue) {
            let (tally, victims) = (&tally, &victims);
            let taken = eventually("its queues are taken over", || async move {
                let (owner, since) = tally.lock().owners[&queue];
                ensure!(
                    !victims.contains(&owner) && since > killed_at,
                    "queue {queue}"
                );
                Ok(since)
            });
            rebalances.push(taken.await? - killed_at);
        }
        for victim in victims {
            let consumer = eventually("it joins again", || {
                Consumer::join(victim, client.clone(), tally.clone())
            });
            consumers.insert(victim, tokio::spawn(consumer.await?.run()));
        }
        // Some rounds begin in the middle of the rebalance that the last one caused.
        let pause = Duration::from_millis(rand::rng().random_range(0..3_000));
        sleep_until((Instant::now() + pause).min(until)).await;
    }
    let produced = producing.await??;
    eventually("the group has no lag", || async {
        let group = client.get("/v1/groups/g").await?;
        ensure!(number(&group, "lag")? == 0, "{}", group["lag"]);
        Ok(())
    })
    .await?;
    let tally = tally.lock();
    for place in &produced {
        ensure!(tally.seen.contains_key(place), "never processed: {place:?}");
    }
    let processed: u64 = tally.seen.values().map(|n| u64::from(*n)).sum();
    let again = processed - tally.seen.len() as u64;
    rebalances.sort();
    let p50 = rebalances.get(rebalances.len() / 2).copied();
    let p50 = p50.unwrap_or_default();
    let max = rebalances.last().copied().unwrap_or_default();
    println!(
        "{} messages, {kills} kills, processed again: {again} ({:.3} %); {} queues taken over after p50 {p50:?}, max {max:?} (session {SESSION_MS} ms)",
        produced.len(),
        100.0 * again as f64 / produced.len() as f64,
        rebalances.len(),
    );
    ensure!(
        !rebalances.is_empty(),
        "nobody who owned a queue was killed"
    );
    // Beside other tests a machine may be too slow for a promise about time.
    let late = max > Duration::from_millis(SESSION_MS) + Duration::from_secs(5);
    ensure!(!(late && measured), "{rebalances:?}");
    for (_, consumer) in consumers {
        consumer.abort();
    }
    cluster.replicas_agree()
}

/// Writes to all queues until it is time; gives the places of what was acknowledged.
async fn produce(client: Client, until: Instant) -> Result<Vec<(u64, u64)>> {
    let mut places = Vec::new();
    while Instant::now() < until {
        let messages: Vec<Value> = (0..QUEUES * 5)
            .map(|n| json!({"value": "x", "queue": n % QUEUES}))
            .collect();
        if let Produced::Acked(acked) = client.produce("t", &json!({"messages": messages})).await {
            places.extend(acked.iter().map(|(q, offset)| (u64::from(*q), *offset)));
        }
        sleep(Duration::from_millis(20)).await;
    }
    ensure!(!places.is_empty(), "nothing was produced");
    Ok(places)
}
