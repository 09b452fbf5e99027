//! Hostile inputs: real ones from a corpus, and what becomes of them when they are changed.
//!
//! A target reads every file of its corpus as it is, then as many changed ones as it is given time
//! for. The changes come from proptest, so an input that fails is made as small as it can be; it is
//! then written into the corpus, where every later run begins with it.
//!
//! - `FUZZ_SECONDS`: how long each target goes on; without it, a fixed number of cases.
//! - `FUZZ_SEED`: what the changes are drawn from, 0 without it. A run with the same seed and corpus
//!   tries the same inputs.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

/// One input of a target.
#[derive(Debug, Clone)]
pub struct Input {
    pub bytes: Vec<u8>,
    /// The target is to put right the checksums that it knows of, so that what they guard is reached.
    pub seal: bool,
}

/// One step from a good input to a bad one. Places are fractions of the length.
#[derive(Debug, Clone)]
enum Change {
    Flip {
        at: Index,
        bit: u8,
    },
    Overwrite {
        at: Index,
        bytes: Vec<u8>,
    },
    Number {
        at: Place,
        number: Number,
    },
    Insert {
        at: Index,
        bytes: Vec<u8>,
    },
    Truncate {
        at: Index,
    },
    Cut {
        from: Place,
        count: Index,
    },
    Duplicate {
        from: Place,
        count: Index,
        to: Place,
    },
    /// Goes on with the back of another input of the corpus.
    Splice {
        at: Place,
        other: Index,
        from: Place,
    },
    Replace {
        bytes: Vec<u8>,
    },
    /// Puts another word in the place of the one at hand.
    Word {
        at: Index,
        word: &'static str,
    },
}

/// What text may go wrong by: JSON, URLs, numbers.
const WORDS: [&str; 24] = [
    "",
    "null",
    "true",
    "-1",
    "0",
    "1",
    "01",
    "1e400",
    "2147483648",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
    "\"",
    "\\u0000",
    "\\ud800",
    "{",
    "[[[",
    "}",
    ",",
    "%",
    "%00",
    "%2F..",
    "&",
    "\n",
];

/// Where a field may begin.
#[derive(Debug, Clone)]
struct Place {
    at: Index,
    align: usize,
}

/// A value near a limit, as wide as a field.
#[derive(Debug, Clone)]
struct Number {
    value: u64,
    width: usize,
    big_endian: bool,
}

impl Place {
    fn within(&self, length: usize) -> usize {
        self.at.index(length + 1) / self.align * self.align
    }
}

impl Number {
    fn bytes(&self) -> Vec<u8> {
        if self.big_endian {
            self.value.to_be_bytes()[8 - self.width..].to_vec()
        } else {
            self.value.to_le_bytes()[..self.width].to_vec()
        }
    }
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    let end = bytes.len().min(at + with.len());
    let at = at.min(end);
    bytes[at..end].copy_from_slice(&with[..end - at]);
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let length = bytes.len();
        match self {
            Change::Flip { at, bit } if length > 0 => bytes[at.index(length)] ^= 1 << bit,
            Change::Flip { .. } => {}
            Change::Overwrite { at, bytes: with } => overwrite(bytes, at.index(length + 1), with),
            Change::Number { at, number } => overwrite(bytes, at.within(length), &number.bytes()),
            Change::Insert { at, bytes: more } => {
                let at = at.index(length + 1);
                bytes.splice(at..at, more.iter().copied());
            }
            Change::Truncate { at } => bytes.truncate(at.index(length + 1)),
            Change::Cut { from, count } => {
                let from = from.within(length);
                let count = count.index(length - from + 1).min(256);
                bytes.drain(from..from + count);
            }
            Change::Duplicate { from, count, to } => {
                let from = from.within(length);
                let count = count.index(length - from + 1).min(4096);
                let piece = bytes[from..from + count].to_vec();
                let to = to.within(length);
                bytes.splice(to..to, piece);
            }
            Change::Splice { at, other, from } => {
                let other = other.get(corpus);
                bytes.truncate(at.within(length));
                bytes.extend_from_slice(&other[from.within(other.len())..]);
            }
            Change::Replace { bytes: with } => bytes.clone_from(with),
            Change::Word { at, word } => {
                let at = at.index(length + 1);
                let inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-%".contains(byte);
                let before = bytes[..at].iter().rev().take_while(|b| inside(b)).count();
                let behind = bytes[at..].iter().take_while(|b| inside(b)).count();
                bytes.splice(at - before..at + behind, word.bytes());
            }
        }
    }
}

fn place() -> impl Strategy<Value = Place> {
    let align = prop::sample::select(vec![1usize, 1, 4, 8]);
    (any::<Index>(), align).prop_map(|(at, align)| Place { at, align })
}

fn number() -> impl Strategy<Value = Number> {
    let near = |limit: u64| limit.wrapping_sub(1)..=limit.saturating_add(1);
    let limits = [0, 8, 64, 128, 1 << 12, 1 << 16, 1 << 31, 1 << 32, 1 << 63];
    let mut values: Vec<u64> = limits.into_iter().skip(1).flat_map(near).collect();
    values.extend([0, 1, 2, u64::MAX, u64::MAX - 1]);
    let width = prop::sample::select(vec![1usize, 2, 4, 8]);
    (prop::sample::select(values), width, any::<bool>()).prop_map(|(value, width, big_endian)| {
        Number {
            value,
            width,
            big_endian,
        }
    })
}

fn change() -> impl Strategy<Value = Change> {
    let bytes = |most| prop::collection::vec(any::<u8>(), 1..most);
    prop_oneof![
        6 => (any::<Index>(), 0u8..8).prop_map(|(at, bit)| Change::Flip { at, bit }),
        3 => (any::<Index>(), bytes(9)).prop_map(|(at, bytes)| Change::Overwrite { at, bytes }),
        6 => (place(), number()).prop_map(|(at, number)| Change::Number { at, number }),
        2 => (any::<Index>(), bytes(40)).prop_map(|(at, bytes)| Change::Insert { at, bytes }),
        1 => any::<Index>().prop_map(|at| Change::Truncate { at }),
        2 => (place(), any::<Index>()).prop_map(|(from, count)| Change::Cut { from, count }),
        2 => (place(), any::<Index>(), place())
            .prop_map(|(from, count, to)| Change::Duplicate { from, count, to }),
        1 => (place(), any::<Index>(), place())
            .prop_map(|(at, other, from)| Change::Splice { at, other, from }),
        1 => bytes(300).prop_map(|bytes| Change::Replace { bytes }),
        3 => (any::<Index>(), prop::sample::select(WORDS.to_vec()))
            .prop_map(|(at, word)| Change::Word { at, word }),
    ]
}

/// What proptest draws: a file of the corpus, what is done to it, and whether it is sealed again.
type Case = (Index, Vec<Change>, bool);

fn case() -> impl Strategy<Value = Case> {
    // One change alone gets past the most checks.
    let changes = prop_oneof![
        prop::collection::vec(change(), 1..2),
        prop::collection::vec(change(), 1..6),
    ];
    (any::<Index>(), changes, any::<bool>())
}

/// `tests/corpus/<target>` of the crate that is tested.
pub fn directory(target: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    tests.join("corpus").join(target)
}

/// The files of a target's corpus, by name.
pub fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let listed = fs::read_dir(directory(target)).expect("a corpus");
    let mut paths: Vec<PathBuf> = listed.map(|file| file.expect("a file").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no corpus");
    let read = |path: PathBuf| (path.clone(), fs::read(path).expect("readable"));
    paths.into_iter().map(read).collect()
}

/// Runs `check`, which panics when it finds something wrong, on the corpus and on what is made of it.
pub fn fuzz(target: &str, cases: u32, check: impl Fn(&Input)) {
    let files = corpus(target);
    for (path, bytes) in &files {
        for seal in [false, true] {
            let input = Input {
                bytes: bytes.clone(),
                seal,
            };
            if catch_unwind(AssertUnwindSafe(|| check(&input))).is_err() {
                panic!("{} fails (seal: {seal})", path.display());
            }
        }
    }
    let seeds: Vec<Vec<u8>> = files.into_iter().map(|(_, bytes)| bytes).collect();
    let seconds = number_from("FUZZ_SECONDS");
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let mut seed = number_from("FUZZ_SEED").unwrap_or(0);
    let mut tried = 0u64;
    loop {
        run(target, cases, seed, &seeds, &check);
        tried += u64::from(cases);
        seed += 1;
        if Instant::now() >= until {
            break;
        }
    }
    println!("{target}: {tried} inputs, seeds up to {}", seed - 1);
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

fn run(target: &str, cases: u32, seed: u64, seeds: &[Vec<u8>], check: &impl Fn(&Input)) {
    let made = |(index, changes, seal): &Case| {
        let mut bytes = index.get(seeds).clone();
        for change in changes {
            change.apply(&mut bytes, seeds);
        }
        Input { bytes, seal: *seal }
    };
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 4096,
        ..Config::default()
    };
    let mut entropy = [0; 32];
    entropy[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &entropy);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&case(), |case| {
        check(&made(&case));
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Abort(reason)) => panic!("{target}: gave up: {reason}"),
        Err(TestError::Fail(reason, case)) => {
            let input = made(&case);
            let mut hasher = DefaultHasher::new();
            input.bytes.hash(&mut hasher);
            let name = format!("found-{:016x}", hasher.finish());
            let path = directory(target).join(name);
            fs::write(&path, &input.bytes).expect("write the input that failed");
            panic!(
                "{target} fails with seed {seed} (seal: {}): {reason}; the input is now {}",
                input.seal,
                path.display()
            );
        }
    }
}
