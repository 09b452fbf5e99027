//! The points service: every order is worth its amount in points, once.
//!
//! Where it stands in each queue is in its own database, written in one local transaction with the
//! points. So a message is never counted twice and never left out, wherever the service dies; the
//! offsets it commits to the cluster are only for whoever wants to see its lag.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use serde_json::{Value, json};

use crate::api::Api;
use crate::{CONSUMER_GROUP, Settings, TOPIC};

pub fn open(settings: &Settings) -> Result<Connection> {
    let db = Connection::open(settings.home.join("points.db"))?;
    db.busy_timeout(Duration::from_secs(10))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    // An order that is delivered at two offsets would be two rows of `deliveries`: the proof looks.
    db.execute_batch(
        "create table if not exists deliveries (
           queue integer not null,
           offset integer not null,
           order_id text not null,
           customer text not null,
           amount integer not null,
           primary key (queue, offset));
         create table if not exists points (
           customer text primary key,
           points integer not null);
         create table if not exists offsets (
           queue integer primary key,
           next integer not null);",
    )?;
    Ok(db)
}

pub fn run(settings: &Settings) -> Result<()> {
    let mut db = open(settings)?;
    let mut api = Api::new(&settings.urls);
    let mut queues = 0;
    loop {
        let worked = (|| {
            if queues == 0 {
                let topic = api.get(&format!("/v1/topics/{TOPIC}"))?;
                queues = topic.body["queues"].as_array().map_or(0, Vec::len);
            }
            consume(&mut api, &mut db, queues)
        })();
        if let Err(error) = worked {
            eprintln!("the points service tries again: {error:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Where the service goes on in a queue.
pub fn next_offset(db: &Connection, queue: usize) -> Result<u64> {
    let query = "select next from offsets where queue = ?1";
    let next: Option<i64> = db
        .query_row(query, params![queue as i64], |row| row.get(0))
        .optional()?;
    Ok(next.unwrap_or(0) as u64)
}

/// One look at all queues: waits for messages, and takes what comes.
fn consume(api: &mut Api, db: &mut Connection, queues: usize) -> Result<()> {
    let from = (0..queues).map(|queue| {
        let offset = next_offset(db, queue)?;
        Ok(json!({"topic": TOPIC, "queue": queue, "offset": offset}))
    });
    let from = from.collect::<Result<Vec<Value>>>()?;
    let answer = api.post(
        "/v1/fetch",
        &json!({"queues": from, "max_messages": 200, "wait_ms": 5000}),
    )?;
    if !answer.is_done() {
        bail!("fetch: {} {}", answer.status, answer.body);
    }
    let mut moved = Vec::new();
    for result in answer.body["results"].as_array().into_iter().flatten() {
        let (queue, next) = (result["queue"].as_i64(), result["next_offset"].as_i64());
        let (Some(queue), Some(next)) = (queue, next) else {
            continue; // an error of this queue alone
        };
        let local = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for message in result["messages"].as_array().into_iter().flatten() {
            take(&local, queue, message)?;
        }
        local.execute(
            "insert into offsets values (?1, ?2) on conflict (queue) do update set next = ?2",
            params![queue, next],
        )?;
        local.commit()?;
        moved.push(json!({"topic": TOPIC, "queue": queue, "offset": next}));
    }
    if !moved.is_empty() {
        // For the eyes of people. Whether it works or not, the database knows better.
        let path = format!("/v1/groups/{CONSUMER_GROUP}/offsets");
        api.put(&path, &json!({ "offsets": moved })).ok();
    }
    Ok(())
}

fn take(local: &Transaction<'_>, queue: i64, message: &Value) -> Result<()> {
    let offset = message["offset"].as_i64().context("no offset")?;
    let order: Value = serde_json::from_str(message["value"].as_str().context("no value")?)?;
    let customer = order["customer"].as_str().context("no customer")?;
    let amount = order["amount"].as_i64().context("no amount")?;
    local.execute(
        "insert into deliveries values (?1, ?2, ?3, ?4, ?5)",
        params![queue, offset, order["order_id"].as_str(), customer, amount],
    )?;
    local.execute(
        "insert into points values (?1, ?2)
         on conflict (customer) do update set points = points + ?2",
        params![customer, amount],
    )?;
    Ok(())
}
