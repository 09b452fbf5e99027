//! From a filter's text to an [`Expression`]; errors say where, what was expected and what was found.

use bytes::Bytes;
use winnow::combinator::{alt, cut_err, delimited, eof, fail, opt, preceded, repeat, separated};
use winnow::error::{ErrMode, ParserError};
use winnow::prelude::*;
use winnow::stream::{LocatingSlice, Location, Stateful};
use winnow::token::{one_of, take_while};

use super::SelectionError;
use super::expression::{Comparison, Expression, Nature, Operand};
use super::like::Pattern;
use super::number::Number;

/// Parentheses and `not`s inside each other.
const MAX_DEPTH: u32 = 64;
const KEYWORDS: [&str; 9] = [
    "and", "or", "not", "in", "between", "like", "escape", "is", "null",
];

/// The state is the depth.
type Input<'i> = Stateful<LocatingSlice<&'i str>, u32>;
type Parsed<T> = Result<T, ErrMode<Fault>>;

/// The failure that got furthest.
#[derive(Debug, Default)]
struct Fault {
    /// In bytes.
    at: usize,
    expected: Vec<&'static str>,
    /// Instead of what was expected.
    reason: Option<String>,
}

impl ParserError<Input<'_>> for Fault {
    type Inner = Self;

    fn from_input(input: &Input<'_>) -> Self {
        Self {
            at: input.current_token_start(),
            ..Self::default()
        }
    }

    fn or(mut self, mut other: Self) -> Self {
        if self.at == other.at && self.reason.is_none() {
            self.expected.append(&mut other.expected);
            self.reason = other.reason;
            return self;
        }
        match self.at >= other.at {
            true => self,
            false => other,
        }
    }

    fn into_inner(self) -> Result<Self::Inner, Self> {
        Ok(self)
    }
}

pub fn parse(text: &str) -> Result<Expression, SelectionError> {
    let input = Stateful {
        input: LocatingSlice::new(text),
        state: 0,
    };
    let mut filter = delimited(blank, either, ending(named("the end", eof)));
    let parsed = filter.parse(input);
    parsed.map_err(|error| explain(text, error.inner()))
}

fn explain(text: &str, fault: &Fault) -> SelectionError {
    let (before, rest) = text.split_at_checked(fault.at).unwrap_or((text, ""));
    let reason = fault.reason.clone().unwrap_or_else(|| {
        let found = match rest.split_whitespace().next() {
            Some(word) => format!("{:?}", word.chars().take(40).collect::<String>()),
            None => "the end".to_owned(),
        };
        format!("expected {}, found {found}", fault.expected.join(", "))
    });
    SelectionError::Filter {
        character: before.chars().count() + 1,
        reason,
    }
}

fn blank(input: &mut Input<'_>) -> Parsed<()> {
    take_while(0.., char::is_whitespace)
        .void()
        .parse_next(input)
}

/// `parser`, which is called `what` when it is not there, and the space behind it.
fn named<'i, T>(
    what: &'static str,
    mut parser: impl Parser<Input<'i>, T, ErrMode<Fault>>,
) -> impl Parser<Input<'i>, T, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        let at = input.current_token_start();
        let found = parser.parse_next(input).map_err(|error| match error {
            ErrMode::Backtrack(Fault { reason: None, .. }) => ErrMode::Backtrack(Fault {
                at,
                expected: vec![what],
                reason: None,
            }),
            other => other,
        })?;
        blank(input)?;
        Ok(found)
    }
}

fn symbol<'i>(symbol: &'static str) -> impl Parser<Input<'i>, &'i str, ErrMode<Fault>> {
    named(symbol, symbol)
}

fn word<'i>(input: &mut Input<'i>) -> Parsed<&'i str> {
    let first = one_of(|c: char| c.is_alphabetic() || c == '_');
    let rest = take_while(0.., |c: char| c.is_alphanumeric() || c == '_');
    (first, rest).take().parse_next(input)
}

fn keyword<'i>(keyword: &'static str) -> impl Parser<Input<'i>, &'i str, ErrMode<Fault>> {
    let is_it = move |word: &&str| word.eq_ignore_ascii_case(keyword);
    named(keyword, word.verify(is_it))
}

/// An error that no other way of reading can mend.
fn refused<T>(at: usize, reason: impl Into<String>) -> Parsed<T> {
    Err(ErrMode::Cut(Fault {
        at,
        expected: Vec::new(),
        reason: Some(reason.into()),
    }))
}

fn nested<'i, T>(
    input: &mut Input<'i>,
    mut parser: impl Parser<Input<'i>, T, ErrMode<Fault>>,
) -> Parsed<T> {
    if input.state == MAX_DEPTH {
        let at = input.current_token_start();
        return refused(
            at,
            format!("more than {MAX_DEPTH} levels inside each other"),
        );
    }
    input.state += 1;
    let parsed = parser.parse_next(input);
    input.state -= 1;
    parsed
}

/// What ends a condition. Had it gone on, that would have been read: its words are only here to be
/// named where neither comes.
fn ending<'i>(
    end: impl Parser<Input<'i>, &'i str, ErrMode<Fault>>,
) -> impl Parser<Input<'i>, &'i str, ErrMode<Fault>> {
    alt((keyword("and"), keyword("or"), end))
}

fn either(input: &mut Input<'_>) -> Parsed<Expression> {
    let first = both(input)?;
    let mut parts: Vec<_> =
        repeat(0.., preceded(keyword("or"), cut_err(both))).parse_next(input)?;
    if parts.is_empty() {
        return Ok(first);
    }
    parts.insert(0, first);
    Ok(Expression::Or(parts))
}

fn both(input: &mut Input<'_>) -> Parsed<Expression> {
    let first = negation(input)?;
    let mut parts: Vec<_> =
        repeat(0.., preceded(keyword("and"), cut_err(negation))).parse_next(input)?;
    if parts.is_empty() {
        return Ok(first);
    }
    parts.insert(0, first);
    Ok(Expression::And(parts))
}

fn negation(input: &mut Input<'_>) -> Parsed<Expression> {
    let negated = |input: &mut Input<'_>| {
        keyword("not").parse_next(input)?;
        let inner = nested(input, cut_err(negation))?;
        Ok(Expression::Not(Box::new(inner)))
    };
    let group = |input: &mut Input<'_>| {
        symbol("(").parse_next(input)?;
        let inner = nested(input, cut_err(either))?;
        cut_err(ending(symbol(")"))).parse_next(input)?;
        Ok(inner)
    };
    alt((negated, group, predicate)).parse_next(input)
}

fn predicate(input: &mut Input<'_>) -> Parsed<Expression> {
    let at = input.current_token_start();
    let left = operand(input)?;
    let choice = |i: &mut Input<'_>| {
        alt((in_list(at, &left), between(at, &left), like(at, &left))).parse_next(i)
    };
    let negated = preceded(keyword("not"), cut_err(choice));
    let negated = negated.map(|found| Expression::Not(Box::new(found)));
    let tail = alt((comparison(at, &left), is_null(&left), negated, choice));
    cut_err(tail).parse_next(input)
}

/// How two operands are compared, or why they can't be.
fn compare(
    left: Operand,
    comparison: Comparison,
    right: Operand,
) -> Result<Expression, &'static str> {
    let natures = [left.nature(), right.nature()];
    let has = |nature| natures.contains(&nature);
    let are_literals = |n: &Nature| matches!(n, Nature::Text | Nature::Number);
    if natures.iter().all(are_literals) {
        return Err("two literals are compared; one side must be a field");
    }
    match has(Nature::Number) || has(Nature::FieldOfNumber) {
        true if has(Nature::Text) => {
            Err("a number is compared with a text; write it without quotes")
        }
        true => Ok(Expression::Numbers(left, comparison, right)),
        false => Ok(Expression::Texts(left, comparison, right)),
    }
}

fn comparison<'i>(at: usize, left: &Operand) -> impl Parser<Input<'i>, Expression, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        let operator = alt((
            symbol("=").value(Comparison::Equal),
            symbol("<>").value(Comparison::NotEqual),
            symbol("!=").value(Comparison::NotEqual),
            symbol("<=").value(Comparison::LessOrEqual),
            symbol(">=").value(Comparison::GreaterOrEqual),
            symbol("<").value(Comparison::Less),
            symbol(">").value(Comparison::Greater),
        ))
        .parse_next(input)?;
        let right = cut_err(operand).parse_next(input)?;
        compare(left.clone(), operator, right).or_else(|reason| refused(at, reason))
    }
}

fn is_null<'i>(left: &Operand) -> impl Parser<Input<'i>, Expression, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        keyword("is").parse_next(input)?;
        let negated = opt(keyword("not")).parse_next(input)?.is_some();
        cut_err(keyword("null")).parse_next(input)?;
        let is_null = Expression::IsNull(left.clone());
        Ok(match negated {
            true => Expression::Not(Box::new(is_null)),
            false => is_null,
        })
    }
}

fn between<'i>(at: usize, left: &Operand) -> impl Parser<Input<'i>, Expression, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        keyword("between").parse_next(input)?;
        let mut bounds = cut_err((operand, preceded(keyword("and"), operand)));
        let (low, high) = bounds.parse_next(input)?;
        let above = compare(left.clone(), Comparison::GreaterOrEqual, low);
        let below = compare(left.clone(), Comparison::LessOrEqual, high);
        let both = above.and_then(|above| Ok(Expression::And(vec![above, below?])));
        both.or_else(|reason| refused(at, reason))
    }
}

fn in_list<'i>(at: usize, left: &Operand) -> impl Parser<Input<'i>, Expression, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        keyword("in").parse_next(input)?;
        let literals = separated(1.., literal, symbol(","));
        let mut list = cut_err(delimited(symbol("("), literals, symbol(")")));
        let list: Vec<Operand> = list.parse_next(input)?;
        one_of_list(left, list).or_else(|reason| refused(at, reason))
    }
}

fn one_of_list(left: &Operand, list: Vec<Operand>) -> Result<Expression, &'static str> {
    let (mut texts, mut numbers) = (Vec::new(), Vec::new());
    for literal in list {
        match literal {
            Operand::Text(text) => texts.push(text),
            Operand::Number(number) => numbers.push(number),
            _ => return Err("a list has texts or numbers"),
        }
    }
    match left.nature() {
        Nature::Text | Nature::Number => Err("what is looked for in a list must be a field"),
        _ if !texts.is_empty() && !numbers.is_empty() => {
            Err("a list has texts or numbers, not both")
        }
        Nature::FieldOfNumber if !texts.is_empty() => {
            Err("a number is compared with a text; write it without quotes")
        }
        _ if texts.is_empty() => Ok(Expression::InNumbers(left.clone(), numbers)),
        _ => {
            texts.sort_unstable();
            Ok(Expression::InTexts(left.clone(), texts))
        }
    }
}

fn like<'i>(at: usize, left: &Operand) -> impl Parser<Input<'i>, Expression, ErrMode<Fault>> {
    move |input: &mut Input<'i>| {
        keyword("like").parse_next(input)?;
        let pattern = cut_err(text).parse_next(input)?;
        let escape_at = input.current_token_start();
        let escape = opt(preceded(keyword("escape"), cut_err(text))).parse_next(input)?;
        let escape = match escape.as_ref().map(|text| text.chars().collect::<Vec<_>>()) {
            None => None,
            Some(chars) if chars.len() == 1 => chars.first().copied(),
            Some(_) => return refused(escape_at, "escape takes one character"),
        };
        if left.nature() != Nature::FieldOfText {
            return refused(at, "like looks at key, tag or a header");
        }
        match Pattern::new(&pattern, escape) {
            Ok(pattern) => Ok(Expression::Like(left.clone(), pattern)),
            Err(reason) => refused(at, reason),
        }
    }
}

fn operand(input: &mut Input<'_>) -> Parsed<Operand> {
    alt((field, literal)).parse_next(input)
}

fn literal(input: &mut Input<'_>) -> Parsed<Operand> {
    let text = text.map(|text| Operand::Text(Bytes::from(text)));
    let number = number.map(Operand::Number);
    alt((text, number)).parse_next(input)
}

/// `'…'`, in which a quote is doubled.
fn text(input: &mut Input<'_>) -> Parsed<String> {
    let quoted = |input: &mut Input<'_>| {
        "'".parse_next(input)?;
        let plain = take_while(1.., |c| c != '\'');
        let text: String = repeat(0.., alt((plain, "''".value("'")))).parse_next(input)?;
        let at = input.current_token_start();
        match opt("'").parse_next(input)? {
            Some(_) => Ok(text),
            None => refused(at, "a text ends with a quote (')"),
        }
    };
    named("'text'", quoted).parse_next(input)
}

fn number(input: &mut Input<'_>) -> Parsed<Number> {
    let digits = |input: &mut Input<'_>| {
        let at = input.current_token_start();
        let first = one_of(|c: char| c.is_ascii_digit() || c == '-' || c == '+');
        let rest = take_while(0.., |c: char| {
            c.is_ascii_alphanumeric() || "+-.".contains(c)
        });
        let written: &str = (first, rest).take().parse_next(input)?;
        match Number::parse(written) {
            Some(number) => Ok(number),
            None => refused(at, format!("{written:?} is not a number in range")),
        }
    };
    named("a number", digits).parse_next(input)
}

fn field(input: &mut Input<'_>) -> Parsed<Operand> {
    let known = |input: &mut Input<'_>| {
        let at = input.current_token_start();
        let name = word(input)?;
        match name.to_ascii_lowercase().as_str() {
            "headers" => cut_err(header).parse_next(input),
            "key" => Ok(Operand::Key),
            "tag" => Ok(Operand::Tag),
            "offset" => Ok(Operand::Offset),
            "timestamp_ms" => Ok(Operand::TimestampMs),
            "value_bytes" => Ok(Operand::ValueBytes),
            word if KEYWORDS.contains(&word) => fail(input),
            _ => refused(
                at,
                format!(
                    "{name:?} is not known; fields are headers.NAME, key, tag, offset, timestamp_ms and value_bytes"
                ),
            ),
        }
    };
    named("a field", known).parse_next(input)
}

/// What follows `headers`: `.NAME` or `['any name']`.
fn header(input: &mut Input<'_>) -> Parsed<Operand> {
    let at = input.current_token_start();
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let plain = preceded(".", take_while(1.., is_of_name)).map(str::to_owned);
    let quoted = delimited("[", text, "]");
    let name = alt((named(".NAME", plain), named("['NAME']", quoted))).parse_next(input)?;
    if name == quorate_storage::batch::TAG_HEADER {
        return refused(at, "a message's tag is the field tag");
    }
    Ok(Operand::Header(name))
}
