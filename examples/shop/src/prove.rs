//! The books against each other.

use std::collections::BTreeMap;

use anyhow::Result;
use rusqlite::Connection;

use crate::{Settings, orders, points};

/// Orders by id, with their amount.
type Book = BTreeMap<String, i64>;

/// Prints what it finds; true if the books agree to the last order.
pub fn books(settings: &Settings) -> Result<bool> {
    let (shop, accounts) = (orders::open(settings)?, points::open(settings)?);
    let ordered = book(&shop, "select order_id, amount from orders")?;
    let mut delivered: Book = BTreeMap::new();
    let mut twice = 0;
    let mut statement = accounts.prepare("select order_id, amount from deliveries")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        twice += usize::from(delivered.insert(row.get(0)?, row.get(1)?).is_some());
    }
    let missing = ordered.keys().filter(|id| !delivered.contains_key(*id));
    let missing = missing.count();
    let invented = delivered.keys().filter(|id| !ordered.contains_key(*id));
    let invented = invented.count();
    let points: i64 =
        accounts.query_row("select coalesce(sum(points), 0) from points", [], |row| {
            row.get(0)
        })?;
    let (sum, rolled_back) = (
        ordered.values().sum::<i64>(),
        shop.query_row(
            "select count(*) from decisions where decision = 'rollback'",
            [],
            |row| row.get::<_, i64>(0),
        )?,
    );
    println!("orders            {:>8}   sum {sum}", ordered.len());
    println!("delivered orders  {:>8}   points {points}", delivered.len());
    println!("missing           {missing:>8}");
    println!("delivered twice   {twice:>8}");
    println!("never ordered     {invented:>8}");
    println!("rolled back by check-back {rolled_back}");
    let agree = ordered == delivered && sum == points && twice == 0;
    // A run in which nothing happened proves nothing.
    let enough = ordered.len() >= 10;
    println!(
        "{}",
        match (agree, enough) {
            (true, true) => "PROVED: the books balance, each order exactly once",
            (true, false) => "NOT PROVED: there were hardly any orders",
            (false, _) => "NOT PROVED: the books differ",
        }
    );
    Ok(agree && enough)
}

fn book(db: &Connection, query: &str) -> Result<Book> {
    let mut statement = db.prepare(query)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
