//! The documents name tests that exist: `docs/guarantees.md` some for each promise,
//! `docs/messaging.md` some for each capability.

use std::fs;
use std::path::Path;

/// The text between each pair of backticks.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn every_promise_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/guarantees.md")).unwrap();
    // The first section says how all of them are tested.
    let mut promises = text.split("\n## ").skip(2).peekable();
    assert!(promises.peek().is_some());
    for promise in promises {
        let title = promise.lines().next().unwrap_or_default();
        let (_, held_by) = promise.split_once("Held by:").expect(title);
        let mut source = String::new();
        let mut tests = 0;
        for word in held_by.lines().flat_map(quoted) {
            if word.ends_with(".rs") {
                source = fs::read_to_string(root.join(word))
                    .unwrap_or_else(|e| panic!("{title}: {word}: {e}"));
            } else {
                let named = source.contains(&format!("fn {word}("));
                assert!(named, "{title}: there is no test {word} where it should be");
                tests += 1;
            }
        }
        assert!(tests > 0, "{title} names no test");
    }
}

#[test]
fn every_capability_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/messaging.md")).unwrap();
    let (_, table) = text.split_once("| capability |").unwrap();
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let mut checked = 0;
    for row in rows {
        let held_by = row.trim_end_matches(['|', ' ']);
        let (_, held_by) = held_by.rsplit_once('|').unwrap();
        let mut source = String::new();
        for word in quoted(held_by) {
            if word.ends_with(".rs") {
                source = fs::read_to_string(root.join(word))
                    .unwrap_or_else(|e| panic!("{row}: {word}: {e}"));
                assert!(
                    source.contains("#[cfg(test)]")
                        || source.contains("#[test]")
                        || source.contains("#[tokio::test"),
                    "{row}: no test is in {word}"
                );
            } else {
                let named = source.contains(&format!("fn {word}("));
                assert!(named, "{row}: there is no test {word} where it should be");
            }
        }
        assert!(!source.is_empty(), "{row}: names no test");
        checked += 1;
    }
    assert!(checked >= 12, "only {checked} rows");
}
