//! The order service: an order is in its database if and only if the world is told of it.
//!
//! 1. A half message is stored: safe on a majority, and nobody sees it.
//! 2. The local transaction writes the order, together with the decision "commit" for the half
//!    message's transaction. That row is what decides.
//! 3. The half message is committed.
//!
//! The service may die between any two of these, and the answer to any request may be lost. So any
//! instance asks for transactions that nobody ended, looks the decision up and ends them. Where
//! there is none it first *writes* "rollback": a local transaction that was merely slow then finds
//! the decision taken, and fails.

use std::time::Duration;

use anyhow::{Context, Result};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde_json::{Value, json};

use crate::api::Api;
use crate::{PRODUCER_GROUP, Settings, TOPIC, now_ms};

/// All instances of the service share it, as they would share a database server.
pub fn open(settings: &Settings) -> Result<Connection> {
    let db = Connection::open(settings.home.join("orders.db"))?;
    db.busy_timeout(Duration::from_secs(10))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    db.execute_batch(
        "create table if not exists decisions (
           transaction_id text primary key,
           decision text not null check (decision in ('commit', 'rollback')));
         create table if not exists orders (
           order_id text primary key,
           customer text not null,
           amount integer not null,
           transaction_id text not null references decisions);",
    )?;
    Ok(db)
}

/// Takes orders until it is time, and settles what is open for ever.
pub fn run(settings: &Settings) -> Result<()> {
    let mut db = open(settings)?;
    let settle = settings.clone();
    std::thread::spawn(move || check_back(&settle));
    let mut api = Api::new(&settings.urls);
    loop {
        if now_ms() >= settings.until_ms {
            std::thread::sleep(Duration::from_secs(1));
            continue;
        }
        if let Err(error) = order(&mut api, &mut db) {
            eprintln!("an order is left to the check-back: {error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// One order from beginning to end.
fn order(api: &mut Api, db: &mut Connection) -> Result<()> {
    let order_id = format!("{:016x}", fastrand::u64(..));
    let customer = format!("customer-{}", fastrand::u8(..20));
    let amount = fastrand::u32(1..500);
    let order = json!({"order_id": order_id, "customer": customer, "amount": amount});
    let begun = api.post(
        "/v1/transactions",
        &json!({
            "producer_group": PRODUCER_GROUP,
            // Short, for a short run. A wrong guess costs a check, never a wrong book.
            "timeout_ms": 2000,
            "check_interval_ms": 1000,
            "max_checks": 1000,
            "messages": [{"topic": TOPIC, "key": customer, "tag": "created", "value_json": order}],
        }),
    )?;
    let id = begun.body["transaction_id"].as_str();
    let id = id.with_context(|| format!("not begun: {} {}", begun.status, begun.body))?;
    // Some customers change their minds.
    if fastrand::u8(..10) == 0 {
        end(api, id, "rollback")?;
        return Ok(());
    }
    // Some shops are slow: the check-back comes first now and then.
    if fastrand::u8(..100) == 0 {
        std::thread::sleep(Duration::from_millis(2500));
    }
    let local = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    local.execute("insert into decisions values (?1, 'commit')", params![id])?;
    local.execute(
        "insert into orders values (?1, ?2, ?3, ?4)",
        params![order_id, customer, amount, id],
    )?;
    local.commit()?;
    end(api, id, "commit")
}

fn end(api: &mut Api, id: &str, decision: &str) -> Result<()> {
    let path = format!("/v1/transactions/{id}/{decision}");
    let answer = api.post(&path, &json!({}))?;
    match answer.is_done() {
        true => Ok(()),
        false => anyhow::bail!("{decision} of {id}: {} {}", answer.status, answer.body),
    }
}

/// Ends what nobody has ended.
fn check_back(settings: &Settings) {
    let mut api = Api::new(&settings.urls);
    let path =
        format!("/v1/transactions?producer_group={PRODUCER_GROUP}&state=needs_check&wait_ms=5000");
    loop {
        let checked = open(settings).and_then(|db| {
            loop {
                let open = api.get(&path)?.body["transactions"].take();
                for transaction in open.as_array().into_iter().flatten() {
                    settle(&mut api, &db, transaction)?;
                }
            }
        });
        let checked: Result<()> = checked;
        if let Err(error) = checked {
            eprintln!("the check-back tries again: {error:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn settle(api: &mut Api, db: &Connection, transaction: &Value) -> Result<()> {
    let id = transaction["transaction_id"].as_str().context("no id")?;
    db.execute(
        "insert or ignore into decisions values (?1, 'rollback')",
        params![id],
    )?;
    let decision: Option<String> = db
        .query_row(
            "select decision from decisions where transaction_id = ?1",
            params![id],
            |row| row.get(0),
        )
        .optional()?;
    let decision = decision.context("the decision that was just written is gone")?;
    eprintln!("checked back: {decision} {id}");
    end(api, id, &decision)
}
