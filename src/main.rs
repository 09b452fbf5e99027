//! The one binary: `quorate server` is a node, everything else talks to one.
#![forbid(unsafe_code)]

use std::process::ExitCode;

/// A message's way through a node is many small allocations, made and freed by different threads;
/// see docs/adr/0005-produce-path.md for what it saves.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quorate::cli::main()
}
