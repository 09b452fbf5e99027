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

fn delayed(delay: Delay) -> NewMessage {
    NewMessage {
        delay: Some(delay),
        ..message(None, Some(0))
    }
}

fn holds(parts: &[Part]) -> Vec<(Vec<usize>, bool)> {
    let each = parts.iter().map(|part| {
        let batch = part.batch.as_ref().unwrap();
        (part.places.clone(), batch.hold.is_some())
    });
    each.collect()
}

#[test]
fn each_delayed_message_is_a_batch_of_its_own() {
    let messages = vec![
        message(None, Some(0)),
        delayed(Delay::For(1000)),
        delayed(Delay::For(0)),
        delayed(Delay::For(1000)),
        delayed(Delay::Until(5)),
    ];
    let parts = encode(&topic(1, 1), &request(messages), None, 0, MAX).unwrap();
    let expected = [
        (vec![0, 2], false),
        (vec![1], true),
        (vec![3], true),
        // Past by this clock: its queue's leader decides, and retries make the same batches.
        (vec![4], true),
    ];
    assert_eq!(holds(&parts), expected);
}

#[test]
fn a_producers_numbers_follow_each_other_through_its_batches() {
    let mut mixed = request(vec![
        message(None, Some(0)),
        message(None, Some(0)),
        delayed(Delay::For(1000)),
        message(None, Some(0)),
    ]);
    mixed.producer = Some(ProducerMark {
        id: "9".to_owned(),
        epoch: 0,
        sequence: 4,
    });
    let parts = encode(&topic(1, 1), &mixed, Some(STAMP), 0, MAX).unwrap();
    let expected = [(vec![0, 1], false), (vec![2], true), (vec![3], false)];
    assert_eq!(holds(&parts), expected);
    let sequences = parts.iter().map(|part| {
        let batch = part.batch.as_ref().unwrap().batch.clone();
        BatchView::parse(batch)
            .unwrap()
            .producer()
            .unwrap()
            .base_sequence
    });
    assert_eq!(sequences.collect::<Vec<_>>(), [4, 6, 7]);
    mixed.messages = vec![delayed(Delay::For(1000)); REMEMBERED_BATCHES + 1];
    let refused = encode(&topic(1, 1), &mixed, Some(STAMP), 0, MAX);
    assert!(matches!(refused, Err(BrokerError::InvalidRequest(_))));
}

#[test]
fn under_a_key_every_batch_has_its_own_hash_and_the_delays_count() {
    let mut keyed = request(vec![delayed(Delay::For(1000)), delayed(Delay::For(1000))]);
    keyed.idempotency_key = Some("k".to_owned());
    let marks = |request: &ProduceRequest| -> Vec<Mark> {
        let parts = encode(&topic(1, 1), request, None, 0, MAX).unwrap();
        parts
            .into_iter()
            .map(|part| part.batch.unwrap().mark)
            .collect()
    };
    let first = marks(&keyed);
    assert_ne!(first[0], first[1]);
    assert_eq!(marks(&keyed), first, "whatever the time is");
    keyed.messages[1].delay = Some(Delay::For(1001));
    let [Mark::Key { hash, fingerprint }, _] = marks(&keyed)[..] else {
        panic!("keys");
    };
    assert!(
        matches!(first[0], Mark::Key { hash: h, fingerprint: f } if h == hash && f != fingerprint)
    );
}
