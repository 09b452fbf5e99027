//! Random operations against a plain vector.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    Append {
        records: u8,
        count: u32,
        step_ms: u64,
    },
    Flush,
    Sync,
    Reopen,
    Crash,
    Truncate(u16),
    Trim(u16),
    Reset(u16),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (1u8..=255, 1u32..9, 0u64..4).prop_map(|(records, count, step_ms)| Op::Append { records, count, step_ms }),
        1 => Just(Op::Flush),
        2 => Just(Op::Sync),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
        1 => any::<u16>().prop_map(Op::Truncate),
        2 => any::<u16>().prop_map(Op::Trim),
        1 => any::<u16>().prop_map(Op::Reset),
    ]
}

#[derive(Debug, Default)]
struct Model {
    records: Vec<IndexRecord>,
    first: u64,
    end: u64,
    time: u64,
}

impl Model {
    fn cut(&mut self, end: u64) {
        self.records.retain(|record| record.end_offset() <= end);
        self.end = self.records.last().map_or(end, IndexRecord::end_offset);
        self.first = self.first.min(self.end);
    }

    fn at(&self, offset: u64) -> Option<IndexRecord> {
        let holds = |r: &&IndexRecord| r.base_offset <= offset && offset < r.end_offset();
        self.records
            .iter()
            .find(holds)
            .copied()
            .filter(|_| offset >= self.first)
    }

    fn live(&self) -> impl Iterator<Item = &IndexRecord> {
        self.records
            .iter()
            .filter(|record| record.end_offset() > self.first)
    }
}

/// A place between `low` and `high`, both included.
fn between(low: u64, high: u64, part: u16) -> u64 {
    low + (high - low) * u64::from(part) / u64::from(u16::MAX)
}

fn compare(index: &QueueIndex, model: &Model, part: u16) {
    assert_eq!(
        (index.first_offset(), index.end_offset()),
        (model.first, model.end)
    );
    let low = model.first.saturating_sub(3);
    for offset in [
        low,
        model.first,
        between(low, model.end + 3, part),
        model.end.saturating_sub(1),
        model.end,
    ] {
        assert_eq!(
            index.find(offset).unwrap(),
            model.at(offset),
            "find {offset}"
        );
        let expected: Vec<_> = model
            .live()
            .filter(|r| r.end_offset() > offset)
            .take(7)
            .copied()
            .collect();
        assert_eq!(
            index.find_from(offset, 7).unwrap(),
            expected,
            "find_from {offset}"
        );
    }
    for time in [0, between(0, model.time + 2, part), model.time] {
        let expected = model
            .live()
            .find(|record| record.timestamp_ms >= time)
            .map(|record| record.base_offset.max(model.first));
        assert_eq!(index.offset_at_time(time).unwrap(), expected, "time {time}");
    }
}

fn run(ops: Vec<(Op, u16)>) {
    let setup = Setup::new();
    let mut index = setup.open();
    let mut model = Model::default();
    for (op, part) in ops {
        match op {
            Op::Append {
                records,
                count,
                step_ms,
            } => {
                for _ in 0..u32::from(records) * 4 {
                    model.time += step_ms;
                    let record = IndexRecord {
                        base_offset: model.end,
                        count,
                        batch: 1,
                        log_index: 9,
                        timestamp_ms: model.time,
                    };
                    index.append(record).unwrap();
                    model.end = record.end_offset();
                    model.records.push(record);
                }
            }
            Op::Flush => index.flush().unwrap(),
            Op::Sync => index.sync().unwrap(),
            Op::Reopen => {
                index.sync().unwrap();
                drop(index);
                index = setup.open();
            }
            Op::Crash => {
                // The buffered tail is lost, and what was trimmed since the last sync is back.
                drop(index);
                index = setup.open();
                assert!(!index.report().durable_loss);
                model.cut(index.end_offset());
                index.trim_front(model.first).unwrap();
            }
            Op::Truncate(to) => {
                let to = between(model.first, model.end, to);
                model.cut(to);
                let end = index.truncate_to(to).unwrap();
                if model.records.is_empty() {
                    model.end = end;
                    model.first = model.first.min(end);
                }
            }
            Op::Trim(to) => {
                model.first = between(model.first, model.end, to);
                index.trim_front(model.first).unwrap();
            }
            Op::Reset(to) => {
                let to = u64::from(to);
                index.reset_to(to).unwrap();
                model = Model {
                    first: to,
                    end: to,
                    ..Model::default()
                };
            }
        }
        compare(&index, &model, part);
        let (sound_end, fault) = index.check().unwrap();
        assert!(fault.is_none());
        assert_eq!(sound_end, model.end);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_vector(ops in proptest::collection::vec((op(), any::<u16>()), 1..25)) {
        run(ops);
    }
}
