//! Judged at the end: every replica against every acknowledgement, refusal and sighting. No network.

use std::collections::HashMap;

use super::findings::Kind;
use super::history::{History, Id, Outcome, Stored, time};

/// One replica of one queue, offset by offset from 0; None where it showed what nobody sent, which
/// was found when it was read.
#[derive(Debug)]
pub struct ReplicaLog {
    pub node: u64,
    pub messages: Vec<Option<Stored>>,
}

/// All replicas of one queue.
#[derive(Debug)]
pub struct LaneLogs {
    pub lane: u16,
    pub replicas: Vec<ReplicaLog>,
}

/// How the sends of the run ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    pub acked: u64,
    pub lost: u64,
    pub unknown: u64,
    pub unknown_stored: u64,
    pub refused: u64,
    pub stored: u64,
}

type Places = HashMap<Id, (u16, u64)>;

/// Finds everything that is wrong with what the replicas hold in the end.
pub fn judge(history: &mut History, logs: &[LaneLogs]) -> Totals {
    let (mut places, mut stored) = (Places::new(), 0);
    for lane in logs {
        same_everywhere(history, lane);
        as_seen(history, lane);
        let Some(reference) = lane.replicas.first() else {
            continue;
        };
        stored += reference.messages.len() as u64;
        stored_once(history, lane.lane, reference, &mut places);
        in_order(history, lane.lane, reference);
    }
    let lost = lost(history, logs);
    torn(history, &places);
    let sends = totals(history, &places);
    Totals {
        lost,
        stored,
        ..sends
    }
}

fn same_everywhere(history: &mut History, lane: &LaneLogs) {
    let Some((reference, others)) = lane.replicas.split_first() else {
        return;
    };
    for other in others {
        let end = reference.messages.len().max(other.messages.len());
        for offset in 0..end {
            let (a, b) = (reference.messages.get(offset), other.messages.get(offset));
            if a == b {
                continue;
            }
            let lines = vec![
                holds(history, reference, offset),
                holds(history, other, offset),
            ];
            let text = format!("two replicas differ at offset {offset}");
            history.found(Kind::TwoValues, lane.lane, &text, vec![], lines);
        }
    }
}

fn holds(history: &History, replica: &ReplicaLog, offset: usize) -> String {
    let what = match replica.messages.get(offset) {
        None => format!("ends at offset {}", replica.messages.len()),
        Some(None) => format!("holds at offset {offset} what nobody sent"),
        Some(Some(stored)) => {
            let name = history.name_of(stored.id);
            format!("holds at offset {offset} {name}")
        }
    };
    format!("at the end node {} {what}", replica.node)
}

/// What anybody saw during the run is what the replicas hold: at its place, and not gone.
fn as_seen(history: &mut History, lane: &LaneLogs) {
    for offset in 0..history.lane(lane.lane).seen.len() {
        let sight = history.lane(lane.lane).seen[offset];
        let Some(sight) = sight else { continue };
        let differs = |log: &&ReplicaLog| log.messages.get(offset) != Some(&Some(sight.stored));
        let Some(replica) = lane.replicas.iter().find(differs) else {
            continue;
        };
        let gone = replica.messages.len() <= offset;
        let kind = if gone {
            Kind::Vanished
        } else {
            Kind::TwoValues
        };
        let lines = vec![
            history.tell_sight(offset as u64, &sight),
            holds(history, replica, offset),
        ];
        let text = format!("what was seen at offset {offset} is not there");
        history.found(kind, lane.lane, &text, vec![sight.stored.id], lines);
    }
}

/// No message twice, none that was refused, none that was never sent or sent elsewhere.
fn stored_once(history: &mut History, lane: u16, log: &ReplicaLog, places: &mut Places) {
    for (offset, stored) in log.messages.iter().enumerate() {
        let Some(Stored { id, .. }) = *stored else {
            continue;
        };
        let here = vec![holds(history, log, offset)];
        let Some(sent) = history.sent(id).copied() else {
            let text = format!("offset {offset} holds what nobody sent");
            history.found(Kind::NeverSent, lane, &text, vec![], here);
            continue;
        };
        if sent.lane.is_some_and(|addressed| addressed != lane) {
            let text = format!("offset {offset} holds what was sent to another queue");
            history.found(Kind::NeverSent, lane, &text, vec![id], here.clone());
        }
        if sent.outcome == Outcome::Refused {
            let text = format!("offset {offset} holds what was refused");
            history.found(Kind::RefusedButStored, lane, &text, vec![id], here.clone());
        }
        if let Some((other, first)) = places.insert(id, (lane, offset as u64)) {
            let other = history.lane(other).name();
            let text = format!("one message lies in {other} offset {first} and at offset {offset}");
            history.found(Kind::Twice, lane, &text, vec![id], here);
        }
    }
}

/// A message that was sent after another one's acknowledgement lies behind it. For one sequential
/// producer this is its own order.
fn in_order(history: &mut History, lane: u16, log: &ReplicaLog) {
    // Of the messages behind: the one that was acknowledged first.
    let mut first_acked: Option<(u64, usize, Id)> = None;
    for (offset, stored) in log.messages.iter().enumerate().rev() {
        let Some(Stored { id, .. }) = *stored else {
            continue;
        };
        let Some(sent) = history.sent(id).copied() else {
            continue;
        };
        if let Some((acked_us, behind, other)) = first_acked
            && acked_us < sent.sent_us
        {
            let line = holds(history, log, behind);
            let text = format!("offset {offset} was sent when offset {behind} was acknowledged");
            let lines = vec![line, holds(history, log, offset)];
            history.found(Kind::Order, lane, &text, vec![other, id], lines);
        }
        if matches!(sent.outcome, Outcome::Acked { .. })
            && first_acked.is_none_or(|(acked_us, ..)| sent.done_us < acked_us)
        {
            first_acked = Some((sent.done_us, offset, id));
        }
    }
}

/// Every acknowledged message lies where it was acknowledged, on every replica.
fn lost(history: &mut History, logs: &[LaneLogs]) -> u64 {
    let mut lost = 0;
    for producer in 0..history.producers.len() {
        for number in 0..history.producers[producer].sent.len() {
            let sent = history.producers[producer].sent[number];
            let Outcome::Acked { lane, offset } = sent.outcome else {
                continue;
            };
            let id = Id {
                producer: producer as u16,
                number: number as u32,
            };
            let replicas = logs.iter().filter(|logs| logs.lane == lane);
            let replicas = replicas.flat_map(|logs| &logs.replicas);
            let at = |log: &ReplicaLog| log.messages.get(offset as usize).copied().flatten();
            let without = replicas.clone().find(|log| {
                let found = at(log);
                found.is_none_or(|stored| stored.id != id)
            });
            if without.is_none() && replicas.count() > 0 {
                continue;
            }
            lost += 1;
            let lines = without.map(|log| holds(history, log, offset as usize));
            let text = format!("an acknowledged message is not at offset {offset}");
            let lines = lines.into_iter().collect();
            history.found(Kind::Lost, lane, &text, vec![id], lines);
        }
    }
    lost
}

/// The messages of one request to one queue are stored as one batch: side by side, all or none.
fn torn(history: &mut History, places: &Places) {
    for producer in 0..history.producers.len() {
        for number in 1..history.producers[producer].sent.len() {
            let sent = history.producers[producer].sent[number];
            let Some(lane) = sent.lane.filter(|_| sent.part > 0) else {
                continue;
            };
            let id = |number: usize| Id {
                producer: producer as u16,
                number: number as u32,
            };
            let (before, here) = (places.get(&id(number - 1)), places.get(&id(number)));
            let beside = match (before, here) {
                (Some((a, before)), Some((b, here))) => a == b && before + 1 == *here,
                (None, None) => true,
                _ => false,
            };
            if beside {
                continue;
            }
            let line = |place: Option<&(u16, u64)>| {
                place.map_or("not stored".to_owned(), |(_, offset)| {
                    format!("stored at offset {offset}")
                })
            };
            let lines = vec![line(before), line(here)];
            let text = "two messages of one request are not side by side";
            let ids = vec![id(number - 1), id(number)];
            history.found(Kind::Torn, lane, text, ids, lines);
        }
    }
}

/// How the sends ended, as far as their producers know.
fn totals(history: &History, places: &Places) -> Totals {
    let mut totals = Totals::default();
    for (producer, log) in history.producers.iter().enumerate() {
        for (number, sent) in log.sent.iter().enumerate() {
            let id = Id {
                producer: producer as u16,
                number: number as u32,
            };
            match sent.outcome {
                Outcome::Acked { .. } => totals.acked += 1,
                Outcome::Refused => totals.refused += 1,
                Outcome::Pending | Outcome::Unknown => {
                    totals.unknown += 1;
                    totals.unknown_stored += u64::from(places.contains_key(&id));
                }
            }
        }
    }
    totals
}

/// The longest time without an acknowledgement: of which queue, from when, and how long.
pub fn longest_gap(history: &History) -> Option<(String, String, u64)> {
    let longest = history
        .lanes
        .iter()
        .max_by_key(|lane| lane.longest_gap_us.1 - lane.longest_gap_us.0)?;
    let (from, to) = longest.longest_gap_us;
    Some((longest.name(), time(from), (to - from) / 1000))
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
