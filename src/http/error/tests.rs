use super::*;

fn every_broker_error() -> Vec<(BrokerError, u16, &'static str)> {
    use BrokerError as B;
    let s = String::new;
    let outcome = Outcome::Unknown;
    vec![
        (B::InvalidRequest(s()), 400, "invalid_request"),
        (B::InvalidName(s()), 400, "invalid_name"),
        (B::TopicNotFound { topic: s() }, 404, "topic_not_found"),
        (
            B::QueueNotFound {
                topic: s(),
                queue: 1,
                queues: 1,
            },
            404,
            "queue_not_found",
        ),
        (
            B::ReplicaNotFound {
                topic: s(),
                queue: 0,
                node: 1,
            },
            404,
            "replica_not_found",
        ),
        (
            B::ConsumerGroupNotFound { group: s() },
            404,
            "consumer_group_not_found",
        ),
        (B::TopicExists { topic: s() }, 409, "topic_exists"),
        (
            B::FencedMember {
                group: s(),
                member: s(),
            },
            409,
            "fenced_member",
        ),
        (
            B::FencedProducer {
                id: s(),
                epoch: 0,
                current: 1,
            },
            409,
            "fenced_producer",
        ),
        (
            B::OutOfOrderSequence {
                id: s(),
                sequence: 9,
                expected: 1,
            },
            409,
            "out_of_order_sequence",
        ),
        (
            B::OffsetConflict {
                offset: 1,
                committed: 2,
            },
            409,
            "offset_conflict",
        ),
        (
            B::OffsetOutOfRange {
                offset: 9,
                earliest_offset: 2,
                end_offset: 5,
            },
            416,
            "offset_out_of_range",
        ),
        (
            B::MessageTooLarge {
                bytes: 2,
                max_bytes: 1,
            },
            413,
            "message_too_large",
        ),
        (
            B::RequestTooLarge { max_bytes: 1 },
            413,
            "request_too_large",
        ),
        (B::QuotaExceeded(s()), 429, "quota_exceeded"),
        (
            B::RateExceeded {
                whose: s(),
                retry_after_ms: 1,
            },
            429,
            "quota_exceeded",
        ),
        (
            B::GeneratorNotFound { topic: s() },
            404,
            "generator_not_found",
        ),
        (B::BacklogFull(s()), 429, "backlog_full"),
        (
            B::MessageNotFound {
                topic: s(),
                message_id: s(),
            },
            404,
            "message_not_found",
        ),
        (
            B::AlreadyDelivered { message_id: s() },
            409,
            "already_delivered",
        ),
        (B::NoLeader { outcome }, 503, "no_leader"),
        (
            B::NotEnoughReplicas {
                available: 1,
                required: 3,
            },
            503,
            "not_enough_replicas",
        ),
        (B::Overloaded(s()), 503, "overloaded"),
        (B::DiskFull { node: 1 }, 503, "disk_full"),
        (B::Quarantined, 503, "quarantined"),
        (B::ShuttingDown, 503, "shutting_down"),
        (B::Timeout { outcome }, 504, "timeout"),
        (B::AnswerLost, 504, "timeout"),
        (
            B::CannotLead {
                node: 2,
                reason: s(),
            },
            503,
            "not_enough_replicas",
        ),
        (B::Internal(s()), 500, "internal"),
    ]
}

#[test]
fn the_contracts_table() {
    for (error, status, code) in every_broker_error() {
        let retry_after = matches!(status, 429 | 503);
        let problem = Problem::new(&error.clone().into(), true);
        assert_eq!((problem.status, problem.code), (status, code));
        assert_eq!(problem.retryable, error.retryable(), "{code}");
        let response = problem.response();
        assert_eq!(
            response.headers().contains_key("retry-after"),
            retry_after,
            "{code}"
        );
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
    }
}

#[test]
fn only_writes_have_an_outcome() {
    let error = ApiError::from(BrokerError::Timeout {
        outcome: Outcome::Unknown,
    });
    assert_eq!(Problem::new(&error, true).outcome, Some("unknown"));
    assert_eq!(Problem::new(&error, false).outcome, None);
    let lost = ApiError::from(BrokerError::AnswerLost);
    assert_eq!(Problem::new(&lost, true).outcome, Some("unknown"));
    assert!(is_write(&Method::POST, "/v1/topics/t/messages"));
    assert!(!is_write(&Method::POST, "/v1/fetch"));
    assert!(!is_write(&Method::GET, "/v1/topics"));
}

#[test]
fn out_of_range_says_where_the_queue_is() {
    let error = BrokerError::OffsetOutOfRange {
        offset: 9,
        earliest_offset: 2,
        end_offset: 5,
    };
    let problem = serde_json::to_value(Problem::new(&error.into(), false)).unwrap();
    assert_eq!(problem["earliest_offset"], 2);
    assert_eq!(problem["end_offset"], 5);
    assert_eq!(problem["type"], "urn:quorate:problem:offset_out_of_range");
}

#[test]
fn who_is_over_quota_is_told_how_long() {
    for (retry_after_ms, seconds) in [(1, "1"), (1000, "1"), (1001, "2"), (59_500, "60")] {
        let error = BrokerError::RateExceeded {
            whose: String::new(),
            retry_after_ms,
        };
        let problem = Problem::new(&error.into(), true);
        assert_eq!(problem.retry_after_ms, Some(retry_after_ms));
        assert_eq!(problem.response().headers()["retry-after"], seconds);
    }
}

#[test]
fn a_name_too_long_is_not_echoed_whole() {
    let error = ApiError::invalid_name("topic name", &"x".repeat(100_000));
    assert!(Problem::new(&error, false).detail.len() < 400);
}

#[test]
fn a_wrong_sequence_says_what_to_do() {
    let said = |sequence, expected| {
        let id = "7".to_owned();
        BrokerError::OutOfOrderSequence {
            id,
            sequence,
            expected,
        }
        .to_string()
    };
    for (sequence, expected) in [(5, 0), (5, 3), (2, 0x7fff_ffff)] {
        let text = said(sequence, expected);
        assert!(text.contains("send the missing messages"), "{text}");
    }
    for (sequence, expected) in [(0, 12), (3, 4), (0x7fff_fff0, 2)] {
        let text = said(sequence, expected);
        assert!(text.contains("are stored"), "{text}");
    }
}
