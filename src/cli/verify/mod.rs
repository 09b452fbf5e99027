//! `quorate verify`: proves what a cluster promises.
//!
//! Two ways: `acked` reads a cluster as it is and compares it with acknowledgements from a file;
//! `run` makes load and faults itself for a while, and judges everything it saw.

mod acked;
mod run;

use clap::Args;

use super::client::Client;
use super::error::CliError;
use super::out::Output;

#[derive(Debug, Args)]
pub struct VerifyCommand {
    #[command(flatten)]
    acked: acked::AckedArgs,
    #[command(flatten)]
    run: run::RunArgs,
}

/// `given` says whether the cluster was named: a run without one starts its own.
pub async fn run(
    client: &Client,
    out: Output,
    command: VerifyCommand,
    given: bool,
) -> Result<(), CliError> {
    match command.run.duration {
        None => acked::run(client, out, command.acked).await,
        Some(duration) => {
            let existing = given.then_some(client);
            run::run(existing, out, command.run, duration).await
        }
    }
}
