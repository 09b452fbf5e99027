//! Runs seeds, each on a thread of its own, so that nothing is left of the one before.

use std::env;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use mad_turmoil::time::SimClocksGuard;
use parking_lot::Mutex;
use rand_of_mad_turmoil::SeedableRng;
use rand_of_mad_turmoil::rngs::StdRng;

use crate::cluster;
use crate::history::History;

/// What runs without being asked for more.
const SEEDS: u64 = 12;
/// Run twice, to compare the histories.
const TWICE: u64 = 2;
/// Seeds that have failed once.
const REGRESSIONS: &[u64] = &[];
/// Lines of a failed seed's history that are shown.
const SHOWN: usize = 60;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} must be a number")),
    )
}

pub fn main() -> ExitCode {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(0));
    let _clocks = SimClocksGuard::init();
    if let Ok(filter) = env::var("SIM_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
    // A panic in a task of a node ends that task alone: here it counts.
    std::panic::set_hook(Box::new(|info| PANICS.lock().push(info.to_string())));
    if let Some(seed) = number("SIM_SEED") {
        return one(seed);
    }
    let from = number("SIM_FROM").unwrap_or(0);
    let count = number("SIM_SEEDS");
    let mut failed = match count {
        Some(count) => many(from..from + count),
        None => {
            let mut failed = many(REGRESSIONS.iter().copied());
            failed += many(0..SEEDS);
            failed += (0..TWICE).filter(|seed| !same_twice(*seed)).count();
            failed
        }
    };
    if failed > 0 {
        failed = failed.min(100);
        println!("{failed} seeds failed");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn one(seed: u64) -> ExitCode {
    let history = run(seed);
    history.lines().iter().for_each(|line| println!("{line}"));
    println!("history {:016x}", history.hash());
    match history.is_sound() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn many(seeds: impl Iterator<Item = u64>) -> usize {
    let (mut failed, mut ran) = (0, 0);
    for seed in seeds {
        ran += 1;
        let history = run(seed);
        if history.is_sound() {
            continue;
        }
        failed += 1;
        let lines = history.lines();
        println!("seed {seed} failed: {:?}", history.violations());
        for line in &lines[lines.len().saturating_sub(SHOWN)..] {
            println!("    {line}");
        }
        println!("again with: SIM_SEED={seed} cargo test --test simulation");
    }
    println!("{ran} seeds, {failed} failed");
    failed
}

fn same_twice(seed: u64) -> bool {
    let (first, second) = (run(seed).lines(), run(seed).lines());
    let differs = first.iter().zip(&second).position(|(a, b)| a != b);
    let Some(line) =
        differs.or((first.len() != second.len()).then_some(first.len().min(second.len())))
    else {
        return true;
    };
    println!("seed {seed} has two histories:");
    println!("    {:?}", first.get(line));
    println!("    {:?}", second.get(line));
    false
}

fn run(seed: u64) -> Arc<History> {
    let dir = tempfile::tempdir().expect("a directory for what sled keeps");
    let path = dir.path().to_owned();
    let running = thread::spawn(move || {
        *mad_turmoil::rand::get_rng() = StdRng::seed_from_u64(seed);
        PANICS.lock().clear();
        let history = cluster::run(seed, &path);
        for panic in PANICS.lock().drain(..) {
            history.violation(format_args!("panic: {panic}"));
        }
        history
    });
    running.join().unwrap_or_else(|_| {
        let history = Arc::new(History::default());
        for panic in PANICS.lock().drain(..) {
            history.violation(format_args!("panic: {panic}"));
        }
        history
    })
}
