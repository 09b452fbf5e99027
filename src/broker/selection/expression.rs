//! What a filter says, and whether a record fulfils it: true, false, or unknown (`None`).

use std::cmp::Ordering;

use bytes::Bytes;
use quorate_storage::batch::RecordView;

use super::Seen;
use super::like::Pattern;
use super::number::Number;

#[derive(Debug, Clone, PartialEq)]
pub enum Expression {
    And(Vec<Expression>),
    Or(Vec<Expression>),
    Not(Box<Expression>),
    /// As texts, or as numbers.
    Texts(Operand, Comparison, Operand),
    Numbers(Operand, Comparison, Operand),
    /// Sorted.
    InTexts(Operand, Vec<Bytes>),
    InNumbers(Operand, Vec<Number>),
    Like(Operand, Pattern),
    IsNull(Operand),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    Header(String),
    Key,
    Tag,
    Offset,
    TimestampMs,
    ValueBytes,
    Text(Bytes),
    Number(Number),
}

/// What an operand is by its nature. A text of a message may also be read as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nature {
    /// Key, tag or header.
    FieldOfText,
    FieldOfNumber,
    Text,
    Number,
}

impl Comparison {
    fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
        }
    }
}

impl Operand {
    pub fn nature(&self) -> Nature {
        match self {
            Self::Header(_) | Self::Key | Self::Tag => Nature::FieldOfText,
            Self::Offset | Self::TimestampMs | Self::ValueBytes => Nature::FieldOfNumber,
            Self::Text(_) => Nature::Text,
            Self::Number(_) => Nature::Number,
        }
    }

    /// A slice of the record or of the filter, nothing copied.
    fn bytes(&self, record: &RecordView) -> Option<Bytes> {
        match self {
            Self::Header(name) => last_header(record, name),
            Self::Key => record.key.clone(),
            Self::Tag => record.tag(),
            Self::Text(text) => Some(text.clone()),
            Self::Offset | Self::TimestampMs | Self::ValueBytes | Self::Number(_) => None,
        }
    }

    fn number(&self, record: &RecordView, seen: Seen) -> Option<Number> {
        match self {
            Self::Offset => Some(seen.offset.into()),
            Self::TimestampMs => Some(seen.timestamp_ms.into()),
            Self::ValueBytes => Some((record.value.as_ref()?.len() as u64).into()),
            Self::Number(number) => Some(*number),
            text => Number::parse(std::str::from_utf8(&text.bytes(record)?).ok()?),
        }
    }

    fn is_null(&self, record: &RecordView) -> bool {
        match self {
            Self::ValueBytes => record.value.is_none(),
            Self::Offset | Self::TimestampMs | Self::Number(_) => false,
            text => text.bytes(record).is_none(),
        }
    }
}

/// The last one of that name is the one that readers are shown.
fn last_header(record: &RecordView, name: &str) -> Option<Bytes> {
    let named = |header: &quorate_storage::batch::HeaderView| header.key == name.as_bytes();
    record.headers.iter().filter(named).last()?.value
}

impl Expression {
    pub fn truth(&self, record: &RecordView, seen: Seen) -> Option<bool> {
        match self {
            Self::And(parts) => decided(parts, false, record, seen),
            Self::Or(parts) => decided(parts, true, record, seen),
            Self::Not(part) => part.truth(record, seen).map(|truth| !truth),
            Self::Texts(left, comparison, right) => {
                let order = left.bytes(record)?.cmp(&right.bytes(record)?);
                Some(comparison.holds(order))
            }
            Self::Numbers(left, comparison, right) => {
                let (left, right) = (left.number(record, seen)?, right.number(record, seen)?);
                Some(comparison.holds(left.order(right)))
            }
            Self::InTexts(operand, list) => {
                let text = operand.bytes(record)?;
                Some(list.binary_search(&text).is_ok())
            }
            Self::InNumbers(operand, list) => {
                let number = operand.number(record, seen)?;
                Some(list.iter().any(|listed| listed.order(number).is_eq()))
            }
            Self::Like(operand, pattern) => {
                let bytes = operand.bytes(record)?;
                Some(pattern.matches(std::str::from_utf8(&bytes).ok()?))
            }
            Self::IsNull(operand) => Some(operand.is_null(record)),
        }
    }
}

/// `and` is decided by one part that is false, `or` by one that is true, whatever else is unknown.
fn decided(parts: &[Expression], by: bool, record: &RecordView, seen: Seen) -> Option<bool> {
    let mut all_known = true;
    for part in parts {
        match part.truth(record, seen) {
            Some(truth) if truth == by => return Some(by),
            Some(_) => {}
            None => all_known = false,
        }
    }
    all_known.then_some(!by)
}
