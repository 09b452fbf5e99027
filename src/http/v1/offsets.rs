//! Committed offsets of a consumer group: commit, list, reset.

use std::time::Instant;

use crate::http::object;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::broker::{
    CommitRequest, GroupOffset, MemberMark, OffsetCommit, ResetRequest, ResetResult, ResetTo,
};
use crate::http::HttpState;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, Problem};
use crate::http::multi::{Nothing, Place, json, respond};
use crate::http::path::{GroupName, checked_topic};
use crate::http::query::Params;

/// Offsets one request may commit.
const MAX_OFFSETS: usize = 10_000;

/// Offsets to commit: each is the next message the group wants of that queue.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CommitBody {
    #[serde(deserialize_with = "object::list")]
    offsets: Vec<OffsetBody>,
    /// Needed while the group has live members.
    #[serde(default, deserialize_with = "object::optional")]
    member: Option<MemberBody>,
    /// Lets an offset be lower than the committed one.
    #[serde(default, deserialize_with = "object::or_default")]
    allow_rewind: bool,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OffsetBody {
    topic: String,
    queue: u32,
    offset: u64,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberBody {
    id: String,
    epoch: u64,
}

#[derive(Debug, Serialize, ToSchema)]
struct CommittedBody<'a> {
    topic: &'a str,
    queue: u32,
    offset: u64,
}

impl<'a> From<&'a OffsetCommit> for CommittedBody<'a> {
    fn from(commit: &'a OffsetCommit) -> Self {
        Self {
            topic: &commit.topic,
            queue: commit.queue,
            offset: commit.offset,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CommitAnswer<'a> {
    results: Vec<CommittedBody<'a>>,
}

impl CommitBody {
    fn request(self, group: String) -> Result<CommitRequest, ApiError> {
        let count = self.offsets.len();
        if !(1..=MAX_OFFSETS).contains(&count) {
            return Err(ApiError::invalid(format!(
                "offsets has {count} entries; it must have 1 to {MAX_OFFSETS}"
            )));
        }
        for offset in &self.offsets {
            checked_topic(&offset.topic)?;
        }
        let offsets = self.offsets.into_iter();
        Ok(CommitRequest {
            group,
            offsets: offsets
                .map(
                    |OffsetBody {
                         topic,
                         queue,
                         offset,
                     }| OffsetCommit {
                        topic,
                        queue,
                        offset,
                    },
                )
                .collect(),
            member: self
                .member
                .map(|MemberBody { id, epoch }| MemberMark { id, epoch }),
            allow_rewind: self.allow_rewind,
        })
    }
}

/// Commits offsets; answers when a majority has them.
#[utoipa::path(put, path = "/v1/groups/{group}/offsets", tag = "offsets",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = CommitBody, responses(
    (status = 200, description = "All committed", body = CommitAnswer),
    (status = 207, description = "Some committed; the other entries are errors", body = CommitAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn commit(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let request = body.parse::<CommitBody>()?.request(group)?;
    let asked = request.offsets.clone();
    let begun = Instant::now();
    let results = state.broker.commit_offsets(request).await?;
    if results.iter().any(Result::is_ok) {
        state.metrics.observe_commit(begun.elapsed());
    }
    let parts = results
        .iter()
        .zip(&asked)
        .map(|(result, asked)| match result {
            Ok(commit) => Ok(CommittedBody::from(commit)),
            Err(error) => Err((
                Place {
                    topic: &asked.topic,
                    queue: asked.queue,
                },
                error.clone(),
            )),
        });
    Ok(respond(parts, Nothing {}, true))
}

#[derive(Debug, Serialize, ToSchema)]
struct GroupOffsetBody<'a> {
    topic: &'a str,
    queue: u32,
    /// Null where the group never committed.
    offset: Option<u64>,
    /// Null, as the lag, while the queue can't tell: it has no leader.
    end_offset: Option<u64>,
    lag: Option<u64>,
    /// Age of the oldest message not consumed, 0 when there is none.
    lag_ms: Option<u64>,
}

impl<'a> From<&'a GroupOffset> for GroupOffsetBody<'a> {
    fn from(place: &'a GroupOffset) -> Self {
        Self {
            topic: &place.topic,
            queue: place.queue,
            offset: place.offset,
            end_offset: place.behind.map(|behind| behind.end_offset),
            lag: place.behind.map(|behind| behind.lag),
            lag_ms: place.behind.map(|behind| behind.lag_ms),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct GroupOffsetsBody<'a> {
    offsets: Vec<GroupOffsetBody<'a>>,
}

/// What a group has committed, and how far it is behind.
#[utoipa::path(get, path = "/v1/groups/{group}/offsets", tag = "offsets",
    params(
        ("group" = String, Path, description = "Consumer group"),
        ("topic" = Option<String>, Query, description = "Only this topic, with all its queues"),
    ), responses(
    (status = 200, description = "The group's offsets", body = GroupOffsetsBody),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn list(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
) -> Result<Response, ApiError> {
    let params = params.only(&["topic"])?;
    let topic = params.get("topic");
    if let Some(topic) = topic {
        checked_topic(topic)?;
    }
    let offsets = state.broker.group_offsets(&group, topic).await?;
    let offsets = offsets.iter().map(GroupOffsetBody::from).collect();
    Ok(json(StatusCode::OK, &GroupOffsetsBody { offsets }))
}

/// Where a group is to go on.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResetBody {
    topic: String,
    /// All queues when absent.
    #[serde(default)]
    queue: Option<u32>,
    #[serde(deserialize_with = "reset_to")]
    to: ResetToBody,
    /// Only says what would happen.
    #[serde(default, deserialize_with = "object::or_default")]
    dry_run: bool,
    /// Also while the group has members, which go on where they are until they are told anew.
    #[serde(default, deserialize_with = "object::or_default")]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResetToBody {
    Earliest,
    Latest,
    Offset(u64),
    TimestampMs(u64),
    ShiftBy(i64),
}

fn reset_to<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ResetToBody, D::Error> {
    let allowed = r#""earliest", "latest", {"offset": N}, {"timestamp_ms": N} or {"shift_by": N}"#;
    let given = object::choice(deserializer, allowed)?;
    given.ok_or_else(|| D::Error::custom(format!("to is null; allowed: {allowed}")))
}

impl From<ResetToBody> for ResetTo {
    fn from(to: ResetToBody) -> Self {
        match to {
            ResetToBody::Earliest => Self::Earliest,
            ResetToBody::Latest => Self::Latest,
            ResetToBody::Offset(offset) => Self::Offset(offset),
            ResetToBody::TimestampMs(timestamp_ms) => Self::Timestamp(timestamp_ms),
            ResetToBody::ShiftBy(messages) => Self::ShiftBy(messages),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct ResetEntry<'a> {
    topic: &'a str,
    queue: u32,
    /// Null where the group had not committed.
    previous: Option<u64>,
    offset: u64,
}

impl<'a> From<&'a ResetResult> for ResetEntry<'a> {
    fn from(result: &'a ResetResult) -> Self {
        Self {
            topic: &result.topic,
            queue: result.queue,
            previous: result.previous,
            offset: result.offset,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ResetAnswer<'a> {
    results: Vec<ResetEntry<'a>>,
    dry_run: bool,
}

/// Moves a group to another place in one queue or all queues of a topic.
#[utoipa::path(post, path = "/v1/groups/{group}/offsets/reset", tag = "offsets",
    params(("group" = String, Path, description = "Consumer group")),
    request_body = ResetBody, responses(
    (status = 200, description = "Where the group was and is", body = ResetAnswer),
    (status = "default", description = "Problem", body = Problem, content_type = "application/problem+json"),
))]
pub async fn reset(
    State(state): State<HttpState>,
    GroupName(group): GroupName,
    params: Params,
    body: JsonBody,
) -> Result<Response, ApiError> {
    params.none()?;
    let ResetBody {
        topic,
        queue,
        to,
        dry_run,
        force,
    } = body.parse()?;
    checked_topic(&topic)?;
    let request = ResetRequest {
        group,
        topic,
        queue,
        to: to.into(),
        dry_run,
        force,
    };
    let results = state.broker.reset_offsets(request).await?;
    let results = results.iter().map(ResetEntry::from).collect();
    Ok(json(StatusCode::OK, &ResetAnswer { results, dry_run }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn said(error: ApiError) -> String {
        match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_target_of_a_reset() {
        for (text, expected) in [
            (r#""earliest""#, ResetTo::Earliest),
            (r#""latest""#, ResetTo::Latest),
            (r#"{"offset":5}"#, ResetTo::Offset(5)),
            (r#"{"timestamp_ms":7}"#, ResetTo::Timestamp(7)),
            (r#"{"shift_by":-100}"#, ResetTo::ShiftBy(-100)),
        ] {
            let body: ResetBody =
                parse_json(format!(r#"{{"topic":"t","to":{text}}}"#).as_bytes()).unwrap();
            assert_eq!(ResetTo::from(body.to), expected);
            assert_eq!((body.queue, body.dry_run), (None, false));
        }
        for text in [
            r#""middle""#,
            r#"{"offset":-1}"#,
            r#"{"offset":1,"shift_by":2}"#,
            "7",
        ] {
            let text = format!(r#"{{"topic":"t","to":{text}}}"#);
            assert!(parse_json::<ResetBody>(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_commit_is_checked() {
        let parse = |text: &str| {
            parse_json::<CommitBody>(text.as_bytes())
                .and_then(|body| body.request("g".to_owned()))
                .map_err(said)
        };
        let request = parse(
            r#"{"offsets":[{"topic":"orders","queue":0,"offset":18}],"member":{"id":"m","epoch":3}}"#,
        );
        let request = request.unwrap();
        assert_eq!(
            request.member,
            Some(MemberMark {
                id: "m".into(),
                epoch: 3
            })
        );
        assert!(!request.allow_rewind);
        for (text, named) in [
            (r#"{"offsets":[]}"#, "1 to 10000"),
            (
                r#"{"offsets":[{"topic":"_x","queue":0,"offset":1}]}"#,
                "topic name",
            ),
            (
                r#"{"offsets":[{"topic":"x","queue":0}]}"#,
                "missing field `offset`",
            ),
            (r#"{"offsets":[],"force":true}"#, "unknown field `force`"),
        ] {
            assert!(parse(text).unwrap_err().contains(named), "{text}");
        }
    }
}
