//! Whole clusters in one thread, with simulated clock, network and disks: one seed, one history.
//!
//! ```text
//! cargo test --test simulation                  a few seeds, twice, with equal histories
//! SIM_SEEDS=2000 cargo test --test simulation   many; SIM_FROM sets the first one
//! SIM_SEED=17 cargo test --test simulation      one, with its history
//! ```
//!
//! `SIM_RUNS=5` runs every seed five times and compares the histories, `SIM_JOBS` says how many at a
//! time.
//!
//! `SIM_TRACE=1` prints the history as it happens, `SIM_LOG=info` the nodes' logs with it.

mod cluster;
mod faults;
mod healing;
mod history;
mod machine;
mod model;
mod node;
mod oracle;
mod replicas;
mod runner;
mod votes;
mod wires;
mod workload;

fn main() -> std::process::ExitCode {
    runner::main()
}
