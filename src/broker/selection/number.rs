//! Numbers as filters have them: whole ones exactly, the others as floating point.

use std::cmp::Ordering;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    Whole(i64),
    Real(f64),
}

impl Number {
    /// `-1`, `2.5`, `1e3`: a sign, digits, a fraction, an exponent. None for anything else, spaces
    /// included, and for what is too large.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        // The standard library also reads "inf" and "nan".
        let is_plain = digits.starts_with(|c: char| c.is_ascii_digit())
            && digits
                .bytes()
                .all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
        if !is_plain {
            return None;
        }
        if let Ok(whole) = text.parse() {
            return Some(Self::Whole(whole));
        }
        let real: f64 = text.parse().ok()?;
        real.is_finite().then_some(Self::Real(real))
    }

    fn real(self) -> f64 {
        match self {
            Self::Whole(whole) => whole as f64,
            Self::Real(real) => real,
        }
    }

    pub fn order(self, other: Self) -> Ordering {
        match (self, other) {
            (Self::Whole(a), Self::Whole(b)) => a.cmp(&b),
            // Never NaN, and -0.0 is 0.0: both sides are finite and parsed.
            (a, b) => a.real().partial_cmp(&b.real()).unwrap_or(Ordering::Equal),
        }
    }
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        i64::try_from(value).map_or(Self::Real(value as f64), Self::Whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_numbers_are_numbers() {
        for (text, number) in [
            ("0", Number::Whole(0)),
            ("-17", Number::Whole(-17)),
            ("+17", Number::Whole(17)),
            ("9223372036854775807", Number::Whole(i64::MAX)),
            (
                "9223372036854775808",
                Number::Real(9_223_372_036_854_775_808.0),
            ),
            ("2.5", Number::Real(2.5)),
            ("1e3", Number::Real(1000.0)),
        ] {
            assert_eq!(Number::parse(text), Some(number), "{text}");
        }
        for text in [
            "", "-", ".5", "inf", "NaN", "1e999", " 1", "1 ", "0x10", "1,5", "--1", "1-2",
        ] {
            assert_eq!(Number::parse(text), None, "{text}");
        }
    }

    #[test]
    fn large_whole_numbers_are_told_apart() {
        let (a, b) = (9_007_199_254_740_993, 9_007_199_254_740_992);
        assert_eq!(Number::Whole(a).order(Number::Whole(b)), Ordering::Greater);
        assert_eq!(Number::Whole(2).order(Number::Real(2.5)), Ordering::Less);
        assert_eq!(Number::Real(-0.0).order(Number::Whole(0)), Ordering::Equal);
    }
}
