//! Answers to requests of several parts, each with a result of its own.
//!
//! All done: 200. Some failed: 207, and those entries are `{"error": {problem}}`. All failed: their
//! common status (if they differ, the first's, but one of unknown outcome goes before the others)
//! and a problem body that also has the `results`.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::to_raw_value;

use super::error::Problem;
use crate::broker::BrokerError;

/// One part's result as JSON. `C` says which part failed where the order alone doesn't.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Entry<T, C> {
    Done(T),
    Failed {
        #[serde(flatten)]
        context: C,
        error: Box<Problem>,
    },
}

#[derive(Debug, Serialize)]
struct Results<T, C, X> {
    results: Vec<Entry<T, C>>,
    #[serde(flatten)]
    extra: X,
}

/// Nothing to add: serialises to no fields.
#[derive(Debug, Serialize)]
pub struct Nothing {}

/// Which queue a failed part is about.
#[derive(Debug, Serialize)]
pub struct Place<'a> {
    pub topic: &'a str,
    pub queue: u32,
}

/// Renders `parts` with `extra`'s fields beside them; `write` as in [`Problem::new`].
pub fn respond<T: Serialize, C: Serialize, X: Serialize>(
    parts: impl IntoIterator<Item = Result<T, (C, BrokerError)>>,
    extra: X,
    write: bool,
) -> Response {
    let (mut done, mut failed) = (0, None::<Box<Problem>>);
    let results: Vec<Entry<T, C>> = parts
        .into_iter()
        .map(|part| match part {
            Ok(result) => {
                done += 1;
                Entry::Done(result)
            }
            Err((context, error)) => {
                let error = Box::new(Problem::new(&error.into(), write));
                // A client that only reads the whole must not take an unknown part for undone.
                if failed
                    .as_ref()
                    .is_none_or(|f| unknown(&error) && !unknown(f))
                {
                    failed = Some(error.clone());
                }
                Entry::Failed { context, error }
            }
        })
        .collect();
    match failed {
        Some(mut first) if done == 0 => {
            first.results = to_raw_value(&results).ok();
            first.response()
        }
        Some(_) => json(StatusCode::MULTI_STATUS, &Results { results, extra }),
        None => json(StatusCode::OK, &Results { results, extra }),
    }
}

fn unknown(problem: &Problem) -> bool {
    problem.outcome == Some("unknown")
}

/// A JSON answer.
pub fn json(status: StatusCode, body: &impl Serialize) -> Response {
    json_with_capacity(status, body, 256)
}

/// A JSON answer whose size is about known.
pub fn json_with_capacity(status: StatusCode, body: &impl Serialize, capacity: usize) -> Response {
    let mut buffer = Vec::with_capacity(capacity);
    match serde_json::to_writer(&mut buffer, body) {
        Ok(()) => (status, [(header::CONTENT_TYPE, "application/json")], buffer).into_response(),
        // Only a map with keys that are no strings could do this; no answer has one.
        Err(error) => {
            let error = BrokerError::Internal(format!("the answer can't be written: {error}"));
            super::error::ApiError::from(error).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::{Value, json};

    use super::*;

    type Part = Result<Value, (Value, BrokerError)>;

    async fn answer(parts: Vec<Part>) -> (u16, Value) {
        let response = respond(parts, json!({"durability": "x"}), true);
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    fn failed(error: BrokerError) -> Part {
        Err((json!({}), error))
    }

    const TOO_LARGE: BrokerError = BrokerError::MessageTooLarge {
        bytes: 2,
        max_bytes: 1,
    };

    #[tokio::test]
    async fn all_done_is_200() {
        let (status, body) = answer(vec![Ok(json!({"offset": 1}))]).await;
        assert_eq!(status, 200);
        assert_eq!(body, json!({"results": [{"offset": 1}], "durability": "x"}));
    }

    #[tokio::test]
    async fn some_failed_is_207_in_order() {
        let (status, body) = answer(vec![failed(TOO_LARGE), Ok(json!({"offset": 1}))]).await;
        assert_eq!(status, 207);
        assert_eq!(body["results"][0]["error"]["code"], "message_too_large");
        assert_eq!(body["results"][0]["error"]["outcome"], "not_committed");
        assert_eq!(body["results"][1]["offset"], 1);
    }

    #[tokio::test]
    async fn all_failed_is_a_problem_with_the_results() {
        let (status, body) =
            answer(vec![failed(TOO_LARGE), failed(BrokerError::Quarantined)]).await;
        assert_eq!(status, 413);
        assert_eq!(body["code"], "message_too_large");
        assert_eq!(body["results"][1]["error"]["status"], 503);
    }

    #[tokio::test]
    async fn the_whole_is_unknown_when_a_part_is() {
        let outcome = crate::broker::Outcome::Unknown;
        let timeout = || failed(BrokerError::Timeout { outcome });
        for parts in [
            vec![failed(TOO_LARGE), timeout()],
            vec![timeout(), failed(TOO_LARGE)],
        ] {
            let (status, body) = answer(parts).await;
            assert_eq!((status, &body["outcome"]), (504, &json!("unknown")));
        }
    }
}
