//! Runs seeds, each in a process of its own: what a process makes once, as its first random
//! numbers, would tell a first seed from a second.

use std::env;
use std::ops::Range;
use std::process::{Command, ExitCode, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use mad_turmoil::time::SimClocksGuard;
use parking_lot::Mutex;
use rand_of_mad_turmoil::SeedableRng;
use rand_of_mad_turmoil::rngs::StdRng;

use crate::cluster;
use crate::history::History;

/// What runs without being asked for more.
const SEEDS: Range<u64> = 0..5;
/// How often each of them is run, to compare the histories.
const RUNS: u64 = 2;
/// Seeds that have failed once, when the scripts were as they are now.
const REGRESSIONS: &[u64] = &[20];
/// Lines of a failed seed's history that are shown.
const SHOWN: usize = 40;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    let parsed = text.parse();
    Some(parsed.unwrap_or_else(|_| panic!("{name} must be a number")))
}

pub fn main() -> ExitCode {
    if let Some(seed) = number("SIM_SEED") {
        return one(seed);
    }
    let from = number("SIM_FROM").unwrap_or(0);
    let runs = number("SIM_RUNS");
    let failed = match number("SIM_SEEDS") {
        Some(count) => many(from..from + count, runs.unwrap_or(1)),
        None => {
            many(REGRESSIONS.iter().copied(), runs.unwrap_or(1)) + many(SEEDS, runs.unwrap_or(RUNS))
        }
    };
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// In this process.
fn one(seed: u64) -> ExitCode {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    let _clocks = SimClocksGuard::init();
    if let Ok(filter) = env::var("SIM_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
    // A panic in a task of a node ends that task alone: here it counts.
    std::panic::set_hook(Box::new(|info| PANICS.lock().push(info.to_string())));
    let history = thread::spawn(move || cluster::run(seed)).join();
    let history = history.unwrap_or_else(|_| Arc::new(History::default()));
    for panic in PANICS.lock().drain(..) {
        history.violation(format_args!("panic: {panic}"));
    }
    history.lines().iter().for_each(|line| println!("{line}"));
    println!("history {:016x}", history.hash());
    match history.is_sound() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn spawn(seed: u64) -> Output {
    let program = env::current_exe().expect("this program");
    let child = Command::new(program)
        .env("SIM_SEED", seed.to_string())
        .output();
    child.expect("this program, again")
}

/// As many at a time as there are processors.
fn many(seeds: impl Iterator<Item = u64> + Send, runs: u64) -> u64 {
    let (failed, ran) = (AtomicU64::new(0), AtomicU64::new(0));
    let seeds = Mutex::new(seeds);
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let jobs = number("SIM_JOBS").map_or(jobs, |jobs| jobs as usize);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(seed) = { seeds.lock().next() } {
                    ran.fetch_add(1, Ordering::Relaxed);
                    if !passes(seed, runs) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let (failed, ran) = (failed.into_inner(), ran.into_inner());
    println!("{ran} seeds, each run {runs} times, {failed} failed");
    failed
}

fn passes(seed: u64, runs: u64) -> bool {
    let first = spawn(seed);
    if !first.status.success() {
        show(seed, &first);
        return false;
    }
    (1..runs).all(|_| is_same(seed, &first.stdout, &spawn(seed).stdout))
}

fn show(seed: u64, output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = text.lines().collect();
    let mut shown = format!("seed {seed} failed ({})\n", output.status);
    for line in &lines[lines.len().saturating_sub(SHOWN)..] {
        shown += &format!("    {line}\n");
    }
    shown += &String::from_utf8_lossy(&output.stderr);
    println!("{shown}again with: SIM_SEED={seed} cargo test --test simulation\n");
}

/// One seed, one history, to the letter.
fn is_same(seed: u64, first: &[u8], second: &[u8]) -> bool {
    if first == second {
        return true;
    }
    let [first, second] = [first, second].map(String::from_utf8_lossy);
    let parted = first.lines().zip(second.lines()).position(|(a, b)| a != b);
    let at = parted.unwrap_or(first.lines().count().min(second.lines().count()));
    let [first, second] = [first, second].map(|text| text.lines().nth(at).map(str::to_owned));
    println!("seed {seed} has two histories, which part in line {at}:");
    println!("    {first:?}\n    {second:?}");
    false
}
