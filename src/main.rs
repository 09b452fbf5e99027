//! The one binary: `quorate server` is a node, everything else talks to one.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    quorate::cli::main()
}
