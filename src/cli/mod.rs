//! The command line: one file a subcommand, over the typed HTTP client in `client`.
//!
//! People get aligned tables, machines get the server's own JSON with `--json`. Every failure ends
//! in one of the exit codes of `CliError::exit_code`, which scripts may rely on.

mod audit;
mod bench;
mod client;
mod cluster;
mod consume;
mod error;
mod exchange;
mod group;
mod member;
mod out;
mod produce;
mod replicas;
mod server;
mod sse;
#[cfg(test)]
mod testing;
mod topic;
mod transaction;
mod verify;
mod wire;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use client::Client;
use error::CliError;
use out::Output;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed; for `verify`: something acknowledged is missing or replicas differ;
     for `cluster replicas`: they differ; for `audit`: there are findings
  2  wrong usage
  3  no node could be reached
  4  not done, and worth trying again later (429, 503)
  5  unknown: a write was sent and no answer tells whether it was stored";

/// A replicated message log: every queue is a Raft group, every acknowledgement is on a majority's disks.
#[derive(Debug, Parser)]
#[command(name = "quorate", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

/// How to reach the cluster and how to print what it says.
#[derive(Debug, Args)]
struct Connection {
    /// A node's URL; any node will do. Given several (repeated or with commas), the next one is
    /// tried when a connection fails. [default: http://127.0.0.1:8081]
    #[arg(
        long = "url",
        env = "QUORATE_URL",
        value_delimiter = ',',
        global = true
    )]
    urls: Vec<String>,
    /// Print JSON for machines: one value a line, errors on standard error.
    #[arg(long, global = true)]
    json: bool,
}

impl Connection {
    fn urls_or_default(&self) -> Vec<String> {
        match self.urls.is_empty() {
            true => vec!["http://127.0.0.1:8081".to_owned()],
            false => self.urls.clone(),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node.
    Server(Box<crate::config::ServerArgs>),
    /// Create, list, show, change and delete topics.
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Store messages: arguments, files, or the lines of standard input.
    Produce(produce::ProduceCommand),
    /// Read messages, to the end or for ever.
    Consume(consume::ConsumeCommand),
    /// Look at and move what consumer groups have committed.
    #[command(subcommand)]
    Group(group::GroupCommand),
    /// Exchanges: create, bind topics to them, publish through them.
    #[command(subcommand)]
    Exchange(exchange::ExchangeCommand),
    /// Look at transactions, and end those whose producer is gone.
    #[command(subcommand)]
    Transaction(transaction::TransactionCommand),
    /// Nodes, leaders, and elections as they happen.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Check a topic's producers for gaps, repetitions and disorder, and its offsets for holes.
    Audit(audit::AuditCommand),
    /// Measure: closed-loop throughput and latency, or the gap a failover leaves.
    Bench(bench::BenchCommand),
    /// Prove that nothing acknowledged is missing and that all replicas are the same: with
    /// --acked of a cluster as it is, with --duration under load and faults.
    Verify(Box<verify::VerifyCommand>),
}

/// Parses the arguments, runs the command, prints what went wrong, and says it in the exit code.
pub fn main() -> ExitCode {
    let (json, done) = match Cli::try_parse() {
        Ok(cli) => (cli.connection.json, run(cli)),
        // With --json, whether it was understood or not.
        Err(error) if error.use_stderr() && std::env::args_os().any(|a| a == "--json") => {
            let text = error.to_string();
            (true, Err(CliError::Usage(text.trim_end().to_owned())))
        }
        Err(error) => error.exit(),
    };
    match done {
        Ok(()) | Err(CliError::OutputClosed) => ExitCode::SUCCESS,
        Err(error) => {
            match json {
                true => eprintln!("{}", error.to_json()),
                false => eprintln!("{}", error.explain()),
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    if let Command::Server(command) = cli.command {
        return server::run(*command);
    }
    // A client has little to do at a time, and leaves the processors to the servers.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| CliError::io("start the runtime", source))?;
    runtime.block_on(run_client(cli))
}

async fn run_client(cli: Cli) -> Result<(), CliError> {
    let client = Client::new(&cli.connection.urls_or_default())?;
    let out = Output::new(cli.connection.json);
    match cli.command {
        Command::Server(_) => Ok(()), // `run` has taken it
        Command::Topic(command) => topic::run(&client, out, command).await,
        Command::Produce(command) => produce::run(&client, out, command).await,
        Command::Consume(command) => consume::run(&client, out, command).await,
        Command::Group(command) => group::run(&client, out, command).await,
        Command::Exchange(command) => exchange::run(&client, out, command).await,
        Command::Transaction(command) => transaction::run(&client, out, command).await,
        Command::Cluster(command) => cluster::run(&client, out, command).await,
        Command::Audit(command) => audit::run(&client, out, command).await,
        Command::Bench(command) => bench::run(&client, out, command).await,
        Command::Verify(command) => {
            let given = !cli.connection.urls.is_empty();
            verify::run(&client, out, *command, given).await
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn urls_can_be_repeated_and_separated_by_commas() {
        let cli = Cli::try_parse_from([
            "quorate",
            "--url",
            "http://a:1,http://b:2",
            "--url",
            "http://c:3",
            "cluster",
            "status",
        ])
        .unwrap();
        assert_eq!(
            cli.connection.urls,
            ["http://a:1", "http://b:2", "http://c:3"]
        );
    }

    #[test]
    fn the_connection_flags_may_stand_after_the_subcommand() {
        let cli =
            Cli::try_parse_from(["quorate", "topic", "list", "--json", "--url", "http://a:1"])
                .unwrap();
        assert!(cli.connection.json);
        assert_eq!(cli.connection.urls, ["http://a:1"]);
    }
}
