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
const SEEDS: Range<u64> = 0..8;
/// Run twice, to compare the histories.
const TWICE: Range<u64> = 0..2;
/// Seeds that have failed once, when the scripts were as they are now.
const REGRESSIONS: &[u64] = &[];
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
    let failed = match number("SIM_SEEDS") {
        Some(count) => many(from..from + count),
        None => {
            let known = REGRESSIONS.iter().copied();
            many(known.chain(SEEDS)) + TWICE.filter(|seed| !same_twice(*seed)).count()
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
fn many(seeds: impl Iterator<Item = u64> + Send) -> usize {
    let (failed, ran) = (AtomicU64::new(0), AtomicU64::new(0));
    let seeds = Mutex::new(seeds);
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let jobs = number("SIM_JOBS").map_or(jobs, |jobs| jobs as usize);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(seed) = { seeds.lock().next() } {
                    ran.fetch_add(1, Ordering::Relaxed);
                    let output = spawn(seed);
                    if !output.status.success() {
                        failed.fetch_add(1, Ordering::Relaxed);
                        show(seed, &output);
                    }
                }
            });
        }
    });
    let (failed, ran) = (failed.into_inner(), ran.into_inner());
    println!("{ran} seeds, {failed} failed");
    failed as usize
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

fn same_twice(seed: u64) -> bool {
    let (first, second) = (spawn(seed).stdout, spawn(seed).stdout);
    if first == second {
        return true;
    }
    let (first, second) = (
        String::from_utf8_lossy(&first),
        String::from_utf8_lossy(&second),
    );
    let differs = first.lines().zip(second.lines()).find(|(a, b)| a != b);
    println!("seed {seed} has two histories: {differs:?}");
    false
}
