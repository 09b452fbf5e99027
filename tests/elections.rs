//! Leaders come and go by themselves: kill, pause and SIGTERM; followers catch up.

mod support;

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::json;
use support::client::Produced;
use support::oracle::Oracle;
use support::{Cluster, eventually};
use tokio::time::Instant;

/// Produces one message, retrying whatever was not acknowledged under a new value.
async fn produce_until_acked(
    client: &support::client::Client,
    oracle: &mut Oracle,
    prefix: &str,
) -> Result<u64> {
    let mut n = 0;
    let deadline = Instant::now() + support::PATIENCE;
    loop {
        n += 1;
        let value = format!("{prefix}-{n}");
        oracle.sent(&value);
        match client
            .produce("t", &json!({"messages": [{"value": value, "queue": 0}]}))
            .await
        {
            Produced::Acked(places) => {
                oracle.acked(places[0], &value)?;
                return Ok(places[0].1);
            }
            Produced::Unknown(why) => {
                if Instant::now() > deadline {
                    bail!("never acknowledged: {why}");
                }
                oracle.unknown.insert(value);
            }
            Produced::Refused(why) if Instant::now() > deadline => {
                bail!("never acknowledged: {why}")
            }
            Produced::Refused(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_leader_is_replaced_and_never_acknowledges_falsely() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    let mut oracle = Oracle::default();
    produce_until_acked(&client, &mut oracle, "before").await?;
    let leader = client.leader("t", 0).await?;
    let old_url = cluster.node(leader).url.clone();
    let others: Vec<String> = cluster
        .urls()
        .into_iter()
        .filter(|u| *u != old_url)
        .collect();
    let survivors = support::client::Client::new(others);

    // Writes on their way through the old leader while it is stopped.
    let stuck = tokio::spawn({
        let old = client.only(&old_url);
        async move {
            old.produce("t", &json!({"messages": [{"value": "stuck", "queue": 0}]}))
                .await
        }
    });
    oracle.sent("stuck");
    cluster.node(leader).pause()?;
    let paused = Instant::now();
    produce_until_acked(&survivors, &mut oracle, "during").await?;
    let gap = paused.elapsed();
    for i in 0..50 {
        produce_until_acked(&survivors, &mut oracle, &format!("during{i}")).await?;
    }
    cluster.node(leader).resume()?;
    match stuck.await? {
        Produced::Acked(places) => oracle.acked(places[0], "stuck")?,
        Produced::Unknown(_) | Produced::Refused(_) => {}
    }
    eventually("the old leader follows", || async {
        let seen = client.only(&old_url).leader("t", 0).await?;
        if seen == leader {
            bail!("node {leader} still names itself");
        }
        Ok(())
    })
    .await?;
    for i in 0..10 {
        produce_until_acked(&client.only(&old_url), &mut oracle, &format!("after{i}")).await?;
    }
    let verdict = oracle.check(&cluster, &client, "t", 1).await?;
    println!("SIGSTOP of the leader: another node acknowledged after {gap:?}; {verdict:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_down_catches_up() -> Result<()> {
    let messages: u64 = std::env::var("QUORATE_CATCH_UP_MESSAGES")
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(20_000);
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    let leader = client.leader("t", 0).await?;
    let follower = leader % 3 + 1;
    cluster.node(follower).kill();
    let urls: Vec<String> = cluster.urls();
    let up: Vec<String> = urls
        .iter()
        .enumerate()
        .filter(|(i, _)| *i as u64 + 1 != follower)
        .map(|(_, u)| u.clone())
        .collect();
    let up = support::client::Client::new(up);
    let mut oracle = Oracle::default();
    let mut n = 0;
    while n < messages {
        let values: Vec<String> = (n..(n + 1000).min(messages))
            .map(|i| format!("m{i}"))
            .collect();
        let batch: Vec<_> = values
            .iter()
            .map(|v| json!({"value": v, "queue": 0}))
            .collect();
        for value in &values {
            oracle.sent(value);
        }
        let places = up.store("t", &json!({ "messages": batch })).await?;
        for (place, value) in places.into_iter().zip(&values) {
            oracle.acked(place, value)?;
        }
        n += values.len() as u64;
    }
    cluster.node(follower).spawn()?;
    let began = Instant::now();
    cluster.wait_ready().await?;
    let verdict = oracle.check(&cluster, &client, "t", 1).await?;
    println!(
        "a follower caught up {messages} messages in {:?}; {verdict:?}",
        began.elapsed()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_hands_over_and_answers_nothing_wrongly() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    let mut oracle = Oracle::default();
    for i in 0..20 {
        produce_until_acked(&client, &mut oracle, &format!("before{i}")).await?;
    }
    let leader = client.leader("t", 0).await?;
    let writing = tokio::spawn({
        let client = client.clone();
        async move {
            let mut oracle = Oracle::default();
            for i in 0..200 {
                produce_until_acked(&client, &mut oracle, &format!("while{i}")).await?;
            }
            anyhow::Ok(oracle)
        }
    });
    let (code, took) = cluster.node(leader).terminate()?;
    if code != Some(0) {
        bail!(
            "exit code {code:?}; {}",
            cluster.node(leader).last_log_lines()
        );
    }
    oracle.merge(writing.await??)?;
    cluster.node(leader).spawn()?;
    cluster.wait_ready().await?;
    let verdict = oracle.check(&cluster, &client, "t", 1).await?;
    println!("SIGTERM of the leader: gone after {took:?}; {verdict:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_writes_end_in_time_and_stale_reads_go_on() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let client = cluster.client();
    client.create_topic("t", 1).await?;
    let mut oracle = Oracle::default();
    produce_until_acked(&client, &mut oracle, "before").await?;
    let url = cluster.nodes[0].url.clone();
    eventually("node 1 has applied the message", || async {
        match client.read_stale(&url, "t", 0).await?.is_empty() {
            true => bail!("nothing yet"),
            false => Ok(()),
        }
    })
    .await?;
    cluster.node(2).kill();
    cluster.node(3).kill();
    let left = client.only(&cluster.nodes[0].url);
    let body = json!({"messages": [{"value": "alone", "queue": 0}]});
    oracle.sent("alone");
    let began = Instant::now();
    let (status, problem) = left
        .request(reqwest::Method::POST, "/v1/topics/t/messages", Some(&body))
        .await?;
    assert!([503, 504].contains(&status.as_u16()), "{status} {problem}");
    assert_eq!(problem["retryable"], json!(true), "{problem}");
    assert!(problem["outcome"].is_string(), "{problem}");
    assert!(began.elapsed() < support::PATIENCE, "bounded time");
    let stale = left.read_stale(&cluster.nodes[0].url, "t", 0).await?;
    assert!(!stale.is_empty(), "a stale read needs nobody");
    cluster.node(2).spawn()?;
    cluster.node(3).spawn()?;
    cluster.wait_ready().await?;
    produce_until_acked(&client, &mut oracle, "after").await?;
    oracle.unknown.insert("alone".to_owned());
    oracle.check(&cluster, &client, "t", 1).await?;
    Ok(())
}
