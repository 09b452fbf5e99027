//! What was sent and what was seen, kept small: a message is a number, its value is made from it.
//!
//! All times are microseconds since the run began, from one clock, so that two operations can be
//! put in order when one ended before the other began.

use super::findings::Findings;

/// One message: who sent it, and the how many-th of theirs it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id {
    pub producer: u16,
    pub number: u32,
}

impl Id {
    /// The value that is sent: it tells run, producer and number, and has a length of its own.
    pub fn value(self, run: &str) -> String {
        let Id { producer, number } = self;
        let padding = (number as usize).wrapping_mul(37) % 160;
        format!("{run}.{producer}.{number}.{:x<padding$}", "")
    }

    /// The message that has exactly this value; None if this run has none.
    pub fn of(run: &str, value: &str) -> Option<Id> {
        let mut parts = value.strip_prefix(run)?.strip_prefix('.')?.split('.');
        let id = Id {
            producer: parts.next()?.parse().ok()?,
            number: parts.next()?.parse().ok()?,
        };
        (id.value(run) == value).then_some(id)
    }
}

/// A stored message as somebody showed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub id: Id,
    /// Hash of the message id the server gave it.
    pub mark: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Not answered yet; at the end that is as good as unknown.
    Pending,
    Acked {
        lane: u16,
        offset: u64,
    },
    Refused,
    Unknown,
}

/// One message on its way.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// The queue it was addressed to, where it was.
    pub lane: Option<u16>,
    /// Its place in its request.
    pub part: u16,
    pub node: u64,
    /// When it first left.
    pub sent_us: u64,
    /// When the answer came that decided.
    pub done_us: u64,
    pub outcome: Outcome,
}

#[derive(Debug)]
pub struct Producer {
    pub name: String,
    pub sent: Vec<Sent>,
}

/// Who says something, after which node's answer, and when.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    pub witness: u16,
    pub node: u64,
    pub at_us: u64,
}

/// What was first seen at an offset.
#[derive(Debug, Clone, Copy)]
pub struct Sight {
    pub stored: Stored,
    pub by: Source,
}

/// One queue of one topic.
#[derive(Debug)]
pub struct Lane {
    pub topic: String,
    pub queue: u32,
    /// By offset.
    pub seen: Vec<Option<Sight>>,
    /// Where acknowledgements for it stopped coming, and the longest such time: (from, to).
    pub last_ack_us: u64,
    pub longest_gap_us: (u64, u64),
}

impl Lane {
    pub fn new(topic: &str, queue: u32) -> Self {
        Self {
            topic: topic.to_owned(),
            queue,
            seen: Vec::new(),
            last_ack_us: 0,
            longest_gap_us: (0, 0),
        }
    }

    pub fn name(&self) -> String {
        format!("{}/{}", self.topic, self.queue)
    }

    /// A linearizable read that begins now has to know all offsets below this.
    pub fn floor(&self) -> u64 {
        self.seen.len() as u64
    }

    /// The time since the last acknowledgement has come to its end.
    pub fn end_gap(&mut self, now_us: u64) {
        let (from, to) = self.longest_gap_us;
        if now_us.saturating_sub(self.last_ack_us) > to - from {
            self.longest_gap_us = (self.last_ack_us, now_us);
        }
        self.last_ack_us = now_us;
    }
}

/// How many messages each kind of reader got.
#[derive(Debug, Default, Clone, Copy, serde::Serialize)]
pub struct Consumed {
    pub pull: u64,
    pub group: u64,
    pub stream: u64,
    pub stale: u64,
}

#[derive(Debug)]
pub struct History {
    pub producers: Vec<Producer>,
    pub lanes: Vec<Lane>,
    /// Who can say what lies where.
    pub witnesses: Vec<String>,
    pub consumed: Consumed,
    /// Committed offsets that were acknowledged, and readers' restarts from them.
    pub commits: u64,
    pub resumed: u64,
    pub findings: Findings,
}

impl History {
    pub fn new(lanes: Vec<Lane>) -> Self {
        Self {
            producers: Vec::new(),
            lanes,
            witnesses: Vec::new(),
            consumed: Consumed::default(),
            commits: 0,
            resumed: 0,
            findings: Findings::default(),
        }
    }

    pub fn add_producer(&mut self, name: String) -> u16 {
        self.producers.push(Producer {
            name,
            sent: Vec::new(),
        });
        // A plan has a handful of producers.
        (self.producers.len() - 1) as u16
    }

    pub fn add_witness(&mut self, name: String) -> u16 {
        self.witnesses.push(name);
        (self.witnesses.len() - 1) as u16
    }

    pub fn lane(&self, lane: u16) -> &Lane {
        &self.lanes[lane as usize]
    }

    pub fn lane_mut(&mut self, lane: u16) -> &mut Lane {
        &mut self.lanes[lane as usize]
    }

    pub fn sent(&self, id: Id) -> Option<&Sent> {
        let producer = self.producers.get(id.producer as usize)?;
        producer.sent.get(id.number as usize)
    }

    pub fn sent_mut(&mut self, id: Id) -> &mut Sent {
        // Only called with ids that `begin` gave out.
        &mut self.producers[id.producer as usize].sent[id.number as usize]
    }

    /// `count` messages are about to leave in one request; they are numbered from the answer on.
    pub fn begin(
        &mut self,
        producer: u16,
        count: u16,
        lane: Option<u16>,
        (node, now_us): (u64, u64),
    ) -> Id {
        let sent = &mut self.producers[producer as usize].sent;
        let number = sent.len() as u32;
        sent.extend((0..count).map(|part| Sent {
            lane,
            part,
            node,
            sent_us: now_us,
            done_us: now_us,
            outcome: Outcome::Pending,
        }));
        Id { producer, number }
    }

    /// An answer that is no acknowledgement decided about this message.
    pub fn settle(&mut self, id: Id, outcome: Outcome, now_us: u64) {
        let sent = self.sent_mut(id);
        (sent.outcome, sent.done_us) = (outcome, now_us);
    }

    /// What became of a message, in one line.
    pub fn tell(&self, id: Id) -> String {
        let Some(sent) = self.sent(id) else {
            let Id { producer, number } = id;
            return format!("nobody has sent message {number} of producer {producer}");
        };
        let who = &self.producers[id.producer as usize].name;
        let to = sent.lane.map_or(String::new(), |lane| {
            format!(" to {}", self.lane(lane).name())
        });
        let result = match sent.outcome {
            Outcome::Pending => "no answer by the end".to_owned(),
            Outcome::Refused => format!("refused as not committed at {}", time(sent.done_us)),
            Outcome::Unknown => format!("outcome unknown at {}", time(sent.done_us)),
            Outcome::Acked { lane, offset } => format!(
                "acknowledged at {} in {} offset {offset}",
                time(sent.done_us),
                self.lane(lane).name()
            ),
        };
        let (at, number, node) = (time(sent.sent_us), id.number, sent.node);
        format!("{at} {who} sent its message {number}{to} through node {node}: {result}")
    }

    pub fn tell_sight(&self, offset: u64, sight: &Sight) -> String {
        let (who, node) = (&self.witnesses[sight.by.witness as usize], sight.by.node);
        format!(
            "{} {who} had {} at offset {offset} from node {node}",
            time(sight.by.at_us),
            self.name_of(sight.stored.id)
        )
    }

    pub fn name_of(&self, id: Id) -> String {
        let producer = self.producers.get(id.producer as usize);
        let who = producer.map_or("nobody", |producer| &producer.name);
        format!("message {} of {who}", id.number)
    }
}

/// Seconds since the run began.
pub fn time(us: u64) -> String {
    format!("{}.{:03}s", us / 1_000_000, us / 1000 % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_tells_its_message_and_a_changed_one_tells_none() {
        for number in [0, 1, 7, 1000, u32::MAX] {
            let id = Id {
                producer: 3,
                number,
            };
            let value = id.value("r1");
            assert_eq!(Id::of("r1", &value), Some(id));
            assert_eq!(Id::of("r2", &value), None);
            assert_eq!(Id::of("r1", &format!("{value}x")), None);
        }
        assert_eq!(Id::of("r1", "r1.03.1."), None);
        assert_eq!(Id::of("r1", "hello"), None);
    }
}
