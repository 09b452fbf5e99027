//! Asking a producer by HTTP what became of its transaction, where the operator allows it.
//!
//! A URL that clients give is a way into the server's own network, so there is a list of what may
//! be asked, nothing is followed anywhere else, little is read of the answer, and the time is
//! short. What is sent is signed: the receiver can tell that it is this cluster that asks.

use std::fmt::{self, Write};
use std::time::Duration;

use hmac::{Hmac, Mac};
use reqwest::Url;
use reqwest::redirect::Policy;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::transaction_text;
use crate::coordinator::transactions::{Decision, Transaction};

/// Signs the body: `sha256=` and the HMAC in hexadecimal.
pub const SIGNATURE_HEADER: &str = "quorate-signature";

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_ANSWER_BYTES: usize = 4_096;

/// Which URLs may be asked, and the secret under which.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct WebhookPolicy {
    /// Scheme, host, port and the beginning of the path; none: no URL may be asked.
    pub allow: Vec<String>,
    pub secret: String,
}

/// The secret stays out of logs.
impl fmt::Debug for WebhookPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookPolicy")
            .field("allow", &self.allow)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Serialize)]
struct Question<'a> {
    transaction_id: String,
    producer_group: &'a str,
    created_ms: u64,
    check: u32,
    max_checks: u32,
    messages: u32,
    sent_at_ms: u64,
}

#[derive(Debug, Deserialize)]
struct Answer {
    decision: AnsweredDecision,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AnsweredDecision {
    Commit,
    Rollback,
    Unknown,
}

impl WebhookPolicy {
    /// The URL, if it may be asked; else what to tell the client.
    pub fn check(&self, url: &str) -> Result<Url, String> {
        let parsed = Url::parse(url).map_err(|e| format!("check_url is not a URL: {e}"))?;
        if self.allow.is_empty() {
            return Err(
                "check_url: this server asks no URLs; its operator can allow some with transactions.webhook_allow, or poll GET /v1/transactions?state=needs_check"
                    .to_owned(),
            );
        }
        let allowed = self.allow.iter().filter_map(|entry| Url::parse(entry).ok());
        match allowed.into_iter().any(|allowed| covers(&allowed, &parsed)) {
            true => Ok(parsed),
            false => Err(
                "check_url is none of those that the server's transactions.webhook_allow lists"
                    .to_owned(),
            ),
        }
    }
}

/// Whether an entry can stand in the list; the text says why not.
pub fn check_allowed(entry: &str) -> Result<(), String> {
    let url = Url::parse(entry).map_err(|e| e.to_string())?;
    let plain = url.username().is_empty() && url.password().is_none();
    let whole = url.query().is_none() && url.fragment().is_none();
    match url.scheme() {
        "http" if plain && whole && url.has_host() => Ok(()),
        "http" => {
            Err("it must be http://host[:port]/path without user, query and fragment".to_owned())
        }
        other => Err(format!("scheme {other:?} cannot be asked, only http")),
    }
}

fn covers(allowed: &Url, url: &Url) -> bool {
    let origin = |u: &Url| {
        (
            u.scheme().to_owned(),
            u.host_str().map(str::to_owned),
            u.port_or_known_default(),
        )
    };
    let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
    // A receiver may take them for slashes, and so `..` among them for a way out.
    let path = url.path().to_ascii_lowercase();
    let hidden = path.contains("%2f") || path.contains("%5c");
    let rest = url.path().strip_prefix(allowed.path());
    // `/hooks` covers `/hooks/a`, not `/hooks-of-others`.
    let below = rest.is_some_and(|rest| {
        allowed.path().ends_with('/') || rest.is_empty() || rest.starts_with('/')
    });
    plain && !hidden && below && origin(allowed) == origin(url)
}

/// `sha256=` and the body's HMAC-SHA256.
fn sign(secret: &str, body: &[u8]) -> String {
    let mut text = "sha256=".to_owned();
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else {
        return text;
    };
    mac.update(body);
    for byte in mac.finalize().into_bytes() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Scheme, host and port of where the producer is asked, if it may be asked there.
pub(super) fn address(policy: &WebhookPolicy, transaction: &Transaction) -> Option<String> {
    let url = transaction.check_url.as_deref()?;
    // The list may have become shorter since the transaction began.
    let url = policy.check(url).inspect_err(|reason| {
        tracing::warn!(%reason, "a check_url is not asked");
    });
    Some(url.ok()?.origin().ascii_serialization())
}

/// Asks, and gives the decision if there is one.
pub(super) async fn ask(
    policy: &WebhookPolicy,
    transaction: &Transaction,
    now_ms: u64,
) -> Option<Decision> {
    let url = policy.check(transaction.check_url.as_deref()?).ok()?;
    let host = url.host_str().unwrap_or_default().to_owned();
    match tokio::time::timeout(TIMEOUT, call(policy, url, transaction, now_ms)).await {
        Ok(Ok(AnsweredDecision::Commit)) => Some(Decision::Commit),
        Ok(Ok(AnsweredDecision::Rollback)) => Some(Decision::Rollback),
        Ok(Ok(AnsweredDecision::Unknown)) => None,
        Ok(Err(reason)) => {
            tracing::warn!(%host, %reason, "a check of a transaction was not answered");
            None
        }
        Err(_) => {
            tracing::warn!(%host, "a check of a transaction was not answered in time");
            None
        }
    }
}

async fn call(
    policy: &WebhookPolicy,
    url: Url,
    transaction: &Transaction,
    now_ms: u64,
) -> Result<AnsweredDecision, String> {
    let question = Question {
        transaction_id: transaction_text(&transaction.id),
        producer_group: &transaction.producer_group,
        created_ms: transaction.created_ms,
        check: transaction.checks,
        max_checks: transaction.timing.max_checks,
        messages: transaction.messages(),
        sent_at_ms: now_ms,
    };
    let body = serde_json::to_vec(&question).map_err(|e| e.to_string())?;
    let client = reqwest::Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .timeout(TIMEOUT)
        .build()
        .map_err(|e| e.to_string())?;
    let request = client
        .post(url)
        .header("content-type", "application/json")
        .header(SIGNATURE_HEADER, sign(&policy.secret, &body))
        .body(body);
    let mut response = request
        .send()
        .await
        .map_err(|e| e.without_url().to_string())?;
    if !response.status().is_success() {
        return Err(format!("status {}", response.status()));
    }
    let mut answer = Vec::new();
    while let Some(piece) = response
        .chunk()
        .await
        .map_err(|e| e.without_url().to_string())?
    {
        answer.extend_from_slice(&piece);
        if answer.len() > MAX_ANSWER_BYTES {
            return Err(format!("more than {MAX_ANSWER_BYTES} bytes"));
        }
    }
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|_| "no {\"decision\": \"commit\" | \"rollback\" | \"unknown\"}".to_owned())?;
    Ok(answer.decision)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str]) -> WebhookPolicy {
        WebhookPolicy {
            allow: allow.iter().map(|a| (*a).to_owned()).collect(),
            secret: "a secret".to_owned(),
        }
    }

    #[test]
    fn only_what_is_listed_may_be_asked() {
        let policy = policy(&["http://hooks.internal:8090/check", "http://127.0.0.1/all/"]);
        for url in [
            "http://hooks.internal:8090/check",
            "http://HOOKS.internal:8090/check/orders?x=1",
            "http://127.0.0.1:80/all/of/it",
        ] {
            assert!(policy.check(url).is_ok(), "{url}");
        }
        for url in [
            "http://hooks.internal/check",
            "https://hooks.internal:8090/check",
            "http://hooks.internal:8090/checks",
            "http://hooks.internal:8090/check/../admin",
            "http://hooks.internal:8090/check/%2e%2e/admin",
            "http://hooks.internal:8090/check/..%2fadmin",
            "http://hooks.internal:8090/check/..%5Cadmin",
            "http://hooks.internal:8090/check%2F..%2Fadmin",
            "http://hooks.internal:8090@evil.example/check",
            "http://user@hooks.internal:8090/check",
            "http://hooks.internal.evil.example:8090/check",
            "http://127.0.0.1/",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            "nonsense",
        ] {
            assert!(policy.check(url).is_err(), "{url}");
        }
        let refused = WebhookPolicy::default()
            .check("http://127.0.0.1/")
            .unwrap_err();
        assert!(refused.contains("webhook_allow"), "{refused}");
    }

    #[test]
    fn what_can_be_listed() {
        assert!(check_allowed("http://hooks:8090/check").is_ok());
        for entry in [
            "https://hooks/",
            "http://u:p@hooks/",
            "hooks:8090",
            "http://h/?a=1",
            "",
        ] {
            assert!(check_allowed(entry).is_err(), "{entry}");
        }
    }

    /// RFC 4231, test case 2.
    #[test]
    fn the_signature_is_hmac_sha256() {
        let expected = "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(sign("Jefe", b"what do ya want for nothing?"), expected);
    }

    #[test]
    fn the_secret_is_not_printed() {
        assert!(!format!("{:?}", policy(&["http://a/"])).contains("a secret"));
    }
}
