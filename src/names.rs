//! The rule for names that users give: topics, consumer groups, producers.
//!
//! Invariant: a name that passes is safe in a URL, a log line and a metric label. It still never
//! becomes a path: directories are named by numeric ids.

/// Longest name, in characters (all ASCII, so also in bytes).
pub const MAX_NAME_CHARS: usize = 120;

/// The rule in words, for error details.
pub const NAME_RULE: &str =
    "1 to 120 characters of A-Z a-z 0-9 . _ - that don't begin with . or _ (reserved)";

/// Whether `name` follows [`NAME_RULE`].
pub fn is_valid_name(name: &str) -> bool {
    (1..=MAX_NAME_CHARS).contains(&name.len())
        && !name.starts_with(['_', '.'])
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Dead letters of a consumer group are in the topic of this prefix and the group's name.
pub const DEAD_LETTER_PREFIX: &str = "_dlq.";

/// The topic of a consumer group's dead letters.
pub fn dead_letter_topic(group: &str) -> String {
    format!("{DEAD_LETTER_PREFIX}{group}")
}

/// Whether users may read, list and delete a topic of this name: their own and dead letters. Other
/// names with a leading `_` are the server's and hidden; what users name or write to must pass
/// [`is_valid_name`].
pub fn is_readable_topic(name: &str) -> bool {
    is_valid_name(name.strip_prefix(DEAD_LETTER_PREFIX).unwrap_or(name))
}

/// Names of message headers that begin so are the server's own.
pub const RESERVED_HEADER_PREFIX: &str = "quorate.";

/// A tag must be something a filter can name.
pub fn check_tag(tag: &str) -> Result<(), String> {
    if tag.is_empty() || tag.len() > 255 || tag.contains("||") || tag.trim() != tag {
        return Err(
            "a tag has 1 to 255 bytes, no space at its ends and no || in it (which separates tags in filters)"
                .to_owned(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names() {
        for name in [
            "a",
            "orders",
            "Orders-2.eu_west",
            "0",
            "-",
            "a..b",
            &"x".repeat(120),
        ] {
            assert!(is_valid_name(name), "{name}");
        }
    }

    #[test]
    fn dead_letters_are_read_and_not_written() {
        let longest = dead_letter_topic(&"x".repeat(120));
        for name in ["_dlq.orders", &longest, "orders"] {
            assert!(is_readable_topic(name), "{name}");
        }
        assert!(!is_valid_name("_dlq.orders"));
        for name in ["_dlq.", "_dlq._dlq.a", "_dlq.a/b", "_exchange.a", "_x"] {
            assert!(!is_readable_topic(name), "{name}");
        }
    }

    #[test]
    fn hostile_names() {
        for name in [
            "",
            ".",
            "..",
            "../etc",
            "a/b",
            "a\\b",
            "_internal",
            ".hidden",
            "a b",
            "a\0b",
            "ä",
            "a\n",
            "%2e%2e",
            "a:b",
            "a*",
            &"x".repeat(121),
        ] {
            assert!(!is_valid_name(name), "{name:?}");
        }
    }
}
