//! Judged while it happens: what every answer says against what was known before. No network.

use super::findings::{Kind, Violation};
use super::history::{History, Id, Outcome, Sight, Stored, time};

/// An offset so far beyond the last one is no place to remember.
const JUMP_MAX: usize = 1 << 20;

/// One answer to a reader.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    pub lane: u16,
    pub witness: u16,
    /// The offset that was asked for.
    pub from: u64,
    /// Offsets below this were known before the read began, and it had to show them.
    pub floor: u64,
    pub began_us: u64,
    pub ended_us: u64,
}

/// A message in an answer: its offset, and what it is if this run has such a value.
#[derive(Debug, Clone)]
pub struct Shown {
    pub offset: u64,
    pub stored: Result<Stored, String>,
}

impl History {
    /// An acknowledgement: `witness` is its producer.
    pub fn acked(&mut self, id: Id, place: (u16, u64), mark: u64, (witness, now_us): (u16, u64)) {
        let (lane, offset) = place;
        let before = self.sent(id).map(|sent| (sent.outcome, sent.lane));
        match before {
            Some((Outcome::Acked { lane: l, offset: o }, _)) if (l, o) != place => {
                let (first, again) = (self.lane(l).name(), self.lane(lane).name());
                let history = vec![
                    self.tell(id),
                    format!(
                        "{} acknowledged again in {again} offset {offset}",
                        time(now_us)
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
        self.settle(id, Outcome::Acked { lane, offset }, now_us);
        self.lane_mut(lane).end_gap(now_us);
        let stored = Stored { id, mark };
        let sight = Sight {
            stored,
            at_us: now_us,
            witness,
        };
        self.see(lane, offset, sight);
    }

    /// Takes an answer apart; gives the offset the reader goes on at.
    pub fn read(&mut self, read: &Read, shown: &[Shown]) -> u64 {
        if shown.is_empty() && read.from < read.floor {
            self.stale_read(read, "nothing");
        }
        let mut next = read.from;
        for message in shown {
            if message.offset != next {
                let (got, who) = (message.offset, &self.witnesses[read.witness as usize]);
                let line = format!(
                    "{} {who} asked from offset {} and got {got} where {next} was next",
                    time(read.began_us),
                    read.from
                );
                let text = format!("offset {got} came where {next} was next");
                self.found(Kind::Skipped, read.lane, &text, vec![], vec![line]);
            }
            next = message.offset + 1;
            match &message.stored {
                Ok(stored) => {
                    let sight = Sight {
                        stored: *stored,
                        at_us: read.ended_us,
                        witness: read.witness,
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
            self.stale_read(read, &format!("an end at {end}"));
        }
    }

    fn stale_read(&mut self, read: &Read, showed: &str) {
        let who = self.witnesses[read.witness as usize].clone();
        let line = format!(
            "{} {who} asked from offset {} and was shown {showed} at {}",
            time(read.began_us),
            read.from,
            time(read.ended_us)
        );
        let known = read.floor.saturating_sub(1);
        let sight = self.lane(read.lane).seen[known as usize];
        let mut lines = Vec::new();
        let mut ids = Vec::new();
        if let Some(sight) = sight {
            ids.push(sight.stored.id);
            lines.push(self.tell_sight(known, &sight));
        }
        lines.push(line);
        let text = format!("a read that began later did not show offset {known}");
        self.found(Kind::StaleRead, read.lane, &text, ids, lines);
    }

    fn unknown_value(&mut self, read: &Read, offset: u64, value: &str) {
        let who = &self.witnesses[read.witness as usize];
        let shown: String = value.chars().take(80).collect();
        let line = format!(
            "{} {who} had {shown:?} at offset {offset}",
            time(read.ended_us)
        );
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
