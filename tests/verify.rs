//! `quorate verify --duration`: all promises at once, under load and every fault it knows.
//!
//! `QUORATE_VERIFY` are its arguments in the long form, for example
//! `QUORATE_VERIFY="--duration 5m --seed 12 --nodes 5 --faulty 2" cargo test --test verify`.

mod support;

use std::path::Path;
use std::process::{Output, Stdio};

use anyhow::{Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::eventually;
use tokio::process::{Child, Command};

fn verify(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command
        .args(["verify", "--json"])
        .args(args)
        .env_remove("QUORATE_URL")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn told(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}: {}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", told(output)))
}

/// Processes that have this text among their arguments.
fn processes(text: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let id = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let arguments = std::fs::read(path.join("cmdline")).unwrap_or_default();
        if let Some(id) = id
            && String::from_utf8_lossy(&arguments).contains(text)
        {
            found.push(id);
        }
    }
    Ok(found)
}

fn signal(id: i32, signal: Signal) -> Result<()> {
    match Pid::from_raw(id) {
        Some(pid) => Ok(kill_process(pid, signal)?),
        None => bail!("no process has the id {id}"),
    }
}

/// A run that has its nodes, and the ids of their processes.
async fn running(dir: &Path) -> Result<(Child, Vec<i32>)> {
    let home = dir.to_string_lossy().into_owned();
    let args = [
        "--duration",
        "10m",
        "--faults=",
        "--rate",
        "20",
        "--dir",
        &home,
    ];
    let child = verify(&args).spawn()?;
    let config = format!("{home}/node-");
    let nodes = eventually("the run's nodes are there", || async {
        match processes(&config)? {
            nodes if nodes.len() == 3 => Ok(nodes),
            nodes => bail!("{} nodes", nodes.len()),
        }
    });
    Ok((child, nodes.await?))
}

#[tokio::test]
async fn every_promise_holds_under_every_fault() -> Result<()> {
    let long = std::env::var("QUORATE_VERIFY").unwrap_or_default();
    let args: Vec<&str> = match long.is_empty() {
        true => vec![
            "--duration",
            "14s",
            "--seed",
            "7",
            "--rate",
            "60",
            // How late is said by the long form; a busy machine is late.
            "--late",
            "30s",
        ],
        false => long.split_whitespace().collect(),
    };
    let output = verify(&args).output().await?;
    let report = report(&output);
    assert!(output.status.success(), "{report:#}");
    println!("{report:#}");
    assert_eq!(
        (&report["lost"], &report["violations"]),
        (&0.into(), &0.into())
    );
    assert!(report["acked"].as_u64() > Some(50), "{report:#}");
    assert!(
        report["faults"]["kinds"]["kill"].as_u64() > Some(0),
        "{report:#}"
    );
    assert!(
        report["reproduce"]
            .as_str()
            .is_some_and(|command| command.contains("--seed"))
    );
    assert!(report.get("kept").is_none(), "{report:#}");
    Ok(())
}

#[tokio::test]
async fn a_cluster_that_is_given_is_loaded_and_left_as_it_was() -> Result<()> {
    let cluster = support::Cluster::start(1).await?;
    let url = cluster.urls().remove(0);
    let args = [
        "--duration",
        "5s",
        "--late",
        "30s",
        "--rate",
        "40",
        "--queues",
        "2",
        "--url",
        &url,
    ];
    let output = verify(&args).output().await?;
    assert!(output.status.success(), "{}", told(&output));
    let report = report(&output);
    assert!(report["acked"].as_u64() > Some(0), "{report:#}");
    let topics = cluster.client().get("/v1/topics").await?;
    assert_eq!(
        topics["topics"].as_array().map(Vec::len),
        Some(0),
        "{topics}"
    );
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_done_is_refused() -> Result<()> {
    let cases: [(&[&str], &str); 6] = [
        (
            &["--duration", "9s", "--faults", "kill,meteor"],
            "there is no fault",
        ),
        (
            &[
                "--duration",
                "9s",
                "--faults",
                "kill",
                "--url",
                "http://127.0.0.1:1",
            ],
            "leave out --url",
        ),
        (&["--duration", "9s", "--faulty", "2"], "no majority"),
        (&["--duration", "0s"], "at least 1s"),
        (&["--faults", "kill"], "--acked"),
        (
            &["--duration", "9s", "--acked", "file"],
            "cannot be used with",
        ),
    ];
    for (args, why) in cases {
        let output = verify(args).output().await?;
        assert_eq!(output.status.code(), Some(2), "{}", told(&output));
        assert!(told(&output).contains(why), "{why}: {}", told(&output));
    }
    Ok(())
}

#[tokio::test]
async fn an_interrupted_run_leaves_no_process_and_proves_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let home = dir.path().join("interrupted");
    let (child, nodes) = running(&home).await?;
    let id = i32::try_from(child.id().unwrap_or_default())?;
    signal(id, Signal::INT)?;
    let output = child.wait_with_output().await?;
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(
        told(&output).contains("nothing is proved"),
        "{}",
        told(&output)
    );
    let left = processes(&home.to_string_lossy())?;
    assert!(left.is_empty(), "{left:?} of {nodes:?}");
    Ok(())
}

#[tokio::test]
async fn a_node_that_ends_by_itself_fails_the_run() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let home = dir.path().join("fails");
    let (child, nodes) = running(&home).await?;
    signal(nodes[0], Signal::KILL)?;
    let output = child.wait_with_output().await?;
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(
        told(&output).contains("ended: signal: 9"),
        "{}",
        told(&output)
    );
    assert!(home.join("node-1/log").exists(), "logs are kept");
    Ok(())
}
