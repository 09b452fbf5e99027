//! Which messages of a queue a reader wants: tags, and a filter over headers and attributes.
//!
//! The filter's language is that of SQL conditions, as JMS selectors have it:
//!
//! ```text
//! headers.region = 'eu' and (headers.amount between 10 and 20 or headers.vip is not null)
//! and not tag in ('draft', 'test')
//! ```
//!
//! - Fields: `headers.NAME` (`headers['any name']`), `key`, `tag` are text; `offset`,
//!   `timestamp_ms`, `value_bytes` are numbers. Of several headers with one name the last counts.
//! - Literals: `'text'` (a quote in it is doubled) and numbers: `-1`, `2.5`, `1e3`.
//! - `=`, `<>`, `!=`, `<`, `<=`, `>`, `>=`, `in (…)`, `between … and …`, `like '…'` (`%` any text,
//!   `_` any character, `escape 'c'`), `is null`, each also with `not`; `not` binds more tightly than
//!   `and`, that more than `or`. Words are read in any case, names as they are written.
//! - Text compared with a number is read as a number; what is none is null there. Texts are ordered
//!   by their bytes.
//! - Logic has three values: what is null makes a comparison unknown, and only what is true passes.
//!   So `headers.a <> 'x'` leaves out messages without the header `a`, and so does its negation.
//!
//! A filter is parsed once per request, has at most [`MAX_FILTER_BYTES`], and is evaluated on the
//! stored record in place.

mod expression;
mod like;
mod number;
mod parse;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use quorate_storage::batch::RecordView;
use serde::{Deserialize, Serialize};

use super::BrokerError;
use expression::Expression;

pub const MAX_FILTER_BYTES: usize = 4096;
const MAX_TAGS: usize = 100;

/// See the module. The default is everything.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(into = "Written", try_from = "Written")]
pub struct Selection {
    tags: Vec<String>,
    filter: Option<Arc<Filter>>,
}

#[derive(Debug)]
struct Filter {
    text: String,
    expression: Expression,
}

/// A selection as users and peers write it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    tag: Option<String>,
    filter: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectionError {
    #[error("tag has an empty part; it must be one tag or several with || between them")]
    EmptyTag,
    #[error("tag names more than {MAX_TAGS} tags")]
    TooManyTags,
    #[error("filter has {bytes} bytes; it may have {MAX_FILTER_BYTES}")]
    FilterTooLong { bytes: usize },
    #[error("filter, character {character}: {reason}")]
    Filter {
        /// From 1.
        character: usize,
        reason: String,
    },
}

impl From<SelectionError> for BrokerError {
    fn from(error: SelectionError) -> Self {
        Self::InvalidRequest(error.to_string())
    }
}

/// What of a message is not in its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub offset: u64,
    pub timestamp_ms: u64,
}

impl Selection {
    /// `tag` as in `created||paid`, `filter` as in the module's documentation.
    pub fn parse(tag: Option<&str>, filter: Option<&str>) -> Result<Self, SelectionError> {
        Ok(Self {
            tags: tag.map(parse_tags).transpose()?.unwrap_or_default(),
            filter: filter.map(parse_filter).transpose()?.map(Arc::new),
        })
    }

    pub fn is_everything(&self) -> bool {
        self.tags.is_empty() && self.filter.is_none()
    }

    /// The tags as they were given.
    pub fn tag(&self) -> Option<String> {
        (!self.tags.is_empty()).then(|| self.tags.join("||"))
    }

    /// The filter as it was given.
    pub fn filter(&self) -> Option<&str> {
        self.filter.as_ref().map(|filter| filter.text.as_str())
    }

    /// Whether a message is wanted.
    pub fn takes(&self, record: &RecordView, seen: Seen) -> bool {
        self.takes_tag(record) && self.passes_filter(record, seen)
    }

    fn takes_tag(&self, record: &RecordView) -> bool {
        if self.tags.is_empty() {
            return true;
        }
        let tag = record.tag();
        tag.is_some_and(|tag| self.tags.iter().any(|wanted| wanted.as_bytes() == tag))
    }

    fn passes_filter(&self, record: &RecordView, seen: Seen) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.expression.truth(record, seen) == Some(true))
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.tags == other.tags && self.filter() == other.filter()
    }
}

impl Eq for Selection {}

impl From<Selection> for Written {
    fn from(selection: Selection) -> Self {
        Self {
            tag: selection.tag(),
            filter: selection.filter().map(str::to_owned),
        }
    }
}

impl TryFrom<Written> for Selection {
    type Error = SelectionError;

    fn try_from(written: Written) -> Result<Self, SelectionError> {
        Self::parse(written.tag.as_deref(), written.filter.as_deref())
    }
}

fn parse_tags(text: &str) -> Result<Vec<String>, SelectionError> {
    let tags: Vec<String> = text.split("||").map(|tag| tag.trim().to_owned()).collect();
    if tags.iter().any(String::is_empty) {
        return Err(SelectionError::EmptyTag);
    }
    match tags.len() > MAX_TAGS {
        true => Err(SelectionError::TooManyTags),
        false => Ok(tags),
    }
}

fn parse_filter(text: &str) -> Result<Filter, SelectionError> {
    let bytes = text.len();
    if bytes > MAX_FILTER_BYTES {
        return Err(SelectionError::FilterTooLong { bytes });
    }
    Ok(Filter {
        expression: parse::parse(text)?,
        text: text.to_owned(),
    })
}
