use quorate_storage::batch::BatchView;

use super::*;
use crate::broker::TopicConfig;

const MAX: usize = 1 << 20;

fn topic(queues: u32, hash_queues: u32) -> Topic {
    Topic {
        id: 1,
        name: "t".to_owned(),
        config: TopicConfig {
            queues,
            hash_queues,
            max_message_bytes: 100,
            ..TopicConfig::default()
        },
        queues: Vec::new(),
    }
}

fn message(key: Option<&str>, queue: Option<u32>) -> NewMessage {
    NewMessage {
        value: Some(Bytes::from_static(b"v")),
        key: key.map(str::to_owned),
        queue,
        ..NewMessage::default()
    }
}

fn request(messages: Vec<NewMessage>) -> ProduceRequest {
    ProduceRequest {
        topic: "t".to_owned(),
        messages,
        producer: None,
        idempotency_key: None,
    }
}

const STAMP: ProducerStamp = ProducerStamp {
    id: 9,
    epoch: 0,
    base_sequence: 4,
};

#[test]
fn queue_beats_key_beats_round_robin() {
    let topic = topic(8, 4);
    let request = request(vec![
        message(Some("foobar"), Some(7)),
        message(Some("foobar"), None),
        message(None, None),
        message(None, None),
    ]);
    let queues = choose(&topic, &request, false, 0).unwrap();
    assert_eq!(queues, [7, queue_of_key(b"foobar", 4), 1, 2]);
}

#[test]
fn one_batch_per_queue_in_request_order() {
    let messages = vec![
        message(None, Some(1)),
        message(None, Some(0)),
        message(None, Some(1)),
    ];
    let parts = encode(&topic(2, 2), &request(messages), None, 0, MAX).unwrap();
    let places: Vec<_> = parts.iter().map(|p| (p.queue, p.places.clone())).collect();
    assert_eq!(places, [(0, vec![1]), (1, vec![0, 2])]);
    let batch = parts[1].batch.as_ref().unwrap().batch.clone();
    assert_eq!(BatchView::parse(batch).unwrap().record_count(), 2);
}

#[test]
fn a_missing_queue_or_large_message_fails_its_own_part() {
    let mut large = message(None, Some(1));
    large.value = Some(Bytes::from(vec![0; 101]));
    let messages = vec![message(None, Some(0)), large, message(None, Some(9))];
    let parts = encode(&topic(2, 2), &request(messages), None, 0, MAX).unwrap();
    assert!(parts[0].batch.is_ok());
    let max_bytes = 100;
    let too_large = BrokerError::MessageTooLarge {
        bytes: 101,
        max_bytes,
    };
    assert_eq!(parts[1].batch, Err(too_large));
    assert!(matches!(
        parts[2].batch,
        Err(BrokerError::QueueNotFound { queue: 9, .. })
    ));
}

#[test]
fn a_batch_is_bounded() {
    let messages = vec![message(None, Some(0)); 100];
    let parts = encode(&topic(1, 1), &request(messages), None, 0, 200).unwrap();
    assert_eq!(
        parts[0].batch,
        Err(BrokerError::RequestTooLarge { max_bytes: 200 })
    );
}

#[test]
fn a_producer_keeps_to_one_queue() {
    let topic = topic(8, 8);
    let mut spread = request(vec![message(None, Some(1)), message(None, Some(2))]);
    spread.producer = Some(ProducerMark {
        id: "9".to_owned(),
        epoch: 0,
        sequence: 4,
    });
    let refused = encode(&topic, &spread, Some(STAMP), 0, MAX);
    assert!(matches!(refused, Err(BrokerError::InvalidRequest(_))));
    spread.messages = vec![message(None, None), message(None, Some(2))];
    let parts = encode(&topic, &spread, Some(STAMP), 0, MAX).unwrap();
    assert_eq!((parts.len(), parts[0].queue), (1, 2));
    let view = BatchView::parse(parts[0].batch.as_ref().unwrap().batch.clone()).unwrap();
    assert_eq!(view.producer(), Some(STAMP));
    spread.messages = vec![message(None, None)];
    let first = encode(&topic, &spread, Some(STAMP), 0, MAX).unwrap()[0].queue;
    let again = encode(&topic, &spread, Some(STAMP), 5, MAX).unwrap()[0].queue;
    assert_eq!(first, again, "round robin has no part in it");
}

#[test]
fn an_idempotency_key_fixes_queue_and_fingerprint() {
    let topic = topic(8, 8);
    let mut one = request(vec![message(None, None), message(None, None)]);
    one.idempotency_key = Some("k".to_owned());
    let parts = encode(&topic, &one, None, 0, MAX).unwrap();
    let again = encode(&topic, &one, None, 3, MAX).unwrap();
    assert_eq!(parts.len(), 1);
    assert_eq!(parts[0].queue, again[0].queue);
    let (first, second) = (
        parts[0].batch.as_ref().unwrap(),
        again[0].batch.as_ref().unwrap(),
    );
    assert_eq!(first.mark, second.mark);
    let Mark::Key { hash, fingerprint } = first.mark else {
        panic!("a key");
    };
    one.messages[1].value = Some(Bytes::from_static(b"other"));
    let other = encode(&topic, &one, None, 0, MAX).unwrap();
    let other = other[0].batch.as_ref().unwrap();
    assert!(
        matches!(other.mark, Mark::Key { hash: h, fingerprint: f } if h == hash && f != fingerprint)
    );
}

#[test]
fn producer_marks_are_checked() {
    let mark = |id: &str, epoch, sequence| ProducerMark {
        id: id.to_owned(),
        epoch,
        sequence,
    };
    assert!(producer_stamp(&mark("9", 0, 4), 16).is_ok());
    for bad in [
        mark("x", 0, 0),
        mark("0", 0, 0),
        mark("-5", 0, 0),
        mark(&(17i64 << 40).to_string(), 0, 0),
        mark("9", 1, 0),
        mark("9", 70_000, 0),
        mark("9", 0, 1 << 31),
    ] {
        let refused = producer_stamp(&bad, 16);
        assert!(
            matches!(refused, Err(BrokerError::InvalidRequest(_))),
            "{bad:?}"
        );
    }
}

#[test]
fn reserved_headers_are_refused() {
    let mut tagged = message(None, Some(0));
    tagged
        .headers
        .insert("quorate.tag".to_owned(), "x".to_owned());
    let parts = encode(&topic(1, 1), &request(vec![tagged]), None, 0, MAX).unwrap();
    assert!(matches!(
        parts[0].batch,
        Err(BrokerError::InvalidRequest(_))
    ));
}
