//! Patterns of topic exchanges, as AMQP 0-9-1 defines them and RabbitMQ reads them.
//!
//! Routing keys and patterns are words between dots; the empty text has no word at all. In a
//! pattern the word `*` stands for exactly one word and `#` for any number of them, also none. Only
//! whole words are special: `a*` is a word like any other.

/// Whether a routing key matches a pattern.
pub fn matches(pattern: &str, routing_key: &str) -> bool {
    let (pattern, key) = (words(pattern), words(routing_key));
    let (mut p, mut k) = (0, 0);
    // The last `#` and the word behind what it stands for so far: where to go on after a mismatch.
    // Going back to the last one is enough, since an earlier one could only take more words away.
    let mut last_hash: Option<(usize, usize)> = None;
    while k < key.len() {
        match pattern.get(p) {
            Some(&"#") => {
                last_hash = Some((p, k));
                p += 1;
            }
            Some(&word) if word == "*" || word == key[k] => {
                p += 1;
                k += 1;
            }
            _ => match last_hash {
                Some((hash, until)) => {
                    last_hash = Some((hash, until + 1));
                    p = hash + 1;
                    k = until + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|word| *word == "#")
}

fn words(text: &str) -> Vec<&str> {
    match text {
        "" => Vec::new(),
        text => text.split('.').collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bindings of RabbitMQ's own test of topic exchanges.
    const BINDINGS: [&str; 26] = [
        "a.b.c",
        "a.*.c",
        "a.#.b",
        "a.b.b.c",
        "#",
        "#.#",
        "#.b",
        "*.*",
        "a.*",
        "*.b.c",
        "a.#",
        "a.#.#",
        "b.b.c",
        "a.b.b",
        "a.b",
        "b.c",
        "",
        "*.*.*",
        "vodka.martini",
        "a.b.c",
        "*.#",
        "#.*.#",
        "*.#.#",
        "#.#.#",
        "*",
        "#.b.#",
    ];

    /// And what it expects, by the bindings' numbers from 1.
    #[test]
    fn as_rabbitmq_matches_them() {
        let expected: [(&str, &[usize]); 11] = [
            (
                "a.b.c",
                &[1, 2, 5, 6, 10, 11, 12, 18, 20, 21, 22, 23, 24, 26],
            ),
            ("a.b", &[3, 5, 6, 7, 8, 9, 11, 12, 15, 21, 22, 23, 24, 26]),
            ("a.b.b", &[3, 5, 6, 7, 11, 12, 14, 18, 21, 22, 23, 24, 26]),
            ("", &[5, 6, 17, 24]),
            ("b.c.c", &[5, 6, 18, 21, 22, 23, 24, 26]),
            ("a.a.a.a.a", &[5, 6, 11, 12, 21, 22, 23, 24]),
            ("vodka.gin", &[5, 6, 8, 21, 22, 23, 24]),
            ("vodka.martini", &[5, 6, 8, 19, 21, 22, 23, 24]),
            ("b.b.c", &[5, 6, 10, 13, 18, 21, 22, 23, 24, 26]),
            ("nothing.here.at.all", &[5, 6, 21, 22, 23, 24]),
            ("oneword", &[5, 6, 21, 22, 23, 24, 25]),
        ];
        for (key, numbers) in expected {
            let found: Vec<usize> = (1..=BINDINGS.len())
                .filter(|n| matches(BINDINGS[n - 1], key))
                .collect();
            assert_eq!(found, numbers, "{key:?}");
        }
    }

    #[test]
    fn only_whole_words_are_special() {
        assert!(matches("a*", "a*"));
        assert!(!matches("a*", "ab"));
        assert!(!matches("#a", "xa"));
        assert!(matches("a..b", "a..b"));
        assert!(matches("a.*.b", "a..b"));
        assert!(matches("*.*", "."));
    }

    #[test]
    fn hostile_patterns_cost_little() {
        let pattern = ["#", "a"].repeat(60).join(".");
        let key = vec!["a"; 127].join(".");
        assert!(!matches(&format!("{pattern}.b"), &key));
    }

    fn naive(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (None, Some(_)) => false,
            (Some((&"#", rest)), _) => (0..=key.len()).any(|n| naive(rest, &key[n..])),
            (Some(_), None) => false,
            (Some((word, rest)), Some((first, others))) => {
                (*word == "*" || word == first) && naive(rest, others)
            }
        }
    }

    proptest! {
        #[test]
        fn as_a_naive_matcher(
            pattern in proptest::collection::vec("[ab]|[*]|#|", 0..8),
            key in proptest::collection::vec("[ab]|", 0..8),
        ) {
            let (pattern, key) = (pattern.join("."), key.join("."));
            let expected = naive(&words(&pattern), &words(&key));
            prop_assert_eq!(matches(&pattern, &key), expected, "{:?} {:?}", pattern, key);
        }
    }
}
