//! Transactions: begin, add messages, commit, roll back, look at them, and check-back by polling.

mod wire;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, RawPathParams, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;

use crate::broker::queue::entry::TransactionId;
use crate::broker::{BrokerError, TransactionMessage, parse_transaction_id};
use crate::coordinator::transactions::{Decision, Transaction, TransactionFilter};
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::clients::ClientAddress;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::json;
use crate::http::path::checked_name;
use crate::http::query::{Params, bounded};
use wire::{BeginBody, EndBody, ExtendBody, TransactionBody, TransactionsBody, parse_state};

const MAX_WAIT_MS: u64 = 60_000;
const MAX_LISTED: u32 = 1_000;
/// Time for the last look when the node stops under a long poll.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// `{transaction}` of the path.
#[derive(Debug)]
pub struct TransactionPath(TransactionId);

impl<S: Send + Sync> FromRequestParts<S> for TransactionPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|error| ApiError::invalid(format!("the path cannot be read: {error}")))?;
        let text = params.iter().find(|(key, _)| *key == "transaction");
        let text = text.map_or("", |(_, value)| value);
        match parse_transaction_id(text) {
            Some(id) => Ok(Self(id)),
            // No transaction was ever called so.
            None => Err(ApiError::Broker(BrokerError::TransactionNotFound {
                id: text.chars().take(40).collect(),
            })),
        }
    }
}

fn shown(status: StatusCode, transaction: &Transaction) -> Response {
    json(status, &TransactionBody::from(transaction))
}

/// Takes of the client's quota, as for messages that are produced by themselves.
fn take_quota(
    state: &HttpState,
    client: ClientAddress,
    messages: &[TransactionMessage],
) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Ok(());
    }
    let bytes = messages.iter().map(|m| m.message.size_bytes()).sum();
    state.clients.take(client, messages.len() as u64, bytes)?;
    Ok(())
}

/// Begins a transaction. Its messages are stored on a majority and seen by nobody until the commit.
#[utoipa::path(post, path = "/v1/transactions", tag = "transactions",
    request_body = BeginBody, responses(
    (status = 201, description = "Open", body = TransactionBody),
    (status = "default", description = "Problem; nothing of it will be seen", body = Problem, content_type = "application/problem+json"),
))]
pub async fn begin(
    State(state): State<HttpState>,
    client: ClientAddress,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let request = body
        .parse_or_empty::<BeginBody<'_>>()?
        .request(&body.0.bytes)?;
    take_quota(&state, client, &request.messages)?;
    let begun = state.broker.begin_transaction(request).await?;
    Ok(shown(StatusCode::CREATED, &begun))
}

/// Adds messages to an open transaction. If some can't be stored all of it is rolled back.
#[utoipa::path(post, path = "/v1/transactions/{transaction}/messages", tag = "transactions",
    params(("transaction" = String, Path, description = "Transaction id")),
    request_body = ExtendBody, responses(
    (status = 200, description = "Still open, with the messages", body = TransactionBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn extend(
    State(state): State<HttpState>,
    TransactionPath(id): TransactionPath,
    client: ClientAddress,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let messages = body.parse::<ExtendBody<'_>>()?.messages(&body.0.bytes)?;
    take_quota(&state, client, &messages)?;
    let extended = state.broker.extend_transaction(&id, messages).await?;
    Ok(shown(StatusCode::OK, &extended))
}

async fn end(
    state: &HttpState,
    id: TransactionId,
    params: Params,
    body: &JsonBody,
    decision: Decision,
) -> Result<Response, ApiError> {
    params.none()?;
    let EndBody {} = body.parse_or_empty()?;
    let ended = state.broker.end_transaction(&id, decision).await?;
    let status = match ended.done_ms {
        Some(_) => StatusCode::OK,
        // Decided for good, and some queue or consumer group has still to apply it.
        None => StatusCode::ACCEPTED,
    };
    Ok(shown(status, &ended))
}

/// Commits. Repeating it gives the same answer.
#[utoipa::path(post, path = "/v1/transactions/{transaction}/commit", tag = "transactions",
    params(("transaction" = String, Path, description = "Transaction id")),
    request_body = EndBody, responses(
    (status = 200, description = "Committed everywhere, with the messages' places", body = TransactionBody),
    (status = 202, description = "Committed for good; some queue or consumer group has not applied it yet. Repeat to get the places", body = TransactionBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn commit(
    State(state): State<HttpState>,
    TransactionPath(id): TransactionPath,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    end(&state, id, params, &body, Decision::Commit).await
}

/// Rolls back. Repeating it gives the same answer.
#[utoipa::path(post, path = "/v1/transactions/{transaction}/rollback", tag = "transactions",
    params(("transaction" = String, Path, description = "Transaction id")),
    request_body = EndBody, responses(
    (status = 200, description = "Rolled back everywhere", body = TransactionBody),
    (status = 202, description = "Rolled back for good; some queue or consumer group has not applied it yet", body = TransactionBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn rollback(
    State(state): State<HttpState>,
    TransactionPath(id): TransactionPath,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    end(&state, id, params, &body, Decision::Rollback).await
}

/// One transaction.
#[utoipa::path(get, path = "/v1/transactions/{transaction}", tag = "transactions",
    params(("transaction" = String, Path, description = "Transaction id")),
    responses(
    (status = 200, description = "The transaction", body = TransactionBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn get(
    State(state): State<HttpState>,
    TransactionPath(id): TransactionPath,
    params: Params,
) -> Result<Response, ApiError> {
    params.none()?;
    Ok(shown(StatusCode::OK, &state.broker.transaction(&id).await?))
}

/// Transactions, the oldest first. With `state=needs_check` and `wait_ms`: check-back by polling.
#[utoipa::path(get, path = "/v1/transactions", tag = "transactions",
    params(
        ("producer_group" = Option<String>, Query, description = "Only those of this one"),
        ("state" = Option<String>, Query, description = "Only those in this state"),
        ("wait_ms" = Option<u64>, Query, description = "Waits until there is one, at most 60000"),
        ("max_transactions" = Option<u32>, Query, description = "1 to 1000, 100 when absent"),
    ), responses(
    (status = 200, description = "The transactions", body = TransactionsBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(State(state): State<HttpState>, params: Params) -> Result<Response, ApiError> {
    let known = ["producer_group", "state", "wait_ms", "max_transactions"];
    let params = params.only(&known)?;
    let producer_group = params.get("producer_group");
    if let Some(name) = producer_group {
        checked_name("producer group", name)?;
    }
    let filter = TransactionFilter {
        producer_group: producer_group.map(str::to_owned),
        state: params.get("state").map(parse_state).transpose()?,
        limit: bounded(
            "max_transactions",
            params.number("max_transactions")?,
            1..=MAX_LISTED,
            100,
        )?,
    };
    let wait_ms = bounded("wait_ms", params.number("wait_ms")?, 0..=MAX_WAIT_MS, 0)?;
    let broker = Arc::clone(&state.broker);
    let found = tokio::select! {
        biased;
        found = broker.transactions(filter.clone(), wait_ms) => found?,
        () = state.shutdown.cancelled() => {
            let looked = tokio::time::timeout(LAST_LOOK, broker.transactions(filter, 0)).await;
            looked.unwrap_or(Err(BrokerError::ShuttingDown))?
        }
    };
    let transactions = found.iter().map(TransactionBody::from).collect();
    Ok(json(StatusCode::OK, &TransactionsBody { transactions }))
}
