//! `quorate transaction`: looking at transactions, and ending those whose producer is gone.

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use super::client::{Client, Repeat, Request};
use super::error::CliError;
use super::out::{Output, Table, clock_time, or_dash};

#[derive(Debug, Subcommand)]
pub enum TransactionCommand {
    /// Transactions that are open, or ended within a day.
    List {
        #[arg(long)]
        producer_group: Option<String>,
        /// open, needs_check, committed, rolled_back, expired, …
        #[arg(long)]
        state: Option<String>,
    },
    /// One transaction; of a committed one, where its messages are.
    Show { id: String },
    /// Make its messages visible and its offsets committed.
    Commit { id: String },
    /// Have its messages never seen.
    Rollback { id: String },
}

pub async fn run(
    client: &Client,
    out: Output,
    command: TransactionCommand,
) -> Result<(), CliError> {
    let answer = match &command {
        TransactionCommand::List {
            producer_group,
            state,
        } => {
            let mut request = Request::get(&["v1", "transactions"]);
            if let Some(name) = producer_group {
                request = request.query("producer_group", name);
            }
            if let Some(state) = state {
                request = request.query("state", state);
            }
            client.call(request).await?
        }
        TransactionCommand::Show { id } => {
            client
                .call(Request::get(&["v1", "transactions", id]))
                .await?
        }
        TransactionCommand::Commit { id } => end(client, id, "commit").await?,
        TransactionCommand::Rollback { id } => end(client, id, "rollback").await?,
    };
    if out.is_json() {
        return out.json(&answer);
    }
    match answer["transactions"].as_array() {
        Some(transactions) => out.table(&table(transactions)),
        None => {
            out.table(&table(std::slice::from_ref(&answer)))?;
            match answer["results"].as_array() {
                Some(results) => out.table(&results_table(results)),
                None => Ok(()),
            }
        }
    }
}

/// Saying it twice is saying it once.
async fn end(client: &Client, id: &str, how: &str) -> Result<Value, CliError> {
    let path = ["v1", "transactions", id, how];
    let request = Request::new(Method::POST, &path, Repeat::Always);
    client.call(request).await
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

fn table(transactions: &[Value]) -> Table {
    let mut table = Table::new(&[
        "TRANSACTION",
        "STATE",
        "PRODUCER GROUP",
        "MESSAGES",
        "CHECKS",
        "BEGUN",
    ]);
    for transaction in transactions {
        table.row(vec![
            text(&transaction["transaction_id"]),
            text(&transaction["state"]),
            text(&transaction["producer_group"]),
            or_dash(transaction["messages"].as_u64()),
            or_dash(transaction["checks"].as_u64()),
            clock_time(transaction["created_ms"].as_u64().unwrap_or(0)),
        ]);
    }
    table
}

fn results_table(results: &[Value]) -> Table {
    let mut table = Table::new(&["TOPIC", "QUEUE", "OFFSET", "MESSAGE"]);
    for result in results {
        table.row(vec![
            text(&result["topic"]),
            or_dash(result["queue"].as_u64()),
            or_dash(result["offset"].as_u64()),
            or_dash(result["message_id"].as_str()),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_message_of_a_deleted_topic_has_no_place() {
        let results = json!([
            {"topic": "a", "queue": 1, "offset": 7, "message_id": "x"},
            {"topic": "b", "queue": 0, "offset": null, "message_id": null},
        ]);
        let expected = "TOPIC  QUEUE  OFFSET  MESSAGE\n\
                        a          1       7  x\n\
                        b          0       -  -\n";
        assert_eq!(
            results_table(results.as_array().unwrap()).render(),
            expected
        );
    }
}
