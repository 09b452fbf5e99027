//! Judged while it happens: what every answer says against what was known before. No network.

use super::findings::{Kind, Violation};
use super::history::{History, Id, Outcome, Sight, Source, Stored, time};

/// An offset so far beyond the last one is no place to remember.
const JUMP_MAX: usize = 1 << 20;

/// One answer to a reader.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    pub lane: u16,
    /// Who asked which node, and when the answer was there.
    pub by: Source,
    /// The offset that was asked for.
    pub from: u64,
    /// Offsets below this were known before the read began, and it had to show them.
    pub floor: u64,
    pub began_us: u64,
}

/// A message in an answer: its offset, and what it is if this run has such a value.
#[derive(Debug, Clone)]
pub struct Shown {
    pub offset: u64,
    pub stored: Result<Stored, String>,
}

impl History {
    /// An acknowledgement: `witness` is its producer.
    pub fn acked(&mut self, id: Id, place: (u16, u64), mark: u64, by: Source) {
        let (lane, offset) = place;
        let before = self.sent(id).map(|sent| (sent.outcome, sent.lane));
        match before {
            Some((Outcome::Acked { lane: l, offset: o }, _)) if (l, o) != place => {
                let (first, again) = (self.lane(l).name(), self.lane(lane).name());
                let history = vec![
                    self.tell(id),
                    format!(
                        "{} acknowledged again in {again} offset {offset}, by node {}",
                        time(by.at_us),
                        by.node
                    ),
                ];
                self.findings.add(Kind::Twice, || Violation {
                    kind: Kind::Twice,
                    queue: Some(first),
                    what: "one message was acknowledged at two places".into(),
                    history,
                });
                return;
            }
            Some((Outcome::Acked { .. }, _)) => return,
            Some((_, Some(addressed))) if addressed != lane => {
                let text = format!("acknowledged in {}", self.lane(lane).name());
                self.found(Kind::NeverSent, addressed, &text, vec![id], vec![]);
            }
            _ => {}
        }
        self.settle(id, Outcome::Acked { lane, offset }, by.at_us);
        self.lane_mut(lane).end_gap(by.at_us);
        let stored = Stored { id, mark };
        self.see(lane, offset, Sight { stored, by });
    }

    /// Takes an answer apart; gives the offset the reader goes on at.
    pub fn read(&mut self, read: &Read, shown: &[Shown]) -> u64 {
        if shown.is_empty() && read.from < read.floor {
            self.stale_read(read, read.from, "nothing");
        }
        let mut next = read.from;
        for message in shown {
            if message.offset != next {
                let got = message.offset;
                let line = self.tell_read(read, &format!("{got} where {next} was next"));
                let text = format!("offset {got} came where {next} was next");
                self.found(Kind::Skipped, read.lane, &text, vec![], vec![line]);
            }
            next = message.offset + 1;
            match &message.stored {
                Ok(stored) => {
                    let sight = Sight {
                        stored: *stored,
                        by: read.by,
                    };
                    self.see(read.lane, message.offset, sight);
                }
                Err(value) => self.unknown_value(read, message.offset, value),
            }
        }
        next
    }

    /// A linearizable read said that the queue ends before what was known when it began.
    pub fn ended_early(&mut self, read: &Read, end: u64) {
        if end < read.floor {
            self.stale_read(read, end, &format!("an end at {end}"));
        }
    }

    fn tell_read(&self, read: &Read, showed: &str) -> String {
        let (who, node) = (&self.witnesses[read.by.witness as usize], read.by.node);
        let (began, ended) = (time(read.began_us), time(read.by.at_us));
        let from = read.from;
        format!("{began} {who} asked node {node} from offset {from}; at {ended} it showed {showed}")
    }

    /// `missed` had been seen before the read began.
    fn stale_read(&mut self, read: &Read, missed: u64, showed: &str) {
        let known = self.lane(read.lane).seen.get(missed as usize);
        let (mut lines, mut ids) = (Vec::new(), Vec::new());
        if let Some(sight) = known.copied().flatten() {
            ids.push(sight.stored.id);
            lines.push(self.tell_sight(missed, &sight));
        }
        lines.push(self.tell_read(read, showed));
        let text = format!("a read that began later did not show offset {missed}");
        self.found(Kind::StaleRead, read.lane, &text, ids, lines);
    }

    fn unknown_value(&mut self, read: &Read, offset: u64, value: &str) {
        let shown: String = value.chars().take(80).collect();
        let line = self.tell_read(read, &format!("{shown:?} at offset {offset}"));
        let text = format!("offset {offset} holds what nobody sent");
        self.found(Kind::NeverSent, read.lane, &text, vec![], vec![line]);
    }

    /// Somebody shows what lies at an offset: the same as everybody before.
    fn see(&mut self, lane: u16, offset: u64, sight: Sight) {
        if self.sent(sight.stored.id).is_none() {
            let line = self.tell_sight(offset, &sight);
            let text = format!("offset {offset} holds what nobody has sent yet");
            self.found(Kind::NeverSent, lane, &text, vec![], vec![line]);
        }
        let seen = &mut self.lane_mut(lane).seen;
        let index = offset as usize;
        if index > seen.len() + JUMP_MAX {
            let line = self.tell_sight(offset, &sight);
            let text = format!("offset {offset} is far beyond everything that was sent");
            return self.found(Kind::Hole, lane, &text, vec![], vec![line]);
        }
        if seen.len() <= index {
            seen.resize(index + 1, None);
        }
        let Some(first) = seen[index] else {
            seen[index] = Some(sight);
            return;
        };
        if first.stored != sight.stored {
            let lines = vec![
                self.tell_sight(offset, &first),
                self.tell_sight(offset, &sight),
            ];
            let ids = vec![first.stored.id, sight.stored.id];
            let text = format!("offset {offset} was seen with two messages");
            self.found(Kind::TwoValues, lane, &text, ids, lines);
        }
    }

    /// Adds a violation about one queue: what became of `ids`, and then `lines`.
    pub fn found(&mut self, kind: Kind, lane: u16, what: &str, ids: Vec<Id>, lines: Vec<String>) {
        let mut history: Vec<String> = ids.into_iter().map(|id| self.tell(id)).collect();
        history.dedup();
        history.extend(lines);
        let queue = Some(self.lane(lane).name());
        self.findings.add(kind, || Violation {
            kind,
            queue,
            what: what.to_owned(),
            history,
        });
    }
}

/// What one group has committed in one queue, from its only consumer's side.
#[derive(Debug, Clone, Copy, Default)]
pub struct Committed {
    /// The highest that was acknowledged or read back.
    proved: Option<u64>,
    /// The highest that was ever asked for.
    asked: Option<u64>,
}

impl Committed {
    pub fn ask(&mut self, offset: u64) {
        self.asked = self.asked.max(Some(offset));
    }

    pub fn acked(&mut self, offset: u64) {
        self.proved = self.proved.max(Some(offset));
    }

    /// A read of the committed offset that began after everything acknowledged so far: what is
    /// wrong with its answer, or None.
    pub fn read(&mut self, found: Option<u64>) -> Option<String> {
        if found < self.proved {
            let proved = self.proved.unwrap_or_default();
            return Some(format!(
                "the committed offset was {proved} and is {}",
                found.map_or("none".to_owned(), |offset| offset.to_string())
            ));
        }
        if found > self.asked {
            let found = found.unwrap_or_default();
            return Some(format!("nobody has committed {found}, and it is there"));
        }
        self.proved = found;
        None
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
