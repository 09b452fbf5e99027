//! Consumer groups in JSON: what is checked on the way in, and how a group is shown.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::broker::groups::{
    AssignedQueue, GroupDescription, JoinRequest, MemberAnswer, MemberDescription, QueueOwner,
};
use crate::broker::{BrokerError, Selection};
use crate::coordinator::{
    AssignStrategy, Delivery, GroupMode, GroupStart, GroupSummary, MAX_TAG_BYTES, SESSION_MS,
};
use crate::http::error::ApiError;
use crate::http::object;
use crate::http::path::checked_name;
use crate::http::query::bounded;

const MAX_TOPICS: usize = 100;
const MAX_INSTANCE_BYTES: usize = 120;
const DEFAULT_SESSION_MS: u64 = 10_000;
/// Queues that one heartbeat may name.
const MAX_OWNED: usize = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModeBody {
    /// Each message for one member.
    #[default]
    Cluster,
    /// Each message for every member.
    Broadcast,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartBody {
    #[default]
    Earliest,
    Latest,
    TimestampMs(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StrategyBody {
    /// As even as it gets, moving as few queues as possible.
    Sticky,
    /// Topic by topic, each member a run of neighbouring queues.
    Range,
    /// All queues dealt out in turn.
    RoundRobin,
}

/// Somebody joins a consumer group.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinBody {
    /// 1 to 100 names. One that doesn't exist yet is consumed once it does.
    topics: Vec<String>,
    /// `created||paid`: kept for the member's stream, and shown.
    #[serde(default)]
    tag: Option<String>,
    /// `headers.region = 'eu'`, at most 4096 bytes: kept for the member's stream, and shown.
    #[serde(default)]
    filter: Option<String>,
    /// The same again is the same member: its former life is fenced, its queues stay its own.
    #[serde(default)]
    instance_id: Option<String>,
    #[serde(default, deserialize_with = "mode")]
    mode: ModeBody,
    /// Counts where nothing was committed yet.
    #[serde(default, deserialize_with = "start")]
    start: StartBody,
    /// Silence after which the member is expelled: 1000 to 300000, default 10000.
    #[serde(default)]
    session_timeout_ms: Option<u64>,
    /// Who joins last and names one decides for the group; sticky at first.
    #[serde(default, deserialize_with = "strategy")]
    strategy: Option<StrategyBody>,
}

fn mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ModeBody, D::Error> {
    let allowed = r#""cluster" or "broadcast""#;
    Ok(object::choice(deserializer, allowed)?.unwrap_or_default())
}

fn start<'de, D: Deserializer<'de>>(deserializer: D) -> Result<StartBody, D::Error> {
    let allowed = r#""earliest", "latest" or {"timestamp_ms": N}"#;
    Ok(object::choice(deserializer, allowed)?.unwrap_or_default())
}

fn strategy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<StrategyBody>, D::Error> {
    object::choice(deserializer, r#""sticky", "range" or "round_robin""#)
}

impl JoinBody {
    pub fn request(self, group: String) -> Result<JoinRequest, ApiError> {
        let count = self.topics.len();
        if !(1..=MAX_TOPICS).contains(&count) {
            return Err(ApiError::invalid(format!(
                "topics has {count} entries; it must have 1 to {MAX_TOPICS}"
            )));
        }
        for topic in &self.topics {
            checked_name("topic name", topic)?;
        }
        if self
            .tag
            .as_ref()
            .is_some_and(|tag| tag.len() > MAX_TAG_BYTES)
        {
            return Err(ApiError::invalid(format!(
                "tag has more than {MAX_TAG_BYTES} bytes"
            )));
        }
        Selection::parse(self.tag.as_deref(), self.filter.as_deref()).map_err(BrokerError::from)?;
        if let Some(instance) = &self.instance_id {
            check_instance(instance)?;
        }
        if self.mode == ModeBody::Broadcast && self.instance_id.is_none() {
            return Err(ApiError::invalid(
                "instance_id is missing; in mode broadcast a member's offsets are kept under it",
            ));
        }
        let session_timeout_ms = bounded(
            "session_timeout_ms",
            self.session_timeout_ms,
            SESSION_MS,
            DEFAULT_SESSION_MS,
        )?;
        Ok(JoinRequest {
            group,
            topics: self.topics,
            tag: self.tag,
            filter: self.filter,
            instance_id: self.instance_id,
            delivery: match self.mode {
                ModeBody::Cluster => Delivery::Cluster,
                ModeBody::Broadcast => Delivery::Broadcast,
            },
            start: match self.start {
                StartBody::Earliest => GroupStart::Earliest,
                StartBody::Latest => GroupStart::Latest,
                StartBody::TimestampMs(ms) => GroupStart::Timestamp(ms),
            },
            session_timeout_ms,
            strategy: self.strategy.map(|strategy| match strategy {
                StrategyBody::Sticky => AssignStrategy::Sticky,
                StrategyBody::Range => AssignStrategy::Range,
                StrategyBody::RoundRobin => AssignStrategy::RoundRobin,
            }),
        })
    }
}

fn check_instance(instance: &str) -> Result<(), ApiError> {
    let fits = (1..=MAX_INSTANCE_BYTES).contains(&instance.len());
    if fits && !instance.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "instance_id must have 1 to {MAX_INSTANCE_BYTES} bytes and no control characters"
    )))
}

/// A queue by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QueueName {
    topic: String,
    queue: u32,
}

impl From<&(String, u32)> for QueueName {
    fn from((topic, queue): &(String, u32)) -> Self {
        Self {
            topic: topic.clone(),
            queue: *queue,
        }
    }
}

/// A member's sign of life.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HeartbeatBody {
    /// The newest the member was told.
    pub epoch: u64,
    /// The queues it still consumes. A queue that is to move does so once it is listed no more.
    #[serde(default, deserialize_with = "optional_list")]
    owned: Option<Vec<QueueName>>,
}

fn optional_list<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<QueueName>>, D::Error> {
    let found = Option::<Vec<object::Object<QueueName>>>::deserialize(deserializer)?;
    Ok(found.map(|list| list.into_iter().map(|entry| entry.0).collect()))
}

impl HeartbeatBody {
    pub fn owned(self) -> Result<Option<Vec<(String, u32)>>, ApiError> {
        let Some(owned) = self.owned else {
            return Ok(None);
        };
        if owned.len() > MAX_OWNED {
            return Err(ApiError::invalid(format!(
                "owned has more than {MAX_OWNED} entries"
            )));
        }
        for queue in &owned {
            checked_name("topic name", &queue.topic)?;
        }
        Ok(Some(
            owned.into_iter().map(|q| (q.topic, q.queue)).collect(),
        ))
    }
}

/// A queue to consume, from this offset on.
#[derive(Debug, Serialize, ToSchema)]
pub struct AssignedBody {
    topic: String,
    queue: u32,
    offset: u64,
}

pub fn assigned(assignment: &[AssignedQueue]) -> Vec<AssignedBody> {
    let each = assignment.iter().map(|assigned| AssignedBody {
        topic: assigned.topic.clone(),
        queue: assigned.queue,
        offset: assigned.offset,
    });
    each.collect()
}

/// A new member's place.
#[derive(Debug, Serialize, ToSchema)]
pub struct JoinedBody {
    member_id: String,
    epoch: u64,
    assignment: Vec<AssignedBody>,
    heartbeat_interval_ms: u64,
    session_timeout_ms: u64,
    /// Subscribed topics that don't exist.
    missing_topics: Vec<String>,
}

impl From<MemberAnswer> for JoinedBody {
    fn from(answer: MemberAnswer) -> Self {
        Self {
            epoch: answer.epoch,
            assignment: assigned(&answer.assignment),
            heartbeat_interval_ms: answer.heartbeat_interval_ms(),
            session_timeout_ms: answer.session_timeout_ms,
            missing_topics: answer.missing_topics,
            member_id: answer.member_id,
        }
    }
}

/// What a member is told at a heartbeat.
#[derive(Debug, Serialize, ToSchema)]
pub struct HeartbeatAnswer {
    epoch: u64,
    assignment: Vec<AssignedBody>,
    heartbeat_interval_ms: u64,
}

impl From<&MemberAnswer> for HeartbeatAnswer {
    fn from(answer: &MemberAnswer) -> Self {
        Self {
            epoch: answer.epoch,
            assignment: assigned(&answer.assignment),
            heartbeat_interval_ms: answer.heartbeat_interval_ms(),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct GroupsBody {
    pub groups: Vec<GroupSummaryBody>,
}

/// A consumer group in a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct GroupSummaryBody {
    group: String,
    /// `offsets`: its consumers commit; `leases`: they receive and acknowledge.
    kind: &'static str,
    members: u64,
}

fn kind(mode: GroupMode) -> &'static str {
    match mode {
        GroupMode::Offsets => "offsets",
        GroupMode::Leases => "leases",
    }
}

impl From<GroupSummary> for GroupSummaryBody {
    fn from(group: GroupSummary) -> Self {
        Self {
            kind: kind(group.mode),
            members: group.members,
            group: group.name,
        }
    }
}

/// A consumer group.
#[derive(Debug, Serialize, ToSchema)]
pub struct GroupBody {
    group: String,
    /// `offsets`: its consumers commit; `leases`: they receive and acknowledge.
    kind: &'static str,
    mode: ModeBody,
    /// `empty`: no members; `rebalancing`: a queue waits for its owner to stop; else `stable`.
    state: &'static str,
    strategy: StrategyBody,
    epoch: u64,
    members: Vec<GroupMemberBody>,
    offsets: Vec<GroupQueueBody>,
    /// Of all queues; null while one of them can't tell.
    lag: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct GroupMemberBody {
    member_id: String,
    instance_id: Option<String>,
    topics: Vec<String>,
    tag: Option<String>,
    filter: Option<String>,
    epoch: u64,
    session_timeout_ms: u64,
    /// How long ago its last sign of life was; null while a new leader has heard none.
    last_heartbeat_age_ms: Option<u64>,
    assignment: Vec<QueueName>,
    /// Queues it is asked to give up.
    revoking: Vec<QueueName>,
}

impl From<MemberDescription> for GroupMemberBody {
    fn from(described: MemberDescription) -> Self {
        let member = described.member;
        Self {
            member_id: described.id,
            instance_id: member.instance_id,
            topics: member.topics,
            tag: member.tag,
            filter: member.filter,
            epoch: member.epoch,
            session_timeout_ms: member.session_timeout_ms,
            last_heartbeat_age_ms: described.heard_ms_ago,
            assignment: described.assignment.iter().map(QueueName::from).collect(),
            revoking: described.revoking.iter().map(QueueName::from).collect(),
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct GroupQueueBody {
    topic: String,
    queue: u32,
    /// Null where nothing was committed.
    offset: Option<u64>,
    /// Null, as the lag, while the queue can't tell: it has no leader.
    end_offset: Option<u64>,
    lag: Option<u64>,
    lag_ms: Option<u64>,
    /// Who owns the queue.
    member_id: Option<String>,
    /// Of a broadcast group: whose offset this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_id: Option<String>,
}

impl From<QueueOwner> for GroupQueueBody {
    fn from(queue: QueueOwner) -> Self {
        let place = queue.offset;
        Self {
            topic: place.topic,
            queue: place.queue,
            offset: place.offset,
            end_offset: place.behind.map(|behind| behind.end_offset),
            lag: place.behind.map(|behind| behind.lag),
            lag_ms: place.behind.map(|behind| behind.lag_ms),
            member_id: queue.member,
            instance_id: queue.instance,
        }
    }
}

impl GroupBody {
    pub fn new(group: String, described: GroupDescription) -> Self {
        let state = match (described.members.is_empty(), described.moving) {
            (true, _) => "empty",
            (false, true) => "rebalancing",
            (false, false) => "stable",
        };
        let offsets: Vec<GroupQueueBody> = described
            .offsets
            .into_iter()
            .map(GroupQueueBody::from)
            .collect();
        let members = described.members.into_iter();
        Self {
            group,
            kind: kind(described.mode),
            mode: match described.delivery {
                Delivery::Cluster => ModeBody::Cluster,
                Delivery::Broadcast => ModeBody::Broadcast,
            },
            state,
            strategy: match described.strategy {
                AssignStrategy::Sticky => StrategyBody::Sticky,
                AssignStrategy::Range => StrategyBody::Range,
                AssignStrategy::RoundRobin => StrategyBody::RoundRobin,
            },
            epoch: described.epoch,
            members: members.map(GroupMemberBody::from).collect(),
            lag: offsets.iter().map(|queue| queue.lag).sum(),
            offsets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse_json;

    fn join(text: &str) -> Result<JoinRequest, String> {
        let body = parse_json::<JoinBody>(text.as_bytes());
        let said = |error| match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        body.and_then(|body| body.request("g".to_owned()))
            .map_err(said)
    }

    #[test]
    fn what_somebody_who_joins_may_say() {
        let request = join(r#"{"topics":["a"]}"#).unwrap();
        assert_eq!(request.session_timeout_ms, 10_000);
        assert_eq!(request.delivery, Delivery::Cluster);
        assert_eq!(
            (request.start, request.strategy),
            (GroupStart::Earliest, None)
        );
        let nulls = join(r#"{"topics":["a"],"mode":null,"start":null,"strategy":null}"#);
        assert_eq!(nulls.unwrap().start, GroupStart::Earliest);
        let request = join(
            r#"{"topics":["a","b"],"tag":"x||y","instance_id":"host-3","mode":"broadcast",
                "start":{"timestamp_ms":7},"session_timeout_ms":1000,"strategy":"round_robin"}"#,
        );
        let request = request.unwrap();
        assert_eq!(request.delivery, Delivery::Broadcast);
        assert_eq!(request.start, GroupStart::Timestamp(7));
        assert_eq!(request.strategy, Some(AssignStrategy::RoundRobin));
        for (text, named) in [
            (r#"{"topics":[]}"#, "1 to 100"),
            (r#"{"topics":["_x"]}"#, "topic name"),
            (r#"{"topics":["x"],"tag":"a||"}"#, "empty part"),
            (
                r#"{"topics":["x"],"mode":"broadcast"}"#,
                "instance_id is missing",
            ),
            (r#"{"topics":["x"],"instance_id":""}"#, "1 to 120 bytes"),
            (
                r#"{"topics":["x"],"session_timeout_ms":999}"#,
                "1000 to 300000",
            ),
            (r#"{"topics":["x"],"start":"middle"}"#, "middle"),
            (r#"{"topics":["x"],"start":5}"#, r#"{"timestamp_ms": N}"#),
            (
                r#"{"topics":["x"],"mode":5}"#,
                r#""cluster" or "broadcast""#,
            ),
            (r#"{"topics":["x"],"filter":"headers.a = "}"#, "filter"),
            (r#"{"topics":["x"],"strategy":"fair"}"#, "fair"),
            (r#"{"topics":["x"],"colour":1}"#, "unknown field `colour`"),
        ] {
            assert!(join(text).unwrap_err().contains(named), "{text}");
        }
    }

    #[test]
    fn a_heartbeat_lists_queues_or_says_nothing_of_them() {
        let owned = |text: &str| {
            let body = parse_json::<HeartbeatBody>(text.as_bytes());
            body.and_then(HeartbeatBody::owned)
        };
        assert_eq!(owned(r#"{"epoch":1}"#), Ok(None));
        assert_eq!(
            owned(r#"{"epoch":1,"owned":[{"topic":"t","queue":2}]}"#),
            Ok(Some(vec![("t".to_owned(), 2)]))
        );
        assert!(owned(r#"{"epoch":1,"owned":[["t",2]]}"#).is_err());
        // What an answer says of a queue is not what a heartbeat says of it.
        assert!(owned(r#"{"epoch":1,"owned":[{"topic":"t","queue":2,"x":1}]}"#).is_err());
    }
}
