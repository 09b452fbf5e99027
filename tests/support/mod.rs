//! Real clusters for tests: one `quorate server` process per node, on loopback ports of its own.
#![allow(dead_code)] // each test binary uses its part

pub mod client;
pub mod oracle;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use client::Client;
use quorate_raft::link::ReservedPort;

/// How long anything that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of processes. Dropping it kills them and deletes their data.
pub struct Cluster {
    pub nodes: Vec<Node>,
    dir: tempfile::TempDir,
    ports: Vec<ReservedPort>,
}

/// One process with its ports and its data.
pub struct Node {
    pub id: u64,
    pub url: String,
    config: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Cluster {
    /// Starts `count` nodes and waits until all are ready.
    pub async fn start(count: usize) -> Result<Self> {
        Self::start_with(count, "").await
    }

    /// The same with more lines for each configuration file.
    pub async fn start_with(count: usize, more: &str) -> Result<Self> {
        Self::prepare(count, more)?.start_prepared().await
    }

    /// The same with segments so small that a test fills several: a request has to fit twice.
    pub async fn start_small_segments(count: usize, more: &str) -> Result<Self> {
        let cluster = Self::prepare(count, more)?;
        for node in &cluster.nodes {
            let text = fs::read_to_string(&node.config)?;
            let text = text.replace("[http]\n", "[http]\nmax_request_bytes = 1048576\n");
            fs::write(&node.config, text)?;
        }
        cluster.start_prepared().await
    }

    async fn start_prepared(mut self) -> Result<Self> {
        for node in &mut self.nodes {
            node.spawn()?;
        }
        self.wait_ready().await?;
        Ok(self)
    }

    fn prepare(count: usize, more: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("quorate-test-").tempdir()?;
        let ports = (0..count * 2).map(|_| ReservedPort::new());
        let ports = ports.collect::<std::io::Result<Vec<_>>>()?;
        let numbers: Vec<u16> = ports.iter().map(ReservedPort::port).collect();
        let (http, peer) = numbers.split_at(count);
        // A small log is scanned fast when a node starts again.
        let log = match more.contains("[log]") {
            true => "",
            false => "[log]\nsegment_bytes = 33554432\n\n",
        };
        // Keys of a table that is there already belong into it.
        let (http_keys, more) = match more.strip_prefix("[http]\n") {
            Some(rest) => rest.split_once("\n\n").unwrap_or((rest, "")),
            None => ("", more),
        };
        let list = (0..count)
            .map(|i| {
                format!(
                    "  {{ id = {}, peer = \"127.0.0.1:{}\", url = \"http://127.0.0.1:{}\" }},\n",
                    i + 1,
                    peer[i],
                    http[i]
                )
            })
            .collect::<String>();
        let nodes = (0..count)
            .map(|i| {
                let home = dir.path().join(format!("node{}", i + 1));
                fs::create_dir_all(&home)?;
                let config = home.join("quorate.toml");
                let text = format!(
                    "node_id = {}\ndata_dir = {:?}\n\n[cluster]\nname = \"test\"\nnodes = [\n{list}]\n\n[http]\nlisten = \"127.0.0.1:{}\"\n{http_keys}\n\n[peer]\nlisten = \"127.0.0.1:{}\"\n\n{log}{more}\n",
                    i + 1,
                    home.join("data"),
                    http[i],
                    peer[i],
                );
                fs::write(&config, text)?;
                Ok(Node {
                    id: i as u64 + 1,
                    url: format!("http://127.0.0.1:{}", http[i]),
                    log: home.join("log"),
                    config,
                    process: None,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { nodes, dir, ports })
    }

    pub fn node(&mut self, id: u64) -> &mut Node {
        let index = id as usize - 1;
        &mut self.nodes[index]
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|n| n.url.clone()).collect()
    }

    pub fn client(&self) -> Client {
        Client::new(self.urls())
    }

    /// Waits until every running node says that it is ready.
    pub async fn wait_ready(&self) -> Result<()> {
        let http = reqwest::Client::builder().no_proxy().build()?;
        for node in self.nodes.iter().filter(|n| n.process.is_some()) {
            eventually(&format!("node {} is ready", node.id), || async {
                let answer = http
                    .get(format!("{}/health/ready", node.url))
                    .timeout(Duration::from_secs(2))
                    .send()
                    .await?;
                let status = answer.status();
                if status.is_success() {
                    return Ok(());
                }
                bail!("{status}: {}", answer.text().await.unwrap_or_default())
            })
            .await
            .with_context(|| node.last_log_lines())?;
        }
        Ok(())
    }

    /// All replicas of all Raft groups come to one index and hold the same there.
    pub fn replicas_agree(&self) -> Result<()> {
        let mut compare = Command::new(binary());
        compare.args(["cluster", "replicas", "--wait-s"]);
        compare.arg(PATIENCE.as_secs().to_string());
        compare.args(["--url", &self.urls().join(",")]);
        let output = compare.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        print!("{said}");
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            bail!("replicas do not agree: {said}{why}");
        }
        Ok(())
    }

    pub fn data_dir(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("node{id}")).join("data")
    }
}

/// The `quorate` binary; for the figures outside the test suite, one built with optimisations.
fn binary() -> PathBuf {
    std::env::var_os("QUORATE_BIN").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_quorate")),
        PathBuf::from,
    )
}

impl Node {
    pub fn spawn(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(binary());
        // The environment beats the file, where it is said who the node is.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("QUORATE_") && text != "QUORATE_MUTATION" {
                command.env_remove(name);
            }
        }
        let process = command
            .args(["server", "--config"])
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.process = Some(process);
        Ok(())
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.process.as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pid = self.pid().context("the node does not run")?;
        let status = Command::new("kill")
            .args([format!("-{name}"), pid.to_string()])
            .status()?;
        if !status.success() {
            bail!("kill -{name} {pid}: {status}");
        }
        Ok(())
    }

    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// SIGTERM, then waits for the exit. Returns the exit code and how long it took.
    pub fn terminate(&mut self) -> Result<(Option<i32>, Duration)> {
        self.signal("TERM")?;
        let began = Instant::now();
        let mut process = self.process.take().context("the node does not run")?;
        loop {
            if let Some(status) = process.try_wait()? {
                return Ok((status.code(), began.elapsed()));
            }
            if began.elapsed() > PATIENCE {
                process.kill().ok();
                process.wait().ok();
                bail!("node {} did not end after SIGTERM", self.id);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of what the process wrote, for failures.
    pub fn last_log_lines(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!("node {} ended its log with:\n{}", self.id, lines.join("\n"))
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Tries until it works or [`PATIENCE`] is over, and then says what the last failure was.
pub async fn eventually<T, F, Fut>(what: &str, mut attempt: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("never happened: {what}")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
