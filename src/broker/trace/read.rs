//! The trace of one message, put together from what was written.

use std::collections::BTreeSet;

use super::write::BELOW_HEADER;
use super::{About, TRACE_TOPIC, TraceEvent, TraceKind, key_of};
use crate::broker::search::LookupRequest;
use crate::broker::{Broker, BrokerResult, Message, Selection, parse_message_id};

/// Events read of one message, and of what is about all below an offset.
const MAX_EVENTS: usize = 1000;

/// What became of a message, as far as it was seen.
#[derive(Debug, Clone)]
pub struct MessageTrace {
    pub queue: u32,
    pub offset: u64,
    /// Whether its topic is traced now.
    pub traced: bool,
    /// By time.
    pub events: Vec<TraceEvent>,
    /// Whether there were too many to show all.
    pub more: bool,
}

impl Broker {
    pub async fn message_trace(&self, topic: &str, message_id: &str) -> BrokerResult<MessageTrace> {
        let message = self.message(topic, message_id).await?;
        let topic = self.find_topic(topic).await?;
        let mut events = vec![stored(&message)];
        let mut more = false;
        if self.catalog().topic(TRACE_TOPIC).is_some() {
            let about = About::Message(message.offset);
            let of_message = key_of(topic.id, message.queue, about);
            let (own, cut) = self.trace_events(&message, of_message, None).await?;
            more |= cut;
            let below = format!("headers.{BELOW_HEADER} > {}", message.offset);
            let of_queue = key_of(topic.id, message.queue, About::Below(0));
            let (of_all, cut) = self.trace_events(&message, of_queue, Some(&below)).await?;
            // Another group's first may be behind them.
            more |= cut;
            let first = first_of_each(&own, of_all);
            events.extend(own);
            events.extend(first);
        }
        events.sort_by_key(|event| event.time_ms);
        Ok(MessageTrace {
            queue: message.queue,
            offset: message.offset,
            traced: topic.config.trace,
            events,
            more,
        })
    }

    /// What was written under a key since the message was stored, and whether there is more.
    async fn trace_events(
        &self,
        message: &Message,
        key: String,
        filter: Option<&str>,
    ) -> BrokerResult<(Vec<TraceEvent>, bool)> {
        let request = LookupRequest {
            topic: TRACE_TOPIC.to_owned(),
            key: Some(key),
            selection: Selection::parse(None, filter)?,
            // Clocks of two nodes may differ a little.
            from_timestamp_ms: Some(message.timestamp_ms.saturating_sub(60_000)),
            max_messages: MAX_EVENTS,
            ..LookupRequest::default()
        };
        let Some(trace) = self.catalog().topic(TRACE_TOPIC).cloned() else {
            return Ok((Vec::new(), false));
        };
        let found = self.lookup_in(&trace, &request).await?;
        let values = found.messages.iter().filter_map(|m| m.value.as_ref());
        let events = values.filter_map(|value| serde_json::from_slice(value).ok());
        Ok((events.collect(), found.next.is_some()))
    }
}

/// A message's own id and time say this.
fn stored(message: &Message) -> TraceEvent {
    TraceEvent {
        event: TraceKind::Stored,
        time_ms: message.timestamp_ms,
        node: None,
        term: parse_message_id(&message.message_id).map(|place| place.term),
        group: None,
        consumer: None,
        delivery_count: None,
        reason: None,
        holder: None,
    }
}

/// Of what is about all messages below an offset: the first time that a group committed past this
/// one, and the first ack through it by a consumer that had it then.
fn first_of_each(own: &[TraceEvent], of_all: Vec<TraceEvent>) -> Vec<TraceEvent> {
    let mut passed = BTreeSet::new();
    let mut acked = BTreeSet::new();
    let holds = |event: &TraceEvent| {
        let before = own
            .iter()
            .filter(|seen| seen.group == event.group && seen.time_ms <= event.time_ms);
        let last = before.max_by_key(|seen| seen.time_ms);
        last.is_some_and(|last| last.event == TraceKind::Delivered && last.holder == event.holder)
    };
    let is_first = |event: &TraceEvent| match event.event {
        TraceKind::Passed => passed.insert(event.group.clone()),
        TraceKind::AckedThrough => {
            holds(event) && acked.insert((event.group.clone(), event.holder.clone()))
        }
        _ => false,
    };
    let mut first = of_all;
    first.retain({
        let mut is_first = is_first;
        move |event| is_first(event)
    });
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(event: TraceKind, group: &str, holder: &str, time_ms: u64) -> TraceEvent {
        TraceEvent {
            event,
            time_ms,
            node: None,
            term: None,
            group: Some(group.to_owned()),
            consumer: None,
            delivery_count: None,
            reason: None,
            holder: Some(holder.to_owned()),
        }
    }

    #[test]
    fn only_the_first_pass_of_a_group_and_acks_of_who_had_it_count() {
        use TraceKind::{Acked, AckedThrough, Delivered, Passed};
        let own = [
            event(Delivered, "leased", "x", 10),
            event(Acked, "leased", "x", 15),
        ];
        let of_all = vec![
            event(AckedThrough, "leased", "x", 5),
            event(AckedThrough, "leased", "y", 11),
            event(Passed, "a", "", 12),
            event(AckedThrough, "leased", "x", 13),
            event(Passed, "a", "", 14),
            event(Passed, "b", "", 15),
            event(AckedThrough, "leased", "x", 16),
        ];
        let first = first_of_each(&own, of_all);
        let times: Vec<u64> = first.iter().map(|event| event.time_ms).collect();
        assert_eq!(times, [12, 13, 15]);
    }
}
