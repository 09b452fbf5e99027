//! `like` patterns: `%` stands for any text, `_` for any one character.

/// Longest pattern: matching takes at most this many steps per character of the text.
pub const MAX_PATTERN_CHARS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    AnyText,
    AnyCharacter,
    Character(char),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Vec<Piece>);

impl Pattern {
    /// The error says what is wrong with the pattern.
    pub fn new(text: &str, escape: Option<char>) -> Result<Self, &'static str> {
        if text.chars().nth(MAX_PATTERN_CHARS).is_some() {
            return Err("a pattern may have 256 characters");
        }
        let mut pieces = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            let piece = match c {
                c if Some(c) == escape => match chars.next() {
                    Some(next) if next == '%' || next == '_' || Some(next) == escape => {
                        Piece::Character(next)
                    }
                    _ => return Err("the escape character stands before %, _ or itself"),
                },
                '%' if pieces.last() == Some(&Piece::AnyText) => continue,
                '%' => Piece::AnyText,
                '_' => Piece::AnyCharacter,
                c => Piece::Character(c),
            };
            pieces.push(piece);
        }
        Ok(Self(pieces))
    }

    /// Goes back to the last `%` only: an earlier one could not match where a later one cannot.
    pub fn matches(&self, text: &str) -> bool {
        let mut rest = text.chars();
        let mut at = 0;
        let mut resume = None;
        loop {
            let before = rest.clone();
            let next = rest.next();
            match (self.0.get(at), next) {
                (Some(Piece::AnyText), _) => {
                    at += 1;
                    rest = before.clone();
                    resume = Some((at, before));
                    continue;
                }
                (None, None) => return true,
                (Some(Piece::AnyCharacter), Some(_)) => {
                    at += 1;
                    continue;
                }
                (Some(Piece::Character(wanted)), Some(c)) if *wanted == c => {
                    at += 1;
                    continue;
                }
                (Some(_), None) => return false,
                _ => {}
            }
            let Some((after, from)) = resume.as_mut() else {
                return false;
            };
            if from.next().is_none() {
                return false;
            }
            (at, rest) = (*after, from.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn like(text: &str, pattern: &str) -> bool {
        Pattern::new(pattern, Some('!')).unwrap().matches(text)
    }

    /// The definition itself.
    fn naive(text: &[char], pattern: &[char]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some(('%', rest)) => (0..=text.len()).any(|skip| naive(&text[skip..], rest)),
            Some(('_', rest)) => !text.is_empty() && naive(&text[1..], rest),
            Some((c, rest)) => text.first() == Some(c) && naive(&text[1..], rest),
        }
    }

    #[test]
    fn patterns() {
        for (text, pattern, matches) in [
            ("", "", true),
            ("", "%", true),
            ("a", "", false),
            ("order-17", "order-%", true),
            ("order-17", "%-1_", true),
            ("order-17", "order", false),
            ("äöü", "_ö_", true),
            ("100%", "100!%", true),
            ("1000", "100!%", false),
            ("a!b", "a!!b", true),
        ] {
            assert_eq!(like(text, pattern), matches, "{text} like {pattern}");
        }
        assert!(Pattern::new("a!b", Some('!')).is_err());
        assert!(Pattern::new("a!", Some('!')).is_err());
        assert!(Pattern::new(&"a".repeat(257), None).is_err());
        // Hostile, and done at once all the same.
        assert!(!like(
            &"a".repeat(1 << 16),
            &format!("{}b", "%a".repeat(100))
        ));
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(text in "[abä]{0,12}", pattern in "[abä%_]{0,8}") {
            let chars = |s: &str| s.chars().collect::<Vec<_>>();
            prop_assert_eq!(like(&text, &pattern), naive(&chars(&text), &chars(&pattern)));
        }
    }
}
