//! What clients were told, and what may be seen after it.
//!
//! Every value is sent for one message only, so a value seen at two places was stored twice. A write
//! without a clear answer is unknown: it may appear, now or later, or never.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::history::History;

/// A queue; topics are never made again under the same name.
pub type Queue = (String, u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Sent, and not answered for certain.
    Unknown,
    /// At this offset.
    Acked(u64),
    /// For certain not stored, at any attempt.
    Refused,
}

#[derive(Debug)]
struct Sent {
    queue: Option<Queue>,
    fate: Fate,
    /// Some attempt may have been stored.
    maybe: bool,
}

#[derive(Debug, Default)]
struct Known {
    sent: BTreeMap<String, Sent>,
    places: BTreeMap<(Queue, u64), String>,
    found: BTreeMap<String, (Queue, u64)>,
    /// One past the highest offset that anybody was told of.
    end: BTreeMap<Queue, u64>,
}

#[derive(Debug)]
pub struct Oracle {
    history: Arc<History>,
    known: Mutex<Known>,
}

impl Oracle {
    pub fn new(history: Arc<History>) -> Self {
        Self {
            history,
            known: Mutex::default(),
        }
    }

    /// A value is about to be sent for the first time.
    pub fn sending(&self, value: &str) {
        let sent = Sent {
            queue: None,
            fate: Fate::Unknown,
            maybe: false,
        };
        self.known.lock().sent.insert(value.to_owned(), sent);
    }

    /// An attempt ended without certainty.
    pub fn unknown(&self, value: &str) {
        if let Some(sent) = self.known.lock().sent.get_mut(value) {
            sent.maybe = true;
        }
    }

    /// An attempt was for certain not stored.
    pub fn refused(&self, value: &str) {
        let mut known = self.known.lock();
        let Some(sent) = known.sent.get_mut(value) else {
            return;
        };
        if !sent.maybe && sent.fate == Fate::Unknown {
            sent.fate = Fate::Refused;
            if let Some(place) = known.found.get(value).cloned() {
                drop(known);
                self.history
                    .violation(format!("{value} was refused and is at {place:?}"));
            }
        }
    }

    /// Tried again after a refusal.
    pub fn retrying(&self, value: &str) {
        if let Some(sent) = self.known.lock().sent.get_mut(value)
            && sent.fate == Fate::Refused
        {
            sent.fate = Fate::Unknown;
        }
    }

    pub fn acked(&self, value: &str, queue: &Queue, offset: u64) {
        let mut known = self.known.lock();
        if let Some(sent) = known.sent.get_mut(value) {
            if let Fate::Acked(before) = sent.fate
                && before != offset
            {
                let text = format!("{value} was acknowledged at {before} and at {offset}");
                drop(known);
                return self.history.violation(text);
            }
            sent.fate = Fate::Acked(offset);
            sent.queue = Some(queue.clone());
        }
        drop(known);
        self.place(queue, offset, value);
    }

    /// One past the highest offset that anybody was told of so far.
    pub fn end(&self, queue: &Queue) -> u64 {
        let known = self.known.lock();
        known.end.get(queue).copied().unwrap_or(0)
    }

    /// A reader has seen it there.
    pub fn seen(&self, queue: &Queue, offset: u64, value: &str) {
        self.place(queue, offset, value);
    }

    fn place(&self, queue: &Queue, offset: u64, value: &str) {
        let mut known = self.known.lock();
        let mut broken = Vec::new();
        match known.sent.get(value).map(|sent| sent.fate) {
            None => broken.push(format!("{value} at {queue:?} {offset} was never sent")),
            Some(Fate::Refused) => {
                broken.push(format!("{value} was refused and is at {queue:?} {offset}"));
            }
            Some(Fate::Unknown | Fate::Acked(_)) => {}
        }
        let at = (queue.clone(), offset);
        let there = known.places.entry(at.clone()).or_insert(value.to_owned());
        if there != value {
            broken.push(format!("{queue:?} {offset} is {there} and {value}"));
        }
        let before = known.found.entry(value.to_owned()).or_insert(at.clone());
        if *before != at {
            broken.push(format!("{value} is at {before:?} and at {at:?}"));
        }
        let end = known.end.entry(queue.clone()).or_default();
        *end = (*end).max(offset + 1);
        drop(known);
        broken
            .into_iter()
            .for_each(|text| self.history.violation(text));
    }

    /// A whole queue as one replica has it, from offset 0 on.
    pub fn check_whole(&self, queue: &Queue, values: &[String], of: &str) {
        for (offset, value) in (0..).zip(values) {
            self.place(queue, offset, value);
        }
        let end = self.end(queue);
        if (values.len() as u64) < end {
            let len = values.len();
            self.history
                .violation(format!("{of}: {queue:?} ends at {len}, {end} are known"));
        }
        let mut missing = Vec::new();
        for (value, sent) in &self.known.lock().sent {
            if let Fate::Acked(offset) = sent.fate
                && sent.queue.as_ref() == Some(queue)
                && values.get(offset as usize) != Some(value)
            {
                missing.push(format!("{of}: {value} is not at {queue:?} {offset}"));
            }
        }
        missing
            .into_iter()
            .for_each(|text| self.history.violation(text));
    }

    /// How many were acknowledged, refused, and unknown to the end.
    pub fn counts(&self) -> (usize, usize, usize) {
        let known = self.known.lock();
        let count =
            |wanted: fn(&Fate) -> bool| known.sent.values().filter(|s| wanted(&s.fate)).count();
        (
            count(|fate| matches!(fate, Fate::Acked(_))),
            count(|fate| matches!(fate, Fate::Refused)),
            count(|fate| matches!(fate, Fate::Unknown)),
        )
    }
}
