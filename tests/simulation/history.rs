//! What happened, in order: the same seed must give the same history, to the letter.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

#[derive(Debug, Default)]
pub struct History {
    now_ms: AtomicU64,
    lines: Mutex<Vec<String>>,
    violations: Mutex<Vec<String>>,
}

impl History {
    /// Time goes on.
    pub fn set_now(&self, now: Duration) {
        self.now_ms.store(now.as_millis() as u64, Ordering::Relaxed);
    }

    pub fn note(&self, what: impl Display) {
        let now = self.now_ms.load(Ordering::Relaxed) as f64 / 1e3;
        let line = format!("{now:>8.3} {what}");
        if std::env::var_os("SIM_TRACE").is_some() {
            eprintln!("{line}");
        }
        self.lines.lock().push(line);
    }

    /// A broken promise. The seed has failed.
    pub fn violation(&self, what: impl Display) {
        self.note(format_args!("VIOLATION {what}"));
        self.violations.lock().push(what.to_string());
    }

    pub fn is_sound(&self) -> bool {
        self.violations.lock().is_empty()
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().clone()
    }

    pub fn hash(&self) -> u64 {
        let lines = self.lines.lock();
        xxh3_64(lines.join("\n").as_bytes())
    }
}
