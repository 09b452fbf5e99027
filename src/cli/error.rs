//! What can go wrong on the client's side, in words for people and exit codes for scripts.

use serde::{Deserialize, Serialize};

/// The problem document (RFC 9457) that every Quorate error answer carries.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Problem {
    pub title: String,
    pub status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    pub code: String,
    pub retryable: bool,
    /// For writes: `not_committed` or `unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub earliest_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_offset: Option<u64>,
    /// What else the server said.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Problem {
    /// Whether a write that was answered with this may have been stored all the same.
    pub fn outcome_unknown(&self) -> bool {
        self.outcome.as_deref() == Some("unknown")
    }

    fn explain(&self) -> String {
        let mut text = match &self.detail {
            Some(detail) => format!("{}: {detail}", self.title),
            None => self.title.clone(),
        };
        text.push_str(&format!(" [{} {}]", self.status, self.code));
        text
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{0}")]
    Usage(String),
    #[error("no node could be reached: {attempts}")]
    Unreachable { attempts: String },
    /// The request left, and no answer came, or to a write none that can be understood.
    #[error("{url} gave no usable answer: {reason}")]
    NoAnswer { url: String, reason: String },
    #[error("{}", .0.explain())]
    Problem(Box<Problem>),
    #[error("{url} answered what this client does not understand: {reason}")]
    Protocol { url: String, reason: String },
    #[error("cannot {doing}: {source}")]
    Io {
        doing: String,
        source: std::io::Error,
    },
    /// The command did its work, and what it found is bad news it has already printed.
    #[error("{0}")]
    Failed(String),
    /// Whoever read our output has gone; there is nobody to tell.
    #[error("standard output is closed")]
    OutputClosed,
}

impl CliError {
    pub fn io(doing: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io {
            doing: doing.into(),
            source,
        }
    }

    /// Whether the same request may succeed on a later try. Says nothing about whether repeating
    /// it is safe: see [`CliError::outcome_unknown`].
    pub fn retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::NoAnswer { .. } => true,
            Self::Problem(problem) => problem.retryable,
            _ => false,
        }
    }

    /// Whether a write that failed like this may have been stored.
    pub fn outcome_unknown(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Problem(problem) => problem.outcome_unknown(),
            _ => false,
        }
    }

    /// Documented in the help text and in docs/operations.md.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::OutputClosed => 0,
            Self::Usage(_) => 2,
            Self::Unreachable { .. } => 3,
            error if error.outcome_unknown() => 5,
            Self::Problem(problem) if problem.retryable => 4,
            _ => 1,
        }
    }

    /// The message for a machine: the server's problem document where there is one, on one line.
    pub fn to_json(&self) -> String {
        let title = match self {
            Self::Problem(problem) => {
                // It has string keys and is made of JSON: this cannot fail.
                return serde_json::to_string(problem).unwrap_or_default();
            }
            Self::Usage(_) => "Wrong usage",
            Self::Unreachable { .. } => "No node could be reached",
            Self::NoAnswer { .. } => "No usable answer",
            Self::Protocol { .. } => "Answer not understood",
            Self::Io { .. } => "Input or output failed",
            Self::Failed(_) => "Failed",
            Self::OutputClosed => "Standard output is closed",
        };
        let outcome = match self.outcome_unknown() {
            true => Some("unknown"),
            false => None,
        };
        let mut document = serde_json::json!({ "title": title, "detail": self.to_string() });
        if let Some(outcome) = outcome {
            document["outcome"] = outcome.into();
        }
        document.to_string()
    }

    /// The message for a person, with what it means for a write.
    pub fn explain(&self) -> String {
        let meaning = match self {
            Self::Unreachable { .. } => {
                "\nname a running node with --url, or start a cluster with scripts/cluster.sh start"
            }
            error if error.outcome_unknown() => {
                "\na write may or may not have been stored; repeat it only with a producer or an idempotency key"
            }
            Self::Problem(problem) if problem.retryable && problem.outcome.is_some() => {
                "\nnothing was stored; trying again may help"
            }
            error if error.retryable() => "\ntrying again may help",
            _ => "",
        };
        format!("error: {self}{meaning}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(status: u16, retryable: bool, outcome: Option<&str>) -> CliError {
        CliError::Problem(Box::new(Problem {
            title: "no leader".into(),
            status,
            code: "no_leader".into(),
            retryable,
            outcome: outcome.map(String::from),
            ..Problem::default()
        }))
    }

    #[test]
    fn the_exit_code_says_what_a_script_must_know() {
        assert_eq!(problem(404, false, None).exit_code(), 1);
        assert_eq!(problem(503, true, Some("not_committed")).exit_code(), 4);
        assert_eq!(problem(504, true, Some("unknown")).exit_code(), 5);
        let reason = || "reset".to_owned();
        assert_eq!(CliError::Unreachable { attempts: reason() }.exit_code(), 3);
        let url = "http://a".to_owned();
        assert_eq!(
            CliError::NoAnswer {
                url,
                reason: reason()
            }
            .exit_code(),
            5
        );
    }

    #[test]
    fn a_problem_is_read_even_with_fields_missing_or_added() {
        let text = r#"{"type":"about:blank","title":"Topic not found","status":404,"code":"topic_not_found","new":1}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!(problem.explain(), "Topic not found [404 topic_not_found]");
        let shown: serde_json::Value =
            serde_json::from_str(&CliError::Problem(Box::new(problem)).to_json()).unwrap();
        assert_eq!(
            (&shown["type"], &shown["new"]),
            (&"about:blank".into(), &1.into())
        );
        assert!(shown.get("outcome").is_none(), "{shown}");
    }

    #[test]
    fn without_an_answer_a_machine_is_told_so_too() {
        let attempts = "http://a: refused\nhttp://b: refused".to_owned();
        let line = CliError::Unreachable { attempts }.to_json();
        assert!(!line.contains('\n'), "{line}");
        let shown: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(shown["title"], "No node could be reached");
        assert!(shown["detail"].as_str().unwrap().contains("http://b"));
    }
}
